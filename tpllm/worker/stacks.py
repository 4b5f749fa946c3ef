"""Python stacks of a rank, written when it crashes or when the coordinator requests them."""

import faulthandler

from tpllm.channel.progress import STACK_SIGNAL


def dump_stacks_on_signal(fd: int) -> None:
    """Write all threads' stacks to the anonymous file `fd` on a crash, and on STACK_SIGNAL.

    The handler is written in C: it needs neither the interpreter's lock nor a responsive main
    thread. It writes files, lines and names of functions, but no values.
    """
    faulthandler.enable(file=fd)
    faulthandler.register(STACK_SIGNAL, file=fd)
