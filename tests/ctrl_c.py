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
    """Send SIGINT to this process, from any thread; the main thread receives it."""
    os.kill(os.getpid(), signal.SIGINT)


def is_interrupted(call: Callable[[], object], line: int, modules: tuple[ModuleType, ...]) -> bool:
    """Press Ctrl-C before the nth line of the modules that `call` runs.

    Returns whether Ctrl-C was pressed: False if the call ended before that line.

    Raises:
        AssertionError: Ctrl-C was pressed, and no KeyboardInterrupt was raised.
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
    # lines of an earlier engine's finalizer would count, and Python drops exceptions in finalizers
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
