"""Prompts and streams of the commands that generate."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

import tpllm
from tpllm.outputs import RequestOutput
from tpllm.sampling_params import RequestOutputKind, SamplingParams

# Engine settings without a flag here: --seed is the request's, and text needs a tokenizer.
LEFT_OUT = ("seed", "skip_tokenizer_init")


def chat_prompt(llm: "tpllm.LLM", messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """Return a conversation as a prompt, rendered by the model's chat template.

    Raises:
        ValueError: the template does not take these messages.
    """
    tokenizer = llm.get_tokenizer()
    text = tokenizer.render_chat(messages)
    # the template contains every special token
    return {"prompt_token_ids": tokenizer.encode_batch([text], add_special_tokens=False)[0]}


def stream(
    llm: "tpllm.LLM", prompt: Any, params: SamplingParams
) -> Generator[RequestOutput, None, None]:
    """Yield the new part of one answer as it comes. Closing the generator ends the request."""
    params = replace(params, output_kind=RequestOutputKind.DELTA)
    with closing(llm.generate_stream(prompt, params)) as outputs:
        yield from outputs
