"""vLLM's keywords that tpllm lacks: the values that are accepted, and what to use instead.

A value is accepted if it has no effect here, as most of vLLM's defaults do. None is always
accepted. `docs/coming-from-vllm.md` shows these tables, and a test compares them.
"""

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, TypeVar

from tpllm.checks import short
from tpllm.errors import UnknownSettingError, refuse_unknown_settings


class Missing(NamedTuple):
    """A keyword that tpllm lacks.

    Attributes:
        instead: what to use or do instead
        ignored: values that are accepted and ignored, besides None
    """

    instead: str
    ignored: tuple[Any, ...] = ()


Keywords = Mapping[str, Missing]

_LEAVE_OUT = "leave it out"
_NO_LORA = "merge the adapter into the weights (PEFT's merge_and_unload)"
_NO_IMAGES = "models read text alone"
_ONE_HOST = "split the model by tensor_parallel_size, or run several engines"
_FOLDER = "download it with huggingface_hub.snapshot_download, and give the folder"
_CONFIG = "change config.json in a copy of the checkpoint"

SETTINGS: Keywords = {
    "additional_config": Missing(_LEAVE_OUT, ({},)),
    "async_scheduling": Missing("steps are always planned ahead", (True, False)),
    "block_size": Missing("use kv_block_size"),
    "code_revision": Missing("no code of a checkpoint is ever run", ("main",)),
    "compilation_config": Missing("use enforce_eager to do without CUDA graphs", ({},)),
    "config_format": Missing("use a checkpoint in Hugging Face's format", ("auto", "hf")),
    "convert": Missing("models generate text, and nothing else", ("auto", "none")),
    "cpu_offload_gb": Missing("raise tensor_parallel_size where weights do not fit", (0,)),
    "data_parallel_size": Missing(_ONE_HOST, (1,)),
    "disable_async_output_proc": Missing(_LEAVE_OUT, (False,)),
    "disable_cascade_attn": Missing(_LEAVE_OUT, (True, False)),
    "disable_log_stats": Missing("use llm.stats()", (True, False)),
    "distributed_executor_backend": Missing(_ONE_HOST, ("mp", "uni")),
    "download_dir": Missing("set HF_HOME, or give a local folder"),
    "enable_chunked_prefill": Missing("always on; raise max_num_batched_tokens instead", (True,)),
    "enable_expert_parallel": Missing("models are dense", (False,)),
    "enable_lora": Missing(_NO_LORA, (False,)),
    "enable_sleep_mode": Missing("close the LLM, and make a new one", (False,)),
    "guided_decoding_backend": Missing("llguidance is the only one", ("auto", "guidance")),
    "hf_config_path": Missing(_CONFIG),
    "hf_token": Missing("set HF_TOKEN"),
    "kv_cache_dtype": Missing("the cache has the dtype of the weights", ("auto",)),
    "kv_cache_memory_bytes": Missing("use gpu_memory_utilization or num_kv_blocks"),
    "kv_transfer_config": Missing("one engine does prefill and decode"),
    "limit_mm_per_prompt": Missing(_NO_IMAGES, ({},)),
    "logits_processors": Missing("use logit_bias, allowed_token_ids or structured_outputs", ([],)),
    "max_logprobs": Missing("the limit is 20", (20,)),
    "max_lora_rank": Missing(_NO_LORA, (16,)),
    "max_loras": Missing(_NO_LORA, (1,)),
    "max_num_partial_prefills": Missing(_LEAVE_OUT, (1,)),
    "max_seq_len_to_capture": Missing("CUDA graphs serve any length", (8192,)),
    "mm_processor_kwargs": Missing(_NO_IMAGES, ({},)),
    "model_impl": Missing("there is one implementation of each model", ("auto", "vllm")),
    "num_gpu_blocks_override": Missing("use num_kv_blocks"),
    "num_scheduler_steps": Missing(_LEAVE_OUT, (1,)),
    "override_generation_config": Missing("give SamplingParams to each call", ({},)),
    "pipeline_parallel_size": Missing(_ONE_HOST, (1,)),
    "quantization": Missing("use a checkpoint in bfloat16, float16 or float32"),
    "revision": Missing(_FOLDER, ("main",)),
    "rope_scaling": Missing("use hf_overrides={'rope_scaling': {...}}", ({},)),
    "rope_theta": Missing("use hf_overrides={'rope_theta': ...}"),
    "runner": Missing("models generate text, and nothing else", ("auto", "generate")),
    "scheduling_policy": Missing("requests run in the order in which they come", ("fcfs",)),
    "served_model_name": Missing("it is a setting of the server: tpllm serve --served-model-name"),
    "speculative_config": Missing(_LEAVE_OUT),
    "speculative_model": Missing(_LEAVE_OUT),
    "structured_outputs_config": Missing("llguidance is the only backend", ({},)),
    "swap_space": Missing("a preempted sequence is recomputed", (0, 4)),
    "task": Missing("models generate text, and nothing else", ("auto", "generate")),
    "tokenizer_mode": Missing("the tokenizer is transformers' own", ("auto", "hf")),
    "tokenizer_revision": Missing(_FOLDER, ("main",)),
    "trust_remote_code": Missing(
        "no code of a checkpoint is ever run, and no model here needs it; leave it out", (False,)
    ),
    "use_v2_block_manager": Missing(_LEAVE_OUT, (True, False)),
    "worker_cls": Missing(_LEAVE_OUT, ("auto",)),
    "worker_extension_cls": Missing(_LEAVE_OUT, ("",)),
}

