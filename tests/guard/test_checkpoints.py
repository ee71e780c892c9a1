"""`llava-keeplora guard` on two checkpoints: the verdict, its exit code, and what a pull request shows."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llava_keeplora.cli import main
from llava_keeplora.guard import checkpoints, ci
from llava_keeplora.guard.ci import workflow_text
from llava_keeplora.guard.text import verdict_markdown
from llava_keeplora_eval.models import load_clip, resolve_model

TINY = Path(resolve_model("tiny-clip"))


@pytest.fixture(scope="module")
def watched(tiny_tasks) -> str:
    return str(tiny_tasks[0])


def judged(into: Path, base: Path, tuned: Path, *watch: str) -> int:
    return main(
        ["guard", "--base", str(base), "--tuned", str(tuned), "--into", str(into), "--max-drop", "30"]
        + ["--summary", str(into.with_suffix(".md")), "--watch", *watch]
    )


def test_no_drop_at_all_is_a_change_of_at_least_0(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "_answers_of_base", lambda *asked: ({}, 0.0))
    answerer = SimpleNamespace(answers=lambda *asked: {})
    monkeypatch.setattr(checkpoints, "_Answerer", lambda *asked: answerer)
    limit = checkpoints._limit(checkpoints.Comparison("base", "tuned", 0.0, 0.95, tmp_path), None)
    assert f"{limit.least:+g}" == "+0"


def test_a_model_that_did_not_change_ships_and_its_answers_are_kept(
    tiny_clip, watched, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    assert judged(tmp_path / "same", tiny_clip, tiny_clip, watched) == 0
    out = capsys.readouterr().out
    assert "ship; of 1 limit" in out and "noise" in out
    assert (tmp_path / "step.md").read_text() == (tmp_path / "same.md").read_text()
    assert {p.parent.name for p in (tmp_path / "same").rglob("*.jsonl")} == {"base", "tuned", "noise"}
    # Answers of another model are not taken for this one's; the base's are kept.
    broken = other_model(tiny_clip, tmp_path / "broken")
    judged(tmp_path / "same", tiny_clip, broken, watched)
    assert "4 worse, 2 better" in capsys.readouterr().out
    count = Counter(p.parent.name for p in (tmp_path / "same").rglob("*.jsonl"))
    assert count == {"base": 1, "tuned": 2, "noise": 2}


def other_model(source: Path, path: Path) -> Path:
    """Copy a model and turn its text features around, so that it answers wrong."""
    shutil.copytree(source, path)
    weights = load_file(path / "model.safetensors")
    weights["text_projection.weight"] *= -1
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def test_an_adapter_is_judged_like_the_checkpoint_that_it_makes(tiny_clip, watched, tmp_path):
    model, processor = load_clip(str(tiny_clip))
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tiny_clip, tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for tuned in ("adapter", "merged"):
        judged(tmp_path / f"of-{tuned}", tiny_clip, tmp_path / tuned, watched)
    judged(tmp_path / "of-itself", tmp_path / "adapter", tmp_path / "adapter", watched)
    records = [json.loads((tmp_path / f"of-{name}/guard.json").read_text()) for name in ("adapter", "merged")]
    assert records[0]["limits"] == records[1]["limits"] and records[0]["limits"][0]["worse"]
    same = json.loads((tmp_path / "of-itself/guard.json").read_text())["limits"][0]
    assert same["change"] == 0 and same["after"] == records[0]["limits"][0]["after"]


def test_a_recipe_that_is_gone_is_code_2_and_one_sentence(tiny_clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    assert judged(tmp_path / "none", tiny_clip, tiny_clip, str(tmp_path / "gone.yaml")) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: the guard can't be evaluated: there is no recipe file")
        and error.count("\n") == 1
    )
    assert (tmp_path / "step.md").read_text().startswith("## No verdict\n\nthe guard can't be evaluated")


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("name", ["/gone", "./gone", "~/gone", "a/b/gone", "here/gone", "tinyclip"])
def test_a_model_that_is_not_there_is_refused_before_the_other_one_answers(
    which, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(checkpoints, "answer", lambda *asked: pytest.fail("a model has answered"))
    models = {"base": "tiny-clip", "tuned": "tiny-clip"} | {which: name}
    words = [f"--{key}={value}" for key, value in models.items()]
    assert main(["guard", *words, "--watch", "shapes", "--into", "judged"]) == 2
    error = capsys.readouterr().err
    assert f"there is no {'model' if name == 'tinyclip' else 'folder'} '{name}'" in error
    assert error.count("\n") == 1


def test_an_adapter_whose_own_base_is_gone_is_refused_before_the_base_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "answer", lambda *asked: pytest.fail("a model has answered"))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        config = {"base_model_name_or_path": str(tmp_path / "gone")}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    assert judged(tmp_path / "judged", tmp_path / "first", tmp_path / "second", "shapes") == 2
    assert f"there is no folder '{tmp_path / 'gone'}'" in capsys.readouterr().err


def test_examples_that_can_get_no_points_are_a_warning(tiny_clip, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(checkpoints, "_limit", lambda given, data: None)
    monkeypatch.setattr(checkpoints, "judge", lambda *given: {})
    monkeypatch.setattr("llava_keeplora.guard.watch.check_references", lambda data: "1 of 9 get 0")
    given = checkpoints.Comparison(str(tiny_clip), str(tiny_clip), 1.0, 0.95, tmp_path)
    checkpoints.compare_checkpoints(given, ["shapes"])
    assert "1 of 9 get 0" in caplog.text


def test_text_of_a_model_is_no_markup_of_the_summary():
    limit = {
        "of": "watch task",
        "task": "faq",
        "outcome": "broken",
        "limit": -1.0,
        "change": -9.0,
        "low": -12.0,
        "high": -6.0,
        "noise": None,
        "examples": None,
        "worse": 1,
        "flips": [
            {
                "id": "1",
                "question": "a|b",
                "expected": ["yes"],
                "before": "yes",
                "after": "<img src=x>\n# ![](y)",
            }
        ],
    }
    text = verdict_markdown({"task": "t", "ship": False, "confidence": 0.95, "then": None, "limits": [limit]})
    assert (
        text.startswith("## t: don't ship") and r"a\|b" in text and r"&lt;img src=x&gt; # !\[\](y) |" in text
    )
    assert json.dumps(text).count("\\n") == text.count("\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--confidence", "95"], "confidence must be from 0.5 to below 1 (got 95.0)"),
        (["--batch-size", "0"], "batch_size must be at least 1 (got 0)"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1 (got 0)"),
        (["--max-drop", "-1"], "max_drop must be 0 or more percentage points (got -1.0)"),
        (
            ["--watch", "shapes", "shapes"],
            "the guard watches 'shapes' twice, and each watched recipe has a name of its own; remove one from --watch",
        ),
    ],
)
@pytest.mark.parametrize("init", [[], ["init"]])
def test_a_mistake_in_the_command_is_one_sentence_before_anything_is_done(
    init, given, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = ["guard", *init, "--base", "tiny-clip", "--tuned", "tiny-clip", "--watch", "shapes", *given]
    assert main(words) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- guard init --------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with two models and a recipe on rendered data, and the command that writes the files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "base model")
    other_model(TINY, tmp_path / "tuned")
    Path("faq.yaml").write_text("extends: shapes\nname: faq\n")
    words = ["guard", "init", "--base", "base model", "--tuned", "tuned", "--watch", "faq.yaml", "digits"]
    return lambda *more: main([*words, *more])


def written() -> tuple[str, dict]:
    """The script of the workflow's step, and the hook."""
    workflow = yaml.safe_load(Path(".github/workflows/guard.yml").read_text())
    assert workflow[True] == {"pull_request": None, "workflow_dispatch": None}  # YAML 1.1 reads `on` as true.
    (job,) = workflow["jobs"].values()
    (script,) = [step["run"] for step in job["steps"] if step.get("name") == "Judge the checkpoint"]
    hooks = yaml.safe_load(Path(".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    return script, hooks[0]


def test_init_writes_a_workflow_and_a_hook_that_run_the_command(repository, capsys):
    assert repository("--max-drop", "2.5", "--batch-size", "8", "--into", "judged") == 0
    script, hook = written()
    expected = ["llava-keeplora", "guard", "--base", "base model", "--tuned", "tuned", "--watch", "faq.yaml"]
    expected += ["digits", "--max-drop", "2.5", "--into", "judged", "--batch-size", "8"]
    assert shlex.split(script.replace("\\\n", " ")) == expected == shlex.split(hook["entry"])
    started = re.compile(hook["files"])
    assert all(
        started.search(name) for name in ("tuned/model.safetensors", "faq.yaml", "base model/config.json")
    )
    assert not any(started.search(name) for name in ("tuned.md", "docs/faq.yaml", "faq_yaml"))
    out = capsys.readouterr().out
    assert "written: .github/workflows/guard.yml" in out and "add judged/ to .gitignore" in out


def test_a_path_that_looks_like_an_option_stays_one_word_of_the_workflow():
    words = ["llava-keeplora", "guard", "--base", "base", "--into", "verdict --of today"]
    steps = yaml.safe_load(workflow_text(words, words[-1]))["jobs"]["guard"]["steps"]
    (script,) = [step["run"] for step in steps if "llava-keeplora guard" in step.get("run", "")]
    assert shlex.split(script.replace("\\\n", "")) == words and script.count("\n") == 3


HTTPS = "https://example.org/o/keeplora.git"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, "llava-keeplora==9.9"),
        (
            {"url": HTTPS, "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            f"llava-keeplora @ git+{HTTPS}@abc",
        ),
        ({"origin": HTTPS, "dir_info": {"editable": True}}, f"llava-keeplora @ git+{HTTPS}"),
        (
            {"origin": "https://me:token@example.org/o/k.git", "dir_info": {}},
            "git+https://example.org/o/k.git",
        ),
        ({"origin": "git@example.org:o/keeplora.git", "dir_info": {}}, f"llava-keeplora @ git+{HTTPS}"),
        ({"origin": "/srv/keeplora", "dir_info": {}}, ""),
        ({"dir_info": {}}, ""),
    ],
)
def test_the_workflow_installs_the_package_as_it_is_here(record, expected, tmp_path, monkeypatch):
    folder = tmp_path / "a clone"
    if record and "dir_info" in record:
        subprocess.run(["git", "init", "-q", folder], check=True)
        record["url"] = folder.as_uri()
        if origin := record.pop("origin", None):
            subprocess.run(["git", "-C", folder, "remote", "add", "origin", origin], check=True)
    text = record and json.dumps(record)
    package = SimpleNamespace(version="9.9", read_text=lambda name: text)
    monkeypatch.setattr(ci, "distribution", lambda name: package)
    assert ci.requirement().endswith(expected) if expected else ci.requirement() == ""
    steps = yaml.safe_load(workflow_text(["llava-keeplora", "guard"], "guard"))["jobs"]["guard"]["steps"]
    (step,) = [step for step in steps if step.get("name") == "Install"]
    assert step["env"]["PACKAGE"] == f"${{{{ vars.LLAVA_KEEPLORA || '{ci.requirement()}' }}}}"
    # GitHub's shell, with a pip that prints what it is given.
    script = "pip() { printf '%s\\n' \"$@\"; }\n" + step["run"]
    for value in (ci.requirement(), "git+https://example.org/other"):
        done = subprocess.run(
            ["bash", "-e", "-c", script], env={"PACKAGE": value}, capture_output=True, text=True
        )
        assert done.stdout.splitlines() == (["install", value] if value else [])
        assert value or (done.returncode and "set the repository variable LLAVA_KEEPLORA" in done.stderr)


