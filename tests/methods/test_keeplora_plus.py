"""The identities of KeepLoRA+: a cosine classifier per learned task beside the text's logits, and KeepLoRA without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from transformers import CLIPModel, CLIPProcessor

import forked
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.export import export_run, verify
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.methods import METHODS, keeplora_plus
from llava_keeplora.models import ClipFamily, Prepared
from llava_keeplora.sequence.fork import fork
from llava_keeplora_eval.predictors import ClipPredictor
from llava_keeplora_recipes import load_recipe, load_split
from run_answers import assert_predictor_answers_as_the_run
from shorter_runs import reload_here

KeepLoraPlus = METHODS["keeplora+"]
#: Adapters learn, the classifier's rows stay as they begin.
STILL = {
    "method": "keeplora+",
    "training": {"learning_rate": 0.0},
    "parts": {part: {"learning_rate": 0.01} for part in ("vision", "text")},
}
NAMES = ("colours", "stripes", "corners")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven):
    methods = {
        "keeplora": {},
        "keeplora+": {},
        "silent": {"method": "keeplora+", "scale": 0.0},
        "still": STILL,
    }
    # The gradient's norm would be summed in another order with one more tensor in it, be that zero.
    return driven(
        run_config(tmp_path_factory.mktemp("plus") / "run", methods=methods, training={"max_grad_norm": 0.0})
    )


@pytest.fixture(scope="module")
def recipes(tiny_tasks):
    return [load_recipe(str(path)) for path in tiny_tasks]


@pytest.mark.parametrize("label", ["keeplora+"])
def test_a_predictor_of_the_finished_run_answers_as_the_run_did(finished, label):
    assert_predictor_answers_as_the_run(finished, label, 2)


def folder(run, label, task):
    return run / label / (f"task-{task:02d}-{NAMES[task - 1]}" if task else "task-00-base")


def rows(run, label, task):
    return load_file(folder(run, label, task) / "kept.safetensors")[f"cosine_classifier.{NAMES[task - 1]}"]


def answers(run, label, stage, task):
    lines = (folder(run, label, stage) / f"predictions/{NAMES[task - 1]}.jsonl").read_text().splitlines()
    return {record["id"]: record["text"] for record in map(json.loads, lines)}


@torch.no_grad()
def features(model, tiny_clip, recipe, split):
    """The split's examples with their unit-length image features and the classes' text logits, by transformers alone."""
    processor, data = CLIPProcessor.from_pretrained(tiny_clip), load_split(recipe, split)
    inputs = processor(
        images=[example.image for example in data],
        text=list(recipe.prompts),
        padding=True,
        return_tensors="pt",
    )
    out = model(**inputs)
    return data, out.image_embeds, out.logits_per_image


def model_after(run, label, task, tiny_clip):
    return (
        load_learned_run(run, label, at_task=task).load().model
        if task
        else CLIPModel.from_pretrained(tiny_clip).eval()
    )


# --- on a run ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_scale_of_zero_is_keeplora_bit_for_bit(finished):
    names = [
        "adapters.safetensors",
        "delta.safetensors",
        "state.safetensors",
        *(f"predictions/{name}.jsonl" for name in NAMES),
    ]
    for task in (1, 2, 3):
        ours, theirs = folder(finished, "silent", task), folder(finished, "keeplora", task)
        for name in names:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_the_rows_begin_as_the_normalised_class_means_of_the_model_that_the_task_finds(
    finished, tiny_clip, recipes
):
    for task, recipe in enumerate(recipes, start=1):
        data, image, _ = features(
            model_after(finished, "still", task - 1, tiny_clip), tiny_clip, recipe, "train"
        )
        found = rows(finished, "still", task)
        assert found.shape == (len(recipe.classes), image.shape[1])
        for label in range(len(recipe.classes)):
            own = image[[i for i, example in enumerate(data) if example.label == label]]
            assert len(own) > 1
            torch.testing.assert_close(found[label], normalize(own.mean(dim=0), dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))


def test_the_rows_are_trained_and_so_are_the_adapters_otherwise_than_without_them(finished):
    for task in (1, 2, 3):
        trained = rows(finished, "keeplora+", task)
        assert float(cosine_similarity(trained, rows(finished, "silent", task)).min()) < 0.9999
        ours, theirs = (
            folder(finished, label, task) / "delta.safetensors" for label in ("keeplora+", "keeplora")
        )
        assert ours.read_bytes() != theirs.read_bytes()


def test_the_first_tasks_A_is_keeploras_since_the_classifier_comes_after_the_gradient(finished):
    ours, theirs = (
        folder(finished, label, 1) / "adapters.safetensors" for label in ("keeplora+", "keeplora")
    )
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_learned_tasks_are_answered_by_both_and_the_others_by_the_text_alone(
    finished, tiny_clip, recipes, stage
):
    """With the rows that were written when the task was learned, at whatever later stage."""
    model = model_after(finished, "keeplora+", stage, tiny_clip)
    for task, recipe in enumerate(recipes, start=1):
        data, image, text = features(model, tiny_clip, recipe, "test")
        logits = text
        if task <= stage:
            logits = text + 30 * cosine_similarity(
                image[:, None], rows(finished, "keeplora+", task)[None], dim=-1
            )
            assert float((logits.argmax(dim=1) != text.argmax(dim=1)).sum()) > 0, (
                "the classifier makes no difference here"
            )
        found = answers(finished, "keeplora+" if stage else "zero-shot", stage, task)
        assert [found[example.id] for example in data] == [
            recipe.classes[i] for i in logits.argmax(dim=1).tolist()
        ]


def test_an_adapter_or_a_merged_model_is_refused_and_the_state_holds_the_rows(
    finished, tmp_path, monkeypatch
):
    for form in ("adapter", "merged"):
        with pytest.raises(
            ConfigError,
            match=r"what 'keeplora\+' learned does not merge into the base's weights; export --as state",
        ):
            export_run(finished, form, tmp_path / form, label="keeplora+")

    monkeypatch.setattr(verify, "verify_in_fresh_process", reload_here)
    state = export_run(finished, "state", tmp_path / "state", label="keeplora+", base_id="you/base").folder
    fork(finished, 2, tmp_path / "fork")
    for copied in (state, tmp_path / "fork"):
        assert torch.equal(rows(copied, "keeplora+", 2), rows(finished, "keeplora+", 2))


@pytest.mark.slow
def test_two_processes_train_the_rows_that_one_trains(finished, run_tree, tiny_tasks, tmp_path):
    changes = {
        "tasks": [str(tiny_tasks[0])],
        "training": {"max_grad_norm": 0.0, "per_device_train_batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(run_tree(tmp_path / "run", methods={"keeplora+": {}}, **changes))
    )
    script = Path(__file__).parents[2] / "scripts" / "train_seq.py"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    command = [*launcher, "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * forked.patience())
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (rows(run, "keeplora+", 1) for run in (tmp_path / "run", finished))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# --- in training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tiny_clip, recipes):
    """(family, its model on the second task, the training data's batches)."""
    family = ClipFamily(str(tiny_clip))
    family.load(torch.float32)
    data = load_split(recipes[1], "train")
    inputs = family.inputs(data, Prepared(family, data))
    batches = [inputs.collate(range(start, min(start + 5, len(data)))) for start in range(0, len(data), 5)]
    return family, family.task(recipes[1]), batches


def test_a_class_without_an_image_begins_with_the_direction_of_its_prompt(task):
    _, model, batches = task
    with torch.no_grad():
        text = model.text()
    lacking = [{key: value[batch["labels"] != 3] for key, value in batch.items()} for batch in batches]
    whole, found = (keeplora_plus.class_directions(model, some) for some in (batches, lacking))
    torch.testing.assert_close(found[3].float(), text[3])
    torch.testing.assert_close(
        found[:3], whole[:3], rtol=0, atol=1e-6
    )  # Another batch size, another order of fp32 sums.
    assert not torch.allclose(whole[3].float(), text[3], atol=1e-2)


def test_features_are_summed_over_processes_before_their_length_is_taken(task, monkeypatch):
    _, model, batches = task
    whole, other = keeplora_plus.class_directions(model, batches), []
    monkeypatch.setattr(
        keeplora_plus,
        "sum_over_processes",
        lambda tensors: other.extend(tensor.clone() for tensor in tensors),
    )
    keeplora_plus.class_directions(model, batches[1:])
    monkeypatch.setattr(
        keeplora_plus,
        "sum_over_processes",
        lambda tensors: [tensor.add_(theirs) for tensor, theirs in zip(tensors, other)],
    )
    torch.testing.assert_close(keeplora_plus.class_directions(model, batches[:1]), whole)


def test_the_loss_is_that_of_both_logits_and_reaches_image_features_and_rows(task):
    torch.manual_seed(0)
    method, batch = KeepLoraPlus(KeepLoraPlus.Options(scale=12.0)), {"labels": torch.tensor([0, 2, 1])}
    image, text = normalize(torch.randn(3, 8)).requires_grad_(), torch.randn(3, 4)
    own = torch.nn.Parameter(5 * torch.randn(4, 8))
    method._trained = {"t": own}
    loss = method.loss(type("Context", (), {"name": "t"}), batch, {"logits": text, "image": image})
    expected = cross_entropy(
        text + 12 * cosine_similarity(image[:, None], own[None], dim=-1), batch["labels"]
    )
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(one, (image, own), retain_graph=True) for one in (loss, expected))
    # The tangent part alone: features come from the model with unit length, and nothing else is asked of them.
    along = (theirs[0] * image).sum(dim=1, keepdim=True) * image
    torch.testing.assert_close(
        ours[0] - (ours[0] * image).sum(dim=1, keepdim=True) * image, theirs[0] - along
    )
    torch.testing.assert_close(ours[1], theirs[1])


