"""ServerSettings: accepted and refused values, and the checkpoint's defaults."""

from typing import Any

import pytest

from tests.server.conftest import running_server
from tests.server.fake_engine import FakeEngine
from tpllm.errors import UnknownSettingError
from tpllm.server import ServerSettings


def test_the_defaults_allow_no_other_machine() -> None:
    settings = ServerSettings()
    assert settings.host == "127.0.0.1" and settings.is_local
    assert settings.cors_origins == () and settings.log_requests is False
    assert ServerSettings(host="tpllm.localhost").is_local
    assert not ServerSettings(host="0.0.0.0").is_local


def test_names_and_origins_are_kept_as_tuples() -> None:
    settings = ServerSettings(served_model_name="a", cors_origins=["http://localhost:3000", "*"])
    assert settings.served_model_name == ("a",)
    assert settings.cors_origins == ("http://localhost:3000", "*")
    assert ServerSettings(allowed_hosts=["LLM.example.org."]).allowed_hosts == ("llm.example.org",)
    hash(settings)


@pytest.mark.parametrize("given", ["a,b", "a, b", ["a", "b"], ["a,b"], ("a", "b")])
def test_several_texts_may_stand_between_commas(given: Any) -> None:
    assert ServerSettings(served_model_name=given).served_model_name == ("a", "b")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"port": 70000}, "port=70000 must be at most 65535"),
        ({"port": "8000"}, "port='8000' must be a whole number"),
        ({"host": ""}, "host='' must be an address"),
        ({"max_queue": -1}, "max_queue=-1 must be at least 0"),
        ({"max_logprobs": 21}, "max_logprobs=21 must be at most 20"),
        ({"request_timeout_s": 0}, "request_timeout_s=0 must be more than 0 and at most 604800"),
        ({"drain_timeout_s": float("inf")}, "drain_timeout_s=inf must be finite"),
        ({"page": 1}, "page=1 must be True or False"),
        ({"served_model_name": []}, "served_model_name=.. is empty"),
        ({"served_model_name": [""]}, "served_model_name holds ''"),
        ({"served_model_name": "a,,b"}, "served_model_name holds 'a,,b'"),
        ({"served_model_name": "a,"}, "served_model_name holds 'a,'"),
        ({"served_model_name": [5]}, "served_model_name holds 5"),
        (
            {"cors_origins": ["example.org"]},
            r"cors_origins\[0\]='example.org' is not an origin; give only scheme, host and port",
        ),
        ({"cors_origins": ["https://example.org/"]}, "is not an origin"),
        (
            {"allowed_hosts": ["http://a.org"]},
            r"allowed_hosts\[0\]='http://a.org' is not a host name",
        ),
        ({"allowed_hosts": ["a.org:8000"]}, "give only the name, without scheme and port"),
        ({"cors_origins": 5}, "cors_origins=5 must be a string, or a list of strings"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerSettings(**wrong)


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", b"bytes"])
def test_a_wrong_key_is_refused_without_being_shown(key: Any) -> None:
    with pytest.raises(ValueError, match="^api_key must be") as refused:
        ServerSettings(api_key=key)
    assert not key or repr(key) not in str(refused.value)


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownSettingError, match="did you mean 'max_queue'"):
        ServerSettings(max_queues=1)  # type: ignore[call-arg]


def test_fields_that_are_left_out_have_the_checkpoints_defaults() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "max_tokens": 50}
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    with running_server(lambda: FakeEngine(defaults=defaults)) as served, served.http() as http:
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", {**chat, "temperature": 0.1, "max_tokens": 3}),
            ("/v1/completions", {"prompt": "x"}),
        ):
            assert http.post(path, json=body).status_code == 200
        seen = [params for _, params in served.engine.seen]
    assert [params.temperature for params in seen] == [0.6, 0.1, 0.6]
    assert [params.max_tokens for params in seen] == [50, 3, 16]
    assert {params.top_k for params in seen} == {20}


def test_several_answers_are_sampled_even_if_the_checkpoint_is_greedy() -> None:
    with running_server(lambda: FakeEngine(defaults={"temperature": 0})) as served:
        with served.http() as http:
            for n in (1, 2):
                body = {"model": "fake", "prompt": "a", "n": n}
                assert http.post("/v1/completions", json=body).status_code == 200
        assert [params.temperature for _, params in served.engine.seen] == [0, 1]


def test_the_servers_limit_applies_to_the_checkpoints_defaults() -> None:
    def engine() -> FakeEngine:
        return FakeEngine(defaults={"max_tokens": 50})

    chat = {"messages": [{"role": "user", "content": "hello"}]}
    with running_server(engine, max_output_tokens=3) as served, served.http() as http:
        assert http.post("/v1/chat/completions", json=chat).status_code == 200
        assert served.engine.seen[0][1].max_tokens == 3


def test_answers_have_a_maximum_length() -> None:
    with running_server(max_output_tokens=3) as served, served.http() as http:
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        assert http.post("/v1/chat/completions", json=chat).status_code == 200
        assert served.engine.seen[0][1].max_tokens == 3
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert served.engine.seen[1][1].max_tokens == 3
        refused = http.post("/v1/chat/completions", json={**chat, "max_tokens": 4})
        assert refused.json()["error"]["message"] == "max_tokens=4 must be at most 3"
