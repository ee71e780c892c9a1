"""The last optimiser step of an epoch is the mean over its examples, however they are cut into batches."""

import functools

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from llava_keeplora.adapters import load_deltas
from llava_keeplora.methods import Method, TaskContext
from llava_keeplora.sequence.checkpoint import StepCheckpoint
from llava_keeplora.sequence.trainer import Indices, TaskTrainer, collate_with_rows

EXAMPLES = 11


class Squares(nn.Module):
    """Least squares as a task's model whose loss is a mean over examples, as CLIP's is."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.weight_vector = nn.Parameter(torch.zeros(3))

    def forward(self, x, labels):
        return {"loss": ((x @ self.weight_vector - labels) ** 2).mean()}

    def first(self, batch, count):
        return {key: value[:count] for key, value in batch.items()}

    def weight(self, batch):
        return len(batch["labels"])


@pytest.mark.parametrize(("size", "accumulated"), [(16, 1), (8, 2), (4, 4), (4, 2), (3, 2), (2, 8)])
def test_each_step_is_the_mean_over_its_examples(size, accumulated, tmp_path):
    x, y = torch.randn(EXAMPLES, 3), torch.randn(EXAMPLES)
    model = Squares()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        save_strategy="no",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    TaskTrainer(
        method=Method(Method.Options()),
        ctx=TaskContext(1, "squares", {}, None, None, 0, 0),
        on_step=lambda: None,
        rates={},
        checkpoint=StepCheckpoint(tmp_path),
        model=model,
        args=args,
        train_dataset=Indices(EXAMPLES),
        data_collator=functools.partial(
            collate_with_rows, lambda rows: {"x": x[list(rows)], "labels": y[list(rows)]}
        ),
    ).train()
    w, x, y = torch.zeros(3, dtype=torch.float64), x.double(), y.double()
    for _ in range(2):
        for start in range(0, EXAMPLES, size * accumulated):
            part = slice(start, start + size * accumulated)
            w = w - 0.1 * 2 * (x[part].T @ (x[part] @ w - y[part])) / len(y[part])
    torch.testing.assert_close(model.weight_vector.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_accumulated_batches_of_a_clip_run_train_as_one_large_batch(run_config, drive, tmp_path, tiny_tasks):
    """One step of 24 images, of which the last batch of 10 holds 4."""
    results = []
    for name, size, accumulated in (("large", 24, 1), ("accumulated", 10, 3)):
        training = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
            "optim": "sgd",
        }
        changes = {"tasks": [str(tiny_tasks[0])], "training": training, "methods": {"seq-lora": {}}}
        drive(run_config(tmp_path / name, **changes))
        (path,) = (tmp_path / name / "seq-lora").glob("task-01-*/delta.safetensors")
        results.append(load_deltas(path))
    for layer, delta in results[0].items():
        torch.testing.assert_close(delta.dense(), results[1][layer].dense(), atol=1e-7, rtol=1e-3)
