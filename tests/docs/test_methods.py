"""docs/methods.md: its table is what the records say, and its settings are a configuration."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from llava_keeplora.config import parse_config
from llava_keeplora.methods import METHODS

TEXT = (Path(__file__).parents[2] / "docs/methods.md").read_text()
YES = {True: "yes", False: "no"}


def test_the_table_says_what_the_records_say():
    rows = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| [")]
    assert rows == [
        [
            f"[{name}]({one.url})",
            one.trained,
            one.kept,
            YES[one.reference_data],
            YES[one.task_id_at_test],
            one.extra_parameters,
            one.inference_cost,
            YES[one.mergeable] + (f" ({one.variants})" if one.variants else ""),
        ]
        for name, one in ((name, method.info) for name, method in METHODS.items())
    ]


def test_the_row_of_merging_says_that_condu_does_not():
    (row,) = (line for line in TEXT.splitlines() if line.startswith("| [merge]"))
    assert row.split(" | ")[-1].startswith("yes (`condu`: does not merge, ") and "prototypes" in row


def test_the_settings_are_a_configuration_of_every_method():
    (block,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.M | re.S)
    config = parse_config(yaml.safe_load(block) | {"tasks": ["digits", "textures"]})
    assert list(config.methods) == [name for name, method in METHODS.items() if method.trainable]
    assert config.methods["inflora"].options == {"energy_step": 0.005}
    assert config.methods["o-lora"].parts["vision"].targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("name", METHODS)
def test_the_docstring_of_a_methods_file_has_the_address_of_its_paper(name):
    method = METHODS[name]
    assert method.info.url in sys.modules[method.__module__].__doc__
