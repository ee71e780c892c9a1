"""The bounds: every task alone, and all tasks at once."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava_keeplora.adapters import load_deltas
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import ConfigError, MethodError, RunError, UserError
from llava_keeplora.export.inspect_state import inspect_state
from llava_keeplora.export.predict import load_run_predictor
from llava_keeplora.export.run_export import export_run
from llava_keeplora.methods import METHODS, Layer
from llava_keeplora.methods.base import TaskContext
from llava_keeplora.methods.individual import first_task
from llava_keeplora.methods.mixture import mix_tasks
from llava_keeplora.models import Prepared, load_model
from llava_keeplora.report.resources import read_needs
from llava_keeplora.report.run_report import read_trial, write_run_report
from llava_keeplora.report.tables import summary_rows
from llava_keeplora.run_folder import MATRIX, Stage
from llava_keeplora.saved_run import load_run, run_identity
from llava_keeplora.sequence.data import stage_seed
from llava_keeplora.sequence.fork import fork
from llava_keeplora.start import load_tasks
from llava_keeplora.steps import Budget
from llava_keeplora.testing import check_method
from llava_keeplora_eval import Matrix
from llava_keeplora_recipes import load_recipe

#: Label → its options; all are trained in one run.
METHODS_RUN = {
    "seq-lora": {},
    "mean": {"method": "merge"},
    "individual": {},
    "joint": {},
    "keeplora": {"gradient": "dense"},
    "protected": {"method": "individual", "of": "keeplora", "settings": {"gradient": "dense"}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven, tiny_tasks):
    tasks = [str(path) for path in tiny_tasks[:2]]
    folder = tmp_path_factory.mktemp("bounds") / "run"
    return driven(run_config(folder, methods=METHODS_RUN, tasks=tasks, training={"logging_steps": 1}))


@pytest.mark.parametrize(
    ("setting", "cure"),
    [("rank", "set rank under the row's `parts`"), ("strength", "leave it out, as there are none")],
)
def test_a_setting_that_the_learning_method_does_not_have_is_refused_with_where_it_belongs(setting, cure):
    with pytest.raises(MethodError) as error:
        METHODS["individual"].Options(settings={setting: 3})
    assert f"settings has '{setting}', which 'seq-lora' does not have" in str(error.value)
    assert cure in str(error.value)


def matrix(folder, label):
    return Matrix.from_json(folder / label / "matrix.json")


def files(folder, label, pattern):
    return [path.read_bytes() for path in sorted((folder / label).glob(pattern))]


def test_individual_trains_each_task_from_the_base_and_scores_it_alone(finished):
    updates = files(finished, "individual", "task-*/delta.safetensors")
    assert updates == files(finished, "mean", "task-*/delta.safetensors")
    assert updates[0] == files(finished, "seq-lora", "task-01-*/delta.safetensors")[0]
    assert updates[1] != files(finished, "seq-lora", "task-02-*/delta.safetensors")[0]
    answers = sorted((finished / "individual").glob("task-0[12]*/predictions/*"))
    assert [path.parts[-3].partition("-")[2] for path in answers] == [
        f"0{i}-{answers[i - 1].stem}" for i in (1, 2)
    ]


def test_individual_of_another_method_learns_every_task_as_that_ones_first(finished):
    for pattern in (
        "task-00*/state.safetensors",
        "task-01-*/adapters.safetensors",
        "task-01-*/delta.safetensors",
    ):
        assert files(finished, "protected", pattern) == files(finished, "keeplora", pattern) != []
    first, second = (
        files(finished, label, "task-02-*/delta.safetensors") for label in ("protected", "keeplora")
    )
    assert first != second and not files(finished, "protected", "task-0[12]-*/state.safetensors")
    bases = load_file(next((finished / "protected").glob("task-00*/state.safetensors")))
    starts = load_file(next((finished / "protected").glob("task-02-*/adapters.safetensors")))
    for name, basis in bases.items():
        assert float((starts[f"{name}.A"] @ basis).abs().max()) < 1e-5, "the base alone is protected"
    config = load_run(finished)
    inspect_state(finished, config, run_identity(config)["tasks"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"of": "kepler"}, "of is 'kepler', which is no built-in method"),
        ({"of": "os:system"}, "of is 'os:system', which is no built-in method"),
        ({"of": "individual"}, "of is 'individual', whose tasks are not updates of adapters alone"),
        ({"of": "replay"}, "of is 'replay', whose tasks are not"),
        ({"of": "osf"}, "of is 'osf', whose tasks are not"),
        ({"of": "zscl"}, "of is 'zscl', whose tasks are not"),
        (
            {"of": "keeplora", "settings": {"gradients": "dense"}},
            "'gradients', which 'keeplora' does not have",
        ),
        ({"of": "lwf", "settings": {"temperature": 0.0}}, "temperature must be above 0"),
        (
            {"of": "lwf", "settings": {"temperature": True}},
            "settings.temperature is True, but it takes float",
        ),
        ({"of": "lwf", "settings": {"strength": None}}, "settings.strength is None, but it takes float"),
        ({"of": "keeplora", "settings": {"init": 3}}, "settings.init is 3, but it takes str"),
    ],
)
def test_a_method_of_which_no_task_stands_alone_and_settings_it_does_not_take_are_refused(options, why):
    with pytest.raises(UserError, match=why):
        METHODS["individual"].Options(**options)


@pytest.mark.parametrize("off", [False, "no", "off"])
def test_settings_are_read_as_the_options_of_a_row_are(off):
    cls = METHODS["individual"]
    row = cls(cls.Options(of="keeplora", settings={"protect_weights": off, "interpolation": "0.5"}))
    assert row.inner.options.protect_weights is False and row.inner.interpolation == 0.5
    assert not row.subspace_plan().protects_weights


def test_a_plan_proposes_no_setting_that_the_row_does_not_have():
    cls = METHODS["individual"]
    options = METHODS_RUN["protected"]
    row = cls(cls.Options(of=options["of"], settings=options["settings"]))
    assert row.inner.subspace_plan().may_sketch and not row.subspace_plan().may_sketch


@pytest.mark.slow
@pytest.mark.parametrize("of", ["keeplora", "splitlora", "nusa-cl", "o-lora"])
def test_individual_of_another_method_keeps_the_contract(run_tree, tiny_tasks, tmp_path, of):
    check_method("individual", {"of": of}, run_tree(tmp_path / "run", tasks=[str(t) for t in tiny_tasks[:2]]))


def test_a_task_alone_sees_nothing_of_earlier_ones(run_config, driven, tiny_tasks, tmp_path):
    rows = {
        "penalised": {"of": "o-lora", "settings": {"lambda1": 50.0}},
        "without": {"of": "o-lora", "settings": {"lambda1": 0.0}},
        "sums": {"of": "sd-lora"},
    }
    methods = {label: {"method": "individual", **row} for label, row in rows.items()}
    run = driven(run_config(tmp_path / "run", methods=methods, tasks=[str(t) for t in tiny_tasks[:2]]))
    penalised, free = (files(run, label, "task-*/delta.safetensors") for label in list(rows)[:2])
    assert penalised == free and len(free) == 2
    first, second = (load_deltas(path) for path in sorted((run / "sums").glob("task-*/delta.safetensors")))
    assert {name: delta.A.shape for name, delta in first.items()} == {
        name: delta.A.shape for name, delta in second.items()
    }


@pytest.mark.parametrize("of", ["ewc", "keeplora", "reglora"])
def test_what_a_method_does_and_keeps_after_a_task_is_no_cost_of_the_row(of):
    layer = Layer("l", "vision", torch.nn.Linear(64, 64), 8, 8.0, 0.5, 0.9)
    row, inner = METHODS["individual"](METHODS["individual"].Options(of=of)), METHODS[of]
    assert not row.planned_state({"l": layer}, 3) and not row.holds(
        TaskContext(2, "t", {}, None, None, 0, 0), []
    )
    assert row.stage_cost.get(Stage.CONSOLIDATED, 0.0) == 0.0
    assert row.stage_cost.get(Stage.PREPARED) == inner.stage_cost.get(Stage.PREPARED)


def test_a_task_alone_has_its_own_budget_as_the_first():
    seen = [Budget.of({"num_train_epochs": 1, "per_device_train_batch_size": 8}, n, 1) for n in (24, 64)]
    ctx = TaskContext(2, "second", {}, int, dict, 0, 0, budgets=seen, deltas=lambda: [{}])
    alone = first_task(ctx)
    assert (alone.index, list(alone.budgets), alone.deltas()) == (1, seen[1:], [])


def test_individual_has_one_row_whose_mean_is_last_and_no_other_aggregate(finished):
    row, first = matrix(finished, "individual"), matrix(finished, "seq-lora").rows[0][0]
    assert row.bound and row.rows[0] == [None, None] and row.rows[1][0] == first
    metrics = row.metrics()
    assert metrics["last"] == sum(row.rows[1]) / 2
    assert all(metrics[name] is None for name in ("transfer", "average", "forgetting", "bwt"))
    assert not matrix(finished, "seq-lora").bound


def test_the_doctor_finds_nothing_in_a_run_with_bounds_and_a_score_of_theirs_that_was_changed(
    finished, tmp_path
):
    run = shutil.copytree(finished, tmp_path / "run")
    assert not [found for found in examine_run(run) if isinstance(found, Exception)]
    path = run / "individual" / MATRIX
    changed = matrix(run, "individual")
    changed.rows[1][0] = 99.5
    changed.to_json(path)
    (problem,) = [found for found in examine_run(run) if isinstance(found, Exception)]
    assert str(path) in str(problem) and "another score" in str(problem)


def test_of_one_task_a_bound_has_its_last_score_alone_as_of_several(finished, tmp_path):
    fork(finished, 1, tmp_path / "fork")
    alone, method = matrix(tmp_path / "fork", "individual"), matrix(tmp_path / "fork", "seq-lora")
    score = matrix(finished, "individual").rows[1][0]
    assert alone.bound and {k: v for k, v in alone.metrics().items() if v is not None} == {
        **{"last": score, "mfn": score},
        **{"zero_shot_average": alone.zero_shot[0]},
    }
    assert alone.per_task() == {"transfer": [None], "average": [None], "last": [score]}
    assert not method.bound and method.metrics()["average"] == method.rows[0][0]
    row = summary_rows({"individual": [alone], "seq-lora": [method]}, 1)[1]
    assert row == ["individual", "n/a", "n/a", f"{score:.1f}", "n/a", "n/a"]
    assert not matrix(tmp_path / "fork", "joint").started


def test_a_fork_of_some_tasks_has_individuals_scores_in_its_last_row_and_learns_joint_again(
    run_config, driven, tiny_tasks, tmp_path
):
    tasks, rows = [str(path) for path in tiny_tasks], {"individual": {}, "joint": {}}
    whole = driven(run_config(tmp_path / "whole", methods=rows, tasks=tasks))
    fork(whole, 2, tmp_path / "fork")
    alone, individual = matrix(tmp_path / "fork", "individual"), matrix(whole, "individual")
    assert alone.bound and alone.rows == [[None, None], individual.rows[2][:2]]
    driven(load_run(tmp_path / "fork"))
    fresh = driven(run_config(tmp_path / "fresh", methods=rows, tasks=tasks[:2]))
    for label in rows:
        assert matrix(tmp_path / "fork", label) == matrix(fresh, label)
        assert matrix(fresh, label).metrics()["last"] is not None


def test_both_bounds_train_on_as_many_examples_as_sequential_lora_and_say_what_they_need(finished):
    needs = {label: read_needs(finished / label) for label in METHODS_RUN}
    assert {need.examples for need in needs.values()} == {48}
    assert {label: need.inputs for label, need in needs.items()} == {
        "seq-lora": (),
        "mean": (),
        "individual": ("task at test",),
        "joint": ("old examples",),
        "keeplora": (),
        "protected": ("task at test",),
    }
    # One update is for both tasks: it is as large as one of theirs, and half of it is kept for each.
    joint, alone = needs["joint"], needs["seq-lora"]
    (update,) = (finished / "joint").glob("task-02*/delta.safetensors")
    assert joint.trained == alone.trained
    assert joint.kept_bytes == update.stat().st_size / 2 < 0.6 * alone.kept_bytes
    # KeepLoRA's W_p is of the base, and later tasks need it.
    kept = [*(finished / "keeplora").glob("task-*/*")]
    kept = [path for path in kept if path.name in ("delta.safetensors", "state.safetensors")]
    assert any("base" in path.parent.name for path in kept)
    assert needs["keeplora"].kept_bytes == sum(path.stat().st_size for path in kept) / 2
    budgets = [Budget.of({"num_train_epochs": 1, "per_device_train_batch_size": 8}, 24, 1)] * 2
    joint = METHODS["joint"](METHODS["joint"].Options())
    assert [joint.budget(index, budgets).seen for index in (1, 2)] == [0, 48]


def test_an_extended_joint_takes_what_one_of_all_tasks_takes_and_its_first_update_overlaps_with_none(
    run_config, driven, tiny_tasks, tmp_path
):
    tasks, rows = [str(path) for path in tiny_tasks], {"joint": {}}
    whole = driven(run_config(tmp_path / "whole", methods=rows, tasks=tasks)) / "joint"
    for count in (2, 3):
        longer = driven(run_config(tmp_path / "longer", methods=rows, tasks=tasks[:count])) / "joint"
    first, second = read_needs(longer), read_needs(whole)
    assert dataclasses.replace(first, test_seconds=None) == dataclasses.replace(second, test_seconds=None)
    assert (first.examples, first.training_passes) == (72, 1)
    trial = read_trial(longer, Matrix.from_json(longer / "matrix.json"), 0, "longer")
    assert trial.overlap is None


def test_joint_exports_nothing_before_its_last_task(finished, tmp_path):
    for form in ("adapter", "merged", "state"):
        with pytest.raises(RunError, match="'joint' has learned nothing by task 1.*leave --at-task out"):
            export_run(finished, form, tmp_path / form, label="joint", at_task=1)
    with pytest.raises(RunError, match="'joint' has learned nothing by task 1"):
        load_run_predictor(finished, load_recipe(load_run(finished).tasks[0]), "joint", at_task=1)


def test_individual_exports_as_a_set_with_an_adapter_per_task_alone(finished):
    for form in ("merged", "adapter"):
        with pytest.raises(ConfigError, match="individual.* does not merge.*--as set --each task"):
            export_run(finished, form, label="individual")


@pytest.mark.slow
def test_a_report_draws_a_bound_as_a_row_of_its_own_and_a_level_line(finished):
    write_run_report(finished)
    page, table = (finished / "report.html").read_text(), (finished / "table.md").read_text()
    assert "Bounds, dash-dotted in plots" in page
    section = table.partition("## individual")[2]
    assert section.count("\n| bound |") == 3 and "| **Last** |" in section
    scores = (finished / "scores.csv").read_text()
    assert sum(line.startswith("individual,") and ",bound," in line for line in scores.splitlines()) == 2
    svg = (finished / "curves.svg").read_text()
    assert svg.count("individual") == 1 and "stroke-dasharray" in svg
    assert (finished / "heatmap-individual.svg").exists()


def test_joint_trains_once_on_all_tasks_from_the_base_and_scores_them_once(finished):
    trained = [
        json.loads(path.read_text()) for path in sorted((finished / "joint").glob("task-*/train.json"))
    ]
    alone = [
        json.loads(path.read_text()) for path in sorted((finished / "seq-lora").glob("task-*/train.json"))
    ]
    assert [task["steps"] for task in trained] == [0, sum(task["steps"] for task in alone)]
    row = matrix(finished, "joint")
    assert row.bound and None not in row.rows[1] and row.rows[0] == [None, None]
    answers = [path.parts[-3][:7] for path in sorted((finished / "joint").glob("task-0[12]*/predictions/*"))]
    assert answers == ["task-02", "task-02"]


def test_joints_first_loss_is_the_mean_over_a_steps_examples_each_with_its_tasks_classes(finished):
    config = load_run(finished)
    tasks, family = load_tasks(config), load_model(config.model)
    trainings = config.trainings("joint")
    budgets = [Budget.of(t, len(task.train), 1) for t, task in zip(trainings, tasks, strict=True)]
    mixture = mix_tasks(budgets, stage_seed(config.seed, 2, "TRAINED"))
    losses = []
    for source, row in zip(mixture.sources[:8].tolist(), mixture.rows[:8].tolist(), strict=True):
        data = tasks[source - 1].train
        # B starts at 0: the first step sees the untouched model.
        batch = family.inputs(data, Prepared(family, data)).collate([row])
        losses.append(float(family.task(data.recipe)(**batch)["loss"].detach()))
    assert int(mixture.sizes[0]) == 8 and len(set(mixture.sources[:8].tolist())) == 2
    logged = json.loads(next((finished / "joint").glob("task-02-*/train.json")).read_text())["history"][0]
    assert logged["loss"] == pytest.approx(sum(losses) / 8, abs=1e-4)
