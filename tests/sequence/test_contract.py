"""What every method promises, on the small CLIP and the small LLaVA: one test for all of them, each from one run per family."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from first_methods import FIRST
from llava_keeplora.adapters import AdapterInit, BaseWeights, Delta, FullDelta, attach, concatenate
from llava_keeplora.config import EvaluationConfig, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.export.run_export import export_run
from llava_keeplora.export.verify import probe
from llava_keeplora.methods import METHODS, AnswerContext, find_changed
from llava_keeplora.models import Prepared, load_model
from llava_keeplora.plan import describe, make_plan
from llava_keeplora.saved_run import load_run
from llava_keeplora.sequence import method_run, run_context, trainer
from llava_keeplora.testing import METHOD_CHECKS, check_family, check_method
from llava_keeplora_eval.predictions import read_predictions
from llava_keeplora_recipes import load_split

FAMILIES = ("clip", "llava")
LEARNING = [name for name, method in METHODS.items() if method.trainable]
MERGEABLE = [name for name in LEARNING if METHODS[name].info.mergeable]
#: These are stopped everywhere in test_resume.py.
STOPPED_ELSEWHERE = ["seq-lora", "keeplora"]
#: A router starts anew with every task, over experts that have learned already.
STARTING_ANEW = ["moe-adapters"]


def runs_on(family, methods=LEARNING):
    """Those methods that run on a family."""
    return [name for name in methods if family in METHODS[name].info.families]


def for_every(methods):
    """A test for each method on each family that it runs on; behind the slow marker but for the first methods'."""
    return pytest.mark.parametrize(
        ("family", "method"),
        [
            pytest.param(family, name, marks=[pytest.mark.slow] * (name not in FIRST))
            for family in FAMILIES
            for name in runs_on(family, methods)
        ],
    )


@dataclasses.dataclass
class Seen:
    """What a run showed while it lasted.

    Args:
        folder: of the run.
        base: every tensor of the model as it was loaded.
        after: method → every tensor of the model after its last task.
        logits: method → logits on the last task's test examples then.
        first: method and task → the first batch of its training, and the task's own loss on it.
    """

    folder: Path
    base: dict
    after: dict = dataclasses.field(default_factory=dict)
    logits: dict = dataclasses.field(default_factory=dict)
    first: dict = dataclasses.field(default_factory=dict)


def tensors(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture
def config(family, run_tree, llava_tree, tiny_tasks, mixed_tasks):
    """Function (folder, methods, **changes) → a run of them on two tasks."""
    build, tasks = {"clip": (run_tree, tiny_tasks), "llava": (llava_tree, mixed_tasks)}[family]
    options = {"zscl": {"reference": str(tiny_tasks[2])}}
    return lambda folder, methods, **changes: parse_config(
        build(
            folder,
            tasks=[str(task) for task in tasks[:2]],
            methods={name: options.get(name, {}) for name in runs_on(family, methods)},
            **changes,
        )
    )


@pytest.fixture
def trees(family, run_tree, llava_tree, tiny_tasks, mixed_tasks, tmp_path):
    """A run on two tasks as plain data, and options by method."""
    build, tasks = {"clip": (run_tree, tiny_tasks), "llava": (llava_tree, mixed_tasks)}[family]
    options = {"zscl": {"reference": str(tiny_tasks[2])}}
    return build(tmp_path / "run", tasks=[str(task) for task in tasks[:2]]), options


@pytest.fixture(scope="module")
def watched():
    """Family, and whether methods are later ones → a run of these on it, watched."""
    return {}


@pytest.fixture
def seen(family, method, config, driven, watched, tmp_path_factory):
    """A run of every first or every later method, watched; one for all tests."""
    key = family, method in FIRST
    if key not in watched:
        methods = [name for name in LEARNING if (name in FIRST) == key[1]]
        watched[key] = watch(tmp_path_factory.mktemp("contract") / "run", config, driven, methods)
    return watched[key]


def watch(folder, config, driven, methods):
    """Run methods."""
    found = Seen(folder, {})
    load, go, loss_of = (
        run_context.RunContext.load,
        method_run.MethodRun.go,
        trainer.TaskTrainer.compute_loss,
    )

    def watched_load(self):
        load(self)
        found.base.update(tensors(self.family.model))

    def watched_go(self):
        go(self)
        if self.trainable:
            found.after[self.config.label] = tensors(self.context.family.model)
            found.logits[self.config.label] = probe(self.context.family, self.tasks[-1].test)[1]

    def watched_loss(self, model, inputs, *args, **kwargs):
        loss, out = loss_of(self, model, inputs, True, *args[1:], **kwargs)
        found.first.setdefault((self.method.info.name, self.ctx.index), (inputs, float(out["loss"].detach())))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.TaskTrainer, "compute_loss", watched_loss)
        patch.setattr(run_context.RunContext, "load", watched_load)
        patch.setattr(method_run.MethodRun, "go", watched_go)
        driven(config(folder, methods))
    return found


