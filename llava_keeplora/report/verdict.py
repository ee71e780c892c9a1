"""The guard's verdicts as the first screen of a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llava_keeplora.guard.text import change_lines, consequence, right_answers, shrink_lines, word
from llava_keeplora.guard.verdicts import counted
from llava_keeplora.report.html import html_rows, html_table
from llava_keeplora.run_folder import GUARD, read_record
from llava_keeplora_eval.paired_bootstrap import Outcome

#: Columns of the table of limits.
COLUMNS = ("limit of", "verdict", "change", "interval", "accepted", "before → after", "noise", "examples")
#: Longest answer of a small card, in characters.
SHORT = 24


def verdict_html(run: Path) -> str:
    """Return a run's verdicts as HTML: the last task's in full, those before folded; empty without any."""
    if not (run / GUARD).exists():
        return ""
    methods = read_record(run / GUARD)["methods"]
    body = "".join(_method(label, verdicts) for label, verdicts in methods.items())
    return f'<section class="verdict">\n<h2>Verdict</h2>\n{body}</section>\n' if body else ""


def _method(label: str, verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Return a method's verdicts: how many tasks ship, and the last verdict first."""
    *earlier, last = verdicts
    body = f"<h3>{escape(label)}: {_count(verdicts)}</h3>\n{_verdict(last)}"
    for verdict in reversed(earlier):
        body += f"<details><summary>{_headline(verdict)}</summary>\n{_body(verdict)}</details>\n"
    return body


def _count(verdicts: Sequence[Mapping[str, Any]]) -> str:
    ships = [verdict["ship"] for verdict in counted(verdicts)]
    return f"{sum(ships)} of {len(ships)} tasks ship"


def _verdict(verdict: Mapping[str, Any]) -> str:
    return f"<p>{_headline(verdict)}</p>\n{_body(verdict)}"


def _headline(verdict: Mapping[str, Any]) -> str:
    """Return the verdict's headline, with the verdict itself as a coloured word."""
    badge = f'<b class="{"ship" if verdict["ship"] else "dont"}">{escape(word(verdict))}</b>'
    return f"{badge} <strong>{escape(verdict['task'])}</strong>{escape(consequence(verdict))}"


def _body(verdict: Mapping[str, Any]) -> str:
    """Return what got better and worse, the flipped examples of broken limits, and every limit."""
    changes = "".join(
        f'<li class="{kind}">{escape(text)}</li>' for kind, text in change_lines(verdict).items()
    )
    broken = "".join(_flips(record) for record in verdict["limits"])
    records = sorted(verdict["limits"], key=lambda record: record["change"])
    table = html_table(COLUMNS, html_rows([_cells(record) for record in records]))
    shrinking = "".join(f"<p>{escape(line)}</p>\n" for line in shrink_lines(verdict))
    return f'<ul class="changes">{changes}</ul>\n{table}{shrinking}{broken}'


def _cells(record: Mapping[str, Any]) -> list[str]:
    needed = f" ({record['examples']} would tell)" if record["examples"] else ""
    return [
        f"{record['of']} {record['task']}",
        record["outcome"],
        f"{record['change']:+.1f}",
        f"{record['low']:+.1f} to {record['high']:+.1f}",
        f"≥ {record['limit']:+g}",
        f"{record['before']:.1f} → {record['after']:.1f}",
        "" if record["noise"] is None else f"{record['noise']:.1f}",
        f"{record['n']}{needed}",
    ]


def _flips(record: Mapping[str, Any]) -> str:
    """Return the examples of a broken limit whose answers were better before."""
    if record["outcome"] != Outcome.BROKEN or not record.get("flips"):
        return ""
    shown, worse = len(record["flips"]), record["worse"]
    of = f"{shown} of the {worse}" if worse and worse > shown else str(shown)
    title = f"{record['task']}: {of} examples that got worse"
    cards = "".join(map(_card, record["flips"]))
    kind = "flips wordy" if any(map(_is_wordy, record["flips"])) else "flips"
    return f'<h4>{escape(title)}</h4>\n<div class="{kind}">{cards}</div>\n'


def _is_wordy(flip: Mapping[str, Any]) -> bool:
    """Return whether a card needs the room of a sentence."""
    return bool(flip["question"]) or max(len(flip["before"]), len(flip["after"])) > SHORT


def _card(flip: Mapping[str, Any]) -> str:
    """Return an example as a card: its picture, what was asked, what is right, and both answers."""
    picture = flip.get("picture")
    image = f'<img src="data:image/jpeg;base64,{escape(picture)}" alt="">' if picture else ""
    asked = f'<p class="asked">{escape(flip["question"])}</p>' if flip["question"] else ""
    answers = "".join(
        f'<dt>{name}</dt><dd class="{name}">{escape(text) or "<i>nothing</i>"}</dd>'
        for name, text in (
            ("right", right_answers(flip)),
            ("before", flip["before"]),
            ("after", flip["after"]),
        )
    )
    return (
        f'<figure title="{escape(flip["id"])}">{image}<figcaption>{asked}<dl>{answers}</dl>'
        f"</figcaption></figure>"
    )
