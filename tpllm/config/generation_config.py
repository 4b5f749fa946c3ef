"""Sampling parameters that a checkpoint's generation_config.json recommends as defaults."""

from pathlib import Path
from typing import Any

from tpllm.checks import check_bool, read_json
from tpllm.sampling_params import SamplingParams

FILE_NAME = "generation_config.json"

# Names in the file -> our names. Its other fields are about other ways to generate.
_NAMES = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # the same names


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """Return the arguments of SamplingParams that the checkpoint recommends, if any.

    `do_sample: false` means greedy, and the file's sampling fields are then ignored. Without
    do_sample the sampling fields count, as in vLLM: many files recommend a temperature this way.

    Raises:
        ValueError: a value is out of range, or not of its type.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return {}
    config = read_json(path)
    is_greedy = config.get("do_sample") is False
    names = _NAMES if is_greedy else _NAMES | dict(zip(_SAMPLING, _SAMPLING, strict=True))
    defaults = {
        ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None
    }
    if is_greedy:
        defaults["temperature"] = 0.0
    try:
        if config.get("do_sample") is not None:
            check_bool("do_sample", config["do_sample"])
        SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; mend the file, or take the defaults of SamplingParams with "
            "generation_config='vllm'"
        ) from None
    return defaults
