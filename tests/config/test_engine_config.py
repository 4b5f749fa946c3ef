from pathlib import Path

import pytest

import tpllm.config.engine_config
from tests.checkpoints import write_config
from tpllm.config.checkpoint import resolve_model
from tpllm.config.devices import Gpu
from tpllm.config.engine_config import EngineConfig, why_no_flash_attn
from tpllm.errors import UnknownSettingError

H200 = Gpu("NVIDIA H200", "GPU-1", (9, 0))
T4 = Gpu("Tesla T4", "GPU-2", (7, 5))


@pytest.fixture
def machine(monkeypatch):
    """Call it with GPUs, and whether flash-attn is installed, to be on such a machine."""

    def become(*gpus: Gpu, flash_attn: bool = True) -> None:
        monkeypatch.setattr(tpllm.config.engine_config, "visible_gpus", lambda: list(gpus))
        spec = object() if flash_attn else None
        monkeypatch.setattr(tpllm.config.engine_config, "find_spec", lambda name: spec)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    become()
    return become


def test_without_a_gpu_auto_means_float32_on_the_cpu(machine):
    config = EngineConfig.resolve()
    assert (config.device, config.dtype, config.kv_block_size) == ("cpu", "float32", 16)
    assert config.max_model_len == config.model_config.max_position_embeddings == 4096
    assert config.folder == config.tokenizer_folder == resolve_model(None)
    assert config.max_blocks_per_seq == 256


def test_with_a_gpu_auto_means_the_dtype_of_the_checkpoint(machine):
    machine(H200)
    config = EngineConfig.resolve()
    assert (config.device, config.dtype, config.kv_block_size) == ("cuda", "bfloat16", 256)
    assert EngineConfig.resolve(dtype="float32").kv_block_size == 16
    assert EngineConfig.resolve(device="cpu").dtype == "float32"


def test_a_config_survives_json_exactly(machine, tmp_path):
    machine(H200, H200)
    settings = {"gpu_memory_utilization": 0.1 + 0.2, "seed": 2**64 - 1, "num_kv_blocks": 7}
    for config in (
        EngineConfig.resolve(),
        EngineConfig.resolve(resolve_model(None), tensor_parallel_size=2, **settings),
        EngineConfig.resolve(write_config(tmp_path), load_format="dummy"),
    ):
        copy = EngineConfig.from_json(config.to_json())
        assert copy == config
        assert repr(copy) == repr(config)  # types too


def test_the_last_block_of_a_sequence_may_be_partly_filled(machine):
    assert EngineConfig.resolve(max_model_len=17, kv_block_size=16).max_blocks_per_seq == 2


def test_dummy_weights_need_only_a_config(machine, tmp_path):
    config = EngineConfig.resolve(write_config(tmp_path), load_format="dummy")
    assert config.tokenizer_folder is None
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        EngineConfig.resolve(tmp_path, skip_tokenizer_init=True)