SAMPLING: Keywords = {
    "best_of": Missing("use n, and choose by cumulative_logprob", (1,)),
    "early_stopping": Missing(
        "LLM.beam_search stops as transformers' early_stopping=False", (False,)
    ),
    "extra_args": Missing(_LEAVE_OUT, ({},)),
    "flat_logprobs": Missing("log-probabilities are lists of dicts", (False,)),
    "guided_decoding": Missing("use structured_outputs=StructuredOutputsParams(...)"),
    "length_penalty": Missing("it is one of BeamSearchParams, for LLM.beam_search", (1.0,)),
    "logits_processors": Missing(
        "use logit_bias, allowed_token_ids, bad_words or structured_outputs", ([],)
    ),
    "logprob_token_ids": Missing("use logprobs, and look the tokens up", ([],)),
    "output_text_buffer_length": Missing(_LEAVE_OUT, (0,)),
    "priority": Missing("requests run in the order in which they come", (0,)),
    "prompt_logprob_start": Missing("use prompt_logprobs, which begin with the second token", (0,)),
    "prompt_logprob_token_ids": Missing("use prompt_logprobs, and look the tokens up", ([],)),
    "repetition_detection": Missing("use repetition_penalty or frequency_penalty"),
    "response_format": Missing("use structured_outputs=StructuredOutputsParams(json=...)"),
    "routed_experts_prompt_start": Missing("models are dense", (0,)),
    "skip_clone": Missing(_LEAVE_OUT, (True, False)),
    "skip_reading_prefix_cache": Missing("use enable_prefix_caching=False of LLM", (False,)),
    "stream_interval": Missing("every output is sent at once", (1,)),
    "thinking_token_budget": Missing("use max_tokens, or enable_thinking of the chat template"),
    "trace_decode_token_ids": Missing("use prompt_logprobs to measure given tokens"),
    "truncate_prompt_tokens": Missing("truncate the list of token ids, and give it as the prompt"),
    "use_beam_search": Missing("call LLM.beam_search", (False,)),
}

STRUCTURED: Keywords = {
    "backend": Missing("llguidance is the only one", ("auto", "guidance")),
    "disable_additional_properties": Missing(
        "write additionalProperties: false into the schema", (False,)
    ),
    "disable_fallback": Missing("llguidance is the only backend", (True, False)),
    "structural_tag": Missing("use grammar"),
}

