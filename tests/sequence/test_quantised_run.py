"""Runs on a base that bitsandbytes keeps in four or eight bits: the base stays as it is, deltas lie beside it."""

from __future__ import annotations

import copy
import functools
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from first_methods import FIRST
from llava_keeplora.adapters import BaseWeights, Delta, dense_weight, is_quantised, load_deltas
from llava_keeplora.config import EvaluationConfig, ModelConfig, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.methods import METHODS
from llava_keeplora.models import load_model
from llava_keeplora.subspace import DenseGradient
from llava_keeplora_recipes import load_recipe, load_split

KINDS = ("nf4", "int8")
PART = {"rank": 2, "alpha": 2, "energy_weight": 0.5, "energy_feature": 0.9}


@pytest.fixture
def quantised_llava(tiny_llava):
    """Function (kind) → the tiny LLaVA with a quantised base."""
    return lambda kind: load_model(
        ModelConfig(str(tiny_llava), quantization=kind), EvaluationConfig(max_new_tokens=6)
    )


@pytest.fixture
def quantised_run(llava_tree, tmp_path):
    """Function (kind, **changes) → a run's configuration."""

    def build(kind, **changes):
        changes = {"model": {"quantization": kind}, **changes}
        return parse_config(llava_tree(changes.pop("into", tmp_path / "run"), **changes))

    return build


def expanded(family):
    """The same model with every quantised layer as the plain layer that it stands for."""
    model = copy.deepcopy(family.model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and is_quantised(child):
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                plain.weight = nn.Parameter(dense_weight(child).float().clone(), requires_grad=False)
                if child.bias is not None:
                    plain.bias = nn.Parameter(child.bias.float().clone(), requires_grad=False)
                setattr(module, name, plain)
    return model


def a_batch(family, recipe_path):
    data = load_split(load_recipe(str(recipe_path)), "train")

    class Made:
        def take(self, rows):
            return family.prepare([data[i] for i in rows])

    return data, family.inputs(data, Made()).collate(range(4))


def adapted(family):
    return {
        name: layer
        for part in ("vision", "language")
        for name, layer in family.linear_layers(part, family.targets[part]).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_vision_encoder_and_language_model_are_quantised_and_the_projector_and_head_are_not(
    kind, quantised_llava
):
    model = quantised_llava(kind).model
    whole = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not is_quantised(m)}
    assert whole == {
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
        "lm_head",
    }


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("int8", 3e-2)])
def test_stacked_deltas_give_the_logits_of_the_expanded_weights_with_the_deltas_added(
    kind, tolerance, quantised_llava, mixed_tasks
):
    # int8 products round the input to 8 bits, so only NF4 can be compared to rounding.
    family = quantised_llava(kind)
    recipe, (_, batch) = load_recipe(str(mixed_tasks[0])), a_batch(family, mixed_tasks[0])
    plain = expanded(family)
    layers = adapted(family)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) / 4  # noqa: E731
    deltas = [
        {name: Delta(draw(2, m.in_features), draw(m.out_features, 2), 0.5) for name, m in layers.items()}
        for _ in range(2)
    ]
    BaseWeights(layers).apply(deltas)
    for name, layer in adapted(
        type(
            "Plain",
            (),
            {
                "linear_layers": lambda s, p, t: {n: plain.get_submodule(n) for n in layers},
                "targets": family.targets,
            },
        )()
    ).items():
        layer.weight += sum(task[name].dense() for task in deltas)
    with torch.no_grad():
        ours = family.task(recipe)(**batch)["logits"]
        family.model = plain
        theirs = family.task(recipe)(**batch)["logits"]
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance


def test_an_nf4_base_does_not_repack_itself_on_a_cpu_that_could(quantised_llava, monkeypatch):
    """The trap of CPUs with AVX512-BF16: the first evaluation packs a weight in place, and nothing can be trained through it then."""
    from bitsandbytes.nn import modules

    assert hasattr(modules, "has_avx512bf16"), "bitsandbytes asks elsewhere now"
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    layers = [module for module in quantised_llava("nf4").model.modules() if is_quantised(module)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("int8", 3e-2)])
def test_the_first_step_gradient_on_a_quantised_base_is_that_of_the_expanded_weights(
    kind, tolerance, quantised_llava, mixed_tasks
):
    # int8 rounds the inputs of its products too, some 1 % of them.
    from llava_keeplora.capture import gradient_pass

    family = quantised_llava(kind)
    recipe, (_, batch) = load_recipe(str(mixed_tasks[0])), a_batch(family, mixed_tasks[0])
    task, layers = family.task(recipe), adapted(family)
    gradients = {name: DenseGradient(layer.out_features, layer.in_features) for name, layer in layers.items()}
    gradient_pass(task, layers, [(batch, True)], task.weight(batch), gradients)
    plain = family.model = expanded(family)
    weights = {name: plain.get_submodule(name).weight.requires_grad_(True) for name in layers}
    family.task(recipe)(**batch)["loss"].backward()
    for name, weight in weights.items():
        assert float((gradients[name].matrix - weight.grad).norm() / weight.grad.norm()) < tolerance, name


