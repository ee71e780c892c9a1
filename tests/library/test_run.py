"""`Run`: what the command line does, from Python, with datasets and callbacks of the caller."""

import hashlib
import json
from pathlib import Path

import datasets
import pytest
from transformers import TrainerCallback

from llava_keeplora import Run
from llava_keeplora.errors import UserError


def learned(run) -> dict[str, str]:
    """Deltas by their bytes, and answers: what a run computes, whatever its data are called."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(run).rglob("*"))
        if path.name in ("delta.safetensors", "state.safetensors", "matrix.json")
    }


class Steps(TrainerCallback):
    """Counts steps, and may raise at one of them."""

    def __init__(self, stop_at=None):
        self.count, self.stop_at = 0, stop_at

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tree(run_tree):
    """Function (output_dir, **changes) → KeepLoRA as nested dicts, without tasks."""
    return lambda folder, **changes: run_tree(folder, methods={"keeplora": {}}, tasks=None, **changes)


@pytest.fixture(scope="module")
def from_files(tree, files, tmp_path_factory, driven):
    """The run of two tasks from their files."""
    from llava_keeplora.config import parse_config

    folder = tmp_path_factory.mktemp("files") / "run"
    return driven(parse_config(tree(folder) | {"tasks": [str(files["colours"]), str(files["stripes"])]}))


@pytest.fixture(scope="module")
def finished(tree, given, tmp_path_factory):
    """The same run from datasets, stopped in the middle of the second task's training and gone on with."""
    folder = tmp_path_factory.mktemp("objects") / "run"
    with pytest.MonkeyPatch.context() as patch:
        from llava_keeplora.sequence import runner

        patch.setattr(runner, "write_run_report", lambda root: None)
        run = Run(tree(folder), datasets=given("colours", "stripes"), callbacks=[Steps(stop_at=5)])
        with pytest.raises(KeyboardInterrupt):
            run.train()
        assert run.matrix["keeplora"].rows[0][0] is not None, "the first task is scored"
        assert run.matrix["keeplora"].rows[1][1] is None
        Run.open(folder, datasets=given("colours", "stripes"), callbacks=[Steps]).train()
    return folder


def test_datasets_give_bit_for_bit_what_their_files_give_after_a_stop_too(finished, from_files):
    assert learned(finished) == learned(from_files) and len(learned(finished)) > 4


def test_callbacks_see_every_task_and_the_journal_lists_their_classes(finished):
    entries = map(json.loads, (finished / "keeplora" / "journal.jsonl").read_text().splitlines())
    assert [e["info"]["callbacks"] for e in entries if e["stage"] == "TRAINED"] == [["Steps"], ["Steps"]]


def test_the_matrix_becomes_a_frame_a_plot_and_a_table(finished):
    matrix = Run.open(finished).matrix
    frame = matrix.to_pandas()
    assert list(frame.columns) == ["colours", "stripes"]
    assert list(frame.index) == [("keeplora", row) for row in ("zero-shot", "colours", "stripes")]
    assert frame.values.tolist() == [matrix["zero-shot"].zero_shot, *matrix["keeplora"].rows]
    assert matrix.metrics().loc["keeplora", "last"] == pytest.approx(frame.iloc[-1].mean())
    texts = [text.get_text() for text in matrix.plot().axes[0].texts]
    assert texts == [f"{value:.1f}" for value in frame.values.flatten()]
    assert matrix._repr_html_().count('<th scope="col">stripes</th>') == 1


def test_a_predictor_answers_as_the_run_did(finished, given):
    run = Run.open(finished, datasets=given("colours", "stripes"))
    answers = run.predictor("colours", at_task=1).predict(list(run.data("colours")))
    path = finished / "keeplora" / "task-01-colours" / "predictions" / "colours.jsonl"
    recorded = {r["id"]: r["text"] for r in map(json.loads, path.read_text().splitlines())}
    assert dict(zip(run.data("colours").ids, answers, strict=True)) == recorded


@pytest.mark.slow
def test_a_run_is_extended_by_a_dataset(finished, given, tables, tmp_path, from_files, files):
    import shutil

    for source, name in ((finished, "objects"), (from_files, "files")):
        shutil.copytree(source, tmp_path / name)
    run = Run.open(tmp_path / "objects", datasets=given("colours", "stripes"))
    matrix = run.extend("corners", given("corners")["corners"], num_train_epochs=2)
    other = Run.open(tmp_path / "files").extend(str(files["corners"]), num_train_epochs=2)
    assert run.tasks == ["colours", "stripes", "corners"] and matrix["keeplora"] == other["keeplora"]
    assert learned(tmp_path / "objects") == learned(tmp_path / "files")


