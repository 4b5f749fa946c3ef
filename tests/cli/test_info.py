"""`tpllm info` on this machine, and on others that NVML tells of."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

import tpllm.config.devices
from tpllm.cli import main
from tpllm.config import engine_config as config

pynvml = pytest.importorskip("pynvml")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """NVML of two H200s with NVLink, whose handles are their indices; the dict can change it."""
    facts: dict[str, Any] = {"capability": (9, 0), "peer": True, "nvlinks": 18, "memory": 140}

    def p2p(a: int, b: int, capability: int) -> int:
        assert (
            type(capability) is int
        )  # the binding's constants are not all: ctypes refuses the rest
        if facts["peer"] is None:
            raise pynvml.NVMLError_NotSupported()
        return int(pynvml.NVML_P2P_STATUS_OK if facts["peer"] else 1)

    def memory(handle: int) -> SimpleNamespace:
        if facts["memory"] is None:
            raise pynvml.NVMLError_NotSupported()
        return SimpleNamespace(total=facts["memory"] << 30, free=(facts["memory"] - 1) << 30)

    def link(handle: int, number: int) -> int:
        if facts["nvlinks"] is None:
            raise pynvml.NVMLError_NotSupported()
        return int(number < facts["nvlinks"])

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "575.1",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: int(uuid[-1]),
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: facts["capability"],
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetP2PStatus": p2p,
        "nvmlDeviceGetNvLinkState": link,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.setattr(tpllm.config.devices, "version", lambda package: "2.11.0+cu130")
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return facts


def info(capsys: Any, *words: str) -> dict[str, Any]:
    assert main(["info", "--json", *words]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def choices(capsys: Any, *words: str) -> dict[str, tuple[str, str]]:
    told = info(capsys, *words)["choices"]
    return {name: (chosen["choice"], chosen["why"]) for name, chosen in told.items()}


def test_gpus_and_their_links(two_gpus, capsys):
    facts = info(capsys)["hardware"]
    assert facts["driver"] == "575.1"
    assert facts["why_no_gpu"] is None
    assert facts["gpus"][1] == {
        "name": "NVIDIA H200",
        "uuid": "GPU-1",
        "capability": "9.0",
        "memory_bytes": 140 << 30,
        "free_bytes": 139 << 30,
        "num_nvlinks": 18,
    }
    assert facts["links"] == [{"ranks": [0, 1], "nvlink": True, "peer_access": True}]
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "1  NVIDIA H200, capability 9.0, 139.0 of 140.0 GiB free, 18 NVLinks" in shown
    assert "0 - 1: NVLink, peer access" in shown


def test_what_nvml_does_not_tell_is_not_made_up(two_gpus, capsys):
    two_gpus.update(peer=None, nvlinks=None, memory=None)
    facts = info(capsys)["hardware"]
    assert facts["gpus"][0]["memory_bytes"] is None
    assert facts["gpus"][0]["num_nvlinks"] is None
    assert facts["links"] == [{"ranks": [0, 1], "nvlink": None, "peer_access": None}]
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA H200, capability 9.0, memory unknown\n" in shown
    assert "0 - 1: NVLink unknown, peer access unknown" in shown
    _, why = choices(capsys, "--tensor-parallel-size", "2")["all-reduce"]
    assert why.startswith("if the GPUs reach each other's memory, which NVML does not report")


def test_the_choices_for_two_gpus_and_why(two_gpus, capsys):
    chosen = choices(capsys, "--tensor-parallel-size", "2")
    assert chosen["device"] == ("GPU 0 to 1", "2 visible")
    assert chosen["dtype"] == ("bfloat16", "the checkpoint's")
    assert chosen["prefill attention"] == (
        "torch",
        "no flash-attn: the package flash-attn is missing",
    )
    assert chosen["decode attention"][0] == "split kernel (Triton)"
    assert chosen["all-reduce"][0] == "peer memory"
    assert chosen["matmuls"] == (
        "one row by a kernel of our own, measured algorithms of cuBLASLt",
        "there is a table for NVIDIA H200; torch's where it is of another cuBLASLt",
    )
    assert chosen["decode steps"][0] == "CUDA graphs"


def test_with_flash_attn_it_does_the_prefill_in_pages_of_its_size(two_gpus, monkeypatch, capsys):
    monkeypatch.setattr(config, "find_spec", lambda name: object())
    chosen = choices(capsys)
    assert chosen["prefill attention"] == ("flash-attn 2", "the fastest here")
    assert chosen["KV block"] == ("256 tokens", "flash-attn reads pages of 256")
    assert chosen["all-reduce"] == ("none", "one rank has it all")


def test_settings_change_the_choices_and_are_named(two_gpus, monkeypatch, capsys):
    two_gpus["peer"] = False
    monkeypatch.setenv("TPLLM_DTYPE", "float32")
    words = "--tensor-parallel-size 2 --enforce-eager --max-model-len 100 --kv-block-size 32"
    chosen = choices(capsys, *words.split())
    assert chosen["dtype"] == ("float32", "asked for by TPLLM_DTYPE")
    assert chosen["prefill attention"] == ("torch", "no flash-attn: it knows no float32")
    assert chosen["all-reduce"] == ("NCCL", "GPU 0 and GPU 1 do not reach each other's memory")
    assert chosen["decode steps"] == ("eager", "asked for by --enforce-eager")
    assert chosen["max_model_len"] == ("100 tokens", "asked for by --max-model-len")
    assert chosen["KV block"] == ("32 tokens", "asked for by --kv-block-size")
    chosen = choices(capsys, "--attention-backend", "torch", "--dtype", "bfloat16")
    for work in ("prefill attention", "decode attention"):
        assert chosen[work] == ("torch", "asked for by --attention-backend")
    chosen = choices(capsys, "--tensor-parallel-size", "2", "--disable-custom-all-reduce")
    assert chosen["all-reduce"] == ("NCCL", "disable_custom_all_reduce is set")
    chosen = choices(capsys, "--disable-custom-matmul")
    assert chosen["matmuls"] == ("torch", "disable_custom_matmul is set")


def test_without_a_driver_the_cpu_serves(monkeypatch, capsys):
    def fail() -> None:
        raise pynvml.NVMLError_LibraryNotFound()

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    facts = info(capsys, "--tensor-parallel-size", "2")
    assert facts["hardware"]["gpus"] == facts["hardware"]["links"] == []
    assert "no NVIDIA driver answers" in facts["hardware"]["why_no_gpu"]
    chosen = {name: told["choice"] for name, told in facts["choices"].items()}
    assert chosen["device"] == "cpu, 2 processes"
    assert (chosen["all-reduce"], chosen["decode steps"]) == ("Gloo", "eager")
    assert facts["versions"]["torch"]
    assert main(["info"]) == 0
    assert "none: no NVIDIA driver answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "build, visible, reason",
    [
        ("2.13.0+cpu", None, "torch 2.13.0+cpu is a build without CUDA"),
        ("2.11.0+cu130", "-1", "CUDA_VISIBLE_DEVICES='-1' leaves none of 2"),
    ],
)
def test_gpus_that_are_there_and_not_to_be_had(
    two_gpus, monkeypatch, capsys, build, visible, reason
):
    monkeypatch.setattr(tpllm.config.devices, "version", lambda package: build)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    facts = info(capsys)
    assert facts["hardware"]["why_no_gpu"] == reason
    assert facts["choices"]["device"] == {"choice": "cpu, 1 process", "why": reason}


def test_a_model_that_could_not_run_here_is_an_error_after_all_the_rest(two_gpus, capsys):
    assert main(["info", "--tensor-parallel-size", "4"]) == 2
    out, err = capsys.readouterr()
    assert "NVIDIA H200" in out and "would use" not in out
    assert err.startswith("tpllm: error: tensor_parallel_size=4 is more than the number of visible")
    assert err.endswith("(tensor_parallel_size is from --tensor-parallel-size)\n")
    assert main(["info", "--json", "/no/such/model"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["choices"] is None
    assert "model is from --model" in err
