"""A ring of records in anonymous shared memory: one writer, any number of readers, no busy waiting.

The segment is a memfd. It has no name that could collide or be left behind, and it is freed with
the last process that holds it. Each reader has an eventfd that counts the records it has not taken
yet; the writer adds one to it for every record. All readers share a second eventfd, which a reader
signals when it has taken a record. System calls therefore order both sides, whatever the
processor's memory model is. A slot is rewritten only after its slowest reader has left it.

Layout, all little-endian:

    header   64 bytes    magic, version, number of slots, bytes per slot, number of readers
    readers  64 bytes each (one cache line): how many records that reader has taken
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
_CACHE_LINE_BYTES = 64
_RECORD_HEADER_BYTES = 16
_SEAL_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

Buffer = np.ndarray | bytes


class Record(NamedTuple):
    """One record as received. Its payload is a copy; its slot is already free."""

    kind: int
    payload: np.ndarray  # [bytes] uint8


@dataclass(frozen=True)
class RingDescriptors:
    """The file descriptors that a process inherits to join a ring."""

    memory: int
    ready: tuple[int, ...]  # one eventfd per reader: the records that it has not taken
    freed: int  # eventfd: some reader has left a slot

    def all(self) -> tuple[int, ...]:
        """Return the descriptors in a fixed order."""
        return (self.memory, *self.ready, self.freed)

    @staticmethod
    def from_list(fds: Sequence[int]) -> "RingDescriptors":
        """Return the descriptors that `all` returned, rebuilt from integers."""
        return RingDescriptors(fds[0], tuple(fds[1:-1]), fds[-1])

    def close(self) -> None:
        for fd in self.all():
            os.close(fd)


def create_ring(num_readers: int, num_slots: int, slot_bytes: int) -> RingDescriptors:
    """Make the shared memory and the eventfds of a ring. A page takes memory once it is written.

    Args:
        num_readers: number of readers; each of them receives every record.
        num_slots: most records that are in the ring at once.
        slot_bytes: largest payload, in bytes.

    Raises:
        OSError: the process has no descriptors left; the ring's descriptors are closed again.
    """
    num_lines = -(-(_RECORD_HEADER_BYTES + slot_bytes) // _CACHE_LINE_BYTES)
    line_bytes = num_lines * _CACHE_LINE_BYTES  # a slot begins at a cache line
    size = _HEADER_BYTES + num_readers * _CACHE_LINE_BYTES + num_slots * line_bytes
    opened = [os.memfd_create("tpllm-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
    try:
        os.ftruncate(opened[0], size)
        # a shrunken segment would end its readers with SIGBUS
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
    """The mapped segment, common to both ends. The caller keeps and closes the descriptors."""

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
        lines = memory[_HEADER_BYTES : _HEADER_BYTES + readers * _CACHE_LINE_BYTES]
        self._taken = lines.view("<u8")[:: _CACHE_LINE_BYTES // 8]  # [readers] records taken
        self._slots = memory[_HEADER_BYTES + readers * _CACHE_LINE_BYTES :].reshape(slots, -1)

    def close(self) -> None:
        """Unmap the segment, which holds its own descriptor. No other method may be called then."""
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
        """Return a descriptor that becomes readable when a reader may have freed a slot."""
        return self._descriptors.freed

    def try_send(self, kind: int, buffers: Sequence[Buffer]) -> bool:
        """Write one record whose payload is the buffers joined; False if every slot is taken.

        Raises:
            ValueError: the record is larger than a slot; nothing has been written.
        """
        size = sum(len(each) if isinstance(each, bytes) else each.nbytes for each in buffers)
        if size > self.slot_bytes:
            raise ValueError(
                f"a record of {size} bytes does not fit the ring's slots of {self.slot_bytes} bytes"
            )
        if self._sequence - int(self._taken.min()) >= self.num_slots:
            _take_count(self._descriptors.freed)
            # the counter is emptied before this second check, so that no wake-up is lost
            if self._sequence - int(self._taken.min()) >= self.num_slots:
                return False
        slot = self._slot(self._sequence)
        offset = _RECORD_HEADER_BYTES
        for each in buffers:
            data = np.frombuffer(each, np.uint8) if isinstance(each, bytes) else _as_bytes(each)
            slot[offset : offset + data.size] = data
            offset += data.size
        slot[:8].view("<u8")[0] = self._sequence
        slot[8:16].view("<u4")[:] = (kind, size)
        self._sequence += 1
        for fd in self._descriptors.ready:
            os.eventfd_write(fd, 1)
        return True

    def send(self, kind: int, buffers: Sequence[Buffer], timeout_s: float) -> None:
        """Wait for a free slot and write one record, as `try_send` does.

        Raises:
            TimeoutError: no slot became free within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not self.try_send(kind, buffers):
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
        """Return a descriptor that is readable while it announces uncounted records."""
        return self._ready_fd

    def try_receive(self) -> Record | None:
        """Return the next record, or None if there is none yet."""
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
        return Record(kind, payload)

    def receive(self, timeout_s: float | None = None, spin_s: float = 0.0) -> Record | None:
        """Sleep until the next record comes and return it; None after `timeout_s`.

        Before it sleeps, it polls for `spin_s`: a sleeping process takes tens of microseconds to
        wake, which matters while steps are in flight.
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
    """Sleep until `fd` is readable; False after `timeout_s` (None waits without a limit)."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1e3))


def _take_count(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
