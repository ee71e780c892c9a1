"""An option that does nothing with the others is refused by its name, and runs of versions that accepted it go on."""

import json
import re

import pytest

from llava_keeplora.config import parse_config, without_idle_options
from llava_keeplora.errors import ConfigError, MethodError, RunError
from llava_keeplora.export.loaded_run import LearnedRun
from llava_keeplora.methods import METHODS
from llava_keeplora.run_folder import CONFIG, IDENTITY, differences, dump_config
from llava_keeplora.saved_run import load_run, read_identity, run_identity

#: A method's options, of which the last does nothing, and when it would.
IDLE = [
    ("merge", {"density": 0.5}, "with rule 'ties' (got density 0.5 with rule 'mean')"),
    ("merge", {"rule": "condu", "density": 0.5}, "with rule 'ties'"),
    ("merge", {"rule": "ties", "alpha": 0.5}, "with rule 'wise-ft' (got alpha 0.5 with rule 'ties')"),
    ("merge", {"routing": "oracle"}, "with rule 'condu' (got routing 'oracle' with rule 'mean')"),
    ("merge", {"rule": "wise-ft", "routing": "model"}, "with rule 'condu'"),
    ("merge", {"rejection": 0.1}, "with rule 'condu' (got rejection 0.1 with rule 'mean')"),
    ("merge", {"rule": "condu", "routing": "oracle", "rejection": 0.1}, "with routing 'prototypes'"),
    ("task-lora", {"routing": "model", "rejection": 0.1}, "with routing 'prototypes'"),
    (
        "task-lora",
        {"router_examples": 5},
        "with routing 'model' (got router_examples 5 with routing 'prototypes')",
    ),
    ("task-lora", {"routing": "oracle", "router_epochs": 5}, "with routing 'model'"),
    ("task-lora", {"router_learning_rate": 0.1}, "with routing 'model'"),
    ("task-lora", {"router_rank": 4}, "with routing 'model'"),
    ("task-lora", {"router_batch_size": 4}, "with routing 'model'"),
    ("replay", {"general_examples": 5}, "with general (got general_examples 5 without it)"),
    ("replay", {"general_ratio": 0.5}, "with general"),
    ("replay", {"examples": 20, "share": 0.1}, "without examples (got share 0.1 with examples 20)"),
    (
        "keeplora",
        {"plasticity": 5.0},
        "with feature_rule 'splitlora' (got plasticity 5.0 with feature_rule 'energy')",
    ),
    ("keeplora++", {"plasticity": 5.0}, "with feature_rule 'splitlora'"),
]
#: Options that are taken: a default does nothing, and a weight of 0 is the end of its range.
TAKEN = [
    ("merge", {"rule": "ties", "density": 0.5}),
    ("merge", {"rule": "wise-ft", "alpha": 0.5}),
    ("merge", {"rule": "condu", "routing": "oracle"}),
    ("merge", {"density": 0.2, "alpha": 0.8, "routing": "prototypes"}),
    ("task-lora", {"routing": "model", "router_examples": 0, "router_epochs": 5}),
    ("task-lora", {"routing": "oracle", "router_examples": 20}),
    ("replay", {"general": "shapes", "general_examples": 5, "general_ratio": 0.0}),
    ("replay", {"examples": 20, "share": 0.01}),
    ("keeplora", {"feature_rule": "splitlora", "plasticity": 5.0}),
    ("keeplora", {"feature_rule": "splitlora", "plasticity": 5.0, "protect_features": False}),
    ("lwf", {"strength": 0.0, "temperature": 3.0}),
]


@pytest.mark.parametrize(("name", "options", "when"), IDLE)
def test_an_option_that_does_nothing_with_the_others_is_refused(run_tree, tmp_path, name, options, when):
    said = f"{list(options)[-1]} has an effect only {when}"
    with pytest.raises(MethodError, match=f"^{re.escape(said)}.*; remove it, or "):
        METHODS[name].Options(**options)
    with pytest.raises(ConfigError, match=re.escape(f"methods.row.{said}")):
        parse_config(run_tree(tmp_path / "run", methods={"row": {"method": name} | options}))


@pytest.mark.parametrize(("name", "options"), TAKEN)
def test_a_default_and_what_belongs_to_a_weight_of_0_are_taken(name, options):
    METHODS[name].Options(**options)
    assert without_idle_options(name, options) == options


def test_an_option_of_the_method_that_each_task_is_learned_with_is_refused_too(run_tree, tmp_path):
    row = {"individual": {"of": "keeplora", "settings": {"plasticity": 5.0}}}
    with pytest.raises(ConfigError, match="methods.individual.plasticity has an effect only with"):
        parse_config(run_tree(tmp_path / "run", methods=row))


#: Rows as earlier versions recorded them: the options that were set, and those that do something.
RECORDED = {
    "mean": ("merge", {"density": 0.5, "alpha": 0.5, "routing": "oracle"}, {}),
    "nearest": ("task-lora", {"router_examples": 5, "router_rank": 4}, {}),
    "some": ("replay", {"examples": 20, "share": 0.1, "general_ratio": 0.5}, {"examples": 20}),
    "keeplora": ("keeplora", {"plasticity": 5.0, "gradient": "dense"}, {"gradient": "dense"}),
    "alone": (
        "individual",
        {"of": "keeplora", "settings": {"plasticity": 5.0, "gradient": "dense"}},
        {"of": "keeplora", "settings": {"gradient": "dense"}},
    ),
}


@pytest.fixture
def recorded(run_tree, tmp_path):
    """A run folder of a version that accepted every option, and the configuration without those that do nothing."""
    folder = tmp_path / "run"
    rows = {label: {"method": name} | used for label, (name, _, used) in RECORDED.items()}
    config = parse_config(run_tree(folder, methods=rows))
    folder.mkdir()
    trees = {CONFIG: json.loads(dump_config(config)), IDENTITY: json.loads(json.dumps(run_identity(config)))}
    for file, tree in trees.items():
        for label, (_, options, _) in RECORDED.items():
            tree["methods"][label]["options"] |= options
        (folder / file).write_text(json.dumps(tree))
    return folder, config


def test_a_run_that_has_recorded_such_options_goes_on_without_them(recorded):
    folder, config = recorded
    loaded = load_run(folder)
    assert {label: row.options for label, row in loaded.methods.items()} == {
        label: row.options for label, row in config.methods.items()
    }
    for resumed in (loaded, config):
        assert list(differences(read_identity(folder), run_identity(resumed))) == []
    tree = json.loads((folder / CONFIG).read_text())
    assert LearnedRun(folder, tree, "mean", [], []).method.options == METHODS["merge"].Options()


def test_one_that_the_command_line_sets_is_refused_there_too(recorded):
    with pytest.raises(RunError, match="methods.mean.density has an effect only"):
        load_run(recorded[0], ["methods.mean.density=0.4"])


def test_what_is_wrong_in_another_way_or_not_built_in_stays_as_it_is():
    for name, options in (
        ("merge", {"rule": "average", "density": 0.5}),
        ("merge", {"unknown": 1}),
        ("keeplora", {"preset": ["paper"]}),
        ("no-method", {"density": 0.5}),
        ("missing.py:Plugin", {"density": 0.5}),
    ):
        assert without_idle_options(name, options) == options
