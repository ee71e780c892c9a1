"""A metric and a reader of one's own: runs that are stopped and go on, exports, reports, and `compare`'s children."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml

from llava_keeplora.cli import main
from llava_keeplora.config import load_config
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import RunError, UserError
from llava_keeplora.export import import_state
from llava_keeplora.export.run_export import export_run
from llava_keeplora.report.run_report import write_run_report
from llava_keeplora.run_folder import result_files
from llava_keeplora.saved_run import extended
from llava_keeplora_recipes import load_recipe, load_split

LABEL = "seq-lora"
METRIC = '''"""A metric of the tests."""


def same_end(text, answers):
    """Return whether the prediction ends as an accepted text does."""
    return text[-2:] in {answer[-2:] for answer in answers}
'''
READER = '''"""A reader of the tests: a CSV file with the columns id, file and label."""

import csv
from dataclasses import dataclass
from typing import ClassVar

from llava_keeplora_recipes import Reader
from llava_keeplora_recipes.paths import set_folder, split_file
from llava_keeplora_recipes.records import classified, image_files


@dataclass
class Listed(Reader):
    kinds: ClassVar = ("classification",)

    delimiter: str = ","

    def read(self, recipe, split, data_root, problems=None):
        with open(split_file(recipe, split, data_root), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=self.delimiter))
        files = [[set_folder(recipe, data_root) / row["file"]] for row in rows]
        return classified([row["id"] for row in rows], image_files(files), [row["label"] for row in rows], None)
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory, run_tree, tiny_tasks):
    """A folder with both plug-ins, recipes that name them, a run of two of these, and a table."""
    folder = tmp_path_factory.mktemp("data-doors")
    (folder / "same_end.py").write_text(METRIC)
    (folder / "listed.py").write_text(READER)
    tasks = []
    for path in tiny_tasks:
        recipe = load_recipe(str(path))
        for split in ("train", "test"):
            (folder / recipe.name / split).mkdir(parents=True)
            with open(folder / recipe.name / f"{split}.csv", "w", newline="") as file:
                lines = csv.writer(file, delimiter=";")
                lines.writerow(["id", "file", "label"])
                for number, example in enumerate(load_split(recipe, split)):
                    example.image.save(folder / recipe.name / split / f"{number}.png")
                    lines.writerow([f"{split}-{number}", f"{split}/{number}.png", example.answers[0]])
        facts = yaml.safe_load(path.read_text()) | {
            "metric": "same_end.py:same_end",
            "source": {"format": "listed.py:Listed", "path": recipe.name, "delimiter": ";"},
            "splits": {"train": "train.csv", "test": "test.csv"},
        }
        tasks.append(folder / path.name)
        tasks[-1].write_text(yaml.safe_dump(facts))
    tree = run_tree(folder / "run", methods={LABEL: {}}, tasks=[str(task) for task in tasks[:2]])
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    table = {"base": str(folder / "run.yaml"), "output_dir": str(folder / "table"), "seeds": [0]}
    (folder / "table.yaml").write_text(yaml.safe_dump(table | {"methods": tree["methods"]}))
    return folder


@pytest.fixture(scope="module")
def finished(home, driven):
    """The run, done; shared, so copy it before changing it."""
    return driven(load_config(str(home / "run.yaml")))


@pytest.fixture
def copied(home, finished, tmp_path):
    """A copy of folder and run, for a test that changes them."""
    shutil.copytree(home, tmp_path / "own")
    config = tmp_path / "own/run/config.json"
    config.write_text(config.read_text().replace(str(home), str(tmp_path / "own")))
    return tmp_path / "own"


def results(run: Path) -> dict[Path, bytes]:
    method = next(path.parent for path in run.glob(f"**/{LABEL}/journal.jsonl"))
    return {path.relative_to(method): path.read_bytes() for path in result_files(method)}


def expected_scores(home: Path, task: Path) -> dict[str, float]:
    """Task → percent of the answers in a task's folder that end as the label in the CSV file does."""
    scores = {}
    for answers in sorted(task.glob("predictions/*.jsonl")):
        with open(home / answers.stem / "test.csv", newline="") as file:
            labels = {
                row["id"]: row["label"].replace("_", " ") for row in csv.DictReader(file, delimiter=";")
            }
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        right = [row["text"].replace("_", " ")[-2:] == labels[row["id"]][-2:] for row in rows]
        scores[answers.stem] = 100 * sum(right) / len(labels)
    return scores


