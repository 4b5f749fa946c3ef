"""vLLM's keywords that tpllm lacks: the values that are accepted, and what to use instead.

A value is accepted if it has no effect here, as most of vLLM's defaults do. None is always
accepted. `docs/coming-from-vllm.md` shows these tables, and a test compares them.
"""

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from tpllm.checks import short
from tpllm.errors import UnknownSettingError, refuse_unknown_settings


class Absent(NamedTuple):
    """A keyword that tpllm lacks.

    Attributes:
        way_out: what to use or do instead
        harmless: values that are accepted and ignored, besides None
    """

    way_out: str
    harmless: tuple[Any, ...] = ()


Keywords = Mapping[str, Absent]

_LEAVE_OUT = "leave it out"
_NO_LORA = "merge the adapter into the weights (PEFT's merge_and_unload)"
_NO_IMAGES = "models read text alone"
_ONE_HOST = "split the model by tensor_parallel_size, or run several engines"
_FOLDER = "download it with huggingface_hub.snapshot_download, and give the folder"
_CONFIG = "change config.json in a copy of the checkpoint"

SETTINGS: Keywords = {
    "additional_config": Absent(_LEAVE_OUT, ({},)),
    "async_scheduling": Absent("steps are always planned ahead", (True, False)),
    "block_size": Absent("use kv_block_size"),
    "code_revision": Absent("no code of a checkpoint is ever run", ("main",)),
    "compilation_config": Absent("use enforce_eager to do without CUDA graphs", ({},)),
    "config_format": Absent("use a checkpoint in Hugging Face's format", ("auto", "hf")),
    "convert": Absent("models generate text, and nothing else", ("auto", "none")),
    "cpu_offload_gb": Absent("raise tensor_parallel_size where weights do not fit", (0,)),
    "data_parallel_size": Absent(_ONE_HOST, (1,)),
    "disable_async_output_proc": Absent(_LEAVE_OUT, (False,)),
    "disable_cascade_attn": Absent(_LEAVE_OUT, (True, False)),
    "disable_log_stats": Absent("use llm.coordinator.engine_stats()", (True, False)),
    "distributed_executor_backend": Absent(_ONE_HOST, ("mp", "uni")),
    "download_dir": Absent("set HF_HOME, or give a local folder"),
    "enable_chunked_prefill": Absent("always on; raise max_num_batched_tokens instead", (True,)),
    "enable_expert_parallel": Absent("models are dense", (False,)),
    "enable_lora": Absent(_NO_LORA, (False,)),
    "enable_sleep_mode": Absent("close the LLM, and make a new one", (False,)),
    "guided_decoding_backend": Absent("llguidance is the only one", ("auto", "guidance")),
    "hf_config_path": Absent(_CONFIG),
    "hf_overrides": Absent(_CONFIG, ({},)),
    "hf_token": Absent("set HF_TOKEN"),
    "kv_cache_dtype": Absent("the cache has the dtype of the weights", ("auto",)),
    "kv_cache_memory_bytes": Absent("use gpu_memory_utilization or num_kv_blocks"),
    "kv_transfer_config": Absent("one engine does prefill and decode"),
    "limit_mm_per_prompt": Absent(_NO_IMAGES, ({},)),
    "logits_processors": Absent("use logit_bias, allowed_token_ids or structured_outputs", ([],)),
    "max_logprobs": Absent("the limit is 20", (20,)),
    "max_lora_rank": Absent(_NO_LORA, (16,)),
    "max_loras": Absent(_NO_LORA, (1,)),
    "max_num_partial_prefills": Absent(_LEAVE_OUT, (1,)),
    "max_seq_len_to_capture": Absent("CUDA graphs serve any length", (8192,)),
    "mm_processor_kwargs": Absent(_NO_IMAGES, ({},)),
    "model_impl": Absent("there is one implementation of each model", ("auto", "vllm")),
    "num_gpu_blocks_override": Absent("use num_kv_blocks"),
    "num_scheduler_steps": Absent(_LEAVE_OUT, (1,)),
    "override_generation_config": Absent("give SamplingParams to each call", ({},)),
    "pipeline_parallel_size": Absent(_ONE_HOST, (1,)),
    "quantization": Absent("use a checkpoint in bfloat16, float16 or float32"),
    "revision": Absent(_FOLDER, ("main",)),
    "rope_scaling": Absent(_CONFIG, ({},)),
    "rope_theta": Absent(_CONFIG),
    "runner": Absent("models generate text, and nothing else", ("auto", "generate")),
    "scheduling_policy": Absent("requests run in the order in which they come", ("fcfs",)),
    "served_model_name": Absent("it is a setting of the server: tpllm serve --served-model-name"),
    "speculative_config": Absent(_LEAVE_OUT),
    "speculative_model": Absent(_LEAVE_OUT),
    "structured_outputs_config": Absent("llguidance is the only backend", ({},)),
    "swap_space": Absent("a preempted sequence is recomputed", (0, 4)),
    "task": Absent("models generate text, and nothing else", ("auto", "generate")),
    "tokenizer_mode": Absent("the tokenizer is transformers' own", ("auto", "hf")),
    "tokenizer_revision": Absent(_FOLDER, ("main",)),
    "trust_remote_code": Absent(
        "no code of a checkpoint is ever run, and no model here needs it; leave it out", (False,)
    ),
    "use_v2_block_manager": Absent(_LEAVE_OUT, (True, False)),
    "worker_cls": Absent(_LEAVE_OUT, ("auto",)),
    "worker_extension_cls": Absent(_LEAVE_OUT, ("",)),
}

