"""The command against a server that speaks in fixed words."""

import asyncio
import json
import random
from typing import Any

import pytest

from tests.cli.fake_server import FakeServer, serving
from tpllm.cli import main
from tpllm.cli.bench.client import Server
from tpllm.cli.bench.prompts import WORDS, random_prompt, single_token_words, token_counter
from tpllm.config.checkpoint import SHIPPED_MODEL


def bench(fake: FakeServer, *words: str) -> int:
    few = ["--num-prompts", "4", "--num-warmups", "1", "--input-len", "6", "--output-len", "3"]
    return main(["bench", "serve", "--base-url", fake.url, *few, *words])


def result(capsys: Any) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return figures


def test_several_rates_give_a_curve_and_one_json_line(capsys):
    with serving(FakeServer()) as fake:
        assert bench(fake, "--request-rate", "200", "inf", "--goodput", "ttft:60000") == 0
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert [run["request_rate"] for run in figures["runs"]] == [200.0, "inf"]
    for run in figures["runs"]:
        assert (run["completed"], run["failed"]) == (4, 0)
        assert (run["input_tokens"], run["output_tokens"]) == (24, 12)
        assert run["goodput_requests_per_s"] == run["requests_per_s"] > 0
        assert set(run["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
    assert "200 requests per second" in output and "ttft p99" in output
    assert figures["arguments"]["input_len"] == [6, 6]


def test_requests_are_what_a_server_of_that_kind_takes(capsys):
    with serving(FakeServer()) as fake:
        assert bench(fake, "--extra-body", '{"top_k": 5}') == 0
        text = fake.bodies[-1].pop("prompt")
        assert len(text.split()) == 6 and set(text.split()) <= set(WORDS)
        assert fake.bodies[-1] == {
            "model": "fake",
            "max_tokens": 3,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "top_k": 5,
        }
        assert bench(fake, "--endpoint", "chat", "--respect-eos", "--model", "mine") == 0
    body = fake.bodies[-1]
    assert body["model"] == "mine" and "ignore_eos" not in body and "prompt" not in body
    assert len(body["messages"][0]["content"].split()) == 6


def test_prompts_repeat_with_the_seed_and_differ_from_each_other(capsys):
    with serving(FakeServer()) as fake:
        asked = []
        for seed in ("1", "1", "2"):
            fake.bodies.clear()
            assert bench(fake, "--seed", seed, "--max-concurrency", "1") == 0
            asked.append([body["prompt"] for body in fake.bodies])
    assert asked[0] == asked[1] != asked[2]
    assert len(set(asked[0])) == 5


def test_lengths_are_drawn_from_a_range(capsys):
    words = "--input-len 2-4 --output-len 1-2 --num-prompts 30"
    with serving(FakeServer()) as fake:
        assert bench(fake, *words.split()) == 0
    assert {len(body["prompt"].split()) for body in fake.bodies} == {2, 3, 4}
    assert {body["max_tokens"] for body in fake.bodies} == {1, 2}


def test_a_fixed_number_of_streams_is_a_load_too(capsys):
    with serving(FakeServer(first_s=0.01)) as fake:
        assert bench(fake, "--max-concurrency", "1", "2") == 0
    assert [run["max_concurrency"] for run in result(capsys)["runs"]] == [1, 2]
    assert fake.most_at_once == 2


def test_a_tokenizer_at_hand_counts_where_the_server_cannot(capsys):
    with serving(FakeServer(has_tokenize=False)) as fake:
        assert bench(fake) == 2
        assert "has no /tokenize to count tokens with; name" in capsys.readouterr().err
        assert bench(fake, "--tokenizer", str(SHIPPED_MODEL)) == 0


def test_random_words_are_as_many_tokens_as_asked_for():
    async def count() -> int:
        counter = token_counter(Server("http://nowhere"), "", str(SHIPPED_MODEL))
        words = await single_token_words(counter)
        return await counter(random_prompt(words, 50, random.Random(0)))

    assert asyncio.run(count()) == 50


def test_the_key_is_sent_and_never_shown(capsys, monkeypatch):
    with serving(FakeServer(api_key="secret")) as fake:
        assert bench(fake) == 1
        assert "HTTP 401" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert bench(fake) == 0
    output = capsys.readouterr()
    assert "secret" not in output.out + output.err


def test_failures_after_the_warm_up_are_counted(capsys):
    with serving(FakeServer(refuse=lambda number: number in (2, 3))) as fake:
        assert bench(fake) == 0
        [run] = result(capsys)["runs"]
        assert (run["completed"], run["failed"]) == (2, 2)
        assert list(run["errors"].values()) == [2]
    with serving(FakeServer(refuse=lambda number: number >= 1)) as fake:
        assert bench(fake) == 1  # nothing was measured


def test_a_warm_up_that_fails_ends_it(capsys):
    with serving(FakeServer(refuse=lambda number: True)) as fake:
        assert bench(fake) == 1
    assert "failed: /v1/completions answers with HTTP 429" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--request-rate 0", "'0' is not a rate above 0, or inf"),
        ("--request-rate nan", "'nan' is not a rate above 0"),
        ("--num-prompts 0", "'0' is not a whole number above 0"),
        ("--input-len 5-4", "'5-4' is a range that ends before it begins"),
        ("--input-len -4", "'' is not a whole number above 0"),
        ("--extra-body [1]", "'[1]' is not a JSON object"),
        ("--endpoint images", "invalid choice: 'images'"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_sent(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", *words.split()])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_no_server_is_one_line(capsys):
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("tpllm: error: no server answers at http://127.0.0.1:1")
    assert err.count("\n") == 1
