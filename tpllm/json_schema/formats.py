"""Rewrite `format` and `pattern` of strings in JSON schemas so that llguidance compiles them right.

llguidance's dates allow the year 0 and February 29 in any year; its times allow second 60 and
endless fractions. A weak model generates such strings, and programs refuse them.
"""

from difflib import get_close_matches
from typing import Any

from tpllm.checks import short

_LEAP_YEAR = (
    r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"  # not 0000
)
_DAY = (
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    r"|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_YEAR = r"([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DATE = rf"({_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR = r"([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{_HOUR})"
_HEX = "[0-9a-fA-F]"
_BASE64 = r"^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "base64": _BASE64,
    "byte": _BASE64,
} | {
    f"uuid{n}": f"^{_HEX}{{8}}-{_HEX}{{4}}-{n}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}$"
    for n in range(1, 9)
}
_MAX_LENGTHS = {"date-time": 35, "time": 24, "duration": 32, "email": 254, "hostname": 253}
FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", *PATTERNS)
# These formats allow any string; they only describe how it is displayed or stored.
_OF_ANY_STRING = ("password", "binary", "path", "file-path", "directory-path", "unknown")

# Patterns with look-ahead from schema generators, and patterns without it for the same strings.
_WITHOUT_LOOK_AHEAD = {
    # pydantic's Decimal, with at most 24 digits on each side
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?([0-9]{1,24}(\.[0-9]{0,24})?|\.[0-9]{1,24})$",
    # zod's email
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+"
    r"[A-Za-z]{2,}$": r"^([A-Za-z0-9_'+-]+\.)*[A-Za-z0-9_'+-]*[A-Za-z0-9_+-]@"
    r"([A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$",
}


def rewrite_texts(schema: dict[str, Any], at: str) -> None:
    """Rewrite `format` and `pattern` of a schema in place.

    A format is removed if it does not apply to strings, if any string matches it, or if it is
    unknown and there is a pattern.

    Raises:
        ValueError: the format is not supported; the message begins with `at`.
    """
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        schema["pattern"] = _WITHOUT_LOOK_AHEAD.get(pattern, pattern)
    if (name := schema.get("format")) is None:
        return
    kinds = schema.get("type", "string")
    of_string = kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    if not of_string or name in _OF_ANY_STRING or (pattern is not None and name not in FORMATS):
        del schema["format"]
    elif name not in FORMATS:
        near = get_close_matches(str(name), FORMATS, n=1)
        mend = f"did you mean {near[0]!r}? Else" if near else f"use one of {', '.join(FORMATS)},"
        raise ValueError(
            f"{at}format={short(name)} is not supported; {mend} use a pattern, or leave it out"
        )
    elif name in PATTERNS and pattern is None:
        schema["pattern"] = PATTERNS[schema.pop("format")]
    else:
        _limit_length(schema, name)


def _limit_length(schema: dict[str, Any], name: str) -> None:
    longest = _MAX_LENGTHS.get(name)
    if name in PATTERNS and name not in _MAX_LENGTHS:
        del schema["format"]  # llguidance does not know it; the pattern replaces it
    elif longest is not None and schema.get("minLength", 0) <= longest:
        schema["maxLength"] = min(schema.get("maxLength", longest), longest)