def read(folder, name):
    """Tensors that a stage may have left behind."""
    path = folder / f"{name}.safetensors"
    return load_file(path) if path.exists() else {}


def base_family(learned):
    return load_model(learned.model, EvaluationConfig(**learned.config["evaluation"]))


@for_every(LEARNING)
def test_exactly_the_declared_tensors_change(seen, method):
    learned = load_learned_run(seen.folder, method)
    changed = find_changed(METHODS[method], load_run(seen.folder).methods[method].parts, base_family(learned))
    declared = {f"{name}.weight" for name in changed.adapted} | {
        f"{n}.{own}" for n, m in changed.full.items() for own, _ in m.named_parameters(recurse=False)
    }
    stored = [
        {f"{name}.{own}" for name, delta in task.items() for own in delta.changes()}
        for task in learned.deltas
    ]
    untrained = [set()] if method == "joint" else []
    assert stored == [*untrained, declared, declared][:2]
    assert {
        name for name, value in seen.after[method].items() if not torch.equal(value, seen.base[name])
    } == (declared if learned.method.combine(learned.deltas) else set())


@for_every([name for name in LEARNING if name not in STARTING_ANEW])
def test_a_task_begins_with_the_model_that_the_last_one_left_or_with_the_base(seen, method):
    learned = load_learned_run(seen.folder, method, at_task=1 if METHODS[method].cumulative else 2)
    batch, loss = seen.first[method, 2]
    start = learned.load(deltas=None if learned.method.cumulative else [])
    batch = dict(batch)
    expected = float(start.task(learned.recipes[batch.pop("task", 2) - 1])(**batch)["loss"])
    assert loss == pytest.approx(expected, rel=1e-5)


@for_every(LEARNING)
def test_what_is_read_back_from_the_files_answers_as_the_run_did(seen, method):
    learned, cls = load_learned_run(seen.folder, method), METHODS[method]
    fresh, family, data = (
        cls(cls.Options(**learned.config["methods"][method]["options"])),
        learned.load(),
        load_split(learned.recipes[-1], "test"),
    )
    folders = sorted((seen.folder / method).glob("task-*"))
    fresh.load_state_dicts([read(folder, "kept") | read(folder, "state") for folder in folders])
    layers = {name: family.model.get_submodule(name) for task in learned.deltas for name in task}
    tasks = [recipe.name for recipe in learned.recipes]
    ctx = AnswerContext(tasks[-1], tasks, lambda: learned.deltas, family.model, BaseWeights(layers))
    predictor = fresh.predictor_of(family.predictor(data.recipe, Prepared(family, data)), ctx)
    told = read_predictions(folders[-1] / f"predictions/{data.recipe.name}.jsonl", data)
    assert predictor.predict([data[i] for i in range(len(data))]) == [told[key] for key in data.ids]


