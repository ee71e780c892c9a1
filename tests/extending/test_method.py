"""A method of one's own, from a file next to the configuration: run, killed and resumed, extended, reported, exported, imported."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from llava_keeplora.cli import main
from llava_keeplora.config import load_config, parse_config
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import ConfigError, RunError, UserError
from llava_keeplora.export import import_state, verify
from llava_keeplora.export.run_export import export_run
from llava_keeplora.report.run_report import write_run_report
from llava_keeplora.run_folder import read_dumped
from llava_keeplora.saved_run import extended, load_run, read_identity
from llava_keeplora.sequence.fork import fork
from llava_keeplora_recipes.registry import PluginError
from shorter_runs import reload_here

EXAMPLE = Path(__file__).parents[2] / "docs/examples/quiet_lora.py"
LABEL = "quiet_lora-QuietLora"


@pytest.fixture(scope="module")
def home(tmp_path_factory, run_tree, tiny_tasks):
    """A folder with the example, and a configuration that names it."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copyfile(EXAMPLE, folder / "quiet_lora.py")
    tasks = [str(task) for task in tiny_tasks[:2]]
    tree = run_tree(folder / "run", methods={"quiet_lora:QuietLora": {"strength": 10.0}}, tasks=tasks)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def finished(home, driven):
    """The run, done; shared, so copy it before changing it."""
    return driven(load_config(str(home / "run.yaml")))


@pytest.fixture
def copied(home, finished, tmp_path):
    """A copy of folder and run, for a test that changes them."""
    shutil.copytree(home, tmp_path / "own")
    text = (tmp_path / "own/run/config.json").read_text()
    (tmp_path / "own/run/config.json").write_text(text.replace(str(home), str(tmp_path / "own")))
    return tmp_path / "own"


def weights(run):
    return {path.relative_to(run): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


def test_the_example_has_at_most_forty_lines():
    body = EXAMPLE.read_text().split('"""', 2)[2].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 40


def test_the_label_is_a_folder_and_the_identity_has_no_path_but_the_source(home, finished):
    identity = read_identity(finished)["methods"][LABEL]
    assert (finished / LABEL / "journal.jsonl").is_file() and identity["method"] == "quiet_lora:QuietLora"
    assert (
        list(identity["source"]) == ["quiet_lora.py"]
        and str(home) not in (finished / "identity.json").read_text()
    )
    assert read_dumped(finished)["methods"][LABEL]["method"] == f"{home / 'quiet_lora.py'}:QuietLora"


def test_it_learns_something_else_than_lora_without_a_penalty(home, finished, driven, tmp_path):
    first, second = sorted(finished.glob(f"{LABEL}/task-0[12]*/delta.safetensors"))
    free = driven(
        load_config(
            str(home / "run.yaml"), [f"methods.{LABEL}.strength=0"], output_dir=str(tmp_path / "free")
        )
    )
    others = sorted(free.glob(f"{LABEL}/task-0[12]*/delta.safetensors"))
    assert first.read_bytes() == others[0].read_bytes() and second.read_bytes() != others[1].read_bytes()


@pytest.mark.slow
def test_a_run_that_is_killed_after_every_stage_ends_with_the_same_weights(
    home, finished, stopped_run, tmp_path
):
    assert weights(stopped_run(home / "run.yaml", tmp_path / "run", LABEL)) == weights(finished)


def test_it_is_extended_from_anywhere_and_forked(finished, copied, driven, tiny_tasks, tmp_path):
    run = driven(extended(copied / "run", str(tiny_tasks[2])))
    assert len(list(run.glob(f"{LABEL}/task-*"))) == 4
    assert weights(finished).items() <= weights(run).items()
    assert list(fork(run, 1, tmp_path / "fork").methods) == [LABEL]


def test_a_changed_source_is_refused_with_the_file_and_doctor_says_so(copied, driven):
    (copied / "quiet_lora.py").write_text(EXAMPLE.read_text() + "\n# changed\n")
    config = load_config(str(copied / "run.yaml"), output_dir=str(copied / "run"))
    with pytest.raises(
        RunError, match=rf"the file quiet_lora\.py of the plug-in at methods\.{re.escape(LABEL)} has changed"
    ):
        driven(config)
    wrong = [str(line) for line in examine_run(copied / "run") if isinstance(line, UserError)]
    assert len(wrong) == 1 and re.search(
        r"quiet_lora\.py of the plug-in 'quiet_lora:QuietLora' is not what", wrong[0]
    )


@pytest.mark.usefixtures("undrawn")
def test_without_the_plug_in_a_run_is_reported_and_examined_and_the_rest_says_what_is_missing(
    copied, tiny_tasks
):
    (copied / "quiet_lora.py").unlink()
    write_run_report(copied / "run")
    lines = [str(line) for line in examine_run(copied / "run")]
    assert sum("quiet_lora" in line and "is not installed" in line for line in lines) == 1
    assert any(f"{LABEL}: " in line and "finished" in line for line in lines)
    for refused in (
        lambda: load_run(copied / "run"),
        lambda: extended(copied / "run", str(tiny_tasks[2])),
        lambda: load_config(str(copied / "run.yaml")),
        lambda: export_run(copied / "run", "adapter"),
    ):
        with pytest.raises(
            (ConfigError, RunError, PluginError), match="quiet_lora.*is not installed.*PYTHONPATH"
        ):
            refused()


@pytest.mark.usefixtures("undrawn")
def test_doctor_and_report_execute_nothing_of_it(copied):
    (copied / "quiet_lora.py").write_text("raise SystemExit('executed')\n")
    assert [line for line in examine_run(copied / "run") if isinstance(line, UserError)]
    write_run_report(copied / "run")


def test_a_state_that_names_it_is_imported_only_if_that_is_allowed(
    home, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(verify, "verify_in_fresh_process", reload_here)
    export_run(finished, "state", tmp_path / "state", base_id="user/base", examples=2)
    text = (tmp_path / "state/config.json").read_text()
    assert str(home) not in text and "quiet_lora:QuietLora" in text
    base = read_dumped(finished)["model"]["name_or_path"]
    monkeypatch.chdir(home)
    with pytest.raises(
        RunError,
        match="'quiet_lora:QuietLora', which is not built in and would be executed; add --allow-plugin",
    ):
        import_state(str(tmp_path / "state"), tmp_path / "refused", base=base)
    arguments = ["import", str(tmp_path / "state"), "--base", base, "--allow-plugin", "--into"]
    assert main([*arguments, str(tmp_path / "taken")]) == 0
    assert list(load_run(tmp_path / "taken").methods) == [LABEL]
    other = tmp_path / "other"
    other.mkdir()
    (other / "quiet_lora.py").write_text(EXAMPLE.read_text() + "\n# another\n")
    monkeypatch.chdir(other)
    with pytest.raises(RunError, match="another source than the state was made with"):
        import_state(str(tmp_path / "state"), tmp_path / "refused", base=base, allow_plugin=True)


def test_two_methods_of_one_label_are_refused(run_tree, tmp_path):
    with pytest.raises(ConfigError, match="would share a folder"):
        parse_config(run_tree(tmp_path / "run", methods={"a/ewc.py:Ewc": {}, "b/ewc.py:Ewc": {}}))
