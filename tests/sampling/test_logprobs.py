import pytest
import torch

from tpllm.parallel.group import TPGroup
from tpllm.sampling.logprobs import token_logprobs
from tpllm.sampling.token_order import scores_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("k", [0, 1, 20])
@pytest.mark.parametrize("num_rows, vocab_size", [(1, 20), (4, 3001)])
def test_logprobs_and_ranks_are_those_of_a_log_softmax(
    num_rows: int, vocab_size: int, k: int, device_and_dtype: tuple[torch.device, torch.dtype]
) -> None:
    device, dtype = device_and_dtype
    rng = torch.Generator().manual_seed(vocab_size)
    logits = (5 * torch.randn(num_rows, vocab_size + 3, generator=rng)).to(device, dtype)
    token_ids = torch.randint(0, vocab_size, (num_rows,), generator=rng).int().to(device)
    scores = scores_of(logits, 0, vocab_size)  # padding does not count
    words = token_logprobs(scores, token_ids, k, 0, TPGroup.single(device))
    assert words.shape == (num_rows, 3 + 2 * k)

    exact = torch.log_softmax(logits[:, :vocab_size].double(), dim=1)
    order = torch.sort(exact, dim=1, descending=True, stable=True)
    ranks = (order.indices == token_ids.unsqueeze(1)).nonzero()[:, 1] + 1
    ids = torch.cat([token_ids.unsqueeze(1), order.indices[:, :k]], dim=1)
    assert words[:, 0].tolist() == ranks.tolist()
    assert words[:, 1 : 2 + k].tolist() == ids.tolist()
    logprobs = words[:, 2 + k :].contiguous().view(torch.float32)
    torch.testing.assert_close(logprobs.double(), exact.gather(1, ids), rtol=0, atol=2e-6)


def test_of_equal_logits_the_lower_id_is_the_likelier(device: torch.device) -> None:
    logits = torch.zeros(3, 100, device=device)
    logits[:, 60] = 1.0
    token_ids = torch.tensor([60, 0, 99], dtype=torch.int32, device=device)
    words = token_logprobs(scores_of(logits, 0, 100), token_ids, 4, 0, TPGroup.single(device))
    assert words[:, 0].tolist() == [1, 2, 100]
    assert words[:, 2:6].tolist() == [[60, 0, 1, 2]] * 3
