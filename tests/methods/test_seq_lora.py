"""The identities of sequential LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from llava_keeplora.adapters import load_deltas
from llava_keeplora.methods import find_changed
from llava_keeplora.methods.seq_lora import SequentialLora
from llava_keeplora.models import Prepared, load_model
from llava_keeplora.sequence.data import stage_seed
from llava_keeplora_recipes import load_recipe, load_split

RATE, STEPS = 0.05, 3
#: All of a task's examples in every step, so that no order of them counts.
TRAINING = {
    "optim": "sgd",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": STEPS,
    "per_device_train_batch_size": 1000,
}


@pytest.fixture
def config(run_config, tiny_tasks, tmp_path):
    parts = {part: {"rank": 2, "alpha": 6} for part in ("vision", "text")}
    return run_config(
        tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(tiny_tasks[0])], training=TRAINING, parts=parts
    )


def test_one_task_is_what_peft_alone_learns(config, driven):
    """LoRA by `get_peft_model` and an optimiser in a loop, from the same seed."""
    run = driven(config)
    ours = load_deltas(next((run / "seq-lora").glob("task-01-*")) / "delta.safetensors")
    family, data = load_model(config.model), load_split(load_recipe(config.tasks[0]), "train")
    layers = find_changed(SequentialLora, config.methods["seq-lora"].parts, family).adapted
    batch = family.inputs(data, Prepared(family, data)).collate(range(len(data)))
    set_seed(stage_seed(config.seed, 1, "TRAINED"))
    model = get_peft_model(family.model, LoraConfig(r=2, lora_alpha=6, target_modules=list(layers)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    task, optimiser = family.task(data.recipe), torch.optim.SGD(trained.values(), lr=RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        task(**batch)["loss"].backward()
        optimiser.step()
    assert len(trained) == 2 * len(ours)
    for name, delta in ours.items():
        A, B = (trained[f"base_model.model.{name}.lora_{letter}.default.weight"].detach() for letter in "AB")
        assert float(delta.B.abs().max()) > 1e-4, "it has learned"
        torch.testing.assert_close(delta.A, A, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(delta.dense(), 3 * B @ A, atol=1e-6, rtol=1e-4)