@for_every(MERGEABLE)
def test_merged_and_unmerged_agree(seen, method):
    learned = load_learned_run(seen.folder, method)
    family, updates = base_family(learned), learned.method.combine(learned.deltas)
    full = [{name: delta for name, delta in task.items() if isinstance(delta, FullDelta)} for task in updates]
    BaseWeights({name: family.model.get_submodule(name) for name in full[0]}).apply(full)
    stacked = concatenate(
        [{name: delta for name, delta in task.items() if isinstance(delta, Delta)} for task in updates]
    )
    attach(
        family.model,
        {
            name: AdapterInit(len(delta.A), float(len(delta.A)), delta.A, delta.B)
            for name, delta in stacked.items()
        },
    )
    family.model.eval()
    unmerged = probe(family, load_split(learned.recipes[-1], "test"))[1]
    assert float((unmerged - seen.logits[method]).abs().max()) <= 1e-5 * max(1.0, float(unmerged.abs().max()))
    plain = probe(base_family(learned), load_split(learned.recipes[-1], "test"))[1]
    assert float((unmerged - plain).abs().max()) > 1e-3, "what was learned is seen in the logits"


@for_every([name for name in LEARNING if name not in MERGEABLE])
def test_what_does_not_merge_is_refused_in_a_sentence(seen, method):
    for form in ("merged", "adapter"):
        with pytest.raises(
            ConfigError,
            match=f"what '{re.escape(method)}' learned does not merge into the base's weights; export .*--as state",
        ):
            export_run(seen.folder, form, label=method)


def layer_names(folder, method):
    """The adapted layers, where the prepared stage has no adapters."""
    return json.loads(next((folder / method).glob("task-01*/consolidated.json")).read_text())["capacity"]


@for_every(LEARNING)
def test_the_journal_counts_what_is_trained_and_every_task_is_scored(seen, method):
    entries = [json.loads(line) for line in (seen.folder / method / "journal.jsonl").read_text().splitlines()]
    trainings = [entry["info"] for entry in entries if entry["stage"] == "TRAINED"]
    counts = [info["trained_parameters"] for info in trainings]
    assert [info["steps"] > 0 for info in trainings] == [method != "joint", True]
    prepared = [
        json.loads(path.read_text())["layers"]
        for path in sorted((seen.folder / method).glob("task-*/prepared.json"))
    ]
    shapes = {
        name.removesuffix(".weight"): value.shape
        for name, value in seen.base.items()
        if name.endswith(".weight")
    }
    trained = (
        (lambda name: name != "logit_scale")
        if METHODS[method].full_finetuning
        else (lambda name: "multi_modal_projector" in name and METHODS[method].uses_lora)
    )
    full = sum(
        value.numel() for name, value in seen.base.items() if trained(name) and value.is_floating_point()
    )
    kept = [read(folder, "kept") for folder in sorted((seen.folder / method).glob("task-0[12]*"))]
    for task, (count, layers, beside) in enumerate(zip(counts, prepared, kept, strict=True), start=1):
        own = sum(
            layer["rank"] * (shapes[name][0] + shapes[name][1] * layer["train_A"])
            for name, layer in layers.items()
        )
        own = sum(layer["rank"] ** 2 for layer in layers.values()) if method == "nusa-cl" else own
        own += len(layers) if method == "eblora" else 0
        if method == "osf":
            weak = {
                name: min(shapes[name]) - min(shapes[name]) // 2 for name in layer_names(seen.folder, method)
            }
            own = sum(rank * (sum(shapes[name]) + 1) for name, rank in weak.items())
        own += sum(value.numel() for value in beside.values() if value.is_floating_point())
        assert count == own + full * (count > 0) + (task if method == "sd-lora" else 0)
    assert len(json.loads((seen.folder / method / "matrix.json").read_text())["rows"]) == 2


@pytest.mark.slow
@for_every(LEARNING)
def test_a_method_passes_the_checks_of_third_parties(trees, family, method):
    """Resuming is checked of those that test_resume.py does not stop everywhere, after stages on one family: CLIP where it is one."""
    slow = [
        check for check in METHOD_CHECKS if check.__name__ in ("check_resuming_stages", "check_extending")
    ]
    training = [check for check in METHOD_CHECKS if check.__name__ == "check_resuming_training"]
    elsewhere = family == "llava" and "clip" in METHODS[method].info.families
    left_out = (slow if elsewhere else []) + ([] if method not in STOPPED_ELSEWHERE else [*slow, *training])
    tree, options = trees
    checks = [check for check in METHOD_CHECKS if check not in left_out]
    check_method(method, options.get(method), tree, checks)


