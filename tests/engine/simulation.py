"""An engine without a model: a real scheduler, and a simulated worker that checks every plan.

The simulated worker reads only the bytes of the plans. It executes them in order, as a GPU does,
and their results come back late. Each slot of its cache stores the digest of the token and all
tokens before it. The first row that reads a block which was shared wrongly, overwritten, freed too
early or left stale therefore fails. The next token depends only on the true sequence and the
request's settings, so batching, chunks, preemption and the prefix cache must not change it.

The tokens 1 to 7 are the letters a to g, for the grammars of structured outputs.
"""

import struct
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import xxhash
from llguidance import LLTokenizer, TokenizerWrapper

from tpllm.channel.logprob_records import LogprobBlock
from tpllm.channel.row_record import new_records, read_tokens, split_lists
from tpllm.channel.step_plan import (
    RESERVED_BLOCK,
    PlanLimits,
    StepMasks,
    StepPlan,
    StepResult,
)
from tpllm.engine.block_manager import BlockManager
from tpllm.engine.grammars import Grammars
from tpllm.engine.request import AddRequest, RequestUpdate, Sequence, Status, TokenLogprobs
from tpllm.engine.scheduler import Scheduler
from tpllm.sampling_params import SamplingParams

VOCAB_SIZE = 8
EOS = 0


class _Letters:
    """A tokenizer with the interface that llguidance needs."""

    eos_token_id = EOS
    bos_token_id = None
    special_token_ids = (EOS,)
    tokens = (b"<eos>", *(bytes([letter]) for letter in b"abcdefg"))

    def __call__(self, text: bytes) -> list[int]:
        return [letter - ord("a") + 1 for letter in text]


GRAMMARS = Grammars(lambda: LLTokenizer(TokenizerWrapper(_Letters())))


def ids_of_mask(words: bytes | np.ndarray) -> set[int]:
    bits = np.frombuffer(words, np.uint8) if isinstance(words, bytes) else words.view(np.uint8)
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())


def extend(prefix: int, token_id: int) -> int:
    """Return the digest of a prefix (0 if empty) and one more token, which its KV depends on."""
    return xxhash.xxh64_intdigest(struct.pack("<Qi", prefix, token_id))


def sample_token(prefix: int, temperature: float, seed: int, banned: Iterable[int]) -> int:
    """Return the token after `prefix`. As in a real engine, temperature 0 ignores the seed."""
    noise = seed if temperature else 0
    allowed = sorted(set(range(VOCAB_SIZE)).difference(banned))
    return allowed[xxhash.xxh64_intdigest(struct.pack("<QQ", prefix, noise)) % len(allowed)]


def logprobs_of(prefix: int, token_id: int, k: int) -> TokenLogprobs:
    """Return made-up log-probabilities of a token, which differ for each prefix and token."""
    numbers = extend(prefix, token_id)
    ids = [token_id, *(numbers >> 3 * i & 7 for i in range(k))]
    logprobs = [(numbers >> 10 * i & 1023) / 1024 for i in range(1 + k)]
    return TokenLogprobs(ids, logprobs, [1 + numbers % 99, *range(1, k + 1)])


class TrueSequence:
    """The tokens of a request that runs alone: its prompt, then sampled tokens without end."""

    def __init__(self, request: AddRequest, seed: int, max_total_tokens: int) -> None:
        params = self.params = request.sampling_params
        self._seed = seed
        self.num_prompt_tokens = len(request.prompt_token_ids)
        structured = params.structured_outputs
        self.ends = {
            *params.stop_token_ids,
            *([] if params.ignore_eos and not structured else [EOS]),
        }
        # also None once the output has ended
        self._matcher = GRAMMARS.compile(structured).compile() if structured else None
        self.tokens: list[int] = []
        self.prefixes: list[int] = []  # digest of the tokens up to and including each
        for token_id in request.prompt_token_ids:
            self._append(token_id)
        limits = [max_total_tokens - self.num_prompt_tokens, params.max_tokens or max_total_tokens]
        self.max_tokens = min(limits)

    def _append(self, token_id: int) -> None:
        self.prefixes.append(extend(self.prefixes[-1] if self.prefixes else 0, token_id))
        self.tokens.append(token_id)

    def grow(self, num_tokens: int) -> None:
        """Sample until the sequence has `num_tokens` tokens, also beyond its end."""
        while len(self.tokens) < num_tokens:
            num_sampled = len(self.tokens) - self.num_prompt_tokens
            banned = self.ends if num_sampled < self.params.min_tokens else set()
            if self._matcher is not None:
                held_back = banned or ({EOS} if self.params.ignore_eos else set())
                allowed = ids_of_mask(self._matcher.compute_bitmask())
                banned = set(range(VOCAB_SIZE)) - (allowed - held_back or allowed)
            token_id = sample_token(self.prefixes[-1], self.params.temperature, self._seed, banned)
            self._append(token_id)
            if token_id in self.ends:
                self._matcher = None
            elif self._matcher is not None:
                assert self._matcher.consume_token(token_id)

    def logprobs(self, begin: int, end: int, k: int) -> list[TokenLogprobs | None]:
        """Return the log-probabilities of the tokens `begin` to `end`; the first token has none."""
        self.grow(end)
        return [
            logprobs_of(self.prefixes[i - 1], self.tokens[i], k) if i else None
            for i in range(begin, end)
        ]

    def outcome(self) -> tuple[list[int], str, int | None]:
        """Return the generated tokens, the finish reason and the stop reason."""
        self.grow(self.num_prompt_tokens + self.max_tokens)
        first = self.num_prompt_tokens
        generated = self.tokens[first : first + self.max_tokens]
        for i, token_id in enumerate(generated):
            may_end = i >= self.params.min_tokens or self.params.structured_outputs
            if token_id in self.ends and may_end:
                asked_for = token_id in self.params.stop_token_ids
                return generated[: i + 1], "stop", token_id if asked_for else None
        return generated, "length", None


