"""A model's folder may bring Python files; none of them is run."""

import json
import shutil

import pytest

from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import UserError
from llava_keeplora.models import load_model
from llava_keeplora_eval.models import load_clip, load_predictor


@pytest.fixture
def with_code(tiny_clip, tmp_path):
    """Function (model type or None for its own) → a CLIP whose every auto class is a file that leaves a mark when it is run."""

    def build(model_type):
        folder = shutil.copytree(tiny_clip, tmp_path / "model")
        (folder / "mark.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\n"
            + "class Mark: pass\nConfig = Model = Tokenizer = Images = Processor = Mark\n"
        )
        for name, kinds in {
            "config.json": {
                "AutoConfig": "Config",
                "AutoModel": "Model",
                "AutoModelForImageTextToText": "Model",
            },
            "tokenizer_config.json": {
                "AutoTokenizer": ["mark.Tokenizer", None],
                "AutoProcessor": "Processor",
            },
            "preprocessor_config.json": {"AutoImageProcessor": "Images", "AutoProcessor": "Processor"},
            "processor_config.json": {"AutoProcessor": "Processor", "AutoImageProcessor": "Images"},
        }.items():
            path = folder / name
            if path.exists():
                content = json.loads(path.read_text())
                content["auto_map"] = {
                    kind: f"mark.{value}" if isinstance(value, str) else value
                    for kind, value in kinds.items()
                }
                path.write_text(
                    json.dumps(
                        content | ({"model_type": model_type} if model_type and name == "config.json" else {})
                    )
                )
        return folder

    return build


def test_a_known_model_is_loaded_by_the_librarys_own_classes(with_code, tmp_path):
    family = load_model(ModelConfig(name_or_path=str(with_code(None))))
    assert type(family.model).__module__.startswith("transformers.") and type(
        family.processor.tokenizer
    ).__module__.startswith("transformers.")
    load_clip(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_a_model_that_needs_its_own_code_is_refused_without_a_question(with_code, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("the user was asked"))
    folder = str(with_code("marked"))
    for load in (
        lambda: load_model(ModelConfig(name_or_path=folder)),
        lambda: load_predictor(folder, None, "cpu"),
        lambda: load_clip(folder),
    ):
        with pytest.raises(UserError, match="cannot be loaded"):
            load()
    assert not (tmp_path / "ran").exists()
