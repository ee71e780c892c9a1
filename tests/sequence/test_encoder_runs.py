"""KeepLoRA on two tasks with each type of two-encoder model: what it promises holds, and exports are plain models."""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.export import export_run, verify
from llava_keeplora.methods import METHODS
from llava_keeplora.models import open_model
from llava_keeplora.plan import make_plan
from llava_keeplora.saved_run import extended
from llava_keeplora_eval.files import file_hash
from llava_keeplora_eval.models import load_predictor
from llava_keeplora_eval.predictions import read_predictions
from llava_keeplora_recipes import load_recipe, load_split
from shorter_runs import reload_here
from tiny_encoders import IMAGES, KINDS, PADDING, write_clipseg, write_encoders
from tiny_models import TASKS

#: Run whole in every suite; the others behind the slow marker.
QUICK = ("siglip2",)


@pytest.fixture(
    scope="module", params=[k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base(kind, tmp_path_factory):
    """A small checkpoint; shared, so don't change it."""
    classes = [name for names in TASKS.values() for name in names]
    return write_encoders(tmp_path_factory.mktemp(kind) / "base", kind, classes)


@pytest.fixture(scope="module")
def config(base, run_config, tiny_tasks):
    """Function (folder, **changes) → a run of KeepLoRA on two tasks with every part's usual targets."""
    usual = {
        "tasks": [str(path) for path in tiny_tasks[:2]],
        "model": {"name_or_path": str(base)},
        "parts": {part: {"targets": None} for part in ("vision", "text")},
        "methods": {"keeplora": {}},
    }
    return lambda folder, **changes: run_config(folder, **usual | changes)


@pytest.fixture(scope="module")
def hashes(base):
    return {path.name: file_hash(path) for path in base.iterdir()}


@pytest.fixture(scope="module")
def run(config, hashes, driven, tmp_path_factory):
    """The run, done; shared, so don't change it."""
    return driven(config(tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def last(run, tiny_tasks):
    """The last task's test split, and the run's answers to it after the last task."""
    data = load_split(load_recipe(str(tiny_tasks[1])), "test")
    (file,) = run.glob(f"keeplora/task-02*/predictions/{data.recipe.name}.jsonl")
    answers = read_predictions(file, data)
    return data, [answers[key] for key in data.ids]


def plain_answers(kind, model, place, data):
    """What a plain model of transformers answers, with the processor of a folder."""
    processor = transformers.AutoProcessor.from_pretrained(place)
    images = [data[i].image for i in range(len(data))]
    inputs = processor(
        images=images, text=data.recipe.prompts, return_tensors="pt", **PADDING[kind], **IMAGES.get(kind, {})
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits_per_image
    return [data.recipe.classes[i] for i in logits.argmax(dim=1)]


def test_the_zero_shot_row_is_that_of_plain_transformers(kind, run, base, tiny_tasks):
    model, row = transformers.AutoModel.from_pretrained(base), []
    for path in tiny_tasks[:2]:
        data = load_split(load_recipe(str(path)), "test")
        correct = [data.recipe.classes[label] for label in data.labels]
        answers = plain_answers(kind, model, base, data)
        row.append(100 * sum(a == b for a, b in zip(answers, correct)) / len(data))
    matrix = json.loads((run / "keeplora/matrix.json").read_text())
    assert matrix["zero_shot"] == pytest.approx(row)


def test_updates_are_orthonormal_and_leave_the_protected_subspace_alone_and_the_base_is_as_it_was(
    run, base, hashes
):
    family = open_model(ModelConfig(str(base)))
    family.skeleton(torch.float32)
    expected = {n for part, targets in family.targets.items() for n in family.linear_layers(part, targets)}
    bases = {}
    for folder in sorted((run / "keeplora").glob("task-*")):
        if (file := folder / "delta.safetensors").exists():
            deltas = load_deltas(file)
            assert deltas.keys() == expected
            for name, delta in deltas.items():
                torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(len(delta.A)), atol=1e-5, rtol=0)
                change = delta.dense()
                assert float((change @ bases[name]).norm()) <= 1e-5 * max(1.0, float(change.norm())), name
                assert change.any()
        for name, new in load_file(folder / "state.safetensors").items():
            bases[name] = torch.cat([bases[name], new], dim=1) if name in bases else new
    assert {path.name: file_hash(path) for path in base.iterdir()} == hashes


def test_an_exported_adapter_on_plain_transformers_and_a_merged_checkpoint_answer_as_the_run(
    kind, run, base, last, tmp_path, monkeypatch
):
    monkeypatch.setattr(verify, "verify_in_fresh_process", reload_here)
    data, answers = last
    export_run(run, "adapter", tmp_path / "adapter", base_id="you/tiny-base", name="you/adapter")
    model = PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), tmp_path / "adapter")
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    (delta,) = run.glob("keeplora/task-02*/delta.safetensors")
    assert layers == len(load_deltas(delta))
    assert plain_answers(kind, model, base, data) == answers
    predictor = load_predictor(str(tmp_path / "adapter"), data.recipe, "cpu", base=str(base))
    assert predictor.predict([data[i] for i in range(len(data))]) == answers
    card = (tmp_path / "adapter/README.md").read_text()
    assert all(f"{name}={value!r}" in card for name, value in PADDING[kind].items())
    export_run(run, "merged", tmp_path / "merged", base_id="you/tiny-base", name="you/merged")
    merged = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    assert plain_answers(kind, merged, tmp_path / "merged", data) == answers


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind == "chinese_clip" else pytest.mark.slow) for kind in KINDS],
    indirect=True,
)
def test_a_run_stopped_within_training_ends_with_the_same_files(
    config, run, run_to_the_end, stop_within_training, left_behind, tmp_path, kind
):
    """The text encoder of `chinese_clip` trains with dropout, so the same numbers are drawn again."""
    stopped = stop_within_training(2)
    assert run_to_the_end(config(tmp_path / "run")) == 3 and len(stopped) == 2
    assert left_behind(tmp_path / "run") == left_behind(run)


