"""Messages of a worker arrive, for every length and all characters."""

import json

import pytest

from tpllm.channel.ring import RingReader, RingWriter, create_ring
from tpllm.channel.step_plan import CONTROL
from tpllm.worker.replies import Replies


@pytest.mark.parametrize("character", ["x", "\n", "é", "語", "🙂", "\udce9"])
def test_the_end_of_a_long_traceback_arrives(character: str) -> None:
    descriptors = create_ring(1, 2, 4096)
    writer, reader = RingWriter(descriptors), RingReader(descriptors, 0)
    try:
        Replies(writer).error(character * 20_000 + " the cause", setting=True)
        record = reader.try_receive()
        assert record is not None and record.kind == CONTROL
        message = json.loads(record.payload.tobytes())
        assert message["error"].endswith("the cause") and message["setting"]
    finally:
        writer.close()
        reader.close()
        descriptors.close()
