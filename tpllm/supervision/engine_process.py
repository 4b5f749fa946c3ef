"""The engine in a process of its own: `python -m tpllm.supervision.engine_process FD`.

Started by `EngineClient` alone. The workers are children of this process, and all are tied: whoever
ends, the others notice and end too. Between two steps it reads what callers want; without requests
it sleeps. Grammars are tried and compiled in a thread, and their requests join the others then.
"""

import os
import socket
import sys
from typing import NoReturn

from tpllm.channel.child_process import read_spec, tie_to_parent
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.compiling import CompilingRequests
from tpllm.engine.coordinator import Coordinator
from tpllm.engine.request import AddRequest
from tpllm.supervision import messages
from tpllm.supervision.connection import Connection, Message
from tpllm.supervision.start import engine_grammars, start_engine

_FLUSH_TIMEOUT_S = 5.0


def main() -> NoReturn:
    """Run an engine until its caller ends it, is gone, or a worker fails."""
    spec = read_spec(int(sys.argv[1]))
    tie_to_parent(spec["parent"])  # as the workers are to this process
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
            on_phase=lambda *phase: _tell_phase(connection, *phase),
        )
        _run(coordinator, compiling, connection)
        exit_code = 0
    except EOFError:  # the caller is gone: there is nobody to tell
        pass
    except BaseException as error:
        connection.send(messages.error(error))
    connection.flush(_FLUSH_TIMEOUT_S)
    os._exit(exit_code)  # no destructors: everything has been given back


def _tell_phase(connection: Connection, rank: int, phase: str) -> None:
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
        form = requests[0].sampling_params.structured_outputs
        if form is None:
            _add(requests, coordinator, connection)
        else:
            compiling.add(requests, form)
    elif kind == "abort":
        compiling.abort(message["request_ids"])
        coordinator.abort(message["request_ids"])  # whoever asked for it waits for no news
    elif kind == "alive":
        connection.send(message)
    else:
        assert kind == "stats", f"a message of unknown type {kind!r}"
        connection.send(messages.stats(message["number"], coordinator.engine_stats()))


def _add(requests: list[AddRequest], coordinator: Coordinator, connection: Connection) -> None:
    try:
        coordinator.check(requests[0])  # the others differ in their seeds alone
    except ValueError as error:
        _refuse(requests, str(error), connection)
    else:
        coordinator.add(requests)


def _refuse(requests: list[AddRequest], error: str, connection: Connection) -> None:
    ids = [request.request_id for request in requests]  # the continuations of one prompt
    connection.send({"type": "refused", "request_ids": ids, "error": error})


if __name__ == "__main__":
    main()
