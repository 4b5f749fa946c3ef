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
            on_phase=lambda rank, phase: connection.send(
                {"type": "phase", "rank": rank, "phase": phase}
            ),
        )
        _Engine(coordinator, compiling, connection).run()
        exit_code = 0
    except EOFError:  # the caller has ended
        pass
    except BaseException as error:
        connection.send(messages.error(error))
    connection.flush(_FLUSH_TIMEOUT_S)
    os._exit(exit_code)  # without destructors: all resources have been released


class _Engine:
    """Serves the messages of one connection."""

    def __init__(
        self, coordinator: Coordinator, compiling: CompilingRequests, connection: Connection
    ) -> None:
        self._coordinator = coordinator
        self._compiling = compiling
        self._connection = connection

    def run(self) -> None:
        """Run steps, and handle messages between them, until the caller shuts the engine down."""
        engine, compiling, connection = self._coordinator, self._compiling, self._connection
        try:
            ready = {"worker_pids": engine.worker_pids, "max_total_tokens": engine.max_total_tokens}
            connection.send({"type": "ready", **ready})
            while True:
                if not (engine.num_unfinished or engine.num_in_flight):
                    engine.sleep_until_readable(connection.fileno(), compiling.fileno())
                for message in connection.receive(timeout_s=0):
                    if message["type"] == "shutdown":
                        return
                    self._handle(message)
                for requests, error in compiling.take():
                    self._add(requests, error)
                if updates := engine.step():
                    connection.send(messages.updates(updates))
        finally:
            engine.close()

    def _handle(self, message: Message) -> None:
        kind = message["type"]
        if kind == "add":
            requests = messages.read_add(message)
            params = requests[0].sampling_params.structured_outputs
            if params is None:
                self._add(requests)
            else:
                self._compiling.add(requests, params)
        elif kind == "abort":  # the caller expects no updates of these
            self._compiling.abort(message["request_ids"])
            self._coordinator.abort(message["request_ids"])
        elif kind == "alive":
            self._connection.send(message)
        else:
            assert kind == "stats", f"a message of unknown type {kind!r}"
            stats = self._coordinator.engine_stats()
            self._connection.send(messages.stats(message["number"], stats))

    def _add(self, requests: list[AddRequest], error: str | None = None) -> None:
        """Add all requests of one prompt, or refuse them: because of `error`, if it is known."""
        try:
            if error is not None:
                raise ValueError(error)
            self._coordinator.check(requests[0])  # the others differ only in their seeds
        except ValueError as refusal:
            ids = [request.request_id for request in requests]
            self._connection.send({"type": "refused", "request_ids": ids, "error": str(refusal)})
        else:
            self._coordinator.add(requests)


if __name__ == "__main__":
    main()