def test_a_run_of_datasets_is_exported(finished, given, tmp_path, quick_reload):
    run = Run.open(finished, datasets=given("colours", "stripes"))
    exported = run.export("adapter", tmp_path / "out", base_id="user/tiny", examples=2)
    assert exported.tasks == 2 and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_what_needs_no_data_works_without_them(finished, capsys):
    from llava_keeplora.cli import main
    from llava_keeplora.report.run_report import read_side_by_side, settings_of

    assert main(["doctor", str(finished)]) == 0, capsys.readouterr()
    assert read_side_by_side([finished]).keys() == {"zero-shot", "keeplora"} and settings_of([finished])
    assert Run.open(finished).tasks == ["colours", "stripes"]
    recipes = json.loads((finished / "config.json").read_text())["tasks"]
    assert [Path(task).parent for task in recipes] == [finished / "recipes"] * 2


def test_going_on_without_the_datasets_is_one_sentence(finished, capsys):
    from llava_keeplora.cli import main

    assert main(["extend", str(finished), "--task", "digits"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and "colours" in sentence and "datasets=" in sentence


@pytest.mark.parametrize(
    "given_names, match",
    [
        (["birds"], "'birds'.*no task of the run"),
        (["colours", "digits"], "'digits'.*no task"),
    ],
)
def test_a_dataset_that_is_no_task_is_refused(tree, tables, tmp_path, given_names, match):
    config = {**tree(tmp_path / "run"), "tasks": ["colours"]}
    with pytest.raises(UserError, match=match):
        Run(config, datasets=dict.fromkeys(given_names, tables["colours"]))


def change(table, **changes):
    return {split: rows.rename_columns(changes) for split, rows in table.items()}


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda t: t["train"], "no split 'test'.*train_test_split"),
        (lambda t: change(t, label="species"), "columns image, species.*image and label"),
        (lambda t: {**change(t, label="species"), "kind": "classification"}, "birds.*no column 'label'"),
        (lambda t: t["train"].to_iterable_dataset(), "stream.*streaming=False"),
        (lambda t: t["train"].to_list(), "list.*Dataset"),
        (lambda t: {s: rows.with_transform(lambda x: x) for s, rows in t.items()}, "transform.*map"),
        (lambda t: {**t, "promt": "a {c}"}, "promt.*did you mean 'prompt'"),
        (lambda t: {**t, "extends": "digitz"}, "digitz"),
        (lambda t: {**t, "kind": "captioning"}, "recipe of the dataset 'birds' lacks the key 'metric'"),
    ],
)
def test_a_dataset_that_is_no_tasks_data_is_refused_in_one_sentence(tree, tables, tmp_path, spoil, match):
    with pytest.raises(UserError, match=match):
        run = Run(tree(tmp_path / "run"), datasets={"birds": spoil(tables["colours"])})
        run.data("birds", "train")


def test_other_data_and_another_recipe_than_the_runs_are_refused(finished, given, tables):
    swapped = {"colours": tables["stripes"], "stripes": tables["stripes"]}
    with pytest.raises(UserError, match="colours.*"):
        Run.open(finished, datasets=swapped).train()
    with pytest.raises(UserError, match="recipe of 'colours' .prompt. is not the one"):
        Run.open(finished, datasets={"colours": {**tables["colours"], "prompt": "{c}"}})


def test_a_run_of_files_takes_no_dataset_in_their_place(from_files, tables):
    with pytest.raises(UserError, match="'colours'.*files .parquet."):
        Run.open(from_files, datasets={"colours": tables["colours"]})


def test_what_is_no_callback_is_refused(tree, files, tmp_path):
    with pytest.raises(UserError, match="TrainerCallback"):
        Run({**tree(tmp_path / "run"), "tasks": [str(files["colours"])]}, callbacks=[print])


def test_questions_and_chats_are_read_from_their_columns(tree, tables, tmp_path):
    rows = tables["colours"]["train"].select(range(2))
    images = [row["image"] for row in rows]
    asked = datasets.Dataset.from_dict(
        {"image": images, "question": ["What?", "Which?"], "answer": ["red", "blue"]}
    )
    chats = datasets.Dataset.from_dict(
        {
            "images": [[image] for image in images],
            "messages": [
                [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": answer}]
                for answer in ("red", "blue")
            ],
        }
    )
    for name, table in (("asked", asked), ("chats", chats)):
        run = Run(tree(tmp_path / "run"), datasets={name: {"train": table, "test": table}})
        data = run.data(name)
        assert data.answers == [["red"], ["blue"]] and data.recipe.kind == "vqa"
        assert "What?" in data.questions[0] and data[1].image.size == images[1].size


def test_a_users_recipe_gives_its_prompt_to_a_dataset(tree, tables, files, tmp_path):
    config = {**tree(tmp_path / "run"), "tasks": [str(files["colours"]), "stripes"]}
    run = Run(config, datasets={name: tables[name] for name in ("stripes", "colours")})
    assert run.tasks == ["colours", "stripes"]
    assert run.data("colours").recipe.prompt == "a photo of the {c} ."
    assert run.data("stripes").recipe.prompt == "a photo of a {c}."


def test_importing_the_package_is_quick():
    import subprocess
    import sys

    code = "import sys, llava_keeplora; print(*(m for m in ('torch', 'transformers') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""
