"""Rows of one run in a plan: they share what is the same for them, and one that a start refuses is named alone."""

import pytest

from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.plan import describe, make_plan
from llava_keeplora.plan.memory_estimate import MemoryEstimate

#: The first five take the same step; the two that are asked or mix take it in several batches, `ewc` has a loss of its own, and `wider` and KeepLoRA
#: have other adapters.
ROWS = {
    "seq-lora": {},
    "mean": {"method": "merge"},
    "given": {"method": "task-lora", "routing": "oracle"},
    "alone": {"method": "individual"},
    "slower": {"method": "seq-lora", "training": {"learning_rate": 1e-5, "num_train_epochs": 2}},
    "mixed": {"method": "replay"},
    "asked": {"method": "task-lora", "routing": "model"},
    "nearest": {"method": "task-lora"},
    "united": {"method": "merge", "rule": "condu"},
    "ewc": {},
    "wider": {"method": "seq-lora", "parts": {"language": {"rank": 8}}},
    "keeplora": {},
    "keeplora++": {},
    "whole": {"method": "keeplora", "gradient": "dense"},
}
#: Measurement → the rows, by their methods, that it is made for; the others share it.
MEASURED = {
    "_step": ["seq-lora", "replay", "ewc", "seq-lora", "keeplora"],
    "_gradient_pass": ["keeplora", "keeplora"],
    "_feature_pass": ["keeplora"],
    "_question_features": ["task-lora", "task-lora"],  # their width first
}


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [None, 1])
def test_rows_share_what_they_have_in_common_and_their_figures_are_those_of_each_alone(
    wide_tree, monkeypatch, gpus
):
    def plan(rows):
        return make_plan(parse_config(wide_tree(methods=rows)), gpus, 80.0 if gpus else None)

    made: dict[str, list[str]] = {name: [] for name in MEASURED}
    for name, names in made.items():
        measure = getattr(MemoryEstimate, name)

        def noted(self, *args, names=names, measure=measure):
            names.append(self.method.info.name)
            return measure(self, *args)

        monkeypatch.setattr(MemoryEstimate, name, noted)
    together = {method.label: method for method in plan(ROWS).methods}
    assert made == MEASURED
    for label, row in ROWS.items():
        assert together[label] == plan({label: row}).methods[0]


def test_a_row_that_runs_in_one_process_is_named_and_the_others_are_planned(run_tree, tmp_path):
    rows = {"seq-lora": {}, "released": {"method": "keeplora", "preset": "released-clip"}}
    plan = make_plan(parse_config(run_tree(tmp_path / "run", methods=rows)), 2, 80.0)
    assert [method.label for method in plan.methods] == ["seq-lora"] and plan.fits
    assert "not planned: 'released' is refused by a start: 'released' averages batches" in describe(plan)
    whole = make_plan(parse_config(run_tree(tmp_path / "run", methods=rows)), 1, 80.0)
    assert [method.label for method in whole.methods] == list(rows) and not whole.left_out
    rows.pop("seq-lora")
    with pytest.raises(ConfigError, match="which 2 processes do not keep; run it in one process"):
        make_plan(parse_config(run_tree(tmp_path / "run", methods=rows)), 2, 80.0)


def test_the_passes_of_a_bound_of_keeplora_are_said_to_read_what_those_of_its_first_task_read(
    run_tree, tmp_path
):
    rows = {"keeplora": {}, "alone": {"method": "individual", "of": "keeplora"}}
    plan = make_plan(parse_config(run_tree(tmp_path / "run", methods=rows)), 1, 80.0)
    both, alone = (line for line in describe(plan).splitlines() if "gradient pass reads at most" in line)
    assert "feature pass" in both and "feature pass" not in alone


def test_a_training_that_follows_tasks_is_said_to_be_left_out(wide_tree, mixed_tasks):
    rows = {"asked": {"method": "task-lora", "routing": "model"}, "given": ROWS["given"]}
    tasks = [str(mixed_tasks[0]), str(mixed_tasks[2])]
    plan = make_plan(parse_config(wide_tree(methods=rows, tasks=tasks)), None)
    notes = {method.label: method.uncounted for method in plan.methods}
    kept = [min(20, size) for size in plan.examples]
    seen = sum(40 * sum(kept[:task]) for task in range(2, len(kept) + 1))
    assert seen and f"on {seen:,} examples in all" in notes["asked"] and notes["given"] == ""
    assert notes["asked"] in describe(plan)


def test_a_row_whose_shares_are_chosen_from_the_weights_is_named_under_zero_3(wide_tree):
    parts = {"language": {"energy_weight": "auto"}}
    rows = {"keeplora": {}, "auto": {"method": "keeplora", "parts": parts}}
    deepspeed = {"zero_optimization": {"stage": 3}}
    tree = wide_tree(methods=rows, training={"deepspeed": deepspeed})
    plan = make_plan(parse_config(tree), 2, 80.0)
    assert [method.label for method in plan.methods] == ["keeplora"]
    assert "parts.language.energy_weight is 'auto', but ZeRO-3" in plan.left_out["auto"]
