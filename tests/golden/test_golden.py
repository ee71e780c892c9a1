"""Runs of release 0.1.0: the same configurations end with the same numbers, and the old folders open, resume, extend, report and export.

`release-0.1.0.tar.gz` holds two small random base models, their tasks, two configurations and the folders of their runs (without
what a report draws). The numbers were computed by torch 2.13.0 on an x86-64 processor with AMX, on one thread. There they are
compared bit for bit. Elsewhere sums are rounded otherwise, and three things follow that are no change of the method:

- The signs of singular vectors change: A = VᵀG's first rows, a basis and B change sign, and B @ A, UUᵀ and AᵀA don't. So these
  are compared.
- The bias of a key projection adds the same to all scores of a query, and softmax takes it away: its gradient is rounding noise,
  and Adam makes steps of the learning rate's size of it. It is left out.
- Adam's first steps have the gradient's sign, so where a gradient is nearly zero, one element of a thousand goes another way:
  8 of the 42,656 elements of ZSCL's second update (up to 6 % of its matrix's norm each) with the instructions of another
  processor (ATEN_CPU_CAPABILITY=default). So the elements that differ are counted. A real change moves most of them: a learning
  rate 5 % higher, an energy of 0.85 for 0.9 and a missing projection fail (test_a_changed_run_does_not_pass).
"""

import functools
import json
import re
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava_keeplora import cli
from llava_keeplora.config import load_config
from llava_keeplora.export import verify
from llava_keeplora.methods import keeplora
from llava_keeplora.methods.gradient_init import first_step_directions
from llava_keeplora.saved_run import extended, load_run
from llava_keeplora.sequence import runner
from shorter_runs import reload_here

ARCHIVE = Path(__file__).with_name("release-0.1.0.tar.gz")
#: Where the release's runs lay when they were recorded.
RECORDED = "/tmp/gold"
#: On a processor or with libraries of another kind: how far an element may lie from the recorded one (share of the tensor's
#: root mean square), how many elements of a tensor may lie further (share, but one at least), and the difference of scores (points).
CLOSE, FURTHER, POINTS = 0.02, 0.05, 15.0
RUNS = {
    "clip": ["keeplora", "keeplora++", "inflora", "moe-adapters", "zscl"],
    "llava": ["keeplora", "keeplora++", "inflora"],
}


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The release's folder; shared, so copy what you change."""
    root = tmp_path_factory.mktemp("release")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    for path in (*root.glob("run-*/config.json"), *root.glob("run-*/identity.json")):
        path.write_text(path.read_text().replace(RECORDED, str(root)))
    return root


@pytest.fixture
def old(release, tmp_path, monkeypatch):
    """Function (family) → a copy of the release's run, the working folder being the release's."""
    monkeypatch.chdir(release)
    return lambda family: Path(shutil.copytree(release / f"run-{family}", tmp_path / "run"))


@pytest.fixture(scope="module")
def rerun(release, driven, tmp_path_factory):
    """Function (family, overrides, labels) → the folder of the release's run with these overrides and methods (all), made now."""

    def run(family: str, overrides: Sequence[str] = (), labels: Sequence[str] = ()) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(release)
            folder = tmp_path_factory.mktemp(family) / "run"
            # The release read all data in every pass; the default is `auto` since.
            all_data = [
                f"methods.{label}.{key}=1.0"
                for label in ("keeplora", "keeplora++")
                for key in ("gradient_fraction", "feature_fraction")
            ]
            config = load_config(f"{family}.yaml", [*all_data, *overrides], output_dir=str(folder))
            methods = {label: config.methods[label] for label in labels or config.methods}
            return driven(replace(config, methods=methods))

    return run


@pytest.fixture(scope="module")
def fresh(rerun):
    """Function (family) → the folder of the release's run, made now."""
    return functools.cache(rerun)


