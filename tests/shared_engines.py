"""Real engines that many scripts share, each as if it had started its own.

A start takes seconds, and for scripts of a few lines a new engine would make no difference.
"""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import openai
import pytest

import tpllm
from tests.grammar_texts import start_trials, start_trials_of
from tests.server.conftest import Served, running_server
from tpllm import LLM, AsyncLLM
from tpllm.config.engine_config import EngineConfig

SETTINGS: dict[str, Any] = {"device": "cpu", "max_num_seqs": 16, "num_kv_blocks": 300}
NOT_HERE = "Qwen/Qwen3-8B"  # scripts that name it get the shipped model
ADDRESS = "127.0.0.1:8000"  # the server's address in the documents


class _Lent:
    """An engine without the ability to close it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class _LentLLM(_Lent):
    def __enter__(self) -> "_LentLLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        pass


class _LentAsyncLLM(_Lent):
    async def __aenter__(self) -> "_LentAsyncLLM":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        pass


class SharedEngines:
    """An LLM, an AsyncLLM, and a server on top of that.

    Attributes:
        address: the server's actual address, instead of `ADDRESS`
    """

    def __init__(self, llm: LLM, async_llm: AsyncLLM, served: Served) -> None:
        self.address = f"127.0.0.1:{served.port}"
        self._llm = llm
        self._async_llm = async_llm

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block, LLM and AsyncLLM return these engines after the usual checks.

        OpenAI's clients are closed at the end of the block, since scripts do not close them.
        """

        def llm(model: str | None = None, **settings: Any) -> _LentLLM:
            _check(model, settings)
            self._llm.reset_prefix_cache()  # as new
            return _LentLLM(self._llm)

        def async_llm(model: str | None = None, **settings: Any) -> _LentAsyncLLM:
            _check(model, settings)
            return _LentAsyncLLM(self._async_llm)

        with pytest.MonkeyPatch.context() as patch, ExitStack() as clients:

            def client(**options: Any) -> openai.OpenAI:
                return clients.enter_context(openai_client(**options))

            openai_client = openai.OpenAI
            patch.setattr(openai, "OpenAI", client)
            patch.setattr(tpllm, "LLM", llm)
            patch.setattr(tpllm, "AsyncLLM", async_llm)
            yield


def _check(model: str | None, settings: dict[str, Any]) -> None:
    EngineConfig.resolve(None if model == NOT_HERE else model, **{**settings, "device": "cpu"})


@contextmanager
def shared_engines(tensor_parallel_size: int = 1) -> Iterator[SharedEngines]:
    """Start the engines; `tensor_parallel_size` is for the LLM only."""
    async_llm = AsyncLLM(**SETTINGS)
    try:
        asyncio.run(start_trials_of(async_llm))
        with (
            LLM(**SETTINGS, tensor_parallel_size=tensor_parallel_size) as llm,
            running_server(lambda: _LentAsyncLLM(async_llm)) as served,
        ):
            start_trials(llm)
            yield SharedEngines(llm, async_llm, served)
    finally:
        async_llm.shutdown()
