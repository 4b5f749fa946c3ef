"""Which batch sizes have a graph."""

import pytest

from tpllm.worker.cuda_graphs import decode_sizes, padded_size


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 32, 33, 100, 256, 300, 1024])
def test_every_batch_size_is_served_with_little_padding(max_num_seqs: int) -> None:
    sizes = decode_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for batch_size in range(1, max_num_seqs + 1):
        size = padded_size(sizes, batch_size)
        assert batch_size <= size < batch_size + 32
        assert size <= 2 * batch_size