class SimulatedWorker:
    """Executes plans on a cache of prefix digests, and checks each against `truths`.

    Args:
        truths: the true sequence of every request, by the seed that its row enters with.
    """

    def __init__(
        self, limits: PlanLimits, num_blocks: int, truths: dict[int, TrueSequence]
    ) -> None:
        self._limits = limits
        self._truths = truths
        self._tables = np.zeros((limits.max_num_seqs, limits.max_blocks_per_seq), dtype=np.int32)
        self._records = new_records(limits.max_num_seqs)
        self._last_tokens = [-1] * limits.max_num_seqs
        self._waiting: StepPlan | None = None  # for its masks
        self._cache = [0] * (num_blocks * limits.block_size)
        self.written_blocks: set[int] = set()  # by the latest step
        self.events: Counter[str] = Counter()

    def execute(self, payload: np.ndarray) -> StepResult | None:
        """Run one step, given as the bytes of its record; None if `sample_masked` must follow."""
        assert self._waiting is None, "the masks of a step come before any later step"
        plan = StepPlan.decode(payload)
        self._check_layout(plan)
        self._records[plan.entering["row"]] = plan.entering
        lists = split_lists(plan.entering, plan.row_lists)
        for record, each in zip(plan.entering, lists, strict=True):
            truth = self._truth(record["row"], each["tokens"].size)
            assert each["tokens"].tolist() == truth.tokens[: each["tokens"].size]
            assert bool(each["tokens"].size) == read_tokens(record)
            assert record["num_prompt_tokens"] == truth.num_prompt_tokens
        for position, block in plan.block_updates.tolist():
            self._tables.reshape(-1)[position] = block
        # as on a GPU, all rows store their keys and values before any row attends
        written_by = self._store(plan)
        self._attend(plan)
        self._note(plan, written_by)
        sampling_rows = plan.rows[plan.samples == 1].tolist()
        if self._records["is_masked"][sampling_rows].any():
            self._waiting = plan
            return None
        return self._result(plan, {})

    def sample_masked(self, payload: np.ndarray) -> StepResult:
        """Finish the step that waits for its masks, given as the bytes of their record."""
        plan, self._waiting = self._waiting, None
        assert plan is not None, "no step waits for masks"
        masks = StepMasks.decode(payload)
        assert masks.step == plan.step
        for i in masks.indices.tolist():
            assert plan.samples[i] and self._records["is_masked"][plan.rows[i]]
        pairs = zip(masks.indices.tolist(), masks.words, strict=True)
        return self._result(plan, {i: ids_of_mask(words) for i, words in pairs})

    def _result(self, plan: StepPlan, masks: dict[int, set[int]]) -> StepResult:
        sampled_ids = self._sample(plan, masks)
        return StepResult(plan.step, plan.samples.copy(), sampled_ids, self._report(plan))

    def _check_layout(self, plan: StepPlan) -> None:
        limits = self._limits
        S = plan.rows.size
        assert 1 <= S <= limits.max_num_seqs
        assert len(set(plan.rows.tolist())) == S
        assert plan.num_tokens.min() >= 1
        assert plan.num_tokens.sum() <= limits.max_num_batched_tokens
        assert (plan.num_tokens[: plan.num_decode] == 1).all()
        assert plan.samples[: plan.num_decode].all()
        assert plan.token_ids.size == plan.num_tokens[plan.num_decode :].sum()
        assert len(plan.block_updates) <= limits.max_block_updates
        assert plan.row_lists.size <= limits.max_row_list_words
        assert set(plan.entering["row"].tolist()) <= set(plan.rows[plan.num_decode :].tolist())
        positions = plan.block_updates[:, 0].tolist()
        assert len(set(positions)) == len(positions)

    def _slots(self, row: int, start: int, end: int) -> list[int]:
        size = self._limits.block_size
        table = self._tables[row].tolist()
        return [table[p // size] * size + p % size for p in range(start, end)]

    def _truth(self, row: int, num_tokens: int) -> TrueSequence:
        truth = self._truths[int(self._records["seed"][row])]
        truth.grow(num_tokens)
        return truth

    def _store(self, plan: StepPlan) -> dict[int, int]:
        """Check every row's input and store it; return which row wrote each block."""
        written_by: dict[int, int] = {}
        token_ids = deque(plan.token_ids.tolist())
        for i, (row, start, num_tokens) in enumerate(_scheduled(plan)):
            end = start + num_tokens
            truth = self._truth(row, end)
            inputs = (
                [self._last_tokens[row]]
                if i < plan.num_decode
                else [token_ids.popleft() for _ in range(num_tokens)]
            )
            assert inputs == truth.tokens[start:end], f"row {row} computes the wrong tokens"
            for slot, prefix in zip(
                self._slots(row, start, end), truth.prefixes[start:end], strict=True
            ):
                block = slot // self._limits.block_size
                assert block != RESERVED_BLOCK
                assert written_by.setdefault(block, row) == row, f"two rows write block {block}"
                self._cache[slot] = prefix
        self.written_blocks = set(written_by)
        return written_by

    def _attend(self, plan: StepPlan) -> None:
        for row, start, num_tokens in _scheduled(plan):
            end = start + num_tokens
            seen = [self._cache[slot] for slot in self._slots(row, 0, end)]
            assert seen == self._truth(row, end).prefixes[:end], f"row {row} sees the wrong tokens"

    def _sample(self, plan: StepPlan, masks: dict[int, set[int]]) -> np.ndarray:
        sampled_ids = []
        for i, (row, start, num_tokens) in enumerate(_scheduled(plan)):
            if plan.samples[i]:
                position = start + num_tokens
                record = self._records[row]
                prefix = self._cache[self._slots(row, position - 1, position)[0]]
                is_early = position < record["min_position"]
                banned = set(record["stop_ids"].tolist()) if is_early else set()
                banned |= set(range(VOCAB_SIZE)) - masks[i] if i in masks else set()
                temperature, seed = float(record["temperature"]), int(record["seed"])
                self._last_tokens[row] = sample_token(prefix, temperature, seed, banned)
                sampled_ids.append(self._last_tokens[row])
        return np.array(sampled_ids, dtype=np.int32)

    def _report(self, plan: StepPlan) -> np.ndarray:
        """Return log-probabilities of new tokens and of the prompt tokens of this step."""
        records = [np.empty(0, np.int32)]
        for i, (row, start, num_tokens) in enumerate(_scheduled(plan)):
            record = self._records[row]
            end = start + num_tokens
            truth = self._truth(row, end + 1)
            spans = [
                (start + 1, min(end + 1, truth.num_prompt_tokens), record["num_prompt_logprobs"])
            ]
            if plan.samples[i]:
                spans.append((end, end + 1, record["num_logprobs"]))
            for begin, until, k in spans:
                if k >= 0 and begin < until:
                    parts = [each for each in truth.logprobs(begin, until, k) if each is not None]
                    ids, logprobs, ranks = zip(*parts, strict=True)
                    block = LogprobBlock(
                        i,
                        begin,
                        np.array([each[0] for each in ranks], np.int32),
                        np.array(ids, np.int32),
                        np.array(logprobs, np.float32),
                    )
                    records.append(block.record())
                    self.events["log-probability blocks"] += 1
        return np.concatenate(records)

    def _note(self, plan: StepPlan, written_by: dict[int, int]) -> None:
        size = self._limits.block_size
        entering = set(plan.entering["row"].tolist())
        for row, start, _ in _scheduled(plan):
            shared = self._tables[row, : start // size].tolist() if row in entering else []
            self.events["prefix hits"] += bool(shared)
            self.events["prefix hits within a step"] += any(
                written_by.get(block, row) != row for block in shared
            )


@dataclass
class Watched:
    """A request, the engine's record of it, and the updates that the caller has received."""

    seq: Sequence
    truth: TrueSequence
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class SimulatedEngine:
    """Scheduler and simulated worker, connected as the coordinator connects them.

    `send` schedules a step and `receive` processes its result; `step` does what the coordinator's
    `step` does. `check` holds after each of them, and after `add` and `abort`.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 64,
        enable_prefix_caching: bool = True,
        max_steps_in_flight: int = 2,
    ) -> None:
        max_blocks_per_seq = -(-max_model_len // block_size)
        self.limits = PlanLimits(
            max_num_seqs,
            max_num_batched_tokens,
            max_blocks_per_seq,
            block_size,
            VOCAB_SIZE,
            max_logprobs=20,
        )
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(self.blocks, self.limits)
        self.max_total_tokens = min(max_model_len, self.blocks.num_usable_blocks * block_size)
        self.max_steps_in_flight = max_steps_in_flight
        self.requests: dict[str, Watched] = {}  # in order of arrival
        self.plans: list[StepPlan] = []
        self._truths: dict[int, TrueSequence] = {}
        self._worker = SimulatedWorker(self.limits, num_blocks, self._truths)
        self._num_blocks = num_blocks
        # with the blocks it writes; no result where the step waits for masks
        self._in_flight: deque[tuple[StepResult | None, set[int]]] = deque()
        self.events = self._worker.events

    # ---- the caller --------------------------------------------------------------------------

    def add(self, prompt: list[int], params: SamplingParams | None = None) -> Watched:
        """Queue a request. Without `params` it is greedy and has exactly 4 tokens."""
        params = params or SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        request_id = str(len(self.requests))
        # identifies the request to the worker, and fills both words of the seed
        seed = (len(self.requests) + 1) * (2**40 + 1)
        request = AddRequest(request_id, prompt, params)
        structured = params.structured_outputs
        seq = Sequence(
            request,
            seed=seed,
            eos_token_ids=(EOS,),
            max_total_tokens=self.max_total_tokens,
            grammar=None if structured is None else GRAMMARS.compile(structured),
        )
        self._truths[seed] = TrueSequence(request, seed, self.max_total_tokens)
        self.requests[request_id] = Watched(seq, self._truths[seed])
        self.scheduler.add(seq)
        self.check()
        return self.requests[request_id]

    def abort(self, *request_ids: str) -> None:
        alive = {each for each in request_ids if each in self.requests and not self._ended(each)}
        updates = self.scheduler.abort(request_ids)
        assert {update.request_id for update in updates} == alive
        for update in updates:
            self._hear(update)
        self.check()

    # ---- the coordinator ---------------------------------------------------------------------

    def send(self) -> StepPlan | None:
        """Schedule a step and execute it in the worker. Its result stays in flight."""
        running = [each.seq for each in self._alive() if each.seq.status is Status.RUNNING]
        plan = self.scheduler.schedule()
        for seq in running:
            if seq.status is Status.WAITING:
                self.events["preemptions"] += 1
                decodes = seq.num_computed_tokens >= seq.prefill_target
                in_flight = decodes and seq.num_steps_in_flight > 0
                self.events["preemptions with a token in flight"] += in_flight
        if plan is not None:
            payload = _bytes_of(plan)
            assert payload.size <= self.limits.plan_bytes
            result = self._worker.execute(payload)
            self._in_flight.append((result, self._worker.written_blocks))
            self.plans.append(plan)
            self._take_masks()
            self.events["steps that wait for a token"] += self._in_flight[-1][0] is None
            self.events["chunks"] += int((plan.samples == 0).sum())
            self.events["mixed steps"] += 0 < plan.num_decode < plan.rows.size
        else:
            assert self._in_flight or not self._alive(), "nothing is in flight, and nothing starts"
        self.check()
        return plan

    def receive(self) -> list[RequestUpdate]:
        """Process the result of the oldest step in flight."""
        result, _ = self._in_flight.popleft()
        assert result is not None, "the oldest step in flight waits for its masks"
        payload = _bytes_of(result)
        assert payload.size <= self.limits.result_bytes
        updates = self.scheduler.finish(StepResult.decode(payload))
        for update in updates:
            self._hear(update)
        num_heard = sum(len(update.new_token_ids) for update in updates)
        self.events["tokens dropped"] += result.token_ids.size - num_heard
        self._take_masks()
        self.check()
        return updates

    def _take_masks(self) -> None:
        masks = self.scheduler.take_masks()
        if masks is not None:
            payload = _bytes_of(masks)
            assert payload.size <= self.limits.masks_bytes
            _, written = self._in_flight.pop()
            self._in_flight.append((self._worker.sample_masked(payload), written))
            self.events["masks"] += masks.indices.size

    def step(self) -> list[RequestUpdate]:
        while len(self._in_flight) < self.max_steps_in_flight and self.send() is not None:
            pass
        return self.receive() if self._in_flight else []

    def run_to_end(self) -> None:
        """Serve all requests, then check that every resource has been released."""
        # a generous limit: the earliest request advances at least every other step
        patience = 100 + 20 * sum(
            each.truth.num_prompt_tokens + each.truth.max_tokens for each in self.requests.values()
        )
        while self.scheduler.num_unfinished or self._in_flight:
            self.step()
            patience -= 1
            assert patience > 0, "the engine works and gets nowhere"
        assert self.blocks.num_free == self.blocks.num_usable_blocks
        for request_id, each in self.requests.items():
            assert each.finish_reason is not None, f"request {request_id} never ended"
            token_ids, *reasons = each.truth.outcome()
            if each.finish_reason in ("abort", "error"):
                assert each.token_ids == token_ids[: len(each.token_ids)]
            else:
                heard = (each.token_ids, each.finish_reason, each.stop_reason)
                assert heard == (token_ids, *reasons)
            self._check_logprobs(each)
        stats = self.scheduler.stats
        assert stats.num_steps == len(self.plans)
        assert stats.num_prefill_chunks == self.events["chunks"]
        assert stats.num_mixed_steps == self.events["mixed steps"]
        # more where one came back within the same step, now sharing blocks that it had computed too
        assert stats.num_preemptions >= self.events["preemptions"]

    # ---- invariants --------------------------------------------------------------------------

    def check(self) -> None:
        sequences = [each.seq for each in self.requests.values()]
        held = Counter(block for seq in sequences for block in seq.block_table)
        counts = {block: self.blocks.ref_count(block) for block in range(self._num_blocks)}
        assert held == +Counter(counts), "reference counts are not those of the block tables"
        assert self.blocks.num_free == self.blocks.num_usable_blocks - len(held)
        assert RESERVED_BLOCK not in held
        for _, written in self._in_flight:
            assert all(counts[block] for block in written), "a step in flight writes a free block"
        rows = [seq.row for seq in sequences if seq.row >= 0]
        assert len(set(rows)) == len(rows) <= self.limits.max_num_seqs
        statuses = [each.seq.status for each in self._alive()]
        assert statuses == sorted(statuses, key=[Status.RUNNING, Status.WAITING].index), (
            "a later arrival runs while an earlier one waits"
        )
        assert self.scheduler.num_unfinished == len(statuses)
        assert self.scheduler.num_in_flight == len(self._in_flight)

    def _check_logprobs(self, each: Watched) -> None:
        """Check that all requested log-probabilities came, one for each token and in order."""
        truth, params = each.truth, each.truth.params
        first = truth.num_prompt_tokens
        expected: list[TokenLogprobs | None] = []
        if params.logprobs is not None:
            expected = truth.logprobs(first, first + len(each.token_ids), params.logprobs)
        assert each.logprobs == expected
        if params.prompt_logprobs is None:
            assert each.prompt_logprobs is None
        elif each.token_ids:
            assert each.prompt_logprobs == truth.logprobs(0, first, params.prompt_logprobs)

    def _alive(self) -> list[Watched]:
        return [each for each in self.requests.values() if each.finish_reason is None]

    def _ended(self, request_id: str) -> bool:
        return self.requests[request_id].finish_reason is not None

    def _hear(self, update: RequestUpdate) -> None:
        each = self.requests[update.request_id]
        assert each.finish_reason is None, "news of a request that has ended"
        assert 0 <= update.num_cached_tokens < each.truth.num_prompt_tokens
        if update.prompt_logprobs is not None:
            assert not each.token_ids, "the prompt's come with the first token"
            packed = update.prompt_logprobs
            each.prompt_logprobs = [None, *map(packed.position, range(packed.num_positions))]
        each.logprobs += update.logprobs or []
        each.token_ids += update.new_token_ids
        each.finish_reason, each.stop_reason = update.finish_reason, update.stop_reason
        assert (each.seq.status is Status.FINISHED) == (each.finish_reason is not None)


def _bytes_of(record: StepPlan | StepMasks | StepResult) -> np.ndarray:
    return np.frombuffer(b"".join(each.tobytes() for each in record.buffers()), np.uint8)


def _scheduled(plan: StepPlan) -> Iterable[tuple[int, int, int]]:
    """Return row, start and number of tokens of each scheduled row."""
    return zip(plan.rows.tolist(), plan.starts.tolist(), plan.num_tokens.tolist(), strict=True)
