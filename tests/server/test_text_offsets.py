"""Log-probabilities and their text: bytes and offsets of tokens."""

import array
import json
import random
import unicodedata
from collections.abc import AsyncGenerator, Iterator
from itertools import chain
from typing import Any

import httpx
import pytest

from tests.server.conftest import Served, running_server
from tests.server.fake_engine import FakeEngine
from tests.server.test_http import CHAT, HELLO
from tests.text.test_detokenizer import sentencepiece_like, word_level
from tpllm import SamplingParams
from tpllm.config.checkpoint import resolve_model
from tpllm.engine.request import PackedLogprobs, RequestUpdate, TokenLogprobs
from tpllm.outputs import RequestOutput
from tpllm.server.text_offsets import TextOffsets
from tpllm.text.output_processor import OutputProcessor
from tpllm.text.tokenizer import Tokenizer

COMPLETIONS = "/v1/completions"
SHIPPED = Tokenizer(resolve_model(None))
MULTI_BYTE = "naïve 🙂 日本語 é, 👩‍👩‍👧 end"
END, OPEN = 4095, 4094  # <|im_end|>, <|im_start|>


class ScriptedEngine(FakeEngine):
    """Gives the tokens `script`, `chars_per_step` at a time, through the real tokenizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.script: list[int] = []
        self.tokenizer: Any = SHIPPED

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        ids = prompt["prompt_token_ids"]
        processor = OutputProcessor(SHIPPED)
        request = processor.add(None, ids, sampling_params, request_id=request_id)
        script = self.script[: sampling_params.max_tokens]
        scores = PackedLogprobs(*(_packed(kind, ids[1:]) for kind in ("rank", "id", "logprob")))
        for begin in range(0, len(script), self.chars_per_step):
            part = script[begin : begin + self.chars_per_step]
            is_last = begin + len(part) == len(script)
            ends = "stop" if part[-1] == END else "length"
            update = RequestUpdate(
                request.engine_requests[0].request_id,
                part,
                ends if is_last else None,
                None,
                0,
                [TokenLogprobs([each, 5], [-1.0, -2.0], [1, 2]) for each in part],
                scores if begin == 0 and sampling_params.prompt_logprobs is not None else None,
            )
            processor.process([update])
            yield request.take()
            if request.finished:
                return


def _packed(kind: str, ids: list[int]) -> bytes:
    """Log-probabilities of a prompt, with one more token at each position."""
    values: dict[str, list[Any]] = {
        "rank": [1] * len(ids),
        "id": [each for id_ in ids for each in (id_, 5)],
        "logprob": [-1.0, -2.0] * len(ids),
    }
    return array.array("f" if kind == "logprob" else "i", values[kind]).tobytes()


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[Served]:
    with running_server(ScriptedEngine) as served:
        yield served


@pytest.fixture
def scripted(scripted_server: Served) -> Iterator[tuple[ScriptedEngine, httpx.Client]]:
    with scripted_server.http() as http:
        yield scripted_server.engine, http


def ids_of(text: str) -> list[int]:
    return SHIPPED.encode_batch([text], add_special_tokens=False)[0]


def streamed(http: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """The choices of a stream's chunks."""
    lines = http.post(path, json={**body, "stream": True}).text.split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    return [choice for event in events for choice in json.loads(event)["choices"]]


