"""What a streamed answer tells of its tokens, as `stream_options` ask for it."""

from collections.abc import Iterator
from typing import Any

from tpllm.server.generation import Generation
from tpllm.server.protocol import StreamOptions


class StreamedUsage:
    """Nothing; the sum in a last chunk of its own; or, vLLM's addition, the sum in every chunk."""

    def __init__(self, options: StreamOptions | None) -> None:
        self._at_end = bool(options and options.include_usage)
        self._always = bool(options and options.continuous_usage_stats)

    def chunk(
        self, head: dict[str, Any], choice: dict[str, Any], generation: Generation
    ) -> dict[str, Any]:
        """A chunk with one choice."""
        chunk = {**head, "choices": [choice]}
        if self._always:
            chunk["usage"] = generation.usage()
        elif self._at_end:
            chunk["usage"] = None
        return chunk

    def last(self, head: dict[str, Any], generation: Generation) -> Iterator[dict[str, Any]]:
        """The chunk after all choices, if one is wanted."""
        if self._at_end:
            yield {**head, "choices": [], "usage": generation.usage()}
