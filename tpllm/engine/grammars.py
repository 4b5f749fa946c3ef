"""Structured outputs: which tokens may come next, by a grammar that is compiled with llguidance.

A compiled grammar is shared by all sequences that ask for it. They also share its lexer, whose
states are made as texts need them and whose number is limited: where it ends, a sequence goes on
with a lexer of its own, so that none depends on the company that it has.
"""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import numpy as np

from tpllm.config.engine_config import EngineConfig
from tpllm.engine.bounded_json import WHITESPACE, bounded_grammar, bounded_schema
from tpllm.engine.long_numbers import NumberLimit, NumberTokens
from tpllm.errors import panics_as_errors
from tpllm.structured_outputs import (
    StructuredOutputsParams,
    compilable_grammar,
    compilable_schema,
)

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

_MAX_CACHED = 64
_MAX_LEXER_STATES = 50_000  # 1 to 2 kB each
# Of the parser, at one place of a text: an optional property takes four; 25 ms for a step at worst.
_MAX_ITEMS_IN_ROW = 50_000
_MAX_ITEMS_IN_STEP = 500_000
_NOTHING_FITS = "NoExtensionBias"  # in llguidance's words
NOTHING_SATISFIES = "nothing satisfies it"  # in ours
# Lines of an error that show where the grammar is wrong that we have made of a form.
_NOT_SHOWN = re.compile(r"<|\d+ \| |\^+$")
_OURS = {
    r'^at \d+\(\d+\): invalid regex ".*" \(in regex\): ': "",
    r"^Unsatisfiable schema: ": f"{NOTHING_SATISFIES}: ",
    r"^recursion limit exceeded.*": "it is nested too deeply; make it simpler",
    r"lookarounds not supported yet; (\w+) in regex.*": r"look-around is not supported: \1",
}
NOTHING_LEFT = "the request's other settings leave no token that fits"
_TOKENIZER_FILE = "tokenizer.json"


class Trials(Protocol):
    """Tries forms where a crash of the compiler does no harm: see `tpllm.supervision.trial`."""

    def check(self, form: StructuredOutputsParams) -> None:
        """Return if the form can be used.

        Raises:
            ValueError: why it cannot.
        """
        ...

    def close(self) -> None: ...


