"""Replay: what is kept, by id and bytes, and what is trained on again."""

import json
from collections import Counter

import pytest
from safetensors.torch import load_file

from llava_keeplora.config import parse_config
from llava_keeplora.errors import MethodError
from llava_keeplora.export.inspect_state import inspect_state
from llava_keeplora.journal import Journal
from llava_keeplora.methods import METHODS
from llava_keeplora.report.resources import read_needs
from llava_keeplora.run_folder import JOURNAL
from llava_keeplora.saved_run import load_run, run_identity
from llava_keeplora.sequence import mixed_data
from llava_keeplora.steps import Budget
from llava_keeplora_recipes import load_recipe, load_split

Replay = METHODS["replay"]
#: Label → its options; all are trained in one run.
METHODS_RUN = {
    "seq-lora": {},
    "nothing": {"method": "replay", "ratio": 0.0},
    "replay": {"share": 0.2, "ratio": 0.5},
    "general": {"method": "replay", "examples": 2, "general_examples": 5},
}


@pytest.fixture(scope="module")
def seen():
    """(task, its steps' batches) of every training."""
    return []


@pytest.fixture(scope="module")
def config(tmp_path_factory, run_config, tiny_tasks):
    methods = {**METHODS_RUN, "general": METHODS_RUN["general"] | {"general": str(tiny_tasks[2])}}
    folder = tmp_path_factory.mktemp("replay") / "run"
    return run_config(folder, methods=methods, tasks=[str(path) for path in tiny_tasks[:2]])


@pytest.fixture(scope="module")
def finished(config, driven, seen):
    made = mixed_data.MixedData.__init__

    def watched(self, mixture, *args):
        seen.append(mixture)
        made(self, mixture, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed_data.MixedData, "__init__", watched)
        return driven(config)


def kept(folder, label, task):
    (path,) = (folder / label).glob(f"task-{task:02}-*/consolidated.json")
    return json.loads(path.read_text()).get("examples")


def test_the_examples_that_training_saw_are_recorded_by_task_and_are_those_of_the_budget(
    finished, seen, tiny_tasks
):
    sizes = [len(load_split(load_recipe(str(task)), "train")) for task in tiny_tasks[:2]]
    trained = {
        label: [
            e.info["examples"] for e in Journal(finished / label / JOURNAL).entries if e.stage == "TRAINED"
        ]
        for label in METHODS_RUN
    }
    epochs = 1
    own = [epochs * size for size in sizes]
    assert trained["seq-lora"] == trained["nothing"] == [{"1": own[0]}, {"2": own[1]}]
    assert trained["replay"] == [{"1": own[0]}, {"1": round(0.5 * own[1]), "2": own[1]}]
    assert trained["general"] == [{"0": own[0], "1": own[0]}, {"0": own[1], "1": own[1], "2": own[1]}]
    assert sorted(int(mixture.sizes.sum()) for mixture in seen) == sorted(
        sum(counts.values())
        for label in ("replay", "general")
        for counts in trained[label]
        if len(counts) > 1
    )
    budgets = [Budget.of({"num_train_epochs": epochs, "per_device_train_batch_size": 8}, n, 1) for n in sizes]
    for label, options in METHODS_RUN.items():
        named = {"general": "it"} if label == "general" else {}
        values = {key: value for key, value in options.items() if key != "method"} | named
        cls = METHODS["seq-lora" if label == "seq-lora" else "replay"]
        method = cls(cls.Options(**values))
        assert [method.budget(index, budgets).seen for index in (1, 2)] == [
            sum(counts.values()) for counts in trained[label]
        ]


def test_what_is_kept_is_a_share_of_the_task_by_id_with_its_bytes(finished, tiny_tasks):
    for number, task in enumerate(tiny_tasks[:2], start=1):
        data, record = load_split(load_recipe(str(task)), "train"), kept(finished, "replay", number)
        assert len(record["ids"]) == round(0.2 * len(data)) and set(record["ids"]) <= set(data.ids)
        rows = [data.ids.index(name) for name in record["ids"]]
        assert record["bytes"] == data.stored_bytes(rows) > 0
    assert len(kept(finished, "general", 1)["ids"]) == 2 and len(kept(finished, "general", 0)["ids"]) == 5
    assert kept(finished, "replay", 0) is None


