"""An exported state is a run that goes on elsewhere, and nothing in it is believed before it is checked."""

import json
import shutil
from pathlib import Path

import pytest

from llava_keeplora import cli
from llava_keeplora.config import load_config
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import ConfigError, RunError, UserError
from llava_keeplora.export import export_run, import_state
from llava_keeplora.export.state import FOLDER
from llava_keeplora.saved_run import extended, read_identity, run_identity
from llava_keeplora.sequence import runner
from llava_keeplora_eval.files import file_hash
from llava_keeplora_recipes import load_recipe

LEARNED = ("*/delta.safetensors", "*/state.safetensors")


@pytest.fixture
def drive(monkeypatch):
    """Function (config) → a run without its report."""
    monkeypatch.setattr(runner, "write_run_report", lambda root: None)
    return runner.run


def learned(run):
    return {
        str(path.relative_to(run)): file_hash(path)
        for pattern in LEARNED
        for path in (run / "keeplora").glob(pattern)
    }


def test_a_run_that_goes_on_from_a_state_learns_bit_for_bit_what_the_run_itself_did(
    states, finished, tiny_clip, tmp_path
):
    config = import_state(str(states(2)), tmp_path / "run", base=str(tiny_clip), data_root=None)
    written = json.loads((tmp_path / "run/config.json").read_text())
    # The images lie where they lay; a recipe's relative paths start at the data root that is given.
    roots = {
        Path(task).parent for task in json.loads((finished("clip") / "config.json").read_text())["tasks"]
    }
    results = runner.run(
        load_config(str(config), data_root=str(roots.pop()), output_dir=written["output_dir"])
    )
    assert learned(tmp_path / "run") == learned(finished("clip"))
    assert json.loads((tmp_path / "run/keeplora/matrix.json").read_text()) == json.loads(
        (finished("clip") / "keeplora/matrix.json").read_text()
    )
    assert results["keeplora"].complete and (tmp_path / "run/report.html").is_file()


@pytest.mark.slow
def test_a_state_is_extended_to_what_a_run_with_the_task_from_the_start_learned(
    run_config, drive, finished, tiny_clip, tiny_tasks, tmp_path, monkeypatch
):
    drive(
        run_config(tmp_path / "two", methods={"keeplora": {}}, tasks=[str(path) for path in tiny_tasks[:2]])
    )
    monkeypatch.setattr(
        "llava_keeplora.export.run_export.verify_export",
        lambda folder, form, base, batch, meant, layers: (meant, meant),
    )
    export_run(tmp_path / "two", "state", tmp_path / "state", base_id="you/tiny-base")
    import_state(str(tmp_path / "state"), tmp_path / "run", base=str(tiny_clip))
    drive(extended(tmp_path / "run", str(tiny_tasks[2]), data_root=str(tiny_tasks[0].parent)))
    assert learned(tmp_path / "run") == learned(finished("clip"))
    assert json.loads((tmp_path / "run/keeplora/matrix.json").read_text()) == json.loads(
        (finished("clip") / "keeplora/matrix.json").read_text()
    )
    assert not [found for found in examine_run(tmp_path / "run") if isinstance(found, UserError)]


def test_a_state_holds_what_was_learned_and_neither_answers_nor_starts_nor_a_path_of_this_machine(
    states, finished, tiny_clip, tiny_tasks
):
    state = states(3)
    files = sorted(path.relative_to(state).as_posix() for path in state.rglob("*") if path.is_file())
    assert learned(state) == learned(finished("clip"))
    assert not [name for name in files if "predictions" in name or "adapters" in name]
    assert {Path(name).suffix for name in files} == {
        ".json",
        ".jsonl",
        ".safetensors",
        ".yaml",
        ".md",
        ".png",
    }
    for name in files:
        if not name.endswith((".png", ".safetensors")):
            text = (state / name).read_text()
            for place in (finished("clip"), tiny_clip, tiny_tasks[0].parent):
                assert str(place) not in text, name
    assert json.loads((state / "config.json").read_text())["model"]["name_or_path"] == "you/tiny-base"


def test_the_recipes_in_a_state_are_the_runs_own(states, tiny_tasks, tmp_path):
    for path in tiny_tasks:
        kept = load_recipe(states(3) / "recipes" / path.name)
        assert kept == load_recipe(path) and kept.fingerprint == load_recipe(path).fingerprint


