"""The offline API on the shipped model: prompts in, texts out, and what it refuses."""

import inspect
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest

from tests.checkpoints import write_config
from tests.reference import shipped_greedy
from tpllm import LLM, RequestOutput, RequestOutputKind, SamplingParams
from tpllm.config.settings import Settings

pytestmark = pytest.mark.usefixtures("forked_engines")

PSALM = "Psalms 23\n1 The LORD is my shepherd;"
SHORT = SamplingParams(temperature=0, max_tokens=6)
DRAWN = [SamplingParams(temperature=0.8, max_tokens=24, seed=i, ignore_eos=True) for i in range(6)]


HEARD: list[tuple[int, str]] = []


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        device="cpu", num_kv_blocks=40, max_num_seqs=16, on_phase=lambda *phase: HEARD.append(phase)
    ) as llm:
        yield llm


def test_the_phases_of_the_start_are_reported(llm: LLM) -> None:
    assert {(0, "importing torch"), (0, "loading weights")} <= set(HEARD)


def test_texts_ids_and_mappings_give_the_same(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode_batch([PSALM])[0]
    forms: list[Any] = [PSALM, ids, {"prompt": PSALM}, {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, SHORT, use_tqdm=False)
    assert {output.outputs[0].text for output in outputs} == {" I shall not want.\n2"}
    assert [output.prompt for output in outputs] == [PSALM, None, PSALM, None]
    assert all(output.prompt_token_ids == ids and output.finished for output in outputs)
    assert len({output.request_id for output in outputs}) == 4
    assert llm.generate([], SHORT) == []


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    references = shipped_greedy()[:8]
    params = [SamplingParams(temperature=0, max_tokens=8 - i) for i in range(8)]
    outputs = llm.generate([r.prompt_ids for r in references], params, use_tqdm=False)
    for i, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        assert output.outputs[0].token_ids == reference.output_ids[: 8 - i]
        assert output.outputs[0].finish_reason == "length"


def test_an_end_token_ends_the_text_and_is_among_the_ids(llm: LLM) -> None:
    output = llm.chat(
        [{"role": "user", "content": "What is 348 + 44?"}],
        use_tqdm=False,
        sampling_params=SamplingParams(temperature=0, max_tokens=32),
    )[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("392", "stop", None)
    assert output.token_ids[-1] in llm.config.model_config.eos_token_ids


def test_a_stop_token_is_reported_and_left_out_of_the_text(llm: LLM) -> None:
    reference = shipped_greedy()[0]
    stop = reference.output_ids[4]
    first = reference.output_ids.index(stop)
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop])
    output = llm.generate(reference.prompt_ids, params, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == reference.output_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == llm.get_tokenizer().decode(reference.output_ids[:first])


def test_min_tokens_excludes_end_tokens(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "What is 348 + 44?"}]
    params = SamplingParams(temperature=0, min_tokens=10, max_tokens=64)
    output = llm.chat(conversation, params, use_tqdm=False)[0].outputs[0]
    ends = set(llm.config.model_config.eos_token_ids)
    assert len(output.token_ids) >= 10
    assert not ends.intersection(output.token_ids[:10])


def test_a_seed_samples_the_same_alone_in_a_batch_in_chunks_and_on_two_ranks(llm: LLM) -> None:
    prompts = [reference.prompt_ids for reference in shipped_greedy()[: len(DRAWN)]]

    def drawn(engine: LLM, alone: bool) -> list[list[int]]:
        calls = zip([[p] for p in prompts], [[d] for d in DRAWN], strict=True)
        batches = list(calls) if alone else [(prompts, DRAWN)]
        outputs = [o for p, d in batches for o in engine.generate(p, d, use_tqdm=False)]
        return [output.outputs[0].token_ids for output in outputs]

    together = drawn(llm, alone=False)
    assert len({tuple(tokens) for tokens in together}) == len(together)
    assert drawn(llm, alone=True) == together
    with LLM(
        device="cpu",
        tensor_parallel_size=2,
        num_kv_blocks=10,
        max_num_batched_tokens=8,
        max_num_seqs=4,
    ) as other:
        assert drawn(other, alone=False) == together
        assert other.stats().num_preemptions > 0


def test_requests_without_a_seed_differ_and_the_engine_s_seed_repeats_them() -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def texts(seed: int) -> list[str]:
        with LLM(device="cpu", seed=seed) as llm:
            return [o.outputs[0].text for o in llm.generate([PSALM] * 3, params, use_tqdm=False)]

    first = texts(7)
    assert len(set(first)) == 3
    assert texts(7) == first != texts(8)


def test_a_stream_grows_into_what_generate_gives(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=n, output_kind=kind)
        for n, kind in ((9, RequestOutputKind.DELTA), (6, RequestOutputKind.CUMULATIVE))
    ]
    expected = llm.generate([PSALM] * 2, params, use_tqdm=False)
    deltas: list[RequestOutput] = []
    cumulative: list[RequestOutput] = []
    for output in llm.generate_stream([PSALM] * 2, params):
        of_first = int(output.request_id) % 2 == int(expected[0].request_id) % 2
        (deltas if of_first else cumulative).append(output)
    assert "".join(o.outputs[0].text for o in deltas) == expected[0].outputs[0].text
    assert cumulative[-1].outputs == expected[1].outputs
    assert [o.finished for o in deltas] == [False] * 8 + [True]


