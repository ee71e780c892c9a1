"""Finished runs, and exports of them that several tests look at."""

import pytest

from llava_keeplora.config import parse_config
from llava_keeplora.export import export_run, export_set, verify
from llava_keeplora.sequence import runner
from shorter_runs import reload_here

BASE_ID = "you/tiny-base@abc123"
WHOLE_PROJECTOR = {"parts": {"connector": {"train": "full", "learning_rate": 1e-3}}}
FORMS = {
    "clip": {},
    "llava": {"parts": {"connector": None}},
    "plain": WHOLE_PROJECTOR,
    "nf4": {**WHOLE_PROJECTOR, "model": {"quantization": "nf4"}},
}


@pytest.fixture(scope="session")
def finished(run_tree, llava_tree, tmp_path_factory):
    """Function (form) → a finished run: `clip`, `llava` (two parts adapted), `plain` and `nf4` (its projector trained in full)."""
    done = {}

    def run(form):
        if form not in done:
            done[form] = tmp_path_factory.mktemp(form) / "run"
            tree = run_tree if form == "clip" else llava_tree
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(runner, "write_run_report", lambda root: None)
                runner.run(parse_config(tree(done[form], methods={"keeplora": {}}, **FORMS[form])))
        return done[form]

    return run


@pytest.fixture
def quick_reload(monkeypatch):
    """Exports are loaded again in this process; other tests do it in a fresh one."""
    monkeypatch.setattr(verify, "verify_in_fresh_process", reload_here)


@pytest.fixture(scope="session")
def exported(finished, tmp_path_factory):
    """Function (`clip` or `llava`) → (folder, what `export_run` says of it) of an adapter with everything at its default,
    loaded again in this process; test_adapter.py does it in a fresh one."""
    done = {}

    def export(run):
        if run not in done:
            folder = tmp_path_factory.mktemp(run) / "you" / f"{run}-adapter"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(verify, "verify_in_fresh_process", reload_here)
                done[run] = (
                    folder,
                    export_run(finished(run), "adapter", folder, base_id=BASE_ID, name=f"you/{run}-adapter"),
                )
        return done[run]

    return export


@pytest.fixture(scope="session")
def adapter_sets(finished, tmp_path_factory):
    """Function (`clip` or `llava`, options) → (folder, what `export_set` says of it), each written once."""
    done = {}

    def export(run, **options):
        key = run, repr(sorted(options.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp(run) / "you" / f"{run}-set"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(verify, "verify_in_fresh_process", reload_here)
                name = f"you/{run}-set"
                done[key] = (
                    folder,
                    export_set(finished(run), folder, base_id=BASE_ID, name=name, **options),
                )
        return done[key]

    return export


@pytest.fixture(scope="session")
def states(finished, tmp_path_factory):
    """Function (task) → the CLIP run's state after a task."""
    done = {}

    def export(task):
        if task not in done:
            with pytest.MonkeyPatch.context() as patch:
                # Loading again is tested below, once.
                patch.setattr(
                    "llava_keeplora.export.run_export.verify_export",
                    lambda folder, form, base, batch, meant, layers: (meant, meant),
                )
                done[task] = tmp_path_factory.mktemp("state") / "state"
                export_run(finished("clip"), "state", done[task], at_task=task, base_id="you/tiny-base")
        return done[task]

    return export