def test_a_missing_tokenizer_is_refused_unless_it_is_skipped(machine, tmp_path):
    write_config(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(resolve_model(None) / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no tokenizer.*skip_tokenizer_init=True"):
        EngineConfig.resolve(tmp_path)
    assert EngineConfig.resolve(tmp_path, skip_tokenizer_init=True).tokenizer_folder is None
    named = EngineConfig.resolve(tmp_path, tokenizer=str(resolve_model(None)))
    assert named.tokenizer_folder == resolve_model(None)
    with pytest.raises(FileNotFoundError, match="tokenizer='/nowhere': there is no such folder"):
        EngineConfig.resolve(tmp_path, tokenizer="/nowhere")


def test_a_hub_id_names_the_model_in_messages(machine, monkeypatch, tmp_path):
    snapshot = write_config(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    config = EngineConfig.resolve("Qwen/Qwen3-0.6B", load_format="dummy")
    assert config.model_config.name == "Qwen3-0.6B"
    assert config.folder == Path(snapshot)


def test_more_ranks_than_gpus_are_refused(machine, monkeypatch):
    machine(H200, H200)
    with pytest.raises(ValueError, match="tensor_parallel_size=4 is more than .* GPUs, 2; use at"):
        EngineConfig.resolve(tensor_parallel_size=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match=r"GPUs, 2 \(CUDA_VISIBLE_DEVICES='0,1'\)"):
        EngineConfig.resolve(tensor_parallel_size=4)
    assert EngineConfig.resolve(tensor_parallel_size=4, device="cpu").device == "cpu"


def test_cuda_without_a_gpu_is_refused(machine, monkeypatch):
    with pytest.raises(ValueError, match="device='cuda' finds no GPU: .* use device='cpu'"):
        EngineConfig.resolve(device="cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match=r"device='cuda' finds no GPU \(CUDA_VISIBLE_DEVICES=''\)"):
        EngineConfig.resolve(device="cuda")


def test_a_dtype_the_gpu_cannot_do_is_refused(machine):
    machine(H200, T4)
    message = r"dtype='bfloat16' needs compute capability 8.0, and GPU 1 \(Tesla T4\) has 7.5"
    with pytest.raises(ValueError, match=message):
        EngineConfig.resolve(tensor_parallel_size=2)
    assert EngineConfig.resolve(tensor_parallel_size=2, dtype="float16").dtype == "float16"
    assert EngineConfig.resolve().dtype == "bfloat16"  # the second GPU is not used


@pytest.mark.parametrize("size", [1, 2, 16, 512])
def test_a_block_is_any_power_of_two_without_flash_attn(machine, size):
    assert EngineConfig.resolve(kv_block_size=size).kv_block_size == size
    machine(H200, flash_attn=False)
    assert EngineConfig.resolve(kv_block_size=size).kv_block_size == size


def test_a_block_that_attention_cannot_use_is_refused(machine):
    with pytest.raises(ValueError, match="kv_block_size=24 is no power of two; use .*=32"):
        EngineConfig.resolve(kv_block_size=24)
    machine(H200)
    assert EngineConfig.resolve(kv_block_size=768).kv_block_size == 768
    with pytest.raises(ValueError, match="kv_block_size=16 is no multiple of 256, .* flash-attn"):
        EngineConfig.resolve(kv_block_size=16)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tensor_parallel_size": 3}, r"=3 does not divide .* of tiny-qwen3; use one of \[1, 2, 4"),
        ({"max_model_len": 4097}, "max_model_len=4097 is more than max_position_embeddings=4096"),
        ({"num_kv_blocks": 2**30}, "num_kv_blocks=1073741824 of kv_block_size=16 hold more than"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
    ],
)
def test_a_setting_the_model_cannot_have_is_refused(machine, settings, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig.resolve(**settings)


def test_a_sliding_window_must_cover_max_model_len(machine, tmp_path):
    fields = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    folder = write_config(tmp_path, **fields, sliding_window=1024, layer_types=None)
    config = EngineConfig.resolve(folder, load_format="dummy", max_model_len=1024)
    assert config.max_model_len == 1024
    with pytest.raises(ValueError, match=r"sliding_window=1024 of .*; use max_model_len=1024"):
        EngineConfig.resolve(folder, load_format="dummy")


def test_a_scaled_rope_allows_longer_contexts(machine, tmp_path):
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}
    folder = write_config(tmp_path, rope_parameters=rope)
    assert EngineConfig.resolve(folder, load_format="dummy").max_model_len == 8192
    with pytest.raises(ValueError, match="max_position_embeddings=8192 scaled by yarn of"):
        EngineConfig.resolve(folder, load_format="dummy", max_model_len=8193)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_overrides_replace_fields_of_config_json(machine, field):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    config = EngineConfig.resolve(hf_overrides={field: rope, "max_position_embeddings": 1000})
    assert config.max_model_len == 8192
    assert (config.model_config.rope.theta, config.model_config.rope.factor) == (1e6, 4.0)
    assert EngineConfig.from_json(config.to_json()) == config
    rope["rope_theta"] = 5e5
    config = EngineConfig.resolve(hf_overrides={field: rope, "layer_types": None})
    assert config.model_config.rope.theta == 5e5
    assert EngineConfig.resolve(hf_overrides={}).model_config.rope.factor == 1
    assert EngineConfig.resolve(hf_overrides={"layer_types": ("full_attention",) * 6})


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("{", r"hf_overrides='\{' must be a dict$"),
        ({"rope_theta": object()}, "hf_overrides=.*not JSON serializable"),
        ({"hidden_size": "x"}, "config.json: hidden_size='x' must be"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "with hf_overrides: rope_scaling="),
    ],
)
def test_wrong_overrides_are_refused(machine, overrides, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig.resolve(hf_overrides=overrides)


def test_an_unknown_keyword_is_refused_with_the_nearest_name(machine):
    with pytest.raises(UnknownSettingError, match="LLM has no setting 'tp_size'"):
        EngineConfig.resolve(tp_size=2)
    with pytest.raises(UnknownSettingError, match="did you mean 'enforce_eager'"):
        EngineConfig.resolve(enforce_eagre=True)


@pytest.mark.parametrize(
    "gpus, dtype, head_dim, reason",
    [
        ([H200], "bfloat16", 128, None),
        ([H200, H200], "float16", 64, None),
        ([H200], "float32", 128, "it knows no float32"),
        ([H200], "bfloat16", 320, "head_dim=320 is no multiple of 8 up to 256"),
        ([H200], "bfloat16", 60, "head_dim=60 is no multiple of 8 up to 256"),
        ([], "bfloat16", 128, "it needs a GPU"),
    ],
)
def test_flash_attn_serves_where_it_can(machine, gpus, dtype, head_dim, reason):
    machine(*gpus)
    assert why_no_flash_attn(gpus, dtype, head_dim) == reason
    machine(*gpus, flash_attn=False)
    without = reason or "the package flash-attn is missing"
    assert why_no_flash_attn(gpus, dtype, head_dim) == without


def test_the_attention_backend_is_the_fastest_there_is_or_the_one_asked_for(machine, tmp_path):
    def resolved(**settings) -> str:
        folder = write_config(tmp_path)
        return EngineConfig.resolve(folder, load_format="dummy", **settings).attention_backend

    machine()
    assert resolved() == resolved(attention_backend="torch") == "torch"
    with pytest.raises(ValueError, match="attention_backend='triton' needs a GPU"):
        resolved(attention_backend="triton")
    with pytest.raises(ValueError, match="'flash-attn' does not serve here: it needs a GPU; use"):
        resolved(attention_backend="flash-attn")
    machine(H200)
    assert resolved(dtype="bfloat16") == "flash-attn"
    assert resolved(dtype="float32") == "triton"
    for name in ("flash-attn", "triton", "torch"):
        assert resolved(dtype="bfloat16", attention_backend=name) == name
    with pytest.raises(ValueError, match="does not serve here: it knows no float32"):
        resolved(dtype="float32", attention_backend="flash-attn")


def test_flash_attn_needs_an_ampere_gpu():
    old = Gpu("Tesla T4", "GPU-t4", (7, 5))
    reason = "Tesla T4 has compute capability 7.5, and it needs 8.0"
    assert why_no_flash_attn([H200, old], "float16", 128) == reason


def test_a_gpu_without_room_for_the_weights_is_refused_with_its_figures(machine):
    busy = Gpu("NVIDIA H200", "GPU-3", (9, 0), free_bytes=1 << 20, total_bytes=141 << 30)
    machine(H200, busy)
    message = r"of weights on GPU 1 \(NVIDIA H200\), which has 0.0 of 141.0 GiB free; free its"
    with pytest.raises(ValueError, match=message):
        EngineConfig.resolve(tensor_parallel_size=2)
    EngineConfig.resolve(tensor_parallel_size=1)  # does not use it


def test_a_step_may_take_a_minute_on_a_gpu_and_ten_on_a_cpu(machine):
    assert EngineConfig.resolve().step_timeout_s == 600
    assert EngineConfig.resolve(step_timeout_s=7).step_timeout_s == 7
    machine(H200)
    assert EngineConfig.resolve().step_timeout_s == 60