def test_a_stream_that_is_closed_leaves_a_quiet_engine(llm: LLM) -> None:
    stream = llm.generate_stream(PSALM, SamplingParams(ignore_eos=True, max_tokens=None))
    next(stream)
    stream.close()
    assert llm._coordinator.num_unfinished == llm._coordinator.num_in_flight == 0
    assert llm.generate(PSALM, SHORT, use_tqdm=False)[0].outputs[0].text == (
        " I shall not want.\n2"
    )


def test_a_stop_string_ends_a_text_and_frees_its_row(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=500, stop=["nowhere", "l not w"])
    output = llm.generate(PSALM, params, use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason) == (" I shal", "stop")
    assert output.stop_reason == "l not w"
    assert llm._coordinator.num_unfinished == 0


@pytest.mark.parametrize("pieces", [["n", "o", "t"], [" n", "no", "n", "o", "t", "ot", " "]])
def test_a_bad_word_is_never_spelled_whatever_the_pieces(llm: LLM, pieces: list[str]) -> None:
    encoded = llm.get_tokenizer().encode_batch(pieces, add_special_tokens=False)
    allowed = [ids[0] for ids in encoded]
    assert all(len(ids) == 1 for ids in encoded)
    options: dict[str, Any] = {"max_tokens": 100, "ignore_eos": True, "bad_words": ["not"]}
    params = [
        SamplingParams(temperature=3.0, seed=i, allowed_token_ids=allowed, **options)
        for i in range(4)
    ]
    outputs = llm.generate(["Letters: "] * 4, params, use_tqdm=False)
    text = "|".join(output.outputs[0].text for output in outputs)
    assert "no" in text and "ot" in text
    assert "not" not in text


def test_several_continuations_share_a_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=8, seed=5)
    outputs = llm.generate([PSALM * 4] * 2, params, use_tqdm=False)
    for output in outputs:
        assert [each.index for each in output.outputs] == [0, 1, 2]
        assert len({each.text for each in output.outputs}) == 3
    assert outputs[0].outputs == outputs[1].outputs
    stats = llm.stats()
    assert stats.num_cached_tokens > 0


def test_a_conversation_is_answered_with_its_template_options(llm: LLM) -> None:
    question: dict[str, Any] = {
        "role": "user",
        "content": [{"type": "text", "text": "What is 348 + 44?"}],
    }
    begun = [question, {"role": "assistant", "content": "39"}]
    params = SamplingParams(temperature=0, max_tokens=8)
    output = llm.chat(
        begun,
        params,
        use_tqdm=False,
        add_generation_prompt=False,
        continue_final_message=True,
    )[0]
    assert output.prompt is not None and output.prompt.endswith("assistant\n39")
    assert output.outputs[0].text == "2"
    shout = "{{ messages[0].content | upper }}{{ tools[0].name }}{{ mood }}"
    output = llm.chat(
        [question],
        params,
        use_tqdm=False,
        chat_template=shout,
        tools=[{"name": "add"}],
        chat_template_kwargs={"mood": "!"},
    )[0]
    assert output.prompt == "WHAT IS 348 + 44?add!"
    with pytest.raises(ValueError, match="continue_final_message=True leaves the last message"):
        llm.chat(begun, params, continue_final_message=True)


def test_a_conversation_may_have_the_formats_of_openais_clients(llm: LLM) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "Ulm"}'}}
    kept: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "sun"},
    ]
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    [output] = llm.chat(kept, SHORT, use_tqdm=False, chat_template=template)
    assert output.prompt == "[system]Hi[assistant]a=Ulm[tool]sun"
    call["function"] = {"name": "f", "arguments": '{"a": "Ul'}  # cut
    [output] = llm.chat(kept, SHORT, use_tqdm=False, chat_template=template)
    assert output.prompt is not None and '{"a": "Ul' in output.prompt
    with pytest.raises(ValueError, match=r"conversation 0: messages\[0\].content is missing"):
        llm.chat([{"role": "user", "text": "hi"}], SHORT, use_tqdm=False)


