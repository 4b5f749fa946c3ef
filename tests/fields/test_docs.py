"""Documentation of fields, from the strings below them."""

from dataclasses import dataclass

from tpllm.fields.docs import documented, field_docs


@documented
@dataclass
class Example:
    """An example."""

    first: int = 1
    """one line"""
    second: int = 2
    """two
    lines
    """
    third: int = 3


def test_the_string_below_a_field_is_its_documentation() -> None:
    assert field_docs(Example) == {"first": "one line", "second": "two lines"}


def test_the_docstring_of_the_class_lists_them() -> None:
    listed = "        first: one line\n        second: two lines\n"
    assert Example.__doc__ == f"An example.\n\n    Attributes:\n{listed}"
