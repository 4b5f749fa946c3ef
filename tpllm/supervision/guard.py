"""Removes an engine's directory once its last worker has ended, whatever ended it.

The workers end with the coordinator: the kernel kills them (`tpllm.channel.child_process`) without
asking their interpreters, which may be busy in native code. A process that is killed cannot clean
up, so this one does. It is a program of its own, `python guard.py DIRECTORY FD`, started before the
workers, and waits in one system call: FD is the reading end of a pipe whose writing end every
worker holds and never uses, so that it is closed when the last of them is gone.
"""

import os
import shutil
import signal
import sys


def main() -> None:
    directory, fd = sys.argv[1], int(sys.argv[2])
    # whoever ends a group of processes politely means the workers, too: this one stays for that
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(fd, 1)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
