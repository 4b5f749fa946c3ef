"""Tokenizer: text to token ids and back, in batches; chats through the model's template."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

# One of these is in every folder that AutoTokenizer can read.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Tokenizer:
    """A folder's tokenizer, read when first used: importing transformers takes seconds.

    Only local files are read, and no code that a checkpoint brings along is ever run.

    Raises (at first use):
        ValueError: transformers cannot read the folder's tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _inner(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # it raises whatever its parsers raise
            raise ValueError(
                f"no tokenizer can be read from {self.folder} ({_first_line(error)}); "
                "name another with tokenizer=, or pass token ids and skip_tokenizer_init=True"
            ) from error

    def load(self) -> None:
        """Read the tokenizer now rather than at first use."""
        _ = self._inner

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, with the special tokens that the tokenizer adds to any text.

        Raises:
            ValueError: a text is not valid Unicode.
        """
        if not texts:  # transformers fails on an empty batch
            return []
        for i, text in enumerate(texts):
            if not _is_unicode(text):
                raise ValueError(f"prompt {i} holds a lone surrogate, which is not valid Unicode")
        # verbose=False: a text longer than the tokenizer's limit is judged by max_model_len.
        ids: list[list[int]] = self._inner(
            texts, add_special_tokens=add_special_tokens, verbose=False
        )["input_ids"]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids the tokenizer does not know, such as padding, give nothing."""
        text: str = self._inner.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def bad_word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences that spell `words`, at the beginning of a text and after a space.

        Raises:
            ValueError: a word spells no token.
        """
        sequences: list[list[int]] = []
        for word in words:
            bare, spaced = self.encode_batch(
                [word.lstrip(), f" {word.lstrip()}"], add_special_tokens=False
            )
            if not bare:
                raise ValueError(f"bad_words holds {word!r}, which spells no token; leave it out")
            sequences.append(bare)
            # of another length, the space is a token of its own: then what follows is `bare`
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                sequences.append(spaced)
        return sequences

    @property
    def has_chat_template(self) -> bool:
        return self._inner.chat_template is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as the prompt for its next answer, in the words of the chat template.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on, oldest first

        Raises:
            ValueError: there is no chat template, or it does not take these messages.
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise ValueError(
                f"the tokenizer of {self.folder.name} has no chat template; use generate()"
            )
        _check_messages(messages)
        try:
            text: str = self._inner.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"the chat template of {self.folder.name} does not take these messages: "
                f"{_first_line(error)}"
            ) from error
        return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_messages(messages: object) -> None:
    """A mistake here would otherwise surface as a riddle from inside the template."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages={messages!r} must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f'messages[{i}]={message!r} must be {{"role": ..., "content": ...}}')


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
