"""Ctrl-C at a chosen moment: between any two lines of the code under test."""

import gc
import inspect
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any


def press_ctrl_c() -> None:
    """From any thread; the main one gets it."""
    os.kill(os.getpid(), signal.SIGINT)


def is_interrupted(call: Callable[[], object], line: int, modules: tuple[ModuleType, ...]) -> bool:
    """Press Ctrl-C before the nth line of the modules that `call` runs.

    Returns whether it came to that: False where the call ended before.

    Raises:
        AssertionError: Ctrl-C was pressed, and no KeyboardInterrupt came out.
    """
    files = {inspect.getfile(module) for module in modules}
    num_lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal num_lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            num_lines += 1
            if num_lines == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    # the finalizer of an earlier test's engine would count; Python drops what is raised in one
    gc.disable()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        gc.enable()
    assert num_lines < line, f"Ctrl-C at line {line} of {num_lines} was lost"
    return False
