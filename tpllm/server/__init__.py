"""The OpenAI-compatible HTTP server in front of an `AsyncLLM`.

`ServerSettings` needs no further packages; the other names need those of the extra `server`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tpllm.server.settings import ServerSettings

if TYPE_CHECKING:
    from tpllm.server.app import build_app
    from tpllm.server.serving import run, serve

__all__ = ["ServerSettings", "build_app", "run", "serve"]

_HOME = {"build_app": "app", "run": "serving", "serve": "serving"}


def __getattr__(name: str) -> object:
    """Import a name from its module at first use (PEP 562).

    Raises:
        ImportError: the packages of the extra are not installed.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'tpllm.server' has no attribute {name!r}")
    try:
        value: object = getattr(import_module(f"tpllm.server.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tpllm"):
            raise
        raise ImportError(
            f"the server needs the package {error.name!r}; run pip install 'tpllm[server]'"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
