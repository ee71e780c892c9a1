"""Methods and model families by name, built-in ones and plug-ins.

Built-in ones are an explicit list, each imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_keeplora.errors import ConfigError
from llava_keeplora_recipes.registry import SEPARATOR, Registry

#: What the driver asks of a family.
FAMILY_MEMBERS = (
    "from_config",
    "load",
    "skeleton",
    "linear_layers",
    "prepare",
    "inputs",
    "check",
    "task",
    "predictor",
)


def _is_method(value: Any) -> str | None:
    from llava_keeplora.methods.base import Method, MethodInfo

    if not (isinstance(value, type) and issubclass(value, Method)):
        return "it is no subclass of llava_keeplora.methods.Method"
    return (
        None
        if isinstance(getattr(value, "info", None), MethodInfo)
        else "it has no `info` of the class MethodInfo"
    )


def _is_family(value: Any) -> str | None:
    missing = [name for name in FAMILY_MEMBERS if not callable(getattr(value, name, None))]
    return f"it lacks {', '.join(missing)} of llava_keeplora.models.Family" if missing else None


METHODS = Registry(
    "method",
    "llava_keeplora.methods",
    {
        "zero-shot": "llava_keeplora.methods.zero_shot:ZeroShot",
        "seq-lora": "llava_keeplora.methods.seq_lora:SequentialLora",
        "keeplora": "llava_keeplora.methods.keeplora:KeepLora",
        "keeplora+": "llava_keeplora.methods.keeplora_plus:KeepLoraPlus",
        "keeplora++": "llava_keeplora.methods.keeplora_plus_plus:KeepLoraPlusPlus",
        "o-lora": "llava_keeplora.methods.o_lora:OLora",
        "inflora": "llava_keeplora.methods.inflora:InfLora",
        "sd-lora": "llava_keeplora.methods.sd_lora:SdLora",
        "zscl": "llava_keeplora.methods.zscl:Zscl",
        "moe-adapters": "llava_keeplora.methods.moe_adapters:MoeAdapters",
        "iap": "llava_keeplora.methods.iap:Iap",
    },
    _is_method,
)
MODEL_FAMILIES = Registry(
    "model family",
    "llava_keeplora.families",
    {"clip": "llava_keeplora.models.clip:ClipFamily", "llava": "llava_keeplora.models.llava:LlavaFamily"},
    _is_family,
)


def localize_plugins(tree: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Return a configuration whose plug-ins are named by absolute files, and whose labels can name folders.

    Sections of a wrong form are left as they are, for the checks that come later.

    Args:
        tree: a run's or a table's configuration as plain data.
        folder: that it lies in; the working folder alone when None.

    Raises:
        ConfigError: two methods would have the same label.
    """
    tree = dict(tree)
    if isinstance(methods := tree.get("methods"), Mapping):
        tree["methods"] = _with_safe_labels(
            {label: _localize_method(label, own, folder) for label, own in methods.items()}
        )
    if isinstance(expected := tree.get("expected"), Mapping):
        tree["expected"] = _with_safe_labels(expected)
    if isinstance(tuning := tree.get("tuning"), Mapping) and isinstance(tuning.get("settings"), Mapping):
        tree["tuning"] = {**tuning, "settings": _with_safe_labels(tuning["settings"])}
    if isinstance(model := tree.get("model"), Mapping) and isinstance(model.get("family"), str):
        tree["model"] = {**model, "family": MODEL_FAMILIES.localize(model["family"], folder)}
    return tree


def safe_label(label: Any) -> Any:
    """Return a label that can name a folder: `plugins/ewc.py:Ewc` becomes `ewc-Ewc`.

    Any other stays as it is.
    """
    if not isinstance(label, str) or SEPARATOR not in label:
        return label
    place, _, attribute = label.rpartition(SEPARATOR)
    # No dots, which separate the keys of an override on the command line.
    return f"{Path(place).stem if place.endswith('.py') else place}-{attribute}".replace(".", "-")


def _with_safe_labels(section: Mapping[Any, Any]) -> dict[Any, Any]:
    safe = {safe_label(label): value for label, value in section.items()}
    if len(safe) < len(section):
        raise ConfigError(
            f"{' and '.join(map(repr, section))} would share a folder of the run",
            "give each a label of its own, and name the plug-in below it with `method`",
        )
    return safe


def _localize_method(label: Any, settings: Any, folder: Path | None) -> Any:
    """Return a method's settings with its plug-in named by `method`, with an absolute file."""
    if settings is not None and not isinstance(settings, Mapping):
        return settings
    name = (settings or {}).get("method", label)
    if not isinstance(name, str) or SEPARATOR not in name:
        return settings
    return {**(settings or {}), "method": METHODS.localize(name, folder)}


def plugin_identity(tree: dict[str, Any]) -> None:
    """Put into a run's identity what its plug-ins are.

    Their names without places, and the hashes of their sources.

    Args:
        tree: the identity, changed in place; one without plug-ins stays as it is.

    Raises:
        PluginError: the sources of one are not there.
    """
    for registry, section, key in _named_plugins(tree):
        section["source"] = registry.source_files(section[key])
        section[key] = registry.portable_name(section[key])


def without_places(tree: dict[str, Any]) -> None:
    """Let a resolved configuration name its plug-ins as another machine finds them, as `module:Object`.

    In place.
    """
    for registry, section, key in _named_plugins(tree):
        section[key] = registry.portable_name(section[key])


def list_plugins(tree: Mapping[str, Any]) -> list[tuple[Registry, str, dict[str, str]]]:
    """Return the plug-ins that a resolved configuration, or an identity, names.

    (registry, name, recorded source).
    """
    return [
        (registry, section[key], section.get("source") or {})
        for registry, section, key in _named_plugins(tree)
    ]


def _named_plugins(tree: Mapping[str, Any]) -> Iterator[tuple[Registry, dict[str, Any], str]]:
    """Yield every place of a resolved configuration that names a plug-in: (registry, section, key)."""
    places = [(METHODS, method, "method") for method in tree["methods"].values()]
    for registry, section, key in (*places, (MODEL_FAMILIES, tree["model"], "family")):
        if isinstance(section.get(key), str) and registry.is_plugin(section[key]):
            yield registry, section, key
