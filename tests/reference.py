"""The outputs of transformers, and the rule by which our tokens equal them.

Two runs are equal if, in float32, their tokens agree up to the first choice whose margin is below
1e-3: matmul shapes and rank counts change the last bits, and a near-tie may then go either way.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parent / "data"
TIE = 1e-3


@dataclass(frozen=True)
class Greedy:
    """A prompt, its greedy continuation, and the margin of every choice in it (in logits)."""

    prompt_ids: list[int]
    output_ids: list[int]
    margins: list[float]

    def differs_from(self, token_ids: list[int]) -> str | None:
        """Return how `token_ids` differ by the rule above, or None."""
        for i, (ours, theirs) in enumerate(zip(token_ids, self.output_ids, strict=False)):
            if ours != theirs:
                if self.margins[i] < TIE:
                    return None
                return f"token {i} is {ours}, not {theirs}, at a margin of {self.margins[i]:.4f}"
        if len(token_ids) != len(self.output_ids):
            return f"{len(token_ids)} tokens, not {len(self.output_ids)}"
        return None


def assert_equal(references: list[Greedy], outputs: list[Any]) -> None:
    """Assert that every `RequestOutput` continues its prompt as the reference does."""
    wrong = []
    for i, (reference, output) in enumerate(zip(references, outputs, strict=True)):
        assert output.prompt_token_ids == reference.prompt_ids
        if difference := reference.differs_from(output.outputs[0].token_ids):
            wrong.append(f"prompt {i}: {difference}")
    assert not wrong, "\n".join(wrong)


def shipped_greedy() -> list[Greedy]:
    """Return 32 prompts of the shipped model, continued by transformers in float32 (64 tokens)."""
    items = json.loads((DATA / "expected.json").read_text())["items"]
    return [Greedy(item["prompt_ids"], item["output_ids"], item["margins"]) for item in items]


def make_random_model(
    folder: Path, family: str = "Qwen3", *, max_shard_size: str = "5GB", **changes: Any
) -> Path:
    """Save a small random model whose weights are large enough that margins are real."""
    import transformers

    shape = dict(
        vocab_size=4099,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=4098,
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(shape | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@torch.inference_mode()
def transformers_greedy(folder: Path, prompts: list[list[int]], num_tokens: int) -> list[Greedy]:
    """Continue prompts with transformers in float32 on the CPU, end tokens ignored."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    references = []
    for prompt in prompts:
        cache, step_ids = None, torch.tensor([prompt])
        output_ids, margins = [], []
        for _ in range(num_tokens):
            result = model(step_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            best = result.logits[0, -1].topk(2)
            output_ids.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            step_ids = best.indices[None, :1]
        references.append(Greedy(prompt, output_ids, margins))
    return references
