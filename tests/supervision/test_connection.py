"""Tests of the messages between an engine's process and its caller's, within one process."""

import math
import socket
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from tpllm.engine.request import AddRequest, PackedLogprobs, RequestUpdate, TokenLogprobs
from tpllm.errors import SettingError, WorkerError
from tpllm.sampling_params import RequestOutputKind, SamplingParams
from tpllm.supervision import messages
from tpllm.supervision.connection import Connection, Message

Pair = tuple[Connection, Connection]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = [Connection(end) for end in socket.socketpair()]
    yield ends[0], ends[1]
    for end in ends:
        end.close()


def through(pair: Pair, message: Message) -> Message:
    pair[0].send(message)
    (received,) = pair[1].receive(timeout_s=60)
    return received


def test_sending_never_waits_for_a_side_that_does_not_read(pair):
    text = "x" * 10**6
    for number in range(50):
        pair[0].send({"number": number, "text": text})  # far more than a socket holds
    received: list[Message] = []
    while len(received) < 50:
        received += pair[1].receive(timeout_s=60)
    assert [message["number"] for message in received] == list(range(50))
    assert all(message["text"] == text for message in received)


def test_without_waiting_there_may_be_nothing(pair):
    assert pair[1].receive(timeout_s=0) == []


def test_what_was_sent_arrives_before_the_end_of_the_other_side(pair):
    pair[0].send({"last": "words"})
    pair[0].flush(timeout_s=60)
    pair[0].close()
    assert pair[1].receive(timeout_s=60) == [{"last": "words"}]
    with pytest.raises(EOFError, match="the other side of the connection is gone"):
        pair[1].receive(timeout_s=60)
    pair[1].send({"nobody": "listens"})


def test_requests_arrive_as_they_were(pair):
    params = SamplingParams(
        temperature=0.25,
        seed=2**64 - 1,
        logit_bias={5: -1.5},
        prompt_logprobs=2,
        allowed_token_ids=[1, 2],
        max_tokens=None,
        logprobs=0,
    )
    requests = [
        AddRequest(str(i), [1, 2], params.of_continuation(i), [[3], [4, 5]]) for i in range(3)
    ]
    assert len({request.sampling_params.seed for request in requests}) == 3
    assert [request.sampling_params.prompt_logprobs for request in requests] == [2, None, None]
    assert messages.read_add(through(pair, messages.add(requests))) == requests


def test_what_requests_have_in_common_is_sent_once(pair: Pair) -> None:
    params = SamplingParams(n=1000, seed=1, allowed_token_ids=list(range(1000)))
    requests = [AddRequest(str(i), [1] * 1000, params.of_continuation(i)) for i in range(1000)]
    assert len(msgpack.packb(messages.add(requests))) < 10_000
    assert messages.read_add(through(pair, messages.add(requests))) == requests


def test_parameters_that_only_the_caller_uses_are_not_sent(pair):
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, stop="x", bad_words=["y"])
    (request,) = messages.read_add(through(pair, messages.add([AddRequest("0", [1], params)])))
    assert request.sampling_params == SamplingParams()


def test_updates_arrive_as_they_were(pair):
    logprobs = TokenLogprobs([7, 8], [-0.1, -math.inf], [1, 2])
    updates = [
        RequestUpdate("0", [7], None, None, 0, [logprobs], PackedLogprobs(b"0", b"\xff1", b"")),
        RequestUpdate("1", [], "abort", None, 16),
        RequestUpdate("2", [9], "stop", 9, 0),
    ]
    assert messages.read_updates(through(pair, messages.updates(updates))) == updates


@pytest.mark.parametrize(
    "raised",
    [
        SettingError("reported"),
        ValueError("reported"),
        WorkerError("reported", rank=1, phase="ready", step=7, signal=9, report=Path("report")),
    ],
)
def test_an_error_arrives_as_what_it_was(pair, raised):
    read = messages.read_error(through(pair, messages.error(raised)))
    assert (type(read), str(read), vars(read)) == (type(raised), "reported", vars(raised))


def test_any_other_error_is_sent_with_its_traceback(pair):
    read = messages.read_error(through(pair, messages.error(KeyError("lost"))))
    assert isinstance(read, WorkerError)
    assert "KeyError: 'lost'" in str(read)


@pytest.mark.parametrize("value", [10**30, "\ud800"])
def test_what_no_message_can_hold_is_refused_and_harms_no_other(pair: Pair, value: object) -> None:
    with pytest.raises((OverflowError, ValueError)):
        pair[0].send({"x": value})
    assert through(pair, {"type": "next"}) == {"type": "next"}
