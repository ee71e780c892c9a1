"""An adapter with KeepLoRA's A that any trainer trains, and runs that begin with what somebody has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_keeplora import cli
from llava_keeplora.adapters import load_deltas
from llava_keeplora.adopt.new_run import new_run
from llava_keeplora.config import RunConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.models import Prepared, load_model
from llava_keeplora.saved_run import extended
from llava_keeplora.sequence.start_adapter import write_start_adapter
from llava_keeplora.start import load_tasks

PART = {"rank": 2, "alpha": 3, "energy_weight": 0.5, "energy_feature": 0.9}
#: Whole batches and no clipping, so that a bare loop needs no sampler of its own.
TRAINING = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 24,
    "learning_rate": 0.01,
    "max_grad_norm": 0,
    "use_cpu": True,
}


@pytest.fixture(scope="session")
def settings(run_tree):
    """Changes of `run_tree` for a run of KeepLoRA that is trained on whole batches."""
    return {"parts": {"vision": PART, "text": PART}, "training": TRAINING, "methods": {"keeplora": {}}}


def train_B(folder: Path, config: RunConfig, out: Path, steps: int = 3) -> Path:
    """Train B alone by PEFT and a bare loop: AdamW, a linear schedule."""
    from peft import PeftModel

    task, family = load_tasks(config)[-1], load_model(config.model)
    model = PeftModel.from_pretrained(family.model, folder, is_trainable=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    inputs = family.inputs(task.train, Prepared(family, task.train))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, loss_of = torch.optim.AdamW(trained, weight_decay=0.0), family.task(task.recipe)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = TRAINING["learning_rate"] * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(**inputs.collate(list(range(len(inputs)))))["loss"].backward()
        optimizer.step()
    model.save_pretrained(out)
    return out


def test_plain_peft_trains_from_it_what_the_driver_trains_and_adopt_takes_it_back_whole(
    settings, run_config, driven, tiny_tasks, tmp_path
):
    task = [str(tiny_tasks[0])]
    whole = driven(run_config(tmp_path / "whole", tasks=task, **settings))
    config = run_config(tmp_path / "unused", tasks=task, **settings)
    started = write_start_adapter(config, tmp_path / "start")
    A = load_file(tmp_path / "start/adapter_model.safetensors")
    own = load_file(whole / "keeplora/task-01-colours/adapters.safetensors")
    assert started.layers == 16 and "freeze every `lora_A`" in (tmp_path / "start/README.md").read_text()
    for key, value in own.items():
        torch.testing.assert_close(A[f"base_model.model.{key[:-2]}.lora_A.weight"], value, atol=1e-6, rtol=0)
    trained = train_B(tmp_path / "start", config, tmp_path / "trained")
    run = driven(run_config(tmp_path / "run", tasks=task, adopted=[str(trained)], **settings))
    record = json.loads((run / "keeplora/task-01-colours/train.json").read_text())["adopted"]
    assert record["removed"] < 1e-12 and "before" not in record
    expected = load_deltas(whole / "keeplora/task-01-colours/delta.safetensors")
    taken = load_deltas(run / "keeplora/task-01-colours/delta.safetensors")
    assert taken.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(taken[name].dense(), delta.dense(), atol=1e-4, rtol=1e-2)


def test_from_a_run_it_is_outside_of_what_the_run_protects_and_writes_nothing_there(
    one_task_run, tiny_clip, tiny_tasks, tmp_path
):
    run = Path(shutil.copytree(one_task_run, tmp_path / "run"))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    started = write_start_adapter(extended(run, str(tiny_tasks[1])), tmp_path / "start")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before
    bases = {}
    for folder in ("task-00-base", "task-01-colours"):
        for name, columns in load_file(run / "keeplora" / folder / "state.safetensors").items():
            bases.setdefault(name, []).append(columns)
    for key, value in load_file(tmp_path / "start/adapter_model.safetensors").items():
        if "lora_A" in key:
            M = torch.cat(bases[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")], dim=1)
            assert (value @ M).abs().max() < 1e-5
            torch.testing.assert_close(value @ value.T, torch.eye(len(value)), atol=1e-5, rtol=0)
    base = tmp_path / "start/base"
    assert started.base == str(base)
    readme = (tmp_path / "start/README.md").read_text()
    assert f"`{base}`, which holds what the run knows" in readme
    assert f"llava-keeplora adopt TRAINED --task {tiny_tasks[1]} --into {run}" in readme
    merged, deltas = (
        load_file(base / "model.safetensors"),
        load_deltas(run / "keeplora/task-01-colours/delta.safetensors"),
    )
    for name, before in load_file(tiny_clip / "model.safetensors").items():
        delta = deltas.get(name.removesuffix(".weight"))
        change = (
            delta.scale * delta.B.double() @ delta.A.double() if delta and name.endswith(".weight") else 0
        )
        torch.testing.assert_close(merged[name].double(), before.double() + change, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="learned the task 'colours' already"):
        write_start_adapter(extended(run, str(tiny_tasks[0])), tmp_path / "other")
    with pytest.raises(ConfigError, match="start exists already"):
        write_start_adapter(extended(run, str(tiny_tasks[1])), tmp_path / "start")


@pytest.mark.slow
def test_the_commands_begin_runs_with_what_somebody_has(
    tiny_clip, peft_adapter, own_tasks, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(own_tasks[0].parent)
    adapter = peft_adapter(tmp_path / "adapter")
    small = [
        "parts.vision.rank=2",
        "parts.text.rank=2",
        "parts.text.energy_weight=0.5",
        "training.use_cpu=true",
    ]
    small += ["training.num_train_epochs=1"]
    commands = [
        ["start-adapter", "--model", str(tiny_clip), "--task", "colours.yaml", "--into", "start", *small],
        ["import", str(adapter), "--task", "colours.yaml", "--into", "imported", "training.use_cpu=true"],
        ["extend", str(tiny_clip), "--task", "colours.yaml", "--into", "kept", *small],
        ["adopt", str(adapter), "--task", "stripes.yaml", "--into", "kept"],
        ["import", str(adapter), "--task", "colours.yaml", "--into", "imported", "training.use_cpu=true"],
    ]
    for command in commands:
        assert cli.main(command) == 0, capfd.readouterr().err
    assert "stripes was adopted from adapter" in capfd.readouterr().out
    config = json.loads(Path("imported/config.json").read_text())
    assert config["parts"]["vision"]["rank"] == 2 and config["parts"]["vision"]["alpha"] == 3
    assert json.loads(Path("kept/keeplora/task-02-stripes/train.json").read_text())["adopted"]["removed"] > 0
    assert cli.main(["import", str(adapter), "--into", "other"]) == 2
    assert "say what it learned with --task" in capfd.readouterr().err


def test_a_new_run_protects_the_weights_of_its_checkpoint(tiny_clip, tiny_tasks, tmp_path):
    config = new_run(str(tiny_clip), str(tiny_tasks[0]), tmp_path / "run")
    assert set(config.parts) == {"vision", "text"} and list(config.methods) == ["keeplora"]
    assert config.model.name_or_path == str(tiny_clip) and config.adopted == ()
