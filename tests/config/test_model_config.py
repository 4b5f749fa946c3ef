import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from tests.checkpoints import DROP, write_config
from tpllm.architectures.registry import FAMILIES
from tpllm.config.checkpoint import resolve_model
from tpllm.config.model_config import ModelConfig


def config_with(folder: Path, **changes) -> ModelConfig:
    return ModelConfig.from_folder(write_config(folder, **changes))


def test_the_shipped_config_is_read_whole():
    config = ModelConfig.from_folder(resolve_model(None))
    assert config.name == "tiny-qwen3"
    assert config.architecture == "Qwen3ForCausalLM"
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (256, 64, 4)
    assert (config.rope.theta, config.rms_norm_eps) == (1e6, 1e-6)
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
        {"use_sliding_window": True, "sliding_window": 4096},  # layer_types say in which layers
        {
            "layer_types": DROP,
            "use_sliding_window": True,
            "sliding_window": 4096,
            "max_window_layers": 6,
        },
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0, "factor": None}},
        {"partial_rotary_factor": 1.0},
        {"hidden_act": DROP},
        {"hidden_act": "swish"},
    ],
)
def test_older_and_newer_spellings_mean_the_same(tmp_path, changes):
    shipped = ModelConfig.from_folder(resolve_model(None))
    config = config_with(tmp_path, **changes)
    assert (config.rope.theta, config.dtype) == (shipped.rope.theta, shipped.dtype)


def test_a_config_without_dtype_leaves_it_to_the_weights(tmp_path):
    assert config_with(tmp_path, dtype=DROP, torch_dtype=DROP).dtype is None


@pytest.mark.parametrize(
    "field, value",
    [
        ("quantization_config", {"quant_method": "fp8"}),
        ("hidden_act", "gelu"),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
        ("rope_scaling", {"rope_type": "yarn"}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0}),
        ("rope_scaling", "yarn"),
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": ["linear"], "factor": 2.0}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": "default", "factor": 4.0}),
        ("rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        ("rope_scaling", {"type": "linear"}),
        ("partial_rotary_factor", 0.5),
        ("final_logit_softcapping", 30.0),
        ("per_layer_config", [{}]),
        ("transformers_weights", "other.safetensors"),
        ("model_type", "gemma2"),
        ("model_type", ["qwen3"]),
    ],
)
def test_a_field_we_do_not_implement_is_refused_by_name(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"config\.json: {field}=.* is not implemented"):
        config_with(tmp_path, **{field: value})


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 4096),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, 16384),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 3000,
                }
            },
            12000,
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 10240),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                }
            },
            4096,
        ),
    ],
)
def test_the_longest_context_follows_from_the_rope(tmp_path, changes, expected):
    config = config_with(tmp_path, rope_parameters=DROP, **changes)
    assert config.longest_context == expected


def test_two_rotary_embeddings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="gives two rotary embeddings: rope_scaling and rope_par"):
        config_with(
            tmp_path,
            rope_scaling={"rope_type": "linear", "factor": 2},
            rope_parameters={"rope_theta": 1e6},
        )


def test_a_sliding_window_in_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sliding_window=4096 is not implemented"):
        config_with(
            tmp_path,
            use_sliding_window=True,
            sliding_window=4096,
            layer_types=DROP,
            max_window_layers=5,
        )


@pytest.mark.parametrize("value", [[], None, DROP, ["Qwen3Model"], ["Other", "Qwen3ForCausalLM"]])
def test_the_model_type_stands_in_for_the_architecture(tmp_path, value):
    assert config_with(tmp_path, architectures=value).architecture == "Qwen3ForCausalLM"


def test_one_of_architecture_and_model_type_is_enough(tmp_path):
    assert config_with(tmp_path, model_type=DROP).architecture == "Qwen3ForCausalLM"
    with pytest.raises(ValueError, match="architectures=None is not implemented"):
        config_with(tmp_path, model_type=DROP, architectures=DROP)


