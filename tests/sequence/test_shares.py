"""How much of a task's data the two passes of KeepLoRA read."""

import json

import pytest

from llava_keeplora.run_folder import CONFIG, IDENTITY, dump_config
from llava_keeplora.saved_run import read_identity, run_identity, with_recorded_defaults
from llava_keeplora.sequence import passes

IMAGES = 24


@pytest.fixture
def read(monkeypatch, run_config, drive, tiny_tasks, tmp_path):
    """Function (**options) → images read by the gradient pass and by the feature pass of one task."""
    counts = {"gradient_pass": 0, "feature_pass": 0}

    def counting(name):
        inner = getattr(passes, name)

        def outer(task, layers, *arguments):
            arguments = list(arguments)
            place = next(i for i, one in enumerate(arguments) if hasattr(one, "__next__"))
            batches = list(arguments[place])
            counts[name] += sum(len(batch["labels"]) for batch, counted in batches if counted)
            arguments[place] = iter(batches)
            return inner(task, layers, *arguments)

        return outer

    def run(**options):
        for name in counts:
            monkeypatch.setattr(passes, name, counting(name))
        drive(run_config(tmp_path / "run", tasks=[str(tiny_tasks[0])], methods={"keeplora": options}))
        return counts["gradient_pass"], counts["feature_pass"]

    return run


def test_all_of_it_unless_the_user_says_otherwise(read):
    assert read() == (IMAGES, IMAGES)


def test_the_shares_that_the_user_asks_for(read):
    assert read(gradient_fraction=0.5, feature_fraction=0.25) == (IMAGES // 2, IMAGES // 4)


def test_a_run_that_was_begun_with_all_data_as_the_default_goes_on_with_all_data(run_config, tmp_path):
    all_data = {"gradient_fraction": 1.0, "feature_fraction": 1.0}
    old = run_config(tmp_path / "run", methods={"keeplora": all_data})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(dump_config(old))
    (tmp_path / "run" / IDENTITY).write_text(json.dumps(run_identity(old)))
    now = run_config(tmp_path / "run", methods={"keeplora": {}})
    kept = with_recorded_defaults(now)
    assert now.methods["keeplora"].options["gradient_fraction"] == "auto"
    assert run_identity(kept) == run_identity(old)
    half = run_config(tmp_path / "run", methods={"keeplora": {"gradient_fraction": 0.5}})
    assert with_recorded_defaults(half).methods["keeplora"].options["gradient_fraction"] == 0.5


@pytest.mark.parametrize("routing", ["prototypes", "oracle", "model"])
def test_a_run_from_before_routers_were_trained_goes_on_without_one(run_config, tmp_path, routing):
    def configured(**options):
        methods = {"task-lora": {"routing": routing} | options}
        return run_config(tmp_path / "run", methods=methods)

    untrained = {"router_examples": 0} if routing == "model" else {}
    old = json.loads(json.dumps(run_identity(configured(**untrained))))
    assert old["methods"]["task-lora"]["options"] == {"routing": routing}, "as older versions recorded it"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(dump_config(configured()))
    (tmp_path / "run" / IDENTITY).write_text(json.dumps(old))
    kept = with_recorded_defaults(configured())
    assert run_identity(kept) == old == read_identity(tmp_path / "run")
    assert kept.methods["task-lora"].options["router_examples"] == (0 if routing == "model" else 20)
    if routing == "model":
        other = run_identity(with_recorded_defaults(configured(router_examples=5)))
        assert other != old, "an explicit number is a change"


def test_settings_of_a_router_that_is_not_trained_may_be_recorded(run_config, tmp_path):
    now = run_config(tmp_path / "run", methods={"task-lora": {}})
    identity = run_identity(now)
    identity["methods"]["task-lora"]["options"] |= {"router_examples": 20, "router_epochs": 40}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / IDENTITY).write_text(json.dumps(identity))
    assert read_identity(tmp_path / "run") == run_identity(now)
