"""`transformers.Trainer` for one task: the method's loss, checkpoints, and a check of the gradients."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME

from llava_keeplora.adapters import Delta, FullDelta
from llava_keeplora.deepspeed_zero import forget_engine, is_partitioned
from llava_keeplora.distributed import all_gather_object, sum_over_processes
from llava_keeplora.errors import ConfigError, MethodError, TrainingError
from llava_keeplora.methods import Method, TaskContext
from llava_keeplora.models import Crops
from llava_keeplora.sequence.checkpoint import StepCheckpoint, TrainingState, load_optimizer, optimizer_state
from llava_keeplora.sequence.deepspeed_state import DeepSpeedShard
from llava_keeplora.sequence.mixed_data import SHARE

logger = logging.getLogger(__name__)

CURE = (
    "start in a new output_dir with a lower training.learning_rate; every task before it is kept, "
    "and the same command goes on from there"
)
#: Attributes of the Trainer for the mean loss that its state lacks: the sum of all logged losses, the step of
#: the last one, and the first step.
LOSSES = ("_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")
#: Key of a batch: which examples of the task's training data it has, (batch,).
ROWS = "example_rows"
#: Kind of passes of examples that a step learns from besides its batch, until they are counted as trained on.
FURTHER = "further"
TIMINGS = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def without_timings(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the Trainer's log without time measurements, so that equal trainings write equal files."""
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in history]


def check_finite(
    task: str, steps: int, deltas: Mapping[str, Delta | FullDelta], extra_state: Mapping[str, Tensor]
) -> None:
    """Check what a training has learned.

    Args:
        task: the task's name.
        steps: number of its optimiser steps.
        deltas: layer name → update.
        extra_state: what the method learned besides.

    Raises:
        TrainingError: if a value is not finite.
    """
    values = [(name, value) for name, delta in deltas.items() for value in delta.tensors.values()]
    for name, value in [*values, *extra_state.items()]:
        if not torch.isfinite(value).all():
            raise TrainingError(
                f"the weights of task '{task}' are not finite after its {steps} steps, first in layer {name}",
                CURE,
            )


def release(trainer: Trainer, model: nn.Module) -> None:
    """Free what a finished training holds, and freeze the model again; the caller drops the trainer."""
    trainer.accelerator.free_memory()
    forget_engine(model.parameters())
    model.eval().requires_grad_(False)


