"""What a checkpoint's generation_config.json recommends to those who ask for nothing else."""

from pathlib import Path
from typing import Any

from tpllm.checks import read_json
from tpllm.sampling_params import SamplingParams

FILE_NAME = "generation_config.json"

# Its words -> ours. The rest of the file is about other ways to generate.
_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """Arguments of SamplingParams that the checkpoint recommends; empty without such a file.

    Raises:
        ValueError: a value is out of range, or not of its type.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return {}
    config = read_json(path)
    defaults = {
        ours: config[theirs] for theirs, ours in _NAMES.items() if config.get(theirs) is not None
    }
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; mend the file, or take the defaults of SamplingParams with "
            "generation_config='vllm'"
        ) from None
    return defaults
