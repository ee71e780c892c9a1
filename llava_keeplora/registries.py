"""Registries of methods and model families: the built-in ones, imported when needed, and plug-ins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_keeplora.errors import ConfigError
from llava_keeplora_recipes.registry import SEPARATOR, Registry

#: Attributes of a family that the driver calls.
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


def _method_mistake(value: Any) -> str | None:
    """Return why an object cannot be registered as a method; None if it can."""
    from llava_keeplora.methods.base import Method, MethodInfo

    if not (isinstance(value, type) and issubclass(value, Method)):
        return "it is not a subclass of llava_keeplora.methods.Method"
    return (
        None
        if isinstance(getattr(value, "info", None), MethodInfo)
        else "it has no `info` of the class MethodInfo"
    )


def _family_mistake(value: Any) -> str | None:
    """Return why an object cannot be registered as a model family; None if it can."""
    missing = [name for name in FAMILY_MEMBERS if not callable(getattr(value, name, None))]
    return f"it lacks {', '.join(missing)} of llava_keeplora.models.Family" if missing else None


METHODS = Registry(
    "method",
    "llava_keeplora.methods",
    {
        "zero-shot": "llava_keeplora.methods.zero_shot:ZeroShot",
        "seq-lora": "llava_keeplora.methods.seq_lora:SequentialLora",
        "individual": "llava_keeplora.methods.individual:Individual",
        "joint": "llava_keeplora.methods.joint:Joint",
        "replay": "llava_keeplora.methods.replay:Replay",
        "keeplora": "llava_keeplora.methods.keeplora:KeepLora",
        "keeplora+": "llava_keeplora.methods.keeplora_plus:KeepLoraPlus",
        "keeplora++": "llava_keeplora.methods.keeplora_plus_plus:KeepLoraPlusPlus",
        "o-lora": "llava_keeplora.methods.o_lora:OLora",
        "inflora": "llava_keeplora.methods.inflora:InfLora",
        "sd-lora": "llava_keeplora.methods.sd_lora:SdLora",
        "zscl": "llava_keeplora.methods.zscl:Zscl",
        "moe-adapters": "llava_keeplora.methods.moe_adapters:MoeAdapters",
        "iap": "llava_keeplora.methods.iap:Iap",
        "merge": "llava_keeplora.methods.merge:Merge",
        "task-lora": "llava_keeplora.methods.task_lora:TaskLora",
        "splitlora": "llava_keeplora.methods.splitlora:SplitLora",
        "eblora": "llava_keeplora.methods.eblora:EbLora",
        "osf": "llava_keeplora.methods.osf:Osf",
        "nusa-cl": "llava_keeplora.methods.nusa_cl:NusaCl",
        "ewc": "llava_keeplora.methods.ewc:Ewc",
        "reglora": "llava_keeplora.methods.reglora:RegLora",
        "lwf": "llava_keeplora.methods.lwf:Lwf",
        "self-distillation": "llava_keeplora.methods.self_distillation:SelfDistillation",
    },
    _method_mistake,
)
MODEL_FAMILIES = Registry(
    "model family",
    "llava_keeplora.families",
    {"clip": "llava_keeplora.models.clip:ClipFamily", "llava": "llava_keeplora.models.llava:LlavaFamily"},
    _family_mistake,
)


def localize_plugins(tree: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Return a configuration whose plug-ins are named by absolute paths, and whose labels can name folders.

    Sections of a wrong form are left unchanged, for later checks.

    Args:
        tree: the configuration of a run or a table as plain data.
        folder: the configuration's folder, where plug-ins are searched first; only the working folder when
            None.

    Raises:
        ConfigError: if two methods would have the same label.
    """
    tree = dict(tree)
    if isinstance(methods := tree.get("methods"), Mapping):
        tree["methods"] = _with_safe_labels(
            {label: _localize_method(label, settings, folder) for label, settings in methods.items()}
        )
    if isinstance(expected := tree.get("expected"), Mapping):
        tree["expected"] = _with_safe_labels(expected)
    if isinstance(tuning := tree.get("tuning"), Mapping) and isinstance(tuning.get("settings"), Mapping):
        tree["tuning"] = {**tuning, "settings": _with_safe_labels(tuning["settings"])}
    if isinstance(model := tree.get("model"), Mapping) and isinstance(model.get("family"), str):
        tree["model"] = {**model, "family": MODEL_FAMILIES.localize(model["family"], folder)}
    return tree


def safe_label(label: Any) -> Any:
    """Return a label that can name a folder: `plugins/ewc.py:Ewc` becomes `ewc-Ewc`, others are unchanged."""
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
            "give each its own label, and name the plug-in below it with `method`",
        )
    return safe


def _localize_method(label: Any, settings: Any, folder: Path | None) -> Any:
    """Return a method's settings with `method` set to its plug-in's absolute path, if it is a plug-in."""
    if settings is not None and not isinstance(settings, Mapping):
        return settings
    name = (settings or {}).get("method", label)
    if not isinstance(name, str) or SEPARATOR not in name:
        return settings
    return {**(settings or {}), "method": METHODS.localize(name, folder)}


def plugin_identity(tree: dict[str, Any]) -> None:
    """Replace the plug-ins in a run's identity by their names without paths and the hashes of their sources.

    Args:
        tree: the identity, changed in place.

    Raises:
        PluginError: if the source of a plug-in is missing.
    """
    for registry, section, key in _named_plugins(tree):
        section["source"] = registry.source_files(section[key])
        section[key] = registry.portable_name(section[key])


def without_places(tree: dict[str, Any]) -> None:
    """Name the plug-ins of a resolved configuration as `module:Object`, without paths of this machine.

    Args:
        tree: the configuration, changed in place.
    """
    for registry, section, key in _named_plugins(tree):
        section[key] = registry.portable_name(section[key])


def list_plugins(tree: Mapping[str, Any]) -> list[tuple[Registry, str, dict[str, str]]]:
    """Return (registry, name, recorded source) of the plug-ins in a resolved configuration or an identity."""
    return [
        (registry, section[key], section.get("source") or {})
        for registry, section, key in _named_plugins(tree)
    ]


def _named_plugins(tree: Mapping[str, Any]) -> Iterator[tuple[Registry, dict[str, Any], str]]:
    """Yield (registry, section, key) of every key of a resolved configuration that names a plug-in."""
    places = [(METHODS, method, "method") for method in tree["methods"].values()]
    for registry, section, key in (*places, (MODEL_FAMILIES, tree["model"], "family")):
        if isinstance(section.get(key), str) and registry.is_plugin(section[key]):
            yield registry, section, key
