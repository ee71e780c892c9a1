"""The API reference of docs/api.md, from signatures and docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator

#: Modules whose `__all__` is public, in the order of the page.
MODULES = ("llava_keeplora", "llava_keeplora.testing", "llava_keeplora_eval", "llava_keeplora_recipes")
#: What these return and what is not made by hand, listed after them.
RETURNED = (
    ("llava_keeplora.report.run_matrix", "RunMatrix"),
    ("llava_keeplora.export", "Exported"),
)
#: Heading of a docstring's section in Google's style, as PEFT and scikit-learn's pages name it.
SECTIONS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
}
SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):\n", flags=re.M)
#: An argument or error and its meaning; lines that go on are deeper.
ENTRY = re.compile(r"^(?P<names>[\w.`*]+(?:, [\w.`*]+)*): (?P<meaning>.*(?:\n .*)*)", flags=re.M)
LINE = 100


def api_reference() -> str:
    """Return every public name with its signature and its docstring.

    Raises:
        ValueError: a public class, function or method has no docstring.
    """
    blocks = [block for module in MODULES for block in _module(module)]
    blocks.append("## Returned objects\n")
    for module, name in RETURNED:
        blocks += _class(name, getattr(importlib.import_module(module), name))
    return "\n".join(blocks)


def _module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    yield f"## `{name}`\n"
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value):
            yield from _class(public, value)
        elif callable(value):
            yield f"### `{public}`\n"
            yield _function(public, value)


def _class(name: str, cls: type) -> Iterator[str]:
    yield f"### `{name}`\n"
    yield _signature(name, cls)
    yield _document(cls.__doc__, name)
    for member, value in vars(cls).items():
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"#### `{name}.{member}`\n\n{_document(value.__doc__, f'{name}.{member}')}"
        elif isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
            yield f"#### `{name}.{member}`\n"
            yield _function(f"{name}.{member}", getattr(cls, member), bound=inspect.isfunction(value))


def _function(name: str, function: object, bound: bool = False) -> str:
    return f"{_signature(name, function, bound)}\n{_document(function.__doc__, name)}"


def _signature(name: str, function: object, bound: bool = False) -> str:
    """Return a call as Python code, an argument a line where it is long; without `self`."""
    try:
        signature = inspect.signature(function)  # type: ignore[arg-type]
    except ValueError:  # A class that inherits Exception's own arguments.
        return ""
    parameters = [_readable(parameter) for parameter in list(signature.parameters.values())[bound:]]
    signature = signature.replace(parameters=parameters)
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", f"{name}{signature}")
    if len(text) > LINE:
        arguments = [re.sub(r": '([^']*)'", r": \1", str(parameter)) for parameter in parameters]
        stars = {p.kind: i for i, p in reversed(list(enumerate(parameters)))}
        only = stars.get(inspect.Parameter.KEYWORD_ONLY)
        if only is not None and inspect.Parameter.VAR_POSITIONAL not in stars:
            arguments.insert(only, "*")
        lines = "".join(f"    {argument},\n" for argument in arguments)
        returned = text[text.rindex(")") :] if " -> " in text else ")"
        text = f"{name}(\n{lines}{returned}"
    return f"```python\n{text}\n```\n"


class _Omitted:
    def __repr__(self) -> str:
        return "..."


def _readable(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter whose default is `...` where Python shows objects with their addresses."""
    return parameter.replace(default=_Omitted()) if " at 0x" in repr(parameter.default) else parameter


def _document(docstring: str | None, name: str) -> str:
    """Return a docstring as Markdown: sections in bold, their entries as lists."""
    if not docstring:
        raise ValueError(f"{name} is public and has no docstring")
    text, *sections = SECTION.split(inspect.cleandoc(docstring))
    parts = [_paragraphs(text)]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        indented, _, rest = body.partition("\n\n") if re.search(r"\n\n\S", body) else (body, "", "")
        body = textwrap.dedent(indented).strip()
        entries = list(ENTRY.finditer(body))
        listed = "".join(f"- {_code(e['names'])}: {_joined(e['meaning'])}\n" for e in entries)
        parts.append(f"**{SECTIONS[title]}**\n\n{listed or _joined(body) + chr(10)}")
        parts += [_paragraphs(rest)] * bool(rest)
    return "\n".join(parts)


def _code(names: str) -> str:
    return ", ".join(name if name.startswith("`") else f"`{name}`" for name in names.split(", "))


def _paragraphs(text: str) -> str:
    """Return paragraphs on a line each; indented ones are code and stay."""
    blocks = re.split(r"\n\n+", text.strip())
    return (
        "\n\n".join(block if block.startswith((" ", "-", "|")) else _joined(block) for block in blocks) + "\n"
    )


def _joined(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") if "`" not in text else " ".join(text.split())
