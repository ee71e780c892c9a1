"""`transformers.Trainer` on one task: the method's loss, and checks that what should train does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from llava_keeplora.errors import ConfigError, MethodError, TrainingError
from llava_keeplora.methods import Method, TaskContext

CURE = (
    "start in a new output_dir with a lower training.learning_rate; every task before it is kept, "
    "and the same command goes on from there"
)
TIMINGS = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def without_timings(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's log without clock readings, so that the same training leaves the same file."""
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in history]


def training_arguments(training: Mapping[str, Any], *, output_dir: str, run_name: str, seed: int, epochs: float) -> TrainingArguments:
    """`TrainingArguments` of one task: the user's, and what the driver sets.

    Args:
        training: the `training` section of a configuration.
        output_dir: for what the Trainer itself wants to write.
        run_name: what trackers call this task's training.
        seed: of this task's training.
        epochs: of this task.
    """
    values = {
        "logging_steps": 10,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        # Batches come from memory by index; pinning would only copy them once more.
        "dataloader_pin_memory": False,
        # Every trainable tensor gets a gradient; the first step checks that.
        "ddp_find_unused_parameters": False,
        **training,
        "num_train_epochs": epochs,
        "run_name": run_name,
    }
    return TrainingArguments(
        output_dir=output_dir, seed=seed, data_seed=seed, save_strategy="no", eval_strategy="no", remove_unused_columns=False, **values
    )


class Indices(torch.utils.data.Dataset):
    """0 … n−1: the Trainer shuffles indices, the collator fetches what they stand for."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class TaskTrainer(Trainer):
    """Trains one task with a method's loss.

    Args:
        method: gives the loss and the hook after each step.
        ctx: of the task.
        on_step: called after every optimiser step.
        rates: id of a parameter → its own learning rate; the others train at `args.learning_rate`.
        kwargs: as for `Trainer`.

    Raises:
        TrainingError: on a loss that is not finite, naming the step.
        MethodError: if a trainable tensor gets no gradient in the first step.
    """

    def __init__(self, *, method: Method, ctx: TaskContext, on_step: Callable[[], None], rates: Mapping[int, float], **kwargs):
        super().__init__(**kwargs)
        self.method, self.ctx, self.rates = method, ctx, rates
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(_AfterStep(method, ctx, on_step))
        self._waiting: set[str] | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ):
        """The method's loss on a batch; where a batch counts by its tokens, its share of the mean over the whole optimiser step.

        Args:
            num_items_in_batch: supervised tokens of all accumulated batches of all processes, for a model that
                `accepts_loss_kwargs`; the Trainer then divides by nothing, and averages the processes' gradients.
        """
        out = model(**inputs)
        loss = self.method.loss(self.ctx, inputs, out)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of task '{self.ctx.name}' is {loss.item()} at step {self.state.global_step + 1}",
                CURE,
            )
        if num_items_in_batch is not None:
            own = self.accelerator.unwrap_model(model).weight(inputs)
            counted = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * (own / num_items_in_batch * counted)
        return (loss, out) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None):
        """The Trainer's optimiser, its groups split by learning rate; the schedule scales each group's own rate."""
        optimizer = super().create_optimizer(model)
        if self.rates and not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                "the DeepSpeed JSON brings its own optimizer, which knows one learning rate, but a part of the model has its own",
                "remove `optimizer` and `scheduler` from the DeepSpeed JSON, or `learning_rate` from `parts`",
            )
        if self.rates:
            optimizer.param_groups = [split for group in optimizer.param_groups for split in _by_rate(group, self.rates)]
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args, **kwargs) -> Tensor:
        """One forward and backward pass; the first one checks that every trainable tensor gets a gradient."""
        if self._waiting is not None:
            return super().training_step(model, inputs, *args, **kwargs)
        self._waiting = {name for name, p in model.named_parameters() if p.requires_grad}
        handles = [p.register_hook(lambda grad, n=n: self._waiting.discard(n)) for n, p in model.named_parameters() if p.requires_grad]
        loss = super().training_step(model, inputs, *args, **kwargs)
        for handle in handles:
            handle.remove()
        if self._waiting:
            raise MethodError(
                f"{len(self._waiting)} trainable tensors get no gradient on task '{self.ctx.name}', among them {sorted(self._waiting)[0]}",
                "leave their layers out of the part's targets",
            )
        return loss


def _by_rate(group: dict[str, Any], rates: Mapping[int, float]) -> list[dict[str, Any]]:
    """One parameter group as one per learning rate."""
    chosen = [rates.get(id(p), group["lr"]) for p in group["params"]]
    return [
        {**group, "lr": rate, "params": [p for p, own in zip(group["params"], chosen, strict=True) if own == rate]}
        for rate in sorted(set(chosen))
    ]


class _AfterStep(TrainerCallback):
    def __init__(self, method: Method, ctx: TaskContext, on_step: Callable[[], None]):
        self.method, self.ctx, self.on_step = method, ctx, on_step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.method.after_step(self.ctx, state.global_step)
        self.on_step()
