"""Methods that keep image features while a task is learned: the loss, what is refused, resuming."""

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import AdapterInit, attach, detach
from llava_keeplora.config import ModelConfig, load_config
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.methods import METHODS, TaskContext
from llava_keeplora.methods.layers import check_method as check_layers
from llava_keeplora.models import load_model
from llava_keeplora.run_folder import Stage
from llava_keeplora.testing import check_method

KeepLora, KeepLoraPlus = METHODS["keeplora"], METHODS["keeplora+"]
EbLora, TaskLora = METHODS["eblora"], METHODS["task-lora"]


class Net(nn.Module):
    """An image encoder of one adapted layer; the class prompts' features are constant."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.adapted, self.text = nn.Linear(12, 5), nn.Linear(5, 3, bias=False)
        self.requires_grad_(False)

    def get_text_features(self):
        return self.text.weight

    def forward(self, pixel_values, labels):
        image = self.adapted(pixel_values.flatten(1)).tanh()
        image = image / image.norm(dim=1, keepdim=True)
        logits = self.text(image)
        return {"image": image, "logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


@pytest.fixture
def net():
    model = Net()
    wrapper = attach(model, {"adapted": AdapterInit(2, 3.0)})
    yield model
    detach(wrapper)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(6, 3, 2, 2), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}


def context(net):
    return TaskContext(
        1, "task", {}, gradients=None, features=None, seed=7, statistics_bytes=0, model=net, forward=net
    )


def move(net):
    with torch.no_grad():
        net.adapted.lora_B["default"].weight.normal_()


def test_without_distillation_the_loss_is_the_tasks_own(net, batch):
    method, ctx, out = KeepLora(KeepLora.Options()), context(net), net(**batch)
    with method.training_context(ctx, net):
        assert method.loss(ctx, batch, out) is out["loss"]
    assert method.stage_cost is KeepLora.stage_cost


@pytest.mark.parametrize("cls", [KeepLora, TaskLora])
def test_the_loss_adds_the_mean_of_one_minus_cosine_to_the_features_at_the_start(cls, net, batch):
    method, ctx = cls(cls.Options(distillation=4.0)), context(net)
    assert method.stage_cost["TRAINED"] == cls(cls.Options()).stage_cost.get("TRAINED", 0.0) + 1.0
    with method.training_context(ctx, net):
        start = net(**batch)
        torch.testing.assert_close(method.loss(ctx, batch, start), start["loss"])
        move(net)
        out = net(**batch)
        loss = method.loss(ctx, batch, out)
        naive = sum(1 - a @ b for a, b in zip(start["image"].detach(), out["image"])) / 6
        torch.testing.assert_close(loss, out["loss"] + 4.0 * naive)
        loss.backward()
        assert float(naive.detach()) > 0.01 and float(net.adapted.lora_B["default"].weight.grad.norm()) > 0


def test_where_images_are_seen_twice_their_features_are_computed_once_and_looked_up_by_row(net, batch):
    method, ctx = KeepLora(KeepLora.Options(distillation=4.0)), context(net)
    data = batch["pixel_values"]
    start, asked = net(**batch)["image"].detach(), []

    def outputs(compute):
        asked.append(len(data))
        return torch.cat([compute({k: v[i : i + 2] for k, v in batch.items()}) for i in range(0, 6, 2)])

    ctx.outputs, ctx.repeats, rows = outputs, True, torch.tensor([4, 1, 3])
    with method.training_context(ctx, net):
        move(net)  # A killed run has learned already when it resumes.
        method.before_steps(ctx)
        ctx.forward, ctx.rows = None, rows
        part = {name: value[rows] for name, value in batch.items()}
        out = net(**part)
        loss = method.loss(ctx, part, out)
    naive = sum(1 - a @ b for a, b in zip(start[rows], out["image"])) / 3
    torch.testing.assert_close(loss, out["loss"] + 4.0 * naive)
    assert asked == [6] and float(naive.detach()) > 0.01 and method.start is None


def test_a_model_that_writes_answers_is_refused_before_any_data_are_read(tiny_llava, tmp_path):
    config = load_config("demo-llava", ["methods={balanced: {method: keeplora, preset: balanced}}"])
    family = load_model(ModelConfig(str(tiny_llava)))
    method = KeepLora(KeepLora.Options(preset="balanced"))
    with pytest.raises(
        ConfigError, match="'balanced' keeps image features, .*writes answers.*set distillation to 0"
    ):
        check_layers("balanced", method, config.methods["balanced"].parts or config.parts, family)


def test_a_family_whose_loss_gives_no_image_features_is_refused_by_name(net, batch):
    method, ctx = KeepLora(KeepLora.Options(distillation=1.0)), context(net)
    with method.training_context(ctx, net), pytest.raises(MethodError, match="returns none under 'image'"):
        method.loss(ctx, batch, {"loss": torch.zeros(())})


def test_the_balanced_preset_is_the_papers_with_distillation():
    balanced, paper = KeepLora(KeepLora.Options(preset="balanced")), KeepLora(KeepLora.Options())
    assert (balanced.distillation, paper.distillation) == (10.0, 0.0)
    assert KeepLora(KeepLora.Options(preset="balanced", distillation=0.0)).distillation == 0.0
    settings = {"of": "keeplora", "settings": {"preset": "balanced"}}
    alone = METHODS["individual"](METHODS["individual"].Options(**settings))
    # Nothing is done after a task that is learned alone.
    assert alone.keeps_features and alone.stage_cost == balanced.stage_cost | {Stage.CONSOLIDATED: 0.0}
    plus = KeepLoraPlus(KeepLoraPlus.Options(preset="balanced")).stage_cost["TRAINED"]
    assert plus == KeepLoraPlus.stage_cost["TRAINED"] + balanced.stage_cost["TRAINED"]
    assert balanced.form == paper.form and balanced.gradient_fraction == paper.gradient_fraction


@pytest.mark.parametrize("cls", [KeepLora, EbLora, TaskLora])
@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_is_no_weight_is_refused(cls, strength):
    with pytest.raises(MethodError, match="distillation must be 0 or a positive number"):
        cls.Options(distillation=strength)


#: The distillation of the preset, and a form that has none.
BALANCED_LITERAL = {"preset": "balanced", "form": "literal", "distillation": None}


@pytest.mark.parametrize("options", [{"form": "literal"}, {"preset": "released-clip"}, BALANCED_LITERAL])
def test_the_literal_form_has_no_model_at_the_start_and_is_refused(options):
    with pytest.raises(MethodError, match="from which the literal form does not start"):
        KeepLora.Options(**{"distillation": 1.0, **options})


def test_a_classifier_beside_it_keeps_both_losses(net, batch):
    method, ctx, start = KeepLoraPlus(KeepLoraPlus.Options(distillation=4.0)), context(net), net(**batch)
    method._trained = {"task": nn.Parameter(torch.randn(3, 5))}
    with super(KeepLoraPlus, method).training_context(ctx, net):
        move(net)
        out = net(**batch)
        both = method.loss(ctx, batch, out)
    alone = method.loss(ctx, batch, out)
    naive = sum(1 - a @ b for a, b in zip(start["image"], out["image"])) / 6
    torch.testing.assert_close(both, alone + 4.0 * naive)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options"),
    [(KeepLora, {"distillation": 10.0}), (TaskLora, {"distillation": 10.0, "rejection": 0.5})],
)
def test_a_run_resumes_within_training_and_extends_bit_for_bit(cls, options):
    check_method(cls, options)
