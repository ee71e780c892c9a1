"""`llava-keeplora guard` on two checkpoints: the verdict, its exit code, and what a pull request shows."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llava_keeplora.cli import main
from llava_keeplora.guard.text import verdict_markdown


@pytest.fixture(scope="module")
def watched(tiny_tasks) -> str:
    return str(tiny_tasks[0])


def judged(into: Path, base: Path, tuned: Path, *watch: str) -> int:
    return main(
        ["guard", "--base", str(base), "--tuned", str(tuned), "--into", str(into), "--max-drop", "30"]
        + ["--summary", str(into.with_suffix(".md")), "--watch", *watch]
    )


def test_a_model_that_did_not_change_ships_and_its_answers_are_kept(
    tiny_clip, watched, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    assert judged(tmp_path / "same", tiny_clip, tiny_clip, watched) == 0
    out = capsys.readouterr().out
    assert "ship; of 1 limit" in out and "noise" in out
    assert (tmp_path / "step.md").read_text() == (tmp_path / "same.md").read_text()
    assert {p.parent.name for p in (tmp_path / "same").rglob("*.jsonl")} == {"base", "tuned", "noise"}
    # Answers of another model are not taken for this one's.
    other = Path(shutil.copytree(tiny_clip, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["text_projection.weight"] *= -1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert judged(tmp_path / "same", tiny_clip, other, watched) == 2
    assert "that were made otherwise (model differ)" in capsys.readouterr().err


def test_a_recipe_that_is_gone_is_code_2_and_one_sentence(tiny_clip, tmp_path, capsys):
    assert judged(tmp_path / "none", tiny_clip, tiny_clip, str(tmp_path / "gone.yaml")) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: the guard can't be evaluated: there is no recipe file")
        and error.count("\n") == 1
    )


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
        "flips": [{"id": "1", "question": "a|b", "before": "yes", "after": "<img src=x>\n# ![](y)"}],
    }
    text = verdict_markdown({"task": "t", "ship": False, "confidence": 0.95, "then": None, "limits": [limit]})
    assert (
        text.startswith("## t: don't ship") and r"a\|b" in text and r"&lt;img src=x&gt; # !\[\](y) |" in text
    )
    assert json.dumps(text).count("\\n") == text.count("\n")
