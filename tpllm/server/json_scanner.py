"""Scan JSON text character by character for brackets and strings."""

SPACE = " \n\r\t"
_OUTSIDE_STRINGS = frozenset('{}[],:"+-.0123456789eE' + "truefalsenull" + SPACE)
_AFTER_STRING = frozenset(",:]}" + SPACE)
_BEFORE_OBJECT = frozenset("{" + SPACE)


class JsonScanner:
    """Checks for each character of an object whether it may continue JSON.

    A text that it accepts may still be invalid JSON, but a text that it refuses is never JSON. This
    distinguishes prose from an object within a few characters.

    Attributes:
        depth: number of open brackets
        in_string: whether the next character is inside a string
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._escaped = False
        self._fitting = _BEFORE_OBJECT

    def follow(self, char: str) -> bool:
        """Scan a character; return False if it cannot continue JSON."""
        if self.in_string:
            if self._escaped:
                self._escaped = False
            elif char == '"':
                self.in_string = False
                self._fitting = _AFTER_STRING
            else:
                self._escaped = char == "\\"
            return True
        fits = char in self._fitting
        if char in SPACE:
            return fits
        self._fitting = _OUTSIDE_STRINGS
        if char == '"':
            self.in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1
        return fits
