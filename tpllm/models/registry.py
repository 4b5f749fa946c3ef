"""From a checkpoint's architecture to the class that runs it."""

from importlib import import_module

from tpllm.model_config import ARCHITECTURES, ModelConfig


def model_class(config: ModelConfig) -> type:
    """Class of `config.architecture`; its module is imported only now, one family at a time.

    The table of names lives in `tpllm.model_config`, which must not import torch: an unknown
    architecture is refused there, before any worker starts.
    """
    module, name = ARCHITECTURES[config.architecture].split(":")
    found: type = getattr(import_module(module), name)
    return found
