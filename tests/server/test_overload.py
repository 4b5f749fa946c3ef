"""A full queue, requests that take too long, a failed engine, and shutdown."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError
from contextlib import suppress
from typing import Any

import httpx
import pytest
from openai import APIError, InternalServerError, RateLimitError

from tests.leaks import wait_until
from tests.server.conftest import Served, running_server
from tests.server.fake_engine import FakeEngine
from tests.server.test_http import CHAT, HELLO, error_of, head
from tpllm.server import ServerSettings, responses, serve, serving
from tpllm.server.admission import Admission
from tpllm.server.json_turns import to_json_in_turns
from tpllm.server.serving import listening_socket


def small() -> FakeEngine:
    return FakeEngine(max_num_seqs=1)


def test_a_full_queue_answers_429_and_running_requests_continue() -> None:
    with running_server(small, max_queue=2) as served, served.http() as http:
        served.hold()
        with ThreadPoolExecutor(3) as pool:
            inside = [pool.submit(http.post, CHAT, json=HELLO) for _ in range(3)]
            assert wait_until(lambda: served.engine.num_running == 3)
            refused = http.post(CHAT, json=HELLO)
            error = error_of(refused, 429)
            assert error["type"] == "rate_limit_error" and error["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            with served.openai() as client, pytest.raises(RateLimitError):
                client.completions.create(model="fake", prompt="x", stream=True)
            assert http.get("/health").status_code == 200
            served.go_on()
            assert all(each.result().status_code == 200 for each in inside)
        assert http.post(CHAT, json=HELLO).status_code == 200
        too_many = http.post("/v1/completions", json={"prompt": "x", "n": 4})
        assert "more than the 3 that this server holds" in error_of(too_many, 400)["message"]
        metrics = http.get("/metrics").text
        assert f'tpllm_requests_total{{outcome="overloaded",path="{CHAT}"}} 1.0' in metrics


def test_a_request_that_takes_too_long_is_ended() -> None:
    with running_server(request_timeout_s=0.3) as served, served.http() as http:
        served.hold()
        error = error_of(http.post(CHAT, json=HELLO), 504)
        assert error["code"] == "timeout" and "0.3 s" in error["message"]
        with served.openai() as client, pytest.raises(InternalServerError) as ended:
            client.completions.create(model="fake", prompt="x")
        assert ended.value.response.headers["x-should-retry"] == "false"
        assert wait_until(lambda: served.engine.num_running == 0)
        served.go_on()
        served.engine.reply, served.engine.step_s = "x" * 300, 0.05
        with served.openai() as client, pytest.raises(APIError, match="longer than"):
            for _ in client.completions.create(
                model="fake", prompt="x", max_tokens=300, stream=True
            ):
                pass
        assert len(served.engine.gone) == 3
        assert 'outcome="timeout"' in http.get("/metrics").text


def test_a_failed_engine_is_reported_to_every_client_and_ends_the_server() -> None:
    with running_server() as served, served.http() as http:
        served.hold()
        with ThreadPoolExecutor(2) as pool:
            waiting = [
                pool.submit(http.post, CHAT, json={**HELLO, "stream": stream})
                for stream in (False, True)
            ]
            assert wait_until(lambda: served.engine.num_running == 2)
            served.call(served.engine.die)
            for each in waiting:
                error = error_of(each.result(), 503)
                assert error["message"] == "the engine has failed: worker rank 1 died in step 7"
                assert error["code"] == "engine_failed"
        assert served.exit_code.result(30) == 1
        assert served.engine.is_closed


def test_a_failed_engine_shows_in_health_and_refuses_requests() -> None:
    async def answers() -> list[httpx.Response]:
        from tpllm.server import build_app

        engine: Any = FakeEngine()
        engine.die()
        transport = httpx.ASGITransport(build_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return [
                await http.get("/health"),
                await http.post(CHAT, json=HELLO),
                await http.get("/metrics"),
            ]

    health, chat, metrics = asyncio.run(answers())
    assert health.status_code == 503
    assert health.json()["status"] == "the engine has failed: worker rank 1 died in step 7"
    assert "secret" not in health.text
    assert error_of(chat, 503)["code"] == "engine_failed"
    assert "tpllm_engine_up 0.0" in metrics.text


def test_a_failure_in_the_middle_of_a_stream_is_an_event() -> None:
    with running_server() as served, served.openai() as client:
        served.engine.reply, served.engine.step_s = "x" * 300, 0.02
        stream = client.completions.create(model="fake", prompt="x", max_tokens=300, stream=True)
        next(iter(stream))
        served.call(served.engine.die)
        with pytest.raises(APIError, match="the engine has failed"):
            list(stream)


def test_a_bug_of_the_server_is_reported_without_details(caplog: pytest.LogCaptureFixture) -> None:
    with running_server() as served, served.openai() as client:
        served.engine.generate = None
        with pytest.raises(InternalServerError, match="in an unexpected way") as failed:
            client.completions.create(model="fake", prompt="x")
        assert "NoneType" not in str(failed.value)
        assert "NoneType" in caplog.text


def test_a_panic_in_rust_is_reported_as_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):  # as pyo3_runtime.PanicException
        pass

    def panic(*args: object) -> None:
        raise Panic("index out of bounds")

    with running_server() as served, served.http() as http:
        monkeypatch.setattr(served.engine.tokenizer, "encode_batch", panic)
        for stream in (False, True):
            failed = http.post("/v1/completions", json={"prompt": "x", "stream": stream})
            assert "in an unexpected way" in error_of(failed, 500)["message"]
        assert http.get("/health").status_code == 200


def test_a_drain_finishes_running_requests_and_refuses_new_ones() -> None:
    with running_server(drain_timeout_s=30) as served, served.http() as http:
        served.hold()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(http.post, CHAT, json=HELLO)
            assert wait_until(lambda: served.engine.num_running == 1)
            served.call(served.stop.set)
            assert wait_until(lambda: http.get("/health").status_code == 503)
            assert http.get("/health").json()["status"] == "shutting down"
            refused = http.post(CHAT, json=HELLO)
            assert error_of(refused, 503)["code"] == "shutting_down"
            assert refused.headers["retry-after"] == "1"
            served.go_on()
            assert running.result().status_code == 200
        assert served.exit_code.result(30) == 0


def test_a_drain_ends_what_runs_longer_than_its_time() -> None:
    with running_server(drain_timeout_s=0.1) as served, served.http() as http:
        served.hold()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(http.post, CHAT, json=HELLO)
            assert wait_until(lambda: served.engine.num_running == 1)
            served.call(served.stop.set)
            assert error_of(running.result(), 503)["code"] == "shutting_down"
        assert served.exit_code.result(30) == 0
        assert len(served.engine.gone) == 1


def test_a_drain_waits_for_an_answer_that_is_being_written(monkeypatch) -> None:
    written = threading.Event()

    async def slowly(content: object) -> list[bytes]:
        await asyncio.to_thread(written.wait)
        return await to_json_in_turns(content)

    monkeypatch.setattr(responses, "to_json_in_turns", slowly)
    with running_server(drain_timeout_s=60) as served, served.http() as http:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(http.post, CHAT, json=HELLO)
            assert wait_until(lambda: len(served.engine.seen) == 1)
            assert wait_until(lambda: served.engine.num_running == 0)
            served.call(served.stop.set)
            assert wait_until(lambda: http.get("/health").status_code == 503)
            with pytest.raises(FuturesTimeoutError):
                served.exit_code.result(0.5)
            written.set()
            assert running.result().status_code == 200
        assert served.exit_code.result(30) == 0


PATIENT: dict[str, Any] = {"drain_timeout_s": 600, "client_timeout_s": 600}


def large_answer(served: Served, *, stream: bool) -> socket.socket:
    """A connection with the first byte of an answer that is larger than all buffers on its way."""
    served.engine.reply, served.engine.chars_per_step = "x" * 1900, 1900
    body = {"prompt": "x", "n": 60, "max_tokens": 1900, "logprobs": 5, "stream": stream}
    return begun_answer(served, body)


def quick_answer(served: Served, *, stream: bool) -> socket.socket:
    """The same, of 600 sequences: 14 MB, quickly generated: 12 bytes of JSON for each character."""
    served.engine.reply, served.engine.chars_per_step = "\U0001f600" * 1900, 1900
    body = {"prompt": "x", "n": 600, "max_tokens": 1900, "stream": stream}
    return begun_answer(served, body)


def begun_answer(served: Served, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
    sock.connect(("127.0.0.1", served.port))
    sock.sendall(head("/v1/completions", len(data)) + data)
    assert sock.recv(1)
    return sock


@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_does_not_wait_for_a_client_that_does_not_read(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "STALLED_S", 0.5)
    with running_server(**PATIENT) as served, large_answer(served, stream=stream):
        served.call(served.stop.set)
        assert served.exit_code.result(60) == 0
    assert "Traceback" not in caplog.text


def test_a_drain_waits_for_a_client_that_reads_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LAST_ANSWERS_S", 0.1)
    monkeypatch.setattr(serving, "STALLED_S", 1.0)
    with running_server(**PATIENT) as served, large_answer(served, stream=False) as sock:
        served.call(served.stop.set)
        answer, begin = bytearray(), time.monotonic()
        while part := sock.recv(1 << 14):
            answer += part
            if time.monotonic() - begin < 2.5:  # twice as long as a client may pause
                time.sleep(0.02)
        assert answer.endswith(b"}}}")
        assert served.exit_code.result(60) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_of_a_request_covers_the_reading_of_its_answer(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(responses, "LAST_EVENT_S", 0.1)
    with running_server(client_timeout_s=600, request_timeout_s=1.5, max_n=600) as served:
        with quick_answer(served, stream=stream) as sock, served.http() as http:

            def is_over() -> bool:
                sock.recv(10)
                return 'outcome="timeout"' in http.get("/metrics").text

            assert wait_until(is_over)
            assert "tpllm_server_sequences 0.0" in http.get("/metrics").text
            num_read = 0
            with suppress(ConnectionError):
                while part := sock.recv(2**20):
                    num_read += len(part)
            assert 2**18 < num_read < 10 * 2**20
        assert wait_until(lambda: served.engine.num_running == 0)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_reads_keeps_its_place_in_the_queue(stream: bool) -> None:
    settings = {**PATIENT, "max_n": 600, "max_queue": 2}
    with running_server(lambda: FakeEngine(max_num_seqs=600), **settings) as served:
        with quick_answer(served, stream=stream), served.http() as http:
            if not stream:  # it is whole, and waits for its client
                assert wait_until(lambda: served.engine.num_running == 0)
            assert "tpllm_server_sequences 600.0" in http.get("/metrics").text
            body = {"prompt": "x", "n": 3}
            refused = http.post("/v1/completions", json=body)
            assert error_of(refused, 429)["code"] == "queue_full"
        with served.http() as http:
            assert wait_until(lambda: "server_sequences 0.0" in http.get("/metrics").text)
            assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("twice", [False, True])
def test_one_signal_drains_and_two_end_at_once(number: int, twice: bool) -> None:
    """In the main thread, where signals arrive; the client is in another."""
    settings = ServerSettings(port=0, drain_timeout_s=60)
    codes: list[Any] = []

    def client(port: int, engine: FakeEngine, go_on: Any) -> None:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=30) as http, ThreadPoolExecutor(1) as pool:
            running = pool.submit(http.post, CHAT, json=HELLO)
            assert wait_until(lambda: engine.num_running == 1)
            os.kill(os.getpid(), number)
            assert wait_until(lambda: http.get("/health").status_code == 503)
            if twice:
                os.kill(os.getpid(), number)
            else:
                go_on()
            codes.append(running.result().status_code)

    async def main(sock: Any) -> int:
        engine: Any = FakeEngine()
        engine.hold.clear()
        loop = asyncio.get_running_loop()

        def go_on() -> None:
            loop.call_soon_threadsafe(engine.hold.set)

        args = (sock.getsockname()[1], engine, go_on)
        thread = threading.Thread(target=client, args=args, name="tpllm-test-client")
        sock.listen()  # connections wait until the server is there
        thread.start()
        code = await serve(engine, settings, sock)
        thread.join(30)
        assert not thread.is_alive()
        return code

    before = signal.getsignal(number)
    with listening_socket(settings) as sock:
        code = asyncio.run(main(sock))
    assert signal.getsignal(number) is before
    assert (code, codes) == ((128 + number, [503]) if twice else (0, [200]))


def test_retry_after_follows_the_speed_of_the_server() -> None:
    async def run() -> tuple[int, int]:
        admission = Admission(1, 60)
        slow = admission._retry_after_s()
        for _ in range(100):
            with admission.enter(1):
                pass
        return slow, admission._retry_after_s()

    assert asyncio.run(run()) == (5, 9)


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with listening_socket(ServerSettings(port=0)) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        taken = f"port={port} of host='127.0.0.1' cannot be bound"
        with pytest.raises(ValueError, match=taken), listening_socket(ServerSettings(port=port)):
            pass
    unknown = "host='no such host' is not an address"
    settings = ServerSettings(host="no such host")
    with pytest.raises(ValueError, match=unknown), listening_socket(settings):
        pass
