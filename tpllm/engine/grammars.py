"""Structured outputs: llguidance compiles a grammar and computes which tokens may come next.

All sequences with the same grammar share the compiled grammar and its lexer. The lexer adds states
as outputs need them, up to a limit. A sequence that meets the limit continues with its own lexer,
so that its output does not depend on other sequences.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

import numpy as np

from tpllm.config.engine_config import EngineConfig
from tpllm.engine.grammar_source import has_json, setting_of, source_of
from tpllm.engine.long_numbers import NumberLimit, NumberTokens
from tpllm.errors import panics_as_errors
from tpllm.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

_MAX_CACHED = 64
_MAX_LEXER_STATES = 50_000  # 1 to 2 kB each
# Items of the parser at one position of a text. An optional property takes four items. A mask at
# this limit took 25 ms.
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


class Sandbox(Protocol):
    """Tries grammars where a crash of the compiler does no harm: see `supervision.sandbox`."""

    def check(self, params: StructuredOutputsParams) -> None:
        """Return if the grammar can be used.

        Raises:
            ValueError: the grammar cannot be used; the error says why.
        """
        ...

    def close(self) -> None: ...


class Grammars:
    """Compiles grammars for one vocabulary. Several threads may use it.

    Args:
        load_tokenizer: makes llguidance's tokenizer at first use, which takes a second
        sandbox: tries each grammar before it is compiled here; None if all grammars are trusted
    """

    def __init__(
        self, load_tokenizer: Callable[[], "LLTokenizer"], sandbox: Sandbox | None = None
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._sandbox = sandbox
        self._load_lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._numbers: NumberTokens | None = None
        # grammars, or the error of one that cannot be compiled; the last used is the last item
        self._compiled: OrderedDict[StructuredOutputsParams, Grammar | str] = OrderedDict()
        # grammars that a request uses, also after they have been evicted from `_compiled`
        self._in_use: WeakValueDictionary[StructuredOutputsParams, Grammar] = WeakValueDictionary()
        self._cache_lock = threading.Lock()

    def load(self) -> None:
        """Read the tokenizer now rather than at first use.

        Raises:
            ValueError: llguidance is not installed, or cannot read the tokenizer.
        """
        with self._load_lock:
            if self._tokenizer is None:
                tokenizer = self._load_tokenizer()
                self._numbers = NumberTokens(tokenizer)
                self._tokenizer = tokenizer

    def has(self, params: StructuredOutputsParams) -> bool:
        """Whether `compile` returns or raises at once, without compiling."""
        with self._cache_lock:
            return params in self._compiled or params in self._in_use

    def compile(self, params: StructuredOutputsParams) -> "Grammar":
        """Return the compiled grammar. This takes a millisecond, or up to some seconds.

        Raises:
            ValueError: the grammar is invalid or too complex, or nothing satisfies it; or
                llguidance is not installed, or cannot read the tokenizer.
            RuntimeError: the process that tries grammars cannot be started, or `close` was called.
        """
        with self._cache_lock:
            compiled = self._compiled.get(params) or self._in_use.get(params)
            if compiled is not None:
                self._store(params, compiled)
        if compiled is None:
            self.load()
            assert self._tokenizer is not None
            try:
                if self._sandbox is not None:
                    self._sandbox.check(params)
                numbers = self._numbers if has_json(params) else None
                with panics_as_errors("llguidance"):
                    compiled = Grammar(self._tokenizer, source_of(params), numbers)
            except (ValueError, RecursionError) as error:
                compiled = f"structured_outputs: {setting_of(params)} cannot be used: {error}"
            with self._cache_lock:
                self._store(params, compiled)
        if isinstance(compiled, str):
            raise ValueError(compiled)
        return compiled

    def close(self) -> None:
        """End the process that tries grammars. It may be called repeatedly."""
        if self._sandbox is not None:
            self._sandbox.close()

    def _store(self, params: StructuredOutputsParams, compiled: "Grammar | str") -> None:
        """Add a grammar to the cache. The caller holds `_cache_lock`."""
        self._compiled[params] = compiled
        self._compiled.move_to_end(params)
        while len(self._compiled) > _MAX_CACHED:
            self._compiled.popitem(last=False)
        if isinstance(compiled, Grammar):
            self._in_use[params] = compiled


class Grammar:
    """A compiled grammar.

    Attributes:
        end_token_ids: tokens that are allowed only where the output may end
        numbers: the tokens that continue a number; None if the length of numbers is not limited
        first_mask: the tokens that an output may begin with, a bit for each id

    Raises:
        ValueError: llguidance cannot compile it, or it allows no first token.
    """

    def __init__(
        self, tokenizer: "LLTokenizer", source: str, numbers: NumberTokens | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self.numbers = numbers
        self.end_token_ids = frozenset(tokenizer.eos_tokens)
        self._initial = self.compile()
        self.first_mask = mask = self._initial.compute_bitmask()
        if self._initial.is_error():
            raise ValueError(_reason(self._initial))
        fitting = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        if self._initial.is_stopped() or self.end_token_ids.issuperset(fitting.tolist()):
            raise ValueError("nothing satisfies it but an empty answer or an end token")

    def compile(self) -> "LLMatcher":
        """Return a new matcher that has its own lexer.

        Raises:
            ValueError: the grammar does not compile.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, self._source, log_level=0, limits=_limits())
        if matcher.is_error():
            raise ValueError(_reason(matcher))
        return matcher

    def start(self) -> "Matcher":
        """Return a matcher for a new output."""
        return Matcher(self, self._initial.deep_copy())


