"""Prototypes of tasks: features of the untouched base by which the task of an example is recognised.

Legend: n examples, p width of the features, k prototypes of a task.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava_keeplora.distributed import all_gather_object
from llava_keeplora.errors import MethodError
from llava_keeplora.methods.base import Holding, TaskContext
from llava_keeplora.methods.switching import BASE

#: Keys in a task's state: its prototypes, and the least cosine with them of an example that is the task's.
KEY, LEAST = "prototypes", "prototypes.least"
#: Features that are summed at once.
CHUNK = 1024


class Prototypes:
    """The prototypes of the tasks learned so far.

    Args:
        rejection: the largest share of a task's training examples that may be taken for none of its
            kind, each by the prototypes of the others. An example is the nearest task's if its cosine is
            not below the one that this leaves. 0 for no test.
        states: those of the base and of every task.
    """

    def __init__(self, rejection: float = 0.0, states: Sequence[dict[str, Tensor]] = ()):
        self.rejection = rejection
        #: Prototypes of each task (k, p), of unit length.
        self.tasks = [state[KEY] for state in states if KEY in state]
        #: Each task's least cosine; empty without rejection.
        self.least = [state[LEAST] for state in states if LEAST in state]
        self._added: dict[str, Tensor] = {}

    def learn(self, ctx: TaskContext) -> None:
        """Add the prototypes of a task; the model must be the untouched base.

        The share of the training examples that get this task, among those learned so far, is reported.

        Raises:
            MethodError: the model's family gives no features.
        """
        assert ctx.predictor is not None
        predictor: Any = ctx.predictor()
        if not hasattr(predictor, "features"):
            raise MethodError(
                "the model's predictor has no `features`, by which prototypes recognise a task",
                "set routing to 'oracle', or rejection to 0",
            )
        features, groups, classes = [], [], predictor.class_features()
        for examples in ctx.examples():
            features.append(predictor.features(examples).cpu())
            groups += [0 if classes is None else example.label for example in examples]
        gathered = torch.cat(features) if features else None
        del features
        shares = all_gather_object((gathered, groups))
        rows = torch.cat([share for share, _ in shares if share is not None])
        labels = torch.tensor([label for _, labels in shares for label in labels])
        prompts = None if classes is None else classes.cpu()
        added = prototypes(rows, labels, prompts)
        self.tasks.append(added)
        self._added = {KEY: added}
        if self.rejection:
            own = left_out_cosines(rows, labels, prompts)
            self.least.append(own.kthvalue(int(self.rejection * len(own)) + 1).values.float())
            self._added[LEAST] = self.least[-1]
        ctx.report["routed_right"] = float((self.nearest(rows) == len(self.tasks) - 1).float().mean())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the prototypes that the last `learn` added."""
        return dict(self._added)

    def holds(self) -> dict[str, Holding]:
        """Return what a task's state holds of them."""
        least = {LEAST: Holding(())} if self.rejection else {}
        return {KEY: Holding((None, "features")), **least}

    def cosines(self, features: Tensor) -> Tensor:
        """Return the largest cosine of each example with a task's prototypes (n, tasks).

        Args:
            features: (n, p), of unit length.
        """
        return torch.stack([(features @ task.to(features).T).amax(dim=1) for task in self.tasks], dim=1)

    def nearest(self, features: Tensor) -> Tensor:
        """Return the task of each example (n,), 0 for the first, `BASE` for none; of equal ones the first."""
        largest, tasks = self.cosines(features).max(dim=1)
        if not self.least:
            return tasks
        return tasks.where(largest >= torch.stack(self.least).to(largest)[tasks], BASE)

    def router(self, predictor: Any) -> Callable[[Sequence[Any]], list[int]]:
        """Return a function from examples to the nearest task of each.

        Args:
            predictor: the model's own; the model must be the untouched base when the function is called.
        """
        base = copy.copy(predictor)
        return lambda examples: self.nearest(base.features(examples)).tolist() if examples else []


def prototypes(features: Tensor, groups: Tensor, prompts: Tensor | None) -> Tensor:
    """Return prototypes of unit length, one per group of examples.

    With prompts, a prototype is the mean of the group's mean feature and its prompt's, and the prompt's alone
    where the group has no example.

    Source: Gao et al. 2025, arXiv 2503.10705, for those with prompts.

    Args:
        features: of the examples (n, p), of unit length.
        groups: number of each example's group (n,).
        prompts: of each group (k, p), of unit length; None for groups without prompts.
    """
    return _directions(*_sums(features, groups, prompts), prompts).float()


def left_out_cosines(features: Tensor, groups: Tensor, prompts: Tensor | None) -> Tensor:
    """Return each example's largest cosine with the prototypes as they are without it (n,), in fp64.

    With prototypes that hold the example, those of few examples would be nearer to it than to any new one.

    Args:
        features, groups, prompts: see `prototypes`.
    """
    sums, sizes = _sums(features, groups, prompts)
    whole, found = _directions(sums, sizes, prompts), []
    for rows, members in zip(features.split(CHUNK), groups.split(CHUNK), strict=True):
        rows = rows.double()
        without = _directions(
            sums[members] - rows, sizes[members] - 1, None if prompts is None else prompts[members]
        )
        cosines = rows @ whole.T
        cosines[torch.arange(len(rows)), members] = (rows * without).sum(dim=1)
        found.append(cosines.amax(dim=1))
    return torch.cat(found)


def _sums(features: Tensor, groups: Tensor, prompts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sum of each group's features (k, p) and its number of examples (k,), in fp64."""
    count = int(groups.max()) + 1 if prompts is None else len(prompts)
    sums = torch.zeros(count, features.shape[1], dtype=torch.float64)
    # Chunk by chunk, since all features in fp64 would be twice as large again.
    for rows, members in zip(features.split(CHUNK), groups.split(CHUNK), strict=True):
        sums.index_add_(0, members, rows.double())
    return sums, torch.bincount(groups, minlength=count).double()


def _directions(sums: Tensor, sizes: Tensor, prompts: Tensor | None) -> Tensor:
    """Return the prototypes of groups with these sums and sizes, in fp64; 0 where there is nothing of one."""
    means = sums / sizes.clamp(min=1)[:, None]
    if prompts is not None:
        means = torch.where(sizes[:, None] > 0, (means + prompts.double()) / 2, prompts.double())
    return normalize(means, dim=1)


def check_rejection(share: float) -> None:
    """Check the option `rejection`.

    Raises:
        MethodError: if it is no share.
    """
    if not 0.0 <= share < 1.0:
        raise MethodError(f"rejection must be at least 0 and below 1 (got {share})", "set it to, say, 0.05")
