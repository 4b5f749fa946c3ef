"""What a host may be short of, and the errors about it."""

import os
import resource
from collections import namedtuple

import pytest

from tpllm.config.resources import (
    refuse_too_few_descriptors,
    refuse_too_little_room,
    refuse_too_little_shared_memory,
)
from tpllm.errors import SettingError

Room = namedtuple("Room", "f_bavail f_frsize f_files f_favail f_flag", defaults=(1, 1, 0))


@pytest.fixture
def room(monkeypatch):
    def is_left(num_bytes: int, **others: int) -> None:
        found = Room(num_bytes, 1)._replace(**others)
        monkeypatch.setattr(os, "statvfs", lambda path: found)

    return is_left


def test_enough_of_everything_is_enough(room):
    room(1 << 30)
    refuse_too_few_descriptors(8)
    refuse_too_little_room("/tmp")
    refuse_too_little_shared_memory(8)


@pytest.mark.parametrize("limit, world_size", [(64, 1), (300, 64)])
def test_too_few_descriptors_are_told_with_the_limit(monkeypatch, limit, world_size):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    with pytest.raises(SettingError, match=rf"limit of {limit} open files is too low.*ulimit -n"):
        refuse_too_few_descriptors(world_size)


def test_no_limit_of_descriptors_is_enough(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    refuse_too_few_descriptors(1024)


@pytest.mark.parametrize(
    "num_bytes, others",
    [(4096, {}), (1 << 30, {"f_favail": 0}), (1 << 30, {"f_flag": os.ST_RDONLY})],
)
def test_a_full_or_read_only_temporary_directory_is_told(room, num_bytes, others):
    room(num_bytes, **others)
    with pytest.raises(SettingError, match=r"TMPDIR='/full' has .* make room, or set TMPDIR"):
        refuse_too_little_room("/full")


def test_a_small_shared_memory_is_told_where_nccl_needs_it(room, monkeypatch, tmp_path):
    room(16 << 20)
    refuse_too_little_shared_memory(1)
    with pytest.raises(SettingError, match=r"/dev/shm has 16 MiB free, .* 20 MiB .*--shm-size"):
        refuse_too_little_shared_memory(2)
    monkeypatch.setenv("NCCL_SHM_DISABLE", "1")
    refuse_too_little_shared_memory(2)
