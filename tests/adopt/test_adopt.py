"""A task that was trained elsewhere becomes a task of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import load_config
from llava_keeplora.doctor.run import examine_run
from llava_keeplora.errors import RunError
from llava_keeplora.export import import_state, run_export
from llava_keeplora.journal import Journal
from llava_keeplora.report.run_report import write_run_report
from llava_keeplora.report.terminal import summary
from llava_keeplora.run_folder import Stage
from llava_keeplora.saved_run import extended, load_run
from llava_keeplora.sequence.fork import fork
from llava_keeplora_recipes.errors import RecipeError


@pytest.fixture
def run(one_task_run, tmp_path):
    return Path(shutil.copytree(one_task_run, tmp_path / "run"))


def adopting(run, source, task):
    """The configuration of a run with one more task, that is adopted."""
    return extended(run, str(task), source=str(source))


def protected(run, tasks, label="keeplora"):
    """Layer → M' after so many tasks, from the files."""
    bases = {}
    for folder in sorted((run / label).glob("task-*"))[: tasks + 1]:
        for name, columns in load_file(folder / "state.safetensors").items():
            bases.setdefault(name, []).append(columns.double())
    return {name: torch.cat(columns, dim=1) for name, columns in bases.items()}


def record(run, label, folder="task-02-stripes"):
    return json.loads((run / label / folder / "train.json").read_text())["adopted"]


def test_an_adapter_is_projected_off_what_is_protected_and_the_share_of_its_energy_is_recorded(
    run, peft_adapter, peft_update, driven, tiny_tasks, tmp_path
):
    adapter = peft_adapter(tmp_path / "adapter", use_rslora=True, rank_pattern={"v_proj": 3})
    driven(adopting(run, adapter, tiny_tasks[1]))
    given, M = peft_update(adapter), protected(run, 1)
    taken = load_deltas(run / "keeplora/task-02-stripes/delta.safetensors")
    assert taken.keys() == given.keys() and len(given) == 16
    lost = {}
    for name, change in given.items():
        expected = change - change @ M[name] @ M[name].T
        torch.testing.assert_close(taken[name].dense().double(), expected, atol=1e-6, rtol=0)
        assert (taken[name].dense().double() @ M[name]).abs().max() < 1e-7
        lost[name] = (change @ M[name]).square().sum()
    for part in ("vision", "text"):
        names = [name for name in given if name.startswith(part)]
        naive = sum(lost[n] for n in names) / sum(given[n].square().sum() for n in names)
        assert record(run, "keeplora")["parts"][part] == pytest.approx(float(naive), rel=1e-5)
    before = record(run, "keeplora")["before"]
    assert before.keys() == {"colours", "stripes"}
    assert all(0 <= score["score"] <= 100 for score in before.values())


def test_sequential_lora_takes_adapters_over_whole_one_after_the_other(
    run_config, peft_adapter, peft_update, driven, tiny_tasks, tmp_path
):
    adapters = [str(peft_adapter(tmp_path / str(seed), seed)) for seed in (1, 2)]
    changes = {"adopted": adapters, "tasks": list(map(str, tiny_tasks[:2])), "methods": {"seq-lora": {}}}
    run = driven(run_config(tmp_path / "run", **changes))
    for adapter, task in zip(adapters, ("task-01-colours", "task-02-stripes"), strict=True):
        taken = load_deltas(run / f"seq-lora/{task}/delta.safetensors")
        for name, change in peft_update(adapter).items():
            torch.testing.assert_close(taken[name].dense().double(), change, atol=1e-6, rtol=0)
        assert record(run, "seq-lora", task)["removed"] == 0
        assert "before" not in record(run, "seq-lora", task)


def test_its_features_are_protected_from_then_on(run, peft_adapter, driven, tiny_tasks, tmp_path):
    driven(adopting(run, peft_adapter(tmp_path / "adapter"), tiny_tasks[1]))
    M = protected(run, 2)
    assert sum(m.shape[1] for m in M.values()) > sum(m.shape[1] for m in protected(run, 1).values())
    driven(extended(run, str(tiny_tasks[2])))
    for name, delta in load_deltas(run / "keeplora/task-03-corners/delta.safetensors").items():
        assert (delta.dense().double() @ M[name]).abs().max() < 1e-6
    matrix = json.loads((run / "keeplora/matrix.json").read_text())
    assert all(value is not None for row in matrix["rows"] for value in row)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_without_training_data_the_row_directions_of_its_update_are_protected(
    run, peft_adapter, driven, tiny_tasks, tmp_path
):
    facts = yaml.safe_load(tiny_tasks[1].read_text())
    del facts["splits"]["train"]
    recipe = tiny_tasks[1].with_name("only-tested.yaml")
    recipe.write_text(yaml.safe_dump(facts))
    with pytest.raises(RecipeError, match="has no split 'train'"):
        driven(extended(run, str(recipe)))
    driven(adopting(run, peft_adapter(tmp_path / "adapter"), recipe))
    before, after = protected(run, 1), protected(run, 2)
    for name, delta in load_deltas(run / "keeplora/task-02-stripes/delta.safetensors").items():
        rows = delta.dense().double()
        new = after[name][:, before[name].shape[1] :]
        S, Vh = torch.linalg.svd(rows)[1:]
        energies = S.square().cumsum(0) / S.square().sum()
        count = int((energies < 0.9).sum()) + 1
        assert new.shape[1] == count, "the energy rule at energy_feature"
        torch.testing.assert_close(new @ new.T, Vh[:count].T @ Vh[:count], atol=1e-5, rtol=0)
    assert record(run, "keeplora")["protects"] == "rows"
    assert "without training data, the row directions" in summary(run, write_run_report(run))
    driven(extended(run, str(tiny_tasks[2])))


