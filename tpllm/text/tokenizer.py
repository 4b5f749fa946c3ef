"""Tokenizer: encode and decode text, and render chats with the model's template."""

import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tpllm.checks import is_unicode
from tpllm.errors import first_line, panics_as_errors
from tpllm.text.bad_words import MAX_SPELLING_IDS, spellings
from tpllm.text.conversation import plain_messages, plain_tools, with_object_arguments
from tpllm.text.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    piece_of_byte_level,
)


class Tokenizer:
    """A folder's tokenizer, loaded at first use, because importing transformers takes seconds.

    It reads only local files, and never runs code from a checkpoint.

    Raises (at first use):
        ValueError: transformers cannot read the folder's tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cache of bad words, which cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name != "_ids_of_words"}

    @cached_property
    def _inner(self) -> Any:
        from tokenizers import Tokenizer as Backend
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        folder, file = str(self.folder), self.folder / "tokenizer.json"
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with panics_as_errors("tokenizers"):
                inner = AutoTokenizer.from_pretrained(folder, **options)
                # transformers 5 makes each LlamaTokenizer SentencePiece's, also where the file is
                # byte-level, as DeepSeek's are: then all spaces are lost
                is_llama = type(inner).__name__.startswith("Llama") and file.exists()
                if is_llama and _is_byte_level(Backend.from_file(str(file))):
                    inner = PreTrainedTokenizerFast.from_pretrained(folder, **options)
                return inner
        except Exception as error:  # its parsers raise errors of many types
            raise ValueError(
                f"no tokenizer can be read from {self.folder} ({first_line(error)}); "
                "set tokenizer= to another, or pass token ids and skip_tokenizer_init=True"
            ) from error

    def load(self) -> None:
        """Load the tokenizer and build its decoding tables now rather than at first use."""
        self.detokenizer()

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each text, with the special tokens that the tokenizer adds.

        Raises:
            ValueError: a text is not valid Unicode, or the tokenizer cannot encode it.
        """
        if not texts:  # transformers fails on an empty batch
            return []
        for i, text in enumerate(texts):
            if not is_unicode(text):
                raise ValueError(f"prompt {i} holds a lone surrogate, which is not valid Unicode")
        # verbose=False: no warning beyond the tokenizer's limit; max_model_len is checked later
        with panics_as_errors(f"the tokenizer of {self.folder.name} cannot encode this text"):
            ids: list[list[int]] = self._inner(
                texts, add_special_tokens=add_special_tokens, verbose=False
            )["input_ids"]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. Unknown ids, such as padding of the vocabulary, add nothing."""
        with panics_as_errors(f"the tokenizer of {self.folder.name} cannot decode these tokens"):
            text: str = self._inner.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        return text

    def bad_word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Return token sequences that spell `words`, at the beginning of a text and after a space.

        First come the tokenizer's own two encodings of each word. Byte-level tokenizers add the
        other sequences with the same bytes, up to `bad_words.MAX_SPELLING_IDS` token ids.

        Raises:
            ValueError: a word has no tokens.
        """
        return self._ids_of_words(tuple(words))

    @cached_property
    def _ids_of_words(self) -> Callable[[tuple[str, ...]], list[list[int]]]:
        return lru_cache(maxsize=8)(self._encode_words)  # all prompts of a call share their words

    def _encode_words(self, words: tuple[str, ...]) -> list[list[int]]:
        sequences: list[list[int]] = []
        bare_words = [word.lstrip() for word in words]
        encoded = self.encode_batch(
            [*bare_words, *(f" {word}" for word in bare_words)], add_special_tokens=False
        )
        num = len(words)
        for word, bare, spaced in zip(words, encoded[:num], encoded[num:], strict=True):
            if not bare:
                raise ValueError(f"bad_words holds {word!r}, which has no tokens; leave it out")
            sequences.append(bare)
            if spaced[-len(bare) :] != bare:  # if equal, the space is a separate token before it
                sequences.append(spaced)
        known = set(map(tuple, sequences))
        for word in bare_words if self._is_byte_level else []:
            for others in self._other_spellings(word, MAX_SPELLING_IDS // num):
                if tuple(others) not in known:
                    sequences.append(others)
        return sequences

    def _other_spellings(self, word: str, num_ids: int) -> Iterator[list[int]]:
        """Yield spellings of a word, alone and after a space, shortest first, up to `num_ids`."""
        bare = spellings(word.encode(), self._ids_of_bytes)
        spaced = spellings(f" {word}".encode(), self._ids_of_bytes)
        spaces = self._ids_of_bytes.get(b" ", [])
        # a separate space before a bare spelling adds nothing
        spaced = (each for each in spaced if each[0] not in spaces)
        for each in heapq.merge(bare, spaced, key=len):
            num_ids -= len(each)
            if num_ids < 0:
                return
            yield each

    @cached_property
    def _ids_of_bytes(self) -> dict[bytes, list[int]]:
        """The shown tokens of each byte sequence."""
        ids: dict[bytes, list[int]] = {}
        for id_, piece in self._shown_pieces.items():
            ids.setdefault(piece.encode() if isinstance(piece, str) else piece, []).append(id_)
        return ids

    def detokenizer(
        self, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> Detokenizer:
        """Return a new Detokenizer, whose pieces together equal the result of `decode`.

        Args:
            skip_special_tokens: leave special tokens out
            spaces_between_special_tokens: False leaves out the spaces that some tokenizers put
                between two special tokens
        """
        if self._is_byte_level:
            return ByteDetokenizer(
                self._shown_pieces if skip_special_tokens else self._byte_level_pieces
            )
        hidden = self._special_ids if skip_special_tokens else frozenset()
        without_spaces = not (spaces_between_special_tokens or skip_special_tokens)
        return WindowDetokenizer(
            lambda ids: self.decode(ids, skip_special_tokens=False),
            lambda id_: id_ not in hidden and id_ in self._pieces,
            lambda id_: _BYTE_PIECE.fullmatch(self._pieces[id_]) is not None,
            {id_: self._pieces[id_] for id_ in self._added_tokens} if without_spaces else {},
        )

    def decode_one(self, token_id: int) -> str:
        """Return the text of one token, for log-probabilities, with replacement characters."""
        if self._is_byte_level:
            piece = self._byte_level_pieces.get(token_id, "")
            return piece if isinstance(piece, str) else piece.decode(errors="replace")
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text; b"" for an unknown id."""
        if self._is_byte_level:
            piece = self._byte_level_pieces.get(token_id, b"")
            return piece.encode() if isinstance(piece, str) else piece
        if _BYTE_PIECE.fullmatch(self._pieces.get(token_id, "")):
            return bytes([int(self._pieces[token_id][3:-1], 16)])
        # after another token, because many decoders strip a space at the beginning of a text
        first = self.decode([token_id], skip_special_tokens=False)
        both = self.decode([token_id, token_id], skip_special_tokens=False)
        return (both.removeprefix(first) if both.startswith(first) else first).encode()

    def token_offsets(self, text: str, add_special_tokens: bool = True) -> list[int] | None:
        """Return the character offset of each of `encode_batch`'s tokens in the text.

        A token that holds a part of a character has the offset of that character. Return None if
        the tokenizer does not provide offsets.
        """
        if not getattr(self._inner, "is_fast", False):
            return None
        with panics_as_errors(f"the tokenizer of {self.folder.name} cannot encode this text"):
            encoded = self._inner(
                text,
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                verbose=False,
            )
        offsets, end = [], 0
        for begin, its_end in encoded["offset_mapping"]:
            # added tokens have no characters; some offsets leave out the space before a word
            is_after_space = text[end:begin].isspace()
            offsets.append(end if its_end == begin or is_after_space else begin)
            end = max(end, its_end)
        return offsets

    @cached_property
    def _added_tokens(self) -> Mapping[int, Any]:
        tokens: Mapping[int, Any] = self._inner.added_tokens_decoder
        return tokens

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(id_ for id_, token in self._added_tokens.items() if token.special)

    @cached_property
    def _pieces(self) -> dict[int, str]:
        """The vocabulary's string of every token."""
        pieces = {id_: token for token, id_ in self._inner.get_vocab().items()}
        return pieces | {id_: token.content for id_, token in self._added_tokens.items()}

    @cached_property
    def _is_byte_level(self) -> bool:
        return _is_byte_level(getattr(self._inner, "backend_tokenizer", None))

    @cached_property
    def _byte_level_pieces(self) -> dict[int, str | bytes]:
        return {id_: piece_of_byte_level(token) for id_, token in self._pieces.items()}

    @cached_property
    def _shown_pieces(self) -> dict[int, str | bytes]:
        """The text or bytes of all tokens except special tokens."""
        special = self._special_ids
        return {id_: each for id_, each in self._byte_level_pieces.items() if id_ not in special}

    @property
    def has_chat_template(self) -> bool:
        return self._inner.chat_template is not None

    @property
    def chat_template(self) -> str:
        """The chat template; "" if there is none, all of them if there are several."""
        return str(self._inner.chat_template or "")

    @panics_as_errors("the chat template cannot render these messages")
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation with the chat template, and return the prompt of its next answer.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on, oldest first, in any format
                of OpenAI's clients: see `tpllm.text.conversation`
            add_generation_prompt: end the prompt with the header of the assistant's answer
            continue_final_message: leave the last message open, so that the model continues it
            chat_template: a Jinja template to use instead of the tokenizer's
            tools: JSON schemas of functions that the model may call
            chat_template_kwargs: further variables of the template, such as `enable_thinking`

        Raises:
            ValueError: there is no chat template, a message is wrong, or the template cannot
                render the messages.
        """
        if chat_template is None and not self.has_chat_template:
            raise ValueError(
                f"the tokenizer of {self.folder.name} has no chat template; use generate(), or "
                "give chat_template="
            )
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "continue_final_message=True leaves the last message open, and "
                "add_generation_prompt=True opens another one; set one of them to False"
            )
        for name in chat_template_kwargs or ():
            if name in _OWN_ARGUMENTS:
                raise ValueError(
                    f"chat_template_kwargs holds {name!r}, which is not allowed there; use the "
                    "argument or field of that name, if there is one"
                )
        plain = plain_messages(messages)
        options = {
            "tools": plain_tools(tools),
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        try:
            return self._render(plain, options, chat_template_kwargs or {})
        except ValueError:
            # some templates iterate over the arguments of calls, and fail on a string
            with_objects = with_object_arguments(plain)
            if with_objects is None:
                raise
            return self._render(with_objects, options, chat_template_kwargs or {})

    def _render(
        self,
        messages: list[dict[str, Any]],
        options: Mapping[str, Any],
        kwargs: Mapping[str, Any],
    ) -> str:
        try:
            text: str = self._inner.apply_chat_template(
                messages, tokenize=False, **options, **kwargs
            )
        except Exception as error:  # a template's expressions can raise any error
            which = f"the chat template of {self.folder.name}"
            if options["chat_template"] is not None:
                which = "the given chat template"
            raise ValueError(
                f"{which} cannot render these messages: {first_line(error)}"
            ) from error
        return text


def _is_byte_level(backend: Any) -> bool:
    from tokenizers.decoders import ByteLevel

    return backend is not None and isinstance(backend.decoder, ByteLevel)


# Arguments of apply_chat_template that this module sets itself.
_OWN_ARGUMENTS = {"add_generation_prompt", "chat_template", "continue_final_message"}
_OWN_ARGUMENTS |= {"conversation", "messages", "return_dict", "tokenize", "tools"}
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
