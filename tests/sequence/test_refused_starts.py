"""A start that is refused leaves the folder as it was, so that the mended command goes on in it."""

import pytest

from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, RunError, UserError
from llava_keeplora.saved_run import extended, load_run
from llava_keeplora.sequence import run

pytestmark = pytest.mark.usefixtures("without_reports")


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
    [
        ({"num_train_epochs": 0.0}, "num_train_epochs must be above 0 and finite .got"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative.*got .*-1.0"),
    ],
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
    with pytest.raises(
        RunError,
        match=f"as its last task already, with training.learning_rate {rate} instead of 0.5; leave --learning-rate out to go on",
    ):
        extended(finished, str(tiny_tasks[0]), {"learning_rate": 0.5})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", -1),
        ("learning_rate", float("nan")),
        ("learning_rate", [1e-3, -1e-3]),
    ],
)
def test_training_on_nothing_or_at_no_rate_is_refused(key, value, run_tree):
    tree = run_tree("unset", methods={"seq-lora": {}})
    with pytest.raises(ConfigError, match=f"training.{key} (is|must)"):
        parse_config({**tree, "training": {**tree["training"], key: value}}).trainings("seq-lora")


def test_references_that_no_answer_can_meet_are_said_before_a_run_and_refused_if_it_is_all(
    monkeypatch, caplog
):
    from types import SimpleNamespace

    from llava_keeplora.start import tasks as start_tasks
    from llava_keeplora_eval import EvalError

    def start(answers):
        recipe = SimpleNamespace(
            name="options", metric="option_letter", kind="vqa", source={"format": "rendered"}
        )
        split = SimpleNamespace(recipe=recipe, split="test", answers=answers, ids=list("abc")[: len(answers)])
        split = type("Split", (SimpleNamespace,), {"__len__": lambda self: len(self.ids)})(**vars(split))
        monkeypatch.setattr(start_tasks, "load_recipes", lambda tasks: [recipe])
        monkeypatch.setattr(start_tasks, "load_splits", lambda *arguments: (split, split))
        return start_tasks.load_tasks(
            SimpleNamespace(tasks=["options"], data=None, held_out=0.0, source=lambda index: None)
        )

    assert start([["A"], ["(B)"]]) and not caplog.text
    assert start([["A"], ["2"]]) and "1 of 2 examples of options (test), 50.0 %, get 0" in caplog.text
    with pytest.raises(EvalError, match="2 of 2 examples.*option_letter"):
        start([["1"], ["2"]])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"parts": {"vision": {"rank": 500}}},
            r"parts.vision.rank is 500, but layer .* has \d+ input directions",
        ),
        (
            {
                "methods": {"keeplora": {"preset": "released-clip"}},
                "parts": {"text": {"energy_weight": "auto"}},
            },
            "the preset 'released-clip' follows",
        ),
        (
            {"parts": {"vision": {"targets": ["w_proj"]}}},
            "targets names 'w_proj', which matches no linear layer",
        ),
    ],
)
def test_what_no_data_are_needed_for_is_refused_alike_by_plan_and_train_before_the_folder_is_claimed(
    changes, told, run_tree, tmp_path
):
    from llava_keeplora.plan import make_plan

    tree = run_tree(tmp_path / "run", **{"methods": {"keeplora": {}}} | changes)
    sentences = []
    for door in (make_plan, run):
        with pytest.raises(UserError, match=told) as error:
            door(parse_config(tree))
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1] and not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    "training",
    [
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"adam_beta1": 1.5},
        {"adam_epsilon": -1.0},
        {"lr_scheduler_kwargs": {"nope": 1}},
    ],
)
def test_settings_that_the_optimiser_or_its_schedule_refuse_are_reported_before_any_stage(training):
    from llava_keeplora.start.training_args import check_arguments, training_arguments

    training = {"num_train_epochs": 1, "use_cpu": True} | training
    with pytest.raises(
        ConfigError,
        match="the optimiser 'adamw_torch.*' of 'keeplora' or its schedule .* refuses its settings",
    ):
        check_arguments(
            lambda: training_arguments(training, output_dir="x", run_name="x", seed=0),
            "keeplora",
            training,
            "a",
            10,
            1,
        )


def test_a_rank_that_the_weights_leave_no_room_for_is_refused_before_the_folder_is_claimed(
    run_tree, tiny_tasks, tmp_path
):
    from llava_keeplora.errors import MethodError
    from llava_keeplora.plan import make_plan

    tree = run_tree(
        tmp_path / "run",
        methods={"keeplora": {}},
        tasks=[str(tiny_tasks[0])],
        parts={"vision": {"rank": 31}},
    )
    assert "rank 31" in make_plan(parse_config(tree)).methods[0].unsure
    with pytest.raises(MethodError, match="fewer than the rank 31"):
        run(parse_config(tree))
    assert not (tmp_path / "run/config.json").exists() and not list((tmp_path / "run").rglob("*.jsonl"))


class TestBegunAnew:
    """A folder in which no stage of a method has finished takes another configuration."""

    @pytest.fixture
    def refused(self, run_tree, tiny_tasks, tmp_path, monkeypatch):
        """A run that its method refuses in its first stage, as a method that doesn't check weights before may: only the zero-shot row is there."""
        from llava_keeplora.errors import MethodError
        from llava_keeplora.methods import METHODS

        monkeypatch.setattr(METHODS["keeplora"], "check_weights", lambda self, layers: None)

        tree = run_tree(
            tmp_path / "run",
            methods={"keeplora": {}},
            tasks=[str(tiny_tasks[0])],
            training={"max_steps": 1},
            parts={"vision": {"rank": 31}},
        )
        with pytest.raises(
            MethodError, match="input directions outside its principal subspace .*fewer than the rank 31"
        ):
            run(parse_config(tree))
        assert (tmp_path / "run/config.json").exists()
        return tree

    def test_the_mended_configuration_goes_on_and_keeps_the_zero_shot_row(self, refused, tmp_path, caplog):
        answers = next((tmp_path / "run/zero-shot").rglob("*.jsonl"))
        before = {path: path.read_bytes() for path in (tmp_path / "run/zero-shot").rglob("*.jsonl")}
        mended = parse_config(
            refused | {"parts": {"vision": {"rank": 1}}, "methods": {"keeplora": {"form": "literal"}}}
        )
        assert run(mended)["keeplora"].complete and answers in before
        assert {path: path.read_bytes() for path in before} == before
        assert load_run(tmp_path / "run").methods["keeplora"].parts["vision"].rank == 1
        assert "starts over" in caplog.text
        with pytest.raises(RunError, match="holds a run with another configuration"):
            run(parse_config(refused))

    def test_what_the_zero_shot_row_depends_on_stays(self, refused):
        with pytest.raises(RunError, match="another configuration .seed: 0 → 5."):
            run(parse_config(refused | {"seed": 5}))

    def test_without_a_finished_row_everything_may_change_and_half_made_files_go(self, refused, tmp_path):
        import shutil

        from llava_keeplora.sequence.workspace import Workspace

        folder = tmp_path / "run"
        shutil.rmtree(folder / "zero-shot")
        (folder / "zero-shot/task-00-base/predictions").mkdir(parents=True)
        (folder / "zero-shot/task-00-base/predictions/half.jsonl").write_text("x")
        workspace = Workspace(parse_config(refused | {"seed": 5}))
        workspace.check()
        assert sorted(workspace.begun_anew()) == ["keeplora", "zero-shot"]
        workspace.claim()
        assert (
            not (folder / "zero-shot").exists()
            and workspace.begun_anew() == []
            and load_run(folder).seed == 5
        )
