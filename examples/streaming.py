"""Prints a text while it is generated, then follows two prompts that grow side by side.

python examples/streaming.py [MODEL]
"""

import sys

from tpllm import LLM, RequestOutputKind, SamplingParams

PSALM = "Psalms 23\n1 The LORD is my shepherd;"
GENESIS = "Genesis 1\n1 In the beginning God created"
NEW = SamplingParams(temperature=0, max_tokens=24, output_kind=RequestOutputKind.DELTA)

with LLM(*sys.argv[1:]) as llm:
    print(PSALM, end="")
    for output in llm.generate_stream(PSALM, NEW):
        print(output.outputs[0].text, end="", flush=True)
    print("\n---")

    texts: dict[str, str] = {}  # by request
    pieces = 0
    for output in llm.generate_stream([PSALM, GENESIS], NEW):
        pieces += 1
        begun = texts.get(output.request_id, output.prompt or "")
        texts[output.request_id] = begun + output.outputs[0].text
    print("\n".join(texts.values()))
    print(f"--- {len(texts)} texts in {pieces} pieces")
