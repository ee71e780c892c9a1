"""Decoding of text files and strict parsing of JSON; anything ambiguous is refused with the reason."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_CONSTANT = re.compile(r"NaN|Infinity|[eE]\+?\d{3}")


def decode_text(data: bytes) -> str:
    """Decode UTF-8, UTF-16 or UTF-32, with or without a byte order mark; every line end becomes a line feed.

    Raises:
        ValueError: the bytes are not text in one of these encodings.
    """
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8 or UTF-16: {error.reason} at byte {error.start}") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Files that were concatenated have a byte order mark at the beginning of each part.
    return text.removeprefix("\ufeff").replace("\n\ufeff", "\n")


def parse_json(text: str) -> Any:
    """Parse JSON, and refuse what `json.loads` accepts silently or fails on with another error.

    Raises:
        ValueError: with the reason: no JSON, a repeated key, half a character (a lone surrogate, which no
            file can contain), a number of thousands of digits, or brackets nested too deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object_of_unique_keys)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nests brackets too deep") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"holds half a character, {half}, without its other half") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not readable JSON ({error})") from None
    except ValueError as error:
        # Python limits the digits of a whole number.
        reason = "holds a number with too many digits" if "digits" in str(error) else str(error)
        raise ValueError(reason) from None
    return value


def may_hold_constants(text: str) -> bool:
    """Return whether JSON text may have NaN or infinity; a quick test before `constant_in`."""
    return _CONSTANT.search(text) is not None


def constant_in(value: Any) -> str | None:
    """Return the name of the first NaN or infinity in parsed JSON; Python reads them, but JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((constant for item in inner if (constant := constant_in(item)) is not None), None)


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"has the key '{repeated[:50]}' more than once in one object")
    return result