class Matcher:
    """Follows one output through its grammar, token by token.

    Attributes:
        failure: why the output cannot continue; None while it can
    """

    def __init__(self, grammar: Grammar, inner: "LLMatcher") -> None:
        self.failure: str | None = None
        self.inner = inner
        self.number_limit = None if grammar.numbers is None else NumberLimit(grammar.numbers)
        self._grammar = grammar
        self._tokens: list[int] = []

    def advance(self, token_id: int) -> bool:
        """Advance by one token; return False if the output can neither continue nor end with it."""
        if self.failure is None and token_id in self._grammar.end_token_ids:
            if not self.inner.is_accepting():
                self.failure = NOTHING_LEFT
        elif self.failure is None:
            self._tokens.append(token_id)
            if self.number_limit is not None:
                self.number_limit.follow(token_id)
            if not self.inner.consume_token(token_id):
                self.use_own_lexer()
        return self.failure is None

    def use_own_lexer(self) -> None:
        """Replace the shared lexer, which may have met its limit; set `failure` if that fails."""
        self.inner = self._grammar.compile()
        num_fitting = self.inner.try_consume_tokens(self._tokens)
        if self.inner.is_error():
            self.failure = _reason(self.inner)
        elif num_fitting < len(self._tokens):
            self.failure = NOTHING_LEFT


def fill_masks(
    matchers: Sequence[Matcher], held_back: Sequence[Collection[int]], num_words: int
) -> np.ndarray:
    """Return which tokens may come next in each output, a bit for each id: [n, num_words] uint32.

    The `held_back` tokens of an output are excluded unless no other token is left. If a grammar
    turns out to be too complex, `failure` of its matcher is set and its row has no meaning.

    Args:
        matchers: one for each output
        held_back: token ids for each output
        num_words: words of one mask
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
            matcher.use_own_lexer()
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
    """Return the tokenizer of an engine in llguidance's form.

    Raises:
        ValueError: llguidance is not installed, or cannot read the tokenizer.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise ValueError(
            "structured_outputs needs the package llguidance; install it with "
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


def _reason(matcher: "LLMatcher") -> str:
    """Return the matcher's error in one line."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    reason = " ".join(line for line in lines if line and not _NOT_SHOWN.match(line))
    if reason == _NOTHING_FITS:
        return NOTHING_SATISFIES
    for theirs, ours in _OURS.items():
        reason = re.sub(theirs, ours, reason)
    return reason[:300]
