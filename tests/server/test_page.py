"""The built-in page in a real browser: it chats, watches the engine, and asks for the key."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaks import wait_until
from tests.server.chromium import Chromium, find_chromium
from tests.server.conftest import Served, running_server
from tests.server.fake_engine import FakeEngine

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_chromium() is None, reason="there is no Chromium on PATH to show the page in"
    ),
]

ANSWER = """<think>
How is a layer split?
</think>

**By columns**, then by `rows`:

```python
llm = LLM(tensor_parallel_size=2)
```
<b>not bold</b>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = find_chromium()
    assert path is not None
    with Chromium(path, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def served() -> Iterator[Served]:
    """A server for each test, since the browser keeps its connections open."""
    with running_server(FakeEngine) as served:
        yield served


@pytest.fixture
def page(browser: Chromium, served: Served) -> Iterator[Chromium]:
    """The page, once it is ready; its console must have no errors."""
    browser.complaints.clear()
    browser.open(f"{served.url}/")
    browser.until("document.getElementById('state').textContent === 'ready'")
    yield browser
    assert browser.complaints == []
    browser.open("about:blank")


def ask(page: Chromium, text: str) -> None:
    page.type(text)
    page.press("Enter")


def answered(page: Chromium, num_turns: int) -> None:
    page.until(f"document.querySelectorAll('.assistant .facts').length === {num_turns}")


def test_an_answer_streams_with_its_thinking_apart(page: Chromium, served: Served) -> None:
    served.engine.reply = ANSWER
    ask(page, "How is a layer split?")
    answered(page, 1)
    assert page.text(".user .body") == "How is a layer split?"
    assert page.text(".thinking summary") == "Thought"
    assert page.text(".thinking div") == "How is a layer split?"
    assert page.text(".assistant .body strong") == "By columns"
    assert page.text(".assistant .body > code") == "rows"
    assert page.text(".assistant pre code") == "llm = LLM(tensor_parallel_size=2)"
    assert "<b>not bold</b>" in page.text(".assistant .body")  # text is never taken for HTML
    assert page.js("document.querySelector('.assistant .body b')") is None
    tokens = len(ANSWER)
    assert page.text(".facts").startswith(f"{tokens} tokens · ")
    ask(page, "And then?")
    answered(page, 2)
    sent = served.engine.tokenizer.rendered[1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    page.click("#new")
    assert page.js("document.querySelectorAll('.turn').length") == 0


def test_text_shows_while_it_comes_and_can_be_stopped(page: Chromium, served: Served) -> None:
    served.engine.reply, served.engine.step_s = "word " * 300, 0.02
    ask(page, "Go on")
    page.until("document.querySelector('.assistant .body').textContent.length > 20")
    assert page.text("#send") == "Stop"
    page.click("#send")
    assert wait_until(lambda: len(served.engine.gone) == 1)
    answered(page, 1)
    assert page.text(".facts").endswith("stopped")
    assert len(page.text(".assistant .body")) < len(served.engine.reply)
    assert page.text("#send") == "Send"


def test_settings_reach_the_engine(page: Chromium, served: Served) -> None:
    page.js(
        "for (const [id, value] of Object.entries({temperature: 0.3, top_p: 0.8, max_tokens: 7,"
        " seed: 5, system: 'Be kind'})) document.getElementById(id).value = value"
    )
    page.click("#thinking")
    ask(page, "Hello there")
    answered(page, 1)
    params = served.engine.seen[0][1]
    assert (params.temperature, params.top_p) == (0.3, 0.8)
    assert (params.max_tokens, params.seed) == (7, 5)
    rendered = served.engine.tokenizer.rendered[0]
    assert rendered["messages"][0] == {"role": "system", "content": "Be kind"}
    assert rendered["chat_template_kwargs"] == {"enable_thinking": False}
    assert "cut off" in page.text(".facts")


def test_an_error_is_shown(page: Chromium, served: Served) -> None:
    page.js("document.getElementById('max_tokens').value = 5000")
    ask(page, "Hello")
    page.until("document.querySelector('[role=alert]') !== null")
    assert "max_tokens=5000 are more than this model's limit" in page.text("[role=alert]")
    page.js("document.getElementById('max_tokens').value = ''")
    page.until("document.getElementById('send').textContent === 'Send'")
    ask(page, "Hello again")
    answered(page, 1)
    rendered = served.engine.tokenizer.rendered[-1]["messages"]
    assert rendered == [{"role": "user", "content": "Hello again"}]
    assert [line for line in page.complaints if "400" not in line] == []
    page.complaints.clear()  # the browser itself notes a status of 400


def test_the_engine_is_watched_live(page: Chromium, served: Served) -> None:
    assert page.text("#model") == "fake"
    page.until("document.querySelectorAll('#ranks .good').length === 2")
    assert page.text("#running") == "0 of 4"
    assert page.text("#cache") == "25 %"
    served.engine.reply, served.engine.step_s = "word " * 300, 0.01
    ask(page, "Go on")
    page.until("document.getElementById('running').textContent === '1 of 4'")
    page.until("parseInt(document.getElementById('generated').textContent) > 0")
    assert "L" in page.js("document.querySelector('#chart-generated .line').getAttribute('d')")
    page.click("#send")
    page.until("document.getElementById('running').textContent === '0 of 4'")


def test_everything_can_be_reached_and_is_named(page: Chromium) -> None:
    unnamed = page.js(
        "[...document.querySelectorAll('button, input, textarea')].filter(each =>"
        " !each.textContent.trim() && !each.labels?.length).map(each => each.id)"
    )
    assert unnamed == []
    assert page.js("document.activeElement.id") == "prompt"
    page.press("Tab")
    assert page.js("document.activeElement.id") == "send"
    for scheme in ("light", "dark"):
        page.appear(scheme)
        contrast = page.js(CONTRAST)
        assert min(contrast) >= 4.5, (scheme, contrast)


# Contrast of text with what is behind it, as WCAG measures it, for each pair of colours in use.
CONTRAST = """(() => {
  const style = getComputedStyle(document.documentElement);
  const light = name => {
    const value = style.getPropertyValue(name).trim();
    const parts = [1, 3, 5].map(i => parseInt(value.slice(i, i + 2), 16) / 255)
      .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const pairs = [['--ink', '--ground'], ['--ink', '--tint'], ['--soft', '--ground'],
    ['--soft', '--surface'], ['--on-accent', '--accent'], ['--bad', '--bad-tint'],
    ['--ink', '--raised'], ['--surface', '--bad']];
  return pairs.map(([a, b]) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  });
})()"""


def test_the_key_is_asked_for_until_it_is_right(browser: Chromium) -> None:
    with running_server(FakeEngine, api_key="right") as served:
        browser.open(f"{served.url}/")
        browser.until("document.getElementById('ask-key').open")
        browser.type("wrong")
        browser.press("Enter")
        browser.until("document.getElementById('key-why').textContent.includes('not the right')")
        browser.until("document.getElementById('ask-key').open")
        browser.type("right")
        browser.press("Enter")
        browser.until("document.getElementById('state').textContent === 'ready'")
        browser.click("#prompt")
        browser.js("document.getElementById('prompt').focus()")
        ask(browser, "abc")
        answered(browser, 1)
        assert all("401" in line for line in browser.complaints)


def test_the_page_reports_a_server_that_is_gone(browser: Chromium, tmp_path: Path) -> None:
    with running_server(FakeEngine) as served:
        browser.open(f"{served.url}/")
        browser.until("document.getElementById('state').textContent === 'ready'")
    browser.until("document.getElementById('state').textContent.includes('cannot be reached')")
    assert browser.js("document.getElementById('dot').className") == "dot bad"
    shot = tmp_path / "page.png"
    browser.screenshot(shot)
    assert shot.read_bytes().startswith(b"\x89PNG")
