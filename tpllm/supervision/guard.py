"""Removes an engine's directory once its last worker has ended, whatever ended it.

When the coordinator ends, the kernel kills the workers (`tpllm.channel.child_process`). A process
that is killed cannot clean up, so this separate program does: `python guard.py DIRECTORY FD`. It is
started before the workers and waits in one system call. FD is the reading end of a pipe. Every
worker holds its writing end and never uses it, so that it is closed when the last worker has ended.
"""

import os
import shutil
import signal
import sys


def main() -> None:
    directory, fd = sys.argv[1], int(sys.argv[2])
    # a signal to the whole process group also ends the workers, and the guard must outlive them
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(fd, 1)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
