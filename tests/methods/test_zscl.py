"""The identities of ZSCL: the whole model trained, held to its pre-trained self on reference data, its weights averaged."""

import json
import random

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, CLIPModel

from llava_keeplora.adapters import load_deltas
from llava_keeplora.analysis import analyze_run
from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import ConfigError, MethodError, RunError
from llava_keeplora.methods import METHODS, Method, MethodInfo, Reference, TaskContext
from llava_keeplora.methods.zscl import distillation
from llava_keeplora.models import load_model
from llava_keeplora.plan import make_plan
from llava_keeplora.report.run_report import write_run_report
from llava_keeplora_recipes import load_recipe, load_split

Zscl = METHODS["zscl"]
NOTHING = {
    "method": "zscl",
    "label_smoothing": 0.0,
    "distillation": 0.0,
    "constraint": 0.0,
    "ensemble_every": 0,
}
ONE_STEP = {"max_steps": 1, "optim": "sgd", "per_device_train_batch_size": 24, "max_grad_norm": 0.0}
SGD = {"optim": "sgd", "learning_rate": 0.05}
EVERY = 2


class FullFineTuning(Method):
    """The task's loss on the whole model and nothing else."""

    info = MethodInfo("full", "full fine-tuning")
    uses_lora, full_finetuning = False, True

    def init_adapters(self, ctx):
        return {}


