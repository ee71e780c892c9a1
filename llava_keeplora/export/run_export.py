"""One export from beginning to end.

Read the run, write the form, load it again, describe it, put it in its place.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import llava_keeplora
from llava_keeplora.config import EXPORT_EXAMPLES
from llava_keeplora.errors import ConfigError
from llava_keeplora.export.adapter import Combined, combine, write_adapter
from llava_keeplora.export.card import Usage, write_card
from llava_keeplora.export.loaded_run import filter_parts, load_learned_run, published_base
from llava_keeplora.export.merged import Rounding, merge, write_merged
from llava_keeplora.export.state import FOLDER, RECORD, SUFFIXES, write_state
from llava_keeplora.export.verify import Deviation, probe, verify_export
from llava_keeplora.files import whole_folder, write_json
from llava_keeplora.methods import METHODS
from llava_keeplora.models import DTYPES, open_model
from llava_keeplora.run_folder import BASE
from llava_keeplora.saved_run import recorded_base
from llava_keeplora_eval.files import file_hash
from llava_keeplora_recipes import load_split

FORMS = ("adapter", "merged", "state")


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares.

    Args:
        folder: where it is.
        form: one of `FORMS`.
        tasks: how many it has learned.
        adapter: as it was written, of that form.
        compressed: whether that is an approximation.
        with_state: whether what `import` needs was written beside it.
        left_out: parts that the method changed and the export doesn't hold.
        language_only: whether the language model is all that it changes.
        examples: that logits were compared on.
        reloaded: what a fresh process loaded against what was meant, both in fp32.
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
        """What a person reads at the end."""
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


def export_run(
    run: str | Path,
    form: str,
    into: str | Path | None = None,
    *,
    label: str | None = None,
    at_task: int | None = None,
    parts: Sequence[str] | None = None,
    rank: int | None = None,
    with_state: bool = True,
    base_id: str | None = None,
    name: str | None = None,
    dtype: str | None = None,
    examples: int = EXPORT_EXAMPLES,
    data_root: str | None = None,
) -> Exported:
    """Export what a run learned, compare its logits, and write a model card.

    Args:
        run: the run folder.
        form: `adapter`, `merged` or `state`.
        into: a new or empty folder, or an earlier export's; RUN/export/FORM when None.
        label: the method; the only one of the run where it is left out.
        at_task: the last task, counted from 1; the last finished one when None.
        parts: of an adapter; all when None.
        rank: that an adapter is compressed to; exact when None.
        with_state: whether an adapter brings along what `import` needs.
        base_id: `user/name` or `user/name@revision`, for a base that the run took from a folder.
        name: under which the export will be published, for the card; the folder's when None.
        dtype: of a merged checkpoint, a key of `DTYPES`; the base's own when None.
        examples: of the last task's test split, to compare on.
        data_root: the folder with the data sets; the run's own when None.

    Raises:
        RunError: for a folder that is no run, a task that is not finished, damaged files, or an export that
            does not load as it was meant.
        ConfigError: for a form that cannot hold what was learned, a target that is in use, or options that
            don't go together.
    """
    into = Path(into) if into is not None else Path(run) / "export" / form
    learned = load_learned_run(run, label, at_task)
    _check_options(form, into, parts, rank, dtype, examples)
    if form != "state" and not METHODS[learned.config["methods"][learned.label]["method"]].info.mergeable:
        raise ConfigError(
            f"what '{learned.label}' learned does not merge into the base's weights", "export --as state"
        )
    base = published_base(learned.model, base_id)
    chosen = filter_parts(learned, parts, open_model(learned.model).parts)
    combined, rounding = combine(chosen, rank) if form == "adapter" else None, None

    # What can go wrong for want of data, before any weight is loaded.
    recipe = learned.recipes[len(learned.deltas) - 1]
    data = load_split(
        recipe, "test", data_root or learned.config["data"]["root"], learned.config["data"]["on_bad_image"]
    )
    data = data.take(range(min(examples, len(data))))
    _, own = probe(learned.load(), data)
    gc.collect()

    with whole_folder(into) as tmp_dir:
        if form == "merged":
            family, rounding = merge(learned, dtype)
            write_merged(tmp_dir, family)
            family.model.float()
        else:
            family = learned.load("float32", [combined.layers] if combined and rank else chosen)
        if combined:
            write_adapter(tmp_dir, combined, family.model, family.parts, base)
        if form == "state":
            write_state(learned, base, tmp_dir)
        batch, meant = probe(family, data)
        usage = Usage.of(family, data)
        del family
        gc.collect()
        exact, rounded = verify_export(
            tmp_dir, form, base, batch, meant, len(combined.layers) if combined else None
        )
        if combined and with_state:
            write_state(learned, base, tmp_dir / FOLDER)
        changed = list(learned.config["methods"][learned.label]["parts"])
        kept = list(parts or changed)
        done = Exported(
            folder=into,
            form=form,
            tasks=len(learned.deltas),
            adapter=combined,
            compressed=rank is not None,
            with_state=combined is not None and with_state,
            left_out=[part for part in changed if part not in kept],
            language_only=kept == ["language"],
            examples=len(data),
            reloaded=Deviation.between(exact, meant),
            own=Deviation.between(exact, own),
            bfloat16=Deviation.between(rounded, own),
            rounding=rounding,
        )
        # A state has a list of its own.
        written = {
            path.name: file_hash(path)
            for path in sorted(tmp_dir.glob("*"))
            if path.suffix in SUFFIXES and form != "state"
        }
        record = {
            "form": form,
            "label": learned.label,
            "tasks": done.tasks,
            "version": llava_keeplora.__version__,
            "files": written,
        }
        # By content, so that `predict` with the adapter can refuse another base.
        record |= {BASE: known} if (known := recorded_base(learned.run)) else {}
        write_json(tmp_dir / RECORD, record | ({"rounding": asdict(rounding)} if rounding else {}))
        write_card(tmp_dir, name or into.name, learned, base, done, usage)
    return done


def _check_options(
    form: str, into: Path, parts: Sequence[str] | None, rank: int | None, dtype: str | None, examples: int
) -> None:
    if form not in FORMS:
        raise ConfigError(f"the form is '{form}'", f"choose one of {', '.join(FORMS)}")
    if form != "adapter" and (parts or rank is not None):
        raise ConfigError(
            f"--parts and --rank shape an adapter, and the form is '{form}'",
            "leave them out, or export --as adapter",
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"the dtype is '{dtype}'", f"choose one of {', '.join(DTYPES)}")
    if examples < 1:
        raise ConfigError(f"--examples is {examples}, but logits are compared on something", "give 1 or more")
    if into.exists() and (not into.is_dir() or (any(into.iterdir()) and not (into / RECORD).is_file())):
        raise ConfigError(
            f"{into} is there already and not an empty folder", "choose another one with --into"
        )