def test_the_bytes_of_what_is_kept_count_as_kept(finished):
    with_examples, without = (read_needs(finished / label) for label in ("replay", "seq-lora"))
    states = [load_file(path) for path in sorted((finished / "replay").glob("task-0[12]*/state.safetensors"))]
    assert [len(state["replay"]) for state in states] == [
        len(kept(finished, "replay", n)["ids"]) for n in (1, 2)
    ]
    examples = sum(kept(finished, "replay", n)["bytes"] for n in (1, 2)) / 2
    files = (
        sum(path.stat().st_size for path in (finished / "replay").glob("task-0[12]*/state.safetensors")) / 2
    )
    assert with_examples.kept_bytes == pytest.approx(without.kept_bytes + examples + files)


def test_later_tasks_see_kept_examples_alone_in_the_stated_ratio(finished, seen, tiny_tasks):
    general = [mixture for mixture in seen if 0 in mixture.sources]
    (second,) = [mixture for mixture in seen if 0 not in mixture.sources]
    data = load_split(load_recipe(str(tiny_tasks[0])), "train")
    old = [row for source, row in zip(second.sources.tolist(), second.rows.tolist()) if source == 1]
    own = len(second.sources) - len(old)
    assert len(old) == round(0.5 * own)
    assert {data.ids[row] for row in old} == set(kept(finished, "replay", 1)["ids"])
    assert len(general) == 2, "the first task has no memory, but general data"
    assert set(general[1].sources.tolist()) == {0, 1, 2}
    general = general[0]
    assert general.sources.tolist().count(0) == general.sources.tolist().count(1)
    assert (
        len({row for source, row in zip(general.sources.tolist(), general.rows.tolist()) if not source}) <= 5
    )


def test_of_images_with_several_captions_those_that_are_kept_are_replayed_with_each_caption(
    llava_tree, mixed_tasks, driven, tmp_path, monkeypatch
):
    replayed = Counter()
    made = mixed_data.MixedData.__init__

    def watched(self, mixture, inputs, *args):
        made(self, mixture, inputs, *args)
        for source, example in zip(mixture.sources.tolist(), mixture.rows.tolist()):
            if source == 1:
                replayed[(inputs[1].turns[example].row, example)] += 1

    monkeypatch.setattr(mixed_data.MixedData, "__init__", watched)
    questions, captions, _ = mixed_tasks
    tree = llava_tree(
        tmp_path / "run", tasks=[str(captions), str(questions)], methods={"replay": {"examples": 5}}
    )
    folder = driven(parse_config(tree))
    data = load_split(load_recipe(str(captions)), "train")
    assert {len(data.answers[row]) for row, _ in replayed} == {2}
    assert {data.ids[row] for row, _ in replayed} == set(kept(folder, "replay", 1)["ids"])
    assert len(replayed) == 2 * 5, "five images, each with both captions"


def test_while_nothing_is_added_it_is_sequential_lora_and_always_takes_as_many_steps(finished):
    def steps(label):
        return [
            json.loads(p.read_text())["steps"] for p in sorted((finished / label).glob("task-*/train.json"))
        ]

    def updates(label, task):
        return next((finished / label).glob(f"task-{task:02}-*/delta.safetensors")).read_bytes()

    assert steps("nothing") == steps("seq-lora") == steps("replay")
    assert updates("nothing", 2) == updates("seq-lora", 2) != updates("replay", 2)
    assert updates("replay", 1) == updates("seq-lora", 1)


def test_its_state_is_one_that_an_import_takes(finished):
    config = load_run(finished)
    inspect_state(finished, config, run_identity(config)["tasks"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"share": 0.0}, "share must be above 0"),
        ({"examples": 0}, "examples must be at least 1"),
        ({"ratio": -1.0}, "ratio must not be negative"),
        ({"general_ratio": float("inf")}, "general_ratio must not be negative, and must be finite"),
        ({"general": ""}, "general is empty; name a recipe, or leave it out"),
        ({"general": " "}, "general is empty"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, why):
    with pytest.raises(MethodError, match=why):
        Replay.Options(**options)
