"""Prints the probabilities of generated tokens, and the perplexity of texts.

python examples/log_probabilities.py [MODEL]
"""

import math
import sys

from tpllm import LLM, SamplingParams

TEXTS = [
    "The LORD is my shepherd; I shall not want.",
    "The LORD is my tailor; I shall not iron.",
]

with LLM(*sys.argv[1:]) as llm:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    [output] = llm.generate("Psalms 23\n1 The LORD is my", params)
    completion = output.outputs[0]
    for token_id, entries in zip(completion.token_ids, completion.logprobs or [], strict=True):
        print(f"{entries[token_id].decoded_token!r}, out of")
        for entry in entries.values():
            print(f"    {entry.rank}. {entry.decoded_token!r}: {math.exp(entry.logprob):.1%}")

    # 0 reports only the prompt's own tokens. At least one token must be generated.
    for output in llm.generate(TEXTS, SamplingParams(max_tokens=1, prompt_logprobs=0)):
        positions = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
        # the first token has no log-probability, since nothing precedes it
        logprobs = [entries[token_id].logprob for token_id, entries in positions if entries]
        perplexity = math.exp(-sum(logprobs) / len(logprobs))
        print(f"perplexity {perplexity:.1f}: {output.prompt!r}")
