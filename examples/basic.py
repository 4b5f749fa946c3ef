"""Continues several prompts in one call: first greedy, then with sampling.

python examples/basic.py [MODEL]
"""

import sys

from tpllm import LLM, SamplingParams

PROMPTS = [
    "Psalms 23\n1 The LORD is my shepherd;",
    "Genesis 1\n1 In the beginning God created",
    "And Jesus answered and said unto them,",
]
GREEDY = SamplingParams(temperature=0, max_tokens=8)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=8)

with LLM(*sys.argv[1:]) as llm:  # without a model name: the small model that ships with tpllm
    for title, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
        print(f"--- {title}")
        for output in llm.generate(PROMPTS, params):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
