"""Tests of an engine on two hosts: one behind an agent and one here (`socket_host`).

The faults of tests/faults/test_product.py also happen on both.
"""

import os
import signal
import sys
from contextlib import closing

import pytest

from launch import forked_workers
from tests.leaks import is_running, wait_until
from tests.supervision import stub_worker
from tests.supervision.socket_host import SocketHost, start_on_two_hosts
from tests.supervision.stub_worker import start, until_ready
from tpllm.channel.step_plan import RESULT, STEP
from tpllm.errors import WorkerError
from tpllm.supervision import failure, processes


@pytest.fixture(autouse=True)
def forked(stub_workers, monkeypatch):
    monkeypatch.setitem(sys.modules, "stub_worker", stub_worker)
    monkeypatch.setattr(processes, "_start", forked_workers.start)
    monkeypatch.setattr(failure, "GRACE_S", 0.05)


def test_ranks_of_all_hosts_get_each_record_and_know_their_numbers():
    with closing(until_ready(start(world_size=4, start_hosts=start_on_two_hosts))) as group:
        for step in range(20):
            group.send(STEP, [b"plan ", str(step).encode()], step=step)
            assert group.receive(0, RESULT).payload.tobytes() == b"plan " + str(step).encode()
        group.send_control({"type": "numbers"})
        for rank in (3, 0, 2, 1):
            numbers = {"rank": rank, "local_rank": rank % 2, "device": rank % 2}
            sizes = {"world_size": 4, "local_world_size": 2}
            assert group.receive_control(rank) == {**numbers, **sizes}
        assert [each["alive"] for each in group.health()] == [True] * 4
        pids = group.pids
    assert not any(map(is_running, pids))


def test_a_host_that_is_lost_ends_the_engine():
    group = until_ready(start(world_size=2, start_hosts=start_on_two_hosts))
    pids = group.pids
    (host, _) = group._hosts
    assert isinstance(host, SocketHost)
    os.kill(host.agent.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="worker rank 0 failed .*\nthe agent is gone"):
        group.receive(1, RESULT)
    assert group.closed
    assert wait_until(lambda: not any(map(is_running, pids)))
