"""Tests of the ring, in one process and across several. No test waits for time to pass."""

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from tpllm.channel.ring import (
    Record,
    RingDescriptors,
    RingReader,
    RingWriter,
    create_ring,
    wait_readable,
)

LONG_S = 60.0  # nothing here takes so long


class Ring:
    """Both ends of a ring in this process."""

    def __init__(self, num_readers: int = 1, num_slots: int = 4, slot_bytes: int = 100) -> None:
        self.descriptors = create_ring(num_readers, num_slots, slot_bytes)
        self.writer = RingWriter(self.descriptors)
        self.readers = [RingReader(self.descriptors, i) for i in range(num_readers)]

    def close(self) -> None:
        for end in (self.writer, *self.readers):
            end.close()
        self.descriptors.close()

    def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            assert self.writer.try_send(1, [payload])


@pytest.fixture
def ring() -> Iterator[Ring]:
    with closing(Ring()) as ring:
        yield ring


@pytest.fixture
def ring_of_two() -> Iterator[Ring]:
    """A ring with two readers and two slots."""
    with closing(Ring(num_readers=2, num_slots=2)) as ring:
        yield ring


def taken_by(reader: RingReader) -> bytes:
    record = reader.try_receive()
    assert record is not None
    return record.payload.tobytes()


def contents(descriptors: RingDescriptors) -> bytes:
    return os.pread(descriptors.memory, os.fstat(descriptors.memory).st_size, 0)


def is_readable(fd: int) -> bool:
    return wait_readable(fd, 0.0)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- what arrives --------------------------------------------------------------------------------


def test_a_record_arrives_as_its_buffers_joined(ring):
    matrix = np.arange(12, dtype=np.int32).reshape(3, 4)
    parts = [b"bytes", matrix[:, ::2], np.array([-1], dtype=np.int64), b"", np.empty((0, 2))]
    assert ring.writer.try_send(7, parts)
    record = ring.readers[0].try_receive()
    expected = b"bytes" + np.ascontiguousarray(matrix[:, ::2]).tobytes() + b"\xff" * 8
    assert (record.kind, record.payload.tobytes()) == (7, expected)


def test_an_empty_ring_returns_none(ring):
    assert ring.readers[0].try_receive() is None
    assert ring.readers[0].receive(timeout_s=0.0) is None
    assert ring.readers[0].receive(timeout_s=0.0, spin_s=1e-4) is None


def test_what_was_received_stays_when_its_slot_is_written_again(ring):
    ring.send(b"first")
    record = ring.readers[0].try_receive()
    for _ in range(2 * ring.writer.num_slots):
        ring.send(b"later")
        taken_by(ring.readers[0])
    assert record.payload.tobytes() == b"first"


@pytest.mark.parametrize("num_slots", [1, 3])
def test_many_more_records_than_slots_of_every_size(num_slots):
    with closing(Ring(num_slots=num_slots, slot_bytes=200)) as ring:
        for i in range(1000):
            payload = bytes([i % 256]) * (i % 201)
            assert ring.writer.try_send(i, [payload])
            record = ring.readers[0].try_receive()
            assert record is not None
            assert (record.kind, record.payload.tobytes()) == (i, payload)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_reader_gets_every_record_once_and_in_order(data):
    num_readers, num_slots = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    actors = data.draw(st.lists(st.integers(-3, num_readers - 1), max_size=200))
    received: list[list[bytes]] = [[] for _ in range(num_readers)]
    sent: list[bytes] = []
    with closing(Ring(num_readers, num_slots, slot_bytes=8)) as ring:
        for actor in actors:
            if actor < 0:  # the writer
                payload = len(sent).to_bytes(8, "little")
                is_full = len(sent) - min(map(len, received)) == num_slots
                assert ring.writer.try_send(1, [payload]) is not is_full
                sent += [] if is_full else [payload]
            else:
                record = ring.readers[actor].try_receive()
                if record is None:
                    assert len(received[actor]) == len(sent)
                else:
                    received[actor].append(record.payload.tobytes())
            assert all(got == sent[: len(got)] for got in received)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot_bytes", [1, 48, 49, 64, 1000])
