"""Tests of the block manager, with examples and against a plain model of every block's content."""

from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tpllm.channel.step_plan import RESERVED_BLOCK
from tpllm.engine.block_manager import BlockManager


def take(blocks: BlockManager, tokens: list[int]) -> list[int]:
    """Return the block table of a sequence with `tokens`, which shares its known full blocks."""
    digests = blocks.digest_chain(tokens, [])
    cached = blocks.match_prefix(digests)
    table = blocks.take(cached, -(-len(tokens) // blocks.block_size) - len(cached))
    for block, digest in zip(table, digests, strict=False):
        blocks.register(block, digest)
    return table


def find(blocks: BlockManager, tokens: list[int]) -> list[int]:
    return blocks.match_prefix(blocks.digest_chain(tokens, []))


def test_all_blocks_but_the_reserved_one_are_handed_out():
    blocks = BlockManager(num_blocks=5, block_size=4)
    assert blocks.num_free == blocks.num_usable_blocks == 4
    table = blocks.take([], 4)
    assert sorted(table) == [1, 2, 3, 4] and RESERVED_BLOCK == 0
    assert blocks.num_free == 0 and not blocks.can_take([], 1)
    with pytest.raises(KeyError):
        blocks.allocate()
    blocks.release(table)
    assert blocks.num_free == 4


def test_a_cache_without_a_block_to_hand_out_is_refused():
    with pytest.raises(ValueError, match="num_kv_blocks=1 leaves no block to use; give at least 2"):
        BlockManager(num_blocks=1, block_size=4)


def test_a_block_released_twice_is_noticed():
    blocks = BlockManager(num_blocks=5, block_size=4)
    table = blocks.take([], 1)
    blocks.release(table)
    with pytest.raises(AssertionError, match=f"block {table[0]} released twice"):
        blocks.release(table)


def test_equal_prefixes_share_their_full_blocks():
    blocks = BlockManager(num_blocks=9, block_size=4)
    first = take(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = take(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 10, 11])
    assert first[:2] == second[:2] and first[2] != second[2]
    assert [blocks.ref_count(block) for block in first] == [2, 2, 1]
    assert blocks.num_free == 8 - 4


def test_equal_blocks_after_different_beginnings_are_not_shared():
    blocks = BlockManager(num_blocks=9, block_size=4)
    take(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    assert find(blocks, [0, 2, 3, 4, 5, 6, 7, 8]) == []
    assert find(blocks, [5, 6, 7, 8]) == []


def test_a_shared_block_is_free_after_its_last_holder():
    blocks = BlockManager(num_blocks=9, block_size=4)
    first, second = take(blocks, [1] * 4), take(blocks, [1] * 4)
    assert first == second
    assert blocks.num_freed_by(first) == 0
    blocks.release(first)
    assert blocks.num_free == 7
    assert blocks.num_freed_by(second) == 1
    blocks.release(second)
    assert blocks.num_free == 8


def test_a_free_block_keeps_its_content_until_it_is_reused():
    blocks = BlockManager(num_blocks=3, block_size=4)
    table = take(blocks, [1] * 8)
    blocks.release(table)
    assert blocks.num_free == 2
    assert find(blocks, [1] * 8) == table
    assert blocks.can_take(table, 0) and not blocks.can_take(table, 1)
    assert take(blocks, [1] * 8) == table
    blocks.release(table)
    blocks.allocate()
    assert find(blocks, [1] * 8) == table[:1]


def test_the_block_released_longest_ago_is_reused_first():
    blocks = BlockManager(num_blocks=4, block_size=4)
    tables = [take(blocks, [i] * 4) for i in range(3)]
    for i in (1, 0, 2):
        blocks.release(tables[i])
    take(blocks, [0] * 4)  # used again, and released last
    blocks.release(tables[0])
    assert [blocks.allocate() for _ in range(3)] == [*tables[1], *tables[2], *tables[0]]


def test_the_end_of_a_sequence_is_reused_before_its_beginning():
    blocks = BlockManager(num_blocks=4, block_size=4)
    table = take(blocks, [1] * 12)
    blocks.release(table)
    assert [blocks.allocate() for _ in range(3)] == table[::-1]


def test_a_block_that_caches_nothing_is_reused_before_any_that_does():
    blocks = BlockManager(num_blocks=4, block_size=4)
    known = take(blocks, [1] * 8)
    unknown = take(blocks, [2] * 3)
    blocks.release(known)
    blocks.release(unknown)
    assert blocks.allocate() == unknown[0]


def test_of_two_equal_blocks_the_first_stays_the_one_that_is_found():
    blocks = BlockManager(num_blocks=4, block_size=4)
    first, second = blocks.take([], 2)
    (digest,) = blocks.digest_chain([1] * 4, [])
    blocks.register(first, digest)
    blocks.register(second, digest)
    blocks.release([second])
    assert blocks.match_prefix([digest]) == [first]
    blocks.release([first])
    assert [blocks.allocate() for _ in range(3)] == [second, 3, first]
    assert blocks.match_prefix([digest]) == []


def test_a_chain_of_digests_is_extended_in_place_by_whole_blocks():
    blocks = BlockManager(num_blocks=4, block_size=4)
    known = blocks.digest_chain([1] * 7, [])
    assert len(known) == 1
    extended = blocks.digest_chain([1] * 13, known)
    assert extended is known
    assert known == blocks.digest_chain([1] * 12, []) and len(set(known)) == 3


def test_without_prefix_caching_there_are_no_digests():
    blocks = BlockManager(num_blocks=4, block_size=4, enable_prefix_caching=False)
    assert blocks.digest_chain([1] * 8, []) == []


def test_a_reset_forgets_prefixes_and_leaves_blocks_with_their_holders():
    blocks = BlockManager(num_blocks=6, block_size=4)
    held, freed = take(blocks, [1] * 4), take(blocks, [2] * 4)
    blocks.release(freed)
    blocks.reset_prefix_cache()
    assert find(blocks, [1] * 4) == find(blocks, [2] * 4) == []
    assert blocks.ref_count(held[0]) == 1 and blocks.num_free == 4
    again = take(blocks, [1] * 4)
    assert again != held
    assert find(blocks, [1] * 4) == again


class Blocks(RuleBasedStateMachine):
    """Takes, extends and releases the block tables of sequences with few different tokens.

    In the model, `held` has the tables in use and the tokens that they store. `content` has the
    sequence up to the end of each block, as it was last written.
    """

    events: ClassVar[Counter[str]] = Counter()  # over all examples

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.held: list[tuple[list[int], list[int]]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        self.num_resets = 0

    @rule(num_equal=st.integers(1, 9), rest=st.lists(st.integers(0, 1), max_size=3))
    def take(self, num_equal: int, rest: list[int]) -> None:
        tokens = [0] * num_equal + rest
        blocks, size = self.blocks, self.blocks.block_size
        digests = blocks.digest_chain(tokens, [])
        cached = blocks.match_prefix(digests)
        for i, block in enumerate(cached):
            assert self.content[block] == tuple(tokens[: (i + 1) * size])
        num_new = -(-len(tokens) // size) - len(cached)
        held_before = self.counts()
        fits = len({*held_before, *cached}) + num_new <= blocks.num_usable_blocks
        assert blocks.can_take(cached, num_new) == fits
        if not fits:
            return
        Blocks.events["revived"] += any(block not in held_before for block in cached)
        Blocks.events["shared"] += any(block in held_before for block in cached)
        table = blocks.take(cached, num_new)
        assert table[: len(cached)] == cached
        for block in table[len(cached) :]:
            self.check_fresh(block, held_before)
        self.held.append((table, []))
        self.store(tokens)

    @precondition(lambda self: self.held and self.blocks.num_free)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def extend(self, tokens: list[int]) -> None:
        """Extend the latest sequence in its last block and in new blocks."""
        blocks, (table, known) = self.blocks, self.held[-1]
        for token in tokens:
            if len(known) == len(table) * blocks.block_size:
                if blocks.num_free == 0:
                    return
                held_before = self.counts()
                block = blocks.allocate()
                self.check_fresh(block, held_before)
                table.append(block)
            self.store([token])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        num_free, expected = self.blocks.num_free, self.blocks.num_freed_by(table)
        self.blocks.release(table)
        assert self.blocks.num_free == num_free + expected

    @precondition(lambda self: self.num_resets < 2)  # more would leave little to find
    @rule()
    def reset_prefix_cache(self) -> None:
        self.num_resets += 1
        self.blocks.reset_prefix_cache()
        assert find(self.blocks, [0] * 12) == find(self.blocks, [1] * 12) == []

    def store(self, tokens: list[int]) -> None:
        """Append `tokens` to the latest sequence, and register its full blocks."""
        table, known = self.held[-1]
        known += tokens
        size = self.blocks.block_size
        for i, block in enumerate(table):
            self.content[block] = tuple(known[: (i + 1) * size])
        digests = self.blocks.digest_chain(known, [])
        for block, digest in zip(table, digests, strict=False):
            self.blocks.register(block, digest)

    def counts(self) -> Counter[int]:
        return Counter(block for table, _ in self.held for block in table)

    def check_fresh(self, block: int, held_before: Counter[int]) -> None:
        assert block != RESERVED_BLOCK and block not in held_before
        Blocks.events["reused"] += block in self.content
        self.content.pop(block, None)

    @invariant()
    def counts_agree(self) -> None:
        counts = self.counts()
        for block in range(self.blocks.num_usable_blocks + 1):
            assert self.blocks.ref_count(block) == counts[block]
        assert self.blocks.num_free == self.blocks.num_usable_blocks - len(counts)

    def teardown(self) -> None:
        for table, _ in getattr(self, "held", []):
            self.blocks.release(table)
        if hasattr(self, "blocks"):
            assert self.blocks.num_free == self.blocks.num_usable_blocks


@pytest.mark.timeout(900)  # hypothesis may spend five minutes on making a failure small
def test_no_block_is_lost_shared_wrongly_or_handed_out_twice():
    Blocks.events = Counter()
    options: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None}
    run_state_machine_as_test(
        Blocks, settings=settings(max_examples=300, stateful_step_count=40, **options)
    )
    for event in ("shared", "revived", "reused"):
        assert Blocks.events[event] >= 20, Blocks.events
