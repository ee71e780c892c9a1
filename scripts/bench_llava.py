"""Parts of a task of a model that answers, and the ordinary way to the same work.

Generation, training step, training by the Trainer, data loading. Pairs are as in bench_passes.py.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from bench_passes import RANK, Pair, adapter_steps
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, PrinterCallback, Trainer, set_seed

from llava_keeplora.adapters import AdapterInit, attach
from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.methods import METHODS, TaskContext
from llava_keeplora.models import load_model
from llava_keeplora.sequence.checkpoint import StepCheckpoint
from llava_keeplora.sequence.data import ImageCache
from llava_keeplora.sequence.trainer import Indices, TaskTrainer
from llava_keeplora.start.training_args import training_arguments
from llava_keeplora_recipes import load_recipe, load_split

TASK, ANSWERS, BATCH, BATCHES = "scene-captions", 200, 32, 4
STEPS = 8  # of a training by the Trainer, which sets itself up each time


class Setting:
    """An embedded model that answers, on one rendered task.

    Args:
        model: its name.
    """

    def __init__(self, model: str):
        self.model = model
        self.data = load_split(load_recipe(TASK), "test").take(range(ANSWERS))
        self.family = load_model(ModelConfig(model), EvaluationConfig(max_new_tokens=32))
        self.images = ImageCache(self.family.prepare, budget_gb=1.0).split(self.data)
        self.inputs = self.family.inputs(self.data, self.images)
        self.batches = [
            self.inputs.collate(range(start, start + BATCH)) for start in range(0, BATCH * BATCHES, BATCH)
        ]
        parts = ((part, self.family.targets[part]) for part in self.family.parts)
        self.layers = [name for part, targets in parts for name in self.family.linear_layers(part, targets)]


def generation(model: str) -> Pair:
    """Compare answers in batches with one answer at a time."""
    setting = Setting(model)
    predictor = setting.family.predictor(setting.data.recipe, setting.images)
    examples = list(setting.data)

    def one_by_one() -> None:
        for example in examples:
            predictor.predict([example])

    return (
        f"{model}: answers in batches of 100 / one by one",
        one_by_one,
        lambda: [predictor.predict(examples[i : i + 100]) for i in (0, 100)],
        f"{ANSWERS} captions",
    )


def training_step(model: str) -> Pair:
    """Compare a KeepLoRA step (A frozen) with a PEFT LoRA step of equal rank."""
    setting = Setting(model)
    plain, ours = (
        adapter_steps(load_model(ModelConfig(model)), setting.data, setting.layers, setting.batches, train_A)
        for train_A in (True, False)
    )
    return (
        f"{model}: KeepLoRA step / PEFT LoRA step",
        plain,
        ours,
        f"rank {RANK}, {len(setting.layers)} layers of all parts, batch {BATCH}",
    )


def trainer(model: str) -> Pair:
    """Compare a task's training with `Trainer` and PEFT on the plain model, on the same batches.

    Both train A and B of the same adapters from the same values, so that they do the same arithmetic.
    """
    setting = Setting(model)
    folder = Path(tempfile.mkdtemp(prefix="bench-trainer-"))
    args = training_arguments(
        {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
        },
        output_dir=str(folder),
        run_name="bench",
        seed=0,
    )
    common = {"args": args, "train_dataset": Indices(BATCH * BATCHES)}
    plain = Trainer(model=_plain_peft(setting), data_collator=partial(_plain_collate, setting), **common)
    plain.remove_callback(PrinterCallback)
    set_seed(0)
    family = load_model(ModelConfig(model))
    attach(family.model, {name: AdapterInit(RANK, RANK, train_A=True) for name in setting.layers})
    method = METHODS["seq-lora"](METHODS["seq-lora"].Options())
    ours = TaskTrainer(
        method=method,
        ctx=TaskContext(1, TASK, {}, lambda *_: None, lambda *_: {}, 0, 0),
        on_step=lambda: None,
        model=family.task(setting.data.recipe),
        rates={},
        checkpoint=StepCheckpoint(folder),
        data_collator=setting.inputs.collate,
        **common,
    )
    losses = [each.train().training_loss for each in (plain, ours)]
    return (
        f"{model}: a task's training / Trainer and PEFT",
        plain.train,
        ours.train,
        f"{STEPS} steps of {BATCH}, rank {RANK}, {len(setting.layers)} layers; "
        f"mean losses differ by {abs(losses[0] - losses[1]):.0e}",
    )


def _plain_peft(setting: Setting) -> torch.nn.Module:
    """Return the model of transformers with PEFT's adapters on the same layers."""
    set_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(setting.family.path, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=setting.layers))


def _plain_collate(setting: Setting, indices: list[int]) -> dict[str, torch.Tensor]:
    """Return the same batch without what this project adds to it."""
    batch = setting.inputs.collate(indices)
    del batch["image_rows"]
    return batch


def loading(model: str) -> Pair:
    """Compare steps on batches from the Trainer's loader with the same steps on batches in memory."""
    setting = Setting(model)
    indices = Indices(BATCH * BATCHES)
    loader = DataLoader(indices, BATCH, collate_fn=setting.inputs.collate)
    plain, ours = (
        adapter_steps(load_model(ModelConfig(model)), setting.data, setting.layers, batches, False)
        for batches in (setting.batches, loader)
    )
    return f"{model}: step with data loading / step alone", plain, ours, "images and token ids in memory"


PAIRS = {
    "generation": partial(generation, "tiny-llava"),
    "llava-step": partial(training_step, "tiny-llava"),
    "loading": partial(loading, "tiny-llava"),
    "qwen-generation": partial(generation, "tiny-qwen"),
    "qwen-trainer": partial(trainer, "tiny-qwen"),
}
