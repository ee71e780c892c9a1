"""A start that is refused leaves the folder as it was, so that the mended command goes on in it."""

import pytest

from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.run_folder import extended, load_run
from llava_keeplora.sequence import run


@pytest.fixture(scope="module")
def finished(run_config, tiny_tasks, tmp_path_factory):
    """A run of one task."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(run_config(folder, methods={"seq-lora": {}}, tasks=[str(tiny_tasks[0])]))
    return folder


def test_a_wrong_training_argument_can_be_mended_in_the_same_folder(run_tree, tiny_tasks, tmp_path):
    tree = run_tree(tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(tiny_tasks[0])])
    with pytest.raises(ConfigError, match="transformers refuses the training arguments of 'seq-lora'"):
        run(parse_config({**tree, "training": {**tree["training"], "lr_scheduler_type": "cosin"}}))
    assert not (tmp_path / "run/config.json").exists()
    assert run(parse_config(tree))["seq-lora"].complete


@pytest.mark.parametrize(
    ("own", "told"),
    [({"num_train_epochs": 0.0}, "a task is trained for more than nothing"), ({"learning_rate": -1.0}, "learning_rate is .*-1.0., but a rate is a number from 0 on")],
)
def test_a_wrong_extension_leaves_the_run_as_it_was(own, told, finished, tiny_tasks):
    before = {path: path.read_bytes() for path in finished.glob("*.json")}
    with pytest.raises(ConfigError, match=told):
        run(extended(finished, str(tiny_tasks[1]), own))
    assert {path: path.read_bytes() for path in finished.glob("*.json")} == before
    assert load_run(finished).tasks == (str(tiny_tasks[0]),)


def test_an_extension_that_is_there_is_not_changed_without_a_word(finished, tiny_tasks):
    rate = load_run(finished).trainings("seq-lora")[-1]["learning_rate"]
    assert extended(finished, str(tiny_tasks[0]), {"learning_rate": rate}).tasks == load_run(finished).tasks
    with pytest.raises(RunError, match=f"as its last task already, with training.learning_rate {rate} instead of 0.5; leave --learning-rate out to go on"):
        extended(finished, str(tiny_tasks[0]), {"learning_rate": 0.5})


@pytest.mark.parametrize(
    ("key", "value"),
    [("per_device_train_batch_size", 0), ("gradient_accumulation_steps", -1), ("learning_rate", float("nan")), ("learning_rate", [1e-3, -1e-3])],
)
def test_training_on_nothing_or_at_no_rate_is_refused(key, value, run_tree):
    tree = run_tree("unset", methods={"seq-lora": {}})
    with pytest.raises(ConfigError, match=f"training.{key} is "):
        parse_config({**tree, "training": {**tree["training"], key: value}}).trainings("seq-lora")


def test_references_that_no_answer_can_meet_are_said_before_a_run_and_refused_if_it_is_all(monkeypatch, caplog):
    from types import SimpleNamespace

    from llava_keeplora.sequence import data as sequence_data
    from llava_keeplora_eval import EvalError

    def start(answers):
        recipe = SimpleNamespace(name="options", metric="option_letter", kind="vqa")
        split = SimpleNamespace(recipe=recipe, split="test", answers=answers, ids=list("abc")[: len(answers)])
        split = type("Split", (SimpleNamespace,), {"__len__": lambda self: len(self.ids)})(**vars(split))
        monkeypatch.setattr(sequence_data, "load_recipes", lambda tasks: [recipe])
        data = SimpleNamespace(splits=lambda recipe: (split, split))
        return sequence_data.load_tasks(SimpleNamespace(tasks=["options"], data=data))

    assert start([["A"], ["(B)"]]) and not caplog.text
    assert start([["A"], ["2"]]) and "1 of 2 examples of options (test), 50.0 %, get 0" in caplog.text
    with pytest.raises(EvalError, match="2 of 2 examples.*option_letter"):
        start([["1"], ["2"]])
