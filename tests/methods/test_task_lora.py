"""The identities of task LoRAs: what is routed to a task is answered by its own adapter on the base."""

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import BaseWeights, Delta
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.export.adapter_set import export_set
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.export.run_export import export_run
from llava_keeplora.methods import METHODS
from llava_keeplora.methods.switching import BASE, SwitchingPredictor, carrying
from llava_keeplora.models import Prepared
from llava_keeplora_eval.predictions import read_predictions
from llava_keeplora_recipes import load_split

TaskLora = METHODS["task-lora"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven, tiny_tasks):
    folder, methods = tmp_path_factory.mktemp("task-lora") / "run", {"oracle": {"method": "task-lora"}}
    methods["oracle"]["routing"] = "oracle"
    return driven(run_config(folder, methods=methods, tasks=[str(path) for path in tiny_tasks[:2]]))


def answers(finished, label, after, recipe, data):
    (folder,) = (finished / label).glob(f"task-{after:02}-*")
    found = read_predictions(folder / f"predictions/{recipe.name}.jsonl", data)
    return [found[key] for key in data.ids]


def test_the_oracle_answers_each_task_with_its_own_adapter_and_a_new_one_with_the_base(finished):
    learned = load_learned_run(finished, "oracle")
    for task, recipe in enumerate(learned.recipes):
        data = load_split(recipe, "test")
        for after in (1, 2):
            family = learned.load(deltas=[learned.deltas[task]] if task < after else [])
            expected = family.predictor(recipe, Prepared(family, data)).predict(list(data))
            assert answers(finished, "oracle", after, recipe, data) == expected


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

    predictor = SwitchingPredictor(Echo(carried), lambda examples: [int(e) for e in examples], Carry)
    assert predictor.predict(["1", "-1", "0", "1"]) == ["111", "---1", "000", "111"]
    assert predictor.predict([]) == [] and BASE == -1


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_single_model_is_refused_with_the_set_as_the_cure(finished, form):
    with pytest.raises(ConfigError, match="does not merge.*export --as set --each task"):
        export_run(finished, form, base_id="user/name")
    with pytest.raises(ConfigError, match="does not merge.*export --as set --each task"):
        export_set(finished, base_id="user/name", each="stage")


@pytest.mark.slow
def test_its_export_is_the_set_of_the_tasks_adapters(finished, tmp_path):
    exported = export_set(finished, tmp_path / "set", base_id="user/name", each="task")
    assert len(exported.members) == 2
    assert all(member.error == 0.0 and member.reloaded.largest < 1e-4 for member in exported.members)


def test_an_unknown_router_is_refused():
    with pytest.raises(MethodError, match="one of oracle.*got 'guess'"):
        TaskLora(TaskLora.Options(routing="guess"))