@pytest.mark.slow
def test_a_run_extended_ends_as_one_of_all_its_tasks(config, run, drive, outcome, tiny_tasks, tmp_path):
    drive(config(tmp_path / "run", tasks=[str(tiny_tasks[0])]))
    drive(extended(tmp_path / "run", str(tiny_tasks[1])))
    tensors = {name: sha for name, sha in outcome(run).items() if name.endswith(".safetensors")}
    assert tensors and tensors.items() <= outcome(tmp_path / "run").items()


@pytest.mark.parametrize(
    ("kind", "learning"),
    [
        pytest.param("siglip2", ["seq-lora", "keeplora", "keeplora++"], id="siglip2"),
        *(pytest.param(kind, None, id=f"{kind}-all", marks=pytest.mark.slow) for kind in KINDS),
    ],
    indirect=["kind"],
)
def test_every_method_runs_or_is_refused_in_a_sentence(
    config, driven, tiny_tasks, tmp_path, base, kind, learning
):
    """All that don't run are refused; of the others those of `learning` run, or all."""
    model_type = transformers.AutoConfig.from_pretrained(base).model_type
    options = {"zscl": {"reference": str(tiny_tasks[2])}}
    methods = {
        name: options.get(name, {})
        for name, method in METHODS.items()
        if method.trainable and "clip" in method.info.families
    }
    allowed = {name: METHODS[name].info.model_types or [model_type] for name in methods}
    for name in [name for name in methods if model_type not in allowed[name]]:
        with pytest.raises(ConfigError, match=f"'{name}' changes layers as .* is a {model_type};"):
            driven(config(tmp_path / "refused", methods={name: methods.pop(name)}))
    methods = {name: methods[name] for name in learning or methods}
    folder = driven(config(tmp_path / "run", methods=methods))
    for label in methods:
        matrix = json.loads((folder / label / "matrix.json").read_text())
        assert len(matrix["rows"]) == 2, label
    scales = {
        name: delta.scale
        for name, delta in load_deltas(next(folder.glob("keeplora++/task-02*/delta.safetensors"))).items()
    }
    plain = load_deltas(next(folder.glob("keeplora/task-02*/delta.safetensors")))
    for name, scale in scales.items():
        factor = 0.2 if name.startswith("vision_model.encoder.layers.0.") else 1.0
        assert scale == pytest.approx(factor * plain[name].scale), name


@pytest.mark.parametrize(
    ("kind", "methods", "problem"),
    [
        ("siglip2", {"seq-lora": {"random_resized_crop": [0.9, 1.0]}}, "crops images to squares"),
        ("chinese_clip", {"keeplora": {"preset": "released-clip"}}, "reads prompts with padding"),
        ("altclip", {"iap": {}}, "changes layers as they are in models of the type clip and metaclip_2"),
    ],
    indirect=["kind"],
)
def test_what_a_type_cannot_follow_is_refused_with_its_name(config, tmp_path, driven, kind, methods, problem):
    with pytest.raises(ConfigError, match=f"{problem}.* {kind}"):
        driven(config(tmp_path / "run", methods=methods))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "model"),
    [
        ({"gradient_checkpointing": True}, {}),
        ({"bf16": True}, {"dtype": "bfloat16"}),
        ({}, {"quantization": "nf4"}),
    ],
)
def test_it_trains_with_less_memory(config, driven, base, run, tiny_tasks, tmp_path, training, model, kind):
    """Recomputing activations changes nothing; half precision and four bits train the same layers."""
    folder = driven(
        config(
            tmp_path / "run",
            tasks=[str(tiny_tasks[0])],
            model={"name_or_path": str(base), **model},
            training=training,
        )
    )
    deltas, plain = (
        load_deltas(next(place.glob("keeplora/task-01*/delta.safetensors"))) for place in (folder, run)
    )
    assert deltas.keys() == plain.keys()
    assert all(delta.dense().isfinite().all() and delta.dense().any() for delta in deltas.values())
    if "gradient_checkpointing" in training:
        for name, delta in deltas.items():
            torch.testing.assert_close(delta.dense(), plain[name].dense(), atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_type_without_a_record_is_taught_exported_and_opened_again_by_its_parts(
    run_config, driven, tiny_tasks, tmp_path, monkeypatch
):
    base = write_clipseg(tmp_path / "base", [name for names in TASKS.values() for name in names])
    parts = {"vision": "vision_model.encoder.layers", "text": "text_model.encoder.layers"}
    config = run_config(
        tmp_path / "run",
        tasks=[str(tiny_tasks[0])],
        model={"name_or_path": str(base), "family": "clip", "parts": parts},
        parts={part: {"targets": None} for part in parts},
        methods={"keeplora": {}},
    )
    run = driven(config)
    monkeypatch.setattr(verify, "verify_in_fresh_process", reload_here)
    done = export_run(run, "merged", tmp_path / "merged", base_id="you/tiny-base", name="you/merged")
    assert done.reloaded.largest < 1e-4
    (delta,) = run.glob("keeplora/task-01*/delta.safetensors")
    assert {name.rsplit(".", 1)[-1] for name in load_deltas(delta)} == {
        "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"
    }  # fmt: skip


def test_a_plan_is_made(config, tmp_path):
    plan = make_plan(config(tmp_path / "run"))
    assert [method.label for method in plan.methods] == ["keeplora"]