@pytest.mark.parametrize(
    "value", [["LlamaForCausalLM"], ["Qwen3ForSequenceClassification"], "Qwen3ForCausalLM", [[]]]
)
def test_an_unknown_architecture_is_refused_naming_those_we_know(tmp_path, value):
    with pytest.raises(ValueError, match="not implemented; tpllm runs Qwen3ForCausalLM"):
        config_with(tmp_path, architectures=value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("hidden_size", None, "hidden_size=None must be a whole number"),
        ("head_dim", None, "head_dim=None must be a whole number"),
        ("num_key_value_heads", DROP, "num_key_value_heads=32 does not divide num_attention_he"),
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


# What config.json files of several generations hold: every field, with values that mean something.
FIELDS: dict[str, list[Any]] = {
    "vocab_size": [DROP, 100],
    "hidden_size": [DROP, 64],
    "intermediate_size": [DROP, 96],
    "num_hidden_layers": [DROP, 2],
    "num_attention_heads": [DROP, 4, 32],
    "num_key_value_heads": [DROP, None, 2, 4],
    "head_dim": [DROP, 16, None],
    "max_position_embeddings": [DROP, 256],
    "rms_norm_eps": [DROP, 1e-5],
    "initializer_range": [DROP, 0.1],
    "tie_word_embeddings": [DROP, True, False],
    "attention_bias": [DROP, True, False],
    "rope_theta": [DROP, 5e5, 1e6],
    "rope_scaling": [
        DROP,
        None,
        {},
        {"type": "default"},
        {"rope_type": "default", "rope_theta": 5e5},
        {"type": "linear", "factor": 1.0},
        {"type": "yarn", "factor": 4.0},
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
    ],
    "rope_parameters": [
        DROP,
        None,
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_type": "default"},
        {"rope_theta": 5e5, "partial_rotary_factor": 1.0},
    ],
    "partial_rotary_factor": [DROP, 1.0],
    "use_sliding_window": [DROP, False, True],
    "sliding_window": [DROP, None, 128],
    "max_window_layers": [DROP, 1, 2],
    "layer_types": [DROP, None, ["full_attention"] * 2, ["full_attention", "sliding_attention"]],
    "dtype": [DROP, None, "bfloat16"],
    "torch_dtype": [DROP, None, "float16", "bfloat16"],
    "hidden_act": [DROP, "silu", "gelu"],
    "mlp_bias": [DROP, False, True],
    "eos_token_id": [DROP, None, 3, [3, 5]],
}
SAME = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("initializer_range", "tie_word_embeddings"),
]


@settings(
    max_examples=600,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(
    family=st.sampled_from(FAMILIES),
    changes=st.fixed_dictionaries({}, optional={f: st.sampled_from(v) for f, v in FIELDS.items()}),
)
def test_a_config_means_what_it_means_to_transformers_or_is_refused(tmp_path, family, changes):
    """In particular a field that is left out."""
    config = {field: value for field, value in changes.items() if value is not DROP}
    config["model_type"] = family.model_type
    if family.model_type == "mistral":
        config.pop("layer_types", None)  # they make a Ministral of it
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        ours = ModelConfig.from_folder(tmp_path)
    except ValueError as error:
        assert any(field in str(error) for field in FIELDS)
        return
    try:
        theirs: Any = AutoConfig.from_pretrained(tmp_path)
    except StrictDataclassError:  # it is stricter: of the number of layer_types, for one
        return
    if theirs.to_dict().get("head_dim", 0) is None:  # its model fails with it; we derive one
        return
    assert ours.architecture == family.architecture
    same = {name: getattr(theirs, name) for name in SAME if hasattr(theirs, name)}
    assert {name: getattr(ours, name) for name in same} == same
    assert ours.head_dim == getattr(
        theirs, "head_dim", theirs.hidden_size // ours.num_attention_heads
    )
    if family.model_type in ("llama", "qwen3"):
        assert ours.attention_bias == theirs.attention_bias
    if family.model_type == "llama":
        assert ours.mlp_bias == theirs.mlp_bias
    if family.model_type == "mistral":
        assert ours.sliding_window == theirs.sliding_window
    else:
        assert ours.sliding_window is None
        layer_types = getattr(theirs, "layer_types", None) or ["full_attention"]
        assert set(layer_types) == {"full_attention"}
    rope = theirs.rope_parameters
    assert ours.rope.theta == rope["rope_theta"]
    assert ours.rope.rope_type == rope["rope_type"] or rope["factor"] == 1
    assert ours.rope.factor == rope.get("factor", 1)
    assert ours.dtype == (None if theirs.dtype is None else str(theirs.dtype)[len("torch.") :])
    ends = theirs.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    assert ours.eos_token_ids == tuple(ends)


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
    assert ModelConfig.from_folder(folder).spec.shapes() == theirs
