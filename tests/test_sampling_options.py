"""Every sampling option through the whole engine: the tokens of `data/sampling_options.json`
however the work is split, and log-probabilities that are transformers' own.

    python -m tests.test_sampling_options

writes that file. It holds what float32 on a CPU sampled when the file was written, so a change of
it is a change of behaviour.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.marks import FOUR_GPUS
from tests.reference import shipped_greedy
from tpllm import SamplingParams, StructuredOutputsParams
from tpllm.config.checkpoint import resolve_model
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.coordinator import Coordinator
from tpllm.engine.request import AddRequest, TokenLogprobs
from tpllm.supervision.start import start_engine

pytestmark = pytest.mark.usefixtures("forked_engines")

PROMPTS = [each.prompt_ids for each in shipped_greedy()]
LONG = [*PROMPTS[20], *PROMPTS[21], *PROMPTS[22]]  # several blocks, and chunks where they are small


def params(**options: Any) -> SamplingParams:
    """Twenty tokens, so hot that options matter."""
    defaults: dict[str, Any] = {"temperature": 1.5, "max_tokens": 20, "ignore_eos": True}
    return SamplingParams(**{**defaults, **options})


# name -> prompt, settings, bad words as token ids
REQUESTS: dict[str, tuple[list[int], SamplingParams, list[list[int]]]] = {
    "plain": (PROMPTS[0], params(seed=1), []),
    "greedy": (PROMPTS[1], params(temperature=0, logprobs=4), []),
    "top_k": (PROMPTS[2], params(seed=3, top_k=7), []),
    "top_p": (PROMPTS[3], params(seed=4, top_p=0.7, logprobs=0), []),
    "min_p": (PROMPTS[4], params(seed=5, min_p=0.05), []),
    "penalties": (
        LONG,
        params(seed=6, temperature=3, repetition_penalty=1.4, frequency_penalty=0.5),
        [],
    ),
    "presence": (LONG, params(temperature=0, presence_penalty=2.0), []),
    "repetition": (LONG, params(temperature=0, repetition_penalty=100), []),
    "bias": (PROMPTS[7], params(seed=7, logit_bias={17: 8.0, 4000: 7.5, 9: -100}), []),
    "allowed": (PROMPTS[8], params(seed=8, allowed_token_ids=[5, 6, 7, 2500]), []),
    "bad words": (
        PROMPTS[9],
        params(seed=9, allowed_token_ids=[40, 41]),
        [[40, 40], [41, 40, 41, 41]],
    ),
    "min_tokens": (
        PROMPTS[10],
        params(seed=10, min_tokens=12, stop_token_ids=list(range(0, 4096, 2))),
        [],
    ),
    "frequency": (PROMPTS[14], params(seed=15, frequency_penalty=1.5, logprobs=1), []),
    "few stop ids": (
        PROMPTS[11],
        params(seed=16, min_tokens=9, stop_token_ids=[*range(3), 265], temperature=0.9),
        [],
    ),
    "structured": (
        PROMPTS[12],
        params(
            structured_outputs=StructuredOutputsParams(regex="[a-f ]{200}"), seed=17, logprobs=3
        ),
        [],
    ),
    "structured, truncated": (
        PROMPTS[13],
        params(
            structured_outputs=StructuredOutputsParams(regex="[A-Z]{99,400}"), seed=18, top_p=0.6
        ),
        [],
    ),
    "prompt_logprobs": (LONG, params(seed=11, prompt_logprobs=2, logprobs=1, top_k=50), []),
    "everything": (
        LONG,
        params(
            seed=12,
            temperature=2.5,
            top_k=200,
            top_p=0.95,
            min_p=0.001,
            repetition_penalty=1.1,
            frequency_penalty=0.2,
            presence_penalty=0.2,
            logit_bias={30: 3.0},
            min_tokens=5,
            logprobs=20,
            prompt_logprobs=0,
        ),
        [[30]],
    ),
}


EXPECTED = Path(__file__).parent / "data" / "sampling_options.json"


@dataclass
class Heard:
    """All that came back for one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None


