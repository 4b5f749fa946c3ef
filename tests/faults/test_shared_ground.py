"""Tests of several engines on one host, and of files that other engines have left there."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from launch.soak import soak
from tests.supervision.stub_worker import start, until_ready
from tpllm.channel.step_plan import RESULT, STEP
from tpllm.errors import SettingError


@pytest.mark.usefixtures("fault_workers")
def test_ten_concurrent_engines_all_work_and_leave_other_engines_files_alone():
    leftover = Path(tempfile.gettempdir()) / "tpllm-0123456789abcdef" / "rendezvous"
    leftover.parent.mkdir()
    leftover.write_text("of an engine that is gone")

    def run(number: int) -> Path:
        group = until_ready(start(None, 2, "fault_worker"))
        payload = str(number).encode()
        for step in range(20):
            group.send(STEP, [payload], step=step)
            assert group.receive(0, RESULT).payload.tobytes() == payload
        directory = cast(Path, group._processes.directory)
        assert directory.is_dir()
        group.close()
        return directory

    with ThreadPoolExecutor(10) as pool:
        directories = list(pool.map(run, range(10)))
    assert len(set(directories)) == 10
    assert leftover.read_text() == "of an engine that is gone"
    leftover.unlink()
    leftover.parent.rmdir()


@pytest.mark.usefixtures("fault_workers")
def test_a_directory_that_cannot_be_made_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tpllm.supervision.local_host.secrets.token_hex", lambda n: "taken")
    (tmp_path / "tpllm-taken").write_text("a file in its place")
    with pytest.raises(SettingError, match=r"TMPDIR=.* takes no directory \(File exists\)"):
        until_ready(start(None, 1, "fault_worker"))


@pytest.mark.usefixtures("fault_workers")
def test_a_directory_that_others_can_enter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tpllm.supervision.local_host.secrets.token_hex", lambda n: "open")
    (tmp_path / "tpllm-open").mkdir(mode=0o755)
    with pytest.raises(SettingError, match="is not a private directory of this user"):
        until_ready(start(None, 1, "fault_worker"))


def test_a_soak_of_some_thousand_requests_leaves_nothing():
    figures = soak(4000, tensor_parallel_size=2)
    assert figures["wrong"] == []
    assert figures["requests"] == 4000
    assert figures["preemptions"] > 0 and figures["cached_tokens"] > 0
    assert min(figures["ended"].values()) > 0
