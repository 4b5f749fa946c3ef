"""The token counts of a streamed answer, as `stream_options` select them."""

from collections.abc import Iterator
from typing import Any

from tpllm.server.generation import Generation
from tpllm.server.protocol import StreamOptions


class StreamedUsage:
    """Adds token counts to no chunk, to an extra last chunk, or (from vLLM) to every chunk."""

    def __init__(self, options: StreamOptions | None) -> None:
        self._at_end = bool(options and options.include_usage)
        self._always = bool(options and options.continuous_usage_stats)

    def chunk(
        self, head: dict[str, Any], choice: dict[str, Any], generation: Generation
    ) -> dict[str, Any]:
        """Return a chunk with one choice."""
        chunk = {**head, "choices": [choice]}
        if self._always:
            chunk["usage"] = generation.usage()
        elif self._at_end:
            chunk["usage"] = None
        return chunk

    def last(self, head: dict[str, Any], generation: Generation) -> Iterator[dict[str, Any]]:
        """Yield the extra chunk after all choices, if the request asks for it."""
        if self._at_end:
            yield {**head, "choices": [], "usage": generation.usage()}
