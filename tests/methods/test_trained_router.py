"""The trained router: it names more tasks right than the untouched base, is redone whole, and its costs count."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

import llava_keeplora
from llava_keeplora.adapters import BaseWeights
from llava_keeplora.compare.budget import trained_examples
from llava_keeplora.config import parse_config
from llava_keeplora.errors import MethodError
from llava_keeplora.export.inspect_state import inspect_state
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.journal import Journal
from llava_keeplora.methods import METHODS, AnswerContext
from llava_keeplora.methods.model_router import ModelRouter, RouterTraining
from llava_keeplora.models import Prepared
from llava_keeplora.report.resources import read_needs
from llava_keeplora.run_folder import JOURNAL, result_files
from llava_keeplora.saved_run import run_identity
from llava_keeplora.sequence import second_training
from llava_keeplora.steps import Budget
from llava_keeplora.testing import check_method
from llava_keeplora_eval.predictions import read_predictions
from llava_keeplora_recipes import load_split

TaskLora = METHODS["task-lora"]
ASKED = {"method": "task-lora", "routing": "model"}
TRAINED = ASKED | {
    "router_examples": 8,
    "router_epochs": 15,
    "router_learning_rate": 0.005,
    "router_batch_size": 16,
}
#: A training too short to learn from.
SHORT = {"router_examples": 3, "router_epochs": 2, "router_rank": 3, "router_batch_size": 4}


@pytest.fixture(scope="module")
def config(tmp_path_factory, llava_tree, mixed_tasks):
    tree = llava_tree(
        tmp_path_factory.mktemp("router") / "run",
        tasks=[str(mixed_tasks[0]), str(mixed_tasks[2])],
        model={"name_or_path": str(Path(llava_keeplora.__file__).parent / "assets/tiny-llava")},
        methods={"trained": TRAINED},
        training={"max_steps": 2},
        evaluation={"max_new_tokens": 4},
    )
    tree["parts"] = {"language": {"rank": 4, "alpha": 8, "targets": "all-linear"}}
    return parse_config(tree)


@pytest.fixture(scope="module")
def finished(config, driven):
    return driven(config)


def states(finished):
    paths = [folder / "state.safetensors" for folder in sorted((finished / "trained").glob("task-*"))]
    return [load_file(path) if path.exists() else {} for path in paths]


@pytest.fixture(scope="module")
def chosen(finished):
    """Task → the tasks that the trained and the untouched router name for its test examples."""
    learned = load_learned_run(finished, "trained")
    family, method, found = learned.load(deltas=[]), learned.method, {}
    method.load_state_dicts(states(finished))
    for task, recipe in enumerate(learned.recipes):
        data = load_split(recipe, "test")

        def asking(tokens, recipe=recipe, data=data):
            return family.predictor(recipe, Prepared(family, data), tokens)

        ctx = AnswerContext(
            recipe.name, ["a", "b"], list, family.model, BaseWeights({}), recipe, learned.recipes, asking
        )
        trained = method.router.choose(asking(None), ctx)
        found[task] = trained(list(data)), ModelRouter(ctx)(list(data)), trained(list(data))
    return found


@pytest.mark.slow
def test_a_trained_router_names_more_held_out_examples_right_than_the_untouched_base(chosen):
    right = [sum(named[i].count(task) for task, named in chosen.items()) for i in range(3)]
    assert right[0] >= 14 and right[1] <= 8, "of 16"
    assert right[2] == right[0], "the untouched base was asked in between, and nothing of the router stays"


@pytest.mark.slow
def test_each_example_is_answered_by_the_task_that_the_router_names(finished, chosen):
    learned = load_learned_run(finished, "trained")
    for task, recipe in enumerate(learned.recipes):
        data = load_split(recipe, "test")
        (folder,) = (finished / "trained").glob("task-02-*")
        found = read_predictions(folder / f"predictions/{recipe.name}.jsonl", data)
        for other in set(chosen[task][0]):
            family = learned.load(deltas=[learned.deltas[other]])
            answers = family.predictor(recipe, Prepared(family, data)).predict(list(data))
            rows = [row for row, named in enumerate(chosen[task][0]) if named == other]
            assert [found[data.ids[row]] for row in rows] == [answers[row] for row in rows]


@pytest.mark.slow
def test_the_examples_passes_and_numbers_of_the_router_are_counted(finished, config):
    first, second = states(finished)[1:]
    assert list(first) == ["router.examples"] and len(first["router.examples"]) == 8
    factors = {name: value for name, value in second.items() if name.endswith((".A", ".B"))}
    layers = load_learned_run(finished, "trained").deltas[0]
    assert factors.keys() == {f"router.{layer}.{factor}" for layer in layers for factor in "AB"}
    folders = sorted((finished / "trained").glob("task-*"))[1:]
    stored = sum(
        (f / name).stat().st_size for f in folders for name in ("delta.safetensors", "state.safetensors")
    )
    needs = read_needs(finished / "trained")
    assert needs.kept_bytes > stored / 2, "and the bytes of the examples themselves"
    # 2 steps of 8 of each task, and 15 passes over 16 examples.
    assert needs.examples == trained_examples(config, "trained") == 32 + 240
    assert needs.training_passes == pytest.approx(272 / 48) and needs.inputs == ("old examples",)
    (again,) = [
        e
        for e in Journal(finished / "trained" / JOURNAL).entries
        if e.stage == "CONSOLIDATED" and e.task == 2
    ]
    assert again.info["examples"] == {"1": 120, "2": 120}


@pytest.mark.slow
def test_the_state_is_what_the_method_declares(finished, config):
    inspect_state(finished, config, run_identity(config)["tasks"])


@pytest.mark.slow
def test_a_run_that_is_killed_in_the_router_s_training_ends_as_one_in_one_go(
    llava_tree, mixed_tasks, tmp_path, driven, monkeypatch
):
    def tree(folder):
        tasks = [str(mixed_tasks[0]), str(mixed_tasks[2])]
        return parse_config(llava_tree(tmp_path / folder, methods={"trained": ASKED | SHORT}, tasks=tasks))

    whole = driven(tree("whole"))
    release, stops = second_training.release, iter([KeyboardInterrupt])

    def stop(*arguments):
        for error in stops:
            raise error
        release(*arguments)

    monkeypatch.setattr(second_training, "release", stop)
    with pytest.raises(KeyboardInterrupt):
        driven(tree("killed"))
    assert driven(tree("killed"))
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in result_files(folder / "trained")}
        for folder in (whole, tmp_path / "killed")
    ]
    assert files[0] == files[1] and any(name.endswith("state.safetensors") for name in files[0])


def test_nothing_is_trained_while_there_is_one_task_or_no_example_is_kept():
    training = RouterTraining(20, 40, 5e-6, None, 32)
    assert training.budget(1, [100]).seen == 0
    assert (
        training.budget(3, [100, 7, 50]) == Budget(47, 32, 80)
        and training.budget(3, [100, 7, 50]).seen == 40 * 47
    )
    budgets = [Budget(100, 8, 13), Budget(50, 8, 7)]
    method = TaskLora(TaskLora.Options(routing="model"))
    assert method.mixes and method.further_budget(2, budgets) == training.budget(2, [100, 50])
    for options in (
        {"routing": "model", "router_examples": 0},
        {"routing": "prototypes"},
        {"routing": "oracle"},
    ):
        method = TaskLora(TaskLora.Options(**options))
        assert not method.mixes and method.further_budget(2, budgets) is None and method.router.lora is None


@pytest.mark.parametrize(
    ("option", "value"),
    [("examples", -1), ("epochs", 0), ("rank", 0), ("batch_size", 0), ("learning_rate", float("inf"))],
)
def test_an_impossible_training_is_refused_by_the_option_s_name(option, value):
    with pytest.raises(MethodError, match=f"router_{option} must.*{value}"):
        TaskLora(TaskLora.Options(**{f"router_{option}": value}))


@pytest.mark.slow
def test_a_killed_and_an_extended_run_end_as_one_in_one_go(llava_tree, mixed_tasks, tmp_path):
    tasks = [str(path) for path in mixed_tasks[:2]]
    check_method("task-lora", {"routing": "model"} | SHORT, llava_tree(tmp_path / "run", tasks=tasks))
