"""A run as data: what is read, coerced, inherited, and refused with the place and the nearest valid name."""

import pytest
import yaml
from transformers import TrainingArguments

from llava_keeplora.config import PER_TASK, DataConfig, load_config, parse_config
from llava_keeplora.errors import ConfigError, UserError
from llava_keeplora.saved_run import run_identity
from llava_keeplora.sequence.workspace import differences


def tree(**changes):
    base = {
        "tasks": ["digits", "shapes"],
        "parts": {"vision": {}},
        "methods": {"keeplora": {}},
        "training": {},
    }
    return base | changes


def refusal(**changes) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(tree(**changes))
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "run.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


# --- what is read --------------------------------------------------------------------------------


def test_a_method_inherits_parts_and_training_and_overrides_what_it_names():
    config = parse_config(
        tree(
            parts={"vision": {"rank": 4}, "text": {"rank": 2}},
            training={"learning_rate": 0.1, "weight_decay": 0.5},
            methods={
                "a": {
                    "method": "keeplora",
                    "parts": {"text": {"rank": 3}},
                    "training": {"learning_rate": 0.2},
                },
                "seq-lora": {},
            },
        )
    )
    assert (config.methods["a"].parts["vision"].rank, config.methods["a"].parts["text"].rank) == (4, 3)
    assert config.methods["a"].training == {"learning_rate": 0.2, "weight_decay": 0.5}
    assert (
        config.methods["seq-lora"].parts["text"].rank == 2
        and config.methods["seq-lora"].training["learning_rate"] == 0.1
    )


def test_numbers_that_yaml_reads_as_text_become_numbers(write):
    config = load_config(write(tree()), ["training.learning_rate=1e-4", "seed=7", "parts.vision.alpha=2"])
    assert (
        config.training["learning_rate"] == 1e-4
        and config.methods["keeplora"].training["learning_rate"] == 1e-4
    )
    assert (
        config.seed == 7
        and config.parts["vision"].alpha == 2.0
        and isinstance(config.parts["vision"].alpha, float)
    )


def test_an_override_reaches_a_key_that_the_file_does_not_have(write):
    config = load_config(
        write({"tasks": ["digits"]}), ["methods.keeplora.gradient_fraction=0.5", "data.holdout=0.2"]
    )
    assert config.methods["keeplora"].options["gradient_fraction"] == 0.5 and config.data.holdout == 0.2


def test_data_root_and_output_dir_win_over_file_and_overrides(write):
    config = load_config(
        write(tree(output_dir="a", data={"root": "b"})), ["output_dir=c"], output_dir="d", data_root="e"
    )
    assert (config.output_dir, config.data.root) == ("d", "e")


def test_some_of_a_configurations_methods_are_kept_in_its_order_with_what_was_published(write):
    published = {label: {"source": "x", "figures": {"last": 1.0}} for label in ("zero-shot", "a", "b")}
    path = write(
        tree(
            methods={"a": {"method": "seq-lora"}, "b": {"method": "keeplora"}, "c": {"method": "o-lora"}},
            expected=published,
        )
    )
    config = load_config(path, methods=["c", "a"])
    assert list(config.methods) == ["a", "c"] and set(config.expected) == {"zero-shot", "a"}
    assert load_config(path, methods=None) == load_config(path)
    assert list(load_config(path, methods=["zero-shot", "b"]).methods) == ["b"]
    with pytest.raises(ConfigError, match=r"the configuration has no method 'd'"):
        load_config(path, methods=["a", "d"])
    assert list(load_config(write({"tasks": ["digits"]}), methods=["keeplora"]).methods) == ["keeplora"]


def test_epochs_are_one_number_or_one_per_task():
    for given, epochs in (("2", [2.0, 2.0]), ([1, 3], [1.0, 3.0])):
        trainings = parse_config(tree(training={"num_train_epochs": given})).trainings("keeplora")
        assert [training["num_train_epochs"] for training in trainings] == epochs


def test_a_learning_rate_is_one_number_or_one_per_task():
    both = [0.1, "1e-2"]
    method = {"keeplora": {"training": {"learning_rate": both}}, "seq-lora": {}}
    config = parse_config(tree(methods=method, training={"weight_decay": 0.5}))
    assert config.trainings("keeplora") == [
        {"weight_decay": 0.5, "learning_rate": rate, "num_train_epochs": 1.0} for rate in (0.1, 0.01)
    ]
    assert config.trainings("seq-lora") == [{"weight_decay": 0.5, "num_train_epochs": 1.0}] * 2, (
        "its own default stays transformers'"
    )
    alike = [
        run_identity(parse_config(tree(training={"learning_rate": rate})))
        for rate in (0.1, [0.1, 0.1], [0.1, 0.2])
    ]
    assert alike[0] == alike[1] != alike[2]
    assert (
        config.first(1).trainings("keeplora")[0]["learning_rate"] == 0.1
        and len(config.first(1).trainings("keeplora")) == 1
    )


def test_what_an_argument_is_where_nothing_is_said_is_what_transformers_says():
    assert PER_TASK["learning_rate"][0] == TrainingArguments.learning_rate


