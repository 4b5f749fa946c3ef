"""`tpllm generate`: one prompt, one answer."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from tpllm.cli.command import Commands, add_command, add_engine_flags, engine, engine_settings
from tpllm.cli.options import add_flags, given_flags
from tpllm.cli.sampling import LEFT_OUT, chat_prompt, stream
from tpllm.outputs import RequestOutput
from tpllm.sampling_params import SamplingParams

DEFAULTS = {"temperature": 0.0, "max_tokens": 256}


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "generate",
        run,
        "answer or continue a prompt",
        'tpllm generate "What is 348 + 44?" --model Qwen/Qwen3-0.6B',
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the text; - reads it from stdin")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as text, without chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--json", action="store_true", help="print the whole output, token ids and all, as JSON"
    )
    add_flags(parser, SamplingParams, "sampling", defaults=DEFAULTS)
    add_engine_flags(parser, positional=False, leave_out=LEFT_OUT)


def run(args: Namespace) -> int:
    asked: dict[str, Any] = DEFAULTS | given_flags(args, SamplingParams)
    params = SamplingParams(**asked)
    _check(args, params)
    given = engine_settings(args)
    text = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    with engine(args, given) as llm, given.named_in_errors():
        prompt: Any = text
        if args.system is not None or not (args.raw or not llm.get_tokenizer().has_chat_template):
            system = [{"role": "system", "content": args.system}] if args.system else []
            prompt = chat_prompt(llm, [*system, {"role": "user", "content": text}])
        if sys.stdout.isatty() and params.n == 1 and not args.json:
            for output in stream(llm, prompt, params):
                print(output.outputs[0].text, end="", flush=True)
            print()
        else:
            [output] = llm.generate([prompt], params, use_tqdm=False)
            print(json.dumps(asdict(output)) if args.json else _all_texts(output))
    return 0


def _check(args: Namespace, params: SamplingParams) -> None:
    """Refuse flags that would have no effect, before an engine starts."""
    if args.raw and args.system is not None:
        raise ValueError("--system needs a chat template, which --raw does without; leave one out")
    if not args.json:
        if not params.detokenize:
            raise ValueError("--no-detokenize leaves nothing to show but with --json; add it")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(params, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is shown by --json alone; add it")


def _all_texts(output: RequestOutput) -> str:
    """Join the continuations, each below a line with its number if there are several."""
    texts = [completion.text for completion in output.outputs]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"--- {i + 1} of {len(texts)}\n{text}" for i, text in enumerate(texts))
