"""Tests of grammars that a thread compiles: the engine wakes when one is done."""

import os
import select
import time
from concurrent.futures import Future
from typing import Any, cast

from tpllm.engine.compiling import CompilingRequests
from tpllm.engine.grammars import Grammars
from tpllm.structured_outputs import StructuredOutputsParams


class NoGrammars:
    """Grammars that compile nothing."""

    def has(self, params: StructuredOutputsParams) -> bool:
        return False

    def compile(self, params: StructuredOutputsParams) -> None:
        pass


def test_a_request_can_be_taken_when_it_wakes_the_engine(monkeypatch) -> None:
    set_result = Future.set_result

    def set_late(future: Future[Any], result: Any) -> None:
        time.sleep(0.2)
        set_result(future, result)

    monkeypatch.setattr(Future, "set_result", set_late)
    compiling = CompilingRequests(cast(Grammars, NoGrammars()))
    try:
        request: Any = object()
        compiling.add([request], StructuredOutputsParams(choice=["a"]))
        assert select.select([compiling.fileno()], [], [], 30)[0]
        # nothing wakes the engine a second time
        assert list(compiling.take()) == [([request], None)]
    finally:
        compiling._pool.shutdown()
        os.close(compiling.fileno())
