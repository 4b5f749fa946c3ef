from tests.kernel_fixtures import (  # noqa: F401
    assert_as_accurate,
    device,
    device_and_dtype,
    poisoned_memory,
)