@pytest.mark.parametrize(
    "facts",
    [
        {"extends": "digits", "name": "own-digits"},
        {"extends": "scene-colour", "name": "own-colours"},
        {
            "extends": "ucit/arxivqa",
            "name": "own-arxiv",
            "source": {"format": "llava_json", "path": "/data/sets/ArxivQA"},
        },
    ],
)
def test_a_recipe_that_extends_another_is_written_out_whole(facts, tmp_path):
    import yaml

    from llava_keeplora.export.state import _recipe_facts

    (tmp_path / "own.yaml").write_text(yaml.safe_dump(facts))
    recipe = load_recipe(tmp_path / "own.yaml")
    (tmp_path / "kept.yaml").write_text(json.dumps(_recipe_facts(recipe)))
    kept = load_recipe(tmp_path / "kept.yaml")
    assert kept.fingerprint == recipe.fingerprint and kept.licence == recipe.licence
    assert not str(kept.source.get("path", "")).startswith("/")


@pytest.mark.slow
def test_a_state_is_loaded_again_by_a_fresh_process(finished, tmp_path):
    done = export_run(finished("clip"), "state", tmp_path / "state", base_id="you/tiny-base")
    assert done.reloaded.largest < 1e-5 and done.own.largest < 1e-5 and done.adapter is None
    assert "llava-keeplora import state --into runs/continued" in (tmp_path / "state/README.md").read_text()


@pytest.mark.slow
def test_import_takes_the_state_out_of_an_adapter_and_says_how_to_go_on(
    exported, finished, tiny_llava, tmp_path, capsys
):
    folder, _ = exported("llava")
    arguments = [
        "import",
        str(folder),
        "--into",
        str(tmp_path / "run"),
        "--base",
        str(tiny_llava),
        "--data-root",
        str(tmp_path),
    ]
    assert cli.main(arguments) == 0
    assert f"`llava-keeplora train --config {tmp_path / 'run' / 'run.yaml'}`" in capsys.readouterr().out
    assert learned(tmp_path / "run") == learned(finished("llava"))
    config = load_config(str(tmp_path / "run/run.yaml"))
    assert config.model.name_or_path == str(tiny_llava) and config.data.root == str(tmp_path)
    assert run_identity(config) == read_identity(tmp_path / "run")
    assert cli.main(arguments) == 2
    assert (
        "is there already and not an empty folder; choose another one with --into." in capsys.readouterr().err
    )


def spoilt(state, tmp_path, change):
    copy = shutil.copytree(state, tmp_path / "copy")
    manifest = json.loads((copy / "state.json").read_text())
    change(copy, manifest["files"])
    (copy / "state.json").write_text(json.dumps(manifest))
    return copy


def rewrite(copy, files, name, change):
    """Change a JSON file, and its hash with it, as somebody who means harm would."""
    content = json.loads((copy / name).read_text())
    change(content)
    (copy / name).write_text(json.dumps(content))
    files[name] = file_hash(copy / name)


def lists(name):
    def change(copy, files):
        files[name] = "0" * 64

    return change


def linked(copy, files):
    outside = copy.parent / "outside.json"
    outside.write_text("{}")
    (copy / "link.json").symlink_to(outside)
    files["link.json"] = file_hash(outside)