SAMPLING: Keywords = {
    "best_of": Absent("use n, and choose by cumulative_logprob", (1,)),
    "early_stopping": Absent(
        "LLM.beam_search stops as transformers' early_stopping=False", (False,)
    ),
    "extra_args": Absent(_LEAVE_OUT, ({},)),
    "flat_logprobs": Absent("log-probabilities are lists of dicts", (False,)),
    "guided_decoding": Absent("use structured_outputs=StructuredOutputsParams(...)"),
    "length_penalty": Absent("it is one of BeamSearchParams, for LLM.beam_search", (1.0,)),
    "logits_processors": Absent(
        "use logit_bias, allowed_token_ids, bad_words or structured_outputs", ([],)
    ),
    "logprob_token_ids": Absent("use logprobs, and look the tokens up", ([],)),
    "output_text_buffer_length": Absent(_LEAVE_OUT, (0,)),
    "priority": Absent("requests run in the order in which they come", (0,)),
    "prompt_logprob_start": Absent("use prompt_logprobs, which begin with the second token", (0,)),
    "prompt_logprob_token_ids": Absent("use prompt_logprobs, and look the tokens up", ([],)),
    "repetition_detection": Absent("use repetition_penalty or frequency_penalty"),
    "response_format": Absent("use structured_outputs=StructuredOutputsParams(json=...)"),
    "routed_experts_prompt_start": Absent("models are dense", (0,)),
    "skip_clone": Absent(_LEAVE_OUT, (True, False)),
    "skip_reading_prefix_cache": Absent("use enable_prefix_caching=False of LLM", (False,)),
    "stream_interval": Absent("every output is sent at once", (1,)),
    "thinking_token_budget": Absent("use max_tokens, or enable_thinking of the chat template"),
    "trace_decode_token_ids": Absent("use prompt_logprobs to measure given tokens"),
    "truncate_prompt_tokens": Absent("truncate the list of token ids, and give that as the prompt"),
    "use_beam_search": Absent("call LLM.beam_search", (False,)),
}

STRUCTURED: Keywords = {
    "backend": Absent("llguidance is the only one", ("auto", "guidance")),
    "disable_additional_properties": Absent(
        "write additionalProperties: false into the schema", (False,)
    ),
    "disable_fallback": Absent("llguidance is the only backend", (True, False)),
    "structural_tag": Absent("use grammar"),
}

