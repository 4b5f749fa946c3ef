import json
from pathlib import Path

import pytest

from tests.checkpoints import DROP, write_config
from tpllm.checkpoint import resolve_model
from tpllm.model_config import ModelConfig


def config_with(folder: Path, **changes) -> ModelConfig:
    return ModelConfig.from_folder(write_config(folder, **changes))


def test_the_shipped_config_is_read_whole():
    config = ModelConfig.from_folder(resolve_model(None))
    assert config.name == "tiny-qwen3"
    assert config.architecture == "Qwen3ForCausalLM"
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (256, 64, 4)
    assert (config.rope_theta, config.rms_norm_eps) == (1e6, 1e-6)
    assert (config.dtype, config.tie_word_embeddings) == ("bfloat16", True)


def test_end_tokens_are_those_of_both_files_each_once(tmp_path):
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [9, 8]}))
    assert config_with(tmp_path, eos_token_id=[8, 7]).eos_token_ids == (9, 8, 7)
    generation.unlink()
    assert config_with(tmp_path, eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": DROP},
        {"rope_theta": DROP},
        {"rope_theta": DROP, "rope_parameters": DROP, "rope_scaling": {"rope_theta": 1e6}},
        {"rope_scaling": {"type": "default"}},
        {"dtype": DROP},
        {"torch_dtype": DROP},
        {"layer_types": DROP, "sliding_window": 4096},  # given, but not in use
        {"use_sliding_window": True},  # in use, but without a width
    ],
)
def test_older_and_newer_spellings_mean_the_same(tmp_path, changes):
    shipped = ModelConfig.from_folder(resolve_model(None))
    config = config_with(tmp_path, **changes)
    assert (config.rope_theta, config.dtype) == (shipped.rope_theta, shipped.dtype)


def test_a_config_without_dtype_means_float32(tmp_path):
    assert config_with(tmp_path, dtype=DROP, torch_dtype=DROP).dtype == "float32"


@pytest.mark.parametrize(
    "field, value",
    [
        ("quantization_config", {"quant_method": "fp8"}),
        ("hidden_act", "gelu"),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", "yarn"),
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_a_field_we_do_not_implement_is_refused_by_name(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"config\.json: {field}=.* is not implemented"):
        config_with(tmp_path, **{field: value})


def test_a_sliding_window_in_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sliding_window=4096 is not implemented"):
        config_with(tmp_path, use_sliding_window=True, sliding_window=4096)


@pytest.mark.parametrize("value", [["LlamaForCausalLM"], [], DROP, "Qwen3ForCausalLM", [[]]])
def test_an_unknown_architecture_is_refused_naming_those_we_know(tmp_path, value):
    with pytest.raises(ValueError, match="not implemented; tpllm runs Qwen3ForCausalLM"):
        config_with(tmp_path, architectures=value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("hidden_size", DROP, "has no hidden_size"),
        ("head_dim", None, "has no head_dim"),
        ("vocab_size", "4096", "vocab_size='4096' must be a whole number"),
        ("vocab_size", 4096.0, "vocab_size=4096.0 must be a whole number"),
        ("num_hidden_layers", True, "num_hidden_layers=True must be a whole number"),
        ("num_hidden_layers", 0, "num_hidden_layers=0 must be at least 1"),
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000 must be at most 4096"),
        ("head_dim", 63, "head_dim=63 must be even"),
        ("num_key_value_heads", 3, "num_key_value_heads=3 does not divide num_attention_heads=8"),
        ("rms_norm_eps", 0, "rms_norm_eps=0.0 must be more than 0"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps=nan must be finite"),
        ("rope_theta", "1e6", "rope_theta='1e6' must be a number"),
        ("rope_theta", 5e5, "gives two values of rope_theta"),
        ("tie_word_embeddings", 1, "tie_word_embeddings=1 must be True or False"),
        ("dtype", "float8_e4m3fn", "dtype='float8_e4m3fn' must be one of 'float16'"),
        ("dtype", {"text": "float16"}, "dtype=.* must be one of"),
        ("eos_token_id", 4096, "eos_token_id=4096 must be at most 4095"),
        ("eos_token_id", [1, "2"], "eos_token_id='2' must be a whole number"),
    ],
)
def test_a_wrong_field_is_refused_with_its_file(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=rf"{tmp_path}.config\.json.*{message}"):
        config_with(tmp_path, **{field: value})


def test_rope_theta_must_be_somewhere(tmp_path):
    with pytest.raises(ValueError, match="has no rope_theta"):
        config_with(tmp_path, rope_theta=DROP, rope_parameters=None)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[]", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused_by_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|must hold a JSON)"):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_the_message_names_model_value_and_sizes_that_work(tmp_path):
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072}
    config = ModelConfig.from_folder(write_config(tmp_path, **sizes), name="Qwen3-0.6B")
    with pytest.raises(ValueError) as caught:
        config.check_parallel(3)
    assert str(caught.value) == (
        "tensor_parallel_size=3 does not divide num_attention_heads=16 of Qwen3-0.6B; "
        "use one of [1, 2, 4, 8, 16]"
    )


@pytest.mark.parametrize(
    "heads, kv_heads, intermediate, tp, message",
    [
        (12, 4, 768, 3, "tensor_parallel_size=3 neither divides nor is a multiple of num_key_"),
        (12, 4, 768, 24, "tensor_parallel_size=24 does not divide num_attention_heads=12"),
        (8, 8, 100, 8, "tensor_parallel_size=8 does not divide intermediate_size=100"),
    ],
)
def test_a_split_that_is_uneven_is_refused(tmp_path, heads, kv_heads, intermediate, tp, message):
    config = config_with(
        tmp_path,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
    )
    with pytest.raises(ValueError, match=message):
        config.check_parallel(tp)


@pytest.mark.parametrize("kv_heads, tp", [(1, 4), (2, 4), (4, 4), (4, 2), (4, 8)])
def test_fewer_kv_heads_than_ranks_are_held_several_times(tmp_path, kv_heads, tp):
    config_with(tmp_path, num_key_value_heads=kv_heads).check_parallel(tp)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_tensor_shapes_are_those_of_transformers(tmp_path, tied, bias):
    torch = pytest.importorskip("torch")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    changes = {"tie_word_embeddings": tied, "attention_bias": bias, "num_key_value_heads": 2}
    folder = write_config(tmp_path, **changes, vocab_size=100, eos_token_id=None, pad_token_id=0)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del theirs["lm_head.weight"]  # there, but the embedding itself
    assert ModelConfig.from_folder(folder).tensor_shapes() == theirs
