"""Validation of dataclasses by pydantic, in words of our own."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Interval

from tpllm.fields.validation import check_fields


@dataclass(frozen=True)
class Kinds:
    count: Annotated[int | None, Interval(ge=1, le=5)] = None
    share: Annotated[float, Interval(gt=0, le=1)] = 1.0
    mode: Literal["a", "b", "c"] = "a"
    switch: bool = False
    name: str | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    "field, value, kept",
    [
        ("count", np.uint8(5), 5),
        ("share", 1, 1.0),
        ("share", np.float32(0.5), 0.5),
        ("share", Fraction(1, 4), 0.25),
        ("name", Path("/m"), "/m"),
        ("names", ("a", "b"), ("a", "b")),
    ],
)
def test_values_are_kept_as_plain_objects(field: str, value: Any, kept: object) -> None:
    found = getattr(Kinds(**{field: value}), field)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("count", 0, "count=0 must be at least 1"),
        ("count", 6, "count=6 must be at most 5"),
        ("count", True, "count=True must be a whole number"),
        ("count", np.bool_(True), "count=np.True_ must be a whole number"),
        ("count", np.int64(6), "count=6 must be at most 5"),
        ("count", 10**400, "count=1000"),
        ("share", 0, "share=0 must be more than 0 and at most 1"),
        ("share", 2.0, "share=2.0 must be more than 0 and at most 1"),
        ("share", "1", "share='1' must be a number"),
        ("share", True, "share=True must be a number"),
        ("share", float("-inf"), "share=-inf must be finite"),
        ("share", 10**400, "share=1000"),
        ("mode", "d", "mode='d' must be one of 'a', 'b', 'c'"),
        ("mode", ["a"], "mode=['a'] must be one of"),
        ("switch", 1, "switch=1 must be True or False"),
        ("name", 5, "name=5 must be a string"),
        ("mode", "\udcff", "mode='\\udcff' is not valid Unicode"),
        ("names", 5, "names=5 is not of its type"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        Kinds(**{field: value})
    assert str(refused.value).startswith(words)
    assert len(str(refused.value)) < 150