CALLS: Keywords = {
    "arrival_time": Missing(_LEAVE_OUT),
    "chat_template_content_format": Missing(
        "the template receives contents as strings", ("auto", "string")
    ),
    "concurrency_limit": Missing("use max_num_seqs"),
    "data_parallel_rank": Missing(_ONE_HOST, (0,)),
    "guided_options_request": Missing("use structured_outputs of SamplingParams"),
    "lora_request": Missing(_NO_LORA, ([],)),
    "mm_processor_kwargs": Missing(_NO_IMAGES, ({},)),
    "priority": Missing("requests run in the order in which they come", (0, [])),
    "prompt_adapter_request": Missing("write the instructions into the prompt"),
    "prompt_token_ids": Missing(
        'give the ids as the prompt: generate([1, 2, 3]), or {"prompt_token_ids": ids}'
    ),
    "tokenization_kwargs": Missing("encode by get_tokenizer(), and give token ids", ({},)),
    "trace_headers": Missing(_LEAVE_OUT, ({},)),
}

PROMPTS: Keywords = {
    "cache_salt": Missing("use enable_prefix_caching=False of LLM", ("",)),
    "decoder_prompt": Missing("models have no encoder; give the prompt alone"),
    "encoder_prompt": Missing("models have no encoder; give the prompt alone"),
    "mm_processor_kwargs": Missing(_NO_IMAGES, ({},)),
    "multi_modal_data": Missing(_NO_IMAGES, ({},)),
    "multi_modal_uuids": Missing(_NO_IMAGES, ({},)),
    "prompt_embeds": Missing("give a string or token ids"),
    "role": Missing("call LLM.chat with messages"),
    "type": Missing(_LEAVE_OUT, ("text", "token", "tokens")),
}

_T = TypeVar("_T")


def without_missing(
    owner: str, given: Mapping[str, Any], missing: Keywords, known: Collection[str]
) -> dict[str, Any]:
    """Return the keywords `given` to `owner` without the `missing` ones.

    Raises:
        UnknownSettingError: a missing keyword has a value that would have an effect, or a keyword
            is unknown.
    """
    refuse_unknown_settings(owner, [name for name in given if name not in missing], known)
    refuse_missing(owner, given, missing)
    return {name: value for name, value in given.items() if name not in missing}


def refuse_missing(owner: str, given: Mapping[Any, Any], missing: Keywords) -> None:
    """Check that the values of `missing` keywords have no effect.

    Raises:
        UnknownSettingError: one would have an effect.
    """
    for name, value in given.items():
        if name in missing and not _is_ignored(value, missing[name].ignored):
            raise UnknownSettingError(
                f"{owner}: {name}={short(value)} is absent in tpllm; {missing[name].instead}"
            )


def _is_ignored(value: object, ignored: tuple[Any, ...]) -> bool:
    return value is None or any(_is_same(value, each) for each in ignored)


def _is_same(value: object, other: object) -> bool:
    if isinstance(value, int | float) and isinstance(other, int | float):
        return value == other and isinstance(value, bool) == isinstance(other, bool)
    # types first: other types, such as arrays, define == in their own way
    return type(value) is type(other) and value == other


def check_keywords(method: Callable[..., object], given: Mapping[str, Any]) -> None:
    """Check what a method of LLM or AsyncLLM got as `**vllm_keywords`.

    Raises:
        UnknownSettingError: as in `without_missing`.
    """
    if given:
        *known, _ = signature(method).parameters
        without_missing(method.__qualname__, given, CALLS, known[1:])


def checks_keywords(owner: str, missing: Keywords) -> Callable[[type[_T]], type[_T]]:
    """Return a decorator: the dataclass ignores vLLM's keywords at values that have no effect.

    It refuses others with an error that, unlike Python's, suggests the nearest known name.
    """

    def decorate(cls: type[_T]) -> type[_T]:
        init: Callable[..., None] = cls.__init__
        known = tuple(vars(cls)["__dataclass_fields__"])

        @wraps(init)
        def checked_init(self: _T, *args: Any, **given: Any) -> None:
            if not given.keys() <= set(known):
                given = without_missing(owner, given, missing, known)
            init(self, *args, **given)

        cls.__init__ = checked_init  # type: ignore[method-assign, assignment]
        return cls

    return decorate
