"""Write docs/models.md from the registry: the families that tpllm runs, and what it refuses.

A test compares the file with the output of this script; run it after a change to a family.

    python launch/make_models_table.py
"""

import sys
from pathlib import Path

from tpllm.architectures.hf_config import IMPLEMENTED
from tpllm.architectures.hf_rope import FIELDS
from tpllm.architectures.registry import FAMILIES, Family

TARGET = Path(__file__).resolve().parents[1] / "docs" / "models.md"

INTRODUCTION = """\
# Models

<!-- written by launch/make_models_table.py; change tpllm/architectures/ instead -->

tpllm runs checkpoints of these families in safetensors, in bfloat16, float16 or float32. The first
column is the name in `architectures` of config.json, the second its `model_type`.
"""
# Models that people run, for each family.
EXAMPLES = {
    "Qwen3ForCausalLM": "Qwen/Qwen3-8B, Qwen/Qwen3-0.6B",
    "Qwen2ForCausalLM": (
        "Qwen/Qwen2.5-7B-Instruct, deepseek-ai/DeepSeek-R1-Distill-Qwen-7B, Qwen/QwQ-32B"
    ),
    "LlamaForCausalLM": (
        "meta-llama/Llama-3.1-8B-Instruct, meta-llama/Llama-3.2-1B-Instruct, "
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "MistralForCausalLM": "mistralai/Mistral-7B-Instruct-v0.3",
}
ROPE = """
## Rotary embeddings

`rope_scaling` (or `rope_parameters`) may have one of these types, with the fields that transformers
knows, and is computed as there. The longest context, the default of `max_model_len`, is
`max_position_embeddings`; `linear` multiplies it by its factor, and for `yarn` it is the factor
times `original_max_position_embeddings`. `dynamic` and `longrope` are refused: their frequencies
depend on the longest sequence of a batch.

"""
OVERRIDES = """
To extend the context of a model as its card recommends, give the fields as `hf_overrides` instead
of a change to config.json, in Python as a dict, in a flag or the environment as JSON:

```bash
tpllm info --hf-overrides '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}'
```
"""
REFUSED = """
## What is refused

A config.json that asks for anything else is refused, by the name and the value of the field. A
sliding window is refused unless it covers `max_model_len`.

| field | implemented |
|---|---|
"""


def models_page() -> str:
    """Return the whole page."""
    families = ["", "| architecture | model type | what it is | such as |", "|---|---|---|---|"]
    families += [_row(family) for family in FAMILIES]
    ropes = ["| type | required fields | optional fields |", "|---|---|---|"]
    for kind, (needed, possible) in FIELDS.items():
        ropes.append(f"| `{kind}` | {_names(needed)} | {_names(possible)} |")
    refused = "".join(f"| `{field}` | {only} |\n" for field, (_, only) in IMPLEMENTED.items())
    tables = ["\n".join(each) + "\n" for each in (families, ropes)]
    return INTRODUCTION + tables[0] + ROPE + tables[1] + OVERRIDES + REFUSED + refused


def _row(family: Family) -> str:
    summary = (sys.modules[family.spec.__module__].__doc__ or "").split("\n")[0]
    examples = EXAMPLES[family.architecture]
    return f"| `{family.architecture}` | `{family.model_type}` | {summary} | {examples} |"


def _names(fields: set[str]) -> str:
    return ", ".join(f"`{each}`" for each in sorted(fields))


if __name__ == "__main__":
    TARGET.write_text(models_page())