def both(
    engine: ScriptedEngine, http: httpx.Client, body: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Text and log-probabilities of a completion, which are the same whole and streamed."""
    engine.chars_per_step = 1000
    answer = http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    engine.chars_per_step = 1
    chunks = streamed(http, COMPLETIONS, body)
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        parts = [chunk["logprobs"][name] for chunk in chunks]
        if choice["logprobs"][name] is not None:
            assert list(chain.from_iterable(parts)) == choice["logprobs"][name]
    return choice["text"], choice["logprobs"]


def check_offsets(text: str, logprobs: dict[str, Any]) -> None:
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and (not offsets or offsets[-1] <= len(text))
    ends = [*offsets[1:], len(text)]
    for token, begin, end in zip(logprobs["tokens"], offsets, ends, strict=True):
        if "\ufffd" not in token and not token.startswith("<|"):
            shown = unicodedata.normalize("NFC", text[begin:end])  # as the tokenizer reads it
            assert shown == token or (end == len(text) and token.startswith(shown))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop": ["🙂 日"]},
        {"stop": ["語 é"], "include_stop_str_in_output": True},
        {"stop": [", "]},
        {"max_tokens": 3},
        {"max_tokens": 9},
        {"skip_special_tokens": False},
    ],
)
@pytest.mark.parametrize("prompt", ["ab", "e\u0301 <|im_start|>日本", [5, OPEN, 300, 20], "日"])
def test_offsets_count_characters_of_the_text(
    scripted: Any, fields: dict[str, Any], prompt: Any
) -> None:
    engine, http = scripted
    engine.script = [OPEN, *ids_of(MULTI_BYTE), END]
    body = {"prompt": prompt, "max_tokens": 500, "logprobs": 1, **fields}
    text, logprobs = both(engine, http, body)
    check_offsets(text, logprobs)
    echoed, with_prompt = both(engine, http, {**body, "echo": True})
    assert echoed.endswith(text)
    check_offsets(echoed, with_prompt)
    num_prompt_tokens = len(with_prompt["tokens"]) - len(logprobs["tokens"])
    own = [offset + len(echoed) - len(text) for offset in logprobs["text_offset"]]
    assert with_prompt["text_offset"][num_prompt_tokens:] == own
    if isinstance(prompt, str):
        assert echoed.startswith(prompt)


def test_all_tokens_of_a_character_have_its_offset(scripted: Any) -> None:
    engine, http = scripted
    engine.script = ids = [*ids_of("a"), *ids_of("日"), *ids_of("b")]
    _, logprobs = both(engine, http, {"prompt": "x", "logprobs": 0})
    assert len(ids) > 3 and logprobs["text_offset"] == [0, *[1] * (len(ids) - 2), 2]
    text = "a日b"
    echoed, logprobs = both(
        engine, http, {"prompt": text, "logprobs": 0, "echo": True, "max_tokens": 1}
    )
    assert echoed == text + "a"
    assert logprobs["text_offset"] == [0, *[1] * (len(ids) - 2), 2, 3]


@pytest.mark.parametrize("seed", range(12))
def test_offsets_of_any_tokens(scripted: Any, seed: int) -> None:
    engine, http = scripted
    random_ = random.Random(seed)

    def some(num: int) -> list[int]:
        kinds = [random_.randrange(256), random_.randrange(4093), OPEN]
        return [random_.choice([*kinds, random_.randrange(4093)]) for _ in range(num)]

    for _ in range(3):
        engine.script = some(random_.randrange(1, 40))
        body = {"prompt": some(random_.randrange(1, 30)), "max_tokens": 500, "logprobs": 1}
        for fields in ({}, {"echo": True}, {"stop": ["a", "e", " t"]}):
            check_offsets(*both(engine, http, {**body, **fields}))


# ---- bytes ---------------------------------------------------------------------------------------


def test_bytes_of_tokens_make_the_text(scripted: Any) -> None:
    engine, http = scripted
    engine.script = [*ids_of(MULTI_BYTE), END]
    body = {**HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 500}
    engine.chars_per_step = 1000
    [choice] = http.post(CHAT, json=body).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert choice["message"]["content"] == MULTI_BYTE
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert data == (MULTI_BYTE + "<|im_end|>").encode()
    assert any("\ufffd" in entry["token"] for entry in entries)
    for entry in entries:
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"]
        assert entry["top_logprobs"][1]["bytes"] == list(SHIPPED.token_bytes(5))
    engine.chars_per_step = 1
    chunks = streamed(http, CHAT, body)
    parts = [chunk["logprobs"]["content"] for chunk in chunks if chunk["logprobs"]]
    assert list(chain.from_iterable(parts)) == entries


def test_bytes_of_every_token_of_the_shipped_vocabulary_are_known() -> None:
    for token_id in range(4096):
        data = SHIPPED.token_bytes(token_id)
        assert data and data.decode(errors="replace") == SHIPPED.decode_one(token_id)
    assert SHIPPED.token_bytes(100_000) == b""


def test_other_kinds_of_vocabularies_have_bytes_too(tmp_path: Any) -> None:
    pieces = sentencepiece_like(tmp_path / "pieces")
    byte = 2  # the id of <0x00>
    ids = {"▁Hello": 258, "▁world": 259, "lo": 260}
    sun = [byte + each for each in "☀".encode()]
    tokens = [ids["▁Hello"], ids["lo"], *sun, ids["▁world"], 1]
    data = [pieces.token_bytes(token_id) for token_id in tokens]
    assert data == [b" Hello", b"lo", b"\xe2", b"\x98", b"\x80", b" world", b"</s>"]
    assert b"".join(data).decode().lstrip() == pieces.decode(tokens, skip_special_tokens=False)
    assert pieces.decode_one(ids["▁Hello"]) == " Hello"
    assert pieces.decode_one(sun[0]) == "\ufffd" and pieces.token_bytes(10**6) == b""
    offsets = TextOffsets(pieces.detokenizer(False), pieces.decode_one)
    assert [offsets.feed(token_id) for token_id in tokens] == [0, 5, 7, 7, 7, 8, 14]
    words = word_level(tmp_path / "words")
    assert [words.token_bytes(each) for each in (1, 2, 3)] == [b" a", b" b", b" [X]"]


def test_special_tokens_that_a_tokenizer_adds_have_no_place_in_the_text(tmp_path: Any) -> None:
    SHIPPED._inner.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    special = {"id": "<|im_start|>", "ids": [OPEN], "tokens": ["<|im_start|>"]}
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text, begin],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": special},
    }
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode_batch(["the LORD"])[0]
    assert ids[0] == ids[-1] == OPEN
    offsets = tokenizer.token_offsets("the LORD")
    assert offsets is not None and len(offsets) == len(ids)
    assert offsets[:2] == [0, 0] and offsets[-1] == len("the LORD")
    assert tokenizer.token_offsets("the LORD", False) == offsets[1:-1]
