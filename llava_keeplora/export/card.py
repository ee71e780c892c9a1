"""The model card of an export, written from what the run recorded, with nothing left to fill in."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData

from llava_keeplora.export.adapter import vllm_rank
from llava_keeplora.export.exported import Exported
from llava_keeplora.export.loaded_run import Base, LearnedRun
from llava_keeplora.export.serving import unserved_parts, vllm_command
from llava_keeplora.export.state import FOLDER, placeless, public
from llava_keeplora.methods import METHODS
from llava_keeplora.models import Usage
from llava_keeplora.report import heatmap
from llava_keeplora.report.adopted import adopted_lines
from llava_keeplora.report.tables import SCORE_COLUMNS, markdown_table, score_rows, summary_table
from llava_keeplora.run_folder import SCORES, Stage, read_record
from llava_keeplora_eval.markup import markdown_text
from llava_keeplora_eval.matrix import BOUND
from llava_keeplora_recipes import Recipe

PLOT = "matrix.png"
UNSERVED = "vLLM's list of models has no adapters of this type: to serve it, export with `--as merged`."
LIBRARIES = ("llava-keeplora", "torch", "transformers", "peft")


def snippet(usage: Usage, name: str, base: Base | None, adapters: Sequence[str] = ()) -> str:
    """Return Python code that loads an export and runs it on an image.

    Args:
        usage: how a model of this family is loaded and called.
        name: the export's folder or Hub id.
        base: the base of an adapter; None for a merged checkpoint.
        adapters: names of a set's adapters, the last of which is used.
    """
    auto = usage.auto_class
    path = json.dumps(base.id if base else name)
    revision = f", revision={json.dumps(base.revision)}" if base and base.revision else ""
    lines = [
        "from PIL import Image",
        *(["from peft import PeftModel"] if base else []),
        f"from transformers import {auto}, AutoProcessor",
        "",
        f"model = {auto}.from_pretrained({path}{revision})",
        *(_adapting(name, adapters) if base else []),
        f"processor = AutoProcessor.from_pretrained({path}{revision})",
        'image = Image.open("image.png").convert("RGB")',
        *usage.example,
    ]
    return "\n".join(lines)


def _adapting(name: str, adapters: Sequence[str]) -> Iterable[str]:
    """Yield the lines that put an adapter, or all of a set, on `model`."""
    if not adapters:
        yield f"model = PeftModel.from_pretrained(model, {json.dumps(name)})"
        return
    place, (first, *others) = json.dumps(name), map(json.dumps, adapters)
    yield f"model = PeftModel.from_pretrained(model, {place}, adapter_name={first}, subfolder={first})"
    yield from (f"model.load_adapter({place}, {other}, subfolder={other})" for other in others)
    yield f"model.set_adapter({json.dumps(adapters[-1])})"


def write_card(
    folder: Path, name: str, learned: LearnedRun, base: Base, done: Exported, usage: Usage
) -> None:
    """Write README.md and a heat map of the accuracy matrix for an export of one model.

    Args:
        folder: the export's folder.
        name: the name under which the export is loaded.
        learned: the run up to the exported task.
        base: the base's id and revision.
        done: a description of the export.
        usage: how a model of this family is loaded and called.
    """
    own = OwnWords(_what(done), list(_loading(name, base, done, usage)), _exactness(done))
    write_page(folder, name, learned, base, done.form, usage, own)


@dataclass(frozen=True)
class OwnWords:
    """What a card says of its export alone.

    Args:
        what: sentences on what the export is.
        loading: paragraphs on how to load it.
        exactness: sentences on how exact it is.
    """

    what: str
    loading: Sequence[str]
    exactness: str


def write_page(
    folder: Path, name: str, learned: LearnedRun, base: Base, form: str, usage: Usage, own: OwnWords
) -> None:
    """Write README.md and a heat map of the accuracy matrix.

    Args:
        folder, name, learned, base, usage: as for `write_card`.
        form: the export's form.
        own: what is said of this export alone.
    """
    for drawing in heatmap(learned.matrix, folder / PLOT, f"{learned.label}: score in % after each task")[1:]:
        drawing.unlink()  # The Hub's cards show PNG alone.
    count, record = len(learned.deltas), METHODS[learned.config["methods"][learned.label]["method"]].info
    names = ", ".join(recipe.name for recipe in learned.recipes[:count])
    at = f" at revision `{base.revision}`" if base.revision else ""
    blocks = [
        f"---\n{_metadata(learned, base, form, usage).to_yaml()}\n---",
        f"# {markdown_text(name.split('/')[-1])}",
        f"[{markdown_text(base.id)}](https://huggingface.co/{quote(base.id)}){at}, taught "
        f"{counted(count, 'task')}{_order(learned)}: {names}.\n"
        f"The method is `{record.name}` ([{record.title}]({record.url})), run by llava-keeplora "
        f"{importlib.metadata.version('llava-keeplora')}. " + own.what,
        "## How to load it",
        *own.loading,
        "## Scores",
        _rows(learned),
        f"![score of every task after every stage]({PLOT})",
        learned.matrix.markdown(),
        summary_table({learned.label: [learned.matrix]}),
        markdown_table(["task", *SCORE_COLUMNS], score_rows(learned.matrix.tasks, _stages(learned))),
        "## Tasks and data",
        markdown_table(
            ["task, in order", "version", "kind", "metric", "licence", "source"],
            [_task(recipe) for recipe in learned.recipes[:count]],
        ),
        "What was learned from these sets comes with their licences, and with the base model's.",
        "## Settings",
        _settings(learned),
        "## How exact it is",
        own.exactness,
    ]
    (folder / "README.md").write_text("\n\n".join(block.strip() for block in blocks) + "\n", encoding="utf-8")


def _order(learned: LearnedRun) -> str:
    """Return how several tasks were learned."""
    if len(learned.deltas) == 1:
        return ""
    if learned.method.cumulative:
        return " one after another"
    together = learned.method.bound and not learned.method.separate_tasks
    return " together" if together else ", each alone from the base"


def _rows(learned: LearnedRun) -> str:
    """Return what the rows of the matrix are."""
    if learned.matrix.bound:
        return (
            f"Each column is a task's test score in percent; the row `{BOUND}` is what {learned.label} ends "
            "at, which learns in no order, Last its mean."
        )
    return (
        "Each row is the model after one more task, each column a task's test score in percent; Transfer is "
        "the mean before a task is learned, Last the score after the final one."
    )


def _metadata(learned: LearnedRun, base: Base, form: str, usage: Usage) -> ModelCardData:
    library = {"merged": "transformers", "state": "llava-keeplora"}.get(form, "peft")
    recipes = learned.recipes[: len(learned.deltas)]
    tags = [
        learned.config["methods"][learned.label]["method"],
        "continual-learning",
        "llava-keeplora",
        usage.family,
    ]
    return ModelCardData(
        base_model=base.id,
        base_model_relation="adapter" if library == "peft" else "finetune",
        library_name=library,
        pipeline_tag=usage.pipeline_tag,
        tags=list(
            dict.fromkeys([*tags, *([f"base_model:adapter:{base.id}", "lora"] if library == "peft" else [])])
        ),
        datasets=list(
            dict.fromkeys(recipe.source["path"] for recipe in recipes if recipe.source["format"] == "hub")
        )
        or None,
        metrics=list(dict.fromkeys(recipe.metric_name for recipe in recipes)),
    )


def _what(done: Exported) -> str:
    if done.form == "merged":
        return "This is the whole model, base and updates in one checkpoint."
    if done.form == "state":
        return (
            "This is what the run needs to learn further tasks elsewhere; it is no adapter and no checkpoint."
        )
    shape = f"one LoRA of rank {done.adapter.rank} on {counted(len(done.adapter.layers), 'layer')}"
    return f"This is {shape}, the sum of the tasks' updates" + (
        f", compressed with a relative error of {done.adapter.error:.2%}." if done.compressed else "."
    )


def _loading(name: str, base: Base, done: Exported, usage: Usage) -> Iterable[str]:
    if done.form != "state":
        yield f"```python\n{snippet(usage, name, base if done.form == 'adapter' else None)}\n```"
    if done.form == "adapter" and usage.served_by_vllm:
        limit = vllm_rank(done.adapter.rank)
        if limit:
            command = vllm_command(base, limit, {"learned": name}, done.language_only)
            yield f"With vLLM, by its documented rules:\n\n```\n{command}\n```"
            yield from unserved_parts(done.language_only)
        else:
            yield (
                f"Rank {done.adapter.rank} is more than vLLM loads (512); export with `--rank 512`, or "
                "`--as merged`."
            )
    elif done.form == "adapter" and usage.pipeline_tag == "image-text-to-text":
        yield UNSERVED
    if done.form == "state" or done.with_state:
        yield continuing(name, done.form)


def continuing(name: str, form: str) -> str:
    """Return the paragraph on teaching an export further tasks."""
    where = "" if form == "state" else f" (what that needs lies in `{FOLDER}`)"
    command = f"llava-keeplora import {name} --into runs/continued"
    return f"To teach it further tasks{where}:\n\n```\n{command}\n```"


def _stages(learned: LearnedRun) -> list[dict[str, Any]]:
    """Return the scores of the base and after each task; of a stage that was scored twice, the last ones."""
    scored = [entry for entry in learned.entries if entry.stage == Stage.EVALUATED]
    latest = {entry.task: entry.file(SCORES) for entry in scored}
    return [read_record(learned.run / learned.label / latest[task]) for task in sorted(latest)]


def _task(recipe: Recipe) -> list[str]:
    source = (
        recipe.source["path"] if recipe.source["format"] == "hub" else recipe.homepage or recipe.format_name
    )
    return [recipe.name, str(recipe.version), recipe.kind, recipe.metric_name, recipe.licence, source]


def _settings(learned: LearnedRun) -> str:
    config, method = learned.config, learned.config["methods"][learned.label]
    told = ("dtype", "quantization", "max_length", "attn_implementation")
    model = {key: config["model"][key] for key in told if config["model"].get(key) is not None}
    rows = [
        ["seed", str(config["seed"])],
        ["base", _listed(model)],
        ["method", METHODS.portable_name(method["method"])],
        ["options", _listed(placeless(method["options"]))],
    ]
    rows += [
        [f"part `{part}`", _listed({k: v for k, v in settings.items() if v is not None})]
        for part, settings in method["parts"].items()
    ]
    rows += [["adopted", line] for line in adopted_lines(learned.label, learned.run / learned.label)]
    held_out, limit = config["data"]["holdout"], config["data"].get("train_examples")
    rows += [
        ["training", _listed(public(method["training"]))],
        ["training examples of a task", f"about {limit}" if limit else "all"],
        ["scored on", f"{held_out:.0%} of train, held out" if held_out else "test"],
    ]
    rows += [["versions", _listed({name: importlib.metadata.version(name) for name in LIBRARIES})]]
    return "| setting | value |\n| --- | --- |\n" + "\n".join(
        f"| {name} | {markdown_text(value)} |" for name, value in rows
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items()) or "none"


def _exactness(done: Exported) -> str:
    lines = [
        f"Loaded again in a fresh process and compared on {counted(done.examples, 'real example')}: logits "
        "in fp32 are "
        f"{done.reloaded.largest:.1g} off what was meant at most. Against the model that the run trained and "
        "scored, the relative deviation "
        f"is {done.own.relative:.2g} in fp32, with the same best choice in {done.own.same:.1%}, and "
        f"{done.bfloat16.relative:.2g} in "
        f"bfloat16, with the same best choice in {done.bfloat16.same:.1%}."
    ]
    if done.compressed:
        lines.append(
            f"Compressing lost {done.adapter.error:.2%} of the updates' norm, {done.adapter.worst:.2%} in "
            "the worst layer."
        )
    if done.rounding:
        lines.append(f"The weights are {done.rounding.describe()}.")
    if done.left_out:
        lines.append(
            f"Left out, though the run trained them: {', '.join(done.left_out)}. The scores above are those "
            "of the whole."
        )
    return " ".join(lines)


def counted(count: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{count} {what}{'' if count == 1 else 's'}"
