import signal
import threading
from functools import partial

import pytest

from tests.leaks import wait_until
from tpllm.offline.fair_lock import FairLock


def test_threads_get_the_lock_in_the_order_of_their_calls():
    lock = FairLock()
    had: list[int | str] = []

    def ask(number: int) -> None:
        with lock.hold():
            had.append(number)

    def is_long(length: int) -> bool:
        return len(lock._queue) == length

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
    with lock.hold():
        for i, thread in enumerate(threads):
            thread.start()
            assert wait_until(partial(is_long, i + 2))
        had.append("mine")
    with lock.hold():  # after those that asked before
        had.append("mine")
    for thread in threads:
        thread.join()
    assert had == ["mine", 0, 1, 2, 3, 4, "mine"]


def test_a_thread_that_holds_the_lock_or_waits_for_it_cannot_take_it_again():
    lock, refused = FairLock(), []

    def ask_again(*_: object) -> None:
        with pytest.raises(RuntimeError, match="in the middle of a step in this thread"):
            lock.hold().__enter__()
        with lock.try_hold() as is_held:
            refused.append(not is_held)

    with lock.hold():
        ask_again()
    is_held, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.hold():
            is_held.set()
            may_end.wait()

    def interrupt() -> None:
        assert wait_until(lambda: len(lock._queue) == 2)
        signal.pthread_kill(main, signal.SIGUSR1)
        assert wait_until(lambda: len(refused) == 2)
        may_end.set()

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, ask_again)
    threads = [threading.Thread(target=hold), threading.Thread(target=interrupt)]
    try:
        threads[0].start()
        is_held.wait()
        threads[1].start()
        with lock.hold():
            pass
    finally:
        signal.signal(signal.SIGUSR1, before)
    for thread in threads:
        thread.join()
    assert refused == [True, True]


def test_a_thread_that_stops_waiting_blocks_no_other_thread():
    lock, may_end = FairLock(), threading.Event()
    is_held = threading.Event()

    def hold() -> None:
        with lock.hold():
            is_held.set()
            may_end.wait()

    def give_up(*_: object) -> None:
        raise TimeoutError

    main = threading.get_ident()

    def interrupt() -> None:
        assert wait_until(lambda: len(lock._queue) == 2)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, give_up)
    threads = [threading.Thread(target=hold), threading.Thread(target=interrupt)]
    try:
        threads[0].start()
        is_held.wait()
        threads[1].start()
        with pytest.raises(TimeoutError), lock.hold():
            pass
    finally:
        signal.signal(signal.SIGUSR1, before)
    may_end.set()
    with lock.hold():
        pass
    for thread in threads:
        thread.join()
    with lock.try_hold() as is_free:
        assert is_free
