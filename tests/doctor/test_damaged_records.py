"""Every file of a run damaged in every way, with and without the hash that goes with it: each reader reads it, or says one sentence."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest

from llava_keeplora.analysis import updates
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import RunError, UserError
from llava_keeplora.export import card
from llava_keeplora.export.loaded_run import Base, load_learned_run
from llava_keeplora.export.state import write_state
from llava_keeplora.records import MOST_DEEP, read_object
from llava_keeplora.report import run_report, terminal
from llava_keeplora.run_folder import GUARD, SCHEMAS, read_record
from llava_keeplora.saved_run import extended
from llava_keeplora.sequence.fork import fork
from llava_keeplora_eval.files import file_hash

FIRST = "keeplora/task-01-colours"
FILES = [
    "config.json",
    "identity.json",
    "versions.json",
    "recipes/colours.yaml",
    "keeplora/journal.jsonl",
    "keeplora/matrix.json",
    "zero-shot/matrix.json",
    "zero-shot/task-00-base/scores.json",
    "keeplora/task-00-base/consolidated.json",
    *(
        f"{FIRST}/{name}"
        for name in (
            "scores.json",
            "prepared.json",
            "train.json",
            "consolidated.json",
            "delta.safetensors",
            "state.safetensors",
        )
    ),
]
WHOLE = [b"", b"[]", b"{}", b"null", b"\xff\xfe", b'{"a":' * 900 + b"1" + b"}" * 900]
#: How many of a file's changed places are tried; with 0 all of them, which takes a quarter of an hour.
SAMPLED = 1
WRONG = [None, [], {}, "x", -3, True, float("nan"), 1e308, [[[]]], {"x": None}]


def doctor(run, into, task):
    return list(examine_run(run))


def report(run, into, task):
    results = run_report.write_run_report(run, into=into)
    terminal.summary(run, results)


def export(run, into, task):
    learned = load_learned_run(run, "keeplora")
    learned.matrix.markdown(), learned.model, card._stages(learned)
    write_state(learned, Base("you/base", None, None), into)


def analyze(run, into, task):
    for label in updates._finished(run):
        learned = load_learned_run(run, label)
        updates._added_directions(learned), updates._chosen_energies([learned]), updates._overlap(learned)


def copy_first(run, into, task):
    fork(run, 1, into)


def extend(run, into, task):
    extended(run, task)


READERS = [doctor, report, export, analyze, copy_first, extend]


def changed_places(content, depth=0):
    """The content with each of its values replaced in turn by each wrong one, as far as three levels deep; of many alike the first."""
    items = (
        list(content.items())[:8]
        if isinstance(content, dict)
        else list(enumerate(content[:1]))
        if isinstance(content, list)
        else []
    )
    for key, value in items:
        for wrong in WRONG:
            other = copy.copy(content)
            other[key] = wrong
            yield other
        if isinstance(content, dict):
            yield {name: kept for name, kept in content.items() if name != key}
        if depth < 2:
            for inside in changed_places(value, depth + 1):
                other = copy.copy(content)
                other[key] = inside
                yield other


def sampled(cases):
    cases = list(cases)
    return random.Random(len(cases)).sample(cases, min(SAMPLED or len(cases), len(cases)))


def damages(data, suffix):
    yield from WHOLE if suffix != ".yaml" else WHOLE[:5]
    yield data[: len(data) // 2]
    if suffix == ".json":
        yield from (json.dumps(other).encode() for other in sampled(changed_places(json.loads(data))))
    if suffix == ".jsonl":
        lines = data.splitlines()
        for number in (0, len(lines) // 2, len(lines) - 1):
            for other in sampled(changed_places(json.loads(lines[number]))):
                yield b"\n".join([*lines[:number], json.dumps(other).encode(), *lines[number + 1 :]]) + b"\n"


def sign(run, name):
    """Write a file's new hash into its method's journal, as somebody who means harm would."""
    label, _, inside = name.partition("/")
    path = run / label / "journal.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        if inside in entry["files"]:
            entry["files"][inside] = file_hash(run / name)
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


@pytest.fixture(scope="module")
def damaged(whole_run, tmp_path_factory):
    """A copy to damage and mend again."""
    return Path(shutil.copytree(whole_run, tmp_path_factory.mktemp("damaged") / "run"))


@pytest.fixture
def quick(monkeypatch):
    """No drawing and no base's weights: reading is what is tested."""
    monkeypatch.setattr(run_report, "write_report", lambda *args: None)