def read_expected() -> dict[str, Heard]:
    def logprobs(entries: list[Any]) -> list[Any]:
        return [each and TokenLogprobs(*each) for each in entries]

    return {
        name: Heard(
            each["token_ids"],
            logprobs(each["logprobs"]),
            each["prompt_logprobs"] and logprobs(each["prompt_logprobs"]),
            each["finish_reason"],
        )
        for name, each in json.loads(EXPECTED.read_text()).items()
    }


def write_expected() -> None:
    coordinator = start()
    try:
        heard = serve(coordinator, list(REQUESTS))
    finally:
        coordinator.close()
    entries = [f"{json.dumps(name)}: {json.dumps(asdict(each))}" for name, each in heard.items()]
    EXPECTED.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def serve(coordinator: Coordinator, names: list[str]) -> dict[str, Heard]:
    """Run these requests of `REQUESTS` together."""
    requests = [AddRequest(name, *REQUESTS[name]) for name in names]
    coordinator.add(requests)
    heard = {name: Heard() for name in names}
    while coordinator.num_unfinished:
        for update in coordinator.step():
            each = heard[update.request_id]
            each.token_ids += update.new_token_ids
            each.logprobs += update.logprobs or []
            if update.prompt_logprobs is not None:
                assert each.prompt_logprobs is None and len(each.token_ids) == 1
                packed = update.prompt_logprobs
                each.prompt_logprobs = [None, *map(packed.position, range(packed.num_positions))]
            each.finish_reason = update.finish_reason
    return heard


def start(**settings: Any) -> Coordinator:
    return start_engine(EngineConfig.resolve(None, device="cpu", **settings))


@pytest.fixture(scope="module")
def engine() -> Iterator[Coordinator]:
    coordinator = start()
    yield coordinator
    coordinator.close()


@pytest.fixture(scope="module")
def together(engine: Coordinator) -> dict[str, Heard]:
    """Every request, all in one batch on one rank."""
    return serve(engine, list(REQUESTS))


def test_tokens_are_those_of_before(together: dict[str, Heard]) -> None:
    expected = read_expected()
    assert list(together) == list(expected)
    assert_same(together, expected)


def assert_same(ours: dict[str, Heard], expected: dict[str, Heard]) -> None:
    """Tokens are equal; log-probabilities as far as float32 allows."""
    for name, heard in ours.items():
        assert heard.token_ids == expected[name].token_ids, name
        assert heard.finish_reason == expected[name].finish_reason, name
        theirs = [*expected[name].logprobs, *(expected[name].prompt_logprobs or [])]
        for mine, other in zip(
            [*heard.logprobs, *(heard.prompt_logprobs or [])], theirs, strict=True
        ):
            assert (mine is None) == (other is None)
            if mine is not None and other is not None:
                assert (mine.token_ids[0], mine.ranks) == (other.token_ids[0], other.ranks)
                assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_each_option_shows_in_what_is_drawn(together: dict[str, Heard]) -> None:
    assert {17, 4000} & set(together["bias"].token_ids)
    assert 9 not in together["bias"].token_ids
    assert set(together["allowed"].token_ids) <= {5, 6, 7, 2500}
    words = together["bad words"].token_ids
    assert set(words) == {40, 41}
    assert not any(words[i : i + 2] == [40, 40] for i in range(20))
    assert not any(words[i : i + 4] == [41, 40, 41, 41] for i in range(20))
    early = together["min_tokens"]
    assert all(token % 2 for token in early.token_ids[:12])
    assert early.finish_reason == "stop" and early.token_ids[-1] % 2 == 0
    new = together["repetition"].token_ids
    assert len(set(new)) == 20 and not set(new) & set(LONG)
    assert 30 not in together["everything"].token_ids