def faults(run: Path) -> list[str]:
    return [str(line) for line in examine_run(run) if isinstance(line, UserError)]


@pytest.mark.usefixtures("undrawn")
def test_every_score_is_the_metric_on_what_the_reader_read_and_the_report_shows_it(home, finished):
    folders = sorted(finished.glob(f"{LABEL}/task-0[12]*"))
    assert len(folders) == 2
    for folder in folders:
        found = json.loads((folder / "scores.json").read_text())
        expected = expected_scores(home, folder)
        assert {task: cell["score"] for task, cell in found.items()} == pytest.approx(expected, abs=0.01)
        assert {cell["metric"] for cell in found.values()} == {"same_end:same_end"}
    write_run_report(finished)
    page = (finished / "report.html").read_text()
    assert "colours" in page and str(home) not in page and faults(finished) == []


@pytest.mark.slow
def test_a_run_that_is_stopped_after_every_stage_ends_with_the_same_answers(
    home, finished, stopped_run, tmp_path
):
    assert results(stopped_run(home / "run.yaml", tmp_path / "run", LABEL)) == results(finished)


@pytest.mark.slow
def test_the_children_of_a_table_find_both_from_another_folder(
    home, finished, forked_children, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    compare = ["compare", "--config", str(home / "table.yaml")]
    assert main(compare) == 0
    assert results(home / "table") == results(finished)
    for page in ("table.md", "report.html"):
        assert str(home) not in (home / "table" / page).read_text()
    (home / "same_end.py").write_text(METRIC + "\n# changed\n")
    try:
        assert main(compare) == 2
        assert "the metric of 'colours' is not what" in capsys.readouterr().err
    finally:
        (home / "same_end.py").write_text(METRIC)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_it_is_exported_in_both_forms_from_any_folder(finished, form, tmp_path, monkeypatch, quick_reload):
    monkeypatch.chdir(tmp_path)
    export_run(finished, form, tmp_path / form, base_id="user/base", examples=2)
    assert "same_end" in (tmp_path / form / "README.md").read_text()


@pytest.mark.slow
def test_its_state_is_imported_where_both_are_installed_and_allowed(
    copied, finished, tiny_clip, tmp_path, monkeypatch, quick_reload
):
    export_run(finished, "state", tmp_path / "state", base_id="user/base", examples=2)
    monkeypatch.chdir(copied)
    into, given = tmp_path / "run", {"base": str(tiny_clip), "data_root": str(copied)}
    with pytest.raises(RunError, match="same_end:same_end.*--allow-plugin"):
        import_state(str(tmp_path / "state"), into, **given)
    import_state(str(tmp_path / "state"), into, allow_plugin=True, **given)
    assert len(extended(into, str(copied / "corners.yaml")).tasks) == 3


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
@pytest.mark.parametrize(("file", "role"), [("same_end.py", "metric"), ("listed.py", "reader")])
def test_it_is_extended_with_the_same_sources_alone(copied, driven, file, role):
    source = (copied / file).read_text()
    (copied / file).write_text(source + "\n# changed\n")
    with pytest.raises(RunError, match=f"colours.*plugins.{role}"):
        driven(extended(copied / "run", str(copied / "corners.yaml")))
    assert any(f"the {role} of 'colours' is not what" in fault for fault in faults(copied / "run"))
    (copied / file).rename(copied / "hidden.txt")
    assert any("is not installed" in fault for fault in faults(copied / "run"))
    write_run_report(copied / "run")
    (copied / file).write_text(source)
    run = driven(extended(copied / "run", str(copied / "corners.yaml")))
    assert len(list(run.glob(f"{LABEL}/task-*"))) == 4 and faults(run) == []
