import json

import pytest

from tests.checkpoints import write_config
from tpllm.config.engine_config import EngineConfig
from tpllm.config.generation_config import read_generation_defaults
from tpllm.sampling_params import SamplingParams


def test_recommendations_become_sampling_parameters(tmp_path):
    assert read_generation_defaults(tmp_path) == {}
    content: dict[str, object] = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "max_new_tokens": None,
    }
    content |= {"do_sample": True, "eos_token_id": [1]}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert read_generation_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize("do_sample", [False, True, None])
def test_a_checkpoint_that_does_not_sample_is_greedy(tmp_path, do_sample):
    """Without the field a file recommends what its others say, as in vLLM."""
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
    others = {"repetition_penalty": 1.1, "max_new_tokens": 9}
    content = {"do_sample": do_sample, **sampling, **others}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.pop("repetition_penalty"), defaults.pop("max_tokens")) == (1.1, 9)
    assert defaults == ({"temperature": 0} if do_sample is False else sampling)


def test_a_do_sample_that_is_no_flag_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"do_sample": 0}')
    with pytest.raises(ValueError, match="generation_config.json: do_sample=0 must be True or Fa"):
        read_generation_defaults(tmp_path)


def test_a_recommendation_that_makes_no_sense_is_refused_by_name(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(ValueError, match=r"generation_config.json: top_p=7 must .* mend the file"):
        read_generation_defaults(tmp_path)


def test_the_engine_s_defaults_are_the_checkpoint_s_or_ours(tmp_path):
    write_config(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "max_new_tokens": 9}')

    def defaults(choice: str) -> SamplingParams:
        settings = {"device": "cpu", "load_format": "dummy", "generation_config": choice}
        config = EngineConfig.resolve(tmp_path, **settings)
        assert EngineConfig.from_json(config.to_json()) == config
        return config.default_sampling_params

    assert defaults("auto") == SamplingParams(temperature=0.5, max_tokens=9)
    assert defaults("vllm") == SamplingParams()
