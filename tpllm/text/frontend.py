"""Frontend: what LLM and AsyncLLM share: the settings, the tokenizer and the start of an engine."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from tpllm.config.engine_config import EngineConfig
from tpllm.config.settings import Settings, takes_settings
from tpllm.sampling_params import SamplingParams
from tpllm.text.tokenizer import Tokenizer

OnPhase = Callable[[int, str], None]


class Engine(Protocol):
    def kill(self) -> None: ...


E = TypeVar("E", bound=Engine)


class Frontend(ABC, Generic[E]):
    """Base class. The docstring of a subclass gets the list of all settings."""

    def __init_subclass__(cls) -> None:
        cls.__doc__ = f"{cls.__doc__}\n    Settings:\n{Settings.__doc__}"

    @takes_settings
    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        on_phase: OnPhase | None = None,
        **settings: Any,
    ) -> None:
        begin = time.perf_counter()
        self.config = EngineConfig.resolve(model, **settings)
        self._tokenizer: Tokenizer | None = None
        engine: E | None = None
        pool = ThreadPoolExecutor(1, "tpllm-tokenizer")
        try:
            if self.config.tokenizer_folder is not None:
                self._tokenizer = Tokenizer(self.config.tokenizer_folder)
                loading = pool.submit(self._tokenizer.load)  # while the engine starts
            engine = self._start(on_phase)
            if self._tokenizer is not None:
                loading.result()
        except BaseException:
            if engine is not None:
                engine.kill()
            raise
        finally:
            pool.shutdown(wait=False)
        self._use(engine)
        self.startup_s = time.perf_counter() - begin

    @abstractmethod
    def _start(self, on_phase: OnPhase | None) -> E:
        """Start the engine of `config`, and return it once it is ready."""

    @abstractmethod
    def _use(self, engine: E) -> None:
        """Keep the engine that has started."""

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer.

        Raises:
            ValueError: the engine was made without one.
        """
        if self._tokenizer is None:
            raise ValueError(
                "this engine has no tokenizer (skip_tokenizer_init=True, or dummy weights without "
                "one); pass token ids, or set tokenizer="
            )
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the default sampling parameters: see the setting `generation_config`."""
        return self.config.default_sampling_params