@pytest.fixture(scope="module")
def watched(llava_tree, driven, tmp_path_factory):
    """Function (kind) → a run's folder, its model, and the weights of its linear layers before the run; shared."""
    from llava_keeplora.sequence import run_context

    @functools.cache
    def watch(kind):
        seen, load = {}, run_context.RunContext.load

        def watched_load(self):
            load(self)
            seen["model"] = self.family.model
            seen["before"] = {
                n: m.weight.detach().clone()
                for n, m in self.family.model.named_modules()
                if isinstance(m, nn.Linear)
            }

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_context.RunContext, "load", watched_load)
            folder = tmp_path_factory.mktemp(kind) / "run"
            return driven(parse_config(llava_tree(folder, model={"quantization": kind}))), seen

    return watch


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_run_learns_every_task_on_a_quantised_base_and_never_writes_into_it(kind, watched):
    run, seen = watched(kind)
    assert len(json.loads((run / "keeplora/matrix.json").read_text())["rows"]) == 3
    for name, before in seen["before"].items():
        assert is_quantised(seen["model"].get_submodule(name)) == (not before.is_floating_point())
        if is_quantised(seen["model"].get_submodule(name)):
            assert torch.equal(seen["model"].get_submodule(name).weight, before), name
    deltas = load_deltas(next((run / "keeplora").glob("task-03-*")) / "delta.safetensors")
    assert any(float(delta.dense().norm()) > 0 for delta in deltas.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_that_is_stopped_in_training_ends_with_the_same_files(
    kind, quantised_run, watched, run_to_the_end, stop_within_training, left_behind, tmp_path
):
    whole, _ = watched(kind)
    stop_within_training(1)
    assert run_to_the_end(quantised_run(kind, into=tmp_path / "stopped")) > 1
    assert left_behind(whole) == left_behind(tmp_path / "stopped")


@pytest.mark.parametrize(
    "names",
    [
        # A start from the gradient, a sum of updates, and experts with a router.
        ["keeplora", "sd-lora", "moe-adapters"],
        pytest.param([n for n in FIRST if not METHODS[n].full_finetuning], marks=pytest.mark.slow, id="all"),
    ],
    ids="-".join,
)
def test_every_method_that_leaves_the_weights_alone_runs_with_clip_on_an_nf4_base(
    names, run_tree, drive, tmp_path, tiny_tasks
):
    methods, tasks = {name: {} for name in names}, [str(task) for task in tiny_tasks[:2]]
    changes = {"model": {"quantization": "nf4"}, "training": {"max_steps": 1}, "parts": {"text": None}}
    results = drive(parse_config(run_tree(tmp_path / "run", methods=methods, tasks=tasks, **changes)))
    assert all(None not in results[name].rows[1] for name in methods)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are read from Linux's /proc")
def test_a_quantised_model_lets_go_of_its_checkpoint(tiny_clip, tiny_llava, tmp_path):
    """Weights that stay as they are would be views of the mapped file, whose every page would stay in memory."""
    for folder in (tiny_clip, tiny_llava):
        own = shutil.copytree(
            folder, tmp_path / folder.name
        )  # other tests of this process may hold the shared one's pages
        family = load_model(ModelConfig(str(own), quantization="nf4"), EvaluationConfig(max_new_tokens=4))
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(own) in line]
        assert family.model and not mapped


def test_a_stacked_layer_holds_its_deltas_once(tiny_clip):
    family = load_model(ModelConfig(str(tiny_clip), quantization="nf4"), EvaluationConfig(max_new_tokens=4))
    name, layer = next(
        (name, module) for name, module in family.model.named_modules() if is_quantised(module)
    )
    deltas = [
        {name: Delta(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 1.0)}
        for _ in range(2)
    ]
    given = [weakref.ref(tensor) for task in deltas for tensor in task[name].tensors.values()]
    BaseWeights({name: layer}).apply(deltas)
    x = torch.randn(1, layer.in_features)
    carried = layer(x)
    del deltas
    gc.collect()
    assert not any(ref() is not None for ref in given) and torch.equal(layer(x), carried)


def test_a_part_that_is_quantised_cannot_be_trained_in_full(quantised_run, drive):
    with pytest.raises(
        ConfigError,
        match=r"parts.language.train is 'full' and model.quantization is nf4.*set parts.language.train to 'adapter'",
    ):
        drive(quantised_run("nf4", parts={"language": {"train": "full"}, "vision": PART}))


def test_an_unknown_form_is_refused(llava_tree, tmp_path):
    with pytest.raises(
        ConfigError,
        match="model.quantization must be 'nf4' or 'int8' .got 'fp4'.; set it to 'nf4' or 'int8', or leave it out",
    ):
        parse_config(llava_tree(tmp_path, model={"quantization": "fp4"}))
