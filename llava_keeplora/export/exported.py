"""The description of an export: what was written, and how its logits compare with the run's own model."""

from __future__ import annotations

from collections.abc import Sequence
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