def same_machine() -> bool:
    """Whether numbers are to be the recorded ones bit for bit."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.__version__.startswith("2.13.0") and "amx_bf16" in flags and torch.get_num_threads() == 1


def comparable(tensors: dict[str, torch.Tensor], file: str, label: str) -> dict[str, torch.Tensor]:
    """Return what does not depend on the processor (see the module's docstring): updates, and projectors for bases."""
    found = {key: tensor.double() for key, tensor in tensors.items() if tensor.is_floating_point()}
    if file == "adapters.safetensors":
        return {key: a.T @ a for key, a in found.items()}
    if file == "state.safetensors" and label != "moe-adapters":
        return {key: basis @ basis.T for key, basis in found.items()}
    updates = {key: tensor for key, tensor in found.items() if not key.endswith((".A", ".B", "k_proj.bias"))}
    pairs = [key.removesuffix(".A") for key in found if key.endswith(".A")]
    return updates | {key: found[f"{key}.B"] @ found[f"{key}.A"] for key in pairs}


def assert_close(expected: torch.Tensor, seen: torch.Tensor, name: object) -> None:
    """Fail where more elements than rounding explains lie away from the recorded ones."""
    limit = CLOSE * expected.square().mean().sqrt()
    further = int(((expected - seen).abs() > limit).sum())
    assert further <= max(1, FURTHER * expected.numel()), (name, further, expected.numel())


def assert_same_numbers(expected: Path, seen: Path, label: str) -> None:
    """Compare every tensor, score and answer that a method left behind."""
    exact = same_machine()
    tensors = sorted(path.relative_to(expected) for path in (expected / label).rglob("*.safetensors"))
    assert (
        tensors == sorted(path.relative_to(seen) for path in (seen / label).rglob("*.safetensors"))
        and len(tensors) >= 2
    )
    for name in tensors:
        a, b = load_file(expected / name), load_file(seen / name)
        assert a.keys() == b.keys(), name
        if not exact:
            a, b = comparable(a, name.name, label), comparable(b, name.name, label)
        for key in a:
            if exact:
                assert torch.equal(a[key], b[key]), (name, key)
            else:
                assert_close(a[key], b[key], (name, key))
    rows = [json.loads((run / label / "matrix.json").read_text()) for run in (expected, seen)]
    scores = [np.array(row["rows"], float) for row in rows]
    assert np.abs(scores[0] - scores[1]).max() <= (0 if exact else POINTS)
    if exact:
        for path in sorted((expected / label).glob("task-*/predictions/*.jsonl")):
            answers = [
                {
                    row["id"]: row["text"]
                    for row in map(json.loads, (run / path.relative_to(expected)).read_text().splitlines())
                }
                for run in (expected, seen)
            ]
            assert answers[0] == answers[1], path


@pytest.mark.parametrize(
    ("family", "label"),
    [
        pytest.param(family, label, marks=[pytest.mark.slow] * (family != "clip"))
        for family, labels in RUNS.items()
        for label in labels
    ],
)
def test_a_run_ends_with_the_numbers_of_the_release(release, fresh, family, label):
    assert_same_numbers(release / f"run-{family}", fresh(family), label)


CHANGES = {
    "learning rate": ["training.learning_rate=0.0105"],
    "energy": ["parts.vision.energy_feature=0.85", "parts.text.energy_feature=0.85"],
    "projection": [],
}


@pytest.mark.parametrize(
    "change", ["energy", *(pytest.param(c, marks=pytest.mark.slow) for c in CHANGES if c != "energy")]
)
def test_a_changed_run_does_not_pass(release, rerun, monkeypatch, change):
    monkeypatch.setitem(globals(), "same_machine", lambda: False)
    if change == "projection":
        # The gradient keeps its share of the protected subspace.
        monkeypatch.setattr(
            keeplora,
            "first_step_directions",
            lambda ctx, ranks, bases, *rest: first_step_directions(
                ctx, ranks, {name: basis[:, :0] for name, basis in bases.items()}, *rest
            ),
        )
    changed = rerun("clip", CHANGES[change], ["keeplora"])
    with pytest.raises(AssertionError, match="safetensors"):
        assert_same_numbers(release / "run-clip", changed, "keeplora")


def test_a_run_that_the_release_began_ends_with_its_numbers(release, old, drive_quietly):
    run = old("clip")
    journal = run / "keeplora/journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    begun = next(
        i
        for i, line in enumerate(lines)
        if '"TRAINED"' in line and '"task": 2' in re.sub(r":\s*", ": ", line)
    )
    journal.write_text("".join(lines[:begun]))
    for path in ("delta.safetensors", "train.json", "state.safetensors", "consolidated.json", "scores.json"):
        (run / "keeplora/task-02-stripes" / path).unlink()
    shutil.rmtree(run / "keeplora/task-02-stripes/predictions")
    drive_quietly(load_run(run))
    assert_same_numbers(release / "run-clip", run, "keeplora")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("family", ["clip", "llava"])
def test_the_release_s_run_is_whole_extends_and_reports(old, drive_quietly, family, capfd):
    run = old(family)
    assert cli.main(["doctor", str(run)]) == 0, capfd.readouterr()
    before = {path: path.read_bytes() for path in run.glob("*/task-0[12]*/*.safetensors")}
    task = {"clip": "tasks/corners.yaml", "llava": "tasks/corners.yaml"}[family]
    drive_quietly(extended(run, task))
    assert all(path.read_bytes() == content for path, content in before.items())
    matrix = json.loads((run / "keeplora/matrix.json").read_text())
    assert (
        len(matrix["rows"]) == 3 and cli.main(["report", str(run)]) == 0 and (run / "report.html").is_file()
    )


@pytest.mark.parametrize("form", [pytest.param("adapter", marks=pytest.mark.slow), "state"])
def test_the_release_s_run_is_exported_and_its_state_imported(old, form, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(verify, "verify_in_fresh_process", reload_here)
    run = old("clip")
    words = [
        "export",
        str(run),
        "--method",
        "keeplora",
        "--as",
        form,
        "--into",
        str(tmp_path / form),
        "--base-id",
        "you/tiny",
    ]
    assert cli.main(words) == 0, capfd.readouterr()
    assert (
        cli.main(["import", str(tmp_path / form), "--into", str(tmp_path / "more"), "--base", "base-clip"])
        == 0
    ), capfd.readouterr()
    assert cli.main(["doctor", str(tmp_path / "more")]) == 0, capfd.readouterr()


@pytest.fixture
def drive_quietly(monkeypatch):
    """Function (config): run it without drawing the report."""

    def drive(config) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(runner, "write_run_report", lambda root: None)
            runner.run(config)

    return drive
