"""Searches for the likeliest continuations as a whole, instead of the likeliest token each time.

python examples/beam_search.py [MODEL]
"""

import sys

from tpllm import LLM, BeamSearchParams

PROMPTS = ["Psalms 23\n1 The LORD is my shepherd;", "And it came to pass,"]

with LLM(*sys.argv[1:]) as llm:
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    for prompt, output in zip(PROMPTS, llm.beam_search(PROMPTS, params), strict=True):
        print(f"--- {prompt!r}")
        for sequence in output.sequences:  # the best first; each text begins with the prompt
            continuation = (sequence.text or "").removeprefix(prompt)
            print(f"{sequence.score:8.4f} {continuation!r}")
