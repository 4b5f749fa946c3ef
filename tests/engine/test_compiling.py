"""Grammars that are compiled beside the steps: whoever waits for one is woken."""

import os
import select
import time
from concurrent.futures import Future
from typing import Any, cast

from tpllm.engine.compiling import CompilingRequests
from tpllm.engine.grammars import Grammars
from tpllm.structured_outputs import StructuredOutputsParams


class NoGrammars:
    """Compiles nothing."""

    def knows(self, form: StructuredOutputsParams) -> bool:
        return False

    def compile(self, form: StructuredOutputsParams) -> None:
        pass


def test_what_wakes_the_engine_can_be_taken(monkeypatch) -> None:
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
