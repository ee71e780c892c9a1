"""Registry of methods, model families, metrics and readers: built-in ones and plug-ins, by name.

A plug-in is an object in a user's file or module, or an entry point of an installed package.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_keeplora_recipes.errors import UserError, nearest

#: Between the module, or the path of a file, and the object in it.
SEPARATOR = ":"
#: Number of characters of the hash in the name under which a single file is imported.
SHORT = 12


class PluginError(UserError, KeyError):
    """A name leads to no object, or to one that cannot be used.

    It is a `KeyError` as well, so that `name in registry` and `registry.get(name)` behave as for any mapping.

    Args:
        problem: what is wrong, where, and why (no trailing period).
        cure: the command or edit that repairs it (no trailing period).
    """

    __str__ = Exception.__str__


class UnknownNameError(PluginError):
    """A name is neither built in nor a plug-in's, and no installed package declares it."""


class Registry(MutableMapping[str, Any]):
    """Mapping from names to objects of one kind; plug-ins are imported only when they are looked up.

    A name is one of

    - a built-in name;
    - `module:Object`, for a module that Python finds;
    - `path/to/file.py:Object`;
    - the name of an entry point that an installed package declares in `group`.

    Iteration yields the built-in names alone. An object that is assigned counts as built in.

    Args:
        kind: name of the kind of objects in errors, for instance `method`.
        group: the entry points' group, for instance `llava_keeplora.methods`.
        builtin: name → `module:Object`, imported when it is first looked up.
        check: function that returns why a plug-in's object is not of this kind; None if it is.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        builtin: Mapping[str, str],
        check: Callable[[Any], str | None] = lambda value: None,
    ):
        self.kind, self.group, self._check = kind, group, check
        self._builtin: dict[str, Any] = dict(builtin)
        self._lazy = set(builtin)

    def __getitem__(self, name: str) -> Any:
        """Return the object of a name.

        Raises:
            PluginError: the name is unknown, or the plug-in is missing, cannot be imported or is of another
                kind.
        """
        if name in self._lazy:
            module, _, attribute = self._builtin[name].partition(SEPARATOR)
            self._builtin[name] = getattr(importlib.import_module(module), attribute)
            self._lazy.discard(name)
        return self._builtin[name] if name in self._builtin else self._load_plugin(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._builtin[name] = value
        self._lazy.discard(name)

    def __delitem__(self, name: str) -> None:
        del self._builtin[name]
        self._lazy.discard(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._builtin)

    def __len__(self) -> int:
        return len(self._builtin)

    def is_plugin(self, name: str) -> bool:
        """Return whether a name is not built in, so that looking it up executes other code."""
        return name not in self._builtin

    def localize(self, name: str, folder: Path | None = None) -> str:
        """Return a plug-in's name with the absolute path of its file; any other name as it is.

        A relative path, or the path of a module, is searched for in `folder` and then in the working folder.
        For a file that is missing, the module of its name is searched for.

        Args:
            name: any name.
            folder: the folder of the configuration that has the name.
        """
        if not self.is_plugin(name) or SEPARATOR not in name:
            return name
        place, _, attribute = name.rpartition(SEPARATOR)
        folders = [folder] * (folder is not None) + [Path.cwd()]
        if place.endswith(".py"):
            files = [root / Path(place).expanduser() for root in folders]
            place = module_name(files[0])
        else:
            files = []
        stem = Path(*place.split("."))
        files += [root / file for root in folders for file in (stem.with_suffix(".py"), stem / "__init__.py")]
        path = next((path for path in files if path.is_file()), None)
        if path is not None:
            return f"{path.absolute()}{SEPARATOR}{attribute}"
        return (
            name
            if importlib.util.find_spec(place.partition(".")[0]) is None
            else f"{place}{SEPARATOR}{attribute}"
        )

    def portable_name(self, name: str) -> str:
        """Return a name without a path of this machine: `module:Object` for a file, any other as it is."""
        place, _, attribute = name.rpartition(SEPARATOR)
        is_file = self.is_plugin(name) and place.endswith(".py")
        return f"{module_name(Path(place))}{SEPARATOR}{attribute}" if is_file else name

    def source_files(self, name: str) -> dict[str, str]:
        """Return the SHA-256 of a plug-in's file, or of every .py file of its package, by relative path.

        The plug-in is not executed. For a built-in object the mapping is empty.

        Raises:
            PluginError: the name leads to no source file.
        """
        if not self.is_plugin(name):
            return {}
        place = self._place(name)[0]
        path = Path(place) if place.endswith(".py") else _module_file(place)
        if path is None or not path.is_file():
            raise self._missing(name, place)
        root = _import_root(path)
        package = root / path.relative_to(root).parts[0]
        files = [path] if package == path else sorted(package.rglob("*.py"))
        return {
            file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        }

    def source_hash(self, name: str) -> str | None:
        """Return one SHA-256 of all of a plug-in's sources, see `source_files`; None for a built-in object.

        Raises:
            PluginError: the name leads to no source file.
        """
        files = self.source_files(name)
        listed = "".join(f"{digest} {file}\n" for file, digest in files.items())
        return hashlib.sha256(listed.encode()).hexdigest() if files else None

    def _place(self, name: str) -> tuple[str, str]:
        """Return a plug-in's module or file, and the name of the object in it.

        Raises:
            PluginError: the name is neither a plug-in's nor declared by an installed package.
        """
        if isinstance(name, str) and SEPARATOR in name:
            place, _, attribute = name.rpartition(SEPARATOR)
            if place and attribute:
                return str(Path(place).expanduser().absolute()) if place.endswith(".py") else place, attribute
        declared = {point.name: point for point in importlib.metadata.entry_points(group=self.group)}
        if name in declared:
            return declared[name].module, declared[name].attr
        raise UnknownNameError(
            f"there is no {self.kind} '{name}'",
            f"{nearest(str(name), [*self._builtin, *declared])}; one of your own is written module:Object or "
            "path/to/file.py:Object",
        )

    def _load_plugin(self, name: str) -> Any:
        """Import a plug-in and return its object."""
        place, attribute = self._place(name)
        value = self._import(name, place)
        try:
            for part in attribute.split("."):
                value = getattr(value, part)
        except AttributeError:
            names = [member for member in vars(value) if not member.startswith("_")]
            raise PluginError(
                f"the {self.kind} '{name}' is not in {place}", nearest(attribute, names)
            ) from None
        if reason := self._check(value):
            raise PluginError(
                f"'{name}' is no {self.kind}: {reason}", "see docs/extending.md for what one looks like"
            )
        return value

    def _import(self, name: str, place: str) -> ModuleType:
        try:
            return _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        except FileNotFoundError:
            raise self._missing(name, place) from None
        except ModuleNotFoundError as error:
            if error.name and f"{place}.".startswith(f"{error.name}."):
                raise self._missing(name, place) from None
            raise PluginError(
                f"the {self.kind} '{name}' needs the module '{error.name}', which is not installed",
                "install it, or put its folder on PYTHONPATH",
            ) from error
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"the {self.kind} '{name}' cannot be imported ({type(error).__name__}: {error})",
                f"correct {place}",
            ) from error

    def _missing(self, name: str, place: str) -> PluginError:
        what = (
            f"there is no file {place}" if place.endswith(".py") else f"the module '{place}' is not installed"
        )
        cure = (
            "put the file back, or its folder on PYTHONPATH"
            if place.endswith(".py")
            else ("install its package with pip, or put its folder on PYTHONPATH")
        )
        return PluginError(f"the {self.kind} '{name}' is not installed: {what}", cure)


def module_name(path: Path) -> str:
    """Return the dotted name of a Python file, with those of its packages."""
    relative = path.relative_to(_import_root(path)).with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" and len(relative.parts) > 1 else relative.parts
    return ".".join(parts)


def _import_root(path: Path) -> Path:
    """Return the folder from which a file is imported, the parent of its outermost package."""
    root = path.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    return root


def _module_file(module: str) -> Path | None:
    """Return the file of a module or package that Python finds, without executing it; None without one."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or ():
        stem = Path(folder, *rest)
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return file
    return None


def _import_file(path: Path) -> ModuleType:
    """Import a Python file.

    A file outside of packages is imported under a name with its content's hash, so that a changed file is
    another module.

    Raises:
        FileNotFoundError: there is no such file.
    """
    content = path.read_bytes()
    root, name = _import_root(path), module_name(path)
    if root != path.parent:
        with _on_path(root):
            module = importlib.import_module(name)
        if Path(module.__file__ or "") != path:
            raise ImportError(f"{name} is imported from {module.__file__} already; rename one of them")
        return module
    name = f"{name}_{hashlib.sha256(str(path).encode() + content).hexdigest()[:SHORT]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            with _on_path(root):
                # `spec.loader.exec_module` might use stale bytecode of a file that was changed within the
                # same second.
                exec(compile(content, str(path), "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Put a folder first on `sys.path` for the length of a block."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
