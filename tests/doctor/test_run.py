"""Every kind of damage to a run is told in one sentence, all of them at once, and a whole run has none."""

import json
import re

import pytest
import yaml

from llava_keeplora import cli
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import RunError, UserError
from llava_keeplora.files import write_json


def wrong(run) -> list[str]:
    return [str(found) for found in examine_run(run) if isinstance(found, UserError)]


def test_a_whole_run_has_nothing_to_repair_and_stays_as_it_is(run, capfd):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["doctor", str(run)]) == 0
    out = capfd.readouterr().out
    assert (
        "zero-shot: 4 stages in its journal, finished" in out
        and "keeplora: 16 stages in its journal, finished" in out
    )
    assert "wrong" not in out and "libraries: as at its start" in out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


FIRST = "keeplora/task-01-colours"
DAMAGES = {
    "a flipped bit": (
        lambda run: flip(run / FIRST / "delta.safetensors"),
        "delta.safetensors is not what stage TRAINED of task 1 wrote; restore it",
    ),
    "a cut file": (
        lambda run: (run / FIRST / "state.safetensors").write_bytes(b""),
        "state.safetensors is not what stage CONSOLIDATED of task 1 wrote; restore it",
    ),
    "a lost file": (
        lambda run: (run / FIRST / "predictions/stripes.jsonl").unlink(),
        "stripes.jsonl, written by stage EVALUATED of task 1, is missing; restore it",
    ),
    "a file too many": (
        lambda run: (run / FIRST / ".delta.safetensors.7.part").write_bytes(b"x"),
        ".delta.safetensors.7.part is in no journal; remove it",
    ),
    "a torn journal": (
        lambda run: (run / "keeplora/journal.jsonl").open("a").write('{"task'),
        "the last line of .*keeplora/journal.jsonl is torn, as a kill leaves it; run the same command again",
    ),
    "a journal without its head": (
        lambda run: cut_head(run / "zero-shot/journal.jsonl"),
        "zero-shot: the journal's stages are out of order",
    ),
    "a broken journal line": (
        lambda run: (run / "zero-shot/journal.jsonl").write_text("x\n" * 2),
        "line 1 is not a journal entry",
    ),
    "another matrix": (
        lambda run: rewrite(run / "keeplora/matrix.json", lambda m: m["rows"][0].__setitem__(1, 1.5)),
        "matrix.json has another score for task 'stripes' than .*task-01-colours/scores.json; run the same command again",
    ),
    "no matrix": (
        lambda run: (run / "keeplora/matrix.json").unlink(),
        "there is no matrix file .*; run the same command again",
    ),
    "another identity": (
        lambda run: rewrite(run / "identity.json", lambda i: i.update(seed=7)),
        "config.json and identity.json are of different runs \\(seed\\); restore both",
    ),
    "another recipe": (
        lambda run: change_recipe(run / "recipes/stripes.yaml"),
        "recipes/stripes.yaml is not the recipe of 'stripes' that .*zero-shot was planned with; restore it",
    ),
}


def cut_head(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def change_recipe(path):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"prompt": "the {c} ."}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_one_sentence(run, damage):
    spoil, words = DAMAGES[damage]
    spoil(run)
    found = wrong(run)
    assert len(found) == 1 and re.search(words, found[0])


def test_all_damages_are_reported_at_once_with_code_2(run, capfd):
    for name in ("a flipped bit", "a lost file", "a file too many", "another identity"):
        DAMAGES[name][0](run)
    assert cli.main(["doctor", str(run)]) == 2
    out, err = capfd.readouterr()
    assert out.count("wrong\t") == 4 and "has 4 things to repair" in err


@pytest.mark.parametrize("name", ["config.json", "identity.json", "versions.json"])
def test_a_damaged_file_of_the_run_itself_is_refused_by_name(run, name):
    (run / name).write_text("{")
    with pytest.raises(RunError, match=f"{name} cannot be read .*; restore it or start over"):
        wrong(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path, capfd):
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert (
        "is not a run folder (it has no config.json); name the output_dir of a run" in capfd.readouterr().err
    )


def test_other_library_versions_are_reported_and_no_damage(run):
    rewrite(run / "versions.json", lambda versions: versions.update(torch="1.0", gone="2"))
    told = next(found for found in examine_run(run) if str(found).startswith("libraries"))
    assert "torch 1.0 → " in told and "gone 2 → none" in told and wrong(run) == []


def test_a_run_that_is_not_finished_says_what_comes_next(run):
    journal = run / "keeplora/journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:6]))
    assert "keeplora: 6 stages in its journal, next is TRAINED of task 1" in [
        str(found) for found in examine_run(run)
    ]
    assert wrong(run) == []


def test_other_versions_are_a_warning_when_a_run_goes_on(run, caplog, monkeypatch):
    from llava_keeplora.saved_run import load_run
    from llava_keeplora.sequence import runner

    rewrite(run / "versions.json", lambda versions: versions.update(peft="0.1"))
    before = (run / "versions.json").read_bytes()
    monkeypatch.setattr(runner, "write_run_report", lambda root: None)
    runner.run(load_run(run))
    assert (
        f"{run} was begun with other versions" in caplog.text
        and "(peft 0.1 → " in caplog.text
        and "last digits" in caplog.text
    )
    assert (run / "versions.json").read_bytes() == before


@pytest.mark.parametrize("spoil", ["values", "tensors"])
def test_a_damaged_checkpoint_within_a_task_is_named_and_a_whole_one_is_not(run, spoil):
    import torch

    from llava_keeplora.sequence.checkpoint import StepCheckpoint, TrainingState

    folder = run / "keeplora/task-03-corners"
    StepCheckpoint(folder).write(
        1, TrainingState({"weights.a": torch.ones(2)}, {"schedule": {"last_epoch": 1}})
    )
    assert wrong(run) == []
    if spoil == "values":
        rewrite(folder / "training.json", lambda record: record["values"]["schedule"].update(last_epoch=7))
    else:
        flip(folder / "training-1.safetensors")
    (told,) = wrong(run)
    assert (
        "training.json has been changed" if spoil == "values" else "training-1.safetensors is not what"
    ) in told
    assert "the task's training begins again" in told
