"""Verdicts: what is broken, what ships, and what a person reads of it."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from llava_keeplora.config import load_config
from llava_keeplora.errors import RunError
from llava_keeplora.files import write_json
from llava_keeplora.guard import NEW, OLD, WATCH, Limit, exit_code, judge, run_record, verdict_lines
from llava_keeplora.guard.text import change_lines, headline, verdict_markdown
from llava_keeplora.guard.verdicts import read_marks, read_verdicts
from llava_keeplora.report.verdict import verdict_html
from llava_keeplora_eval import Matrix
from llava_keeplora_recipes import load_recipe, load_split


@pytest.fixture(scope="module")
def shapes():
    return load_split(load_recipe("shapes"), "test")


@pytest.fixture(scope="module")
def answers(shapes):
    """Function (number of wrong ones) → id → answer."""
    names = [shapes.recipe.classes[label] for label in shapes.labels]

    def give(wrong: int) -> dict[str, str]:
        return {key: "nothing" if i < wrong else name for i, (key, name) in enumerate(zip(shapes.ids, names))}

    return give


@pytest.fixture(scope="module")
def verdict(shapes, answers):
    """A task that gained, with an old task far down and a watched one as before."""
    half = len(shapes) // 2
    limits = [
        Limit(NEW, shapes, answers(half), answers(0), 3.0, noise=0.5),
        Limit(OLD, shapes, answers(0), answers(half), -2.0),
        Limit(WATCH, shapes, answers(5), answers(5), -20.0),
    ]
    return judge("shapes", limits, 0.95) | {"then": "rollback"}


def test_one_broken_limit_is_a_reason_not_to_ship(verdict):
    outcomes = [(record["of"], record["outcome"]) for record in verdict["limits"]]
    assert outcomes == [("new task", "held"), ("old task", "broken"), ("watch task", "held")]
    assert not verdict["ship"] and verdict["level"] == pytest.approx(1 - 0.05 / 3)


def test_verdicts_on_tasks_that_a_list_lacks_come_last(tmp_path):
    for place, task in (("aside/01-a", "a"), ("task-01-z", "z"), ("task-02-b", "b"), ("task-03-c", "c")):
        then = {"a": "rollback", "z": "stop"}.get(task)
        write_json(tmp_path / "lora" / place / "guard.json", {"task": task, "limits": [], "then": then})
    assert [v["task"] for v in read_verdicts(tmp_path / "lora", ["b", "a"])] == ["b", "a", "z", "c"]
    assert read_marks(tmp_path / "lora", ["a"]) == {"a": "rolled back", "z": "stopped"}


def test_a_limit_of_nothing_is_0_in_words(shapes, answers):
    record = judge("shapes", [Limit(OLD, shapes, answers(9), answers(9), 0.0)], 0.95)
    assert "; at most 0 down;" in verdict_lines(record)[1]


def test_a_model_that_did_not_change_ships(shapes, answers):
    record = judge("shapes", [Limit(OLD, shapes, answers(9), answers(9), 0.0)], 0.95)
    assert record["ship"]


def test_a_broken_limit_has_ten_flipped_examples_with_their_pictures(verdict, shapes):
    flips = verdict["limits"][1]["flips"]
    assert len(flips) == 10 and {f["after"] for f in flips} == {"nothing"}
    assert flips[0]["before"] == shapes.recipe.classes[shapes.labels[0]] and flips[0]["id"] == shapes.ids[0]
    with Image.open(io.BytesIO(base64.b64decode(flips[0]["picture"]))) as picture:
        assert picture.format == "JPEG" and max(picture.size) <= 160
    assert "flips" not in verdict["limits"][0]


def test_the_terminal_reads_the_verdict_first_and_then_what_broke(verdict):
    first, second, *_ = verdict_lines(verdict)
    assert re.match(r"shapes: don't ship \(rolled back\); of 3 limits, 2 held, 1 broken, at 95 %", first)
    assert re.match(r"  broken: old task shapes -5\d?\.\d points \(100.0 → .*at most 2 down", second)
    assert "noise 0.5" in "\n".join(verdict_lines(verdict)) and "at least +3" in "\n".join(
        verdict_lines(verdict)
    )


def test_too_few_examples_say_how_many_would_tell(shapes, answers):
    few = shapes.take(range(20))
    before, after = ({k: v for k, v in answers(w).items() if k in few.ids} for w in (0, 1))
    verdict = judge("few", [Limit(OLD, few, before, after, -2.0)], 0.95)
    assert verdict["ship"] and verdict["limits"][0]["outcome"] == "can't be told"
    line = verdict_lines(verdict)[1]
    assert re.search(r"about \d+ examples would tell$", line), line


def test_the_page_begins_with_the_verdict_and_the_code_is_3(verdict, shapes, tmp_path):
    assert exit_code(tmp_path) == 0 and verdict_html(tmp_path) == ""
    folder = tmp_path / "keeplora/aside/01-shapes"
    folder.mkdir(parents=True)
    (folder / "guard.json").write_text(json.dumps(verdict))
    Matrix(["digits", "shapes"]).to_json(tmp_path / "keeplora/matrix.json")
    record = run_record(tmp_path, ["zero-shot", "keeplora"], ["digits", "shapes"])
    Path(tmp_path / "guard.json").write_text(json.dumps(record))
    assert not record["ship"] and list(record["methods"]) == ["keeplora"]
    assert exit_code(tmp_path) == 3 and exit_code(tmp_path, "digits") == 0
    with pytest.raises(RunError, match="no task 'digts'; did you mean 'digits'"):
        exit_code(tmp_path, "digts")
    page = verdict_html(tmp_path)
    assert (
        page.count('<img src="data:image/jpeg;base64,') == 10
        and "shapes: 10 of the 150 examples that" in page
    )
    assert page.index("0 of 1 tasks ship") < page.index('<b class="dont">') < page.index("worse: shapes -5")
    assert page.index('class="better">better: shapes +') < page.index("<table>") and "≥ -2" in page
    record["methods"]["keeplora"].insert(0, verdict | {"retried": True})
    Path(tmp_path / "guard.json").write_text(json.dumps(record))
    assert "0 of 1 tasks ship" in verdict_html(tmp_path)
    right = shapes.recipe.classes[shapes.labels[0]]
    answers = "".join(f"<dt>{name}</dt>.*?" for name in ("right", "before", "after"))
    first = re.search(f'<figure title="{shapes.ids[0]}">.*?{answers}</figure>', page)[0]
    assert first.count(f">{right}</dd>") == 2 and '<dd class="after">nothing</dd>' in first


def test_changes_are_told_from_chance_and_the_noise_stands_beside(verdict):
    lines = change_lines(verdict)
    assert list(lines) == ["worse", "better", "same"]
    assert re.match(
        r"better: shapes \+\d+\.\d points \(between \+.* and \+.*; noise 0\.5\)$", lines["better"]
    )
    assert re.match(r"no change beyond chance: shapes \+0\.0 points \(between -", lines["same"])
    worse, better = verdict["limits"][1], verdict["limits"][0]
    assert worse["high"] < 0 < better["low"]


def test_text_of_a_model_is_no_markup_of_the_page(tmp_path, verdict):
    flip = {
        "id": '"><b>',
        "question": "<i>?",
        "expected": ["<u>_", "<u> ", "2", "3", "4"],
        "before": "<s>",
        "after": "",
    }
    limits = [verdict["limits"][1] | {"task": "<x>", "flips": [flip]}]
    record = {"ship": False, "methods": {"<m>": [verdict | {"task": "<t>", "limits": limits}]}}
    (tmp_path / "guard.json").write_text(json.dumps(record))
    page = verdict_html(tmp_path)
    assert not re.search(r"<(x|t|m|u|s|b)>", page) and "&lt;i&gt;?" in page and "<i>nothing</i>" in page
    assert "&lt;u&gt;_ / 2 / 3</dd>" in page and '<div class="flips wordy">' in page


def test_the_pages_example_is_a_configuration():
    guard = load_config(Path(__file__).parents[2] / "docs/examples/guard.yaml").guard
    assert guard.on_failure == "rollback" and [entry.task for entry in guard.watch] == ["shapes", "glyphs"]


def test_what_a_smaller_update_costs_is_in_every_form_of_the_verdict(verdict, tmp_path):
    tried = [
        {"of": WATCH, "task": "faq", "limit": -1.0, "change": -4.5},
        {"of": NEW, "task": "shapes", "limit": 3.0, "change": 9.0},
    ]
    whole = [{"of": WATCH, "task": "faq", "outcome": "broken", "limit": -1.0, "change": -6.0}]
    shrink = {
        "lambda": 0.4375,
        "trials": [
            {"lambda": 0.5, "holds": False, "changes": tried},
            {"lambda": 0.4375, "holds": True, "changes": []},
        ],
        "scores": {"whole": 83.0, "shrunk": 71.5},
        "limits": whole,
    }
    kept = verdict | {"ship": True, "then": None, "shrink": shrink}
    run = tmp_path / "guard.json"
    run.write_text(json.dumps({"ship": True, "methods": {"row": [kept]}}))
    for text in (
        "\n".join(verdict_lines(kept)),
        verdict_markdown(kept).replace("\\", ""),
        verdict_html(tmp_path),
    ):
        assert "with 0.4375 of its update" in text
        assert "scores 71.5 instead of 83.0; with the whole update: faq -6.0" in text
        assert "0.5 broke (faq -4.5); 0.4375 held" in text
    none = verdict | {"shrink": {"lambda": 0.0, "trials": []}}
    assert "no smaller update holds every limit" in "\n".join(verdict_lines(none))
    assert "rolled back" in verdict_lines(none)[0]


def test_the_first_task_of_a_guard_for_old_tasks_says_that_nothing_is_judged_yet():
    first = {"task": "shapes", "ship": True, "then": None, "limits": [], "confidence": 0.95}
    assert headline(first) == "shapes: ship; no limit to judge yet"
