"""A model family of one's own, from a file: trained, read back, refused when changed or missing."""

import json
import shutil
from pathlib import Path

import pytest

from llava_keeplora.config import ModelConfig, parse_config
from llava_keeplora.doctor import examine_run
from llava_keeplora.errors import ConfigError, RunError, UserError
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.models import open_model
from llava_keeplora.saved_run import load_run, read_identity

EXAMPLE = Path(__file__).parents[2] / "docs/examples/half_clip.py"


def test_a_family_from_a_file_decides_what_is_adapted(run_tree, driven, tiny_tasks, tmp_path):
    file = shutil.copyfile(EXAMPLE, tmp_path / "half_clip.py")
    tree = run_tree(
        tmp_path / "run",
        methods={"seq-lora": {}},
        tasks=[str(tiny_tasks[0])],
        model={"family": f"{file}:HalfClip"},
    )
    run = driven(parse_config(tree))
    assert all(".layers.1." in name for name in load_learned_run(run, None).deltas[0])
    model = read_identity(run)["model"]
    assert model["family"] == "half_clip:HalfClip" and list(model["source"]) == ["half_clip.py"]
    assert str(tmp_path) not in json.dumps(model | {"name_or_path": ""})
    file.write_text(file.read_text() + "\n# changed\n")
    with pytest.raises(RunError, match=r"the file half_clip\.py of the plug-in at model has changed"):
        driven(load_run(run))
    file.unlink()
    wrong = [str(line) for line in examine_run(run) if isinstance(line, UserError)]
    assert len(wrong) == 1 and "half_clip" in wrong[0] and "is not installed" in wrong[0]


def test_what_is_no_family_is_refused(tiny_clip):
    with pytest.raises(
        ConfigError, match="'fractions:Fraction' is no model family: it lacks from_config, load"
    ):
        open_model(ModelConfig(str(tiny_clip), family="fractions:Fraction"))
    with pytest.raises(ConfigError, match="there is no model family 'clipp'; did you mean 'clip'"):
        open_model(ModelConfig(str(tiny_clip), family="clipp"))