def test_init_overwrites_nothing_and_writes_nothing_then(repository, capsys):
    Path(".pre-commit-config.yaml").write_text("repos: []\n")
    assert repository() == 2
    assert re.search(r"already \.pre-commit-config\.yaml.*by hand", capsys.readouterr().err)
    assert Path(".pre-commit-config.yaml").read_text() == "repos: []\n" and not Path(".github").exists()


def test_init_refuses_a_recipe_that_is_none_and_notes_a_place_outside(repository, capsys, tmp_path):
    assert repository("--watch", "gone.yaml") == 2 and "gone.yaml" in capsys.readouterr().err
    assert repository("--tuned", str(tmp_path / "tuned")) == 0
    assert "note: " + str(tmp_path / "tuned") in capsys.readouterr().out


@pytest.mark.slow
def test_the_workflow_and_the_hook_do_what_they_say(repository, tmp_path):
    """The step's script in GitHub's shell, and the hook's entry as pre-commit calls it."""
    assert repository() == 0
    script, hook = written()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    Path("step.sh").write_text(script)
    step = ["bash", "-e", "step.sh"]
    done = subprocess.run(step, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 3 and "don't ship" in done.stdout
    summary = Path("summary.md").read_text()
    assert summary.startswith("## tuned: don't ship") and "Got worse in faq:" in summary
    shutil.rmtree("tuned")
    shutil.copytree(TINY, "tuned")
    done = subprocess.run(
        shlex.split(hook["entry"]), env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "tuned: ship" in done.stdout


@pytest.mark.slow
def test_adapters_are_judged_on_the_base_and_against_each_other(tiny_clip, watched, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPModel

    for name, size in (("first", 0.0), ("second", 0.5)):
        model = get_peft_model(CLIPModel.from_pretrained(tiny_clip), LoraConfig(target_modules=["q_proj"]))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.fill_(size)
        model.save_pretrained(tmp_path / name)
    # An adapter on the base: with B = 0 it is the base.
    assert judged(tmp_path / "a", tiny_clip, tmp_path / "first", watched) == 0
    assert "0 worse, 0 better" in capsys.readouterr().out
    judged(tmp_path / "b", tiny_clip, tmp_path / "second", watched)
    on_base = json.loads((tmp_path / "b/guard.json").read_text())["limits"][0]
    # Two adapters, each on the model that it names; and an adapter as the model before.
    judged(tmp_path / "c", tmp_path / "first", tmp_path / "second", watched)
    of_both = json.loads((tmp_path / "c/guard.json").read_text())["limits"][0]
    assert {k: of_both[k] for k in ("before", "after", "change")} == {
        k: on_base[k] for k in ("before", "after", "change")
    }
    assert judged(tmp_path / "d", tmp_path / "first", tiny_clip, watched) == 0
    assert "0 worse, 0 better" in capsys.readouterr().out
