"""A ring of records in anonymous shared memory: one writer, any number of readers, no busy waiting.

The segment is a memfd, so it has no name that could collide or be left behind: it is gone with the
last process that holds it. Every record wakes each reader through that reader's own eventfd, whose
counter is the number of records to take; a reader that has taken one says so through an eventfd
that all readers share. Both sides are therefore ordered by system calls, not by one processor's
memory model, and a slot is rewritten only when its slowest reader has left it.

Layout, all little-endian:

    header   64 bytes    magic, version, number of slots, bytes per slot, number of readers
    readers  64 bytes each, a cache line of its own: how many records that reader has taken
    slots    16 bytes (sequence number, kind, payload size), then the payload
"""

import fcntl
import mmap
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAGIC = 0x54504C4D
VERSION = 1
_HEADER_BYTES = 64
_LINE = 64
_RECORD_HEADER_BYTES = 16
_SEAL_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

Part = np.ndarray | bytes


class Record(NamedTuple):
    """One record as received: its payload is a copy, the slot is already free again."""

    kind: int
    sequence: int
    payload: np.ndarray  # [bytes] uint8


@dataclass(frozen=True)
class RingDescriptors:
    """The file descriptors that a process needs to join a ring, to be inherited by it."""

    memory: int
    ready: tuple[int, ...]  # one eventfd per reader: records waiting for it
    freed: int  # eventfd: some reader has left a slot

    def all(self) -> tuple[int, ...]:
        return (self.memory, *self.ready, self.freed)

    @staticmethod
    def of(fds: Sequence[int]) -> "RingDescriptors":
        """Those that `all` gave."""
        return RingDescriptors(fds[0], tuple(fds[1:-1]), fds[-1])

    def close(self) -> None:
        for fd in self.all():
            os.close(fd)


