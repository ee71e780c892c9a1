"""The section `guard` of a configuration: read, refused, and part of a run's identity."""

import json
import re
from types import SimpleNamespace

import pytest

from llava_keeplora.config import WatchConfig, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.run_folder import dump_config
from llava_keeplora.saved_run import run_identity
from llava_keeplora.start import watched
from llava_keeplora.start.check import check_shrinking

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
        ({}, "^guard.old_tasks, new_task and watch set no limit"),
        ({"watch": ["shapes"]}, "watch_tasks sets no limit"),
        (
            {"watch_tasks": {"max_drop": 1}, "old_tasks": {"max_drop": 1}},
            "watch_tasks sets a limit, but watch names no recipes",
        ),
        ({"old_tasks": {"max_drop": -1}}, "guard.old_tasks.max_drop.*0 or more.*-1"),
        ({"old_tasks": {"min_gain": 1}}, "unknown key 'guard.old_tasks.min_gain'"),
        ({"new_task": {"min_gain": 1}, "on_failure": "undo"}, "on_failure must be one of rollback.*undo"),
        ({"new_task": {"min_gain": 1}, "confidence": 95}, "confidence must be from 0.5"),
        ({**GUARD, "on_failure": "shrink", "held_out": 1}, "held_out must be between 0 and 1.*1"),
        ({**GUARD, "watch": [3]}, r"watch\[0\] is 3"),
        ({**GUARD, "watch": "shapes"}, "^guard.watch is 'shapes', but it takes list"),
        ({**GUARD, "watch": [{"task": "shapes", "examples": 0}]}, r"examples must be at least 1"),
        (
            {**GUARD, "watch": [{"task": "shapes", "example": 9}]},
            r"^guard.watch\[0\] has the unknown key 'example'; did you mean 'examples'",
        ),
    ],
)
def test_a_mistake_in_the_guard_is_one_sentence(guard, message):
    with pytest.raises(ConfigError, match=message):
        parsed(**guard)


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (["glyphs"], "watches 'glyphs', a task of the run.*guard.watch"),
        (["shapes", {"task": "shapes", "examples": 5}], "watches 'shapes' twice"),
    ],
)
def test_a_watched_recipe_is_watched_once_and_no_task(monkeypatch, watch, message):
    monkeypatch.setattr(
        watched, "_load", lambda entry, *_: SimpleNamespace(name=entry.task, test=None, held_out=None)
    )
    monkeypatch.setattr(watched, "check_comparable", lambda data: None)
    monkeypatch.setattr(watched, "shared_images", lambda *_: "")
    task = SimpleNamespace(name="glyphs", train=None, test=None, held_out=None)
    with pytest.raises(ConfigError, match=message):
        watched.load_watched(parsed(watch=watch, watch_tasks={"max_drop": 1}), [task])


def test_no_drop_at_all_is_a_change_of_at_least_0():
    assert f"{parsed(old_tasks={'max_drop': 0}).guard.old_tasks.least:+g}" == "+0"


def test_a_run_without_a_guard_has_no_key_of_it():
    config = parse_config({"tasks": ["scene-colour"], "parts": {"vision": {}}})
    assert config.guard is None and "guard" not in json.loads(dump_config(config))
    assert "guard" not in run_identity(config)


def test_what_happens_after_a_broken_limit_may_change_while_a_run_goes_on():
    identities = [run_identity(parsed(**GUARD, on_failure=then)) for then in ("stop", "warn")]
    assert identities[0] == identities[1] and identities[0]["guard"]["watch"][0]["task"] == "shapes"


def test_shrink_holds_examples_out_which_no_other_answer_to_a_broken_limit_does():
    shrinking, warning = (parsed(**GUARD, on_failure=then) for then in ("shrink", "warn"))
    assert (shrinking.held_out, warning.held_out) == (0.1, 0.0)
    assert run_identity(shrinking)["guard"]["held_out"] == 0.1
    assert "held_out" not in run_identity(warning)["guard"]


def test_only_a_sum_of_updates_can_get_smaller():
    def config(**method):
        tree = {"tasks": ["scene-colour"], "parts": {"vision": {}}, "methods": {"row": method}}
        return parse_config(tree | {"guard": {**GUARD, "on_failure": "shrink"}})

    for name in ("keeplora", "keeplora++", "ewc", "individual"):
        check_shrinking(config(method=name))
    for name in ("keeplora+", "task-lora", "moe-adapters"):
        with pytest.raises(ConfigError, match=f"on_failure is shrink, but 'row' \\({re.escape(name)}\\)"):
            check_shrinking(config(method=name))
