"""Where the updates of a run lie, against dense updates and full decompositions."""

import csv
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_keeplora import cli
from llava_keeplora.adapters import Delta, FullDelta, load_deltas
from llava_keeplora.analysis import analyze_run, write_updates
from llava_keeplora.analysis.updates import measure
from llava_keeplora.report.overlap import overlap

TASKS = ["colours", "stripes", "corners"]


@pytest.fixture(scope="module")
def run(run_config, tmp_path_factory):
    """A run of both methods on three tasks."""
    from llava_keeplora.sequence import runner

    folder = tmp_path_factory.mktemp("analysed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_run_report", lambda root: None)
        runner.run(run_config(folder))
    return folder


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    """(folder, label → updates)."""
    into = tmp_path_factory.mktemp("updates")
    found = analyze_run(run)
    write_updates(run, found, into)
    return into, found


def share(change, *bases):
    """The share of a dense change inside what several bases span together, by least squares."""
    span = torch.cat(bases, dim=1).double()
    return float(
        (span @ torch.linalg.lstsq(span, change.double().T, driver="gelsd").solution).square().sum()
        / change.double().square().sum()
    )


@pytest.mark.slow
def test_the_shares_of_sequential_lora_are_those_of_the_dense_update_in_the_weights_svd(
    run, found, tiny_clip
):
    weights = load_file(tiny_clip / "model.safetensors")
    updates = found[1]["seq-lora"].updates
    for update in updates:
        path = (
            run / "seq-lora" / f"task-{TASKS.index(update.task) + 1:02d}-{update.task}" / "delta.safetensors"
        )
        change = load_deltas(path)[update.layer].dense()
        _, s, vh = torch.linalg.svd(weights[f"{update.layer}.weight"].double())
        k = update.principal_directions
        assert s[: k - 1].square().sum() < 0.5 * s.square().sum() <= s[:k].square().sum()
        assert update.principal == pytest.approx(share(change, vh[:k].T), abs=1e-4)
        assert update.energy == pytest.approx(float(change.double().square().sum()), rel=1e-5)
        assert update.features == 0 == update.feature_directions and update.outside == pytest.approx(
            1 - update.principal
        )
    assert len(updates) == 16 * 3 and max(update.principal for update in updates) > 0.1


def test_keeplora_stays_outside_the_principal_subspace_and_the_features_of_earlier_tasks(found):
    updates = found[1]["keeplora"].updates
    assert len(updates) == 16 * 3
    for update in updates:
        assert update.principal < 1e-9 and update.features < 1e-9 and update.outside > 1 - 1e-6
    assert all(u.feature_directions == 0 for u in updates if u.task == "colours") and any(
        u.feature_directions for u in updates if u.task == "corners"
    )


def test_features_count_only_outside_the_principal_subspace_and_only_once():
    torch.manual_seed(0)
    principal = torch.linalg.qr(torch.randn(20, 5)).Q
    new = torch.randn(20, 3)
    features = torch.cat([new, principal[:, :2], new[:, :1] + principal[:, :1]], dim=1)
    A, B = torch.randn(4, 20), torch.randn(7, 4)
    for delta in (Delta(A, B, 0.5), FullDelta({"weight": 0.5 * B @ A})):
        update = measure("t", "vision", "l", delta, principal, features)
        both = share(0.5 * B @ A, principal, new)
        assert update.principal == pytest.approx(share(0.5 * B @ A, principal), abs=1e-6)
        assert update.features == pytest.approx(
            both - update.principal, abs=1e-6
        ) and update.outside == pytest.approx(1 - both, abs=1e-6)
        assert update.feature_directions == 3


def test_an_update_of_zero_lies_nowhere():
    update = measure(
        "t",
        "vision",
        "l",
        Delta(torch.ones(1, 4), torch.zeros(2, 1), 1.0),
        torch.eye(4)[:, :1],
        torch.zeros(4, 0),
    )
    assert (update.energy, update.principal, update.features, update.outside) == (0.0, None, None, None)


