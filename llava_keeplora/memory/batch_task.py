"""A model with a user's batches and loss, as the passes of `llava_keeplora.capture` take a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from llava_keeplora.distributed import all_gather_object
from llava_keeplora.errors import MethodError

#: `loss(model, batch)` returns the mean loss of a batch, or (the mean loss, the batch's weight in the mean).
Loss = Callable[[nn.Module, Any], Any]
#: Label that does not count, as in transformers.
IGNORED = -100


class BatchTask:
    """One task of a memory: the model, its loss, and the batches, which passes may read several times.

    `capture` passes a batch as keyword arguments; here it is always one, `batch`, so that it can be of any
    kind.

    Args:
        model: the plain model.
        batches: a re-iterable of batches, such as a DataLoader or a list; with several processes, this
            process's share.
        loss: see `Loss`; `model(**batch).loss` when None.

    Raises:
        MethodError: for an iterator, which can be read only once.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Loss | None = None):
        if isinstance(batches, Iterator):
            raise MethodError(
                f"the batches are a {type(batches).__name__}, which can be read once, and a task may need "
                "several passes over them",
                "give a DataLoader, or list(batches)",
            )
        self.model, self.loss = model, loss
        self._batches = batches
        self._device = next(model.parameters()).device
        self._weight: float | None = None
        #: The batch that the model sees.
        self.current: Any = None

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Return the mean loss of a batch.

        Raises:
            MethodError: if there is none.
        """
        self.current = batch
        if self.loss is not None:
            value = self.loss(self.model, batch)
        elif isinstance(batch, Mapping):
            value = getattr(self.model(**batch), "loss", None)
        else:
            raise MethodError(
                f"a batch is a {type(batch).__name__}, which can't be passed as model(**batch)",
                "give loss=lambda model, batch: ..., which returns the mean loss of a batch",
            )
        value, self._weight = value if isinstance(value, tuple) else (value, None)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise MethodError(
                f"the loss of a batch must be one number in a tensor (got {_describe(value)})",
                "add labels to the batches so that the model returns its loss, or give loss=lambda model, "
                "batch: ...",
            )
        return {"loss": value.reshape(())}

    def weight(self, batch: Mapping[str, Any]) -> float:
        """Return the weight in the mean loss of the batch that the model has seen last.

        It is what `loss` returned with it, else the number of its labels that count, else 1.
        """
        return _label_count(batch["batch"], self.model) if self._weight is None else float(self._weight)

    @torch.no_grad()
    def scale(self) -> float:
        """Return the sum of the processes' first batches' weights.

        Gradients are divided by it: A depends on their direction alone, and the weight of all batches is
        unknown before the pass.

        Raises:
            MethodError: if a process has no batch.
        """
        weights = all_gather_object(self._first_weight())
        _check_batches([weight is not None for weight in weights])
        return sum(weights) or 1.0

    def _first_weight(self) -> float | None:
        for batch in self._batches:
            batch = send_to_device(batch, self._device)
            if self.loss is not None:
                self(batch)
            return self.weight({"batch": batch})
        return None

    def batches(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Yield ({"batch": batch on the model's device}, whether it counts), equally often in all processes.

        A process that has fewer batches than others repeats its last one, which does not count: shards of
        ZeRO-3 are gathered by all processes together.

        Raises:
            MethodError: if a process has no batch.
        """
        batches, batch = iter(self._batches), None
        while True:
            more = next(batches, None)
            going_on = all_gather_object(more is not None)
            if batch is None:
                _check_batches(going_on)
            if not any(going_on):
                return
            batch = batch if more is None else send_to_device(more, self._device)
            yield {"batch": batch}, more is not None

    def probe(self, batch: Mapping[str, Any]) -> None:
        """Run every layer once."""
        self(**batch)

    def token_mask(self, part: str, batch: Mapping[str, Any]) -> None:
        """Return None: which positions count depends on a layer's input, see `MaskedStatistic`."""
        return None

    @contextmanager
    def constants(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield nothing: a loss of any kind has no part that is known to be the same in every batch."""
        yield []


def _check_batches(by_rank: Sequence[bool]) -> None:
    """Check that every process has a batch.

    Args:
        by_rank: whether each process has one.

    Raises:
        MethodError: naming the first that has none.
    """
    if not all(by_rank):
        where = f" in process {by_rank.index(False)}" if len(by_rank) > 1 else ""
        raise MethodError(f"there is no batch{where}", "give at least one batch of the task's data")


class MaskedStatistic:
    """A statistic of a layer's inputs without those at padding.

    Args:
        statistic: what the inputs are added to.
        task: the task whose current batch the inputs are of.
    """

    def __init__(self, statistic: Any, task: BatchTask):
        self.statistic, self._task = statistic, task

    @property
    def tensors(self) -> list[Tensor]:
        """The statistic's, to be summed over processes."""
        return self.statistic.tensors

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add inputs (..., in), without padding where an attention mask has the shape of their positions."""
        fits = [mask for mask in _attention_masks(self._task.current) if mask.shape == x.shape[:-1]]
        self.statistic.add(x, fits[0].bool() if fits else None)


def _attention_masks(batch: Any) -> list[Tensor]:
    """Return a batch's two-dimensional tensors whose name ends in `attention_mask`."""
    if not isinstance(batch, Mapping):
        return []
    return [
        value
        for key, value in batch.items()
        if str(key).endswith("attention_mask") and isinstance(value, Tensor) and value.ndim == 2
    ]


def _label_count(batch: Any, model: nn.Module) -> float:
    """Return how many labels count in a batch's mean loss, as `transformers.Trainer` counts them; 1 if none.

    The first of a sequence has no prediction in a decoder, whose labels are shifted by one.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return 1.0
    if labels.is_floating_point():
        return float(len(labels))
    shifted = labels.ndim > 1 and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return float((labels[..., 1:] if shifted else labels).ne(IGNORED).sum())


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
