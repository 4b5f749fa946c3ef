"""Asks several questions about one long text. After the first, the text is in the prefix cache.

python examples/prefix_caching.py [MODEL]
"""

import sys

from tpllm import LLM, SamplingParams

# Only whole blocks are shared: 16 tokens on the CPU, 256 in half precision on a GPU.
TEXT = "\n".join(f"{i} And the LORD said unto Moses, This is verse {i}." for i in range(1, 26))
QUESTIONS = ["\n26 And Moses", "\n26 And the people", "\n26 And it came to pass"]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def ask(title: str) -> None:
    print(f"--- {title}")
    for question in QUESTIONS:
        [output] = llm.generate(TEXT + question, GREEDY, use_tqdm=False)
        tokens = len(output.prompt_token_ids)
        print(f"{output.num_cached_tokens} of {tokens} tokens cached: {output.outputs[0].text!r}")


with LLM(*sys.argv[1:]) as llm:
    ask("the cache is empty")
    ask("the same questions again")
    llm.reset_prefix_cache()
    ask("emptied")