def create_ring(num_readers: int, num_slots: int, slot_bytes: int) -> RingDescriptors:
    """Make the shared memory and the eventfds of a ring; pages cost memory only once touched.

    Args:
        num_readers: readers that each see every record.
        num_slots: records that can be on their way at once.
        slot_bytes: largest payload, in bytes.

    Raises:
        OSError: the process has no descriptors left; those of the ring are closed again.
    """
    line_bytes = _line_up(_RECORD_HEADER_BYTES + slot_bytes)
    size = _HEADER_BYTES + num_readers * _LINE + num_slots * line_bytes
    opened = [os.memfd_create("tpllm-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
    try:
        os.ftruncate(opened[0], size)
        # a reader must never meet SIGBUS because somebody shrank the segment
        fcntl.fcntl(opened[0], fcntl.F_ADD_SEALS, _SEAL_SIZE)
        header = np.array([MAGIC, VERSION, num_slots, slot_bytes, num_readers], dtype="<u8")
        os.pwrite(opened[0], header.tobytes(), 0)
        for _ in range(num_readers + 1):
            opened.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    memory, *ready, freed = opened
    return RingDescriptors(memory, tuple(ready), freed)


class _Ring:
    """The mapped segment, as both ends see it. The descriptors stay the caller's, to be closed."""

    def __init__(self, descriptors: RingDescriptors) -> None:
        self._descriptors = descriptors
        memory = np.frombuffer(mmap.mmap(descriptors.memory, 0), dtype=np.uint8)
        magic, version, slots, slot_bytes, readers = memory[:40].view("<u8").tolist()
        if (magic, version) != (MAGIC, VERSION):
            raise ValueError(
                f"ring version {version} (magic {magic:#x}) is not {VERSION} (magic {MAGIC:#x}); "
                "both ends must run the same tpllm"
            )
        self.num_slots, self.slot_bytes = slots, slot_bytes
        lines = memory[_HEADER_BYTES : _HEADER_BYTES + readers * _LINE]
        self._taken = lines.view("<u8")[:: _LINE // 8]  # [readers] records taken by each
        self._slots = memory[_HEADER_BYTES + readers * _LINE :].reshape(slots, -1)

    def close(self) -> None:
        """Unmap the segment; the mapping holds a descriptor of its own. No other call after it."""
        del self._taken, self._slots

    def _slot(self, sequence: int) -> np.ndarray:
        slot: np.ndarray = self._slots[sequence % self.num_slots]
        return slot


class RingWriter(_Ring):
    """The writing end. One thread at a time may use it."""

    def __init__(self, descriptors: RingDescriptors) -> None:
        super().__init__(descriptors)
        self._sequence = 0

    def fileno(self) -> int:
        """Readable when a reader may have freed a slot: what to poll after `try_send` failed."""
        return self._descriptors.freed

    def try_send(self, kind: int, parts: Sequence[Part]) -> bool:
        """Write one record, the parts one after the other; False where every slot is taken.

        Raises:
            ValueError: the record is larger than a slot; nothing has been written.
        """
        size = sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)
        if size > self.slot_bytes:
            raise ValueError(
                f"a record of {size} bytes does not fit the ring's slots of {self.slot_bytes} bytes"
            )
        if self._sequence - int(self._taken.min()) >= self.num_slots:
            _take_count(self._descriptors.freed)
            # the counter was emptied before this second look, so no wake-up can be lost
            if self._sequence - int(self._taken.min()) >= self.num_slots:
                return False
        slot = self._slot(self._sequence)
        offset = _RECORD_HEADER_BYTES
        for part in parts:
            data = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else _as_bytes(part)
            slot[offset : offset + data.size] = data
            offset += data.size
        slot[:8].view("<u8")[0] = self._sequence
        slot[8:16].view("<u4")[:] = (kind, size)
        self._sequence += 1
        for fd in self._descriptors.ready:
            os.eventfd_write(fd, 1)
        return True

    def send(self, kind: int, parts: Sequence[Part], timeout_s: float) -> None:
        """`try_send`, waiting for a free slot.

        Raises:
            TimeoutError: some reader has taken nothing for `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not self.try_send(kind, parts):
            if not wait_readable(self.fileno(), deadline - time.monotonic()):
                raise TimeoutError(f"no reader freed a slot of the ring within {timeout_s} s")


class RingReader(_Ring):
    """One reading end; `reader` is its index among the ring's readers."""

    def __init__(self, descriptors: RingDescriptors, reader: int) -> None:
        super().__init__(descriptors)
        self._reader = reader
        self._ready_fd = descriptors.ready[reader]
        self._waiting = 0  # records announced and not yet taken
        self._sequence = 0

    def fileno(self) -> int:
        """Readable when a record has come, unless `try_receive` has already counted it."""
        return self._ready_fd

    def try_receive(self) -> Record | None:
        """The next record, or None where there is none yet."""
        if self._waiting == 0:
            self._waiting = _take_count(self._ready_fd)
            if self._waiting == 0:
                return None
        slot = self._slot(self._sequence)
        sequence = int(slot[:8].view("<u8")[0])
        assert sequence == self._sequence, f"slot holds record {sequence}, not {self._sequence}"
        kind, size = slot[8:16].view("<u4").tolist()
        payload = slot[_RECORD_HEADER_BYTES : _RECORD_HEADER_BYTES + size].copy()
        self._waiting -= 1
        self._sequence += 1
        self._taken[self._reader] = self._sequence
        os.eventfd_write(self._descriptors.freed, 1)
        return Record(kind, sequence, payload)

    def receive(self, timeout_s: float | None = None, spin_s: float = 0.0) -> Record | None:
        """The next record, sleeping until it comes; None after `timeout_s`.

        `spin_s` looks again and again for that long before it sleeps: a sleeping process takes tens
        of microseconds to wake, which is worth a little heat while steps are in flight.
        """
        spin_until = time.perf_counter() + spin_s if spin_s else 0.0
        while (record := self.try_receive()) is None:
            if spin_until and time.perf_counter() < spin_until:
                continue
            spin_until = 0.0
            if not wait_readable(self._ready_fd, timeout_s):
                return None
        return record


def wait_readable(fd: int, timeout_s: float | None) -> bool:
    """Sleep until `fd` is readable; False after `timeout_s` (None waits for ever)."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1e3))


def _take_count(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def _as_bytes(part: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8)


def _line_up(size: int) -> int:
    return -(-size // _LINE) * _LINE
