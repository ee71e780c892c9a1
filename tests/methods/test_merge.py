"""The identities of merged task vectors."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava_keeplora.adapters import BaseWeights, Delta, FullDelta, load_deltas
from llava_keeplora.adapters.task_vectors import scale_deltas, ties
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.export.adapter import combine
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.export.run_export import export_run
from llava_keeplora.methods import METHODS, AnswerContext
from llava_keeplora.methods.condu import Unified, unify
from llava_keeplora.models import Prepared
from llava_keeplora.testing import check_method
from llava_keeplora_eval.predictions import read_predictions
from llava_keeplora_recipes import load_split
from run_answers import assert_predictor_answers_as_the_run

Merge = METHODS["merge"]
#: Label → its options; all are trained in one run.
METHODS_RUN = {
    "seq-lora": {},
    "mean": {"method": "merge"},
    "start": {"method": "merge", "rule": "wise-ft", "alpha": 0.0},
    "condu": {"method": "merge", "rule": "condu", "routing": "oracle"},
    "nearest": {"method": "merge", "rule": "condu"},
    "end": {"method": "merge", "rule": "wise-ft", "alpha": 1.0},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven, tiny_tasks):
    tasks = [str(path) for path in tiny_tasks[:2]]
    return driven(run_config(tmp_path_factory.mktemp("merge") / "run", methods=METHODS_RUN, tasks=tasks))


def delta_bytes(finished, label):
    """Of each task's update."""
    return [path.read_bytes() for path in sorted((finished / label).glob("task-*/delta.safetensors"))]


def predictions(finished, label, after, recipe):
    (folder,) = (finished / label).glob(f"task-{after:02}-*")
    return folder / f"predictions/{recipe.name}.jsonl"


def answers(finished, label, task):
    return [
        path.read_bytes() for path in sorted((finished / label).glob(f"task-{task:02}-*/predictions/*.jsonl"))
    ]


@pytest.fixture
def tasks():
    """Deltas of three tasks on a layer, whose update is of low rank, and on a norm trained in full."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [{"a": Delta(draw(2, 6), draw(5, 2), 0.5), "b": FullDelta({"bias": draw(4)})} for _ in range(3)]


def method(**options):
    return Merge(Merge.Options(**options))


def total(combined, name, key="weight"):
    """A module's merged change in float64."""
    return sum(task[name].changes()[key].double() for task in combined if name in task)


def test_the_mean_is_the_mean_of_the_updates(tasks):
    combined = method().combine(tasks)
    dense = torch.stack([0.5 * task["a"].B.double() @ task["a"].A.double() for task in tasks])
    torch.testing.assert_close(total(combined, "a"), dense.mean(dim=0), atol=1e-6, rtol=1e-5)
    biases = torch.stack([task["b"].parameters["bias"].double() for task in tasks])
    torch.testing.assert_close(total(combined, "b", "bias"), biases.mean(dim=0), atol=1e-6, rtol=1e-5)
    assert method().combine([]) == []


