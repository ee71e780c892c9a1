"""What the later methods learn is exported like that of the first ones: plain transformers and PEFT give the logits of the base with the
tasks' updates, and the answers that the run gave."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, CLIPModel

from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.export import export_run, export_set, verify
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.export.verify_worker import plain_logits
from llava_keeplora.methods import METHODS
from llava_keeplora_eval.models import load_predictor
from llava_keeplora_recipes import load_split

pytestmark = pytest.mark.usefixtures("quick_reload")

BASE_ID = "you/tiny-base"
#: Those whose updates add up to the model, with what they need to differ from sequential LoRA in a short run.
ADDED = {
    "osf": {},
    "eblora": {},
    "nusa-cl": {},
    "splitlora": {},
    "ewc": {"strength": 1000.0},
    "reglora": {"strength": 1.0},
    "lwf": {},
    "replay": {"share": 0.3},
    "joint": {},
    "self-distillation": {},
}
QUICK = ["osf"]


def is_dense(method):
    return METHODS[method].dense_updates


def marked(method, *values):
    return pytest.param(method, *values, marks=[] if method in QUICK else [pytest.mark.slow])


@pytest.fixture(scope="module")
def later(run_tree, llava_tree, driven, tiny_tasks, mixed_tasks, tmp_path_factory):
    """Function (method) → a finished run of it on two tasks: on CLIP, or on LLaVA where it runs on that alone."""
    done = {}

    def run(method):
        if method not in done:
            on_clip = "clip" in METHODS[method].info.families
            tree, tasks = (run_tree, tiny_tasks) if on_clip else (llava_tree, mixed_tasks)
            parts = {} if on_clip else {"parts": {"connector": None}}
            folder = tmp_path_factory.mktemp(method) / "run"
            changes = {"tasks": [str(task) for task in tasks[:2]], "methods": {method: ADDED.get(method, {})}}
            done[method] = driven(parse_config(tree(folder, **changes, **parts)))
        return done[method]

    return run


@pytest.fixture
def base(tiny_clip, tiny_llava):
    """Function (method) → (folder of the base of its run, the class of transformers that loads it)."""
    return lambda method: (
        (tiny_clip, CLIPModel)
        if "clip" in METHODS[method].info.families
        else (tiny_llava, AutoModelForImageTextToText)
    )


@torch.no_grad()
def with_updates(model, tasks):
    """A model of transformers with tasks' updates added to its weights one by one."""
    for task in tasks:
        for name, delta in task.items():
            for key, change in delta.changes().items():
                parameter = model.get_submodule(name).get_parameter(key)
                parameter.copy_(parameter.double() + change.double())
    return model.eval()


def deltas_of(run, method):
    return [load_deltas(path) for path in sorted((run / method).glob("task-*/delta.safetensors"))]


def batch_of(run, method, task):
    """A task's test examples, and the inputs that they make."""
    learned = load_learned_run(run, method)
    data = load_split(learned.recipes[task], "test").take(range(8))
    return data, verify.probe(learned.load(deltas=[]), data)[0]


def answers_of(run, method, task, recipe):
    (path,) = (run / method).glob(f"task-{task:02}-*/predictions/{recipe.name}.jsonl")
    return {row["id"]: row["text"] for row in map(json.loads, path.read_text().splitlines())}


def assert_same_logits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(
    ("method", "form"),
    [
        marked(method, form)
        for method in ADDED
        for form in (["merged"] if is_dense(method) else ["merged", "adapter"])
    ],
)
def test_plain_libraries_give_the_logits_of_the_base_with_the_updates_and_the_runs_answers(
    method, form, later, base, tmp_path
):
    run, (folder, cls) = later(method), base(method)
    done = export_run(run, form, tmp_path / form, base_id=BASE_ID)
    assert done.tasks == 2 and done.own.same == 1.0
    data, batch = batch_of(run, method, 1)
    plain = plain_logits(cls.from_pretrained(folder, dtype=torch.float32).eval(), batch)
    model = with_updates(cls.from_pretrained(folder, dtype=torch.float32), deltas_of(run, method))
    expected = plain_logits(model, batch)
    if form == "merged":
        loaded = cls.from_pretrained(tmp_path / form, dtype=torch.float32)
    else:
        loaded = PeftModel.from_pretrained(cls.from_pretrained(folder, dtype=torch.float32), tmp_path / form)
    assert_same_logits(plain_logits(loaded.eval(), batch), expected)
    assert (expected - plain).abs().max() > 1e-3, "what was learned is seen in the logits"
    tokens = load_learned_run(run, method).config["evaluation"]["max_new_tokens"]
    on_base = {} if form == "merged" else {"base": str(folder)}
    predictor = load_predictor(str(tmp_path / form), data.recipe, "cpu", tokens, **on_base)
    told = answers_of(run, method, 2, data.recipe)
    assert predictor.predict(list(data)) == [told[key] for key in data.ids]


@pytest.mark.parametrize("method", [marked(method) for method in ADDED if is_dense(method)])
def test_updates_of_whole_weights_are_refused_as_an_adapter_with_the_form_that_holds_them(
    method, later, tmp_path
):
    refused = r"updates of full rank, which no LoRA adapter holds exactly .*; export --as merged\.$"
    with pytest.raises(ConfigError, match=refused):
        export_run(later(method), "adapter", tmp_path / "adapter", base_id=BASE_ID)
    with pytest.raises(ConfigError, match=refused):
        export_set(later(method), tmp_path / "set", base_id=BASE_ID)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("joint", " together"),
        ("individual", ", each alone from the base"),
        ("merge", ", each alone from the base"),
        ("lwf", " one after another"),
    ],
)
def test_a_card_says_how_tasks_were_learned_and_what_the_rows_of_its_scores_are(
    method, order, later, tmp_path
):
    export_run(later(method), "state", tmp_path / "state", base_id=BASE_ID)
    card = (tmp_path / "state/README.md").read_text()
    assert f"taught 2 tasks{order}: " in card
    bound = METHODS[method].bound
    assert ("the row `bound` is what" in card) == bound == ("after one more task" not in card)


@pytest.mark.slow
def test_every_adapter_of_the_set_of_individual_answers_its_own_task_as_the_run_did(later, base, tmp_path):
    run, (folder, cls) = later("individual"), base("individual")
    done = export_set(run, tmp_path / "set", base_id=BASE_ID, each="task")
    updates, names = deltas_of(run, "individual"), [member.name for member in done.members]
    assert len(names) == len(updates) == 2
    model = PeftModel.from_pretrained(
        cls.from_pretrained(folder, dtype=torch.float32),
        tmp_path / "set",
        adapter_name=names[0],
        subfolder=names[0],
    )
    model.load_adapter(tmp_path / "set", names[1], subfolder=names[1])
    for task in (1, 0):
        data, batch = batch_of(run, "individual", task)
        model.set_adapter(names[task])
        alone = with_updates(cls.from_pretrained(folder, dtype=torch.float32), updates[task : task + 1])
        both = with_updates(cls.from_pretrained(folder, dtype=torch.float32), updates)
        expected = plain_logits(alone, batch)
        assert_same_logits(plain_logits(model.eval(), batch), expected)
        assert (plain_logits(both, batch) - expected).abs().max() > 1e-2, "the tasks' updates are apart"
        told = answers_of(run, "individual", task + 1, data.recipe)
        predictor = load_predictor(
            str(tmp_path / "set" / names[task]), data.recipe, "cpu", 4, base=str(folder)
        )
        assert predictor.predict(list(data)) == [told[key] for key in data.ids]
