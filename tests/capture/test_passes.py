"""The gradient and feature passes against plain autograd and plain concatenation."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from llava_keeplora.capture import feature_pass, gradient_pass, shared_inputs
from llava_keeplora.models import ClipFamily
from llava_keeplora.subspace import DenseGradient, GradientSketch, SketchedMoment

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PROMPTS = ["a red thing", "a blue thing indeed", "green"]


@pytest.fixture
def family(tiny_clip):
    family = ClipFamily(str(tiny_clip))
    family.load(torch.float32)
    return family


@pytest.fixture
def task(family):
    from llava_keeplora.models import ClipTask
    from llava_keeplora_eval.class_prompts import tokenize_prompts

    return ClipTask(family.model, tokenize_prompts(family.processor, PROMPTS))


@pytest.fixture
def layers(family):
    return {n: m for part in ("vision", "text") for n, m in family.linear_layers(part, TARGETS).items()}


@pytest.fixture
def batches(family):
    generator = torch.Generator().manual_seed(0)
    size = family.model.config.vision_config.image_size
    made = [
        {
            "pixel_values": torch.randn(n, 3, size, size, generator=generator),
            "labels": torch.randint(0, 3, (n,), generator=generator),
        }
        for n in (5, 5, 2)
    ]
    return [(batch, True) for batch in made]


def test_the_gradient_pass_equals_autograd_on_the_whole_data_in_both_encoders(
    task, layers, batches, dense_gradients
):
    captured = dense_gradients(task, layers, batches, 12)

    for layer in layers.values():
        layer.weight.requires_grad_(True)
    whole = {k: torch.cat([b[k] for b, _ in batches]) for k in batches[0][0]}
    task(**whole)["loss"].backward()

    assert captured.keys() == layers.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(
            captured[name],
            layer.weight.grad,
            rtol=1e-4,
            atol=1e-7 + 1e-5 * float(layer.weight.grad.abs().max()),
        )


@pytest.mark.parametrize("total", [12, 100_000])
def test_a_gradient_in_fp16_is_as_near_whatever_the_number_of_examples(
    task, layers, batches, dense_gradients, total
):
    exact = dense_gradients(task, layers, batches, total)
    with torch.autocast("cpu", torch.float16):
        rounded = dense_gradients(task, layers, batches, total)

    assert rounded.keys() == exact.keys()
    apart = {name: float((rounded[name] - G).norm() / G.norm()) for name, G in exact.items()}
    assert 1e-6 < max(apart.values()) < 2e-2, apart


def test_the_gradient_pass_reaches_the_first_layer_of_a_frozen_model_and_leaves_no_gradient_behind(
    task, layers, batches, dense_gradients
):
    captured = dense_gradients(task, layers, batches, 12)

    first = next(name for name in layers if name.startswith("vision_model.encoder.layers.0"))
    assert float(captured[first].norm()) > 0
    assert all(p.grad is None for p in task.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layers.values())


def test_a_layer_that_the_loss_does_not_reach_has_no_gradient(task, layers, batches, dense_gradients):
    class VisionOnly(nn.Module):
        def __init__(self):
            super().__init__()
            self.stray = nn.Linear(4, 4)

        def forward(self, **batch):
            return task(**batch)

        constants, weight = staticmethod(task.constants), staticmethod(task.weight)

    model = VisionOnly()
    captured = dense_gradients(model, {**layers, "stray": model.stray}, batches, 12)

    assert "stray" not in captured


class _Keeping(torch.autograd.Function):
    """Keeps its input on the node itself, as bitsandbytes' 8-bit product does, and so beyond the backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_batchs_graph_is_gone_before_the_next_batch():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen, self.alive = nn.Linear(3, 2), [], []

        def forward(self, x):
            self.alive.append([one() is not None for one in self.seen])
            kept = self.layer(x)
            self.seen.append(weakref.ref(kept))
            return {"loss": _Keeping.apply(kept).sum()}

        def constants(self):
            return nullcontext(())

        def weight(self, batch):
            return len(batch["x"])

    task = Task()
    gradient_pass(
        task,
        {"layer": task.layer},
        [({"x": torch.randn(4, 3)}, True)] * 3,
        12,
        {"layer": DenseGradient(2, 3)},
    )
    assert task.alive == [[], [False], [False, False]]


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_pass_recomputes_activations_where_training_does_with_the_same_gradient(
    family, task, layers, batches, dense_gradients, name
):
    plain = dense_gradients(task, layers, batches, 12)
    block = family.model.vision_model.encoder.layers[0]
    passes = []
    handle = block.self_attn.register_forward_hook(lambda *args: passes.append(block.self_attn.training))
    with task.recomputing({name: True}):
        recomputed = dense_gradients(task, layers, batches, 12)
    once = len(passes)
    dense_gradients(task, layers, batches, 12)
    handle.remove()

    assert once == 2 * len(batches) and len(passes) - once == len(batches), (
        "forward, and again in the backward pass; afterwards no more"
    )
    assert not any(passes) and not any(module.training for module in task.model.modules()), (
        "dropout stays off"
    )
    for name in layers:
        torch.testing.assert_close(recomputed[name], plain[name])