def test_zero_shot_may_be_listed_though_it_always_comes():
    assert list(parse_config(tree(methods={"zero-shot": None, "keeplora": {}})).methods) == ["keeplora"]


def test_the_identity_ignores_where_things_lie_and_how_they_are_cached():
    one = parse_config(tree(output_dir="a", data={"root": "x", "cache_gb": 1}, evaluation={"batch_size": 3}))
    two = parse_config(tree(output_dir="b", data={"root": "y"}))
    assert run_identity(one) == run_identity(two) != run_identity(parse_config(tree(seed=1)))


def test_differences_name_the_leaf():
    assert list(differences({"a": {"b": [1, {"c": 2}]}, "d": 1}, {"a": {"b": [1, {"c": 3}]}})) == [
        ("a.b[1].c", 2, 3),
        ("d", 1, None),
    ]


# --- unknown keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "hint"),
    [
        ({"seeed": 1}, "'seeed'", "did you mean 'seed'"),
        ({"model": {"name_or_pth": "x"}}, "'model.name_or_pth'", "did you mean 'name_or_path'"),
        ({"parts": {"vision": {"rnak": 2}}}, "'parts.vision.rnak'", "did you mean 'rank'"),
        ({"data": {"holdot": 0.1}}, "'data.holdot'", "did you mean 'holdout'"),
        ({"evaluation": {"batch": 1}}, "'evaluation.batch'", "did you mean 'batch_size'"),
        ({"methods": {"keeplora": {"prest": "paper"}}}, "'methods.keeplora.prest'", "did you mean 'preset'"),
        ({"methods": {"keeplora": {"trainig": {}}}}, "'methods.keeplora.trainig'", "did you mean 'training'"),
        (
            {"methods": {"keeplora": {"parts": {"vision": {"alpa": 2}}}}},
            "'methods.keeplora.parts.vision.alpa'",
            "did you mean 'alpha'",
        ),
        ({"training": {"learning_rte": 1}}, "training.learning_rte", "did you mean 'learning_rate'"),
        ({3: 1}, "'3'", "valid names are"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_valid_one(changes, key, hint):
    with pytest.raises(ConfigError) as caught:
        parse_config(tree() | changes)
    assert key in str(caught.value) and hint in str(caught.value)


def test_a_misspelt_sequence_is_reported_as_such():
    with pytest.raises(ConfigError, match="unknown key 'sequnce'; did you mean 'sequence'"):
        parse_config({"sequnce": "demo"})


def test_a_key_given_twice_is_refused(write):
    with pytest.raises(ConfigError, match="the key 'seed' occurs twice"):
        load_config(write("tasks: [digits]\nseed: 1\nseed: 2\n"))


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": "one"}, "seed is 'one', but it takes int"),
        ({"seed": True}, "seed is True, but it takes int"),
        ({"seed": 1.5}, "seed is 1.5, but it takes int"),
        ({"parts": {"vision": {"rank": [2]}}}, "parts.vision.rank is [2], but it takes int"),
        (
            {"parts": {"vision": {"rank": 0}}},
            "parts.vision.rank must be at least 1 (got 0)",
        ),
        (
            {"parts": {"vision": {"alpha": 0}}},
            "parts.vision.alpha must be above 0, as must the scale alpha / rank (got 0.0)",
        ),
        (
            {"parts": {"vision": {"energy_weight": 0}}},
            "parts.vision.energy_weight must be in (0, 1] (got 0.0)",
        ),
        (
            {"parts": {"vision": {"energy_feature": 1.01}}},
            "parts.vision.energy_feature must be in (0, 1] (got 1.01)",
        ),
        (
            {"parts": {"vision": {"energy_feature": float("nan")}}},
            "energy_feature is nan",
        ),
        ({"parts": {"vision": {"targets": []}}}, "parts.vision.targets is empty"),
        (
            {"parts": {"vision": {"targets": ".*q_proj"}}},
            "parts.vision.targets names '.*q_proj', but a target is the last part of a layer's name",
        ),
        ({"parts": "vision"}, "parts is 'vision', but it takes `key: value` pairs"),
        ({"data": {"on_bad_image": "ignore"}}, "data.on_bad_image must be 'refuse' or 'drop' (got 'ignore')"),
        ({"data": {"holdout": 1}}, "data.holdout must be in [0, 1) (got 1.0)"),
        ({"evaluation": {"batch_size": 0}}, "evaluation.batch_size must be at least 1 (got 0)"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate is 'fast', but it takes float"),
        ({"training": {"bf16": "maybe"}}, "training.bf16 is 'maybe', but it takes bool"),
        (
            {"training": {"num_train_epochs": [1, 2, 3]}},
            "training.num_train_epochs lists 3 values for 2 tasks",
        ),
        (
            {"training": {"learning_rate": [1, 2, 3]}},
            "training.learning_rate lists 3 values for 2 tasks; give one number, or one per task",
        ),
        (
            {"methods": {"keeplora": {"training": {"learning_rate": [1, "x"]}}}},
            "methods.keeplora.training.learning_rate is 'x', but it takes float",
        ),
        (
            {"training": {"num_train_epochs": 0}},
            "training.num_train_epochs must be above 0 and finite (got 0.0)",
        ),
        (
            {"training": {"num_train_epochs": ["x", 1]}},
            "training.num_train_epochs is 'x', but it takes float",
        ),
        (
            {"training": {"deepspeed": "gone.json"}},
            "training.deepspeed names 'gone.json', which cannot be read (No such file or directory)",
        ),
        ({"training": {"seed": 1}}, "training.seed is set by the driver; set the top-level seed"),
        (
            {"training": {"output_dir": "x"}},
            "training.output_dir is set by the driver; set the top-level output_dir",
        ),
        ({"tasks": "digits"}, "tasks must be a list of names (got 'digits')"),
        ({"tasks": [1]}, "tasks must be a list of names (got [1])"),
        ({"sequence": "demo"}, "a run needs either `sequence` or `tasks`, not both"),
        ({"tasks": []}, "a run needs either `sequence` or `tasks`; name one of them"),
        ({"tasks": None, "sequence": "dmo"}, "there is no sequence 'dmo'; did you mean 'demo'"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_place(changes, words):
    assert words in refusal(**changes)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (
            {"keplora": {}},
            "methods.keplora names the method 'keplora', which does not exist; did you mean 'keeplora'",
        ),
        ({"mine": {"method": "keplora"}}, "methods.mine names the method 'keplora', which does not exist"),
        ({"keeplora": {"preset": "papr"}}, "(got 'papr'); did you mean 'paper'"),
        ({"keeplora": {"form": "x"}}, "methods.keeplora.form must be one of delta, literal (got 'x')"),
        (
            {"keeplora": {"gradient_fraction": 0}},
            "methods.keeplora.gradient_fraction must be in (0, 1] (got 0.0)",
        ),
        (
            {"keeplora": {"feature_fraction": 1.5}},
            "methods.keeplora.feature_fraction must be in (0, 1] (got 1.5)",
        ),
        (
            {"keeplora": {"feature_fraction": 0.5, "preset": "released-llava"}},
            "methods.keeplora.feature_fraction is 0.5, but the preset 'released-llava' reads gradients",
        ),
        ({"keeplora": {"protect_weights": 1}}, "methods.keeplora.protect_weights is 1, but it takes bool"),
        (
            {"keeplora": {"parts": {"txt": {}}}},
            "methods.keeplora.parts names 'txt', which the run does not adapt; valid names are vision",
        ),
        ({"keeplora": {"training": {"seed": 1}}}, "methods.keeplora.training.seed is set by the driver"),
        (
            {"keeplora": {"training": {"lr": 1}}},
            "methods.keeplora.training.lr is not an argument of transformers.TrainingArguments",
        ),
        ({"keeplora": 3}, "methods.keeplora is 3, but it takes `key: value` pairs"),
        ({"a/b": {"method": "keeplora"}}, "methods has the label 'a/b', which cannot be a folder of the run"),
        ({"..": {"method": "keeplora"}}, "methods has the label '..'"),
        ({"report.html": {"method": "keeplora"}}, "methods has the label 'report.html'"),
        (
            {"zero-shot": {"training": {}}},
            "methods.zero-shot sets something for 'zero-shot', which has no settings",
        ),
        ({"zero-shot": {"method": "seq-lora"}}, "methods.zero-shot sets something for 'zero-shot'"),
        ({"base": {"method": "zero-shot"}}, "methods.base sets something for 'zero-shot'"),
    ],
)
def test_a_method_that_cannot_be_is_named_with_its_place(methods, words):
    assert words in refusal(methods=methods)


# --- files and overrides -------------------------------------------------------------------------


def test_a_missing_file_is_named_with_the_nearest_shipped_one():
    with pytest.raises(
        ConfigError,
        match="there is no configuration 'demoo', neither as a file nor among the shipped ones; did you mean 'demo'",
    ):
        load_config("demoo")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tasks: [", "is not valid YAML"),
        ("- a\n- b\n", "holds no 'key: value' pairs"),
        ("", "holds no 'key: value' pairs"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(write, content, words):
    with pytest.raises(ConfigError, match=words):
        load_config(write(content))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "the override 'seed' is not of the form key.subkey=value"),
        ("=3", "is not of the form key.subkey=value"),
        ("seed.x=1", "the override 'seed.x=1' reaches into 'seed', which holds 3"),
        ("seed=[1", "the override 'seed=[1' has a value that is not valid YAML"),
        (
            "training.learning_rte=1",
            "training.learning_rte is not an argument of transformers.TrainingArguments; did you mean 'learning_rate'",
        ),
    ],
)
def test_an_override_that_cannot_be_is_quoted(write, override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tree(seed=3)), [override])
    assert words in str(caught.value)


@pytest.mark.parametrize("size", [-1.0, float("nan"), float("inf")])
def test_a_cache_of_no_size_is_refused(size):
    with pytest.raises(ConfigError, match="cache_gb must be finite and not negative"):
        DataConfig(cache_gb=size)
