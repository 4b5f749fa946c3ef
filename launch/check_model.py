"""Does an engine on the CPU continue 20 chat prompts as transformers does, in float32?

    python launch/check_model.py FOLDER --tensor-parallel-size 1 3

FOLDER is a checkpoint with a chat template, small enough for the CPU in float32, such as that of
SmolLM2-135M-Instruct (9 query heads and 3 KV heads: 1, 3 or 9 ranks). Greedy tokens must agree up
to the first choice whose margin is below 1e-3 in logits. Ends with status 1 if they do not.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from tpllm import LLM, SamplingParams

TIE = 1e-3
PROMPTS = [
    "What is the capital of France? Answer in one word.",
    "What is the capital of Japan?",
    "Name three colours.",
    "What is 12 + 30?",
    "Write one sentence about the sea.",
    "Translate 'good morning' into Spanish.",
    "List the days of the week.",
    "What do bees make?",
    "Explain gravity to a child in two sentences.",
    "Write a haiku about snow.",
    "Which planet is the largest?",
    "Give me a Python function that adds two numbers.",
    "What is the opposite of hot?",
    "Who wrote Romeo and Juliet?",
    "How many legs has a spider?",
    "Summarise: the cat sat on the mat because it was warm.",
    "What is H2O?",
    "Count from one to ten.",
    "Is the sun a star?",
    "Say hello in French, German and Italian.",
]


@torch.inference_mode()
def transformers_greedy(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], list]:
    """Return the greedy tokens after a prompt, and the margin of each choice in logits."""
    cache, step_ids = None, torch.tensor([prompt])
    tokens: list[int] = []
    margins: list[float] = []
    for _ in range(num_tokens):
        result = model(step_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        best = result.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        step_ids = best.indices[None, :1]
    return tokens, margins


def first_difference(ours: list[int], theirs: list[int], margins: list[float]) -> int | None:
    """Return the place of the first token that differs by more than a tie, or None."""
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            return None if margins[i] < TIE else i
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tensor-parallel-size", type=int, nargs="+", default=[1])
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    expected = [transformers_greedy(model, prompt, args.max_tokens) for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    num_wrong = 0
    for size in args.tensor_parallel_size:
        with LLM(args.folder, device="cpu", tensor_parallel_size=size, max_model_len=1024) as llm:
            outputs = llm.chat(chats, params, use_tqdm=False)
        for prompt, output, (tokens, margins) in zip(prompts, outputs, expected, strict=True):
            ours = list(output.outputs[0].token_ids)
            place = first_difference(ours, tokens, margins)
            if output.prompt_token_ids != prompt or place is not None:
                num_wrong += 1
                print(f"TP {size}: {tokenizer.decode(prompt)!r}: token {place} differs")
        print(f"TP {size}: {outputs[0].outputs[0].text!r}")
    print(f"{num_wrong} of {len(PROMPTS) * len(args.tensor_parallel_size)} continuations differ")
    sys.exit(num_wrong > 0)


if __name__ == "__main__":
    main()
