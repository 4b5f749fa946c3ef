"""POST /v1/chat/completions: answers to conversations."""

from typing import Any

from tpllm.outputs import CompletionOutput
from tpllm.server.answer_parser import AnswerParser
from tpllm.server.answer_pieces import (
    CallArguments,
    CallStart,
    Content,
    Piece,
    Reasoning,
    Thinking,
)
from tpllm.server.answerer import Answerer
from tpllm.server.errors import invalid
from tpllm.server.generation import Answer, PromptState
from tpllm.server.logprob_bodies import chat_logprobs, prompt_logprobs
from tpllm.server.protocol import ChatCompletionRequest
from tpllm.server.service import Service, new_id
from tpllm.server.tool_choice import tool_choice


class Chat(Answerer[ChatCompletionRequest]):
    """The answers to one conversation."""

    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatCompletionRequest) -> None:
        super().__init__(service, body, service.sampling.of_chat)
        self._num_top = body.top_logprobs or 0
        self._tool_choice = tool_choice(body)
        self._thinking = Thinking.NONE
        self._parsers: dict[int, AnswerParser] = {}  # of a stream, by answer

    async def whole(self) -> dict[str, Any]:
        content = await super().whole()
        if self._body.prompt_logprobs is not None:
            positions = self._generation.prompts[0].logprobs
            content["prompt_logprobs"] = prompt_logprobs(positions or [])
        return content

    async def _encode(self) -> list[list[int]]:
        service = self._service
        text, ids = await service.prompts.render(self._conversation())
        if not ids:
            raise invalid("messages make an empty prompt; add content")
        service.sampling.check_length(self._body, [ids], self._params)
        if service.settings.parse_reasoning and self._params.structured_outputs is None:
            self._thinking = Thinking.after(text, service.always_reasons)
        return [ids]

    def _conversation(self) -> ChatCompletionRequest:
        """Return the request with the tools and options for the chat template."""
        changes: dict[str, Any] = {}
        if not self._tool_choice.is_named:  # a grammar already forces the named function
            changes["tools"] = self._tool_choice.tools or None
        if self._body.reasoning_effort == "none" and self._body.enable_thinking is None:
            changes["enable_thinking"] = False
        return self._body.model_copy(update=changes)

    def _parser(self) -> AnswerParser:
        max_calls = 1 if self._body.parallel_tool_calls is False else None
        choice = self._tool_choice
        tools = self._service.tool_format if choice.tools else None
        return AnswerParser(self._thinking, tools, max_calls, choice.must_call)

    def _pieces(self, parser: AnswerParser, part: Answer | CompletionOutput) -> list[Piece]:
        """Return the new pieces that the client gets."""
        pieces = parser.feed(part.text)
        if part.finish_reason is not None:
            pieces += parser.finish(part.finish_reason == "length")
        if self._body.include_reasoning is False:
            return [piece for piece in pieces if not isinstance(piece, Reasoning)]
        return pieces

    async def _choice(self, prompt: PromptState, answer: Answer) -> dict[str, Any]:
        parser = self._parser()
        return {
            "index": answer.index,
            "message": _message(self._pieces(parser, answer)),
            "logprobs": self._logprobs(answer),
            "finish_reason": self._finish_reason(answer.finish_reason, parser),
            "stop_reason": answer.stop_reason,
        }

    async def _chunks(
        self, prompt: PromptState, answer: Answer, part: CompletionOutput
    ) -> list[dict[str, Any]]:
        """Return choices for a part of an answer; none while it may be half a tag."""
        new: list[dict[str, Any]] = []
        if answer.index not in self._parsers:
            self._parsers[answer.index] = self._parser()
            new.append({"role": "assistant", "content": ""})
        parser = self._parsers[answer.index]
        new += map(_delta, self._pieces(parser, part))
        if not new and part.logprobs:
            new = [{"content": ""}]  # log-probabilities are sent even if the text is held back
        choices: list[dict[str, Any]] = [
            {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}
            for delta in new
        ]
        if part.logprobs and choices:
            choices[-1]["logprobs"] = self._logprobs(part)
        if part.finish_reason is not None:
            reason = self._finish_reason(part.finish_reason, parser)
            last = {"index": answer.index, "delta": {}, "logprobs": None}
            choices.append({**last, "finish_reason": reason, "stop_reason": part.stop_reason})
        return choices

    def _finish_reason(self, reason: str | None, parser: AnswerParser) -> str | None:
        """Return OpenAI's finish reason: "tool_calls" after calls, which the client answers.

        If the request names the function, OpenAI's reason is "stop".
        """
        calls = parser.num_calls and not self._tool_choice.is_named
        return "tool_calls" if reason == "stop" and calls else reason

    def _logprobs(self, part: Answer | CompletionOutput) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        bytes_of = self._service.prompts.tokenizer.token_bytes
        return chat_logprobs(part.token_ids, part.logprobs or [], self._num_top, bytes_of)


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Reasoning(text):
            return _reasoning(text)
        case Content(text):
            return {"content": text}
        case CallStart(index, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": new_id("call_"), "type": "function", "function": function}
            return {"tool_calls": [call]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _reasoning(text: str | None) -> dict[str, Any]:
    """Return reasoning under vLLM's name and the older one, which most clients read."""
    return {"reasoning": text, "reasoning_content": text}


def _message(pieces: list[Piece]) -> dict[str, Any]:
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            function = {"name": piece.name, "arguments": ""}
            calls.append({"id": new_id("call_"), "type": "function", "function": function})
        elif isinstance(piece, CallArguments):
            calls[piece.index]["function"]["arguments"] += piece.text
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not calls else None,
        **_reasoning(reasoning or None),
        "refusal": None,
    }
    if calls:
        message["tool_calls"] = calls
    return message
