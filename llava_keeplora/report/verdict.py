"""The guard's verdicts as the first screen of a run's page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from llava_keeplora.guard import headline
from llava_keeplora.guard.text import shrink_lines
from llava_keeplora.report.html import html_rows, html_table
from llava_keeplora.run_folder import GUARD, read_record

#: Columns of the table of limits.
COLUMNS = ("limit of", "verdict", "change", "interval", "accepted", "before", "after", "noise", "examples")


def verdict_html(run: Path) -> str:
    """Return a run's verdicts as HTML: the last task's in full, those before folded; empty without any."""
    if not (run / GUARD).exists():
        return ""
    body = ""
    for label, verdicts in read_record(run / GUARD)["methods"].items():
        *earlier, last = verdicts
        body += f"<h3>{escape(label)}</h3>\n{_verdict(last)}"
        for verdict in reversed(earlier):
            body += f"<details><summary>{escape(headline(verdict))}</summary>\n{_limits(verdict)}</details>\n"
    return f'<section class="verdict">\n<h2>Verdict</h2>\n{body}</section>\n' if body else ""


def _verdict(verdict: Mapping[str, Any]) -> str:
    return f"<p><strong>{escape(headline(verdict))}</strong></p>\n{_limits(verdict)}"


def _limits(verdict: Mapping[str, Any]) -> str:
    """Return a verdict's limits as a table, and the flipped examples of broken ones."""
    records = sorted(verdict["limits"], key=lambda record: record["change"])
    table = html_table(COLUMNS, html_rows([_cells(record) for record in records]))
    shrinking = "".join(f"<p>{escape(line)}</p>\n" for line in shrink_lines(verdict))
    return table + shrinking + "".join(map(_flips, verdict["limits"]))


def _cells(record: Mapping[str, Any]) -> list[str]:
    needed = f" (about {record['examples']} would tell)" if record["examples"] else ""
    return [
        f"{record['of']} {record['task']}",
        record["outcome"] + needed,
        f"{record['change']:+.1f}",
        f"{record['low']:+.1f} to {record['high']:+.1f}",
        f"≥ {record['limit']:+g}",
        f"{record['before']:.1f}",
        f"{record['after']:.1f}",
        "" if record["noise"] is None else f"{record['noise']:.1f}",
        str(record["n"]),
    ]


def _flips(record: Mapping[str, Any]) -> str:
    """Return the examples of a broken limit whose answers were better before."""
    if not record.get("flips"):
        return ""
    rows = ""
    for flip in record["flips"]:
        picture = flip.get("picture")
        image = f'<img src="data:image/jpeg;base64,{escape(picture)}" alt="">' if picture else ""
        asked = flip["question"] or f"expected: {' / '.join(flip['expected'][:3])}"
        cells = "".join(f"<td>{escape(text)}</td>" for text in (asked, flip["before"], flip["after"]))
        rows += f"<tr><th scope=row>{image}<br>{escape(flip['id'])}</th>{cells}</tr>"
    title = f"Got worse in {record['task']}: {len(record['flips'])} of {record['worse'] or 'the'} examples"
    return f"<h4>{escape(title)}</h4>\n{html_table(('picture', 'question', 'before', 'after'), rows)}"
