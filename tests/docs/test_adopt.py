"""docs/adopt.md: its commands run."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import CLIPModel

from llava_keeplora import cli

TEXT = (Path(__file__).parents[2] / "docs/adopt.md").read_text()
#: Settings for a CLIP of 32 features on a CPU.
SMALL = ["parts.vision.rank=2", "parts.text.rank=2", "parts.text.energy_weight=0.5", "training.use_cpu=true"]


@pytest.mark.slow
def test_every_command_runs(run_config, driven, tiny_clip, tiny_tasks, tmp_path, monkeypatch, capfd):
    shutil.copytree(tiny_tasks[0].parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_clip, "models/clip")
    driven(run_config("runs/birds", methods={"keeplora": {}}, tasks=["colours.yaml"]))
    model = get_peft_model(
        CLIPModel.from_pretrained("models/clip"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained("my-adapter")
    commands = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.M | re.S)
        for line in block.splitlines()
    ]
    assert len(commands) == 4
    for command in commands:
        small = SMALL if "models/clip" in command else ["training.use_cpu=true"] * ("import" in command)
        assert cli.main([*shlex.split(command)[1:], *small]) == 0, capfd.readouterr().err