class Indices(torch.utils.data.Dataset):
    """The indices 0 … n−1, which the Trainer shuffles and the collator turns into examples."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


def collate_with_rows(
    collate: Callable[[Sequence[int]], dict[str, Tensor]], rows: Sequence[int]
) -> dict[str, Tensor]:
    """Return some examples as a batch, with which they are under `ROWS`, for `TaskContext.rows`."""
    return {**collate(rows), ROWS: torch.tensor(rows)}


class TaskTrainer(Trainer):
    """`Trainer` of one task with a method's loss.

    Args:
        method: provides the loss and the hook after each step.
        ctx: the task's context.
        on_step: called after every optimiser step.
        rates: id of a parameter → its own learning rate; the others use `args.learning_rate`.
        checkpoint: where the state between two steps is written.
        crops: crops the images of a batch for a step; None if the collator provides the images.
        callbacks: the user's, called after the method's own.
        kwargs: passed to `Trainer`.

    Raises:
        TrainingError: if a loss is not finite; names the step.
        MethodError: if a trainable tensor gets no gradient in the first step.
    """

    def __init__(
        self,
        *,
        method: Method,
        ctx: TaskContext,
        on_step: Callable[[], None],
        rates: Mapping[int, float],
        checkpoint: StepCheckpoint,
        crops: Crops | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.crops = crops
        self.method, self.ctx, self.rates, self.checkpoint = method, ctx, rates, checkpoint
        self._resumed = checkpoint.read()
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # In a notebook it is another one.
        self.remove_callback(PrinterCallback)
        for callback in (_AfterStep(method, ctx, on_step), *callbacks):
            self.add_callback(callback)
        self._without_gradient: set[str] | None = None
        self._shares: deque[float] = deque()
        self._rows: deque[Tensor | None] = deque()

    @property
    def steps_before(self) -> int:
        """Number of steps that a killed run has taken already."""
        return self._resumed.values["trainer"]["global_step"] if self._resumed else 0

    @contextmanager
    def resumed_state(self) -> Iterator[str | None]:
        """Provide `train` with the folder of the state that a killed run left; None if it left none."""
        if self._resumed is None:
            yield None
            return
        # The Trainer reads its state from a folder; everything else is restored below.
        with TemporaryDirectory() as folder:
            Path(folder, TRAINER_STATE_NAME).write_text(json.dumps(self._resumed.values["trainer"]))
            yield folder

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # No checkpoint of the last step: the task's update is about to be written.
            return
        share = self._share()
        if share and share.is_swapped:
            logger.warning(
                "DeepSpeed swaps the optimiser's state to its own files, so no checkpoint is written; a task "
                "that is killed within training begins again"
            )
            return
        local = {"cpu": torch.get_rng_state(), "loss": self._tr_loss}
        local |= {f"passes.{kind}": torch.tensor(count) for kind, count in self.ctx.passes.items()}
        local |= {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        tensors = {
            f"process.{rank}.{name}": value
            for rank, gathered in enumerate(all_gather_object(local))
            for name, value in gathered.items()
        }
        tensors |= {
            f"weights.{name}": p.detach() for name, p in self._trained().items() if not is_partitioned(p)
        }
        tensors |= {f"method.{name}": value for name, value in self.method.progress().items()}
        trained = share.state() if share else optimizer_state(self.optimizer)
        values = {
            "trainer": dataclasses.asdict(self.state) | {"stateful_callbacks": {}},
            "optimizer": trained.values,
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "losses": {key: getattr(self, key) for key in LOSSES},
        }
        if not share:
            tensors |= {f"optimizer.{name}": value for name, value in trained.tensors.items()}
        self.checkpoint.write(
            self.state.global_step, TrainingState(tensors, values), trained.tensors if share else None
        )

    def _share(self) -> DeepSpeedShard | None:
        return DeepSpeedShard(self.deepspeed) if self.is_deepspeed_enabled else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: the state is restored in `_prepare_for_training`, after the engine exists."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ):
        """Set up model, optimiser and schedule, restore a killed run's, and let the method prepare."""
        # None: the Trainer would read DeepSpeed's own checkpoint here, which is a pickle.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._restore()
        self.ctx.forward = functools.partial(self._forward, self.accelerator.unwrap_model(prepared[0]))
        self.method.before_steps(self.ctx)
        return prepared

    @torch.no_grad()
    def _restore(self) -> None:
        state, values, share = self._resumed, self._resumed.values, self._share()
        for name, value in state.under("weights").items():
            self.model.get_parameter(name).copy_(value)
        progress = state.under("method")
        for name, value in self.method.progress().items():
            value.copy_(progress[name])
        if share:
            share.restore(TrainingState(state.tensors, values["optimizer"]))
        else:
            load_optimizer(self.optimizer, state.under("optimizer"), values["optimizer"])
        self.lr_scheduler.load_state_dict(values["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(values["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random generators and the sums of the loss; the Trainer calls it before the first step.

        A process that the checkpoint does not know, because it was written by fewer, continues from its seed.
        """
        local = self._resumed.under(f"process.{self.args.process_index}")
        if local:
            torch.set_rng_state(local["cpu"])
            self._tr_loss = local["loss"].to(self.args.device)
            passes = {name: int(count) for name, count in local.items() if name.startswith("passes.")}
            self.ctx.passes.clear()
            self.ctx.passes.update({name.removeprefix("passes."): n for name, n in passes.items()})
        if "cuda" in local and torch.cuda.is_available():
            torch.cuda.set_rng_state(local["cuda"])
        for key, value in self._resumed.values["losses"].items():
            setattr(self, key, value)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the batches of an optimiser step and their total weight, each example of an epoch once.

        If the last step of an epoch has fewer examples than it could hold, accelerate fills the processes'
        batches up with examples from the epoch's beginning. These are removed again, and each batch counts by
        its examples, so that a step is the mean over them for any number of processes and batches. A process
        that is left without examples keeps one that does not count.
        """
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        # A mixture's batches are weighted as they are made.
        self._shares = deque(batch.pop(SHARE, 1.0) for batch in batches)
        self._rows = deque(batch.pop(ROWS, None) for batch in batches)
        size, world = self.args.train_batch_size, self.accelerator.num_processes
        last = len(self.train_dataset) % (size * world)
        if (
            not last
            or self.args.dataloader_drop_last
            or not batches
            or not self.accelerator.gradient_state.end_of_dataloader
        ):
            return batches, counted
        padded, task = batches[-1], self.accelerator.unwrap_model(self.model)
        examples = min(max(0, last - self.args.process_index * size), size)
        batches[-1] = task.first(padded, max(examples, 1))
        self._rows[-1] = self._rows[-1][: max(examples, 1)]
        # The Trainer takes the mean over the batches, and the processes' gradients are averaged.
        full = len(batches) - 1
        total, scale = full * size * world + last, world * len(batches)
        self._shares = deque(own * scale / total for own in [*[size] * full, examples])
        if counted is not None:
            weight = task.weight(batches[-1]) if examples else 0
            surplus = torch.tensor(task.weight(padded) - weight, device=device)
            if self.args.average_tokens_across_devices:
                sum_over_processes([surplus])
            counted = counted - surplus
        return batches, counted

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Return the method's loss on a batch, times the batch's share of the mean over the processes.

        If batches count by their tokens, the mean is over the whole optimiser step.

        Args:
            num_items_in_batch: supervised tokens of all accumulated batches of all processes, for a model
                that `accepts_loss_kwargs`; the Trainer then does not divide the loss itself, and averages the
                processes' gradients.
        """
        if self.crops:
            inputs = self.crops.filled(inputs, self.state.global_step)
        out = model(**inputs)
        self.ctx.rows = self._rows.popleft()
        loss = self.method.loss(self.ctx, inputs, out)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of task '{self.ctx.name}' is {loss.item()} at step {self.state.global_step + 1}",
                CURE,
            )
        share: float | Tensor = self._shares.popleft()
        if num_items_in_batch is not None:
            tokens = self.accelerator.unwrap_model(model).weight(inputs) if share else 0
            averaged = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            share = tokens / num_items_in_batch * averaged
        loss = loss * share
        return (loss, out) if return_outputs else loss

    def _forward(self, model: nn.Module, **batch: Tensor) -> Any:
        """Return what the model gives for a batch that the method's loss asks it about."""
        self.ctx.passes[FURTHER if torch.is_grad_enabled() else "forward"] += len(batch["labels"])
        return model(**batch)

    def create_optimizer(self, model: nn.Module | None = None):
        """Create the Trainer's optimiser, split its parameter groups by learning rate, or the method's own.

        The schedule scales the rate of each group.

        Raises:
            ConfigError: if a part has its own learning rate but the DeepSpeed JSON configures the optimiser.
        """
        optimizer = super().create_optimizer(model)
        if self.rates and not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                "the DeepSpeed JSON configures an optimizer, which has a single learning rate, but a part of "
                "the model has its own",
                "remove `optimizer` and `scheduler` from the DeepSpeed JSON, or `learning_rate` from `parts`",
            )
        if self.rates:
            optimizer.param_groups = [
                split for group in optimizer.param_groups for split in _by_rate(group, self.rates)
            ]
        if self.method.own_optimizer:
            self.optimizer = optimizer = self.method.create_optimizer(self.ctx, optimizer)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args, **kwargs) -> Tensor:
        """Run one forward and backward pass.

        Raises:
            MethodError: if a trainable tensor gets no gradient in the first pass.
        """
        if self._without_gradient is not None:
            return super().training_step(model, inputs, *args, **kwargs)
        self._without_gradient = {name for name, p in model.named_parameters() if p.requires_grad}
        handles = [
            p.register_hook(lambda grad, n=n: self._without_gradient.discard(n))
            for n, p in model.named_parameters()
            if p.requires_grad
        ]
        loss = super().training_step(model, inputs, *args, **kwargs)
        for handle in handles:
            handle.remove()
        if self._without_gradient:
            raise MethodError(
                f"{len(self._without_gradient)} trainable tensors get no gradient on task "
                f"'{self.ctx.name}', among them {sorted(self._without_gradient)[0]}",
                "leave their layers out of the part's targets",
            )
        return loss


def _by_rate(group: dict[str, Any], rates: Mapping[int, float]) -> list[dict[str, Any]]:
    """Split a parameter group into one per learning rate."""
    rates_of_group = [rates.get(id(p), group["lr"]) for p in group["params"]]
    return [
        {
            **group,
            "lr": rate,
            "params": [
                p for p, chosen in zip(group["params"], rates_of_group, strict=True) if chosen == rate
            ],
        }
        for rate in sorted(set(rates_of_group))
    ]


class _AfterStep(TrainerCallback):
    def __init__(self, method: Method, ctx: TaskContext, on_step: Callable[[], None]):
        self.method, self.ctx, self.on_step = method, ctx, on_step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.method.after_step(self.ctx, state.global_step)
        self.on_step()
