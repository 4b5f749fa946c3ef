"""docs/server.md lists every metric and field."""

import re
from pathlib import Path

import httpx
import pytest

from tpllm.server.protocol import ChatCompletionRequest, CompletionRequest

DOCS = (Path(__file__).parents[2] / "docs" / "server.md").read_text()


def test_every_metric_is_in_the_table(http: httpx.Client) -> None:
    names = re.findall(r"^# TYPE (\w+) ", http.get("/metrics").text, re.MULTILINE)
    page = re.sub(r"`_waiting`", "`tpllm_sequences_waiting`", DOCS)
    missing = [n for n in names if not n.endswith("_created") and f"`{n}" not in page]
    assert missing == []


@pytest.mark.parametrize("body", [CompletionRequest, ChatCompletionRequest])
def test_every_field_is_named(body: type[CompletionRequest]) -> None:
    not_yet = {"best_of", "suffix", "modalities"}
    names = {name for name in body.model_fields if not name.startswith("guided_")} - not_yet
    assert [name for name in sorted(names) if f"`{name}`" not in DOCS] == []
