"""Descriptions of exports: what was written, and how its logits compare with the run's own model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_keeplora.export.adapter import Combined
from llava_keeplora.export.merged import Rounding
from llava_keeplora.export.verify import Deviation

FORMS = ("adapter", "merged", "state")


@dataclass(frozen=True)
class Exported:
    """Description of an export.

    Args:
        folder: where it is.
        form: one of `FORMS`.
        tasks: number of tasks that it has learned.
        adapter: the combined deltas; None for another form than `adapter`.
        compressed: whether the adapter was compressed to a lower rank.
        with_state: whether an adapter's folder also has the state that `import` needs.
        left_out: parts that the method changed and the export doesn't hold.
        language_only: whether it changes the language model alone.
        examples: number of examples that logits were compared on.
        reloaded: the export as a fresh process loads it against the model that was to be written, in fp32.
        own: the export in fp32 against the run's own model.
        bfloat16: the export in bfloat16 against the run's own model.
        rounding: what a merged checkpoint's dtype loses of the updates; None for another form.
    """

    folder: Path
    form: str
    tasks: int
    adapter: Combined | None
    compressed: bool
    with_state: bool
    left_out: Sequence[str]
    language_only: bool
    examples: int
    reloaded: Deviation
    own: Deviation
    bfloat16: Deviation
    rounding: Rounding | None = None

    def describe(self) -> str:
        """Return the description as lines of text, for the terminal."""
        what = {"merged": "base and updates merged", "state": "what the run needs to go on"}
        if self.adapter:
            what["adapter"] = f"a LoRA of rank {self.adapter.rank} on {len(self.adapter.layers)} layers"
        lines = [f"{self.folder}: {what[self.form]}, after {self.tasks} task{'' if self.tasks == 1 else 's'}"]
        if self.compressed:
            lines.append(
                f"compressed: {self.adapter.error:.2%} of the updates' norm is lost, "
                f"{self.adapter.worst:.2%} in the worst layer"
            )
        if self.rounding:
            lines.append(self.rounding.describe())
        if self.left_out:
            lines.append(f"left out, though the run trained it: {', '.join(self.left_out)}")
        lines.append(
            f"loaded again in a fresh process: logits of {self.examples} examples in fp32 are "
            f"{self.reloaded.largest:.2g} off at most"
        )
        for form, deviation in (("fp32", self.own), ("bfloat16", self.bfloat16)):
            lines.append(
                f"against the run's own model, in {form}: largest deviation {deviation.largest:.2g}, "
                f"{deviation.relative:.2%} of the logits' norm, the same best choice in {deviation.same:.1%}"
            )
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Member:
    """One adapter of a set.

    Args:
        name: its folder, and the name under which it is loaded.
        task: the number of its task, from 1.
        rank: its rank, one of `VLLM_RANKS`.
        error: relative error ‖ΔW − B A‖ / ‖ΔW‖ over all layers (Frobenius norms).
        losses: the same for every layer; 0 where nothing was compressed.
        reloaded: the adapter as a fresh process loads it against what was to be written, in fp32.
        own: the same against the run's own model of that stage; None for a task's own update.
    """

    name: str
    task: int
    rank: int
    error: float
    losses: Mapping[str, float]
    reloaded: Deviation
    own: Deviation | None

    @property
    def worst(self) -> float:
        """The relative error of the layer where it is largest."""
        return max(self.losses.values())


@dataclass(frozen=True)
class AdapterSet:
    """Description of a set of adapters of one base.

    Args:
        folder: where it is; every adapter is a folder in it.
        each: `stage`, if an adapter is the model after its task, or `task`, if it is that task's own update.
        loss: the largest relative error of a layer that was allowed; 0 for exact adapters.
        members: the adapters, in the order of the tasks.
        targets: leaf names of all adapted layers.
        left_out: parts that the method changed and the set doesn't hold.
        language_only: whether it changes the language model alone.
        examples: number of examples that logits were compared on.
        with_state: whether the folder also has the state that `import` needs.
        picked: what picks the adapter of an example, a sentence, if every task is answered by its own
            adapter alone; empty if their sum is the model.
    """

    folder: Path
    each: str
    loss: float
    members: Sequence[Member]
    targets: Sequence[str]
    left_out: Sequence[str]
    language_only: bool
    examples: int
    with_state: bool
    picked: str = ""

    @property
    def max_rank(self) -> int:
        """The largest rank of an adapter, which a server must allow."""
        return max(member.rank for member in self.members)

    def describe(self) -> str:
        """Return the description as lines of text, for the terminal."""
        what = "the model after every task" if self.each == "stage" else "every task's own update"
        lines = [f"{self.folder}: {what}, as {len(self.members)} adapters of one base"]
        for member in self.members:
            line = f"{member.name}: rank {member.rank} on {len(member.losses)} layers"
            if member.worst:
                line += (
                    f", {member.error:.2%} of the update's norm lost, {member.worst:.2%} in the worst layer"
                )
            if member.own:
                line += (
                    f"; against the run's own model {member.own.relative:.2%} of the logits' norm off, the "
                    f"same best choice in {member.own.same:.1%}"
                )
            lines.append(line)
        if self.picked:
            lines.append(self.picked)
        if self.left_out:
            lines.append(f"left out, though the run trained it: {', '.join(self.left_out)}")
        largest = max(member.reloaded.largest for member in self.members)
        lines.append(
            f"loaded and switched in a fresh process: logits of {self.examples} examples in fp32 are "
            f"{largest:.2g} off at most"
        )
        return "\n".join(lines) + "\n"
