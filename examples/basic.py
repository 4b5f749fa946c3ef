"""Continues several prompts in one call: greedily, then by chance.

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
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=8)

with LLM(*sys.argv[1:]) as llm:  # no model named: the small one that ships with tpllm
    for title, params in (("greedy", GREEDY), ("drawn", DRAWN)):
        print(f"--- {title}")
        for output in llm.generate(PROMPTS, params):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
