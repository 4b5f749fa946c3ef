"""Validation of dataclasses by pydantic, in words of our own."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Interval

from tpllm.fields.validation import Must, above, between, check_fields


@dataclass(frozen=True)
class Kinds:
    count: Annotated[int | None, Interval(ge=1, le=5)] = None
    share: Annotated[float, above(0, 1)] = 1.0
    mode: Literal["a", "b", "c"] = "a"
    switch: bool = False
    name: str | None = None
    names: tuple[str, ...] | list[str] = ()
    ids: tuple[Annotated[int, Interval(ge=0)], ...] | list[int] = ()
    bias: dict[int, Annotated[float, between(-1, 1)]] | None = None
    key: Annotated[str, Must(str.isascii, "must be ASCII")] = field(default="", repr=False)

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    "name, value, kept",
    [
        ("count", np.uint8(5), 5),
        ("share", 1, 1.0),
        ("share", np.float32(0.5), 0.5),
        ("share", Fraction(1, 4), 0.25),
        ("share", np.array(0.5), 0.5),
        ("name", Path("/m"), "/m"),
        ("names", ("a", "b"), ("a", "b")),
        ("names", ["a", "b"], ("a", "b")),
        ("ids", np.array([1, 2]), (1, 2)),
        ("bias", {np.int64(1): 1}, {1: 1.0}),
    ],
)
def test_values_are_kept_as_plain_objects(name: str, value: Any, kept: object) -> None:
    found = getattr(Kinds(**{name: value}), name)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    "name, value, words",
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
        ("ids", np.array(5), "ids=array(5) must be a list of whole numbers"),
        ("share", True, "share=True must be a number"),
        ("share", float("-inf"), "share=-inf must be finite"),
        ("share", 10**400, "share=1000"),
        ("mode", "d", "mode='d' must be one of 'a', 'b', 'c'"),
        ("mode", ["a"], "mode=['a'] must be one of"),
        ("switch", 1, "switch=1 must be True or False"),
        ("name", 5, "name=5 must be a string"),
        ("mode", "\udcff", "mode='\\udcff' is not valid Unicode"),
        ("names", 5, "names=5 must be a list of strings"),
        ("names", "a", "names='a' must be a list of strings"),
        ("names", ["a", 5], "names[1]=5 must be a string"),
        ("ids", [-1], "ids[0]=-1 must be at least 0"),
        ("ids", {}, "ids={} must be a list of whole numbers"),
        ("bias", [1], "bias=[1] must be a dict from token ids to numbers"),
        ("bias", {"a": 0}, "bias key='a' must be a whole number"),
        ("bias", {5: 2}, "bias[5]=2 must be between -1 and 1"),
        ("key", "ü", "key must be ASCII"),  # and does not show the secret
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        Kinds(**{name: value})
    assert str(refused.value).startswith(words)
    assert len(str(refused.value)) < 150
