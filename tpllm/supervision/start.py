"""Starts an engine on this host: first its workers, then its coordinator."""

from collections.abc import Callable

from tpllm.config.engine_config import EngineConfig
from tpllm.engine.coordinator import Coordinator
from tpllm.engine.grammars import Grammars, read_tokenizer
from tpllm.supervision.host import Launch
from tpllm.supervision.launcher import WorkerGroup
from tpllm.supervision.sandbox import Sandbox
from tpllm.supervision.watch import Timeouts


def start_engine(
    config: EngineConfig,
    *,
    grammars: Grammars | None = None,
    on_phase: Callable[[int, str], None] | None = None,
    module: str = "tpllm.worker",
) -> Coordinator:
    """Start the workers and return the coordinator once all are ready.

    Args:
        config: the engine's settings
        grammars: compiles grammars; None to use the model's tokenizer, which is read at first use
        on_phase: called with rank and phase as the workers start
        module: the module that a worker runs; tests pass another one

    Raises:
        SettingError: the settings leave no room for a KV cache.
        WorkerError: a worker failed to start; all processes of the engine have ended.
    """
    settings = {"config": config.to_json()}
    workers = WorkerGroup(
        Launch(config.tensor_parallel_size, config.plan_limits, settings, module),
        Timeouts(config.start_timeout_s, config.step_timeout_s),
        on_phase,
    )
    return Coordinator(config, workers, grammars or engine_grammars(config))


def engine_grammars(config: EngineConfig) -> Grammars:
    """Return grammars for the model's tokenizer; a sandbox compiles each grammar first."""
    return Grammars(lambda: read_tokenizer(config), Sandbox(config))