def test_a_part_counts_its_layers_by_the_energy_of_their_updates(found):
    one = found[1]["seq-lora"]
    own = [u for u in one.updates if (u.part, u.task) == ("vision", "stripes")]
    total = sum(u.energy for u in own)
    shares = one.shares("vision", "stripes")
    assert shares["principal"] == pytest.approx(sum(u.principal * u.energy for u in own) / total)
    assert shares["random"] == pytest.approx(sum(u.energy * u.principal_directions / 32 for u in own) / total)
    assert sum(shares[place] for place in ("principal", "features", "outside")) == pytest.approx(1)


def test_the_folder_holds_numbers_tables_and_images_of_every_method(run, found):
    into, methods = found
    pictures = {
        f"{kind}-{label}.{end}"
        for kind in ("places", "principal", "overlap")
        for label in ("seq-lora", "keeplora")
        for end in ("png", "svg")
    }
    assert {path.name for path in into.iterdir()} == {"updates.json", "updates.csv", "updates.md"} | pictures
    assert Image.open(into / "places-seq-lora.png").width > 400
    rows = list(csv.DictReader(open(into / "updates.csv")))
    assert len(rows) == 2 * 48 and float(rows[0]["principal"]) == methods["seq-lora"].updates[0].principal
    kept = json.loads((into / "updates.json").read_text())["methods"]["keeplora"]
    paths = [
        run / "keeplora" / f"task-{i:02d}-{name}" / "delta.safetensors"
        for i, name in enumerate(TASKS, start=1)
    ]
    assert kept["tasks"] == TASKS and kept["overlap"] == overlap(paths)
    table = (into / "updates.md").read_text()
    assert "## seq-lora" in table and f"| overlap | {' | '.join(TASKS)} |" in table
    assert "| colours | vision | 0.0 | 0.0 | 100.0 |" in table


def test_a_run_in_progress_is_analysed_up_to_its_last_stage(run, tmp_path, capfd):
    copy = shutil.copytree(run, tmp_path / "run")
    journal = copy / "keeplora/journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[: 4 + 6 + 3]))
    shutil.rmtree(copy / "seq-lora")
    assert cli.main(["analyze", str(copy), "--into", str(tmp_path / "out")]) == 0
    out = capfd.readouterr().out
    assert (
        "## keeplora" in out
        and "stripes" not in out
        and "seq-lora" not in out
        and f"folder: {tmp_path / 'out'}" in out
    )


def refused(capfd, *words) -> str:
    assert cli.main(["analyze", *map(str, words)]) == 2
    return capfd.readouterr().err.splitlines()[-1]


def test_a_method_that_changes_no_weights_is_left_out_and_named(
    run_config, driven, tiny_tasks, tmp_path, caplog, capfd
):
    def made(name, **methods):
        return driven(run_config(tmp_path / name, methods=methods, tasks=[str(tiny_tasks[0])]))

    assert set(analyze_run(made("both", iap={}, **{"seq-lora": {}}))) == {"seq-lora"}
    assert "left out, for they change no linear layer's weights: iap" in caplog.text
    assert "changes the weights of a linear layer, so there are no updates to measure" in refused(
        capfd, made("alone", iap={}), "--into", tmp_path / "out"
    )


def test_a_run_that_cannot_be_analysed_is_refused_in_a_sentence(run, tmp_path, capfd):
    out = tmp_path / "out"
    assert refused(capfd, run, "--general", "digits", "--batch-size", "4", "--into", out) == (
        f"error: {run} is a run, whose updates are measured without tasks and options of a model (--general, --batch-size); leave them out, or name the run's model."
    )
    copy = shutil.copytree(run, tmp_path / "run")
    state = copy / "keeplora/task-01-colours/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert refused(capfd, copy, "--into", out) == f"error: {state} is not what task 1 wrote; restore it."
    (tmp_path / "file").touch()
    assert (
        refused(capfd, run, "--into", tmp_path / "file")
        == f"error: {tmp_path / 'file'} cannot be a folder to write to (File exists); choose another one with --into."
    )
    for label in ("keeplora", "seq-lora"):
        shutil.rmtree(copy / label)
    assert (
        refused(capfd, copy, "--into", out)
        == f"error: {copy} holds no finished task; run its training first."
    )
    assert not out.exists()
