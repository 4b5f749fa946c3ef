import json
import pickle
import shutil
from pathlib import Path

import pytest

from tpllm.config.checkpoint import resolve_model
from tpllm.text.bad_words import MAX_SPELLING_IDS, most_ids
from tpllm.text.tokenizer import Tokenizer

EXPECTED = json.loads((Path(__file__).parents[1] / "data" / "expected.json").read_text())["items"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(resolve_model(None))


def test_a_batch_of_texts_gives_the_ids_of_transformers(tokenizer):
    items = [item for item in EXPECTED if item["kind"] == "text"]
    assert tokenizer.encode_batch([item["text"] for item in items]) == [
        item["prompt_ids"] for item in items
    ]


@pytest.mark.parametrize("text", ["", "naïve — 日本 🙂", "a\n\n  b\t", "x " * 5000])
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_an_empty_batch_is_an_empty_batch(tokenizer):
    assert tokenizer.encode_batch([]) == []


def test_special_tokens_are_left_out_unless_asked_for(tokenizer):
    ids = tokenizer.encode_batch(["hi<|im_end|>"])[0]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hi<|im_end|>"
    assert tokenizer.decode([], skip_special_tokens=False) == ""


def test_ids_beyond_the_tokenizer_give_no_text(tokenizer):
    assert tokenizer.decode([4096, 100_000]) == ""


def test_a_bad_word_of_one_token_after_a_space_is_banned_there_too(tokenizer):
    bare, spaced = tokenizer.encode_batch(["want", " want"])
    assert (len(bare), len(spaced)) == (2, 1)
    assert tokenizer.bad_word_ids(["want"])[:2] == [bare, spaced]


def test_bad_words_are_spelled_at_the_beginning_of_a_text_and_after_a_space(tokenizer):
    bare, spaced = tokenizer.encode_batch(["the", " the"])
    assert (len(bare), len(spaced)) == (1, 1)
    ids = tokenizer.bad_word_ids(["the"])
    assert ids == tokenizer.bad_word_ids([" the"])
    assert ids[:2] == [bare, spaced]
    # where the space is a token of its own, what follows it is the bare word
    word = "日本"
    assert tokenizer.encode_batch([f" {word}"])[0][1:] == tokenizer.encode_batch([word])[0]
    ids = tokenizer.bad_word_ids([word])
    assert ids[0] == tokenizer.encode_batch([word])[0]
    assert {tokenizer.decode(each) for each in ids} == {word}


@pytest.mark.parametrize("word", ["not", "want", "shepherd", "e.g.", "日本", "a b"])
def test_every_spelling_of_a_bad_word_is_banned(tokenizer, word):
    """Compare with all divisions of its bytes."""
    pieces: dict[bytes, int] = {}
    for id_ in range(4096):
        piece = tokenizer._byte_level_pieces.get(id_)
        if piece and not (isinstance(piece, str) and piece.startswith("<|")):
            pieces[piece if isinstance(piece, bytes) else piece.encode()] = id_

    def divisions(text: bytes) -> list[list[int]]:
        if not text:
            return [[]]
        return [
            [pieces[text[:i]], *rest]
            for i in range(1, len(text) + 1)
            if text[:i] in pieces
            for rest in divisions(text[i:])
        ]

    after_space = [each for each in divisions(f" {word}".encode()) if each[0] != pieces[b" "]]
    right = {*map(tuple, divisions(word.encode())), *map(tuple, after_space)}
    ids = tokenizer.bad_word_ids([word])
    assert len(ids) == len(right) and set(map(tuple, ids)) == right


def test_the_spellings_of_long_bad_words_are_the_shortest_ones(tokenizer):
    for words in (["international"], ["I cannot help with that"], ["government", "word"] * 40):
        ids = tokenizer.bad_word_ids(words)
        own = [
            each
            for word in words
            for each in tokenizer.encode_batch([word, f" {word}"], add_special_tokens=False)
        ]
        assert all(each in ids for each in own)
        assert sum(map(len, ids)) <= min(most_ids(words), sum(map(len, own)) + MAX_SPELLING_IDS)
    begun = [len(each) for each in tokenizer.bad_word_ids(["international"])[2:]]
    assert begun == sorted(begun)
    long = "x" * 5000
    assert tokenizer.bad_word_ids([long]) == tokenizer.encode_batch([long])


def test_a_tokenizer_can_be_sent_to_other_processes(tokenizer):
    words = ["want", "the"]
    expected = tokenizer.bad_word_ids(words)
    assert pickle.loads(pickle.dumps(tokenizer)).bad_word_ids(words) == expected


def test_a_bad_word_without_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="bad_words holds ' ', which has no tokens"):
        tokenizer.bad_word_ids(["the", " "])


def test_a_chat_becomes_the_prompt_of_its_next_answer(tokenizer):
    messages = [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "hi"},
    ]
    assert tokenizer.has_chat_template
    text = tokenizer.render_chat(messages)
    assert text.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    assert all(type(id_) is int for id_ in ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prompt 1 holds a lone surrogate"):
        tokenizer.encode_batch(["fine", "\ud800"])


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "must be a list of at least one message"),
        ("hi", "messages='hi' must be a list"),
        ({"role": "user", "content": "hi"}, "must be a list"),
        (["hi"], r"messages\[0\]='hi' must be"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"content": "hi"}], r"messages\[0\].role is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content=5 must be a string"),
    ],
)
def test_wrong_messages_are_refused(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.render_chat(messages)


@pytest.mark.parametrize("name", ["tools", "messages", "conversation", "tokenize", "chat_template"])
def test_arguments_of_render_chat_are_not_template_options(tokenizer, name):
    with pytest.raises(ValueError, match=f"^chat_template_kwargs holds '{name}'"):
        tokenizer.render_chat(
            [{"role": "user", "content": "hi"}], chat_template_kwargs={name: None, "mood": "!"}
        )


def test_a_tokenizer_without_template_says_so(tmp_path):
    shutil.copy(resolve_model(None) / "tokenizer.json", tmp_path)
    config = json.loads((resolve_model(None) / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    plain = Tokenizer(tmp_path)
    assert not plain.has_chat_template
    with pytest.raises(ValueError, match="has no chat template"):
        plain.render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_damaged_tokenizer_is_refused_at_first_use(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(
        ValueError, match="no tokenizer can be read from .*; set tokenizer= to another"
    ):
        tokenizer.load()
