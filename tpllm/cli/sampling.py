"""SamplingParams as flags, and an answer as a stream of text: for the commands that generate."""

from argparse import ArgumentParser, Namespace
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from tpllm.cli.options import add_flags, given_flags
from tpllm.llm import LLM
from tpllm.outputs import RequestOutput
from tpllm.sampling_params import RequestOutputKind, SamplingParams

# Engine settings without a flag here: --seed is the request's own, and text takes a tokenizer.
LEFT_OUT = ("seed", "skip_tokenizer_init")

# What the commands decide by themselves (whether an answer comes in pieces), and what is no word.
UNTYPED = ("output_kind", "structured_outputs")


def add_sampling_flags(
    parser: ArgumentParser, defaults: Mapping[str, object], leave_out: tuple[str, ...] = ()
) -> None:
    """Flags for sampling parameters; `defaults` are this command's own."""
    add_flags(parser, SamplingParams, "sampling", (*UNTYPED, *leave_out), defaults)


def sampling_params(args: Namespace, defaults: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters that the command line asks for.

    Raises:
        ValueError: they are wrong.
    """
    given: dict[str, Any] = {**defaults, **given_flags(args, SamplingParams)}
    return SamplingParams(**given)


def chat_prompt(llm: LLM, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """A conversation as a prompt, in the words of the model's chat template.

    Raises:
        ValueError: the template does not take these messages.
    """
    tokenizer = llm.get_tokenizer()
    text = tokenizer.render_chat(messages)
    # the template spells out every special token
    return {"prompt_token_ids": tokenizer.encode_batch([text], add_special_tokens=False)[0]}


def stream(llm: LLM, prompt: Any, params: SamplingParams) -> Generator[RequestOutput, None, None]:
    """What is new of one answer, as it comes. Whoever stops listening ends the request."""
    params = replace(params, output_kind=RequestOutputKind.DELTA)
    with closing(llm.generate_stream(prompt, params)) as outputs:
        yield from outputs