def test_without_sampling_parameters_the_checkpoint_s_are_taken(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=128)
    output = llm.generate(PSALM, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 128 or output.finish_reason == "stop"


@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ("", SHORT, "prompt 1: the prompt is empty"),
        ([4096], SHORT, "prompt 1: the prompt holds token id 4096, outside the vocabulary of 4096"),
        ([-1], SHORT, "prompt 1: the prompt holds token id -1, outside"),
        ([1] * 4096, SHORT, "has 4096 tokens, which leaves no room .* max_model_len=4096"),
        ([1] * 700, SHORT, "has 700 tokens, which leaves no room .*39 blocks of 16"),
        ("hi", SamplingParams(stop_token_ids=[5000]), "stop_token_ids holds 5000"),
        ("hi", SamplingParams(min_tokens=700, max_tokens=None), "min_tokens=700 after a prompt of"),
        ("hi", SamplingParams(logit_bias={4096: 1}), "logit_bias holds 4096, outside"),
        ("hi", SamplingParams(allowed_token_ids=[1, 4096]), "allowed_token_ids holds 4096"),
        (
            "hi",
            SamplingParams(min_tokens=1, stop_token_ids=[3, 4], allowed_token_ids=[4]),
            r"allowed_token_ids=\[4\] leaves no token to sample, because min_tokens=1 excludes",
        ),
        (
            "hi",
            SamplingParams(allowed_token_ids=[440], bad_words=["will"]),
            r"allowed_token_ids=\[440\] leaves no token to sample, because bad_words excludes",
        ),
        ("hi", SamplingParams(bad_words=[" "]), "bad_words holds ' ', which has no tokens"),
    ],
)
def test_what_cannot_run_is_refused_before_any_prompt_runs(llm, prompt, params, message) -> None:
    steps = llm.stats().num_steps
    with pytest.raises(ValueError, match=message):
        llm.generate(["a good prompt", prompt], [SHORT, params], use_tqdm=False)
    assert llm.stats().num_steps == steps
    assert llm._coordinator.num_unfinished == 0


def test_the_bar_shows_tokens_per_second(llm: LLM, capsys) -> None:
    llm.generate([PSALM], SHORT)
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown
    assert "input" in shown and "output" in shown and "tok/s" in shown


def test_without_a_tokenizer_ids_go_in_and_ids_come_out() -> None:
    reference = shipped_greedy()[0]
    with LLM(device="cpu", skip_tokenizer_init=True) as llm:
        output = llm.generate(reference.prompt_ids, SHORT, use_tqdm=False)[0].outputs[0]
        assert (output.token_ids, output.text) == (reference.output_ids[:6], "")
        with pytest.raises(ValueError, match="has no tokenizer"):
            llm.generate("text", SHORT)


def test_a_cache_larger_than_memory_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"num_kv_blocks=\d+ takes .* GiB, more than cpu has"):
        LLM(device="cpu", num_kv_blocks=2**31 // 16 - 1)


def test_a_config_alone_is_enough_for_dummy_weights(tmp_path) -> None:
    write_config(tmp_path)
    with LLM(tmp_path, device="cpu", load_format="dummy", tensor_parallel_size=2) as llm:
        output = llm.generate([[1, 2, 3]], SHORT, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 6


def test_a_sequence_longer_than_the_cache_is_refused_if_asked_for() -> None:
    with pytest.raises(ValueError, match="max_model_len=200 is more than the 144 tokens"):
        LLM(device="cpu", num_kv_blocks=10, max_model_len=200)


def test_help_shows_every_setting() -> None:
    parameters = inspect.signature(LLM).parameters
    assert list(parameters) == [*(field.name for field in fields(Settings)), "on_phase"]
    assert parameters["tensor_parallel_size"].default == 1
    assert "gpu_memory_utilization: share of each GPU" in (LLM.__doc__ or "")


def test_a_call_from_inside_a_call_is_refused_and_harms_nothing(llm: LLM) -> None:
    refused = []

    def call_again(signum: int, frame: object) -> None:
        with pytest.raises(RuntimeError, match="in the middle of a step in this thread"):
            llm.generate([PSALM], SHORT, use_tqdm=False)
        refused.append(True)

    before = signal.signal(signal.SIGUSR1, call_again)
    try:
        with monkeypatched_step(llm):
            output = llm.generate([PSALM], SHORT, use_tqdm=False)[0].outputs[0]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert refused
    assert output.text == " I shall not want.\n2"


@contextmanager
def monkeypatched_step(llm: LLM) -> Iterator[None]:
    """Send this process a signal before each step."""
    step = llm._coordinator.step

    def signalling_step() -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._coordinator, "step", signalling_step)
        yield
