"""Uses OpenAI's client with a running server, such as `tpllm serve` in another terminal.

pip install openai
python examples/openai_client.py [BASE_URL]
"""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=(sys.argv[1:] or ["http://127.0.0.1:8000/v1"])[0], api_key="none")
model = client.models.list().data[0].id

completion = client.completions.create(
    model=model,
    prompt="Psalms 23\n1 The LORD is my shepherd;",
    temperature=0,
    max_tokens=8,
)
print("completion:", repr(completion.choices[0].text))

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is 348 + 44?"}],
    temperature=0,
    max_tokens=64,
)
print("chat:", answer.choices[0].message.content)

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Count from 469 to 473."}],
    temperature=0,
    max_tokens=64,
    stream=True,
    stream_options={"include_usage": True},
)
print("streamed: ", end="")
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    if chunk.usage is not None:
        print(f" ({chunk.usage.completion_tokens} tokens)")

# structured output by a schema; the server needs pip install 'tpllm[structured]' for it
schema = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["sum"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is 348 + 44?"}],
    temperature=0,
    max_tokens=256,
    response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
)
print("JSON:", json.loads(answer.choices[0].message.content or ""))

# parameters that OpenAI's API lacks are passed in extra_body
sampled = client.completions.create(
    model=model,
    prompt="Once upon a time",
    n=2,
    seed=7,
    max_tokens=8,
    extra_body={"top_k": 20, "min_p": 0.05},
)
for choice in sampled.choices:
    print("sampled:", repr(choice.text))
