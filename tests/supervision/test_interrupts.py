"""Tests of `Interrupts`, which delays SIGINT; the engine uses it between two steps."""

import signal
import threading
from types import FrameType

import pytest

from tests.ctrl_c import press_ctrl_c
from tpllm.supervision.interrupts import Interrupts

pytestmark = pytest.mark.usefixtures("ctrl_c_raises")


def test_ctrl_c_waits_for_a_check():
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        interrupts.check()
        press_ctrl_c()
        reached.append("after Ctrl-C")
        interrupts.check()
        reached.append("after the check")
    assert reached == ["after Ctrl-C"]


def test_ctrl_c_without_a_check_is_raised_at_the_end():
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts():
        press_ctrl_c()
        reached.append("the end")
    assert reached == ["the end"]


def test_the_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), Interrupts():
        press_ctrl_c()
        press_ctrl_c()
        raise AssertionError("not reached")


def test_another_exception_is_not_hidden():
    with pytest.raises(OSError, match="disk"), Interrupts():
        press_ctrl_c()
        raise OSError("disk")


def test_the_outer_of_two_nested_ones_decides():
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts():
        with Interrupts():
            press_ctrl_c()
        reached.append("after the inner one")
    assert reached == ["after the inner one"]


def test_a_program_that_handles_ctrl_c_itself_continues_to_do_so():
    caught = []

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    signal.signal(signal.SIGINT, handle)
    with Interrupts() as interrupts:
        press_ctrl_c()
        interrupts.check()
    assert caught == [signal.SIGINT]
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is handle


def test_other_threads_are_left_alone():
    handlers = []

    def run() -> None:
        with Interrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
