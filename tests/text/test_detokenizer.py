"""The pieces of text add up to the text of one decode, for any tokens."""

import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tpllm.config.checkpoint import resolve_model
from tpllm.text.detokenizer import Detokenizer
from tpllm.text.tokenizer import Tokenizer

SHIPPED = Tokenizer(resolve_model(None))
MULTI_BYTE = "naïve — 日本 🙂 e\u0301 👩‍👩‍👧 \ufffd"
SETTINGS = settings(deadline=None, max_examples=200, derandomize=True, database=None)


def sentencepiece_like(folder: Any) -> Tokenizer:
    """Words behind a lower one eighth block, single bytes for what is no word, as in Llama 2."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁Hello", "▁world", "lo", "▁", "日", "é", "!", "\ufffd", "▁▁"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True))
    in_turn = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*in_turn, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return saved(backend, folder)


def word_level(folder: Any) -> Tokenizer:
    """Without a decoder, tokens are joined by spaces, special ones too."""
    backend = Backend(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[X]": 3, "[Y]": 4}, "[UNK]"))
    backend.add_special_tokens([AddedToken("[X]", special=True), AddedToken("[Y]", special=True)])
    return saved(backend, folder)


def saved(backend: Backend, folder: Any) -> Tokenizer:
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def with_byte_pieces(tmp_path_factory) -> Tokenizer:
    return sentencepiece_like(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def of_words(tmp_path_factory) -> Tokenizer:
    return word_level(tmp_path_factory.mktemp("words"))


def pieces_of(detokenizer: Detokenizer, parts: Sequence[Sequence[int]]) -> list[str]:
    return [*(detokenizer.feed(part) for part in parts), detokenizer.finish()]


def parts_of(token_id: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    """Ids in random pieces, mostly one by one."""
    one = st.lists(token_id, min_size=1, max_size=1)
    return st.lists(one | st.lists(token_id, max_size=4), max_size=40)


def flat(parts: list[list[int]]) -> list[int]:
    return [token_id for part in parts for token_id in part]


any_id = st.integers(0, 300) | st.integers(4080, 4100) | st.integers(0, 4095)


@SETTINGS
@given(parts=parts_of(any_id), skip=st.booleans(), spaces=st.booleans())
def test_any_ids_of_the_shipped_tokenizer_equal_the_text_of_one_decode(parts, skip, spaces):
    detokenizer = SHIPPED.detokenizer(skip, spaces)
    text = SHIPPED.decode(flat(parts), skip_special_tokens=skip)
    assert "".join(pieces_of(detokenizer, parts)) == text


@SETTINGS
@given(text=st.text() | st.just(MULTI_BYTE))
def test_a_character_is_never_divided(text):
    text = unicodedata.normalize("NFC", text)  # as this tokenizer does
    ids = SHIPPED.encode_batch([text], add_special_tokens=False)[0]
    pieces = pieces_of(SHIPPED.detokenizer(skip_special_tokens=False), [[id_] for id_ in ids])
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert pieces[-1] == ""  # a whole text leaves nothing held back


@SETTINGS
@given(parts=parts_of(st.integers(0, 270)), skip=st.booleans(), spaces=st.booleans())
def test_pieces_of_single_bytes_equal_the_text_of_one_decode(with_byte_pieces, parts, skip, spaces):
    detokenizer = with_byte_pieces.detokenizer(skip, spaces)
    text = with_byte_pieces.decode(flat(parts), skip_special_tokens=skip)
    assert "".join(pieces_of(detokenizer, parts)) == text


@SETTINGS
@given(parts=parts_of(st.integers(0, 4)), skip=st.booleans())
def test_words_joined_by_spaces_equal_the_text_of_one_decode(of_words, parts, skip):
    text = of_words.decode(flat(parts), skip_special_tokens=skip)
    assert "".join(pieces_of(of_words.detokenizer(skip), parts)) == text


def test_spaces_between_special_tokens_are_left_out_when_not_wanted(of_words):
    ids = [[1], [3], [4], [2], [3]]
    assert "".join(pieces_of(of_words.detokenizer(False, True), ids)) == "a [X] [Y] b [X]"
    assert "".join(pieces_of(of_words.detokenizer(False, False), ids)) == "a [X][Y] b [X]"


def test_a_token_by_itself_has_a_text_too(with_byte_pieces):
    ids = SHIPPED.encode_batch(["日"], add_special_tokens=False)[0]
    assert {SHIPPED.decode_one(id_) for id_ in ids} <= {"日", "\ufffd", "\ufffd\ufffd"}
    assert SHIPPED.decode_one(4095) == "<|im_end|>"
    assert SHIPPED.decode_one(100_000) == ""
    assert with_byte_pieces.decode_one(1) == "</s>"


README = (Path(__file__).parents[2] / "README.md").read_text()[:6000] + MULTI_BYTE
TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }}{% endfor %}"


def sentencepiece(folder: Path, *, is_llama2: bool) -> Tokenizer:
    """A trained tokenizer.json as of Llama 2 (normalizer) or Mistral v0.3 (Metaspace)."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if is_llama2:
        in_turn = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(in_turn)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=tokens, show_progress=False, limit_alphabet=60
    )
    backend.train_from_iterator(README.replace(" ", " \n").splitlines(), trainer)
    backend = Backend.from_str(json.dumps(json.loads(backend.to_str()) | {"added_tokens": []}))
    special = [AddedToken(each, normalized=False) for each in ("<unk>", "<s>", "</s>", "[INST]")]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    spaced = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*spaced, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    inner = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    inner.save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["llama2", "mistral"])
def trained(request, tmp_path_factory) -> Tokenizer:
    return sentencepiece(tmp_path_factory.mktemp("trained"), is_llama2=request.param)


def test_random_splits_of_real_text_equal_the_text_of_one_decode(trained):
    ids = trained.encode_batch([README])[0]
    assert trained.decode(ids) == README
    rng = random.Random(0)
    added = trained.encode_batch(["[INST]<tool></s>"], add_special_tokens=False)[0][-3:]
    for number in range(5000):
        begin = rng.randrange(len(ids))
        chosen = ids[begin : begin + rng.randint(1, 30)]
        if number % 3 == 0:
            chosen.insert(rng.randint(0, len(chosen)), rng.choice(added))
        parts, rest = [], chosen
        while rest:
            size = rng.choice([1, 1, 1, 2, 5])
            parts.append(rest[:size])
            rest = rest[size:]
        skip = number % 2 == 0
        text = "".join(pieces_of(trained.detokenizer(skip), parts))
        assert text == trained.decode(chosen, skip_special_tokens=skip)


def test_a_prompt_and_a_chat_begin_with_one_bos_token(trained):
    bos = 1
    assert trained.encode_batch(["hello"])[0].count(bos) == 1
    prompt = trained.render_chat([{"role": "user", "content": "hello"}])
    ids = trained.encode_batch([prompt], add_special_tokens=False)[0]
    assert ids[0] == bos and ids.count(bos) == 1
    theirs = trained._inner.apply_chat_template([{"role": "user", "content": "hello"}])
    assert ids == theirs["input_ids"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_byte_level_tokenizer_named_llama_stays_byte_level(tmp_path, model_type):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((SHIPPED.folder / file).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizerFast"  # as DeepSeek-R1's distillations say
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "Hello world,  it's 123\n日本"
    ids = Tokenizer(tmp_path).encode_batch([text])
    assert ids == SHIPPED.encode_batch([text])
    assert Tokenizer(tmp_path).decode(ids[0]) == text