@pytest.mark.parametrize(
    "stages", [("PREPARED", "TRAINED"), pytest.param(tuple(Stage), marks=pytest.mark.slow)]
)
def test_an_adoption_stopped_at_its_stages_ends_with_the_same_files(
    run, peft_adapter, driven, tiny_tasks, tmp_path, monkeypatch, stages
):
    adapter = peft_adapter(tmp_path / "adapter")
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    driven(adopting(whole, adapter, tiny_tasks[1]))
    append, seen = Journal.append, set()

    def stop(self, entry):
        first = entry.task == 2 and entry.stage in stages and (self.path, entry.task, entry.stage) not in seen
        seen.add((self.path, entry.task, entry.stage))
        if first and len(seen) % 2:
            append(self, entry)
        elif first:
            spoil(self.path.parent / "task-02-stripes", entry.files)
        if first:
            raise KeyboardInterrupt
        append(self, entry)

    monkeypatch.setattr(Journal, "append", stop)
    for starts in range(1, 100):
        try:
            driven(adopting(run, adapter, tiny_tasks[1]))
            break
        except KeyboardInterrupt:
            continue
    assert starts == 1 + len(stages), "every stage of the adoption was a stop"
    assert files(run) == files(whole)


def spoil(task, files):
    """Leave what a kill may leave within a stage's writes: half of each file, and half of an answer's line."""
    for path in (task.parent / name for name in files):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (task / "as-it-came").mkdir(exist_ok=True)
    (task / "as-it-came/colours.jsonl").write_text('{"id": "0", "te')


def files(run):
    """Relative path → content of every file of a run's methods but the journals, which have the times."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.parent != run and path.name != "journal.jsonl"
    }


def test_an_adapter_of_a_killed_adoption_may_be_gone_but_not_changed(
    run, peft_adapter, driven, tiny_tasks, tmp_path, monkeypatch
):
    adapter, append = peft_adapter(tmp_path / "adapter"), Journal.append

    def stop(self, entry):
        append(self, entry)
        if self.path.parent.name == "keeplora" and (entry.task, entry.stage) == (2, "PREPARED"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            driven(adopting(run, adapter, tiny_tasks[1]))
    peft_adapter(adapter, seed=1)
    with pytest.raises(RunError, match="has changed since .* took it over as task 'stripes'"):
        driven(adopting(run, adapter, tiny_tasks[1]))
    shutil.rmtree(adapter)
    driven(load_run(run))
    assert record(run, "keeplora")["source"] == "adapter"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_run_with_an_adopted_task_is_reported_examined_forked_extended_and_exported(
    run, peft_adapter, driven, tiny_tasks, tmp_path, monkeypatch
):
    adapter = peft_adapter(tmp_path / "adapter")
    driven(adopting(run, adapter, tiny_tasks[1]))
    shutil.rmtree(adapter)
    results = write_run_report(run)
    line = next(line for line in summary(run, results).splitlines() if line.startswith("keeplora: stripes"))
    assert "adopted from adapter; the protected subspace takes away" in line and "as it came" in line
    assert "stripes was adopted from adapter" in (run / "report.html").read_text()
    assert not [line for line in examine_run(run) if isinstance(line, Exception)]
    forked = fork(run, 1, tmp_path / "forked")
    assert forked.adopted == ()
    driven(extended(tmp_path / "forked", str(tiny_tasks[2])))
    driven(load_run(fork(run, 2, tmp_path / "again").output_dir))
    extended_run = extended(tmp_path / "again", str(tiny_tasks[2]))
    assert extended_run.adopted == (None, str(adapter), None)
    monkeypatch.setattr(
        run_export, "verify_export", lambda folder, form, base, batch, meant, layers: (meant, meant)
    )
    state = run_export.export_run(
        run, "state", tmp_path / "state", label="keeplora", base_id="you/base"
    ).folder
    assert (
        not list(state.rglob("adopted.safetensors"))
        and str(tmp_path) not in (state / "config.json").read_text()
    )
    base = json.loads((run / "config.json").read_text())["model"]["name_or_path"]
    config = import_state(str(state), tmp_path / "imported", base=base, data_root=str(tiny_tasks[0].parent))
    driven(load_config(str(config)))
    assert "was adopted from adapter" in card(run, tmp_path, "keeplora")


def card(run, tmp_path, label):
    export = run_export.export_run(run, "adapter", tmp_path / "export", label=label, base_id="you/base")
    return (export.folder / "README.md").read_text()
