"""Where a rank's Python stacks go when it crashes, or when the coordinator asks for them."""

import faulthandler

from tpllm.channel.progress import STACK_SIGNAL


def answer_with_stacks(fd: int) -> None:
    """Write all threads' stacks to the anonymous file `fd` on a crash, and on STACK_SIGNAL.

    The handler is written in C: it needs neither the interpreter's lock nor a main thread that runs
    Python. Only files, lines and names of functions are written, no values.
    """
    faulthandler.enable(file=fd)
    faulthandler.register(STACK_SIGNAL, file=fd)
