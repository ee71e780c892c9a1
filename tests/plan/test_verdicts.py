"""What does not fit is said with the smallest change that makes it fit, by the plan and at a run's start."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import yaml

from llava_keeplora import cli
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.models import Work, open_model
from llava_keeplora.plan import changes_text, check_start, make_plan, refusal, workload
from llava_keeplora.plan.machine import CONTEXT, _least, changed_layers
from llava_keeplora.sequence import runner
from llava_keeplora_recipes import load_recipe

pytestmark = pytest.mark.usefixtures("estimated_once")


def at(tree, room, gpus=1):
    """The plan for GPUs that have so many bytes to themselves."""
    return make_plan(parse_config(tree), gpus, (room + CONTEXT) / 1e9)


def stage_of(plan, name):
    return next(stage for stage in plan.methods[0].stages if stage.stage == name)


@pytest.fixture
def on_train(wide_tree, peaks):
    """A run of sequential LoRA on the language model, and what its training and its loading take."""
    tree = wide_tree(
        methods={"seq-lora": {}},
        parts={"language": {"rank": 4, "alpha": 4}, "vision": None, "connector": None},
    )
    return tree, peaks(tree)


def test_what_fits_is_said_to_fit_and_one_byte_less_is_not_enough(on_train):
    tree, found = on_train
    most = max(found.values())
    assert at(tree, most + 1000).fits and not at(tree, most - 1000).fits


def test_a_stage_takes_the_same_whichever_is_asked_for_first(wide_tree, peaks, remembered):
    # Loading counts the model's bytes, training attaches adapters to it.
    tree = wide_tree(methods={"seq-lora": {}})
    first = peaks(tree)
    load = first["load"]
    remembered.clear()
    second = peaks(tree)
    assert second.estimate is not first.estimate and second["train"] and second["load"] == load


@pytest.mark.slow
def test_training_that_is_too_large_fits_with_the_largest_smaller_batch(on_train, peaks):
    tree, found = on_train
    half = peaks({**tree, "training": {**tree["training"], "per_device_train_batch_size": 4}})["train"]
    plan = at(tree, (found["train"] + half) / 2)
    assert (
        changes_text(stage_of(plan, "train").changes)
        == "training.per_device_train_batch_size=4 training.gradient_accumulation_steps=2"
    )
    assert at(
        {
            **tree,
            "training": {
                **tree["training"],
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
            },
        },
        (found["train"] + half) / 2,
    ).fits


@pytest.mark.slow
def test_where_no_batch_is_small_enough_activations_are_recomputed(on_train, peaks):
    tree, _ = on_train
    tree = {
        **tree,
        "training": {**tree["training"], "per_device_train_batch_size": 1},
        "evaluation": {"batch_size": 1, "max_new_tokens": 2},
    }
    less = peaks({**tree, "training": {**tree["training"], "gradient_checkpointing": True}})
    assert changes_text(at(tree, max(less.values()) + 1000).changes) == "training.gradient_checkpointing=true"


@pytest.mark.slow
def test_answers_that_are_too_many_at_once_are_asked_for_in_smaller_batches(on_train, peaks):
    tree, _ = on_train
    tree = {
        **tree,
        "training": {**tree["training"], "per_device_train_batch_size": 1},
        "evaluation": {"batch_size": 8, "max_new_tokens": 100},
    }
    found = peaks(tree)
    assert found["evaluate"] > max(found["train"], found["load"])
    assert changes_text(at(tree, found["evaluate"] - 1000).changes) == "evaluation.batch_size=4"


@pytest.mark.parametrize(
    "change",
    [
        {"model.dtype": "bfloat16"},
        # A start that names the quantised base is among the quick tests below.
        pytest.param({"model.dtype": "bfloat16", "model.quantization": "nf4"}, marks=pytest.mark.slow),
    ],
    ids=lambda change: "-".join(change.values()),
)
def test_a_model_that_is_too_large_fits_in_half_precision_or_quantised(on_train, peaks, change):
    tree, _ = on_train
    # No smaller batch is there to be tried.
    tree = {
        **tree,
        "training": {**tree["training"], "per_device_train_batch_size": 1, "gradient_checkpointing": True},
        "evaluation": {"batch_size": 1, "max_new_tokens": 2},
    }
    model = {key.partition(".")[2]: value for key, value in change.items()}
    enough = peaks({**tree, "model": {**tree["model"], **model}})["load"] + 1000
    assert stage_of(at(tree, enough), "load").changes == change


def test_where_nothing_fits_the_plan_says_so(on_train):
    what, cure = refusal(at(on_train[0], 1000))
    assert "most of all 'train' of seq-lora with" in what and "do not fit 1 GPU of 0.6 GB" in what
    assert cure == "none of the settings tried makes it fit: take a smaller model or more memory"


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_seven_billion_parameters_fit_24_gb(seven_b_tree, quantization):
    plan = make_plan(parse_config(seven_b_tree(4, quantization, gradient_checkpointing=True)), 1, 24.0)
    assert plan.fits and plan.changes == {}


@pytest.mark.slow
def test_seven_billion_parameters_that_keep_their_activations_fit_with_half_the_examples_at_once(
    seven_b_tree,
):
    plan = make_plan(parse_config(seven_b_tree(4, None)), 1, 24.0)
    assert {stage.stage for stage in plan.methods[0].stages if not stage.fits} == {"gradient", "train"}
    # 15 GB without activations and 3.9 GB for each example: smaller batches come before recomputing.
    assert plan.changes == {
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 32,
    }


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def tiny_file(run_tree, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree("unset"), sort_keys=False))
    return str(path)


@pytest.fixture
def smaller_file(run_tree, tmp_path):
    """Configuration of a run that is rehearsed sooner."""
    path = tmp_path / "smaller.yaml"
    path.write_text(yaml.safe_dump(run_tree("unset", methods={"seq-lora": {}})))
    return str(path)


def test_the_command_says_stage_by_stage_what_a_run_takes(tiny_file, capfd):
    assert cli.main(["plan", "--config", tiny_file]) == 0
    out = capfd.readouterr().out
    assert out.startswith("planned for the CPU with ")
    rows = [line.split() for line in out.splitlines()]
    assert [row[1] for row in rows if row[:1] == ["keeplora"] and row[-1] == "fits"] == [
        "load",
        "basis",
        "gradient",
        "train",
        "features",
        "evaluate",
        "export",
    ]
    assert ["task", "examples", "steps", "of", "seq-lora,", "keeplora"] in rows and [
        "colours",
        "24",
        "3",
    ] in rows


def test_the_command_writes_json_and_takes_overrides(smaller_file, capfd):
    assert (
        cli.main(
            [
                "plan",
                "--config",
                smaller_file,
                "--json",
                "--gpus",
                "2",
                "--gpu-memory",
                "24",
                "training.per_device_train_batch_size=4",
            ]
        )
        == 0
    )
    plan = json.loads(capfd.readouterr().out)
    assert plan["fits"] and plan["machine"] == {"gpus": 2, "memory": 24_000_000_000}
    assert plan["methods"][0]["steps"] == [3, 3, 3] and plan["examples"] == [24, 24, 24]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--gpus", "1"],
            "how much memory a GPU has is not known, because this machine has none; give it in GB, for instance --gpu-memory 24.",
        ),
        (
            ["--gpus", "0", "--gpu-memory", "24"],
            "--gpus is 0, but a plan for GPUs needs at least one; leave it out to plan for the CPU.",
        ),
        (
            ["--gpu-memory", "-1"],
            "--gpu-memory is -1.0, but a GPU has memory; give it in GB, for instance --gpu-memory 24.",
        ),
        (
            ["--data-root", "/nowhere", "model.quantization=nf3"],
            "model.quantization must be 'nf4' or 'int8' (got 'nf3'); set it to 'nf4' or 'int8', or leave it out.",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_ends_with_code_2_and_one_sentence(
    tiny_file, capfd, monkeypatch, arguments, sentence
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["plan", "--config", tiny_file, *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and [line for line in err.splitlines() if line.startswith("error")] == [
        f"error: {sentence}"
    ]


def test_a_run_that_does_not_fit_ends_with_code_2_after_its_table(smaller_file, capfd):
    assert cli.main(["plan", "--config", smaller_file, "--gpus", "1", "--gpu-memory", "0.6"]) == 2
    out, err = capfd.readouterr()
    assert "does not fit" in out and "stages do not fit 1 GPU of 0.6 GB, most of all" in err


def test_a_change_that_a_row_refuses_is_not_proposed(monkeypatch):
    from llava_keeplora.plan.plan import _Scenarios

    def quantised(self, changes):
        raise MethodError("OSF trains parts of the weights themselves", "leave the base unquantised")

    monkeypatch.setattr(_Scenarios, "at", quantised)
    scenarios = _Scenarios.__new__(_Scenarios)
    assert not scenarios.fits({"model.quantization": "nf4"}, "seq-lora", "train")
    with pytest.raises(MethodError, match="unquantised"):
        scenarios.fits({}, "seq-lora", "train")


def test_the_size_of_absent_data_is_assumed_and_the_plan_says_so(run_tree, tiny_tasks, tmp_path, capfd):
    facts = yaml.safe_load(tiny_tasks[0].read_text()) | {"source": {"format": "imagefolder", "path": "gone"}}
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(facts))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree("unset", tasks=[str(tmp_path / "gone.yaml")])))
    assert cli.main(["plan", "--config", str(tmp_path / "run.yaml")]) == 0
    out = capfd.readouterr().out
    assert (
        "is assumed, 100,000 to learn and 10,000 to answer" in out
        and "(--data-root counts them): colours\n" in out
    )
    assert [line.split()[:3] for line in out.splitlines()][-1] == ["colours", "100,000", "(assumed)"]


def test_what_a_guard_holds_out_of_absent_data_is_not_planned_as_trained_on(run_tree, tiny_tasks):
    recipe = dataclasses.replace(load_recipe(str(tiny_tasks[0])), expected_sizes={"train": 500, "test": 60})
    family = SimpleNamespace(workload=lambda recipe, train, test: Work("colours", *[0] * 7))
    guard = {"new_task": {"min_gain": 1.0}, "on_failure": "shrink", "held_out": 0.2}
    work = workload._read(recipe, None, config := parse_config(run_tree("unset", guard=guard)), family, 0.2)
    assert config.held_out == 0.2 and (work.train, work.test, work.images) == (400, 60, 460)


def test_a_plan_for_nothing_or_for_endless_memory_is_refused(run_tree):
    with pytest.raises(
        ConfigError, match="no method of the run learns anything, so there is nothing to plan"
    ):
        make_plan(parse_config(run_tree("unset", methods={"zero-shot": {}})), 1, 24)
    with pytest.raises(ConfigError, match="--gpu-memory is inf"):
        make_plan(parse_config(run_tree("unset")), 1, float("inf"))
    with pytest.raises(ConfigError, match="statistics_gb is inf"):
        parse_config(run_tree("unset", memory={"statistics_gb": float("inf")}))


# --- the start of a run ------------------------------------------------------------------------------


def start(tree, memory=None, processes=1):
    config = parse_config(tree)
    check_start(config, open_model(config.model), memory, processes)


def least(tree):
    """Bytes that a start wants to see."""
    config = parse_config(tree)
    family = open_model(config.model)
    return sum(_least(config, family, changed_layers(config, family), False).values())


def test_a_start_on_this_machine_goes_on(wide_tree):
    start(wide_tree())


def test_a_model_that_no_setting_brings_into_memory_is_refused_at_the_start(wide_tree):
    with pytest.raises(
        ConfigError,
        match=r"the run needs at least 0\.\d GB \(the model .*statistics of a pass.*take a smaller model or more memory; `llava-keeplora plan`",
    ):
        start(wide_tree(memory={"statistics_gb": 0.005}), 10_000_000)


@pytest.mark.parametrize(
    ("share", "setting"), [(1.4, "model.dtype=bfloat16"), (0.7, "model.quantization=nf4")]
)
def test_a_start_that_cannot_fit_names_the_setting_that_does(wide_tree, peaks, share, setting):
    # What loading takes on a GPU is little more than the model; without one, copies of the base's weights lie beside it.
    tree = wide_tree(
        memory={"statistics_gb": 0.001},
        parts={"language": {"rank": 1, "alpha": 1}, "vision": None},
        methods={"seq-lora": {}},
    )
    with pytest.raises(ConfigError, match=f"; set {setting}; `llava-keeplora plan` says"):
        start(tree, round(share * peaks(tree)["load"]))


@pytest.mark.slow
def test_a_whole_gradient_that_cannot_fit_is_proposed_to_be_sketched_at_the_start_and_by_the_plan(
    wide_tree, peaks
):
    dense, sketched = (
        wide_tree(memory={"statistics_gb": 0.03}, methods={"keeplora": {"gradient": form}})
        for form in ("dense", "sketch")
    )
    enough = least(sketched)
    with pytest.raises(
        ConfigError, match="; set methods.keeplora.gradient=sketch; `llava-keeplora plan` says"
    ):
        start(dense, enough)
    start(sketched, enough)

    room = (peaks(sketched)["gradient"] + peaks(dense)["gradient"]) / 2
    plan = make_plan(parse_config(dense), 1, (room + CONTEXT) / 1e9)
    gradient = next(stage for stage in plan.methods[0].stages if stage.stage == "gradient")
    assert not gradient.fits and gradient.changes == {"methods.keeplora.gradient": "sketch"}


@pytest.mark.slow
def test_a_plan_names_the_statistics_that_the_smallest_sketches_take_as_a_start_does(wide_tree):
    with pytest.raises(
        ConfigError,
        match="memory.statistics_gb is 1e-05, which is too little for the feature statistics of 'keeplora'; set memory.statistics_gb=",
    ) as caught:
        make_plan(parse_config(wide_tree(memory={"statistics_gb": 1e-5})))
    enough = float(str(caught.value).split("statistics_gb=")[1].split(",")[0])
    assert make_plan(parse_config(wide_tree(memory={"statistics_gb": enough}))).fits


def test_a_start_refuses_statistics_beyond_the_memory_there_is(wide_tree):
    with pytest.raises(
        ConfigError,
        match=r"memory.statistics_gb is 4.0, but the machine has 2.0 GB; set memory.statistics_gb=0.5, or less",
    ):
        start(wide_tree(), 2_000_000_000)


def test_processes_on_one_machine_share_its_memory(wide_tree):
    tree = wide_tree(memory={"statistics_gb": 0.01})
    enough = least(tree)
    start(tree, 2 * enough, processes=2)
    with pytest.raises(
        ConfigError,
        match=r"the machine has \d\.\d GB, \d\.\d for each of its 3 processes; (set|take fewer processes, )",
    ):
        start(tree, 2 * enough, processes=3)


def test_a_start_counts_the_pass_with_the_larger_statistics(wide_tree):
    # Of rank 1 a gradient's sketch is thinner than the smallest of features, of rank 32 wider.
    def tree(rank, **options):
        part = {"rank": rank, "alpha": rank, "energy_weight": 0.5, "energy_feature": 0.9}
        return wide_tree(
            memory={"statistics_gb": 1.0},
            parts={"language": part},
            methods={"keeplora": {"gradient": "sketch", **options}},
        )

    assert least(tree(1)) > least(tree(1, protect_features=False))
    assert least(tree(32)) == least(tree(32, protect_features=False))


def test_a_run_is_refused_before_its_weights_are_loaded(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_keeplora.plan.machine.host_memory", lambda: 10_000)
    monkeypatch.setattr(
        "llava_keeplora.models.clip.ClipFamily.load", lambda *args: pytest.fail("weights were loaded")
    )
    with pytest.raises(ConfigError, match="the machine has 0.0 GB"):
        runner.run(run_config(tmp_path / "run"))


def test_the_check_at_a_start_takes_well_under_a_second_of_work(seven_b_tree):
    import time

    config = parse_config(seven_b_tree(1))
    family = open_model(config.model)
    begun = time.process_time()
    check_start(config, family, 10**12)
    assert time.process_time() - begun < 1
