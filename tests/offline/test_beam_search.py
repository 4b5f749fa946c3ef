"""Tests of beam search against transformers, and of the parameters that it refuses."""

from collections.abc import Iterator

import pytest
import torch

from tpllm import LLM, BeamSearchParams
from tpllm.config.checkpoint import resolve_model
from tpllm.errors import UnknownSettingError
from tpllm.offline.beam_search import Beams
from tpllm.outputs import Logprob

pytestmark = pytest.mark.usefixtures("forked_engines")

PROMPTS = [
    "Psalms 23\n1 The LORD is my shepherd;",
    "<|im_start|>user\nWhat is 348 + 44?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", max_num_seqs=8) as llm:
        yield llm


def test_sequences_and_scores_are_those_of_transformers(llm):
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(resolve_model(None), dtype=torch.float32).eval()
    tokenizer = llm.get_tokenizer()
    for width, num_tokens, length_penalty in [(4, 6, 1.0), (2, 5, 0.0)]:
        params = BeamSearchParams(
            beam_width=width, max_tokens=num_tokens, length_penalty=length_penalty
        )
        for prompt, output in zip(PROMPTS, llm.beam_search(PROMPTS, params), strict=True):
            ids = torch.tensor(tokenizer.encode_batch([prompt]))
            expected = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=num_tokens,
                length_penalty=length_penalty,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
            assert len(output.sequences) == width
            for sequence, tokens, score in zip(
                output.sequences, expected.sequences, expected.sequences_scores, strict=True
            ):
                assert sequence.tokens == tokens.tolist()[: len(sequence.tokens)]
                assert sequence.score == pytest.approx(float(score), abs=1e-4)
    assert any(sequence.finish_reason == "stop" for sequence in output.sequences)


def test_the_end_token_is_in_the_text_where_that_is_asked_for(llm):
    for includes, end in ((False, "392"), (True, "392<|im_end|>")):
        params = BeamSearchParams(beam_width=2, max_tokens=6, include_stop_str_in_output=includes)
        best = llm.beam_search(PROMPTS[1], params)[0].sequences[0]
        assert best.text == PROMPTS[1] + end
        assert (best.finish_reason, best.stop_reason) == ("stop", 4095)
    ignoring = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    for sequence in llm.beam_search(PROMPTS[1], ignoring)[0].sequences:
        assert sequence.finish_reason == "length"


def test_what_cannot_run_is_refused_before_it_starts(llm):
    steps = llm.stats().num_steps
    with pytest.raises(
        ValueError, match="beam_width=40 is more than 18, since a request .* 20 log-prob"
    ):
        llm.beam_search(PROMPTS, BeamSearchParams(beam_width=40, max_tokens=5))
    with pytest.raises(ValueError, match="prompt 1: max_tokens=4090 after a prompt of 9 tokens"):
        llm.beam_search([[1], [1] * 9], BeamSearchParams(beam_width=2, max_tokens=4090))
    assert llm.stats().num_steps == steps


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beam_width": 0}, "beam_width=0 must be at least 1"),
        ({"max_tokens": None}, "max_tokens=None must be a whole number"),
        ({"length_penalty": float("nan")}, "length_penalty=nan must be finite"),
        ({"temperature": -1}, "temperature=-1 must be between 0"),
    ],
)
def test_wrong_parameters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **changes})


def test_an_unknown_keyword_gives_the_nearest_known_one():
    with pytest.raises(UnknownSettingError, match="did you mean 'beam_width'"):
        BeamSearchParams(beam_widht=2, max_tokens=2)  # type: ignore[call-arg]


def test_an_end_token_beyond_the_best_candidates_completes_nothing():
    """A candidate beyond `beam_width` only extends unfinished beams, as in transformers."""
    beams = Beams([1], BeamSearchParams(beam_width=2, max_tokens=9), end_token_ids=[7, 8])
    logprobs = {5: -0.1, 7: -0.2, 8: -0.3, 6: -0.4}
    beams.extend([{token_id: Logprob(value, 1) for token_id, value in logprobs.items()}])
    assert [beam.tokens for beam in beams.running] == [[1, 5], [1, 6]]
    assert [each.tokens for each in beams.output().sequences] == [[1, 7]]
