"""The engine in a separate process: `python -m tpllm.supervision.engine_process FD`.

`EngineClient` starts it. The workers are its child processes. If any of these processes ends, the
others end too. The engine reads messages between two steps and sleeps while there are no requests.
A thread tries and compiles grammars; their requests are added afterwards.
"""

import os
import socket
from typing import NoReturn

from tpllm.channel.child_process import begin_child
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.compiling import CompilingRequests
from tpllm.engine.coordinator import Coordinator
from tpllm.engine.request import AddRequest
from tpllm.supervision import messages
from tpllm.supervision.connection import Connection, Message
from tpllm.supervision.start import engine_grammars, start_engine

_FLUSH_TIMEOUT_S = 5.0


def main() -> NoReturn:
    """Run an engine until its caller shuts it down or ends, or a worker fails."""
    spec = begin_child()
    connection = Connection(socket.socket(fileno=spec["socket"]))
    exit_code = 1
    try:
        config = EngineConfig.from_json(spec["config"])
        grammars = engine_grammars(config)
        compiling = CompilingRequests(grammars)
        if config.tokenizer_folder is not None:
            compiling.load_tokenizer()  # while the workers start
        coordinator = start_engine(
            config,
            grammars=grammars,
            on_phase=lambda *phase: _send_phase(connection, *phase),
        )
        _run(coordinator, compiling, connection)
        exit_code = 0
    except EOFError:  # the caller has ended
        pass
    except BaseException as error:
        connection.send(messages.error(error))
    connection.flush(_FLUSH_TIMEOUT_S)
    os._exit(exit_code)  # without destructors: all resources have been released


def _send_phase(connection: Connection, rank: int, phase: str) -> None:
    connection.send({"type": "phase", "rank": rank, "phase": phase})


def _run(coordinator: Coordinator, compiling: CompilingRequests, connection: Connection) -> None:
    try:
        connection.send(messages.ready(coordinator.worker_pids, coordinator.max_total_tokens))
        while True:
            if not (coordinator.num_unfinished or coordinator.num_in_flight):
                coordinator.sleep_until_readable(connection.fileno(), compiling.fileno())
            for message in connection.receive(timeout_s=0):
                if message["type"] == "shutdown":
                    return
                _handle(message, coordinator, compiling, connection)
            for requests, error in compiling.take():
                if error is None:
                    _add(requests, coordinator, connection)
                else:
                    _refuse(requests, error, connection)
            updates = coordinator.step()
            if updates:
                connection.send(messages.updates(updates))
    finally:
        coordinator.close()


def _handle(
    message: Message,
    coordinator: Coordinator,
    compiling: CompilingRequests,
    connection: Connection,
) -> None:
    kind = message["type"]
    if kind == "add":
        requests = messages.read_add(message)
        params = requests[0].sampling_params.structured_outputs
        if params is None:
            _add(requests, coordinator, connection)
        else:
            compiling.add(requests, params)
    elif kind == "abort":
        compiling.abort(message["request_ids"])
        coordinator.abort(message["request_ids"])  # the caller expects no updates of these
    elif kind == "alive":
        connection.send(message)
    else:
        assert kind == "stats", f"a message of unknown type {kind!r}"
        connection.send(messages.stats(message["number"], coordinator.engine_stats()))


def _add(requests: list[AddRequest], coordinator: Coordinator, connection: Connection) -> None:
    try:
        coordinator.check(requests[0])  # the others differ only in their seeds
    except ValueError as error:
        _refuse(requests, str(error), connection)
    else:
        coordinator.add(requests)


def _refuse(requests: list[AddRequest], error: str, connection: Connection) -> None:
    ids = [request.request_id for request in requests]  # all requests of one prompt
    connection.send({"type": "refused", "request_ids": ids, "error": error})


if __name__ == "__main__":
    main()
