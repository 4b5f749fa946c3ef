"""Long answers are encoded piece by piece, and the JSON is the same."""

import asyncio
import json
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest

from tpllm.outputs import Logprob
from tpllm.server.json_turns import ENTRIES_PER_TURN, LongList, to_json_in_turns
from tpllm.server.logprob_bodies import Entry, chat_logprobs, completion_logprobs, prompt_logprobs

N = 10 * ENTRIES_PER_TURN + 3
IDS = list(range(N))
POSITIONS = [{i: Logprob(-1.0, 2, "a"), -1: Logprob(-0.5, 1, "b")} for i in IDS]


class Counted(list[Any]):
    """Counts its entries by the turn of the event loop in which they are read."""

    def __init__(self, entries: list[Any]) -> None:
        super().__init__(entries)
        self.turn = 0
        self.read: Counter[int] = Counter()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.read[self.turn] += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))


def in_turns(work: Coroutine[Any, Any, Any], counted: Counted) -> Any:
    """The result of `work`, beside a task that counts turns."""

    async def count() -> None:
        while True:
            counted.turn += 1
            await asyncio.sleep(0)

    async def both() -> Any:
        other = asyncio.create_task(count())
        try:
            return await work
        finally:
            other.cancel()

    return asyncio.run(both())


def read(content: Any, counted: Counted | None = None) -> Any:
    return json.loads(b"".join(in_turns(to_json_in_turns(content), counted or Counted([]))))


@pytest.mark.parametrize("num_entries", [0, 1, ENTRIES_PER_TURN, N])
def test_long_lists_are_encoded_at_their_places(num_entries: int) -> None:
    entries = [[i, "é"] for i in range(num_entries)]
    long_list = LongList(num_entries, entries.__getitem__)
    content = {"a": [long_list, 1], "b": {"c": long_list}, "d": "text"}
    assert read(content) == {"a": [entries, 1], "b": {"c": entries}, "d": "text"}
    assert read(LongList.of(entries)) == entries


def test_other_tasks_run_while_a_long_list_is_encoded() -> None:
    counted = Counted(IDS)
    assert read(LongList(N, counted.__getitem__), counted) == IDS
    assert sum(counted.read.values()) == N
    assert max(counted.read.values()) == ENTRIES_PER_TURN


def test_other_tasks_run_while_log_probabilities_are_encoded() -> None:
    counted = Counted(POSITIONS)
    by_id = read(prompt_logprobs(counted), counted)
    assert len(by_id) == N and by_id[5]["5"]["logprob"] == -1.0
    assert max(counted.read.values()) == ENTRIES_PER_TURN

    counted = Counted(POSITIONS)
    content = read(chat_logprobs(IDS, counted, 1, lambda token_id: b"c"), counted)["content"]
    assert len(content) == N and content[5]["top_logprobs"][0]["token"] == "b"
    assert content[5]["bytes"] == content[5]["top_logprobs"][0]["bytes"] == [99]
    assert max(counted.read.values()) == ENTRIES_PER_TURN

    counted = Counted(POSITIONS)
    entries = map(Entry, IDS, counted, range(7, 7 + N))
    logprobs = in_turns(completion_logprobs(entries, 1), counted)
    assert max(counted.read.values()) <= ENTRIES_PER_TURN + 1
    written = read(logprobs)
    assert written["tokens"] == ["a"] * N
    assert written["text_offset"] == list(range(7, 7 + N))
    assert written["top_logprobs"] == [{"b": -0.5, "a": -1.0}] * N
