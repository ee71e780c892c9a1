"""The section `guard` of a configuration: read, refused, and part of a run's identity."""

import json

import pytest

from llava_keeplora.config import WatchConfig, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.run_folder import dump_config
from llava_keeplora.saved_run import run_identity

GUARD = {"watch": ["shapes", {"task": "digits", "examples": 50}], "watch_tasks": {"max_drop": 1}}


def parsed(**guard):
    return parse_config({"tasks": ["scene-colour"], "parts": {"vision": {}}, "guard": guard})


def test_watched_recipes_are_names_or_mappings():
    guard = parsed(**GUARD).guard
    assert guard.watch == (WatchConfig("shapes"), WatchConfig("digits", 50))
    assert (guard.watch_tasks.max_drop, guard.old_tasks.max_drop, guard.on_failure) == (1.0, None, "stop")
    assert parsed(**json.loads(dump_config(parsed(**GUARD)))["guard"]).guard == guard


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({}, "guard.it has no limit"),
        ({"watch": ["shapes"]}, "watch_tasks sets no limit"),
        ({"old_tasks": {"max_drop": -1}}, "guard.old_tasks.max_drop.*0 or more.*-1"),
        ({"old_tasks": {"min_gain": 1}}, "unknown key 'guard.old_tasks.min_gain'"),
        ({"new_task": {"min_gain": 1}, "on_failure": "undo"}, "on_failure must be one of rollback.*undo"),
        ({"new_task": {"min_gain": 1}, "confidence": 95}, "confidence must be from 0.5"),
        ({**GUARD, "watch": [3]}, r"watch\[0\] is 3"),
        ({**GUARD, "watch": [{"task": "shapes", "examples": 0}]}, r"examples must be at least 1"),
    ],
)
def test_a_mistake_in_the_guard_is_one_sentence(guard, message):
    with pytest.raises(ConfigError, match=message):
        parsed(**guard)


def test_a_run_without_a_guard_has_no_key_of_it():
    config = parse_config({"tasks": ["scene-colour"], "parts": {"vision": {}}})
    assert config.guard is None and "guard" not in json.loads(dump_config(config))
    assert "guard" not in run_identity(config)


def test_what_happens_after_a_broken_limit_may_change_while_a_run_goes_on():
    identities = [run_identity(parsed(**GUARD, on_failure=then)) for then in ("stop", "warn")]
    assert identities[0] == identities[1] and identities[0]["guard"]["watch"][0]["task"] == "shapes"
