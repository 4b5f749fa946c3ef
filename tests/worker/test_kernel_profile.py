"""The summary of a trace of some steps."""

from tpllm.worker.kernel_profile import busy_and_gaps


def test_only_gaps_inside_of_steps_count() -> None:
    kernels = [
        (0, 10, "Memcpy HtoD (Pinned -> Device)"),
        (50, 5, "index_copy"),
        (90, 10, "_gather_decode_inputs_kernel"),
        (103, 20, "nvjet"),  # after 3
        (120, 10, "launched early"),  # while the kernel before still runs
        (132, 8, "_best_candidate_kernel"),  # after 2
        (150, 5, "Memcpy DtoH (Device -> Pinned)"),
        (300, 10, "_gather_decode_inputs_kernel"),
        (311, 9, "nvjet"),  # after 1
    ]
    busy = 10 + 5 + 10 + 27 + 8 + 5 + 10 + 9
    assert busy_and_gaps(kernels) == (busy, 3 + 2 + 1)
    assert busy_and_gaps([]) == (0, 0)
