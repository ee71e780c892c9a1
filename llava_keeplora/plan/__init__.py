"""Estimates of a run's memory, disk space and steps, before it starts."""

import importlib

#: Public name → its module, imported when the name is first used: a start needs `check_start` alone, not the
#: rehearsal on fake tensors.
_MODULES = {
    "Machine": "machine",
    "MethodPlan": "plan",
    "Plan": "plan",
    "StagePlan": "plan",
    "changes_text": "table",
    "check_start": "machine",
    "describe": "table",
    "find_machine": "machine",
    "make_plan": "plan",
    "refusal": "table",
}

__all__ = [
    "Machine",
    "MethodPlan",
    "Plan",
    "StagePlan",
    "changes_text",
    "check_start",
    "describe",
    "find_machine",
    "make_plan",
    "refusal",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