#: Read by every reader as other files of theirs are.
ALIKE = {
    "versions.json",
    "recipes/colours.yaml",
    "zero-shot/matrix.json",
    "zero-shot/task-00-base/scores.json",
}
ALIKE |= {
    f"{FIRST}/{name}" for name in ("prepared.json", "train.json", "consolidated.json", "state.safetensors")
}
ALIKE |= {"keeplora/task-00-base/consolidated.json", "keeplora/matrix.json"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in FILES]
)
def test_a_damaged_file_is_one_sentence_to_every_reader(damaged, quick, tiny_tasks, tmp_path, name):
    path, task = damaged / name, str(tiny_tasks[2])
    journal = damaged / name.split("/")[0] / "journal.jsonl"
    whole, signed = path.read_bytes(), journal.read_bytes() if journal.exists() else None
    try:
        for content in damages(whole, path.suffix):
            path.write_bytes(content)
            if signed is not None and path != journal:
                sign(damaged, name)
            for reader in READERS:
                into = tmp_path / "into"
                try:
                    reader(damaged, into, task)
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 800
                except Exception as error:
                    raise AssertionError(f"{reader.__name__} of {name} with {content[:300]!r}") from error
                shutil.rmtree(into, ignore_errors=True)
    finally:
        path.write_bytes(whole)
        if signed is not None:
            journal.write_bytes(signed)
    assert not [found for found in examine_run(damaged) if isinstance(found, UserError)]


@pytest.mark.parametrize(
    "name",
    [f"{FIRST}/{kind}" for kind in ("scores.json", "train.json", "prepared.json", "consolidated.json")],
)
@pytest.mark.parametrize(
    "content", [b"[]", b"null", b'{"history": 3, "layers": {}, "capacity": [], "score": "x"}']
)
def test_doctor_names_a_file_with_the_right_hash_and_the_wrong_content(run, name, content):
    (run / name).write_bytes(content)
    sign(run, name)
    found = [str(one) for one in examine_run(run) if isinstance(one, UserError)]
    assert any(name in one for one in found)


def test_doctor_names_a_recipe_copy_that_is_gone(run):
    (run / "recipes/colours.yaml").unlink()
    (found,) = [str(one) for one in examine_run(run) if isinstance(one, UserError)]
    assert (
        "recipes/colours.yaml, the run's own copy of the recipe" in found
        and "is missing; copy the recipe there" in found
    )


def test_a_record_says_where_it_is_wrong(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text('{"colours": {"score": "high"}}')
    with pytest.raises(
        RunError, match=r'scores.json is not what a run writes: colours.score is "high" instead of a number'
    ):
        read_record(path)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        (
            "consolidated.json",
            {"forecast": {"layer": {"tasks": 1, "left": 2, "growth": 1.0}}},
            "capacity.layer is missing",
        ),
        (
            "consolidated.json",
            {
                "forecast": {"layer": {"tasks": 1, "left": 2, "growth": 1.0}},
                "capacity": {"other": {"in": 4, "k": 1, "part": "text"}},
            },
            "capacity.layer is missing",
        ),
        (
            "train.json",
            {"history": [{"step": 1, "loss": 0.1}, {"loss": 0.1}]},
            r"history\[1\].step is missing",
        ),
        ("train.json", {"history": 3}, "history is 3 instead of a list"),
        (
            "scores.json",
            {"a": {"score": 1, "n": 2, "confusions": [["x", "y"]]}},
            r"a.confusions\[0\] is no class, prediction and number",
        ),
        ("scores.json", {"a": {"score": 1, "errors": {"other": 1}}}, "a.n is missing, and errors has it"),
    ],
)
def test_a_record_holds_what_goes_together(tmp_path, name, content, place):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(RunError, match=place):
        read_record(tmp_path / name)


def test_a_record_nested_as_deep_as_the_limit_is_read_and_one_level_more_is_refused(tmp_path):
    path = tmp_path / "a.json"
    for depth in (MOST_DEEP, MOST_DEEP + 1):
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        if depth == MOST_DEEP + 1:
            with pytest.raises(RunError, match=f"nested deeper than {MOST_DEEP} levels"):
                read_object(path)


def test_every_record_of_a_run_has_a_schema_that_it_follows(whole_run):
    read = [path for path in whole_run.rglob("*.json") if path.name in SCHEMAS]
    assert {path.name for path in read} == SCHEMAS.keys() - {
        "training.json",
        GUARD,
    }  # of runs with a guard alone
    for path in read:
        read_record(path)
