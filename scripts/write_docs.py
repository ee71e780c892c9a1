"""Write the lists in docs/ that the code knows best.

Methods, metrics, tasks, sequences, configurations, commands, the keys of recipes and of their sources, and
the API reference.

    python scripts/write_docs.py            writes them
    python scripts/write_docs.py --check    names the pages that are out of date, and ends with exit code 1 if
    there are any

A list stands between `<!-- generated: NAME -->` and `<!-- end -->`; the text around it is written by hand.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from api_reference import api_reference
from published_figures import BENCHMARKS, published_figures

from llava_keeplora.cli import build_parser
from llava_keeplora.compare.table import Order, Tuning
from llava_keeplora.config import GuardConfig, RunConfig, WatchConfig, list_configs, list_tables
from llava_keeplora.config.expected import ExpectedConfig
from llava_keeplora.config.parts import PartConfig
from llava_keeplora.config.schema import (
    DataConfig,
    EvaluationConfig,
    MemoryConfig,
    MethodConfig,
    ModelConfig,
)
from llava_keeplora.methods import METHODS
from llava_keeplora.models.layouts import LAYOUTS, TOWERS
from llava_keeplora_eval.cli import build_parser as build_eval_parser
from llava_keeplora_eval.encoders import ENCODERS
from llava_keeplora_eval.metrics import METRICS
from llava_keeplora_recipes import Recipe, list_recipes, list_sequences, load_recipe, load_sequence
from llava_keeplora_recipes.formats import COLUMNS
from llava_keeplora_recipes.readers import READERS, is_required, value_word
from llava_keeplora_recipes.recipe_rules import KEYS, REQUIRED

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", flags=re.S)
YES = {True: "yes", False: "no"}
#: What the description of a rendered task says, and the column of its reader says too.
DRAWN = "Drawn on the fly, no files."
#: Sections of docs/configuration.md and docs/compare.md by list: the record, and its fields that are no keys.
SECTIONS: dict[str, tuple[type, Collection[str]]] = {
    "run": (RunConfig, ()),
    "model": (ModelConfig, ()),
    "part": (PartConfig, ()),
    "method": (MethodConfig, ("label", "options")),
    "data": (DataConfig, ()),
    "evaluation": (EvaluationConfig, ()),
    "memory": (MemoryConfig, ()),
    "expected": (ExpectedConfig, ()),
    "guard": (GuardConfig, ()),
    "watch": (WatchConfig, ()),
    "order": (Order, ("name", "tasks")),
    "tuning": (Tuning, ()),
}
#: What the key `extends` means, which no loaded recipe has.
EXTENDS = (
    "name of a recipe that ships, or another YAML, whose keys hold where this one has none; a key is "
    "replaced as a whole, `source` too"
)
#: A name and its meaning under `Args:` or `Attributes:` of a docstring; lines that go on are deeper.
ENTRY = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<meaning>.*(?:\n {6,}.*)*)", flags=re.M)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; a bar within a cell is escaped."""
    header = list(header)
    lines = [
        header,
        ["---"] * len(header),
        *([str(cell).replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def methods() -> str:
    """Return what each method trains, keeps and asks for, from its record."""
    header = (
        "method",
        "trained per task",
        "kept for later tasks, besides the tasks' updates",
        "reference data",
        "task id at test",
        "extra parameters at test",
        "extra cost at test",
        "merges into the base",
    )
    records = [(name, method.info) for name, method in METHODS.items()]
    return table(
        header,
        (
            (
                f"[{name}]({record.url})",
                record.trained,
                record.kept,
                YES[record.reference_data],
                YES[record.task_id_at_test],
                record.extra_parameters,
                record.inference_cost,
                YES[record.mergeable] + (f" ({record.variants})" if record.variants else ""),
            )
            for name, record in records
        ),
    )


def method_options() -> str:
    """Return the settings of every method that has some, with what each means.

    Raises:
        KeyError: the docstring of a method's options says nothing of one.
    """
    rows = []
    for name, method in METHODS.items():
        base = method.Options.__mro__[1]
        inherited = {field.name for field in fields(base)} if is_dataclass(base) else set()
        rows += [(f"`{name}`", *row) for row in field_rows(method.Options, inherited)]
    return table(("method", "setting", "default", "meaning"), rows)


def configuration_keys(kind: type, left_out: Collection[str] = ()) -> str:
    """Return the keys of a section of a run's or a table's configuration, with what each means.

    Args:
        kind: the dataclass of the section.
        left_out: fields that are no keys.

    Raises:
        KeyError: the docstring says nothing of one.
    """
    return table(("key", "default", "meaning"), field_rows(kind, left_out))


def metrics() -> str:
    """Return the name, version, rule, kinds of tasks and source of every metric."""
    rows = (
        (
            f"`{m.name}`",
            m.version,
            m.summary,
            ", ".join(m.kinds),
            ", ".join(m.needs) or "-",
            m.citation or "-",
        )
        for m in METRICS.values()
    )
    return table(("metric", "version", "rule", "kinds of tasks", "needs", "source"), rows)


def tasks() -> str:
    """Return what every task shows, its kind, classes, metric, form of source and licence."""
    rows = []
    for name in list_recipes():
        recipe = load_recipe(name)
        classes = "" if recipe.kind != "classification" else len(recipe.classes or ()) or "from its source"
        rows.append(
            (
                f"`{name}`",
                recipe.description.replace(DRAWN, "").rstrip(". "),
                recipe.kind,
                classes,
                f"`{recipe.metric}`",
                f"`{recipe.source['format']}`",
                recipe.licence,
            )
        )
    return table(("task", "what it shows", "kind", "classes", "metric", "reader", "licence"), rows)


def sequences() -> str:
    """Return the tasks of every sequence in their order, and what it leaves out."""
    rows = []
    for name in list_sequences():
        sequence = load_sequence(name)
        left_out = " ".join(f"Without {task}: {reason}." for task, reason in sequence.not_scored.items())
        rows.append((f"`{name}`", ", ".join(sequence.tasks), f"{sequence.description} {left_out}".strip()))
    return table(("sequence", "tasks", "what it is"), rows)


def configurations() -> str:
    """Return every configuration of a run or a table of runs, with the first sentence of its file."""
    folder = files("llava_keeplora") / "configs"
    rows = []
    for names, command in ((list_configs(), "train"), (list_tables(), "compare")):
        for name in names:
            lines = (folder / f"{name}.yaml").read_text().splitlines()
            comment = " ".join(
                line.lstrip("# ")
                for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
            )
            rows.append((f"`{name}`", f"`{command}`", re.split(r"(?<=\.) (?=[A-Z`])", comment)[0]))
    return table(("configuration", "run by", "what it is"), rows)


def recipe_keys() -> str:
    """Return the keys of a recipe with what each means, from the docstring of `Recipe`.

    Raises:
        KeyError: the docstring says nothing of one.
    """
    meanings = documented(Recipe) | {"extends": EXTENDS}
    rows = (
        (f"`{key}`", word, YES[True] if key in REQUIRED else "", meanings[key])
        for key, (_, word) in KEYS.items()
    )
    return table(("key", "value", "required", "meaning"), rows)


def source_keys(name: str) -> str:
    """Return the kinds that a format can hold, and its keys, with what its reader's docstring says of each.

    Raises:
        KeyError: the docstring says nothing of one.
    """
    reader = READERS[name]
    meanings = documented(reader)
    rows = (
        (
            f"`{key}`",
            value_word(reader, key),
            "required" if is_required(field) else _default(field),
            meanings[key],
        )
        for key, field in reader.keys().items()
    )
    kinds = ", ".join(f"`{kind}`" for kind in reader.kinds)
    return f"Kinds: {kinds}.\n\n{table(('key under `source`', 'value', 'default', 'meaning'), rows)}"


def column_roles() -> str:
    """Return what the columns of a table can be."""
    return table(("role", "the column holds"), ((f"`{role}`", meaning) for role, meaning in COLUMNS.items()))


def field_rows(kind: type, left_out: Collection[str] = ()) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and meaning of a dataclass's fields.

    Raises:
        KeyError: the docstring says nothing of one.
    """
    meanings = documented(kind)
    for field in fields(kind):
        if field.name not in left_out:
            yield f"`{field.name}`", _default(field), meanings[field.name]


def documented(kind: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of each argument or attribute."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        doc = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", doc, flags=re.M):
            for entry in ENTRY.finditer(section):
                # what Python calls None is null in YAML
                meaning = " ".join(entry["meaning"].split()).rstrip(".").replace("None", "null")
                meanings |= dict.fromkeys(entry["names"].split(", "), meaning)
    return meanings


def _default(field: Field) -> str:
    """Return a field's default as YAML has it; nothing for an empty one."""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return "" if field.default in (MISSING, None, "", ()) else f"`{field.default}`"


def commands() -> str:
    """Return every command of `llava-keeplora` with its arguments."""
    return "".join(_commands(build_parser(), "llava-keeplora"))


def eval_commands() -> str:
    """Return every command of `llava-keeplora-eval` with its arguments."""
    return "".join(_commands(build_eval_parser(), "llava-keeplora-eval"))


def two_encoders() -> str:
    """Return the model types of two encoders, from their records."""
    padded = {"longest": "the longest one", "max_length": "what the text encoder takes at most"}
    rows = []
    for name, record in ENCODERS.items():
        parts = [
            f"`{part}`: {', '.join(record.targets[part])} below `{prefix}`"
            for part, prefix in record.parts.items()
        ]
        images = "keep their shape" if record.keeps_shape else "have one size"
        refused = ", ".join(_refused(name)) or "-"
        rows.append((f"`{name}`", "; ".join(parts), padded[record.padding], images, refused))
    header = ("type", "layers that are adapted by default", "prompts are padded to", "images", "refused")
    return table(header, rows)


def _refused(model_type: str) -> Iterator[str]:
    """Yield the methods and settings that a type of model with two encoders cannot follow."""
    record = ENCODERS[model_type]
    types = {name: METHODS[name].info.model_types for name in METHODS}
    yield from (f"`{name}`" for name, allowed in types.items() if allowed and model_type not in allowed)
    yield from ["`preset: released-clip`"] * (not record.causal and record.padding == "longest")
    yield from ["`random_resized_crop`"] * record.keeps_shape


def chat_models() -> str:
    """Return the model types that write text, from their records."""
    rows = []
    for name, layout in LAYOUTS.items():
        connector = f"{', '.join(layout.targets)} below `{layout.connector}`" if layout.targets else "-"
        rows.append((f"`{name}`", f"`{layout.vision}`", connector, f"`{layout.language}`"))
    header = ("type", "`vision` lies in", "`connector`", "`language`")
    return table(header, rows)


def vision_encoders() -> str:
    """Return the vision encoders of models that write text, from their records."""
    rows = [(f"`{name}`", f"`{t.blocks}`", ", ".join(t.targets)) for name, t in TOWERS.items()]
    return table(("encoder", "blocks", "layers that are adapted by default"), rows)


def _commands(parser: argparse.ArgumentParser, program: str) -> Iterator[str]:
    for action in parser._actions:
        if not isinstance(action.choices, Mapping):
            continue
        summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, subparser in action.choices.items():
            yield f"### `{program} {name}`\n\n{_sentence(summaries[name])}\n\n"
            if any(isinstance(inner.choices, Mapping) for inner in subparser._actions):
                yield from _commands(subparser, f"{program} {name}")
            else:
                yield _arguments(subparser) + "\n"


def _arguments(parser: argparse.ArgumentParser) -> str:
    actions = [
        action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"
    ]
    return table(
        ("argument", "", "meaning"),
        ((_name(action), "required" if _is_required(action) else "", _meaning(action)) for action in actions),
    )


def _is_required(action: argparse.Action) -> bool:
    return action.required and action.nargs not in ("*", "?")


def _name(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    if not action.option_strings:
        return f"`{action.metavar or action.dest.upper()}`" + (" ..." if action.nargs in ("*", "+") else "")
    return f"`{', '.join(action.option_strings)}{'' if action.nargs == 0 else f' {value}'}`"


def _meaning(action: argparse.Action) -> str:
    meaning = (action.help or "").replace("*", "\\*")
    # `default` is a plain value where an argument has one and its help does not say so.
    if (
        isinstance(action.default, (str, int, float))
        and not isinstance(action.default, bool)
        and "default" not in meaning
    ):
        meaning += f" (default: {action.default})"
    return meaning.strip()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." if text else ""


GENERATED: dict[str, Callable[[], str]] = {
    "api": api_reference,
    "methods": methods,
    "method-options": method_options,
    "metrics": metrics,
    "tasks": tasks,
    "sequences": sequences,
    "configurations": configurations,
    "commands": commands,
    "eval-commands": eval_commands,
    "recipe-keys": recipe_keys,
    "column-roles": column_roles,
    "two-encoders": two_encoders,
    "chat-models": chat_models,
    "vision-encoders": vision_encoders,
    **{f"keys-{name}": partial(configuration_keys, *section) for name, section in SECTIONS.items()},
    **{f"source-{name}": partial(source_keys, name) for name in READERS},
    **{f"figures-{name}": partial(published_figures, name) for name in BENCHMARKS},
}


def renew(text: str) -> str:
    """Return a page with every generated list made anew.

    Raises:
        KeyError: the page asks for a list that is none of `GENERATED`.
    """
    return BLOCK.sub(lambda block: f"{block[1]}\n{GENERATED[block['name']]()}\n{block[3]}", text)


def stale_pages(folder: Path = DOCS) -> dict[Path, str]:
    """Return the pages that are out of date, with what they should hold."""
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
    renewed = {path: renew(text) for path, text in pages.items()}
    return {path: text for path, text in renewed.items() if text != pages[path]}


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if a page is out of date"
    )
    check = parser.parse_args().check
    stale = stale_pages()
    for path, text in stale.items():
        sys.stdout.write(
            f"docs/{path.name} {'is out of date: run python scripts/write_docs.py' if check else 'written'}\n"
        )
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
