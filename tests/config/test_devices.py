import pytest

import tpllm.config.devices
from tpllm.config.devices import visible_gpus

pynvml = pytest.importorskip("pynvml")
UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]


@pytest.fixture
def three_gpus(monkeypatch):
    """NVML of a machine with three GPUs, whose handles are their indices."""

    def no_slice(uuid: str) -> int:
        if uuid != "MIG-cc":
            raise pynvml.NVMLError_NotFound()
        return 1

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(UUIDS),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": no_slice,
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda handle: handle,
        "nvmlDeviceGetName": lambda handle: f"GPU number {handle}",
        "nvmlDeviceGetUUID": lambda handle: UUIDS[handle],
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.setattr(tpllm.config.devices, "version", lambda package: "2.11.0+cu130")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_without_a_choice_all_gpus_are_visible(three_gpus):
    assert [gpu.uuid for gpu in visible_gpus()] == UUIDS
    assert visible_gpus()[1].name == "GPU number 1"
    assert visible_gpus()[2].compute_capability == (9, 0)


@pytest.mark.parametrize(
    "chosen, seen",
    [
        ("", []),
        ("-1", []),
        ("2,0", ["GPU-bb33", "GPU-aa11"]),
        (" 1 , 2", ["GPU-aa22", "GPU-bb33"]),
        ("0,-1,2", ["GPU-aa11"]),  # the list ends at the first entry that is no GPU
        ("0,7,2", ["GPU-aa11"]),
        ("1,1", []),  # as CUDA does
        ("GPU-bb,0", ["GPU-bb33", "GPU-aa11"]),
        ("GPU-aa", []),  # could be two
        ("nonsense", []),
        ("MIG-cc", ["MIG-cc"]),
        ("MIG-dd", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(three_gpus, monkeypatch, chosen, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [gpu.uuid for gpu in visible_gpus()] == seen


def test_a_torch_without_cuda_sees_no_gpu(three_gpus, monkeypatch):
    monkeypatch.setattr(tpllm.config.devices, "version", lambda package: "2.13.0+cpu")
    assert visible_gpus() == []


def test_a_machine_without_a_driver_has_no_gpu(three_gpus, monkeypatch):
    def fail() -> None:
        raise pynvml.NVMLError_LibraryNotFound()

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert visible_gpus() == []