class Grammars:
    """Compiles grammars for one vocabulary; may be used by several threads.

    Args:
        load_tokenizer: makes llguidance's tokenizer, when first needed: it takes a second
        trials: where forms are tried before they are compiled here; None for forms of our own
    """

    def __init__(
        self, load_tokenizer: Callable[[], "LLTokenizer"], trials: Trials | None = None
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._trials = trials
        self._loading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._numbers: NumberTokens | None = None
        # or why it cannot be compiled; the one used last comes last
        self._compiled: OrderedDict[StructuredOutputsParams, Grammar | str] = OrderedDict()
        # also those that others have displaced there, as long as a request has them
        self._in_use: WeakValueDictionary[StructuredOutputsParams, Grammar] = WeakValueDictionary()
        self._books = threading.Lock()

    def load(self) -> None:
        """Read the tokenizer now rather than at first use.

        Raises:
            ValueError: llguidance is not there, or reads no tokenizer.
        """
        with self._loading:
            if self._tokenizer is None:
                tokenizer = self._load_tokenizer()
                self._numbers = NumberTokens(tokenizer)
                self._tokenizer = tokenizer

    def knows(self, params: StructuredOutputsParams) -> bool:
        """Whether `compile` has its answer at hand."""
        with self._books:
            return params in self._compiled or params in self._in_use

    def compile(self, params: StructuredOutputsParams) -> "Grammar":
        """The grammar of an answer, ready to be used; takes a millisecond, or up to some seconds.

        Raises:
            ValueError: it is none, or too complex, or nothing satisfies it; or there is no
                llguidance, or no tokenizer that it reads.
            RuntimeError: the process that tries forms cannot be started, or `close` was called.
        """
        with self._books:
            compiled = self._compiled.get(params) or self._in_use.get(params)
            if compiled is not None:
                self._keep(params, compiled)
        if compiled is None:
            self.load()
            assert self._tokenizer is not None
            try:
                if self._trials is not None:
                    self._trials.check(params)
                numbers = self._numbers if _has_json(params) else None
                with panics_as_errors("llguidance"):
                    compiled = Grammar(self._tokenizer, source_of(params), numbers)
            except (ValueError, RecursionError) as error:
                compiled = f"structured_outputs: {_form(params)} cannot be used: {error}"
            with self._books:
                self._keep(params, compiled)
        if isinstance(compiled, str):
            raise ValueError(compiled)
        return compiled

    def close(self) -> None:
        """End the process that tries forms. Harmless when repeated."""
        if self._trials is not None:
            self._trials.close()

    def _keep(self, params: StructuredOutputsParams, compiled: "Grammar | str") -> None:
        """Under the lock."""
        self._compiled[params] = compiled
        self._compiled.move_to_end(params)
        while len(self._compiled) > _MAX_CACHED:
            self._compiled.popitem(last=False)
        if isinstance(compiled, Grammar):
            self._in_use[params] = compiled


class Grammar:
    """A compiled grammar.

    Attributes:
        end_token_ids: what may be drawn where the answer may end, and there alone
        numbers: the vocabulary, where the length of numbers is limited
        first_mask: which tokens an answer may begin with, a bit for each id

    Raises:
        ValueError: llguidance cannot use it, not even for a first token.
    """

    def __init__(
        self, tokenizer: "LLTokenizer", source: str, numbers: NumberTokens | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self.numbers = numbers
        self.end_token_ids = frozenset(tokenizer.eos_tokens)
        self._first = self.compile()
        self.first_mask = mask = self._first.compute_bitmask()
        if self._first.is_error():
            raise ValueError(_reason(self._first))
        fitting = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        if self._first.is_stopped() or self.end_token_ids.issuperset(fitting.tolist()):
            raise ValueError("nothing satisfies it but an empty answer or an end token")

    def compile(self) -> "LLMatcher":
        """A matcher that shares nothing.

        Raises:
            ValueError: it does not compile.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, self._source, log_level=0, limits=_limits())
        if matcher.is_error():
            raise ValueError(_reason(matcher))
        return matcher

    def start(self) -> "Matcher":
        """Follow a new answer."""
        return Matcher(self, self._first.deep_copy())


class Matcher:
    """One answer as it grows, token by token.

    Attributes:
        failure: why it cannot go on; None as long as it can
    """

    def __init__(self, grammar: Grammar, inner: "LLMatcher") -> None:
        self.failure: str | None = None
        self.inner = inner
        self.number_limit = None if grammar.numbers is None else NumberLimit(grammar.numbers)
        self._grammar = grammar
        self._tokens: list[int] = []

    def advance(self, token_id: int) -> bool:
        """Note the next token; False where the answer cannot go on, or end, like this."""
        if self.failure is None and token_id in self._grammar.end_token_ids:
            if not self.inner.is_accepting():
                self.failure = NOTHING_LEFT
        elif self.failure is None:
            self._tokens.append(token_id)
            if self.number_limit is not None:
                self.number_limit.follow(token_id)
            if not self.inner.consume_token(token_id):
                self.take_lexer_of_its_own()
        return self.failure is None

    def take_lexer_of_its_own(self) -> None:
        """Leave the shared one, which has met its limit; `failure` is set if that was not it."""
        self.inner = self._grammar.compile()
        num_fitting = self.inner.try_consume_tokens(self._tokens)
        if self.inner.is_error():
            self.failure = _reason(self.inner)
        elif num_fitting < len(self._tokens):
            self.failure = NOTHING_LEFT


def fill_masks(
    matchers: Sequence[Matcher], held_back: Sequence[Collection[int]], num_words: int
) -> np.ndarray:
    """Which tokens may come next in each answer, a bit for each id: [n, num_words] uint32.

    The tokens `held_back` from an answer stay out where it has others. Where the grammar turns out
    too complex the `failure` of a matcher is set, and its row has no meaning.
    """
    words = np.zeros((len(matchers), num_words), dtype=np.uint32)
    alive = [(each, i) for i, each in enumerate(matchers) if each.failure is None]
    if len(alive) == 1:
        _fill_one(alive[0][0], words[alive[0][1]])
    elif alive:
        filled = [(each.inner, i) for each, i in alive]
        executor, pointer = _executor(), words.ctypes.data
        executor.unsafe_compute_mask_ptr(filled, pointer, num_words * 4, len(matchers))
    for matcher, row, ids in zip(matchers, words, held_back, strict=True):
        if matcher.failure is None and matcher.inner.is_error():
            matcher.take_lexer_of_its_own()
            if matcher.failure is None:
                _fill_one(matcher, row)
            if matcher.inner.is_error():
                matcher.failure = _reason(matcher.inner)
        _hold_back(row, ids)
        if matcher.number_limit is not None:
            matcher.number_limit.apply(row)
    return words


def _fill_one(matcher: Matcher, row: np.ndarray) -> None:
    matcher.inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)


def _hold_back(row: np.ndarray, ids: Collection[int]) -> None:
    if not ids:
        return
    before = row.copy()
    for id_ in ids:
        row[id_ >> 5] &= ~np.uint32(1 << (id_ & 31))
    if not row.any():
        row[:] = before


# ---- llguidance ----------------------------------------------------------------------------------


def read_tokenizer(config: EngineConfig) -> "LLTokenizer":
    """The tokenizer of an engine, as llguidance needs it.

    Raises:
        ValueError: llguidance is not there, or reads no tokenizer.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise ValueError(
            "structured_outputs needs the package llguidance; install it, as in "
            "pip install 'tpllm[structured]'"
        ) from None
    folder = config.tokenizer_folder
    if folder is None:
        raise ValueError(
            "structured_outputs needs a tokenizer, and this engine has none; name one with "
            "tokenizer="
        )
    path = folder / _TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(
            f"structured_outputs needs {_TOKENIZER_FILE}, and {folder} has none; name a folder "
            "that has one with tokenizer="
        )
    model_config = config.model_config
    try:
        with panics_as_errors("llguidance"):
            return LLTokenizer(
                path.read_text(encoding="utf-8"),
                n_vocab=model_config.vocab_size,
                eos_token=list(model_config.eos_token_ids) or None,
            )
    except ValueError as error:
        raise ValueError(
            f"structured_outputs: llguidance cannot read {path} ({error}); name another tokenizer "
            "with tokenizer="
        ) from None


@cache
def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES,
        max_items_in_row=_MAX_ITEMS_IN_ROW,
        step_max_items=_MAX_ITEMS_IN_STEP,
        verbose_errors=False,
    )


@cache
def _executor() -> "LLExecutor":
    from llguidance import LLExecutor

    return LLExecutor(max(1, min(16, len(os.sched_getaffinity(0)) - 1)))


def source_of(params: StructuredOutputsParams) -> str:
    """The grammar in llguidance's own form.

    Raises:
        ValueError: it is none.
    """
    from llguidance import LLMatcher, grammar_from

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # one terminal: as alternatives of a rule, more than a row of the parser holds ran dry
        words = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        words = words.replace("\x7f", "\\u007f")  # the one letter that Lark wants escaped, too
        # without no_forcing a text that spells a special token would become that token
        options = '%llguidance {"no_forcing": true}'
        return LLMatcher.grammar_from_lark(f"{options}\nstart: CHOICE\nCHOICE: {words}")
    if params.grammar is not None:
        return grammar_from("grammar", bounded_grammar(compilable_grammar(params.grammar)))
    spaces: dict[str, Any] = {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}
    if params.disable_any_whitespace:
        spaces = {"whitespace_flexible": False}
    schema = {"type": "object"}
    if params.json is not None:
        schema = json.loads(compilable_schema(str(params.json)))
    text = bounded_schema(schema)
    return LLMatcher.grammar_from_json_schema(text, overrides=spaces)  # type: ignore[arg-type]


def _has_json(params: StructuredOutputsParams) -> bool:
    """Whether the answer, or some of it, is JSON by a schema."""
    if params.grammar is not None:
        return "%json" in params.grammar
    return params.json is not None or params.json_object is not None


def _form(params: StructuredOutputsParams) -> str:
    for name in ("regex", "choice", "grammar"):
        if (value := getattr(params, name)) is not None:
            shown = repr(value)
            return f"{name}={shown if len(shown) <= 80 else shown[:77] + '...'}"
    return "json" if params.json is not None else "json_object"


def _reason(matcher: "LLMatcher") -> str:
    """What is wrong, in one line."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    reason = " ".join(line for line in lines if line and not _NOT_SHOWN.match(line))
    if reason == _NOTHING_FITS:
        return NOTHING_SATISFIES
    for theirs, ours in _OURS.items():
        reason = re.sub(theirs, ours, reason)
    return reason[:300]
