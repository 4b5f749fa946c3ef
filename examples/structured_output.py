"""Constrains answers to one of several words, a regular expression, a JSON schema or a grammar.

pip install 'tpllm[structured]'
python examples/structured_output.py [MODEL]
"""

import sys

from tpllm import LLM, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["sum"],
    "additionalProperties": False,
}
GRAMMAR = r"""
root   ::= number " + " number
number ::= [0-9]{1,3}
"""
CONSTRAINTS = {
    "choice": StructuredOutputsParams(choice=["yes", "no"]),
    "regex": StructuredOutputsParams(regex=r"[1-9][0-9]{0,3}"),
    # small models tend to repeat whitespace, so it is disabled
    "json": StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    "grammar": StructuredOutputsParams(grammar=GRAMMAR),
}
QUESTION = [{"role": "user", "content": "What is 348 + 44?"}]

with LLM(*sys.argv[1:]) as llm:
    params = [
        SamplingParams(temperature=0, max_tokens=64, structured_outputs=constraint)
        for constraint in CONSTRAINTS.values()
    ]
    outputs = llm.chat([QUESTION] * len(params), params)  # all constraints in one batch
    for name, output in zip(CONSTRAINTS, outputs, strict=True):
        print(f"{name}: {output.outputs[0].text}")
