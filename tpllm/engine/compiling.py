"""Requests with a grammar, while that is compiled in a thread: no step waits for it."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec

from tpllm.engine.grammars import Grammar, Grammars
from tpllm.engine.request import AddRequest
from tpllm.structured_outputs import StructuredOutputsParams


class CompilingRequests:
    """Holds requests back until `grammars` has their grammar, or knows that there is none."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._pool = ThreadPoolExecutor(1, "tpllm-grammars")
        self._done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waiting: dict[Future[Grammar | str], list[AddRequest]] = {}  # in order of arrival

    def fileno(self) -> int:
        """Readable when `take` has something to give."""
        return self._done

    def load_tokenizer(self) -> None:
        """Have the tokenizer read now, where it may be needed: other threads wait meanwhile."""
        if find_spec("llguidance") is not None:
            self._pool.submit(self._grammars.load)  # an error is told to whoever needs it

    def add(self, requests: list[AddRequest], form: StructuredOutputsParams) -> None:
        """Hold back the continuations of one prompt; not behind others where its form is known."""
        if self._grammars.knows(form):
            future: Future[Grammar | str] = Future()
            future.set_result(self._compile(form))
        else:
            future = self._pool.submit(self._compile, form)
        self._waiting[future] = requests
        # not by `_compile` itself: an engine woken before the future is done would find nothing,
        # and sleep again
        future.add_done_callback(self._wake)

    def _compile(self, form: StructuredOutputsParams) -> Grammar | str:
        """The grammar, or why there is none: compiled again, it would hold up a step."""
        try:
            return self._grammars.compile(form)
        except (ValueError, RuntimeError) as error:
            return str(error)

    def _wake(self, future: Future[Grammar | str]) -> None:
        os.eventfd_write(self._done, 1)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget those of the requests that are here."""
        ids = set(request_ids)
        for requests in self._waiting.values():
            requests[:] = [each for each in requests if each.request_id not in ids]

    def take(self) -> Iterator[tuple[list[AddRequest], str | None]]:
        """Requests that need not wait any longer, and why they are refused, if they are.

        Their grammars are compiled meanwhile, however many came after.
        """
        with suppress(BlockingIOError):
            os.eventfd_read(self._done)
        for future in [each for each in self._waiting if each.done()]:
            if requests := self._waiting.pop(future):
                result = future.result()  # holds their grammar meanwhile
                yield requests, result if isinstance(result, str) else None