def test_layers_that_read_the_same_tensor_are_found(task, layers, batches):
    leaders = shared_inputs(layers, lambda: task(**batches[0][0]))

    for name in layers:
        stem, leaf = name.rsplit(".", 1)
        assert leaders[name] == (f"{leaders[name].rsplit('.', 1)[0]}.{leaders[name].rsplit('.', 1)[1]}")
        if leaf in ("q_proj", "k_proj", "v_proj"):
            assert leaders[name] == leaders[f"{stem}.q_proj"]
        else:
            assert leaders[name] == name


def test_the_feature_pass_equals_the_concatenated_inputs(family, task, layers, batches, second_moments):
    parts = {name: "text" if name.startswith("text") else "vision" for name in layers}
    statistics = second_moments(task, layers, parts, batches)

    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    handles = [
        m.register_forward_pre_hook(lambda mod, args, n=n: seen[n].append(args[0].detach().double()))
        for n, m in layers.items()
    ]
    whole = {k: torch.cat([b[k] for b, _ in batches]) for k in batches[0][0]}
    with torch.no_grad():
        task(**whole)
    for handle in handles:
        handle.remove()

    keep = task.attention_mask.bool()
    assert not keep.all(), "the prompts must differ in length for padding to be tested"
    for name in layers:
        (x,) = seen[name]
        x = x[keep] if parts[name] == "text" else x.flatten(0, 1)
        torch.testing.assert_close(statistics[name].matrix, x.T @ x, rtol=1e-4, atol=1e-4)


def test_the_prompts_run_once_per_pass(task, layers, batches, monkeypatch, dense_gradients):
    calls = []
    original = task.model.get_text_features
    monkeypatch.setattr(task.model, "get_text_features", lambda **kw: calls.append(1) or original(**kw))

    dense_gradients(task, layers, batches, 12)

    assert len(calls) == 1


def test_a_batch_that_does_not_count_changes_neither_gradients_nor_features(
    task, layers, batches, dense_gradients, second_moments
):
    parts = {name: "text" if name.startswith("text") else "vision" for name in layers}
    longer = [*batches, (batches[0][0], False)]
    plain, padded = (dense_gradients(task, layers, given, 12) for given in (batches, longer))
    assert all(torch.equal(plain[name], padded[name]) for name in layers)
    plain, padded = (second_moments(task, layers, parts, given) for given in (batches, longer))
    assert all(torch.equal(plain[name].matrix, padded[name].matrix) for name in layers)


def test_sketches_are_fed_with_what_the_dense_gradient_is_fed_with(task, layers, batches):
    sketches = {
        name: GradientSketch(layer.out_features, layer.in_features, 8) for name, layer in layers.items()
    }
    dense = {name: DenseGradient(layer.out_features, layer.in_features) for name, layer in layers.items()}
    gradient_pass(task, layers, batches, 12, sketches)
    gradient_pass(task, layers, batches, 12, dense)
    for name, sketch in sketches.items():
        again = GradientSketch(sketch.range.shape[0], sketch.rows.shape[1], 8)
        again.add(torch.eye(sketch.rows.shape[1]), dense[name].matrix.T)
        torch.testing.assert_close(
            sketch.range, again.range, rtol=1e-3, atol=1e-5 * float(again.range.abs().max())
        )
        torch.testing.assert_close(
            sketch.rows, again.rows, rtol=1e-3, atol=1e-5 * float(again.rows.abs().max())
        )


def test_layers_of_one_input_may_have_statistics_of_their_own_and_some_layers_none(
    task, layers, batches, second_moments
):
    parts = {name: "text" if name.startswith("text") else "vision" for name in layers}
    chosen = [name for name in layers if name.endswith(("q_proj", "v_proj"))]
    made = feature_pass(
        task,
        layers,
        parts,
        batches,
        lambda groups: {name: SketchedMoment(32, 32) for names in groups for name in names if name in chosen},
    )
    assert sorted(made) == sorted(chosen)
    exact = second_moments(task, layers, parts, batches)
    for name, sketch in made.items():
        torch.testing.assert_close(
            sketch.image.float(), exact[name].matrix.float() @ sketch.test, rtol=1e-4, atol=1e-3
        )
