"""Safe reading of untrusted YAML: plain data alone, by YAML 1.2's core schema, within limits.

Recipes, sequences, configurations, tables and the values of overrides are all read here. YAML 1.1, which
PyYAML implements, reads `no` as False, `010` as 8, `12:30:45` as 45045 and `1e-3` as text; the core schema of
YAML 1.2 (section 10.3) does not.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError, nearest
from .strict_json import decode_text

#: Most characters of a file, levels of nesting, and values with every alias expanded: far beyond what a
#: person writes.
MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES = 2**21, 32, 200_000
#: Largest whole number that JSON, torch and NumPy all support.
MAX_INTEGER = 2**63 - 1
#: Patterns of plain scalars that are not text, with their first characters; `.nan` and `.inf`, which JSON
#: does not have, stay text.
SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+|\.[0-9]+[eE][-+]?[0-9]+)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's loader with the scalars above, without tags, strict about repeated keys and limits."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._values: dict[Any, Any] = {}

    def compose_node(self, parent, index):
        """Compose a node, counting its level and, with every alias expanded, the values in it."""
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _refusal(
                f"has the tag '{event.tag}'; only plain text, numbers, lists and mappings are read", event
            )
        if self._depth == MAX_DEPTH:
            raise _refusal(f"nests more than {MAX_DEPTH} levels deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._values:
                raise _refusal(f"has an alias '*{event.anchor}' inside of what it stands for", event)
            return node
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            inner = [part for pair in node.value for part in pair]
        self._values[id(node)] = 1 + sum(self._values[id(part)] for part in inner)
        if self._values[id(node)] > MAX_VALUES:
            raise _refusal(f"holds more than {MAX_VALUES} values once its aliases are written out", event)
        return node

    def _check_keys(self, node: yaml.MappingNode) -> None:
        # Before `<<` is resolved: merged keys are defaults, which the mapping's own keys may replace.
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal("has a list or mapping as a key", key_node)
            key = "<<" if key_node.tag.endswith(":merge") else self.construct_object(key_node)
            if key in seen:
                raise _refusal(f"the key '{key}' occurs twice", key_node)
            seen.add(key)

    def construct_text(self, node) -> str:
        """Construct text, without characters that files and paths cannot contain."""
        text = self.construct_scalar(node)
        if "\0" in text or any("\ud800" <= sign <= "\udfff" for sign in text):
            raise _refusal("holds the character NUL or half a character, which no file can", node)
        return text

    def construct_number(self, node) -> int | float:
        """Construct a number that is finite and fits 64 bits."""
        text = self.construct_scalar(node)
        # Python limits the digits of `int`; numbers with more than 20 characters are too large anyway.
        value = float(text) if node.tag.endswith(":float") or len(text) > 20 else int(text)
        if not math.isfinite(value) or (node.tag.endswith(":int") and abs(value) > MAX_INTEGER):
            raise _refusal(
                f"holds the number {text[:20]}{'...' if len(text) > 20 else ''}, which is too large", node
            )
        return int(text) if node.tag.endswith(":int") else value


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which puts quotes around text that `_StrictLoader` would read as a number."""


for _name, (_pattern, _first) in SCALARS.items():
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
_StrictLoader.add_constructor("tag:yaml.org,2002:str", _StrictLoader.construct_text)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_number)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_number)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{SCALARS['float'][0]})$"), list(SCALARS["float"][1])
)


def _refusal(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document of plain data.

    Raises:
        ValueError: with the reason: no YAML, a tag, a repeated key, an alias within itself, a number that 64
            bits don't hold, half a character, or more characters, levels or values than the limits.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"is longer than {MAX_CHARACTERS} characters")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark, context = (
            error.problem_mark or error.context_mark,
            f"{error.context}, " if error.context else "",
        )
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"is not valid YAML ({context}{error.problem}{place})") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"is not valid YAML (has the character {error.character:#04x} at position {error.position})"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML converts the escape \U00110000, which is no character, without a check.
        raise ValueError(f"is not valid YAML ({' '.join(str(error).split())})") from None


def dump_yaml(value: Any) -> str:
    """Return plain data as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        RecipeError: the file is missing, is not YAML, or holds something else.
    """
    try:
        # A character has at most four bytes.
        with open(path, "rb") as file:
            value = parse_yaml(decode_text(file.read(4 * MAX_CHARACTERS + 4)))
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read ({error.strerror})", "give the path of an existing YAML file"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{path} {error}", "correct the file") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path} holds no 'key: value' pairs", "start from one of the shipped files")
    return value


def check_keys(facts: dict[str, Any], keys: dict[str, tuple[type, str]], path: Path) -> None:
    """Check that all keys are in `keys`, and that values have the types given there.

    Args:
        facts: the content of the file.
        keys: key → (its type, the word for that type in errors).
        path: the file, for errors.

    Raises:
        RecipeError: naming the file, the key and the nearest valid one.
    """
    for key, value in facts.items():
        if key not in keys:
            raise RecipeError(f"{path.name} has the unknown key '{key}'", nearest(str(key), keys))
        kind, word = keys[key]
        # bool is an int in Python
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise RecipeError(
                f"{path.name} has {value!r} under '{key}', which is not {word}",
                f"write {word} there, in {path}",
            )


def list_shipped(folder: Path) -> list[str]:
    """Return the names (relative path without suffix, with '/') of the YAML files under a folder, sorted."""
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def is_file_name(name_or_path: str | Path) -> bool:
    """Return whether this is a user's file rather than a name that comes with the package."""
    return isinstance(name_or_path, Path) or str(name_or_path).endswith((".yaml", ".yml"))


def resolve(
    name_or_path: str | Path, folder: Path, word: str, start: Path | None = None
) -> tuple[Path, bool]:
    """Return the file of a shipped name or a user's path, and whether it is a shipped one.

    Args:
        name_or_path: a name from `list_shipped(folder)`, or a path that ends in .yaml or .yml.
        folder: the package's folder.
        word: the kind of file, for errors.
        start: the folder to which paths are relative; the working directory when None.

    Raises:
        RecipeError: there is no such name or file.
    """
    if is_file_name(name_or_path):
        path = (start or Path()) / Path(name_or_path).expanduser()
        if not path.is_file():
            raise RecipeError(f"there is no {word} file '{path}'", "give the path of an existing YAML file")
        return path, False
    shipped = list_shipped(folder)
    if name_or_path not in shipped:
        raise RecipeError(
            f"there is no {word} '{name_or_path}'",
            f"{nearest(str(name_or_path), shipped)}, or give the path of a .yaml file",
        )
    return folder / f"{name_or_path}.yaml", True
