"""The driver: every stage of every task of every method, from the journal onwards.

Running and resuming are the same code: a stage reads what earlier stages wrote, so a run that was killed
and started again goes through the very same numbers.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import set_seed

from llava_keeplora.adapters import AdapterInit, BaseWeights, Delta, attach, detach, load_deltas, read_adapters, save_deltas
from llava_keeplora.capture import feature_pass, gradient_pass
from llava_keeplora.config import MethodConfig, RunConfig
from llava_keeplora.errors import ConfigError, MethodError, RunError
from llava_keeplora.files import file_hash, write_json, write_tensors
from llava_keeplora.methods import METHODS, Layer, Method, TaskContext
from llava_keeplora.models import load_model
from llava_keeplora.sequence.data import Batches, PixelCache, Task, collate, load_tasks, stage_seed
from llava_keeplora.sequence.journal import Entry, Journal, next_stage, stages_of
from llava_keeplora.sequence.trainer import Indices, TaskTrainer, training_arguments
from llava_keeplora.sequence.workspace import Workspace, differences
from llava_keeplora_eval import Matrix, predict_to_file, score



logger = logging.getLogger(__name__)

ZERO_SHOT = "zero-shot"


def run(config: RunConfig) -> dict[str, Matrix]:
    """Run, or go on with, everything that a configuration asks for.

    Args:
        config: the run.

    Returns:
        label → accuracy matrix in percent, zero-shot first; tables and pictures are in the run folder.

    Raises:
        UserError: one sentence for whatever a user can repair; finished stages stay.
    """
    workspace = Workspace(config)
    rank = int(torch.distributed.get_rank()) if dist.is_initialized() else 0
    with workspace.locked() if rank == 0 else nullcontext():
        if rank == 0:
            workspace.claim()
        tasks = load_tasks(config)
        family = load_model(config.model)
        shared = Shared(config, workspace, tasks, family)
        methods = {ZERO_SHOT: MethodConfig(ZERO_SHOT, ZERO_SHOT, {}, config.parts, config.training), **config.methods}
        runs = [LabelRun(shared, method) for method in methods.values()]
        # Taken once, before the first method touches a weight: every method starts from the same base.
        shared.base = BaseWeights({name: layer.module for r in runs for name, layer in r.layers.items()})
        with shared.progress(sum(r.cost_left() for r in runs)):
            for label_run in runs:
                label_run.go()
        results = {r.config.label: r.matrix for r in runs}
        if rank == 0:
            _report(workspace, runs)
        return results


class Shared:
    """What all methods of a run have in common: data, model, processes, progress.

    Args:
        config: the run.
        workspace: its folder.
        tasks: the sequence.
        family: the loaded model.
    """

    def __init__(self, config: RunConfig, workspace: Workspace, tasks: list[Task], family):
        self.config, self.workspace, self.tasks, self.family = config, workspace, tasks, family
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        family.model.to(self.device)
        self.cache = PixelCache(family.pixels, config.data.cache_gb)
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world = dist.get_world_size() if self.distributed else 1
        self.base: BaseWeights
        self.bar: tqdm | None = None

    def progress(self, cost: float) -> tqdm:
        """One bar over everything that is left; its unit is an image through the model once."""
        self.bar = tqdm(total=round(cost), unit="img", unit_scale=True, smoothing=0.05, disable=self.rank != 0, dynamic_ncols=True)
        return self.bar

    def advance(self, cost: float) -> None:
        """Move the bar on."""
        self.bar.update(cost)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.distributed:
            dist.barrier()


class LabelRun:
    """One labelled method over the sequence.

    Args:
        shared: what the methods of the run have in common.
        config: the method.
    """

    def __init__(self, shared: Shared, config: MethodConfig):
        self.shared, self.config, self.tasks = shared, config, shared.tasks
        self.folder = shared.workspace.label(config.label)
        cls = METHODS[config.method]
        self.method: Method = cls(cls.Options(**config.options))
        self.journal = Journal(self.folder / "journal.jsonl")
        self.count = len(self.tasks) if cls.learns else 0
        self.epochs = shared.config.epochs(config.label) if cls.learns else []
        self._method_at = 0
        self.layers = self._find_layers()
        names = [task.name for task in self.tasks]
        path = self.folder / "matrix.json"
        self.matrix = Matrix.from_json(path) if path.exists() else Matrix(names, [None] * len(names), [])
        self._check_history()

    # --- order -----------------------------------------------------------------------------------

    def go(self) -> None:
        """Run stage after stage until every task is closed."""
        todo = next_stage(self.journal.entries, self.count)
        if todo is None:
            return
        while todo is not None:
            index, stage = todo
            self._describe(index, stage)
            set_seed(stage_seed(self.shared.config.seed, index, stage))
            start = time.perf_counter()
            files, info = getattr(self, f"_{stage.lower()}")(index)
            seconds = time.perf_counter() - start
            self.shared.barrier()
            entry = Entry(index, stage, round(seconds, 3), {str(p.relative_to(self.folder)): file_hash(p) for p in files}, info)
            if self.shared.rank == 0:
                self.journal.append(entry)
            else:
                self.journal.entries.append(entry)
            logger.info("%s: %s of task %d/%d (%s) done in %.1f s", self.config.label, stage, index, self.count, self._name(index), seconds)
            todo = next_stage(self.journal.entries, self.count)

    def cost_left(self) -> float:
        """Images through the model that the open stages still need; a training step counts three passes."""
        done = {(entry.task, entry.stage) for entry in self.journal.entries}
        return sum(
            self._cost(task, stage) for task in range(self.count + 1) for stage in stages_of(task) if (task, stage) not in done
        )

    def _cost(self, index: int, stage: str) -> float:
        if stage == "EVALUATED":
            return 0 if index == 0 and self.config.label != ZERO_SHOT else sum(len(task.test) for task in self.tasks)
        if index == 0 or stage in ("PLANNED", "CLOSED"):
            return 0
        n = len(self.tasks[index - 1].train)
        if stage == "TRAINED":
            return 3 * n * self.epochs[index - 1]
        return {"PREPARED": 3 * n, "CONSOLIDATED": n}[stage] if self.config.method.startswith("keeplora") else 0

    def _describe(self, index: int, stage: str) -> None:
        self.shared.bar.set_description(f"{self.config.label} {index}/{self.count} {self._name(index)} {stage.lower()}")

    def _name(self, index: int) -> str:
        return self.tasks[index - 1].name if index else "base"

    def path(self, index: int, name: str = "") -> Path:
        """A file of a task's folder."""
        return self.shared.workspace.task(self.config.label, index, self._name(index)) / name

    # --- history ---------------------------------------------------------------------------------

    def _check_history(self) -> None:
        """What the folder holds must be whole, and the data what it was when a task was planned."""
        self.journal.verify()
        for entry in self.journal.entries:
            if entry.stage == "PLANNED":
                changed = list(differences(entry.info, json.loads(json.dumps(self._plan(entry.task)))))
                if changed:
                    key, old, new = changed[0]
                    raise RunError(
                        f"{self.folder}, task {entry.task}: {key} was {old!r} when it was planned and is {new!r} now",
                        "restore the data or the recipe, or start over in a new output_dir",
                    )

    def _plan(self, index: int) -> dict[str, Any]:
        return {"seed": self.shared.config.seed, "tasks": [t.record() for t in (self.tasks if index == 0 else self.tasks[index - 1 : index])]}

    def _find_layers(self) -> dict[str, Layer]:
        """The layers that this method adapts, by full name."""
        family, found = self.shared.family, {}
        for part, settings in self.config.parts.items() if self.count else ():
            for name, module in family.linear_layers(part, settings.targets).items():
                found[name] = Layer(name, part, module, settings.rank, settings.alpha, settings.energy_weight, settings.energy_feature)
        if self.count and not found:
            raise ConfigError("the run adapts no part of the model", f"name at least one of {', '.join(family.parts)} under `parts`")
        return found

    def _rebuild(self, tasks: int) -> None:
        """Put the model and the method into the state after so many tasks, from the files alone."""
        self.shared.base.apply(load_deltas(self.path(t, "delta.safetensors")) for t in range(1, tasks + 1))
        known = [self.path(t, "state.safetensors") for t in range(tasks + 1)]
        known = [path for path in known if path.exists()]
        if len(known) != self._method_at:
            self.method.load([load_file(path) for path in known])
            self._method_at = len(known)

    # --- stages ----------------------------------------------------------------------------------

    def _planned(self, index: int) -> tuple[list[Path], dict]:
        return [], self._plan(index)

    def _prepared(self, index: int) -> tuple[list[Path], dict]:
        self._rebuild(index - 1)
        ctx = self._context(index, "PREPARED")
        inits = self.method.prepare(ctx)
        for name, why in ctx.report.get("left_out", {}).items():
            logger.warning("%s: layer %s is left out of task %s: %s", self.config.label, name, ctx.name, why)
        tensors, path = self.path(index, "adapters.safetensors"), self.path(index, "prepared.json")
        start = {f"{n}.{k}": getattr(i, k) for n, i in inits.items() for k in ("A", "B") if getattr(i, k) is not None}
        if self.shared.rank == 0:
            self._write(tensors, start)
            layers = {n: {"rank": i.rank, "alpha": i.alpha, "train_A": i.train_A} for n, i in inits.items()}
            write_json(path, {"layers": layers, "report": ctx.report})
        self.shared.barrier()
        return [path] + [tensors] * bool(start), {"layers": len(inits), "left_out": len(ctx.report.get("left_out", {}))}

    @staticmethod
    def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        # An empty safetensors file cannot be read back; nothing is said by no file.
        if tensors:
            write_tensors(path, tensors)

    def _inits(self, index: int) -> dict[str, AdapterInit]:
        layers = json.loads(self.path(index, "prepared.json").read_text())["layers"]
        path = self.path(index, "adapters.safetensors")
        tensors = load_file(path) if path.exists() else {}
        return {n: AdapterInit(**values, A=tensors.get(f"{n}.A"), B=tensors.get(f"{n}.B")) for n, values in layers.items()}

    def _trained(self, index: int) -> tuple[list[Path], dict]:
        self._rebuild(index - 1)
        shared, task, inits = self.shared, self.tasks[index - 1], self._inits(index)
        if self.method.base_offset(inits):
            with torch.no_grad():
                for name, init in inits.items():
                    weight = self.layers[name].module.weight
                    weight -= Delta(init.A, init.B, init.scale).dense().to(weight)
        set_seed(stage_seed(shared.config.seed, index, "TRAINED"))
        wrapper = attach(shared.family.model, inits)
        try:
            history = self._train(index, task)
            trained = read_adapters(shared.family.model)
        finally:
            detach(wrapper)
        deltas = {
            name: Delta(d.A.cpu(), d.B.cpu() - (inits[name].B if inits[name].B is not None else 0), d.scale) for name, d in trained.items()
        }
        delta_path, log_path = self.path(index, "delta.safetensors"), self.path(index, "train.json")
        if shared.rank == 0:
            save_deltas(delta_path, deltas)
            write_json(log_path, history)
        shared.barrier()
        trainable = sum(d.B.numel() + (d.A.numel() if inits[n].train_A else 0) for n, d in deltas.items())
        return [delta_path, log_path], {"steps": history["steps"], "trained_parameters": trainable}

    def _train(self, index: int, task: Task) -> dict[str, Any]:
        shared = self.shared
        arguments = training_arguments(
            self.config.training,
            output_dir=str(self.path(index, "trainer")),
            seed=stage_seed(shared.config.seed, index, "TRAINED"),
            epochs=self.epochs[index - 1],
        )
        model = shared.family.task(task.recipe)
        cost = 3 * arguments.train_batch_size * arguments.gradient_accumulation_steps * shared.world
        trainer = TaskTrainer(
            method=self.method,
            ctx=self._context(index, "TRAINED"),
            on_step=functools.partial(shared.advance, cost),
            model=model,
            args=arguments,
            train_dataset=Indices(len(task.train)),
            data_collator=functools.partial(collate, task.train, shared.cache),
        )
        result = trainer.train()
        history = {"steps": trainer.state.global_step, "loss": result.training_loss, "history": trainer.state.log_history}
        trainer.accelerator.free_memory()
        shared.family.model.eval().requires_grad_(False)
        del trainer
        gc.collect()
        return history

    def _consolidated(self, index: int) -> tuple[list[Path], dict]:
        self._rebuild(index)
        ctx = self._context(index, "CONSOLIDATED")
        self.method.consolidate(ctx)
        added = self.method.state()
        state, path = self.path(index, "state.safetensors"), self.path(index, "consolidated.json")
        if self.shared.rank == 0:
            self._write(state, added)
            write_json(path, ctx.report)
        self.shared.barrier()
        self._method_at += bool(added)
        return [path] + [state] * bool(added), {}

    def _evaluated(self, index: int) -> tuple[list[Path], dict]:
        zero_shot = self.shared.workspace.task(ZERO_SHOT, 0, "base") / "scores.json"
        path = self.path(index, "scores.json")
        if self.shared.rank == 0:
            if index == 0 and self.config.label != ZERO_SHOT:
                scores = json.loads(zero_shot.read_text())
            else:
                self._rebuild(index)
                scores = {task.name: self._score(index, task) for task in self.tasks}
            for task in self.tasks:
                self.matrix.set_cell(index - 1 if index else None, task.name, scores[task.name]["score"])
                self.matrix.to_json(self.folder / "matrix.json")
            write_json(path, scores)
        self.shared.barrier()
        return [path], {}

    def _score(self, index: int, task: Task) -> dict[str, Any]:
        path = self.path(index, f"predictions/{task.name.replace('/', '-')}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        family, shared = self.shared.family, self.shared
        where = {example_id: i for i, example_id in enumerate(task.test.ids)}
        predictor = family.predictor(task.recipe, pixels=lambda examples: shared.cache.take(task.test, [where[e.id] for e in examples]))
        predict_to_file(predictor, task.test, path, batch_size=shared.config.evaluation.batch_size)
        shared.advance(len(task.test))
        return score(task.test, path).to_dict()

    def _closed(self, index: int) -> tuple[list[Path], dict]:
        seconds = sum(entry.seconds for entry in self.journal.entries if entry.task == index)
        return [], {"seconds": round(seconds, 1)}

    # --- what a method sees ------------------------------------------------------------------------

    def _context(self, index: int, stage: str) -> TaskContext:
        return TaskContext(
            index=index,
            name=self._name(index),
            layers=self.layers,
            gradients=functools.partial(self._gradients, index),
            features=functools.partial(self._features, index),
            seed=stage_seed(self.shared.config.seed, index, stage),
        )

    def _batches(self, index: int, fraction: float, cost: float) -> Any:
        shared, task = self.shared, self.tasks[index - 1]
        size = int(self.config.training.get("per_device_train_batch_size", 8))
        batches = Batches(task.train, shared.cache, size, fraction, shared.rank, shared.world, shared.device)

        def counted():
            for batch in batches:
                yield batch
                shared.advance(cost * len(batch["labels"]) * shared.world)

        return counted(), batches.total

    def _autocast(self):
        """The precision that training uses, for the passes too."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}
        chosen = next((dtype for key, dtype in kind.items() if self.config.training.get(key)), None)
        return torch.autocast(self.shared.device.type, chosen) if chosen else nullcontext()

    def _gradients(self, index: int, fraction: float) -> dict[str, torch.Tensor]:
        batches, total = self._batches(index, fraction, 3)
        task = self.shared.family.task(self.tasks[index - 1].recipe)
        with self._autocast():
            return gradient_pass(task, {n: layer.module for n, layer in self.layers.items()}, batches, total)

    def _features(self, index: int, statistic: Callable[[int], Any]):
        batches, _ = self._batches(index, 1.0, 1)
        task = self.shared.family.task(self.tasks[index - 1].recipe)
        modules = {n: layer.module for n, layer in self.layers.items()}
        with self._autocast():
            return feature_pass(task, modules, {n: layer.part for n, layer in self.layers.items()}, batches, statistic)


def _report(workspace: Workspace, runs: list[LabelRun]) -> None:
    """Tables and pictures of everything that is there."""
    from llava_keeplora.report.run_report import write_run_report

    write_run_report(workspace.root)
