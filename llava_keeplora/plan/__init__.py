"""What a run will need, before it starts: memory, disk and steps."""

import importlib

#: Public name → its module, imported when the name is first used: a start checks the machine and rehearses
#: nothing.
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