class Watched(Zscl):
    """ZSCL that notes the weights at every task's start and after every step."""

    info = MethodInfo("watched", "ZSCL, watched")
    seen = []

    def training_context(self, ctx, model):
        Watched.seen.append([values(model)])
        return super().training_context(ctx, model)

    def after_step(self, ctx, optimizer_step):
        super().after_step(ctx, optimizer_step)
        Watched.seen[-1].append(values(ctx.model))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def reference(tiny_tasks):
    """Options that name a small reference set."""
    return {"reference": str(tiny_tasks[2]), "reference_batch": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven, tiny_tasks, reference):
    """A run on two tasks of fine-tuning, ZSCL without all that it adds, and ZSCL with and without the mean of its weights."""
    methods = {
        "full": {},
        "nothing": NOTHING,
        "one-step": {**NOTHING, "training": ONE_STEP},
        "watched": {"ensemble_every": EVERY, **reference, "training": {"num_train_epochs": 2}},
        "raw": {"method": "zscl", "ensemble_every": 0, **reference, "training": {"num_train_epochs": 2}},
        "whole": {"method": "zscl", **reference, "training": SGD},
        "halves": {
            "method": "zscl",
            **reference,
            "training": {**SGD, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for method in (FullFineTuning, Watched):
            patch.setitem(METHODS, method.info.name, method)
        return driven(
            run_config(
                tmp_path_factory.mktemp("zscl") / "run",
                methods=methods,
                tasks=[str(path) for path in tiny_tasks[:2]],
            )
        )


def delta_files(finished, label):
    return [
        path / "delta.safetensors"
        for path in sorted((finished / label).glob("task-*"))
        if not path.name.startswith("task-00")
    ]


def changes(path):
    """Name of a parameter → what a task did to it."""
    return {
        f"{name}.{own}": change
        for name, delta in load_deltas(path).items()
        for own, change in delta.parameters.items()
    }


@pytest.mark.slow
def test_with_nothing_added_it_is_full_fine_tuning_bit_for_bit(finished):
    for ours, theirs in zip(delta_files(finished, "nothing"), delta_files(finished, "full"), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_step_of_that_goes_down_the_gradient_of_every_parameter_but_the_temperature(
    finished, tiny_clip, tiny_tasks
):
    data = load_split(load_recipe(str(tiny_tasks[0])), "train")
    family = load_model(ModelConfig(str(tiny_clip)))
    model = CLIPModel.from_pretrained(tiny_clip)
    prompts = AutoTokenizer.from_pretrained(tiny_clip)(data.recipe.prompts, padding=True, return_tensors="pt")
    pixels = torch.stack([one["pixel_values"] for one in family.prepare(list(data))])
    cross_entropy(
        model(pixel_values=pixels, **prompts).logits_per_image, torch.tensor(data.labels)
    ).backward()
    found = changes(delta_files(finished, "one-step")[0])
    assert found.keys() == dict(model.named_parameters()).keys() - {"logit_scale"}
    for name, change in found.items():
        torch.testing.assert_close(change, -0.01 * model.get_parameter(name).grad, atol=1e-7, rtol=1e-3)


def test_a_task_leaves_the_mean_of_its_start_and_of_the_weights_after_every_second_step_from_the_first_on(
    finished,
):
    tasks = [snapshots for snapshots in Watched.seen if len(snapshots) > 1]
    for snapshots, path in zip(tasks, delta_files(finished, "watched"), strict=True):
        assert len(snapshots) == 1 + 6
        points = [snapshots[0], *snapshots[1::EVERY]]
        for name, change in changes(path).items():
            mean = torch.stack([point[name].double() for point in points]).mean(dim=0)
            torch.testing.assert_close(snapshots[0][name].double() + change.double(), mean, atol=1e-6, rtol=0)


def test_training_goes_on_from_the_weights_and_not_from_their_mean(finished):
    first, second = (snapshots for snapshots in Watched.seen if len(snapshots) > 1)
    raw = changes(delta_files(finished, "raw")[0])
    assert all(torch.equal(first[-1][name] - first[0][name], change) for name, change in raw.items())
    # The next task begins where the mean is.
    left = changes(delta_files(finished, "watched")[0])
    assert all(
        torch.allclose(second[0][name], first[0][name] + change, atol=1e-6) for name, change in left.items()
    )


def test_a_step_of_two_half_batches_is_the_step_of_the_whole_one(finished):
    """Distillation and constraint count once per optimiser step, on the same reference images."""
    for whole, halves in zip(delta_files(finished, "whole"), delta_files(finished, "halves"), strict=True):
        ours, theirs = changes(whole), changes(halves)
        scale = max(float(change.abs().max()) for change in ours.values())
        assert all(
            torch.allclose(change, theirs[name], atol=1e-3 * scale, rtol=0) for name, change in ours.items()
        )


def test_the_journal_says_which_reference_data_a_task_was_planned_with(finished):
    plans = [json.loads(line) for line in (finished / "watched/journal.jsonl").read_text().splitlines()]
    told = [plan["info"]["reference"] for plan in plans if plan["stage"] == "PLANNED"]
    assert len(told) == 3 and all(one == told[0] for one in told)
    assert told[0]["recipe"] == "corners" and told[0]["images"] == 24 and told[0]["texts"] == 4
    assert "reference" not in (finished / "nothing/journal.jsonl").read_text()


# --- the loss ------------------------------------------------------------------------------------


@pytest.fixture
def held(tiny_clip, tiny_tasks):
    """(method, context, model, teacher) in training, in float64 and with everything where the pre-trained model has it."""
    family, teacher = (load_model(ModelConfig(str(tiny_clip))) for _ in range(2))
    data = load_split(load_recipe(str(tiny_tasks[2])), "train")
    images = lambda indices: family.prepare([data[i] for i in indices])  # noqa: E731
    model, teacher = family.model.double(), teacher.model.double()
    for name, p in model.named_parameters():
        p.requires_grad_(name != "logit_scale")
    method = Zscl(Zscl.Options(reference_batch=8))
    method.reference = Reference(
        images, len(data), family.tokens([*data.recipe.prompts, "a photo of the red ."]), {}
    )
    ctx = TaskContext(1, "t", {}, None, None, 7, 0, model=model, pretrained=lambda: teacher)
    with method.training_context(ctx, model):
        yield method, ctx, model, teacher


def moved(model):
    """The model with every trained parameter somewhere else."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def test_distillation_is_the_cross_entropy_of_the_softened_rows_times_the_temperature_squared():
    P, Q = torch.randn(2, 5, 7, dtype=torch.float64)
    rows = [
        -(
            torch.exp(p / 2) / torch.exp(p / 2).sum() * torch.log(torch.exp(q / 2) / torch.exp(q / 2).sum())
        ).sum()
        for p, q in zip(P, Q)
    ]
    torch.testing.assert_close(distillation(P, Q, 2.0), 4 * sum(rows) / 5)


def test_the_loss_is_the_smoothed_one_and_the_distillation_both_ways_and_the_squared_distance(held):
    method, ctx, model, teacher = held
    start = values(model)
    moved(model)
    pixels = torch.stack(
        [one["pixel_values"] for one in method.reference.images(method.reference.draw(8, 7, 0))]
    ).double()
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    meant = teacher(pixel_values=pixels, **method.reference.texts)
    image = model(pixel_values=pixels, **method.reference.texts).image_embeds
    found = model.logit_scale.exp() * image @ meant.text_embeds.T
    target = 0.8 * nn.functional.one_hot(labels, 4) + 0.2 / 4
    expected = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    expected = (
        expected
        + distillation(meant.logits_per_image, found, 2.0)
        + distillation(meant.logits_per_text, found.T, 2.0)
    )
    expected = expected + sum((p - start[name]).square().sum() for name, p in model.named_parameters())
    torch.testing.assert_close(
        method.loss(ctx, {"labels": labels}, {"logits": logits, "loss": None}).double(),
        expected.double(),
        rtol=1e-5,
        atol=0,
    )


def test_where_the_weights_are_the_pretrained_ones_neither_distillation_nor_constraint_pulls(held):
    method, ctx, model, _ = held
    method.loss(ctx, {"labels": torch.tensor([0])}, {"logits": torch.zeros(1, 4), "loss": None}).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and float(p.grad.abs().max()) < 1e-12 for p in trained)


def test_no_distillation_reaches_the_text_encoder_and_all_of_it_the_vision_encoder(held):
    method, ctx, model, _ = held
    moved(model)
    method._distillation(ctx).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("vision_model.", "visual_projection."))
    }


def test_reference_images_are_a_function_of_seed_and_step_that_no_generator_feels():
    reference = Reference(None, 100, {}, {})
    before = random.getstate(), torch.get_rng_state()
    drawn = {(seed, step): reference.draw(16, seed, step) for seed in (1, 2) for step in range(20)}
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert all(reference.draw(16, *key) == chosen and len(set(chosen)) == 16 for key, chosen in drawn.items())
    assert len(set(map(tuple, drawn.values()))) == len(drawn)
    assert sorted(reference.draw(200, 1, 1)) == list(range(100))


# --- what others make of it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def beside(tmp_path_factory, run_config, driven, tiny_tasks, reference):
    """A run of sequential LoRA and ZSCL on two tasks."""
    methods = {"seq-lora": {}, "zscl": reference}
    return driven(
        run_config(
            tmp_path_factory.mktemp("beside") / "run",
            methods=methods,
            tasks=[str(path) for path in tiny_tasks[:2]],
        )
    )


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_analysis_measures_the_linear_layers_of_the_encoders_and_the_report_draws_the_rest(
    beside, tmp_path
):
    found = analyze_run(beside)
    layers = {update.layer.rsplit(".", 1)[-1] for update in found["zscl"].updates}
    assert (
        layers == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"} and found["zscl"].overlap is None
    )
    assert (
        all(0 <= update.principal <= 1 for update in found["zscl"].updates)
        and found["seq-lora"].overlap is not None
    )
    write_run_report(beside)
    assert "zscl" in (beside / "report.html").read_text()


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def refused(run_config, driven, tmp_path):
    """Function (options, sentence, **changes) → the run is refused with that sentence, and its folder left unclaimed."""

    def check(options, sentence, **changes):
        with pytest.raises(ConfigError, match=sentence):
            driven(run_config(tmp_path / "run", methods={"zscl": options}, **changes))
        assert not (tmp_path / "run/config.json").exists()

    return check


def test_reference_data_that_are_not_there_are_refused_in_a_sentence(refused, tmp_path):
    refused({"reference": "imagenet"}, "methods.zscl.reference: there is no recipe 'imagenet'")
    refused(
        {"reference_texts": "captions.txt"},
        "reference_texts: captions.txt cannot be read .no such file 'captions.txt'.; give a text file with one caption per line",
    )
    (tmp_path / "captions.txt").write_text("\n\n")
    root = {"data": {"root": str(tmp_path)}, "tasks": ["digits"]}
    refused(
        {"reference_texts": "captions.txt"},
        f"reference_texts: {tmp_path}/captions.txt has no line with text; give a text file",
        **root,
    )
    (tmp_path / "captions.txt").write_text("a red circle .\n" + 20 * "a photo of ")
    refused(
        {"reference_texts": str(tmp_path / "captions.txt")},
        "methods.zscl.reference_texts: the prompt 'a photo of .*' .*has 62 tokens and the model takes 12; shorten this text, or leave it out",
    )


def test_weights_that_are_too_coarse_to_be_trained_are_refused_in_a_sentence(refused):
    refused(
        {},
        "'zscl' trains the whole model, but model.quantization is nf4, and quantised weights can't be trained; leave the base unquantised",
        model={"quantization": "nf4"},
    )
    refused(
        {},
        "'zscl' trains the whole model, but model.dtype is bfloat16, in which small updates are rounded away; set model.dtype to float32",
        model={"dtype": "bfloat16"},
    )


def test_parts_of_a_method_without_adapters_are_refused_in_a_sentence(refused):
    refused(
        {"parts": {"vision": {"rank": 4}}},
        "methods.zscl.parts is set, but 'zscl' has no adapters on the model's parts; remove methods.zscl.parts",
    )


def test_a_plan_refuses_it_in_a_sentence(run_config, tmp_path):
    with pytest.raises(
        ConfigError,
        match="'zscl' does not train LoRA adapters.*run it without a plan",
    ):
        make_plan(run_config(tmp_path / "run", methods={"zscl": {}}))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be in .*got 1.0"),
        ({"distillation": -1.0}, "distillation must not be negative .got -1.0.; set it to 0"),
        ({"ensemble_every": -1}, "ensemble_every must not be negative .got -1"),
        ({"temperature": 0.0}, "temperature must be above 0 .got 0.0"),
        ({"reference_batch": 0}, "reference_batch must be at least 1 .got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(MethodError, match=sentence):
        Zscl.Options(**options)


def test_a_run_whose_reference_data_are_others_than_planned_is_refused(
    run_config, driven, tmp_path, tiny_tasks
):
    (tmp_path / "captions.txt").write_text("a red circle .\na photo .")
    options = {"reference": str(tiny_tasks[2]), "reference_texts": str(tmp_path / "captions.txt")}
    one, two = (
        run_config(
            tmp_path / "run", methods={"zscl": options}, tasks=[str(path) for path in tiny_tasks[:count]]
        )
        for count in (1, 2)
    )
    driven(one)
    (tmp_path / "captions.txt").unlink()
    driven(one)  # Nothing is left to learn, so nothing is read.
    with pytest.raises(ConfigError, match="reference_texts: .* cannot be read"):
        driven(two)
    (tmp_path / "captions.txt").write_text("a red circle .\na blue photo .")
    with pytest.raises(
        RunError, match="the reference data has changed since .*zscl was planned .texts_sha256: "
    ):
        driven(two)


@pytest.mark.slow
def test_without_a_file_the_default_reference_is_rendered_scenes_and_their_captions(
    run_config, driven, tmp_path, tiny_tasks
):
    driven(
        run_config(
            tmp_path / "run", methods={"zscl": {}}, tasks=[str(tiny_tasks[0])], training={"max_steps": 1}
        )
    )
    plan = json.loads((tmp_path / "run/zscl/journal.jsonl").read_text().splitlines()[0])
    assert (
        plan["info"]["reference"]["recipe"] == "scene-captions" and plan["info"]["reference"]["texts"] > 1000
    )
