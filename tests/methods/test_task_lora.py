"""The identities of task LoRAs: what is routed to a task is answered by its own adapter on the base."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import normalize

from llava_keeplora.adapters import BaseWeights, Delta
from llava_keeplora.config import ModelConfig, parse_config
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.export.adapter_set import _picked, export_set
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.export.run_export import export_run
from llava_keeplora.methods import METHODS, AnswerContext, TaskContext
from llava_keeplora.methods.model_router import read_letter
from llava_keeplora.methods.prototypes import prototypes
from llava_keeplora.methods.switching import BASE, SwitchingPredictor, carrying
from llava_keeplora.methods.task_router import TaskRouter
from llava_keeplora.models import Prepared, load_model, open_model
from llava_keeplora.plan import check_start, make_plan
from llava_keeplora.testing import check_method
from llava_keeplora_eval.predictions import read_predictions
from llava_keeplora_recipes import load_recipe, load_split
from run_answers import assert_predictor_answers_as_the_run

TaskLora = METHODS["task-lora"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven, tiny_tasks):
    folder, methods = tmp_path_factory.mktemp("task-lora") / "run", {"nearest": {"method": "task-lora"}}
    methods["oracle"] = {"method": "task-lora", "routing": "oracle"}
    methods["wary"] = {"method": "task-lora", "rejection": 0.9}
    return driven(run_config(folder, methods=methods, tasks=[str(path) for path in tiny_tasks[:2]]))


def answers(finished, label, after, recipe, data):
    (folder,) = (finished / label).glob(f"task-{after:02}-*")
    found = read_predictions(folder / f"predictions/{recipe.name}.jsonl", data)
    return [found[key] for key in data.ids]


def scores(finished, label, after):
    (folder,) = (finished / label).glob(f"task-{after:02}-*")
    return json.loads((folder / "scores.json").read_text())


def test_the_oracle_answers_each_task_with_its_own_adapter_and_a_new_one_with_the_base(finished):
    learned = load_learned_run(finished, "oracle")
    for task, recipe in enumerate(learned.recipes):
        data = load_split(recipe, "test")
        for after in (1, 2):
            family = learned.load(deltas=[learned.deltas[task]] if task < after else [])
            expected = family.predictor(recipe, Prepared(family, data)).predict(list(data))
            assert answers(finished, "oracle", after, recipe, data) == expected
            own = {"tasks": {recipe.name: len(data)}, "base": 0}
            routes = own if task < after else {"tasks": {}, "base": len(data)}
            assert scores(finished, "oracle", after)[recipe.name]["routes"] == routes


@pytest.mark.parametrize("label", ["nearest", "oracle", "wary"])
def test_a_predictor_of_the_finished_run_answers_as_the_run_did(finished, label):
    assert_predictor_answers_as_the_run(finished, label, 2)


def test_prototypes_answer_each_example_with_the_adapter_of_the_nearest_task(finished):
    learned = load_learned_run(finished, "nearest")
    base, adapted = learned.load(deltas=[]), [learned.load(deltas=[task]) for task in learned.deltas]
    directions = []
    for recipe in learned.recipes:  # Class by class.
        train = load_split(recipe, "train")
        predictor = base.predictor(recipe, Prepared(base, train))
        for label, prompt in enumerate(predictor.class_features().double()):
            images = predictor.features([train[i] for i in range(len(train)) if train[i].label == label])
            mean = (images.double().mean(dim=0) + prompt) / 2
            directions.append(mean / mean.norm())
    classes = [len(recipe.classes) for recipe in learned.recipes]
    data = load_split(learned.recipes[0], "test")
    features = base.predictor(learned.recipes[0], Prepared(base, data)).features(list(data)).double()
    best = (features @ torch.stack(directions).T).argmax(dim=1)
    tasks = [0 if index < classes[0] else 1 for index in best.tolist()]
    by_task = [m.predictor(data.recipe, Prepared(m, data)).predict(list(data)) for m in adapted]
    expected = [by_task[task][row] for row, task in enumerate(tasks)]
    assert answers(finished, "nearest", 2, data.recipe, data) == expected
    names = [recipe.name for recipe in learned.recipes]
    routes = {"tasks": {names[task]: tasks.count(task) for task in dict.fromkeys(tasks)}, "base": 0}
    assert scores(finished, "nearest", 2)[data.recipe.name]["routes"] == routes
    assert answers(finished, "nearest", 1, data.recipe, data) == by_task[0], "there is one task to choose"
    paths = [sorted((finished / label).glob("task-*/delta.safetensors")) for label in ("nearest", "oracle")]
    assert [p.read_bytes() for p in paths[0]] == [p.read_bytes() for p in paths[1]]


def test_a_run_with_rejection_answers_as_the_adapter_or_as_the_base_and_keeps_one_more_number(finished):
    states = [load_file(p) for p in sorted((finished / "wary").glob("task-*/state.safetensors"))]
    learned = load_learned_run(finished, "wary")
    base, adapted = learned.load(deltas=[]), learned.load(deltas=[learned.deltas[0]])
    data = load_split(learned.recipes[0], "test")
    predictor = base.predictor(data.recipe, Prepared(base, data))
    first = states[-2]
    assert len(states) in (2, 3) and all(set(s) == {"prototypes", "prototypes.least"} for s in states[-2:])
    cosines = (predictor.features(list(data)) @ first["prototypes"].T).amax(dim=1)
    own = (cosines >= first["prototypes.least"]).tolist()
    texts = [m.predictor(data.recipe, Prepared(m, data)).predict(list(data)) for m in (base, adapted)]
    assert answers(finished, "wary", 1, data.recipe, data) == [texts[o][i] for i, o in enumerate(own)]
    assert False in own
    routes = {"tasks": {data.recipe.name: own.count(True)}, "base": own.count(False)}
    assert scores(finished, "wary", 1)[data.recipe.name]["routes"] == routes


def test_prototypes_are_unit_means_of_groups_and_of_prompts():
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    features, groups = features / features.norm(dim=1, keepdim=True), torch.tensor([0, 2, 0, 2, 2])
    prompts = torch.eye(3)
    found = prototypes(features, groups, prompts)
    first = (features[[0, 2]].mean(dim=0) + prompts[0]) / 2
    torch.testing.assert_close(found[0], first / first.norm())
    assert torch.equal(found[1], prompts[1]), "a class without an image"
    mean = features.mean(dim=0)
    torch.testing.assert_close(prototypes(features, 0 * groups, None), (mean / mean.norm())[None])


def test_an_example_further_away_than_the_share_of_a_task_s_own_is_the_base_s():
    generator = torch.Generator().manual_seed(0)

    def unit(n):
        return normalize(torch.randn(n, 6, generator=generator), dim=1)

    rows = {1: unit(40), 2: unit(30)}
    router, states = TaskRouter("prototypes", 0.1), []
    for index, features in rows.items():
        predictor = SimpleNamespace(features=lambda found: torch.stack(found), class_features=lambda: None)
        ctx = TaskContext(index, "t", {}, None, None, 0, 0, predictor=lambda p=predictor: p)
        ctx = dataclasses.replace(ctx, examples=lambda f=features: iter([list(f[:9]), list(f[9:])]))
        router.after_task(ctx)
        states.append(router.state_dict())
        assert set(states[-1]) == set(router.holds(ctx)) == {"prototypes", "prototypes.least"}
    again = TaskRouter("prototypes", 0.1)
    again.load_state_dicts([{}, *states])
    new, expected = unit(500), []
    means = [normalize(r.double().mean(dim=0), dim=0) for r in rows.values()]
    least = []
    for features in rows.values():
        others = [torch.cat([features[:row], features[row + 1 :]]).double() for row in range(len(features))]
        own = [float(f.double() @ normalize(o.mean(dim=0), dim=0)) for f, o in zip(features, others)]
        least.append(sorted(own)[len(own) // 10])
    for example in new.double():
        cosines = [float(example @ mean) for mean in means]
        nearest = int(np.argmax(cosines))
        expected.append(nearest if cosines[nearest] >= least[nearest] else BASE)
    base = SimpleNamespace(features=lambda found: torch.stack(found))
    ctx = AnswerContext("t", [], list, None, None)
    for learned in (router, again):
        assert learned.choose(base, ctx)(list(new)) == expected
    assert {BASE, 0, 1} == set(expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("task-lora", {"rejection": 1.0}, "rejection must be at least 0 and below 1 .got 1.0"),
        ("task-lora", {"rejection": -0.1}, "rejection must be at least 0"),
        ("merge", {"rejection": 2.0, "rule": "condu"}, "below 1"),
    ],
)
def test_a_rejection_that_cannot_be_is_refused(name, options, message):
    with pytest.raises(MethodError, match=message):
        METHODS[name].Options(**options)


def test_features_of_a_question_are_its_own_in_any_batch(tiny_llava, mixed_tasks):
    family = load_model(ModelConfig(str(tiny_llava)))
    data = load_split(load_recipe(str(mixed_tasks[0])), "test")
    longer = dataclasses.replace(
        data[1], question="<image>\nWhat color is it, and which shape is it, at all?"
    )
    predictor = family.predictor(data.recipe, Prepared(family, data))
    together, model = predictor.features([data[0], longer]), family.model
    for row, example in enumerate([data[0], longer]):
        torch.testing.assert_close(together[row], predictor.features([example])[0], atol=1e-5, rtol=1e-4)
    batch = family.inputs(data, Prepared(family, data)).collate([0])
    asked = int((batch["labels"][0] != -100).nonzero()[0])  # The answer's first token.
    with torch.no_grad():
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "image_rows")}
        hidden = model.model(**inputs).last_hidden_state[0, :asked].double()
    image = batch["input_ids"][0, :asked] == family.processor.image_token_id
    means = [hidden[image].mean(dim=0), hidden[~image].mean(dim=0)]
    expected = torch.cat([mean / mean.norm() for mean in means]) / 2**0.5
    torch.testing.assert_close(together[0].double(), expected, atol=1e-5, rtol=1e-4)


def test_a_model_without_features_is_refused_with_the_oracle_as_the_cure():
    ctx = TaskContext(1, "t", {}, None, None, 0, 0, predictor=object)
    with pytest.raises(MethodError, match="no `features`.*routing to 'oracle'"):
        TaskLora(TaskLora.Options()).after_task(ctx)


def test_an_adapter_on_the_base_is_the_sum_of_the_weights_in_float64_and_leaves_nothing_behind():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4).double(), torch.randn(3, 5, dtype=torch.float64)
    A, B = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    before = layer(x)
    with carrying(BaseWeights({"a": layer}, stacked=True), {"a": Delta(A, B, 0.5)}):
        torch.testing.assert_close(layer(x), x @ (layer.weight + 0.5 * B @ A).T + layer.bias)
    assert torch.equal(layer(x), before) and not layer._forward_hooks


class Echo:
    """Answers with what it finds in a list, and remembers the first that it found."""

    def __init__(self, carried):
        self.carried, self.first = carried, None

    def predict(self, examples):
        self.first = self.first or self.carried[-1]
        return [f"{self.first}{self.carried[-1]}{example}" for example in examples]


def test_a_batch_is_answered_in_order_with_what_each_task_s_predictor_caches_for_itself():
    carried = ["-"]

    class Carry:
        def __init__(self, task):
            self.task = task

        def __enter__(self):
            carried.append(self.task)

        def __exit__(self, *error):
            carried.pop()

    predictor = SwitchingPredictor(
        Echo(carried), ["a", "b"], lambda examples: [int(e) for e in examples], Carry
    )
    assert predictor.predict(["1", "-1", "0", "1"]) == ["111", "---1", "000", "111"]
    assert predictor.routed_to == ["b", None, "a", "b"]
    assert predictor.predict([]) == [] == predictor.routed_to and BASE == -1


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_single_model_is_refused_with_the_set_as_the_cure(finished, form):
    with pytest.raises(ConfigError, match="does not merge.*export --as set --each task"):
        export_run(finished, form, base_id="user/name", label="nearest")
    with pytest.raises(ConfigError, match="does not merge.*export --as set --each task"):
        export_set(finished, base_id="user/name", each="stage", label="nearest")


@pytest.mark.slow
def test_its_export_is_the_set_of_the_tasks_adapters(finished, tmp_path):
    exported = export_set(finished, tmp_path / "set", base_id="user/name", each="task", label="nearest")
    assert len(exported.members) == 2
    assert all(member.error == 0.0 and member.reloaded.largest < 1e-4 for member in exported.members)
    card = (tmp_path / "set/README.md").read_text()
    assert "the run's router, which picks one for every example, is not among them" in card
    assert "their sum is the model" not in card and "those of the sums" not in card
    assert "base_model.set_adapter" not in card and exported.picked in exported.describe()


def test_a_set_says_what_picks_the_adapter_where_their_sum_is_not_the_model():
    def picked(name, **options):
        return _picked(SimpleNamespace(method=METHODS[name](METHODS[name].Options(**options))), "task")

    for routing in ("prototypes", "model"):
        assert "the run's router, which picks one" in picked("task-lora", routing=routing)
    assert "given the task of every example" in picked("task-lora", routing="oracle") == picked("individual")
    assert picked("keeplora") == ""


def test_the_record_is_that_of_the_router():
    def of(**options):
        info = TaskLora(TaskLora.Options(**options)).info
        return info.inference_cost, info.extra_parameters, info.kept

    own, all_tasks = "A and B of the chosen task", "A and B of every task"
    assert of() == (
        f"a pass of the base for the router, {own}",
        f"{all_tasks}, and its prototypes",
        "prototypes: a feature per class, or one",
    )
    assert of(routing="oracle") == (own, all_tasks, "nothing")
    asked = f"an answer of the base for the router, {own}"
    assert of(routing="model", router_examples=0) == (asked, all_tasks, "nothing")
    assert of(routing="model") == (
        asked,
        f"{all_tasks} and of the router",
        "examples, and A and B of the router",
    )


def test_an_unknown_router_is_refused():
    with pytest.raises(MethodError, match="one of prototypes, model, oracle.*got 'guess'"):
        TaskLora(TaskLora.Options(routing="guess"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "routing"),
    [("clip", "prototypes"), ("clip", "oracle"), ("llava", "prototypes"), ("llava", "model")],
)
def test_a_killed_and_an_extended_run_end_as_one_in_one_go(
    request, tiny_tasks, mixed_tasks, tmp_path, family, routing
):
    tree = request.getfixturevalue("run_tree" if family == "clip" else "llava_tree")
    tasks = [str(path) for path in (tiny_tasks if family == "clip" else mixed_tasks)[:2]]
    options = {"routing": routing} | ({"router_examples": 0} if routing == "model" else {})
    check_method("task-lora", options, tree(tmp_path / "run", tasks=tasks))


@pytest.mark.parametrize(
    ("answer", "task"),
    [("B", 1), ("The expert is C.", 2), ("A) or B", 0), ("D", BASE), ("", BASE), ("Blue", BASE), ("b", BASE)],
)
def test_the_first_letter_that_stands_alone_names_the_task(answer, task):
    assert read_letter(answer, 3) == task


def test_the_model_is_asked_with_every_task_that_is_learned(mixed_tasks):
    recipes = [load_recipe(str(path)) for path in mixed_tasks]
    data, asked = load_split(recipes[0], "test"), []

    def asking(tokens):
        def predict(examples):
            asked.extend(examples)
            return ["B", "none"]

        return SimpleNamespace(predict=predict)

    ctx = AnswerContext("t", [], list, None, None, recipes[0], recipes[:2], asking)
    router = TaskRouter("model", 0.0)
    assert router.choose(object(), ctx)([data[0], data[1]]) == [1, BASE]
    assert f"\nA: {recipes[0].name}." in asked[0].question and f"\nB: {recipes[1].name}." in asked[0].question
    assert "What color?" in asked[0].question and asked[0].images == data[0].images
    assert router.choose(object(), dataclasses.replace(ctx, recipes=recipes[:1]))([data[0]]) == [0]
    with pytest.raises(MethodError, match="routing is 'model'.*27 tasks by 26 letters.*'prototypes'"):
        router.choose(object(), dataclasses.replace(ctx, recipes=recipes[:1] * 27))([data[0]])


@pytest.mark.parametrize("row", [{"method": "task-lora"}, {"method": "merge", "rule": "condu"}])
def test_more_tasks_than_the_model_has_letters_for_are_refused_before_the_first_is_learned(
    llava_tree, tmp_path, row
):
    tasks = []
    for number in range(27):
        tasks.append(tmp_path / f"t{number}.yaml")
        tasks[-1].write_text(json.dumps({"extends": "digits", "name": f"t{number}"}))
    tree = llava_tree(tmp_path / "run", methods={"row": row | {"routing": "model"}})
    tree["tasks"] = [str(task) for task in tasks]
    with pytest.raises(ConfigError, match="methods.row.routing is 'model'.*27 tasks by 26 letters"):
        parse_config(tree)
    tree["tasks"].pop()
    parse_config(tree)


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"method": "task-lora", "routing": "model"}, "routing 'model'"),
        ({"method": "merge", "rule": "condu", "routing": "model"}, "rule 'condu' and routing 'model'"),
    ],
)
def test_a_row_that_asks_a_model_that_writes_no_text_is_refused_before_anything_runs(
    run_tree, tmp_path, row, settings
):
    config = parse_config(run_tree(tmp_path / "run", methods={"seq-lora": {}, "asked": row}))
    refused = f"'asked' with {settings} runs on the family llava, but .* is a clip.*change these settings"
    with pytest.raises(ConfigError, match=refused):
        check_start(config, open_model(config.model))
    with pytest.raises(ConfigError, match=refused):
        make_plan(config, None)