def test_a_task_that_is_not_learned_keeps_the_familys_own_predictor(task, recipes):
    family, _, _ = task
    method, data = KeepLoraPlus(KeepLoraPlus.Options()), load_split(recipes[1], "test")
    own = family.predictor(recipes[1], Prepared(family, data))
    states = [{}, {"cosine_classifier.colours": torch.eye(4, 16)}]
    method.load_state_dicts(states)
    assert isinstance(own, ClipPredictor) and method.predictor(own, "stripes") is own
    other = method.predictor(own, "colours")
    torch.testing.assert_close(
        other.logits(list(data)) - own.logits(list(data)), 30 * features_of(family, data)[:, :4]
    )
    method.load_state_dicts([{}])
    assert method.predictor(own, "colours") is own and method.bases == {}


@torch.no_grad()
def features_of(family, data):
    return normalize(
        family.model.get_image_features(
            pixel_values=torch.stack([one["pixel_values"] for one in family.prepare(list(data))])
        ).pooler_output
    )


@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_a_negative_scale_is_refused(scale):
    with pytest.raises(
        MethodError,
        match=f"scale must not be negative .got {scale}.; set it to 30",
    ):
        KeepLoraPlus.Options(scale=scale)


def test_a_configuration_sets_the_scale_and_keeploras_settings(run_tree, tmp_path):
    config = parse_config(
        run_tree(tmp_path / "run", methods={"keeplora+": {"scale": 10, "gradient_fraction": 0.5}})
    )
    assert (
        config.methods["keeplora+"].options["scale"] == 10.0
        and config.methods["keeplora+"].options["gradient_fraction"] == 0.5
    )