def flipped(copy, files):
    path = next(copy.glob("keeplora/task-01-*/delta.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


def journal_outside(copy, files):
    path = copy / "keeplora/journal.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text(
        "\n".join([json.dumps(json.loads(first) | {"files": {"../../secret": "0"}}), *rest]) + "\n"
    )
    files["keeplora/journal.jsonl"] = file_hash(path)


def recipe_outside(path):
    return lambda copy, files: rewrite(
        copy, files, "recipes/colours.yaml", lambda facts: facts["source"].update(path=path)
    )


def config_without(key):
    return lambda copy, files: rewrite(copy, files, "config.json", lambda tree: tree.pop(key))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lists("../config.json"),
            "lists '../config.json', which is no safetensors or JSON file inside its folder",
        ),
        (lists("/etc/passwd.json"), "lists '/etc/passwd.json', which is no"),
        (lists("keeplora/model.pkl"), "lists 'keeplora/model.pkl', which is no"),
        (lists("code.py"), "lists 'code.py', which is no"),
        (lists("gone.json"), "gone.json is not what the export wrote; restore it"),
        (linked, "link.json is a link that leads out of its folder"),
        (flipped, "delta.safetensors is not what the export wrote"),
        (journal_outside, "keeplora/journal.jsonl, line 1 is not a journal entry"),
        (recipe_outside("../../etc"), r"the recipe colours.yaml reads '../../etc', outside the data folder"),
        (recipe_outside("/etc"), "the recipe colours.yaml reads '/etc', outside the data folder"),
        (recipe_outside("~"), "the recipe colours.yaml reads '~', outside the data folder"),
        (config_without("methods"), "config.json is not what a run writes: methods is missing"),
        (
            lambda copy, files: rewrite(
                copy, files, "config.json", lambda tree: tree["tasks"].append("/tmp/evil.yaml")
            ),
            "names the recipe '.*evil.yaml', which is not in it",
        ),
        (
            lambda copy, files: rewrite(
                copy, files, "config.json", lambda tree: tree["training"].update(hub_token="x")
            ),
            "sets training.hub_token, which is for you to set",
        ),
        (
            lambda copy, files: rewrite(
                copy, files, "recipes/colours.yaml", lambda facts: facts.update(extends="/tmp/x.yaml")
            ),
            "the recipe colours.yaml extends another",
        ),
        (
            lambda copy, files: rewrite(copy, files, "config.json", lambda tree: tree.update(trust=True)),
            "unknown key 'trust'",
        ),
        (lambda copy, files: files.pop("identity.json"), "lists no run's files"),
    ],
)
def test_a_state_that_is_damaged_or_leads_out_of_its_folder_is_refused_and_makes_no_run(
    change, words, states, tmp_path
):
    with pytest.raises(UserError, match=words):
        import_state(str(spoilt(states(3), tmp_path, change)), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not [
        path for path in tmp_path.iterdir() if path.name.startswith(".run")
    ]


def test_a_state_behind_a_link_is_refused(states, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / FOLDER).symlink_to(states(3))
    with pytest.raises(RunError, match="is a link that leads out of its folder"):
        import_state(str(tmp_path / "adapter"), tmp_path / "run")


def test_tokens_and_accounts_stay_out_of_what_is_published(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished("clip"), tmp_path / "run")
    for name in ("config.json", "identity.json"):
        tree = json.loads((run / name).read_text())
        for section in (tree, *tree["methods"].values()):
            section["training"] |= {
                "hub_token": "hf_secret",
                "push_to_hub": True,
                "deepspeed": "/home/me/zero2.json",
                "run_name": "mine",
            }
        (run / name).write_text(json.dumps(tree))
    monkeypatch.setattr(
        "llava_keeplora.export.run_export.verify_export",
        lambda folder, form, base, batch, meant, layers: (meant, meant),
    )
    export_run(run, "adapter", tmp_path / "out", base_id="you/tiny-base")
    texts = [
        path.read_text()
        for path in (tmp_path / "out").rglob("*")
        if path.suffix in (".json", ".jsonl", ".md", ".yaml")
    ]
    assert len(texts) > 5 and not [
        text
        for text in texts
        if any(word in text for word in ("hf_secret", "push_to_hub", "/home/me", "run_name"))
    ]


def test_what_holds_no_state_is_refused_with_the_cure(tmp_path):
    with pytest.raises(
        RunError,
        match="holds no state to continue from .no state.json.; import an adapter that was exported with its state",
    ):
        import_state(str(tmp_path), tmp_path / "run")
    with pytest.raises(
        ConfigError,
        match="there is no folder 'no folder', and it is no name on the Hub; give a folder, or user/name",
    ):
        import_state("no folder", tmp_path / "run")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 2}', '{"format": 1, "files": 3}', "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(RunError, match="state.json"):
        import_state(str(tmp_path), tmp_path / "run")


def test_nothing_but_tensors_and_json_comes_along(states, tmp_path, tiny_clip):
    copy = shutil.copytree(states(3), tmp_path / "copy")
    (copy / "keeplora/task-01-colours/evil.py").write_text("raise SystemExit")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    import_state(str(copy), tmp_path / "run", base=str(tiny_clip))
    assert FOLDER not in {path.name for path in (tmp_path / "run").rglob("*")}
    assert {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()} == {
        ".json",
        ".jsonl",
        ".safetensors",
        ".yaml",
    }
