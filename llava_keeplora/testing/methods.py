"""Checks of the contract of methods, on small runs.

A method is run on two small tasks four times: without interruption, stopped after every stage, stopped within
training, and as a run of one task that is extended by the second.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from llava_keeplora import journal
from llava_keeplora.config import EvaluationConfig, RunConfig, parse_config
from llava_keeplora.errors import UserError
from llava_keeplora.export.inspect_state import inspect_state
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.export.verify import probe
from llava_keeplora.methods import METHODS, Method, MethodInfo, find_changed
from llava_keeplora.models import load_model
from llava_keeplora.run_folder import result_files
from llava_keeplora.saved_run import load_run, run_identity
from llava_keeplora.sequence import method_run, run_context, runner, trainer
from llava_keeplora.testing.small import registered_name, small_run
from llava_keeplora_recipes import load_split

#: Label of the method in these runs.
LABEL = "checked"


class _Stopped(BaseException):
    """Interruption of a run at a chosen point; as a BaseException, `except Exception` does not catch it."""


@dataclasses.dataclass
class _WatchedRun:
    """A run of one method, and what was recorded of the model during it.

    Args:
        folder: the run folder.
        base: every tensor of the model as it was loaded.
        learned: the same after the last task, with all deltas.
        restored: the same after the deltas were removed again.
        hooks: Python modules whose forward hooks are left on the model.
        gradients: task → trained tensors without a gradient and frozen ones with a gradient.
        logits: logits on the last task's test split, after the last task.
    """

    folder: Path
    base: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    learned: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    restored: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    hooks: list[str] = dataclasses.field(default_factory=list)
    gradients: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    logits: Tensor | None = None


class _Trial:
    """A method with the runs that its checks need, each executed at its first use.

    Args:
        name: the method's name, as in a configuration.
        tree: a run of at least two tasks as plain data; its methods are replaced.
        options: the method's options.
        folder: the folder for the runs.
    """

    def __init__(self, name: str, tree: Mapping[str, Any], options: Mapping[str, Any], folder: Path):
        self.name, self.tree, self.options, self.folder = name, tree, options, folder
        self.cls: type[Method] = METHODS[name]
        self._whole: _WatchedRun | None = None

    def config(self, folder: str, **training: Any) -> RunConfig:
        """Return the configuration of a run of the method in a folder, with changed training arguments."""
        changes = {
            "output_dir": str(self.folder / folder),
            "tasks": list(self.tree["tasks"])[:2],
            "methods": {LABEL: {"method": self.name, **self.options}},
            "training": {**self.tree.get("training", {}), **training},
        }
        return parse_config({**self.tree, **changes})

    @property
    def whole(self) -> _WatchedRun:
        """Run without an interruption."""
        if self._whole is None:
            self._whole = _watch(self.config("whole"))
        return self._whole

    def until_done(self, config: RunConfig) -> None:
        """Start a run, and start it again after every interruption until it is finished."""
        for _ in range(100):
            try:
                return _drive(config)
            except _Stopped:
                continue
        raise AssertionError(f"'{self.name}' does not finish when it is started again after every stop")


def _drive(config: RunConfig) -> None:
    with patch.object(runner, "write_run_report", lambda root: None):
        runner.run(config)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _watch(config: RunConfig) -> _WatchedRun:
    watched, contexts = _WatchedRun(Path(config.output_dir)), []
    load, go = run_context.RunContext.load, method_run.MethodRun.go
    step = trainer.TaskTrainer.training_step

    def watched_load(self: Any) -> None:
        load(self)
        contexts.append(self)
        watched.base = _tensors(self.family.model)

    def watched_go(self: Any) -> None:
        go(self)
        if self.config.label == LABEL:
            watched.learned = _tensors(self.context.family.model)
            watched.logits = probe(self.context.family, self.tasks[-1].test)[1]

    def watched_step(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = step(self, model, *args, **kwargs)
        wrong = {name for name, p in model.named_parameters() if p.requires_grad == (p.grad is None)}
        watched.gradients.setdefault(self.ctx.name, wrong)
        return loss

    with ExitStack() as stack:
        stack.enter_context(patch.object(run_context.RunContext, "load", watched_load))
        stack.enter_context(patch.object(method_run.MethodRun, "go", watched_go))
        stack.enter_context(patch.object(trainer.TaskTrainer, "training_step", watched_step))
        _drive(config)
    contexts[0].base.apply([])
    model = contexts[0].family.model
    watched.restored = _tensors(model)
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not hook.__module__.startswith("transformers."):
                watched.hooks.append(hook.__module__)
    return watched


def _results(folder: Path) -> dict[str, bytes]:
    """Return the files of tensors and predictions that a run of the method wrote, by relative path."""
    root = folder / LABEL
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in result_files(root)}


def _check_same_results(trial: _Trial, folder: str, when: str) -> None:
    whole, other = _results(trial.whole.folder), _results(trial.folder / folder)
    assert whole.keys() == other.keys(), (
        f"'{trial.name}' leaves other files {when}: {sorted(whole.keys() ^ other.keys())}"
    )
    different = [name for name in whole if whole[name] != other[name]]
    assert not different, (
        f"'{trial.name}' ends otherwise {when} than in one go ({', '.join(different[:3])}); after "
        "load_state_dicts it must be in the state that it was in after after_task"
    )


def check_declaration(trial: _Trial) -> None:
    """Check that the class declares its `info` and its `Options`."""
    cls, info = trial.cls, trial.cls.info
    assert issubclass(cls, Method) and isinstance(info, MethodInfo), (
        f"'{trial.name}' must be a subclass of Method with an `info` of the class MethodInfo"
    )
    assert info.name and info.title, f"the info of '{trial.name}' needs a name and a title"
    options = cls.Options
    assert dataclasses.is_dataclass(options) and options.__dataclass_params__.frozen, (  # type: ignore[attr-defined]
        f"the Options of '{trial.name}' must be a frozen dataclass"
    )


def check_base_restored(trial: _Trial) -> None:
    """Check that removing the deltas restores the base bit for bit, and that no hook is left on it."""
    run = trial.whole
    assert run.restored.keys() == run.base.keys(), (
        f"'{trial.name}' leaves tensors on the model, or takes some away: "
        f"{sorted(run.restored.keys() ^ run.base.keys())[:3]}"
    )
    changed = [name for name, value in run.base.items() if not torch.equal(run.restored[name], value)]
    assert not changed, f"'{trial.name}' changes the base: {', '.join(changed[:3])}"
    assert not run.hooks, f"'{trial.name}' leaves forward hooks on the model, from {', '.join(run.hooks[:3])}"


def check_changed_tensors(trial: _Trial) -> None:
    """Check that every task changes the declared layers' weights and nothing else."""
    run, learned = trial.whole, load_learned_run(trial.whole.folder, LABEL)
    family = load_model(learned.model, EvaluationConfig(**learned.config["evaluation"]))
    changed = find_changed(trial.cls, load_run(run.folder).methods[LABEL].parts, family)
    declared = {f"{name}.weight" for name in changed.adapted} | {
        f"{name}.{leaf}"
        for name, module in changed.full.items()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    different = {name for name, value in run.learned.items() if not torch.equal(value, run.base[name])}
    assert different <= declared, (
        f"'{trial.name}' changes tensors that are not in its layers: {sorted(different - declared)[:3]}"
    )


def check_gradients(trial: _Trial) -> None:
    """Check that the loss reaches every trained tensor and no frozen one."""
    for task, names in trial.whole.gradients.items():
        assert not names, (
            f"in task '{task}' of '{trial.name}' a trained tensor has no gradient or a frozen one has: "
            f"{sorted(names)[:3]}"
        )


def check_declared_state(trial: _Trial) -> None:
    """Check that `holds` declares every tensor that a task stores, by name, shape and type."""
    config = load_run(trial.whole.folder)
    try:
        inspect_state(trial.whole.folder, config, run_identity(config)["tasks"])
    except UserError as error:
        raise AssertionError(
            f"`holds` of '{trial.name}' does not declare what its tasks keep: {error}"
        ) from None


def check_reading_back(trial: _Trial) -> None:
    """Check that the model that is loaded from the files gives the logits that the run ended with."""
    learned = load_learned_run(trial.whole.folder, LABEL)
    logits = probe(learned.load(), load_split(learned.recipes[-1], "test"))[1]
    assert trial.whole.logits is not None and torch.equal(logits, trial.whole.logits), (
        f"the model that '{trial.name}' left in its files gives other logits than the run did"
    )


def check_resuming_stages(trial: _Trial) -> None:
    """Check that a run that is stopped just before every stage is recorded ends with the same files."""
    append, done = journal.Journal.append, set()

    def stop(self: Any, entry: Any) -> None:
        key = (self.path, entry.task, entry.stage)
        if key not in done and self.path.parent.name == LABEL:
            done.add(key)
            raise _Stopped
        append(self, entry)

    with patch.object(journal.Journal, "append", stop):
        trial.until_done(trial.config("stages"))
    _check_same_results(trial, "stages", "when it is stopped after every stage")


def check_resuming_training(trial: _Trial) -> None:
    """Check that a run that is stopped within a task's training ends with the same files."""
    step, stopped = trainer.TaskTrainer.training_step, set()

    def stop(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        # By the second step, the checkpoint of the first one has been written.
        if self.state.global_step == 1 and self.ctx.name not in stopped:
            stopped.add(self.ctx.name)
            raise _Stopped
        return step(self, *args, **kwargs)

    with patch.object(trainer.TaskTrainer, "training_step", stop):
        trial.until_done(trial.config("training", save_steps=1))
    _check_same_results(trial, "training", "when it is stopped within training")


def check_extending(trial: _Trial) -> None:
    """Check that a run of one task that is extended by the second ends with the same files."""
    _drive(trial.config("extended").first(1))
    _drive(trial.config("extended"))
    whole, other = _results(trial.whole.folder), _results(trial.folder / "extended")
    names = [name for name in whole if name.endswith(".safetensors")]
    if trial.cls.bound and trial.cls.mixes:  # Its tasks are learned with the last one, whichever that is.
        names = [name for name in names if name.startswith("task-02-")]
    different = [name for name in names if other.get(name) != whole[name]]
    assert not different, (
        f"'{trial.name}' learns otherwise when a run of one task is extended than when both tasks are "
        f"announced: {', '.join(different[:3])}"
    )


METHOD_CHECKS: tuple[Callable[[_Trial], None], ...] = (
    check_declaration,
    check_base_restored,
    check_changed_tensors,
    check_gradients,
    check_declared_state,
    check_reading_back,
    check_resuming_stages,
    check_resuming_training,
    check_extending,
)


def check_method(
    method: str | type[Method],
    options: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    checks: Sequence[Callable[[_Trial], None]] = METHOD_CHECKS,
) -> None:
    """Check that a method keeps the contract; see `METHOD_CHECKS`.

    Args:
        method: the class, or its name as in a configuration.
        options: the method's settings as in a configuration.
        run: configuration of a run of at least two small tasks as plain data, whose methods are replaced; a
            small random CLIP on two small tasks when None.
        checks: the checks to make, of `METHOD_CHECKS`.

    Raises:
        AssertionError: the method breaks a rule, which the message names.
        UserError: the run cannot be started.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = small_run(Path(folder)) if run is None else run
        trial = _Trial(registered_name(method, METHODS), tree, options or {}, Path(folder))
        for check in checks:
            check(trial)
