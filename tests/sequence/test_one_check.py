"""`data check --model`, plan, train and predict check a configuration alike, in the same sentences."""

import dataclasses
import re

import pytest

from doors import refused
from llava_keeplora.config import parse_config
from llava_keeplora.errors import UserError
from llava_keeplora.plan import make_plan
from llava_keeplora.sequence import run

RATED = {"parts": {"vision": {"learning_rate": 0.1}}}


def deepspeed(stage=2, **content):
    return {
        "training": {
            "deepspeed": {
                "zero_optimization": {"stage": stage},
                "train_micro_batch_size_per_gpu": "auto",
                **content,
            }
        }
    }


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"training": {"optim": "adamx"}}, "adamx is not a valid OptimizerNames"),
        ({"training": {"adam_beta1": 2.0}}, "refuses its settings .*beta"),
        ({"training": {"lr_scheduler_type": "cosin"}}, "cosin is not a valid SchedulerType"),
        ({"training": {"lr_scheduler_kwargs": {"nope": 1}}}, "schedule 'linear' refuses its settings .*nope"),
        ({"training": {"warmup_steps": -1}}, "warmup_steps = -1"),
        ({"training": {"report_to": "no-such-tracker"}}, "report_to names 'no-such-tracker'"),
        ({"training": {"bf16": True, "fp16": True}}, "fp16 and bf16"),
        (
            {
                "training": {
                    "gradient_checkpointing": True,
                    "gradient_checkpointing_kwargs": {"use_reentrant": True},
                }
            },
            "use_reentrant is true",
        ),
        ({"training": {"optim_args": "nope=1"}}, "does not read training.optim_args.nope"),
        ({"training": {"dataloader_num_workers": -1}}, "torch refuses the data loader of 'keeplora'"),
        (
            {"training": {"dataloader_persistent_workers": True}},
            "torch refuses the data loader of 'keeplora'",
        ),
        (
            {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 64}},
            "'colours' has only 24 examples for batches of 64",
        ),
        ({"training": {"num_train_epochs": [1, 2]}}, "lists 2 values for 1 tasks"),
        (
            deepspeed(train_micro_batch_size_per_gpu=3),
            "train_micro_batch_size_per_gpu=3 against training.per_device_train_batch_size=8",
        ),
        (
            deepspeed(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 77}}),
            "total_num_steps=77 against training.steps of 'colours'=3",
        ),
        (
            deepspeed(optimizer={"type": "AdamW", "params": {"lr": "auto"}}) | RATED,
            "has an optimizer.*parts.vision has its own",
        ),
        (
            deepspeed(3) | {"parts": {"vision": {"energy_weight": "auto"}}},
            "'auto', but ZeRO-3 holds the weights in shards",
        ),
        ({"parts": {"vision": {"rank": 32}}}, "rank is 32, but layer .* has 32 input directions"),
        (
            {"methods": {"keeplora": {"preset": "released-clip"}}, "parts": {"vision": {"targets": ["fc1"]}}},
            "requires square layers.*64 × 32",
        ),
        ({"memory": {"statistics_gb": 1e-9}}, "too little for the feature statistics of 'keeplora'"),
        (
            {"methods": {"keeplora": {}, "inflora": {}}, "memory": {"statistics_gb": 1e-9}},
            "too little for the feature statistics of",
        ),
        (
            {"methods": {"keeplora": {}, "zscl": {"reference": "nowhere"}}},
            "methods.zscl.reference: there is no recipe 'nowhere'",
        ),
        (
            {"methods": {"keeplora": {}, "zscl": {"reference": "shapes", "reference_texts": "/gone.txt"}}},
            "methods.zscl.reference_texts: /gone.txt cannot be read",
        ),
        ({"model": {"max_length": 5}}, "model.max_length is 5, which is of models that write answers"),
        (
            {"evaluation": {"generation": {"num_beams": 2}}},
            "evaluation.generation is .*which is of models that write answers",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_plan_and_train_say_the_same_of_a_wrong_configuration(
    changes, rule, run_tree, tiny_tasks, tmp_path, ends_where_it_begins
):
    def tree(**changes):
        return run_tree(
            tmp_path / "run", **{"tasks": [str(tiny_tasks[0])], "methods": {"keeplora": {}}} | changes
        )

    told = {door.__name__: refused(door, tree(**changes)) for door in (make_plan, run)}
    assert told["make_plan"] == told["run"]
    assert told["run"] is not None and re.search(rule, told["run"])
    assert not (tmp_path / "run/config.json").exists()


def test_a_refused_configuration_leaves_the_folder_to_the_mended_one(
    run_tree, tiny_tasks, tmp_path, ends_where_it_begins
):
    def tree(**changes):
        return run_tree(
            tmp_path / "run", **{"tasks": [str(tiny_tasks[0])], "methods": {"keeplora": {}}} | changes
        )

    assert refused(run, tree(parts={"vision": {"rank": 32}})) is not None
    assert refused(run, tree()) is None and refused(make_plan, tree()) is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"parts": {"language": {"rank": 64}}},
            "parts.language.rank is 64, but layer .* has 32 input directions",
        ),
        (
            {"methods": {"keeplora": {"random_resized_crop": [0.9, 1.0]}}},
            "random_resized_crop is set, which crops what CLIP trains on",
        ),
        (
            {"evaluation": {"test_prompts": "averaged"}},
            "test_prompts is 'averaged', which averages the text features of CLIP",
        ),
        ({"model": {"max_length": 513}}, "model.max_length is 513"),
        ({"training": {"optim": "adamx"}}, "adamx is not a valid OptimizerNames"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_so_they_do_of_a_llava(changes, rule, llava_tree, mixed_tasks, tmp_path, ends_where_it_begins):
    tree = lambda **changes: llava_tree(tmp_path / "run", **{"tasks": [str(mixed_tasks[0])]} | changes)  # noqa: E731
    told = {refused(door, tree(**changes)) for door in (make_plan, run)}
    assert len(told) == 1 and re.search(rule, told.pop()) and not (tmp_path / "run/config.json").exists()


@pytest.mark.slow
def test_what_a_plan_proposes_is_let_in_by_a_start(run_tree, tiny_tasks):
    from llava_keeplora.plan.machine import find_machine
    from llava_keeplora.plan.plan import _changed, _Scenarios

    config = parse_config(run_tree("unset", tasks=[str(tiny_tasks[0])], methods={"keeplora": {}}))
    scenarios = _Scenarios(config, find_machine(2, 24.0))
    proposals = [changes for changes in scenarios._heavy({}) if changes.get("gpus", 2) == 2]
    assert any("training.deepspeed" in changes for changes in proposals)
    for changes in proposals:
        proposed = _Scenarios(_changed(config, changes), find_machine(2, 24.0))
        assert all(proposed.fits({}, "keeplora", stage) for stage in ("load", "gradient", "train"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fsdp", "full_shard"),
        ("push_to_hub", True),
        ("neftune_noise_alpha", 5.0),
        ("use_liger_kernel", True),
        ("train_sampling_strategy", "group_by_length"),
        ("label_smoothing_factor", 0.1),
        ("auto_find_batch_size", True),
        ("eval_on_start", True),
        ("parallelism_config", {"tp_size": 2}),
        ("weight_decay", -1.0),
    ],
)
def test_arguments_that_training_fails_with_or_would_pass_over_are_refused_as_they_are_read(
    key, value, run_tree
):
    with pytest.raises(UserError, match=f"training.{key} (is|must) "):
        parse_config(run_tree("unset", training={key: value}))
    from transformers import TrainingArguments

    default = next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == key)
    assert parse_config(run_tree("unset", training={key: default})).training.get(key) == default


