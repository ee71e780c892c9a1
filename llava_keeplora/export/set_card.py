"""The card of a set of adapters: how PEFT, vLLM and SGLang load all of them and switch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llava_keeplora.export.card import UNSERVED, OwnWords, continuing, counted, snippet, write_page
from llava_keeplora.export.exported import AdapterSet
from llava_keeplora.export.loaded_run import Base, LearnedRun
from llava_keeplora.export.serving import run_time_commands, sglang_commands, unserved_parts, vllm_command
from llava_keeplora.models import Usage
from llava_keeplora.report.tables import markdown_table

UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


def write_set_card(
    folder: Path, name: str, learned: LearnedRun, base: Base, done: AdapterSet, usage: Usage
) -> None:
    """Write README.md and a heat map of the accuracy matrix for a set of adapters.

    Args:
        folder: the set's folder.
        name: the folder or Hub id under which the set is loaded.
        learned: the run up to the last exported task.
        base: the base's id and revision.
        done: a description of the set.
        usage: how a model of this family is loaded and called.
    """
    own = OwnWords(_what(done), list(_loading(name, base, done, usage)), _exactness(done))
    write_page(folder, name, learned, base, "set", usage, own)


def _what(done: AdapterSet) -> str:
    count = counted(len(done.members), "LoRA adapter")
    if done.each == "stage":
        return (
            f"These are {count} of that base, one for the model after every task: going back a task is "
            "switching an adapter."
        )
    own = f"These are {count} of that base, one for every task's own update"
    return f"{own}. {done.picked}" if done.picked else f"{own}: their sum is the model."


def _loading(name: str, base: Base, done: AdapterSet, usage: Usage) -> Iterator[str]:
    paths = {member.name: f"{name}/{member.name}" for member in done.members}
    table = [[member.name, str(member.rank), f"{member.worst:.2g}"] for member in done.members]
    yield markdown_table(["adapter", "rank", "largest loss of a layer"], table)
    yield f"```python\n{snippet(usage, name, base, list(paths))}\n```"
    if done.each == "stage" and len(paths) > 1:
        yield f"`model.set_adapter({json.dumps(list(paths)[-2])})` goes back a task."
    elif done.each == "task" and not done.picked:
        yield (
            "PEFT adds the active adapters: the model after the last task is "
            f"`model.base_model.set_adapter({json.dumps(list(paths))})`. Servers apply one to a request."
        )
    if usage.served_by_vllm:
        yield from _serving(base, done, paths)
    elif usage.pipeline_tag == "image-text-to-text":
        yield UNSERVED
    if done.with_state:
        yield continuing(name, "set")


def _serving(base: Base, done: AdapterSet, paths: dict[str, str]) -> Iterator[str]:
    last, options = list(paths)[-1], (base, done.max_rank, paths, done.language_only)
    yield (
        "Servers read folders; fetch a set from the Hub first (`hf download`). With vLLM, by its "
        f'documented rules, all at once; a request names one, `"model": "{last}"` for instance:\n\n'
        f"```\n{vllm_command(*options)}\n```"
    )
    yield from unserved_parts(done.language_only)
    yield (
        f"At run time, with `{UPDATING}` set for the server, of which vLLM says that it is for development "
        f"alone:\n\n```\n{run_time_commands(last, paths[last])}\n```"
    )
    if not done.language_only:
        return
    sglang = sglang_commands(base, done.max_rank, paths, done.targets)
    yield (
        f'With SGLang, by its documented rules; a request names `"model": "{base.id}:{last}"`:\n\n'
        f"```\n{sglang}\n```"
    )


def _exactness(done: AdapterSet) -> str:
    largest = max(member.reloaded.largest for member in done.members)
    lines = [
        f"Loaded and switched in a fresh process and compared on {counted(done.examples, 'real example')}: "
        f"logits in fp32 are {largest:.1g} off what was meant at most."
    ]
    compared = [member.own for member in done.members if member.own]
    if compared:
        lines.append(
            "Against the run's own model of the same stage, the relative deviation is "
            f"{max(one.relative for one in compared):.2g} in fp32 at most, with the same best choice in "
            f"{min(one.same for one in compared):.1%} at least."
        )
    if done.loss:
        lines.append(
            f"Every rank is the smallest that vLLM knows at which no layer loses more than {done.loss:.2%} "
            f"of its update's norm; {max(member.worst for member in done.members):.2%} are lost at most."
        )
    else:
        lines.append("Every rank is the smallest that vLLM knows which holds the updates exactly.")
    if done.picked:
        lines.append("The scores above are those of the run, which picked an adapter for every example.")
    elif done.each == "task":
        lines.append("The scores above are those of the sums, not of single updates.")
    if done.left_out:
        lines.append(
            f"Left out, though the run trained them: {', '.join(done.left_out)}. The scores above are those "
            "of the whole."
        )
    return " ".join(lines)
