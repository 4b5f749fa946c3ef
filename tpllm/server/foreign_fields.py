"""Fields of other servers and clients that tpllm lacks.

Many programs send all their fields at the defaults. A value without effect is accepted; any other
is refused, and the error says what to use instead. Null is accepted under any name.
"""

from collections.abc import Collection, Mapping
from typing import Any

from tpllm.checks import short

# Fields that have no effect at any value.
WITHOUT_EFFECT = frozenset(
    {
        "cache_prompt",
        "cache_salt",
        "guided_decoding_backend",
        "keep_alive",
        "request_id",
        "rid",
        # routes and accounts of OpenRouter
        "provider",
        "route",
        "session_id",
        "usage",
        # places and reports of llama.cpp
        "id_slot",
        "n_keep",
        "return_progress",
        "timings_per_token",
        # what belongs to a sampler or penalty that is refused unless it is off
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "mirostat_eta",
        "mirostat_tau",
        "repeat_last_n",
        "xtc_threshold",
    }
)

_LEAVE_OUT = "leave it out"
_USE_STRUCTURED = "use structured_outputs"
_USE_MAX_TOKENS = "use max_tokens"
_EMPTY_LIST: tuple[Any, ...] = ([],)
_EMPTY_OBJECT: tuple[Any, ...] = ({},)

# By name: the values that are accepted, and what to use instead of others.
FOREIGN: dict[str, tuple[tuple[Any, ...], str]] = {
    # vLLM
    "add_special_tokens": ((False,), "the chat template writes every special token"),
    "best_of": ((1,), "use n"),
    "chat_template": ((), "the model's own is used"),
    "detokenize": ((True,), _LEAVE_OUT),
    "documents": (_EMPTY_LIST, "put them into a message"),
    "early_stopping": ((False,), _LEAVE_OUT),
    "echo": ((False,), "use continue_final_message, or /v1/completions"),
    "guided_json_object": ((False,), "use response_format"),
    "guided_whitespace_pattern": ((), "use structured_outputs with whitespace_pattern"),
    "kv_transfer_params": (_EMPTY_OBJECT, _LEAVE_OUT),
    "length_penalty": ((1,), _LEAVE_OUT),
    "logits_processors": (_EMPTY_LIST, _LEAVE_OUT),
    "media_io_kwargs": (_EMPTY_OBJECT, _LEAVE_OUT),
    "mm_processor_kwargs": (_EMPTY_OBJECT, _LEAVE_OUT),
    "priority": ((0,), _LEAVE_OUT),
    "prompt_embeds": (_EMPTY_LIST, "use prompt"),
    "repetition_detection": (_EMPTY_OBJECT, _LEAVE_OUT),
    "return_token_ids": ((False,), "use /tokenize"),
    "return_tokens_as_token_ids": ((False,), _LEAVE_OUT),
    "thinking_token_budget": ((), "use max_tokens, or enable_thinking=false"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "use_beam_search": ((False,), "use LLM.beam_search in Python"),
    "vllm_xargs": (_EMPTY_OBJECT, _LEAVE_OUT),
    # SGLang
    "custom_logit_processor": ((), _LEAVE_OUT),
    "custom_params": (_EMPTY_OBJECT, _LEAVE_OUT),
    "ebnf": ((), _USE_STRUCTURED),
    "json_schema": (_EMPTY_OBJECT, _USE_STRUCTURED),
    "lora_path": ((), _LEAVE_OUT),
    "no_stop_trim": ((False,), "use include_stop_str_in_output"),
    "regex": ((), _USE_STRUCTURED),
    "return_hidden_states": ((False,), _LEAVE_OUT),
    "separate_reasoning": ((True,), "start the server with --no-parse-reasoning"),
    "session_params": (_EMPTY_OBJECT, _LEAVE_OUT),
    "stop_regex": (_EMPTY_LIST, "use stop"),
    "stream_reasoning": ((True,), _LEAVE_OUT),
    # llama.cpp, Ollama, OpenRouter
    "dry_multiplier": ((0,), "use repetition_penalty"),
    "dynatemp_range": ((0,), "use temperature"),
    "format": ((), "use response_format"),
    "grammar": (("",), _USE_STRUCTURED),
    "max_new_tokens": ((), _USE_MAX_TOKENS),
    "min_keep": ((0,), _LEAVE_OUT),
    "mirostat": ((0,), "use temperature, top_p and min_p"),
    "n_predict": ((-1,), _USE_MAX_TOKENS),
    "n_probs": ((0,), "use logprobs"),
    "num_predict": ((-1,), _USE_MAX_TOKENS),
    "options": (_EMPTY_OBJECT, "put its settings into the body itself"),
    "post_sampling_probs": ((False,), _LEAVE_OUT),
    "repeat_penalty": ((1,), "use repetition_penalty"),
    "return_tokens": ((False,), "use /tokenize"),
    "tfs_z": ((1,), "use top_p"),
    "reasoning_format": (("auto", "deepseek"), "start the server with --no-parse-reasoning"),
    "safe_prompt": ((False,), _LEAVE_OUT),
    "think": ((), "use enable_thinking"),
    "top_a": ((0,), "use min_p"),
    "transforms": (_EMPTY_LIST, _LEAVE_OUT),
    "typical_p": ((1,), "use top_p"),
    "xtc_probability": ((0,), "use temperature"),
    # OpenAI
    "audio": ((), "this server has texts alone"),
    "function_call": (("auto", "none"), "use tool_choice"),
    "functions": (_EMPTY_LIST, "use tools"),
    "web_search_options": ((), "give a tool that searches"),
    # arguments that clients send by mistake, and other vendors' switches of reasoning
    "extra_body": (_EMPTY_OBJECT, "put its fields into the body itself"),
    "extra_headers": (_EMPTY_OBJECT, "send them as headers"),
    "extra_query": (_EMPTY_OBJECT, _LEAVE_OUT),
    "reasoning": (_EMPTY_OBJECT, "use reasoning_effort"),
    "thinking": (_EMPTY_OBJECT, "use enable_thinking"),
}


def without_foreign_fields(body: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return a request's known and unknown fields, without foreign ones that have no effect.

    Args:
        known: names of the fields that the request has here

    Raises:
        ValueError: a foreign field has a value that tpllm does not support.
    """
    kept = {}
    for name, value in body.items():
        if name in known:
            kept[name] = value
        elif value is None or name in WITHOUT_EFFECT:
            continue
        elif name not in FOREIGN:
            kept[name] = value
        elif name == "best_of" and value == (body.get("n") or 1):
            continue
        elif value not in FOREIGN[name][0]:
            raise ValueError(f"{name}={short(value)} is not supported; {FOREIGN[name][1]}")
    return kept
