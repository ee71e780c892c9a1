"""Private names of other libraries: all of them are listed, all listed ones are there, and versions that may lack them are excluded."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from libraries.private_names import PRIVATE_NAMES

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "llava_keeplora": "llava_keeplora",
    "llava_keeplora_eval": "eval",
    "llava_keeplora_recipes": "data_recipes",
    "scripts": "scripts",
}
PRIVATE = re.compile(r"_[A-Za-z]\w*")
LISTED = {part for entry in PRIVATE_NAMES for part in entry.name.split(".")}
#: Documented in spite of the underscore: Python's own, and the path by which NumPy's pickles name their reader.
DOCUMENTED = {"_exit", "_reconstruct", "_codecs", "_replace"}
#: Left on a class by the library itself.
MADE_BY_LIBRARY = {"_backward_cls"}


@cache
def trees() -> dict[str, ast.Module]:
    """Parse every module of the project, by its installed name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = ast.parse(path.read_text())
    return found


def defined(tree: ast.Module) -> set[str]:
    """Return every name that a module gives to something of its own."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) in ("self", "cls")
        ):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def used(tree: ast.Module) -> set[str]:
    """Return the private names among a module's attributes, imports and strings."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return {name for name in names if PRIVATE.fullmatch(name)}


def mentioned(tree: ast.Module) -> set[str]:
    """Return every attribute, imported name, method and string of a module."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return names | {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@cache
def assigned(owner: type | ModuleType) -> set[str]:
    """Return the attributes that a module's or class's source assigns to anything, `__setattr__` included."""
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):  # Compiled, or made at run time.
        return set()
    nodes = list(ast.walk(ast.parse(f"if True:\n{source}" if source[0].isspace() else source)))
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("__setattr__")]
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)} | {
        n.args[0].value for n in calls if n.args and isinstance(n.args[0], ast.Constant)
    }


def owner_of(name: str) -> object:
    """Import as much of a dotted name as is modules, and look the rest up."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:-1]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_a_listed_name_is_in_the_installed_version(entry):
    owner, last = owner_of(entry.name), entry.name.rpartition(".")[2]
    assert hasattr(owner, last) or last in assigned(owner), (
        f"the installed {entry.library} has no {entry.name}: {entry.why}"
    )


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_a_listed_name_is_used_where_the_list_says(entry):
    last = entry.name.rpartition(".")[2]
    for module in entry.used_in:
        assert last in mentioned(trees()[module]), f"{module} does not use {entry.name}"


def test_no_private_name_of_another_library_is_used_that_is_not_listed():
    own = set().union(*map(defined, trees().values()))
    unlisted = {
        (module, name) for module, tree in trees().items() for name in used(tree) - own - LISTED - DOCUMENTED
    }
    assert not unlisted


def test_no_private_name_of_a_foreign_base_class_is_overridden_that_is_not_listed():
    unlisted = set()
    for cls in own_classes():
        foreign = [
            base
            for base in cls.__mro__[1:]
            if base.__module__.partition(".")[0] not in {*FOLDERS, *sys.stdlib_module_names}
        ]
        ours = {name for name in {*vars(cls), *assigned(cls)} if PRIVATE.fullmatch(name)}
        for base in foreign:
            unlisted |= {
                (cls.__qualname__, name)
                for name in ours & {*dir(base), *assigned(base)} - LISTED - MADE_BY_LIBRARY
            }
    assert not unlisted


def own_classes() -> list[type]:
    """Import all modules of the three packages and return their classes that derive from another library's."""
    classes = []
    for package in (name for name in FOLDERS if name != "scripts"):
        for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if info.name.endswith("__main__"):
                continue
            module = importlib.import_module(info.name)
            classes += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == info.name]
    packages = {*FOLDERS, *sys.stdlib_module_names}
    return [
        c for c in classes if any(base.__module__.partition(".")[0] not in packages for base in c.__mro__)
    ]


def test_a_library_with_private_names_has_an_upper_bound_that_admits_the_tested_version():
    texts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    requirements = {requirement.name: requirement.specifier for requirement in map(Requirement, texts)}
    for library in {entry.library for entry in PRIVATE_NAMES} - sys.stdlib_module_names:
        assert any(bound.operator == "<" for bound in requirements[library]), library
        assert version(library).partition("+")[0] in requirements[library], library