def test_payloads_at_the_limit_do_not_touch_their_neighbours(slot_bytes):
    payloads = [bytes([letter]) * slot_bytes for letter in b"abc"]
    with closing(Ring(num_slots=3, slot_bytes=slot_bytes)) as ring:
        for _ in range(2):
            ring.send(*payloads)
            assert [taken_by(ring.readers[0]) for _ in payloads] == payloads


def test_a_record_larger_than_a_slot_is_refused_before_anything_is_written(ring):
    ring.send(b"before")
    memory = contents(ring.descriptors)
    with pytest.raises(ValueError, match="record of 101 bytes does not fit .* slots of 100 bytes"):
        ring.writer.try_send(1, [b"x" * 60, np.zeros(41, np.uint8)])
    assert contents(ring.descriptors) == memory
    ring.send(b"after")
    assert [taken_by(ring.readers[0]), taken_by(ring.readers[0])] == [b"before", b"after"]
    assert ring.readers[0].try_receive() is None


# ---- late readers --------------------------------------------------------------------------------


def test_a_slot_is_free_only_when_the_latest_reader_has_left_it(ring_of_two):
    early, late = ring_of_two.readers
    ring_of_two.send(b"0", b"1")
    assert [taken_by(early), taken_by(early)] == [b"0", b"1"]
    assert not ring_of_two.writer.try_send(1, [b"2"])
    assert taken_by(late) == b"0"
    ring_of_two.send(b"2")
    assert not ring_of_two.writer.try_send(1, [b"3"])
    assert [taken_by(late), taken_by(late)] == [b"1", b"2"]
    assert taken_by(early) == b"2"


def test_sending_to_a_full_ring_times_out_and_leaves_it_as_it_was(ring_of_two):
    ring_of_two.send(b"0", b"1")
    taken_by(ring_of_two.readers[0])
    with pytest.raises(TimeoutError, match=r"no reader freed a slot of the ring within 0\.01 s"):
        ring_of_two.writer.send(1, [b"2"], timeout_s=0.01)
    late = ring_of_two.readers[1]
    assert [taken_by(late), taken_by(late)] == [b"0", b"1"]
    assert late.try_receive() is None


def test_sending_waits_for_the_latest_reader(ring_of_two):
    ring_of_two.send(b"0", b"1")
    sending = threading.Thread(target=ring_of_two.writer.send, args=(1, [b"2"], LONG_S))
    sending.start()
    for reader in ring_of_two.readers:  # one alone does not free the slot
        assert taken_by(reader) == b"0"
    sending.join(LONG_S)
    assert not sending.is_alive()
    for reader in ring_of_two.readers:
        assert [taken_by(reader), taken_by(reader)] == [b"1", b"2"]


READER_PROCESS = """
import hashlib, sys
from tpllm.channel.ring import RingDescriptors, RingReader

index, count, *fds = map(int, sys.argv[1:])
reader = RingReader(RingDescriptors.from_list(fds), index)
print("joined", flush=True)
sys.stdin.read(1)  # the late reader begins when the ring is full
digest = hashlib.sha256()
for sequence in range(count):
    record = reader.receive(timeout_s=60, spin_s=1e-4 * (sequence % 2))
    assert record is not None and record.kind == sequence % 5
    digest.update(record.payload)
assert reader.try_receive() is None
print(digest.hexdigest())
"""