@pytest.mark.parametrize("family", ["clip"])
@pytest.mark.slow
def test_a_router_passes_those_that_start_it_once_or_twice(trees, family):
    """The quick form for methods with a router; the stop at every stage, a dozen starts, is behind the slow marker."""
    checks = [check for check in METHOD_CHECKS if check.__name__ != "check_resuming_stages"]
    check_method("moe-adapters", None, trees[0], checks)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_passes_the_checks_of_third_parties(trees, family):
    tree, _ = trees
    check_family(family, tree["model"]["name_or_path"], tree["tasks"][0], tree.get("evaluation"))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in LEARNING if "llava" not in METHODS[name].info.families])
def test_a_method_is_refused_on_a_model_that_it_does_not_run_on(llava_tree, driven, tmp_path, method):
    name = re.escape(method)
    with pytest.raises(
        ConfigError,
        match=f"'{name}' runs on the family clip, but .* is a llava, of the family llava; leave '{name}' out",
    ):
        driven(parse_config(llava_tree(tmp_path / "run", methods={method: {}})))


@pytest.mark.parametrize("method", ["o-lora", "sd-lora", "keeplora+", "zscl", "moe-adapters", "iap"])
def test_a_method_that_needs_whole_adapters_refuses_shards_in_a_sentence(run_tree, tmp_path, method):
    training = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    with pytest.raises(
        ConfigError,
        match=rf"stage 3, but '{re.escape(method)}' \({re.escape(method)}\) reads trained parameters outside of their layers.*; use stage 2",
    ):
        parse_config(run_tree(tmp_path / "run", methods={method: {}}, training=training))
    parse_config(
        run_tree(
            tmp_path / "run", methods={"inflora": {}, "keeplora": {}, "keeplora++": {}}, training=training
        )
    )


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("ewc", "reads trained parameters outside of their layers.*; use stage 2"),
        ("reglora", "reads trained parameters outside of their layers.*; use stage 2"),
        ("task-lora", "answers with another task's update.*; use stage 2"),
        # No stage would do for these.
        ("eblora", "has an optimiser of its own.*; train without DeepSpeed"),
        ("osf", "has an optimiser of its own.*; train without DeepSpeed"),
    ],
)
def test_a_later_method_refuses_shards_with_a_cure_that_helps(run_tree, tmp_path, method, why):
    training = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    with pytest.raises(ConfigError, match=why):
        parse_config(run_tree(tmp_path / "run", methods={method: {}}, training=training))


@pytest.mark.slow
def test_a_plan_leaves_out_and_names_what_it_cannot_rehearse_and_refuses_where_nothing_is_left(
    run_tree, tmp_path
):
    why = "initializes its adapters from data"
    with pytest.raises(ConfigError, match=f"'inflora' {why}.*run it without a plan"):
        make_plan(parse_config(run_tree(tmp_path / "run", methods={"inflora": {}})))
    names = runs_on("clip", FIRST)
    plan = make_plan(parse_config(run_tree(tmp_path / "run", methods={name: {} for name in names})))
    assert [method.label for method in plan.methods] == [name for name in names if name not in plan.left_out]
    assert list(plan.left_out) == ["inflora", "zscl", "moe-adapters", "iap"]
    assert f"\nnot planned: 'inflora' {why}" in describe(
        plan
    ) and "not planned: 'iap' does not train LoRA adapters" in describe(plan)


@pytest.mark.parametrize("method", [name for name in LEARNING if not METHODS[name].uses_lora])
def test_a_method_without_adapters_takes_no_parts_and_no_plan_in_a_sentence(run_tree, tmp_path, method):
    with pytest.raises(
        ConfigError,
        match=f"methods.{method}.parts is set, but '{method}' has no adapters on the model's parts; remove methods.{method}.parts",
    ):
        parse_config(run_tree(tmp_path / "run", methods={method: {"parts": {"vision": {"rank": 4}}}}))
    with pytest.raises(
        ConfigError,
        match=f"'{method}' does not train LoRA adapters.*run it without a plan",
    ):
        make_plan(parse_config(run_tree(tmp_path / "run", methods={method: {}})))
