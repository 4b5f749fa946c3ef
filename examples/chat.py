"""Answers two conversations at once, and then the next question in one of them.

python examples/chat.py [MODEL]
"""

import sys

from tpllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=64)

sums = [{"role": "user", "content": "What is 348 + 44?"}]
words = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Reverse: nethack"},
]

with LLM(*sys.argv[1:]) as llm:
    for conversation, output in zip([sums, words], llm.chat([sums, words], GREEDY), strict=True):
        conversation.append({"role": "assistant", "content": output.outputs[0].text})

    sums.append({"role": "user", "content": "What is 20 + 30?"})
    [output] = llm.chat(sums, GREEDY)
    sums.append({"role": "assistant", "content": output.outputs[0].text})

for conversation in (sums, words):
    print("---")
    for message in conversation:
        print(f"{message['role']}: {message['content']}")