@pytest.mark.slow
def test_an_argument_that_the_optimiser_reads_is_let_in(run_tree, tiny_tasks, ends_where_it_begins):
    for optim, given in (("sgd", "momentum=0.9,nesterov=true"), ("rmsprop", "alpha=0.9")):
        tree = run_tree(
            "unset",
            tasks=[str(tiny_tasks[0])],
            methods={"keeplora": {}},
            training={"optim": optim, "optim_args": given},
        )
        assert refused(make_plan, tree) is None


def test_several_processes_are_refused_by_a_plan_as_by_a_start_where_batches_count_in_their_order(
    run_tree, tiny_tasks
):
    tree = run_tree("unset", tasks=[str(tiny_tasks[0])], methods={"keeplora": {"preset": "released-clip"}})
    assert make_plan(parse_config(tree), 1, 24.0).fits
    with pytest.raises(
        UserError,
        match="'keeplora' averages batches in their order, which 2 processes do not keep; run it in one process",
    ):
        make_plan(parse_config(tree), 2, 24.0)


def test_a_plan_of_methods_that_it_cannot_estimate_refuses_what_a_start_refuses(run_tree, tiny_tasks):
    tree = run_tree("unset", tasks=[str(tiny_tasks[0])], methods={"inflora": {}})
    tree["training"] = {**tree["training"], "lr_scheduler_type": "sideways"}
    with pytest.raises(UserError, match="training arguments of .inflora. .sideways"):
        make_plan(parse_config(tree))