def ties_by_definition(changes, density):
    """Entry by entry; the paper's algorithm 1."""
    kept = []
    for change in changes:
        magnitudes = sorted((abs(float(value)) for value in change.flatten()), reverse=True)
        least = magnitudes[max(round(density * len(magnitudes)), 1) - 1]
        kept.append([float(v) if abs(float(v)) >= least else 0.0 for v in change.flatten()])
    merged = []
    for entries in zip(*kept):
        mass = sum(entries)
        agreeing = [v for v in entries if v * mass > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(changes[0].shape)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_is_what_its_definition_says_entry_by_entry(density):
    changes = list(torch.randn(4, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(ties(changes, density), ties_by_definition(changes, density))


def test_ties_of_one_whole_update_and_of_opposite_ones():
    change = torch.tensor([[0.3, -2.0], [0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(ties([change], 1.0), change)
    assert torch.equal(ties([change, -change], 1.0), torch.zeros_like(change)), "no sign is elected"
    assert torch.equal(ties([change, change], 0.25), torch.tensor([[0.0, -2.0], [0.0, 0.0]]).double())


def test_ties_merges_every_module_as_its_definition_says(tasks):
    (combined,) = method(rule="ties", density=0.4).combine(tasks)
    assert set(combined) == {"a", "b"} and "c" not in combined and len(combined) == 2
    dense = [task["a"].dense().double() for task in tasks]
    torch.testing.assert_close(total([combined], "a"), ties_by_definition(dense, 0.4), atol=1e-6, rtol=1e-5)
    del tasks[0]["b"]
    biases = [task["b"].parameters["bias"].double() for task in tasks[1:]]
    torch.testing.assert_close(
        total([combined], "b", "bias"), ties_by_definition(biases, 0.4).float().double()
    )


@pytest.mark.slow
def test_wise_ft_at_1_is_sequential_lora_bit_for_bit(finished):
    assert delta_bytes(finished, "end") == delta_bytes(finished, "seq-lora")
    assert answers(finished, "end", 2) == answers(finished, "seq-lora", 2)


def test_wise_ft_at_0_stays_the_base(finished):
    learned = load_learned_run(finished, "start")
    base, after = learned.load(deltas=[]).model.state_dict(), learned.load().model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items())


def test_every_task_is_trained_from_the_untouched_base(finished):
    """As under `wise-ft` with a weight of 0, where every task begins at the base too."""
    assert delta_bytes(finished, "mean") == delta_bytes(finished, "start")
    assert delta_bytes(finished, "mean")[0] == delta_bytes(finished, "seq-lora")[0]
    assert delta_bytes(finished, "mean")[1] != delta_bytes(finished, "seq-lora")[1]


def test_a_run_loads_and_combines_to_the_mean(finished):
    learned = load_learned_run(finished, "mean")
    updates = [load_deltas(path) for path in sorted((finished / "mean").glob("task-*/delta.safetensors"))]
    base, merged = learned.load(deltas=[]).model, learned.load().model
    for name in updates[0]:
        mean = sum(update[name].dense().double() for update in updates) / 2
        change = merged.get_submodule(name).weight.double() - base.get_submodule(name).weight.double()
        torch.testing.assert_close(change, mean, atol=1e-6, rtol=1e-4)
    adapter = combine(learned.method.combine(learned.deltas))
    assert adapter.rank == 2 * len(updates[0][name].A)
    torch.testing.assert_close(adapter.layers[name].dense().double(), mean, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("label", "form"), [("mean", "adapter"), ("ties", "merged"), ("ties", "state")])
def test_a_merge_exports(run_config, driven, tiny_tasks, tmp_path, label, form):
    methods = {"mean": {"method": "merge"}, "ties": {"method": "merge", "rule": "ties"}}
    run = driven(
        run_config(tmp_path / "run", methods={label: methods[label]}, tasks=[str(t) for t in tiny_tasks[:2]])
    )
    exported = export_run(run, form, tmp_path / form, base_id="user/name")
    assert exported.own.largest < 1e-4
    assert exported.rounding is None or exported.rounding.lost < 1e-3


def test_an_update_of_full_rank_is_refused_as_an_adapter(finished, monkeypatch, tmp_path):
    learned = load_learned_run(finished, "mean")
    settings = {**learned.config["methods"]["mean"], "options": {"rule": "ties"}}
    config = {**learned.config, "methods": {"mean": settings}}
    monkeypatch.setattr(
        "llava_keeplora.export.run_export.load_learned_run",
        lambda *args: dataclasses.replace(learned, config=config),
    )
    with pytest.raises(ConfigError, match="updates of full rank.*export --as merged"):
        export_run(finished, "adapter", tmp_path / "adapter", label="mean", base_id="user/name")


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unified(*updates):
    found = Unified()
    for change in updates:
        found.add({"a": FullDelta({"weight": change.float()})})
    return found


def decoupled(found, task):
    return found.decoupled(task)["a"].changes()["weight"]


def test_condu_unifies_by_the_majority_s_sign_and_the_largest_magnitude_entry_by_entry():
    changes = draws(3, 4, 5)
    found, masks = unify(changes)
    for row in range(4):
        for column in range(5):
            values = changes[:, row, column].tolist()
            sign = 1 if sum(values) / 3 > 0 else -1
            assert found[row, column] == sign * max(abs(v) for v in values if v * sign > 0)
            assert masks[:, row, column].tolist() == [v * sign > 0 for v in values]


def test_condu_decouples_exactly_where_updates_do_not_meet_or_agree():
    first, second = draws(4, 6).float(), draws(4, 6, seed=1).float()
    assert torch.equal(decoupled(unified(first), 0), first), "of one task"
    first[:, :3], second[:, 3:] = 0, 0
    found = unified(first, second)
    assert torch.equal(decoupled(found, 0), first) and torch.equal(decoupled(found, 1), second)
    same = unified(first, first, first)
    assert all(torch.equal(decoupled(same, task), first) for task in range(3))


def test_condu_keeps_every_update_s_mean_magnitude_and_goes_from_session_to_session():
    """Session by session as published: earlier tasks enter as they were decoupled before."""
    updates = [draws(4, 6, seed=seed).float().double() for seed in range(3)]
    held = []
    for update in updates:
        held.append(update)
        stacked = torch.stack(held)
        sign = torch.where(stacked.mean(dim=0) > 0, 1.0, -1.0)
        largest = torch.where(stacked * sign > 0, stacked.abs(), torch.zeros(())).amax(dim=0) * sign
        kept = [largest * (h * sign > 0) for h in held]
        held = [h.abs().mean() / k.abs().mean() * k for h, k in zip(held, kept)]
    found = unified(*updates)
    for task, expected in enumerate(held):
        torch.testing.assert_close(decoupled(found, task).double(), expected, atol=1e-6, rtol=1e-5)
    last = decoupled(found, 2).double().abs().mean()
    torch.testing.assert_close(last, updates[2].abs().mean(), atol=1e-6, rtol=1e-5)


def test_condu_takes_a_module_that_a_task_left_out_as_unchanged(tasks):
    found, first = Unified(), {"a": tasks[0]["a"]}
    found.add(first)
    found.add(tasks[1])
    assert set(found.decoupled(0)) == {"a", "b"} and len(found.decoupled(1)) == 2
    assert not found.decoupled(0)["b"].parameters["bias"].any()


def test_condu_answers_with_the_given_task_s_decoupled_update_and_else_with_the_base(finished):
    learned = load_learned_run(finished, "condu")
    found = unified_tasks(*learned.deltas)
    for index, recipe in enumerate(learned.recipes):
        data = load_split(recipe, "test")
        family = learned.load(deltas=[found.decoupled(index)])
        told = read_predictions(predictions(finished, "condu", 2, recipe), data)
        expected = family.predictor(recipe, Prepared(family, data)).predict(list(data))
        assert [told[key] for key in data.ids] == expected
    data = load_split(learned.recipes[1], "test")
    base = learned.load()
    told = read_predictions(predictions(finished, "condu", 1, learned.recipes[1]), data)
    expected = base.predictor(data.recipe, Prepared(base, data)).predict(list(data))
    assert [told[key] for key in data.ids] == expected


def test_condu_forgets_an_update_that_was_taken_back_for_another(tasks):
    condu = method(rule="condu", routing="oracle")
    first, taken_back = tasks[:2]
    instead = scale_deltas(taken_back, -2.0)

    def unify_all(*updates):
        return condu._unify(SimpleNamespace(learned=updates, deltas=lambda: list(updates)))

    unify_all(first, taken_back)
    condu.load_state_dicts([{}, {}])  # As when the next task begins after the first alone.
    found, expected = unify_all(first, instead).decoupled(1), unified_tasks(first, instead).decoupled(1)
    for name in expected:
        for key, change in expected[name].changes().items():
            assert torch.equal(found[name].changes()[key], change)


def unified_tasks(*updates):
    found = Unified()
    for update in updates:
        found.add(update)
    return found


@pytest.mark.parametrize("label", ["condu", "nearest"])
def test_a_predictor_of_the_finished_run_answers_as_the_run_did(finished, label):
    assert_predictor_answers_as_the_run(finished, label, 2)


def decoupled_by_definition(first, second):
    """The changes of two tasks, layer → weight, as they are decoupled from the unified change after the second."""
    held, kept = [first, second], [{}, {}]
    for name in first:
        changes = torch.stack([task[name] for task in held])
        sign = torch.where(changes.mean(dim=0) > 0, 1.0, -1.0)
        agreeing = changes * sign > 0
        largest = torch.where(agreeing, changes.abs(), torch.zeros(())).amax(dim=0) * sign
        for task in (0, 1):
            kept[task][name] = largest * agreeing[task]
    # One factor per task, of its mean magnitudes summed over all layers.
    factors = [
        sum(float(change.abs().mean()) for change in h.values())
        / sum(float(change.abs().mean()) for change in k.values())
        for h, k in zip(held, kept)
    ]
    return [{name: factor * change for name, change in k.items()} for factor, k in zip(factors, kept)]


def directions_by_definition(base, recipe):
    """A task's prototypes: the unit mean of a class's mean feature and its prompt's."""
    train = load_split(recipe, "train")
    predictor, found = base.predictor(recipe, Prepared(base, train)), []
    for label, prompt in enumerate(predictor.class_features().double()):
        images = predictor.features([train[i] for i in range(len(train)) if train[i].label == label])
        mean = (images.double().mean(dim=0) + prompt) / 2
        found.append(mean / mean.norm())
    return torch.stack(found)


def expected_answers(learned, deltas, data):
    """Of the decoupled model of the task whose prototype is nearest; of each of the two models; the tasks."""
    base = learned.load(deltas=[])
    updates = [{name: delta.dense().double() for name, delta in task.items()} for task in deltas]
    models = [
        learned.load(deltas=[{name: FullDelta({"weight": w.float()}) for name, w in changes.items()}])
        for changes in decoupled_by_definition(*updates)
    ]
    directions = [directions_by_definition(base, recipe) for recipe in learned.recipes]
    features = base.predictor(data.recipe, Prepared(base, data)).features(list(data)).double()
    cosines = torch.stack([(features @ own.T).amax(dim=1) for own in directions], dim=1)
    tasks = cosines.argmax(dim=1).tolist()
    texts = [m.predictor(data.recipe, Prepared(m, data)).predict(list(data)) for m in models]
    return [texts[task][row] for row, task in enumerate(tasks)], texts, tasks


def test_condu_with_prototypes_answers_each_example_with_the_decoupled_model_of_the_nearest_task(finished):
    learned = load_learned_run(finished, "nearest")
    assert delta_bytes(finished, "nearest") == delta_bytes(finished, "condu")
    for recipe in learned.recipes:
        data = load_split(recipe, "test")
        told = read_predictions(predictions(finished, "nearest", 2, recipe), data)
        assert [told[key] for key in data.ids] == expected_answers(learned, learned.deltas, data)[0]
    # With larger updates the two models answer differently.
    large, base = [scale_deltas(task, 50.0) for task in learned.deltas], learned.load(deltas=[])
    method, folders = learned.method, sorted((finished / "nearest").glob("task-0[12]*"))
    method.load_state_dicts([{}, *(load_file(folder / "state.safetensors") for folder in folders)])
    layers = BaseWeights({name: base.model.get_submodule(name) for name in large[0]})
    data = load_split(learned.recipes[1], "train")
    ctx = AnswerContext(
        data.recipe.name, [r.name for r in learned.recipes], lambda: large, base.model, layers
    )
    predictor = method.predictor_of(base.predictor(data.recipe, Prepared(base, data)), ctx)
    expected, texts, tasks = expected_answers(learned, large, data)
    assert predictor.predict(list(data)) == expected
    assert set(tasks) == {0, 1} and expected not in texts, "neither model alone would answer so"


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_condu_does_not_merge_and_needs_whole_weights(finished, run_config, tmp_path, form):
    with pytest.raises(ConfigError, match="does not merge into the base's weights; export --as state"):
        export_run(finished, form, label="condu")
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    with pytest.raises(ConfigError, match="'condu' .merge. answers with another task's update.*use stage 2"):
        run_config(tmp_path / "run", methods={"condu": METHODS_RUN["condu"]}, training=zero3)
    run_config(tmp_path / "run", methods={"mean": METHODS_RUN["mean"]}, training=zero3)


def test_condu_s_record_says_what_it_keeps_and_costs_and_the_list_that_it_does_not_merge():
    condu, given = method(rule="condu"), method(rule="condu", routing="oracle")
    assert not condu.mergeable and "does not merge" in condu.info.needs and "`condu`" not in condu.info.needs
    assert "prototypes" in condu.info.kept and "prototypes" in condu.info.extra_parameters
    assert "a pass of the base for the router" in condu.info.inference_cost
    assert given.info.inference_cost == "the weights set anew for every task that is picked"
    assert condu.info.inference_cost.endswith(given.info.inference_cost)
    assert "a mask" in given.info.extra_parameters and "prototypes" not in given.info.extra_parameters
    assert given.info.kept == Merge.info.kept and given.info.task_id_at_test
    for rule in ("mean", "ties", "wise-ft"):
        needs = "models of two encoders and models that write; merges"
        assert method(rule=rule).info.needs == needs and method(rule=rule).mergeable
    assert "; merges (`condu`: does not merge, " in Merge.info.needs


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rule": "average"}, "one of mean, ties.*got 'average'"),
        (
            {"rule": "condu", "routing": "guess"},
            "routing must be one of prototypes, model, oracle.*got 'guess'",
        ),
        ({"density": 0.0}, "density must be above 0.*got 0.0"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1.*got 1.5"),
    ],
)
def test_settings_outside_their_range_are_refused(options, problem):
    with pytest.raises(MethodError, match=problem):
        method(**options)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "llava"])
@pytest.mark.parametrize("rule", ["mean", "ties", "wise-ft", "condu"])
def test_a_killed_and_an_extended_run_end_as_one_in_one_go(
    request, tiny_tasks, mixed_tasks, tmp_path, family, rule
):
    tree = request.getfixturevalue("run_tree" if family == "clip" else "llava_tree")
    tasks = [str(path) for path in (tiny_tasks if family == "clip" else mixed_tasks)[:2]]
    check_method("merge", {"rule": rule}, tree(tmp_path / "run", tasks=tasks))