def test_requests_alone_draw_what_they_draw_together(
    engine: Coordinator, together: dict[str, Heard]
) -> None:
    for name in REQUESTS:
        assert_same(serve(engine, [name]), together)


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 4},
        {"max_num_batched_tokens": 18, "max_num_seqs": 18, "num_kv_blocks": 30},
    ],
    ids=["two ranks", "four ranks", "small chunks and preemptions"],
)
def test_splitting_the_work_changes_nothing(
    settings: dict[str, Any], together: dict[str, Heard]
) -> None:
    coordinator = start(**settings)
    try:
        assert_same(serve(coordinator, list(REQUESTS)), together)
        stats = coordinator.stats
        if "num_kv_blocks" in settings:
            assert_same(serve(coordinator, list(REQUESTS)), together)  # the prefix cache is warm
            assert stats.num_cached_tokens > 0
            assert stats.num_preemptions > 0 and stats.num_prefill_chunks > 0
    finally:
        coordinator.close()


@pytest.mark.parametrize(
    "tp",
    [
        pytest.param(1, marks=pytest.mark.gpu),
        pytest.param(2, marks=pytest.mark.multi_gpu),
        pytest.param(4, marks=FOUR_GPUS),
    ],
)
def test_gpus_report_what_the_cpu_reports(tp: int, together: dict[str, Heard]) -> None:
    """Graphs, kernels, and sums over peer memory, in float32."""
    config = EngineConfig.resolve(None, device="cuda", dtype="float32", tensor_parallel_size=tp)
    coordinator = start_engine(config)
    try:
        assert_same(serve(coordinator, list(REQUESTS)), together)
    finally:
        coordinator.close()


def test_logprobs_are_those_of_transformers(together: dict[str, Heard]) -> None:
    """Of the model's own logits, whatever the options did to the draw."""
    from transformers import Qwen3ForCausalLM

    model: Any = Qwen3ForCausalLM.from_pretrained(resolve_model(None), dtype=torch.float32)
    num_checked = 0
    for name, heard in together.items():
        prompt, asked, _ = REQUESTS[name]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + heard.token_ids])).logits[0]
        exact = torch.log_softmax(logits.double(), dim=1)
        reports = {len(prompt) + i: each for i, each in enumerate(heard.logprobs)}
        reports |= {i: each for i, each in enumerate(heard.prompt_logprobs or []) if each}
        if heard.prompt_logprobs is not None:
            assert len(heard.prompt_logprobs) == len(prompt) and heard.prompt_logprobs[0] is None
        assert len(heard.logprobs) == (20 if asked.logprobs is not None else 0)
        for position, each in reports.items():
            row, token = exact[position - 1], (prompt + heard.token_ids)[position]
            assert each.token_ids[0] == token
            assert each.logprobs == pytest.approx(row[each.token_ids].tolist(), abs=1e-4)
            k = len(each.token_ids) - 1
            assert each.logprobs[1:] == pytest.approx(row.topk(k).values.tolist(), abs=1e-4)
            assert each.ranks[1:] == list(range(1, k + 1))
            near = ((row - row[token]).abs() < 1e-4).sum().item()
            rank = 1 + (row > row[token]).sum().item()
            assert abs(each.ranks[0] - rank) < near
            num_checked += 1
    assert num_checked > 80


def test_lists_that_no_step_could_carry_are_refused(engine: Coordinator) -> None:
    prompt, plain = PROMPTS[0], params()
    wrong = {
        "bad_words=.'x'. needs a tokenizer, and this engine has none": (
            (replace(plain, bad_words=["x"])),
            [],
        ),
        "bad_words holds 4096, outside": (replace(plain, bad_words=["x"]), [[1, 4096]]),
        "take 20493 words together, and a request may have 20478": (
            replace(
                plain,
                logit_bias=dict.fromkeys(range(4096), 1.0),
                allowed_token_ids=list(range(4096)),
            ),
            [[1] * 8202, [2]],
        ),
    }
    for message, (settings, bad_word_ids) in wrong.items():
        with pytest.raises(ValueError, match=message):
            engine.check(AddRequest("wrong", prompt, settings, bad_word_ids))


if __name__ == "__main__":
    write_expected()