def test_reader_processes_get_everything_though_one_is_late():
    num_readers, num_slots, count = 3, 4, 500
    descriptors = create_ring(num_readers, num_slots, 64)
    writer = RingWriter(descriptors)
    payloads = [bytes([i % 256]) * (i % 65) for i in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READER_PROCESS, *map(str, (i, count, *descriptors.all()))],
            pass_fds=descriptors.all(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(num_readers)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
        for process in processes[:-1]:
            assert process.stdin is not None
            process.stdin.write("go")
            process.stdin.flush()
        for i in range(num_slots):
            assert writer.try_send(i % 5, [payloads[i]])
        assert not writer.try_send(0, [b"the last reader has taken nothing yet"])
        assert processes[-1].stdin is not None
        processes[-1].stdin.write("go")
        processes[-1].stdin.flush()
        for i in range(num_slots, count):
            writer.send(i % 5, [payloads[i]], timeout_s=LONG_S)
        digest = hashlib.sha256(b"".join(payloads)).hexdigest()
        assert [p.communicate(timeout=LONG_S)[0].strip() for p in processes] == [digest] * 3
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        writer.close()
        descriptors.close()


# ---- waking --------------------------------------------------------------------------------------


def test_each_record_wakes_each_reader_once(ring_of_two):
    ring_of_two.send(b"0", b"1")
    assert [os.eventfd_read(fd) for fd in ring_of_two.descriptors.ready] == [2, 2]


def test_each_record_taken_wakes_the_writer_once(ring_of_two):
    ring_of_two.send(b"0", b"1")
    for reader in ring_of_two.readers:
        taken_by(reader)
    assert os.eventfd_read(ring_of_two.descriptors.freed) == 2


def test_a_reader_may_sleep_once_it_has_found_nothing(ring):
    """A reader takes records until None: its descriptor does not show those it has counted."""
    reader = ring.readers[0]
    assert not is_readable(reader.fileno())
    ring.send(b"0", b"1")
    assert is_readable(reader.fileno())
    assert taken_by(reader) == b"0"
    assert not is_readable(reader.fileno())
    assert taken_by(reader) == b"1"
    assert reader.try_receive() is None
    ring.send(b"2")
    assert is_readable(reader.fileno())


def test_a_writer_may_sleep_once_it_has_found_no_slot(ring_of_two):
    writer, (early, late) = ring_of_two.writer, ring_of_two.readers
    ring_of_two.send(b"0", b"1")
    taken_by(early)
    assert not writer.try_send(1, [b"2"])  # it has counted the slot that the early reader left
    assert not is_readable(writer.fileno())
    taken_by(late)
    assert is_readable(writer.fileno())
    assert writer.try_send(1, [b"2"])


def test_a_sleeping_reader_wakes(ring):
    received: list[Record | None] = []
    reader = ring.readers[0]
    sleeping = threading.Thread(target=lambda: received.append(reader.receive(timeout_s=LONG_S)))
    sleeping.start()
    ring.send(b"wake up")
    sleeping.join(LONG_S)
    assert [record.payload.tobytes() for record in received if record] == [b"wake up"]


# ---- the segment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("word, said", [(0, "magic 0x3e7"), (1, "ring version 999")])
@pytest.mark.parametrize("end", [RingWriter, lambda ring: RingReader(ring, 0)], ids=["w", "r"])
def test_another_version_is_refused_at_both_ends(word, said, end):
    with closing(create_ring(1, 1, 1)) as descriptors:
        os.pwrite(descriptors.memory, (999).to_bytes(8, "little"), 8 * word)
        with pytest.raises(ValueError, match=rf"{said}.* both ends must run the same tpllm"):
            end(descriptors)


def test_the_segment_keeps_its_size(ring):
    size = os.fstat(ring.descriptors.memory).st_size
    for other in (0, size - 1, size + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(ring.descriptors.memory, other)
    with pytest.raises(PermissionError):  # the seals can neither be removed nor extended
        fcntl.fcntl(ring.descriptors.memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_no_other_program_inherits_a_descriptor(ring):
    assert not any(os.get_inheritable(fd) for fd in ring.descriptors.all())


def test_closing_gives_back_descriptors_and_mappings():
    before = num_descriptors()
    mappings = Path("/proc/self/maps").read_text().count("tpllm-ring")
    ring = Ring(num_readers=3)
    ring.send(b"x")
    taken_by(ring.readers[0])
    ring.close()
    assert num_descriptors() == before
    assert Path("/proc/self/maps").read_text().count("tpllm-ring") == mappings


@pytest.mark.parametrize("nth", [0, 2])
def test_a_ring_that_cannot_be_made_leaves_no_descriptor(monkeypatch, nth):
    made = iter(range(100))
    make = os.eventfd

    def eventfd(value: int, flags: int) -> int:
        if next(made) == nth:
            raise OSError(24, "Too many open files")
        return make(value, flags)

    monkeypatch.setattr(os, "eventfd", eventfd)
    before = num_descriptors()
    with pytest.raises(OSError, match="Too many open files"):
        create_ring(3, 1, 1)
    assert num_descriptors() == before
