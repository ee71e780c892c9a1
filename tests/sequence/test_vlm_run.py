"""Runs of models other than LLaVA: stopped and gone on with, extended, and of a type that the configuration describes."""

import json
import shutil

import pytest
import torch

from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import ModelConfig, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import open_model
from llava_keeplora.models.layouts import LAYOUTS
from llava_keeplora.saved_run import extended
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.video_inputs import LAYOUTS as VIDEO_LAYOUTS
from llava_keeplora_recipes import load_recipe, load_split
from small_vlms import SMALL_VLMS

PART = {"rank": 2, "alpha": 2, "energy_weight": 0.5, "energy_feature": 0.9}


@pytest.fixture
def vlm_config(small_vlm, mixed_tasks):
    def build(kind, folder, tasks=2, training=(), recipes=None, methods=None, **model):
        model = {"name_or_path": str(small_vlm(kind))} | model
        config = ModelConfig(**model)
        return parse_config(
            {
                "output_dir": str(folder),
                "tasks": [str(path) for path in recipes or (mixed_tasks[0], mixed_tasks[2])][:tasks],
                "model": model,
                "parts": {part: dict(PART) for part in model.get("parts", open_model(config).targets)},
                "methods": methods or {"keeplora": {}},
                "training": {
                    "num_train_epochs": 1,
                    "per_device_train_batch_size": 8,
                    "use_cpu": True,
                    **dict(training),
                },
                "evaluation": {"batch_size": 8, "max_new_tokens": 4},
            }
        )

    return build


def test_a_run_stopped_within_training_ends_as_an_undisturbed_one(
    vlm_config, drive, run_to_the_end, stop_within_training, outcome, tmp_path
):
    drive(vlm_config("qwen2_5_vl", tmp_path / "whole", tasks=1))
    stop_within_training(2)
    assert run_to_the_end(vlm_config("qwen2_5_vl", tmp_path / "stopped", tasks=1)) == 2
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL_VLMS)
def test_a_stopped_run_and_an_extended_one_end_as_an_undisturbed_one(
    kind, vlm_config, drive, run_to_the_end, stop_within_training, outcome, mixed_tasks, tmp_path
):
    drive(vlm_config(kind, tmp_path / "whole"))
    drive(vlm_config(kind, tmp_path / "extended", tasks=1))
    drive(extended(tmp_path / "extended", str(mixed_tasks[2])))
    stop_within_training(2)
    assert run_to_the_end(vlm_config(kind, tmp_path / "stopped")) == 3
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    tensors = {
        name: sha for name, sha in outcome(tmp_path / "whole").items() if name.endswith(".safetensors")
    }
    assert tensors and tensors.items() <= outcome(tmp_path / "extended").items()


@pytest.mark.slow
def test_the_bounds_of_a_model_other_than_llava_end_as_the_bound_row_of_the_matrix(
    vlm_config, driven, tmp_path
):
    run = driven(vlm_config("qwen2_5_vl", tmp_path / "run", methods={"individual": {}, "joint": {}}))
    answered = {"individual": ["01/questions", "02/corners"], "joint": ["02/corners", "02/questions"]}
    for label, expected in answered.items():
        matrix = Matrix.from_json(run / label / "matrix.json")
        assert matrix.bound and matrix.rows[0] == [None, None]
        (_, cells), (name, scores) = matrix.labelled_rows()
        assert name == "bound" and scores == matrix.rows[1] and None not in [*cells, *scores]
        assert matrix.metrics()["last"] == sum(scores) / 2
        paths = sorted((run / label).glob("task-0[12]-*/predictions/*.jsonl"))
        assert [f"{path.parts[-3][5:7]}/{path.stem}" for path in paths] == expected
        last = load_deltas(next((run / label).glob("task-02-*/delta.safetensors")))
        assert last and any(bool(delta.dense().any()) for delta in last.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL_VLMS)
def test_it_trains_with_less_memory(kind, vlm_config, drive, tmp_path):
    """Recomputing activations changes nothing; half precision and four bits train the same layers."""
    forms = {
        "whole": ({}, {}),
        "recomputed": ({"gradient_checkpointing": True}, {}),
        "bf16": ({"bf16": True}, {"dtype": "bfloat16"}),
        "nf4": ({}, {"quantization": "nf4"}),
    }
    deltas = {}
    for name, (training, model) in forms.items():
        config = vlm_config(kind, tmp_path / name, tasks=1, training=training, **model)
        drive(config)
        deltas[name] = load_deltas(next((tmp_path / name).glob("keeplora/task-01*/delta.safetensors")))
    for name, found in deltas.items():
        assert found.keys() == deltas["whole"].keys(), name
        assert all(delta.dense().isfinite().all() for delta in found.values()), name
        assert sum(bool(delta.dense().any()) for delta in found.values()) > len(found) / 2, name
    for name, delta in deltas["recomputed"].items():
        torch.testing.assert_close(delta.dense(), deltas["whole"][name].dense(), atol=1e-6, rtol=1e-4)


@pytest.fixture
def video_task(mixed_tasks, tmp_path):
    """The recipe of questions on videos of two frames each, and on images."""
    folder = shutil.copytree(mixed_tasks[0].parent, tmp_path / "videos")
    for split in ("train", "test"):
        path = folder / f"questions-{split}.json"
        rows = json.loads(path.read_text())
        for row, other in zip(rows[::2], rows[1::2], strict=False):
            row["video"] = [row.pop("image"), other["image"]]
            row["conversations"][0]["value"] = "What color?"
        path.write_text(json.dumps(rows))
    recipe = folder / mixed_tasks[0].name
    recipe.write_text(recipe.read_text().replace("format: llava_json", "format: llava_json\n  frames: 2"))
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("kind", VIDEO_LAYOUTS)
def test_a_stopped_run_on_videos_ends_as_an_undisturbed_one(
    kind, vlm_config, drive, run_to_the_end, stop_within_training, outcome, video_task, tmp_path
):
    assert sum(map(len, load_split(load_recipe(video_task), "train").videos)) > 1
    drive(vlm_config(kind, tmp_path / "whole", recipes=[video_task]))
    stop_within_training(1)
    assert run_to_the_end(vlm_config(kind, tmp_path / "stopped", recipes=[video_task])) == 2
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_parts_of_a_type_that_is_not_known_are_named_in_the_configuration(
    small_vlm, vlm_config, drive, tmp_path, monkeypatch
):
    monkeypatch.delitem(LAYOUTS, "gemma3")
    folder = str(small_vlm("gemma3"))
    with pytest.raises(ConfigError, match="a 'gemma3' model .* name them under model.parts"):
        open_model(ModelConfig(folder))
    parts = {"language": "model.language_model.layers"}
    drive(vlm_config("gemma3", tmp_path / "run", tasks=1, parts=parts))
    learned = json.loads((tmp_path / "run/keeplora/task-01-questions/consolidated.json").read_text())
    assert learned["capacity"] and all(name.startswith(parts["language"]) for name in learned["capacity"])


def test_the_old_name_of_the_connector_is_read(llava_tree):
    tree = llava_tree("unset")
    tree["parts"]["projector"] = tree["parts"].pop("connector") | {"learning_rate": 0.5}
    config = parse_config(tree)
    assert config.parts["connector"].learning_rate == 0.5 and "projector" not in config.parts
    assert config.methods["keeplora"].parts["connector"].learning_rate == 0.5
