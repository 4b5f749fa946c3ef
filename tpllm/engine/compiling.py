"""Requests whose grammar is being compiled in a thread, so that no step waits for it."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec

from tpllm.engine.grammars import Grammar, Grammars
from tpllm.engine.request import AddRequest
from tpllm.structured_outputs import StructuredOutputsParams


class CompilingRequests:
    """Holds requests until `grammars` has compiled their grammar or has refused it."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._pool = ThreadPoolExecutor(1, "tpllm-grammars")
        self._done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waiting: dict[Future[Grammar | str], list[AddRequest]] = {}  # in order of arrival

    def fileno(self) -> int:
        """Return a descriptor that is readable when `take` has requests to return."""
        return self._done

    def load_tokenizer(self) -> None:
        """Read the tokenizer in the thread now, if structured outputs are installed."""
        if find_spec("llguidance") is not None:
            self._pool.submit(self._grammars.load)  # a request that needs it reports an error

    def add(self, requests: list[AddRequest], params: StructuredOutputsParams) -> None:
        """Hold the requests of one prompt. A compiled grammar does not wait behind others."""
        if self._grammars.has(params):
            future: Future[Grammar | str] = Future()
            future.set_result(self._compile(params))
        else:
            future = self._pool.submit(self._compile, params)
        self._waiting[future] = requests
        # `_compile` runs before the future is done: an engine that it woke would find nothing and
        # sleep again
        future.add_done_callback(self._wake)

    def _compile(self, params: StructuredOutputsParams) -> Grammar | str:
        """Return the grammar, or the error as text."""
        try:
            return self._grammars.compile(params)
        except (ValueError, RuntimeError) as error:
            return str(error)

    def _wake(self, future: Future[Grammar | str]) -> None:
        os.eventfd_write(self._done, 1)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop the requests with these ids, if they are held."""
        ids = set(request_ids)
        for requests in self._waiting.values():
            requests[:] = [each for each in requests if each.request_id not in ids]

    def take(self) -> Iterator[tuple[list[AddRequest], str | None]]:
        """Yield the requests whose grammar is done, with an error if it was refused.

        The grammar stays compiled while a request is yielded, however many others are compiled.
        """
        with suppress(BlockingIOError):
            os.eventfd_read(self._done)
        for future in [each for each in self._waiting if each.done()]:
            if requests := self._waiting.pop(future):
                result = future.result()  # keeps the grammar alive
                yield requests, result if isinstance(result, str) else None
