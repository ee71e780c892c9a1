"""docs/reliability.md names tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
NAMED = re.findall(r"`((?:tests/[\w/.]+)?(?:::[\w:]+(?:\[[^`]*\])?)?)`", PAGE)


def test_every_row_names_a_test():
    rows = [
        line
        for line in PAGE.splitlines()
        if line.startswith("| ") and not line.startswith(("| kind", "|---"))
    ]
    assert len(rows) > 50 and all(re.search(r"`tests/", row.rsplit(" | ", 1)[-1]) for row in rows)


@pytest.mark.parametrize("name", dict.fromkeys(name for name in NAMED if name.startswith("tests/")))
def test_the_test_is_there(name):
    path, _, test = name.partition("::")
    assert (ROOT / path).exists()
    for part in filter(None, test.split("[")[0].split("::")):
        assert re.search(rf"(def|class) {part}\b", (ROOT / path).read_text()), name
