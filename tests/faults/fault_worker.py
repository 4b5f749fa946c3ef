"""A worker without torch whose ranks wait for each other in every step, as collectives do.

Otherwise it is `stub_worker`: it starts as the real worker does and performs the acts that it gets.
A rank that dies or stops therefore delays the others, which report no error.
"""

import os
import signal
import time

from tests.supervision.stub_worker import Stub
from tpllm.channel.progress import Board, Progress
from tpllm.channel.ring import RingReader
from tpllm.channel.step_plan import CONTROL
from tpllm.worker.__main__ import Spec, main
from tpllm.worker.replies import Replies


class FaultStub(Stub):
    def __init__(self, spec: Spec, plans: RingReader, replies: Replies) -> None:
        super().__init__(spec, plans, replies)
        # ranks on several hosts have no board in common but this one
        meeting = spec["settings"].get("meeting")
        board = os.open(meeting, os.O_RDWR) if meeting else spec["board"]
        self._board = Board(board)
        self._arrivals = Progress(board, spec["rank"])

    def act_take(self) -> None:
        """Take a record and begin its step if it is one, but do not finish it."""
        record = self._plans.receive()
        assert record is not None
        if record.kind != CONTROL:
            self._progress.begin(self._num_steps)

    def act_beat(self) -> None:
        self._progress.beat()

    def act_stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def between_begin_and_end(self) -> None:
        self._arrivals.beat()
        while self._board.beats() < (self._num_steps + 1) * self._spec["world_size"]:
            time.sleep(0.001)


def serve(spec: Spec, plans: RingReader, replies: Replies) -> None:
    FaultStub(spec, plans, replies).perform()


if __name__ == "__main__":
    main(serve)
