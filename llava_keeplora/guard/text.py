"""A verdict as lines for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_keeplora.errors import UserError
from llava_keeplora.run_folder import RETRIED, ROLLBACK, SHRINK, STOP, THEN, WARN
from llava_keeplora_eval.markup import markdown_text
from llava_keeplora_eval.paired_bootstrap import Outcome


def headline(verdict: Mapping[str, Any]) -> str:
    """Return the verdict in one sentence: ship or don't, and how many limits are what."""
    return f"{verdict['task']}: {word(verdict)}{consequence(verdict)}"


def word(verdict: Mapping[str, Any]) -> str:
    """Return the verdict in a word or two."""
    return "ship" if verdict["ship"] else "don't ship"


def consequence(verdict: Mapping[str, Any]) -> str:
    """Return the rest of the headline: what became of the task, and how many limits are what."""
    count = {
        outcome: sum(record["outcome"] == outcome for record in verdict["limits"]) for outcome in Outcome
    }
    parts = [f"{number} {outcome}" for outcome, number in count.items() if number]
    then = {
        ROLLBACK: "rolled back",
        SHRINK: "its update gets smaller",
        STOP: "stopped here",
        WARN: "kept all the same",
    }
    share = verdict.get("shrink", {}).get("lambda")
    kept = f"with {share:g} of its update" if share and verdict.get(THEN) != SHRINK else ""
    again = "tried again later" if RETRIED in verdict else ""
    after = ", ".join(filter(None, (kept, then.get(verdict.get(THEN) or "", ""), again)))
    done = f" ({after})" if after else ""
    if not parts:
        return f"{done}; no limit to judge yet"
    limits = "limit" if len(verdict["limits"]) == 1 else "limits"
    return (
        f"{done}; of {len(verdict['limits'])} {limits}, {', '.join(parts)}, "
        f"at {100 * verdict['confidence']:g} % confidence together"
    )


def limit_line(record: Mapping[str, Any]) -> str:
    """Return one limit as a line: its outcome, the change with its interval, and the noise."""
    gains = record["of"] == "new task"
    allowed = f"at least {record['limit']:+g}" if gains else f"at most {0.0 - record['limit']:g} down"
    line = (
        f"{record['outcome']}: {record['of']} {record['task']} {record['change']:+.1f} points "
        f"({record['before']:.1f} → {record['after']:.1f}, between {record['low']:+.1f} and "
        f"{record['high']:+.1f}; {allowed}; {record['n']} examples"
    )
    if record.get("worse") is not None:
        line += f", {record['worse']} worse, {record['better']} better"
    line += f"{_noise(record)})"
    if record["outcome"] == Outcome.UNDECIDED:
        needed = record["examples"]
        line += f"; about {needed} examples would tell" if needed else "; the change is too near to the limit"
    return line


def change_lines(verdict: Mapping[str, Any]) -> dict[str, str]:
    """Return what got worse, better, and neither beyond chance, each with its interval and the noise.

    A change is beyond chance if its interval, of all limits together, does not contain 0.

    Returns:
        `worse`, `better` and `same`, as far as there are any → a line.
    """
    names = {"worse": "worse", "better": "better", "same": "no change beyond chance"}
    lines = {}
    for kind, name in names.items():
        parts = [
            f"{record['task']} {record['change']:+.1f} points (between {record['low']:+.1f} and "
            f"{record['high']:+.1f}{_noise(record)})"
            for record in sorted(verdict["limits"], key=lambda record: -abs(record["change"]))
            if kind == ("worse" if record["high"] < 0 else "better" if record["low"] > 0 else "same")
        ]
        if parts:
            lines[kind] = f"{name}: {', '.join(dict.fromkeys(parts))}"
    return lines


def _noise(record: Mapping[str, Any]) -> str:
    return "" if record.get("noise") is None else f"; noise {record['noise']:.1f}"


def verdict_lines(verdict: Mapping[str, Any]) -> list[str]:
    """Return a verdict as its headline and a line for each limit, the broken ones first."""
    order = [Outcome.BROKEN, Outcome.UNDECIDED, Outcome.HELD]
    records = sorted(verdict["limits"], key=lambda record: order.index(record["outcome"]))
    lines = [*map(limit_line, records), *shrink_lines(verdict)]
    return [headline(verdict), *(f"  {line}" for line in lines)]


def shrink_lines(verdict: Mapping[str, Any]) -> list[str]:
    """Return what a smaller update costs, and which were tried; nothing where none was looked for."""
    if not (record := verdict.get("shrink")):
        return []
    lines = []
    if scores := record.get("scores"):
        lines.append(
            f"what that costs: {verdict['task']} scores {scores['shrunk']:.1f} instead of "
            f"{scores['whole']:.1f}; with the whole update: {_changes(record['limits'])}"
        )
    tried = [
        f"{trial['lambda']:g} {'held' if trial['holds'] else f'broke ({_changes(_broken(trial))})'}"
        for trial in record["trials"]
    ]
    lines.append(f"shares of the update tried, on held-out and watched examples: {'; '.join(tried)}")
    if not record["lambda"]:
        lines.append("no smaller update holds every limit")
    return lines


def _broken(trial: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [change for change in trial["changes"] if change["change"] < change["limit"]]


def _changes(records: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{record['task']} {record['change']:+.1f}" for record in records)


def verdict_markdown(verdict: Mapping[str, Any]) -> str:
    """Return a verdict as Markdown: its headline, a table of the limits, and the answers that flipped."""
    lines = [
        f"## {_cell(headline(verdict))}",
        "",
        *(f"- {_cell(line, 1000)}" for line in change_lines(verdict).values()),
        "",
        "| limit of | verdict | change | interval | accepted | noise |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for record in verdict["limits"]:
        needed = f" (about {record['examples']} examples would tell)" if record["examples"] else ""
        noise = "" if record["noise"] is None else f"{record['noise']:.1f}"
        lines.append(
            f"| {_cell(record['task'])} | {record['outcome']}{needed} | {record['change']:+.1f} | "
            f"{record['low']:+.1f} to {record['high']:+.1f} | at least {record['limit']:+g} | {noise} |"
        )
    lines += [line for text in shrink_lines(verdict) for line in ("", _cell(text, 1000))]
    for record in verdict["limits"]:
        if record.get("flips"):
            lines += [
                "",
                f"Got worse in {_cell(record['task'])}:",
                "",
                "| example | question | right | before | after |",
            ]
            lines += ["|---|---|---|---|---|"]
        for flip in record.get("flips", ()):
            cells = (flip["id"], flip["question"] or "", right_answers(flip), flip["before"], flip["after"])
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def right_answers(flip: Mapping[str, Any], most: int = 3) -> str:
    """Return the accepted texts of a flipped example, of a class's two spellings the first alone."""
    texts: dict[str, str] = {}
    for text in flip["expected"]:
        texts.setdefault(text.replace("_", " "), text)
    return " / ".join(list(texts.values())[:most])


def error_markdown(error: UserError) -> str:
    """Return an error that left no verdict as Markdown."""
    return f"## No verdict\n\n{markdown_text(str(error))}\n"


def _cell(text: str, most: int = 200) -> str:
    """Return text for a cell of a Markdown table, of at most so many characters, with its markup escaped."""
    return markdown_text(" ".join(text.split())[:most])
