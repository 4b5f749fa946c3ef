"""Runs requests that end at different times, and ends one of them early.

python examples/async_requests.py [MODEL]
"""

import asyncio
import sys

from tpllm import AsyncLLM, RequestOutputKind, SamplingParams

PROMPTS = {
    "psalm": "Psalms 23\n1 The LORD is my shepherd;",
    "genesis": "Genesis 1\n1 In the beginning God created",
    "novel": "It is a truth universally acknowledged,",
}
NEW = RequestOutputKind.DELTA  # each output holds what is new since the last one
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, output_kind=NEW)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, output_kind=NEW)


async def follow(engine: AsyncLLM, name: str, params: SamplingParams) -> str:
    """Return the beginning of a request's text, and why it ended."""
    text, reason = "", None
    async for output in engine.generate(PROMPTS[name], params, request_id=name):
        completion = output.outputs[0]
        text, reason = text + completion.text, completion.finish_reason
    return f"{name} ({reason}): {text[:60]!r}"


async def main() -> None:
    async with AsyncLLM(*sys.argv[1:]) as engine:
        endless = asyncio.create_task(follow(engine, "novel", ENDLESS))
        answers = [follow(engine, name, GREEDY) for name in ("psalm", "genesis")]
        for answer in await asyncio.gather(*answers):  # while the endless request runs
            print(answer)
        await engine.abort("novel")  # its stream ends with the text so far
        print(await endless)
        stats = await engine.stats()
        print(f"{stats.num_running} requests run, {stats.num_waiting} wait")


asyncio.run(main())
