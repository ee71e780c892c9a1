"""Parts of a LLaVA task and the ordinary way to the same work: generation, training step, data loading.

Pairs are as in bench_passes.py.
"""

from __future__ import annotations

from bench_passes import RANK, Pair, adapter_steps
from torch.utils.data import DataLoader

from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.models import load_model
from llava_keeplora.sequence.data import ImageCache
from llava_keeplora.sequence.trainer import Indices
from llava_keeplora_recipes import load_recipe, load_split

TASK, ANSWERS, BATCH, BATCHES = "scene-captions", 200, 32, 4


class Setting:
    """The embedded LLaVA on one rendered task."""

    def __init__(self):
        self.data = load_split(load_recipe(TASK), "test").take(range(ANSWERS))
        self.family = load_model(ModelConfig("tiny-llava"), EvaluationConfig(max_new_tokens=32))
        self.images = ImageCache(self.family.prepare, budget_gb=1.0).split(self.data)
        self.inputs = self.family.inputs(self.data, self.images)
        self.batches = [
            self.inputs.collate(range(start, start + BATCH)) for start in range(0, BATCH * BATCHES, BATCH)
        ]
        parts = ((part, self.family.targets[part]) for part in self.family.parts)
        self.layers = [name for part, targets in parts for name in self.family.linear_layers(part, targets)]


def generation() -> Pair:
    """Compare answers in batches with one answer at a time."""
    setting = Setting()
    predictor = setting.family.predictor(setting.data.recipe, setting.images)
    examples = list(setting.data)

    def one_by_one() -> None:
        for example in examples:
            predictor.predict([example])

    return (
        "answers in batches of 100 / one by one",
        one_by_one,
        lambda: [predictor.predict(examples[i : i + 100]) for i in (0, 100)],
        f"{ANSWERS} captions",
    )


def training_step() -> Pair:
    """Compare a KeepLoRA step (A frozen) with a PEFT LoRA step of equal rank."""
    setting = Setting()
    plain, ours = (
        adapter_steps(
            load_model(ModelConfig("tiny-llava")), setting.data, setting.layers, setting.batches, train_A
        )
        for train_A in (True, False)
    )
    return (
        "LLaVA KeepLoRA step / PEFT LoRA step",
        plain,
        ours,
        f"rank {RANK}, {len(setting.layers)} layers of all parts, batch {BATCH}",
    )


def loading() -> Pair:
    """Compare steps on batches from the Trainer's loader with the same steps on batches in memory."""
    setting = Setting()
    indices = Indices(BATCH * BATCHES)
    loader = DataLoader(indices, BATCH, collate_fn=setting.inputs.collate)
    plain, ours = (
        adapter_steps(load_model(ModelConfig("tiny-llava")), setting.data, setting.layers, batches, False)
        for batches in (setting.batches, loader)
    )
    return "step with data loading / step alone", plain, ours, "images and token ids in memory"


PAIRS = {"generation": generation, "llava-step": training_step, "loading": loading}
