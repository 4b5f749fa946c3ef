"""The pieces of text add up to the text of one decode, for any tokens."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
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
