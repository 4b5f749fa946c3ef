"""An engine that answers at once, in fixed words: for commands to be tested without workers."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from tpllm.outputs import CompletionOutput, RequestOutput
from tpllm.sampling_params import SamplingParams


class StandIn:
    """Takes LLM's place. It notes what it is asked, and answers with the prompt itself.

    A prompt is a text; in a chat's template it is `[role: content]...`. Class attributes say how it
    behaves; those that note what has come are of the class too, since commands make the object.

    Attributes:
        has_chat_template: whether there is one
        error: what generating raises
        start_error: what starting raises
        gap_s: how long each word of a stream takes
    """

    made: dict[str, Any] = {}  # noqa: RUF012
    has_chat_template = True
    error: BaseException | None = None
    start_error: BaseException | None = None
    gap_s = 0.0

    def __init__(
        self, *, on_phase: Callable[[int, str], None] | None = None, **settings: Any
    ) -> None:
        if self.start_error is not None:
            raise self.start_error
        type(self).made = {"settings": settings, "prompts": [], "closed": False}
        self.closed = False
        for phase in ("importing torch", "loading weights"):
            for rank in range(2):
                if on_phase:
                    on_phase(rank, phase)

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *error: object) -> None:
        type(self).made["closed"] = True

    def get_tokenizer(self) -> "StandIn":
        return self

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.6, top_k=20, max_tokens=5)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        if not self.has_chat_template:
            raise ValueError("there is no chat template")
        return "".join(f"[{message['role']}: {message['content']}]" for message in messages)

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        assert not add_special_tokens, "the chat template writes them"
        return [list(map(ord, text)) for text in texts]

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> list[RequestOutput]:
        [prompt] = prompts
        text = self._take(prompt, params)
        outputs = [CompletionOutput(i, text, [1], "stop") for i in range(params.n)]
        return [RequestOutput("0", text, [1, 2], outputs, finished=True)]

    def generate_stream(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        text = self._take(prompt, params)
        words = text.split(" ")
        for i, word in enumerate(words):
            time.sleep(self.gap_s)
            new = [CompletionOutput(0, word + " " * (i + 1 < len(words)), [1])]
            yield RequestOutput("0", text, [1, 2], new, finished=i + 1 == len(words))

    def _take(self, prompt: Any, params: SamplingParams) -> str:
        if self.error is not None:
            raise self.error
        made = type(self).made
        text = "".join(map(chr, prompt["prompt_token_ids"])) if isinstance(prompt, dict) else prompt
        made["params"] = params
        made["prompts"].append(text)
        return text
