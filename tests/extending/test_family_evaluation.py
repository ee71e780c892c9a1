"""`llava-keeplora-eval --family`: a checkpoint that a plug-in loads is checked, asked and scored as any other."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from llava_keeplora.errors import ConfigError
from llava_keeplora_eval.cli import main
from llava_keeplora_eval.families import FamilyPreparation

#: A CLIP whose configuration names a type that transformers doesn't know.
PLUGIN = '''
import transformers

from llava_keeplora.models import ClipFamily
from llava_keeplora_eval.checkpoints import load_checked
from llava_keeplora_eval.encoders import CLIP


class Renamed(ClipFamily):
    """CLIP under another name."""

    encoders = CLIP

    @property
    def config(self):
        return transformers.CLIPConfig.from_pretrained(self.path)

    def load(self, dtype):
        self.model = load_checked(transformers.CLIPModel, self.path, dtype=dtype)
'''


@pytest.fixture
def renamed(tmp_path, tiny_clip, monkeypatch):
    """A folder with the plug-in, as the working folder, and the tiny CLIP under a type of nobody's."""
    (tmp_path / "own.py").write_text(PLUGIN)
    shutil.copytree(tiny_clip, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"model_type": "my_clip"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(model, task, output, *more) -> int:
    return main(
        ["predict", "--model", str(model), "--task", str(task), "--device", "cpu", "--output", output, *more]
    )


def answers(file) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_a_checkpoint_of_an_unknown_type_answers_as_the_same_weights_of_a_known_one(
    renamed, tiny_clip, tiny_tasks, capsys
):
    assert predict("model", tiny_tasks[0], "refused.jsonl") == 2
    assert "my_clip" in capsys.readouterr().err
    assert predict(tiny_clip, tiny_tasks[0], "plain.jsonl") == 0
    assert predict("model", tiny_tasks[0], "own.jsonl", "--family", "own.py:Renamed") == 0
    assert answers(renamed / "own.jsonl") == answers(renamed / "plain.jsonl") != []
    record = json.loads((renamed / "own.made_by.json").read_text())
    assert record["family"] == "own:Renamed" and len(record["source"]) == 64
    (renamed / "own.py").write_text(PLUGIN + "\n# changed\n")
    capsys.readouterr()
    assert predict("model", tiny_tasks[0], "own.jsonl", "--family", "own.py:Renamed") == 2
    assert "source" in capsys.readouterr().err


def test_data_are_checked_for_it(renamed, tiny_tasks, capsys):
    check = ["data", "check", str(tiny_tasks[0]), "--family", "own.py:Renamed"]
    assert main([*check, "--model", "model"]) == 0
    assert "tokens" in capsys.readouterr().out
    assert main(check) == 2
    assert "--family is 'own.py:Renamed', and no model is given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("own.py:Nobody", "the model family '.*own.py:Nobody' is not in .*own.py"),
        ("missing.py:Renamed", "'missing.py:Renamed' is not installed"),
        ("fractions:Fraction", "'fractions:Fraction' is no model family: it lacks"),
    ],
)
def test_a_family_that_is_none_ends_with_one_sentence(renamed, tiny_tasks, capsys, family, said):
    assert predict("model", tiny_tasks[0], "own.jsonl", "--family", family) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and "Traceback" not in error


def test_a_task_of_another_kind_is_refused_before_the_weights_are_read(renamed, mixed_tasks, capsys):
    (renamed / "model/model.safetensors").unlink()
    assert predict("model", mixed_tasks[0], "own.jsonl", "--family", "own.py:Renamed") == 2
    assert "is a vqa task, and the family 'own.py:Renamed' answers classification" in capsys.readouterr().err


def test_a_family_without_a_preparation_says_the_first_thing_that_is_wrong():
    def refuse(data):
        raise ConfigError("the first question is too long", "shorten it")

    data = SimpleNamespace(questions=["Which?", None], answers=[["red"], ["cat"]])
    wrong = FamilyPreparation(SimpleNamespace(check=refuse)).report(data, learns=True)
    assert [str(error) for error in wrong.errors] == ["the first question is too long; shorten it."]
    fine = FamilyPreparation(SimpleNamespace(check=lambda data: None))
    assert fine.report(data, learns=True).errors == []
    assert [fine.show(data, row) for row in (0, 1)] == [["Which? ⟦red⟧"], ["⟦cat⟧"]]
