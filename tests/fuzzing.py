"""Valid files changed in a few places, as data or as bytes; the changes are the same in every run of the suite."""

import copy
import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from llava_keeplora.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def at_random(draw, tree):
    """A container inside a tree, and one of its keys or positions."""
    key = draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree))))
    inner = tree[key]
    if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3)):
        return at_random(draw, inner)
    return tree, key


@st.composite
def changed(draw, tree, values=VALUES):
    """A tree of plain data, changed in one to three places: another value, one less, one more, or one from elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        if not tree:
            break
        place, key = at_random(draw, tree)
        what = draw(st.sampled_from(["value", "gone", "more", "moved"]))
        if what == "value":
            place[key] = draw(values)
        elif what == "gone":
            del place[key]
        elif what == "more" and isinstance(place, dict):
            place[draw(st.text(max_size=6))] = draw(values)
        elif what == "more":
            place.append(draw(values))
        else:
            other, from_key = at_random(draw, tree)
            place[key] = copy.deepcopy(other[from_key])
    return tree


@st.composite
def damaged(draw, data: bytes):
    """Bytes with some of them replaced, taken out, doubled or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        data = draw(
            st.sampled_from(
                [
                    data[:start] + draw(st.binary(max_size=6)) + data[end:],
                    data[:end] + data[start:],
                    data[:start],
                ]
            )
        )
    return data


def tried(read):
    """Return what `read` gives; None where it refuses in one sentence, which anything else would fail."""
    try:
        return read()
    except UserError as error:
        assert str(error).strip().endswith(".") and "\n" not in str(error), "an error is one sentence"
        return None


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
