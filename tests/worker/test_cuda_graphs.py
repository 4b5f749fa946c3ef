"""The batch sizes that have a graph."""

import pytest

from tpllm.worker.cuda_graphs import (
    MAX_CHUNKS,
    StepSize,
    decode_sizes,
    mixed_sizes,
    padded_size,
)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 32, 33, 100, 256, 300, 1024])
def test_every_batch_size_is_served_with_little_padding(max_num_seqs: int) -> None:
    sizes = decode_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    steps = [StepSize(size, size, 0) for size in sizes]
    for among in (steps, sorted(steps + mixed_sizes(16384, max_num_seqs))):
        for batch_size in range(1, max_num_seqs + 1):
            step = padded_size(among, StepSize(batch_size, batch_size, 0))
            assert step is not None and step.num_chunks == 0
            assert batch_size <= step.num_decode < batch_size + 32
            assert step.num_decode <= 2 * batch_size


@pytest.mark.parametrize("max_num_seqs", [1, 5, 16, 100, 256, 2000])
@pytest.mark.parametrize("max_num_batched_tokens", [63, 64, 500, 16384])
def test_small_mixed_steps_are_served_by_the_smallest_size_that_holds_them(
    max_num_batched_tokens: int, max_num_seqs: int
) -> None:
    sizes = mixed_sizes(max_num_batched_tokens, max_num_seqs)
    assert sizes == sorted(set(sizes))
    decode = [StepSize(size, size, 0) for size in decode_sizes(max_num_seqs)]
    among = sorted(decode + sizes)
    largest = max((size.num_tokens for size in sizes), default=0)
    assert largest <= max_num_batched_tokens
    for num_tokens in range(2, 1100, 7):
        for num_decode in {0, 1, 17, 65, 255} & set(range(min(num_tokens, max_num_seqs + 1))):
            size = padded_size(among, StepSize(num_tokens, num_decode, 1))
            if num_tokens > largest:
                assert size is None
                continue
            assert size is not None and size.num_decode <= size.num_tokens
            assert size.num_tokens >= num_tokens and size.num_decode >= num_decode
            holding = [
                s for s in sizes if s.num_tokens >= num_tokens and s.num_decode >= num_decode
            ]
            assert size == min(holding)
            # reading the weights bounds small steps, padded or not
            assert size.num_tokens <= num_tokens + max(63, num_tokens // 2)


def test_a_step_with_too_many_chunks_has_no_graph() -> None:
    sizes = [StepSize(1024, 16, MAX_CHUNKS)]
    assert padded_size(sizes, StepSize(100, 5, MAX_CHUNKS)) == sizes[0]
    assert padded_size(sizes, StepSize(100, 5, MAX_CHUNKS + 1)) is None
