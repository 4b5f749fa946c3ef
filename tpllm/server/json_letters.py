"""JSON text followed letter by letter, as far as its brackets and strings go."""

SPACE = " \n\r\t"
_OUTSIDE_STRINGS = frozenset('{}[],:"+-.0123456789eE' + "truefalsenull" + SPACE)
_AFTER_STRING = frozenset(",:]}" + SPACE)
_BEFORE_OBJECT = frozenset("{" + SPACE)


class JsonLetters:
    """Says of each letter of an object whether JSON could go on with it, at a glance.

    What it lets pass may still be no JSON. What it refuses is none, and that is enough to tell
    prose from an object within a few letters.

    Attributes:
        depth: brackets that are open
        in_string: whether the next letter is a string's
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._escaped = False
        self._fitting = _BEFORE_OBJECT

    def follow(self, letter: str) -> bool:
        """Go on by a letter; False where no JSON does."""
        if self.in_string:
            if self._escaped:
                self._escaped = False
            elif letter == '"':
                self.in_string = False
                self._fitting = _AFTER_STRING
            else:
                self._escaped = letter == "\\"
            return True
        fits = letter in self._fitting
        if letter in SPACE:
            return fits
        self._fitting = _OUTSIDE_STRINGS
        if letter == '"':
            self.in_string = True
        elif letter in "{[":
            self.depth += 1
        elif letter in "}]":
            self.depth -= 1
        return fits