CALLS: Keywords = {
    "arrival_time": Absent(_LEAVE_OUT),
    "chat_template_content_format": Absent(
        "the template receives contents as strings", ("auto", "string")
    ),
    "concurrency_limit": Absent("use max_num_seqs"),
    "data_parallel_rank": Absent(_ONE_HOST, (0,)),
    "guided_options_request": Absent("use structured_outputs of SamplingParams"),
    "lora_request": Absent(_NO_LORA, ([],)),
    "mm_processor_kwargs": Absent(_NO_IMAGES, ({},)),
    "priority": Absent("requests run in the order in which they come", (0, [])),
    "prompt_adapter_request": Absent("write the instructions into the prompt"),
    "prompt_token_ids": Absent(
        'give the ids as the prompt: generate([1, 2, 3]), or {"prompt_token_ids": ids}'
    ),
    "tokenization_kwargs": Absent("encode by get_tokenizer(), and give token ids", ({},)),
    "trace_headers": Absent(_LEAVE_OUT, ({},)),
}

PROMPTS: Keywords = {
    "cache_salt": Absent("use enable_prefix_caching=False of LLM", ("",)),
    "decoder_prompt": Absent("models have no encoder; give the prompt alone"),
    "encoder_prompt": Absent("models have no encoder; give the prompt alone"),
    "mm_processor_kwargs": Absent(_NO_IMAGES, ({},)),
    "multi_modal_data": Absent(_NO_IMAGES, ({},)),
    "multi_modal_uuids": Absent(_NO_IMAGES, ({},)),
    "prompt_embeds": Absent("give a string or token ids"),
    "role": Absent("call LLM.chat with messages"),
    "type": Absent(_LEAVE_OUT, ("text", "token", "tokens")),
}

_T = TypeVar("_T")


def without_absent(
    owner: str, given: Mapping[str, Any], absent: Keywords, known: Collection[str]
) -> dict[str, Any]:
    """Return the keywords `given` to `owner` without the `absent` ones, whose values are harmless.

    Raises:
        UnknownSettingError: an absent keyword has a value that would have an effect, or a keyword
            is unknown.
    """
    refuse_unknown_settings(owner, [name for name in given if name not in absent], known)
    refuse_absent(owner, given, absent)
    return {name: value for name, value in given.items() if name not in absent}


def refuse_absent(owner: str, given: Mapping[Any, Any], absent: Keywords) -> None:
    """Check that the values of `absent` keywords have no effect.

    Raises:
        UnknownSettingError: one would have an effect.
    """
    for name, value in given.items():
        if name in absent and not _is_harmless(value, absent[name].harmless):
            raise UnknownSettingError(
                f"{owner}: {name}={short(value)} is absent in tpllm; {absent[name].way_out}"
            )


def _is_harmless(value: object, harmless: tuple[Any, ...]) -> bool:
    return value is None or any(_is_same(value, each) for each in harmless)


def _is_same(value: object, other: object) -> bool:
    if isinstance(value, int | float) and isinstance(other, int | float):
        return value == other and isinstance(value, bool) == isinstance(other, bool)
    # types first: other types, such as arrays, define == in their own way
    return type(value) is type(other) and value == other


def checks_keywords(owner: str, absent: Keywords) -> Callable[[type[_T]], type[_T]]:
    """Return a decorator: the dataclass ignores vLLM's harmless keywords and refuses unknown ones.

    Unlike Python's own TypeError, the error suggests the nearest known name.
    """

    def decorate(cls: type[_T]) -> type[_T]:
        init: Callable[..., None] = cls.__init__
        known = tuple(vars(cls)["__dataclass_fields__"])

        @wraps(init)
        def checked_init(self: _T, *args: Any, **given: Any) -> None:
            if not given.keys() <= set(known):
                given = without_absent(owner, given, absent, known)
            init(self, *args, **given)

        cls.__init__ = checked_init  # type: ignore[method-assign, assignment]
        return cls

    return decorate
