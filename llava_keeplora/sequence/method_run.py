"""One labelled method over the sequence: its stages, each from what earlier ones wrote."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from llava_keeplora.adapters import (
    AdapterInit,
    Delta,
    Deltas,
    FullDelta,
    attach,
    detach,
    load_deltas,
    read_adapters,
    save_deltas,
)
from llava_keeplora.capture import autocast, feature_pass, gradient_pass
from llava_keeplora.config import ALL_LINEAR, AVERAGED, ZERO_SHOT, MethodConfig
from llava_keeplora.deepspeed_zero import forget_engine, gathered, number_count, trained_values
from llava_keeplora.errors import RunError, TrainingError
from llava_keeplora.files import read_tensors, write_json, write_tensors
from llava_keeplora.journal import Entry, Journal, next_stage, open_stages
from llava_keeplora.methods import METHODS, Changed, Layer, Method, TaskContext, find_changed
from llava_keeplora.run_folder import (
    ADAPTERS,
    CONSOLIDATED,
    DELTA,
    JOURNAL,
    KEPT,
    MATRIX,
    PREPARED,
    SCORES,
    STATE,
    TRAIN,
    Stage,
    differences,
    file_name,
    read_record,
)
from llava_keeplora.sequence import auto_energy
from llava_keeplora.sequence.checkpoint import StepCheckpoint
from llava_keeplora.sequence.data import Batches, stage_seed
from llava_keeplora.sequence.forecast import forecast, shortage
from llava_keeplora.sequence.inference_latency import EXAMPLES, TOKENS, seconds_per_example
from llava_keeplora.sequence.memory import peak_memory
from llava_keeplora.sequence.progress import duration
from llava_keeplora.sequence.reporters import end_own_place, give_own_place
from llava_keeplora.sequence.run_context import RunContext
from llava_keeplora.sequence.trainer import CURE, Indices, TaskTrainer, without_timings
from llava_keeplora.start import Task
from llava_keeplora.start.training_args import training_arguments
from llava_keeplora.versions import worker_counts
from llava_keeplora_eval import Matrix, predict_to_file, score
from llava_keeplora_eval.files import file_hash
from llava_keeplora_eval.predictions import join_shards
from llava_keeplora_eval.predictors import Predictor

logger = logging.getLogger(__name__)

#: What a person reads while a stage runs.
ACTIVITY = {
    Stage.PLANNED: "planning",
    Stage.PREPARED: "preparing the adapters",
    Stage.TRAINED: "training",
    Stage.CONSOLIDATED: "protecting what it knows",
    Stage.EVALUATED: "scoring every task",
    Stage.CLOSED: "closing",
}


class MethodRun:
    """One labelled method over the sequence.

    Args:
        context: what the methods of the run have in common.
        config: the method.
    """

    def __init__(self, context: RunContext, config: MethodConfig):
        self.context, self.config, self.tasks = context, config, context.tasks
        self.folder = context.workspace.label(config.label)
        cls = METHODS[config.method]
        self.method: Method = cls(cls.Options(**config.options))
        self.journal = Journal(self.folder / JOURNAL)
        if config.label in context.workspace.begun_anew():
            self.journal.forget()
        self.trainable = cls.trainable
        self.count = len(self.tasks) if cls.trainable else 0
        self.averaged = config.test_prompts == AVERAGED
        # What the untouched model scores, the first row that is read with the same prompts has measured.
        self.first_alike = context.config.first_alike(config.label)
        self.trainings = context.config.trainings(config.label) if cls.trainable else []
        self._states_loaded: tuple[int, int] | None = None
        self.layers, self.full, self.unreachable = self._find_layers()
        self.matrix = Matrix([task.name for task in self.tasks], [None] * len(self.tasks), [])
        self.method.reference = context.references.get(config.label)
        self._check_history()

    # --- order -----------------------------------------------------------------------------------

    def go(self) -> None:
        """Run stage after stage until every task is closed."""
        self.context.progress.watch(self.config.label, self.matrix)
        while (todo := self._next()) is not None:
            index, stage = todo
            with self.context.progress.stage(
                f"{self.config.label} {self._where(index)}: {ACTIVITY[stage]}", self._cost(index, stage)
            ):
                self._run_stage(index, stage)
            if stage == Stage.CLOSED and (index or self.config.label == ZERO_SHOT):
                self.context.progress.note(self._closing_line(index))

    def _run_stage(self, index: int, stage: str) -> None:
        set_seed(stage_seed(self.context.config.seed, index, stage))
        start = time.perf_counter()
        with peak_memory(self.context.device) as peak:
            files, info = getattr(self, f"_{stage.lower()}")(index)
        seconds = time.perf_counter() - start
        peak["peak_bytes"] = self.context.most(peak["peak_bytes"])
        self.context.barrier()
        entry = Entry(
            index,
            stage,
            round(seconds, 3),
            {str(p.relative_to(self.folder)): file_hash(p) for p in files},
            info | peak | worker_counts(),
        )
        if self.context.rank == 0:
            self.journal.append(entry)
        else:
            self.journal.entries.append(entry)
        logger.debug("%s: %s of %s done in %.1f s", self.config.label, stage, self._where(index), seconds)

    def _next(self) -> tuple[int, str] | None:
        return next_stage(self.journal.entries, len(self.tasks), self.trainable)

    def cost_left(self) -> float:
        """Images through the model that the open stages still need; a training step counts three passes."""
        return sum(
            self._cost(task, stage)
            for task, stage in open_stages(self.journal.entries, len(self.tasks), self.trainable)
        )

    def _cost(self, index: int, stage: str) -> float:
        if stage == Stage.EVALUATED:
            copied = index == 0 and self.config.label != self.first_alike
            answered = self.journal.files()
            new = [
                task
                for task in self.tasks
                if str(self._predictions(index, task).relative_to(self.folder)) not in answered
            ]
            return 0 if copied else self.context.family.eval_cost * sum(len(task.test) for task in new)
        if index == 0 and stage == Stage.CONSOLIDATED and stage in self.method.stage_cost:
            return auto_energy.cost(self.context, self.layers)
        if index == 0 or stage in (Stage.PLANNED, Stage.CLOSED):
            return 0
        n = len(self.context.inputs[index - 1])
        training = 3 * self._trained_images(index, n) if stage == Stage.TRAINED else 0
        return training + n * self.method.stage_cost.get(stage, 0.0)

    def _trained_images(self, index: int, count: int) -> float:
        """Images of which a task's training takes its steps, each counted as often as it is seen."""
        own = self.trainings[index - 1]
        steps, size, pieces = (
            int(own.get(key, default))
            for key, default in (
                ("max_steps", -1),
                ("per_device_train_batch_size", 8),
                ("gradient_accumulation_steps", 1),
            )
        )
        return steps * size * pieces * self.context.world if steps > 0 else count * own["num_train_epochs"]

    def _where(self, index: int) -> str:
        return f"task {index}/{self.count} {self._name(index)}" if index else "before any task"

    def _closing_line(self, index: int) -> str:
        if index == 0:
            return f"{ZERO_SHOT}: {_mean(self.matrix.zero_shot):.1f} % on average over all tasks"
        row, seconds = self.matrix.rows[index - 1], self.journal.entries[-1].info["seconds"]
        return (
            f"{self.config.label} {self._where(index)}: {row[index - 1]:.1f} % on it, "
            f"{_mean(row[:index]):.1f} % on average over the tasks so far, {_mean(row):.1f} % over all, in {duration(seconds)}"
        )

    def _name(self, index: int) -> str:
        return self.tasks[index - 1].name if index else "base"

    def _tag(self, index: int) -> str:
        """LABEL/task-NN-NAME, which trackers tell the run's tasks apart by."""
        return str(self.path(index).relative_to(self.context.workspace.root))

    def path(self, index: int, name: str = "") -> Path:
        """A file of a task's folder."""
        return self.context.workspace.task(self.config.label, index, self._name(index)) / name

    # --- history ---------------------------------------------------------------------------------

    def _check_history(self) -> None:
        """What the folder holds must be whole, and the data what it was when a task was planned; fills the matrix."""
        try:
            self._next()
        except RunError as error:
            raise RunError(f"{self.journal.path}: {error.problem}", error.cure) from None
        self.journal.verify()
        for entry in self.journal.entries:
            if entry.stage == Stage.PLANNED:
                self._check_plan(entry)
            elif entry.stage == Stage.EVALUATED:
                self._fill_matrix(entry.task, read_record(self.path(entry.task, SCORES)))

    def _check_plan(self, entry: Entry) -> None:
        now = json.loads(json.dumps(self._plan(entry.task)))
        # A plan from before the run was extended has fewer.
        held = [
            (f"task '{new['task']}'", old, new) for old, new in zip(entry.info.get("tasks", ()), now["tasks"])
        ]
        held += (
            [("the reference data", entry.info["reference"], now["reference"])] if "reference" in now else []
        )
        for what, old, new in held:
            for key, before, after in differences(old, new):
                decoded = (
                    next((t.decoding_note() for t in self.tasks if t.name == new.get("task")), "")
                    if key.endswith(".fingerprint")
                    else ""
                )
                raise RunError(
                    f"{what} is not what it was when {self.folder} was planned ({key}: {before!r} → {after!r}{decoded})",
                    "restore its data and recipe to go on, or choose another output_dir",
                )

    def _plan(self, index: int) -> dict[str, Any]:
        tasks = self.tasks if index == 0 else self.tasks[index - 1 : index]
        beside = {"reference": self.method.reference.record} if self.method.reference else {}
        read = [{"test_prompts": list(t.recipe.test_prompts)} if self.averaged else {} for t in tasks]
        return {
            "seed": self.context.config.seed,
            "tasks": [t.record() | own for t, own in zip(tasks, read)],
            **beside,
        }

    def _find_layers(self) -> tuple[dict[str, Layer], dict[str, nn.Module], list[str]]:
        """The layers that this method adapts, the modules that it trains in full, and the layers that the loss cannot reach."""
        found = (
            find_changed(type(self.method), self.config.parts, self.context.family)
            if self.count
            else Changed()
        )
        if found.unreachable:
            logger.warning(
                "%s: %d layers cannot receive a gradient from this model's loss and are left out (%s, ...)",
                self.config.label,
                len(found.unreachable),
                found.unreachable[0],
            )
        for part in (name for name, own in self.config.parts.items() if own.targets == (ALL_LINEAR,)):
            leaves = sorted(
                {name.rpartition(".")[2] for name, layer in found.adapted.items() if layer.part == part}
            )
            logger.info(
                "%s: %s of %s are its layers %s",
                self.config.label,
                ALL_LINEAR,
                part,
                ", ".join(leaves) or "trained in full",
            )
        return found.adapted, found.full, found.unreachable

    def modules(self) -> dict[str, nn.Module]:
        """Every module that this method changes, by full name."""
        return self._adapted() | self.full

    def _rebuild(self, deltas: int, states: int | None = None, offset: Mapping[str, Delta] = {}) -> None:
        """Put the model and the method into the state after so many tasks, from the files alone.

        Args:
            deltas: tasks whose delta the weights carry.
            states: stages of the base and the tasks that the method has consolidated; deltas + 1 by default.
            offset: layer name → what is added to the weights beside the tasks' deltas.
        """
        states = deltas + 1 if states is None else states
        self.context.base.apply([*self._deltas(deltas), offset])
        if (deltas, states) != self._states_loaded:
            self.method.load_state_dicts(
                [self._kept(t) | (self._state(t) if t < states else {}) for t in range(deltas + 1)]
            )
            self._states_loaded = (deltas, states)

    def _kept(self, task: int) -> dict[str, torch.Tensor]:
        return _read(self.path(task, KEPT))

    def _state(self, task: int) -> dict[str, torch.Tensor]:
        return _read(self.path(task, STATE))

    def _deltas(self, count: int) -> list[Deltas]:
        """What each of the first tasks left behind."""
        return [load_deltas(self.path(t, DELTA)) for t in range(1, count + 1)]

    # --- stages ----------------------------------------------------------------------------------

    def _planned(self, index: int) -> tuple[list[Path], dict]:
        return [], self._plan(index)

    def _prepared(self, index: int) -> tuple[list[Path], dict]:
        self._rebuild(index - 1)
        ctx = self._context(index, Stage.PREPARED)
        inits = self.method.init_adapters(ctx)
        for name, why in ctx.report.get("left_out", {}).items():
            logger.warning("%s: layer %s is left out of task %s: %s", self.config.label, name, ctx.name, why)
        tensors, path = self.path(index, ADAPTERS), self.path(index, PREPARED)
        start = {
            f"{n}.{k}": getattr(i, k)
            for n, i in inits.items()
            for k in ("A", "B")
            if getattr(i, k) is not None
        }
        if self.context.rank == 0:
            self._write(tensors, start)
            layers = {n: {"rank": i.rank, "alpha": i.alpha, "train_A": i.train_A} for n, i in inits.items()}
            write_json(path, {"layers": layers, "unreachable": self.unreachable, "report": ctx.report})
        self.context.barrier()
        counts = {
            "layers": len(inits),
            "left_out": len(ctx.report.get("left_out", {})),
            "unreachable": len(self.unreachable),
        }
        return [path] + [tensors] * bool(start), counts

    @staticmethod
    def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        # An empty safetensors file cannot be read back; nothing is said by no file.
        if tensors:
            write_tensors(path, tensors)

    def _inits(self, index: int) -> dict[str, AdapterInit]:
        layers = read_record(self.path(index, PREPARED))["layers"]
        tensors = _read(self.path(index, ADAPTERS))
        return {
            n: AdapterInit(**values, A=tensors.get(f"{n}.A"), B=tensors.get(f"{n}.B"))
            for n, values in layers.items()
        }

    def _trained(self, index: int) -> tuple[list[Path], dict]:
        context, task, inits, ctx = (
            self.context,
            self.tasks[index - 1],
            self._inits(index),
            self._context(index, Stage.TRAINED),
        )
        self._rebuild(index - 1, offset=self.method.weight_offset(inits))
        set_seed(stage_seed(context.config.seed, index, Stage.TRAINED))
        wrapper = attach(context.family.model, inits, self.method.dropout, master_copies=context.zero.used)
        before = {name: _copied(module) for name, module in self.full.items()}
        for module in self.full.values():
            for p in module.parameters(recurse=False):
                p.requires_grad_(True)

        def learned() -> dict[str, Delta | FullDelta]:
            changes = {name: _taken_back(self.full[name], start) for name, start in before.items()}
            adapters = {
                name: _from_start(delta, inits[name])
                for name, delta in read_adapters(context.family.model, inits).items()
            }
            return {**changes, **self.method.finalize_deltas(ctx, adapters)}

        try:
            with self.method.training_context(ctx, context.family.model):
                trainable = sum(number_count(p) for p in context.family.model.parameters() if p.requires_grad)
                history, deltas, kept = self._train(ctx, task, learned)
        finally:
            detach(wrapper)
        for name, value in [
            (name, value) for name, delta in deltas.items() for value in delta.tensors.values()
        ] + list(kept.items()):
            if not torch.isfinite(value).all():
                raise TrainingError(
                    f"the weights of task '{task.name}' are not finite after its {history['steps']} steps, first in layer {name}",
                    CURE,
                )
        delta_path, log_path, kept_path = (self.path(index, name) for name in (DELTA, TRAIN, KEPT))
        if context.rank == 0:
            save_deltas(delta_path, deltas)
            self._write(kept_path, kept)
            write_json(log_path, history | {"report": ctx.report})
            StepCheckpoint(self.path(index)).remove()
        context.barrier()
        return [delta_path, log_path] + [kept_path] * bool(kept), {
            "steps": history["steps"],
            "trained_parameters": trainable,
        }

    def _train(
        self, ctx: TaskContext, task: Task, learned: Callable[[], dict[str, Delta | FullDelta]]
    ) -> tuple[dict[str, Any], dict[str, Delta | FullDelta], dict[str, torch.Tensor]]:
        """Train; `learned` reads the outcome while an engine still holds its fp32 copies."""
        context, index = self.context, ctx.index
        arguments = self._training_arguments(index)
        model, scale = context.family.task(task.recipe), self.config.random_resized_crop
        crops = context.family.crops(task.train, scale, arguments.seed) if scale else None
        cost = 3 * arguments.train_batch_size * arguments.gradient_accumulation_steps * context.world
        trainer = TaskTrainer(
            method=self.method,
            ctx=ctx,
            on_step=functools.partial(context.progress.advance, cost),
            model=model,
            args=arguments,
            rates=self._rates(),
            checkpoint=StepCheckpoint(self.path(index)),
            train_dataset=Indices(len(context.inputs[index - 1])),
            crops=crops,
            data_collator=(crops or context.inputs[index - 1]).collate,
        )
        give_own_place(trainer, context.workspace.root, self._tag(index))
        context.progress.advance(cost * trainer.steps_before)
        result = trainer.go()
        end_own_place(trainer)
        history = {
            "steps": trainer.state.global_step,
            "loss": result.training_loss,
            "history": without_timings(trainer.state.log_history),
        }
        deltas, kept = learned(), self.method.extra_state()
        trainer.accelerator.free_memory()
        forget_engine(context.family.model.parameters())
        context.family.model.eval().requires_grad_(False)
        del trainer
        gc.collect()
        return history, deltas, kept

    def _rates(self) -> dict[int, float]:
        """Id of a parameter → learning rate, for those parts that have their own."""
        own = {
            part: settings.learning_rate
            for part, settings in self.config.parts.items()
            if settings.learning_rate is not None
        }
        family, rates = self.context.family, {}
        for part, rate in own.items():
            prefix = family.parts[part] + "."
            rates |= {
                id(p): rate
                for name, p in family.model.named_parameters()
                if name.startswith(prefix) and p.requires_grad
            }
        return rates

    def _training_arguments(self, index: int):
        return training_arguments(
            self.trainings[index - 1],
            output_dir=str(self.path(index, "trainer")),
            run_name=f"{self.config.training.get('run_name') or self.context.workspace.root.resolve().name}/{self._tag(index)}",
            seed=stage_seed(self.context.config.seed, index, Stage.TRAINED),
        )

    def _consolidated(self, index: int) -> tuple[list[Path], dict]:
        if index or not self.method.base_is_cacheable:
            return self._consolidate(index), {}
        files = {name: self.path(0, name) for name in (CONSOLIDATED, STATE)}
        taken = self.context.once(self._base_facts(), files, lambda: self._consolidate(0))
        return [path for path in files.values() if path.exists()], _taken(taken)

    def _base_facts(self) -> dict[str, Any]:
        """What a fixed base depends on, beside the model."""
        data = {task.name: task.record()["train"] for task in self.tasks}
        name = self.config.method
        source = {"source": METHODS.source_files(name)} if METHODS.is_plugin(name) else {}
        settings = {
            "method": METHODS.portable_name(name),
            **source,
            "options": self.config.options,
            "parts": {n: dataclasses.asdict(p) for n, p in self.config.parts.items()},
        }
        return {
            "stage": Stage.CONSOLIDATED,
            "tasks": data,
            "statistics_gb": self.context.config.memory.statistics_gb,
            **settings,
        }

    def _consolidate(self, index: int) -> list[Path]:
        # A killed attempt may have left this stage's own state behind; it must not count twice.
        self._rebuild(index, states=index)
        ctx = self._context(index, Stage.CONSOLIDATED)
        self.method.after_task(ctx)
        if index and "capacity" in ctx.report:
            ctx.report["forecast"] = self._forecast(index, ctx.report["capacity"])
        added = self.method.state_dict()
        state, path = self.path(index, STATE), self.path(index, CONSOLIDATED)
        if self.context.rank == 0:
            self._write(state, added)
            write_json(path, ctx.report)
        self.context.barrier()
        # Several processes go on with the first one's directions, whatever their own machines' rounding made of the same sums.
        self._states_loaded = (index, index + 1) if self.context.world == 1 else None
        return [path] + [state] * bool(added)

    def _forecast(self, index: int, capacity: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Layer → for how many more tasks it has room; a warning where that is too few."""
        before = [read_record(self.path(t, CONSOLIDATED))["capacity"] for t in range(index)]
        rooms = forecast([*before, capacity], self.layers)
        told = shortage(rooms, self.layers, len(self.tasks) - index)
        if told:
            logger.warning("%s: %s", self.config.label, told)
        return {name: room.to_dict() for name, room in rooms.items()}

    def _evaluated(self, index: int) -> tuple[list[Path], dict]:
        copied, taken = index == 0 and self.config.label != self.first_alike, 0.0
        path, predictions = (
            self.path(index, SCORES),
            [] if copied else [self._predictions(index, task) for task in self.tasks],
        )
        if copied:
            scores = read_record(self.context.workspace.task(self.first_alike, 0, "base") / SCORES)
        else:
            self._rebuild(index)
            scores = {}
            with self.context.zero.engaged(self.context.family.model):
                for task in self.tasks:
                    taken += self._answered(index, task)
                    if self.context.rank == 0:
                        scores[task.name] = self._score(index, task)
        if self.context.rank == 0:
            write_json(path, scores)
        self.context.barrier()
        self._fill_matrix(index, read_record(path))
        if self.context.rank == 0:
            self.write_matrix()
        return [path, *predictions], _taken(taken)

    def _predictions(self, index: int, task: Task) -> Path:
        return self.path(index, f"predictions/{file_name(task.name)}.jsonl")

    def _answered(self, index: int, task: Task) -> float:
        """Have every answer to a task in one file; returns the seconds that those of the untouched model took another run, 0 if made now."""
        path = self._predictions(index, task)

        def make() -> None:
            self._predict(index, task)
            self.context.barrier()
            if self.context.rank == 0:
                join_shards(path, task.test)

        if index == 0:
            evaluation = self.context.config.evaluation
            facts = {
                "stage": Stage.EVALUATED,
                "task": task.name,
                "data": task.record()["test"],
                "max_new_tokens": evaluation.max_new_tokens,
                "generation": evaluation.generation,
            }
            facts |= {"test_prompts": list(task.recipe.test_prompts)} if self.averaged else {}
            return self.context.once(facts, {"predictions.jsonl": path}, make)
        make()
        return 0.0

    def _predict(self, index: int, task: Task) -> None:
        """This process's share of the answers; processes wait for each other afterwards only."""
        context = self.context
        predictor = self._predictor(index, task)
        cost = context.family.eval_cost * context.world
        predict_to_file(
            predictor,
            task.test,
            self._predictions(index, task),
            batch_size=context.config.evaluation.batch_size,
            advance=lambda count: context.progress.advance(cost * count),
            shard=(context.rank, context.world),
            # Shards of weights are gathered by all processes together, so that all make equally many predictions.
            rounds=context.most if context.zero.partitions else None,
        )

    def _predictor(self, index: int, task: Task, tokens: int | None = None) -> Predictor:
        """What answers a task's test examples after so many tasks; the model alone before the first."""
        predictor = self.context.family.predictor(task.recipe, self.context.cache.split(task.test), tokens)
        predictor = predictor.with_test_prompts() if self.averaged else predictor
        return self.method.predictor(predictor, task.name) if index else predictor

    def _score(self, index: int, task: Task) -> dict[str, Any]:
        result = score(task.test, self._predictions(index, task)).to_dict()
        self._fill_matrix(index, {task.name: result})
        self.write_matrix()
        return result

    def _fill_matrix(self, index: int, scores: dict[str, Any]) -> None:
        for name, result in scores.items():
            self.matrix.set_cell(index - 1 if index else None, name, result["score"])

    def write_matrix(self) -> None:
        """Write the matrix, as far as it is filled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.matrix.to_json(self.folder / MATRIX)

    def _closed(self, index: int) -> tuple[list[Path], dict]:
        seconds = sum(entry.seconds for entry in self.journal.entries if entry.task == index)
        last = {"test_seconds": self._test_seconds(index)} if index and index == self.count else {}
        return [], {"seconds": round(seconds, 1), **last}

    def _test_seconds(self, index: int) -> dict[str, float]:
        """What an example of a task takes the untouched model and the learned one, one after the other on the same batch."""
        task, family = self.tasks[index - 1], self.context.family
        # No larger than what was answered at once before, which fits.
        examples = [
            task.test[i]
            for i in range(min(EXAMPLES, self.context.config.evaluation.batch_size, len(task.test)))
        ]
        self.context.base.apply([])
        with self.context.zero.engaged(family.model):
            untouched = seconds_per_example(self._predictor(0, task, TOKENS), examples)
        self._rebuild(index)
        with self.context.zero.engaged(family.model):
            return {
                "untouched": untouched,
                "learned": seconds_per_example(self._predictor(index, task, TOKENS), examples),
            }

    # --- what a method sees ------------------------------------------------------------------------

    def _context(self, index: int, stage: str) -> TaskContext:
        return TaskContext(
            index=index,
            name=self._name(index),
            layers=self.layers,
            gradients=functools.partial(self._gradients, index),
            features=functools.partial(self._features, index),
            seed=stage_seed(self.context.config.seed, index, stage),
            statistics_bytes=int(self.context.config.memory.statistics_gb * 1e9),
            batches=functools.partial(self._counted, index),
            model=self.context.family.model,
            task=lambda: self.context.family.task(self.tasks[index - 1].recipe),
            pretrained=self.context.pretrained,
            deltas=functools.partial(self._deltas, index - 1),
            base=read_record(self.path(0, CONSOLIDATED)) if index else {},
            tasks=len(self.tasks),
            choose=functools.partial(auto_energy.choose_energy_weight, self.context, self.layers),
        )

    def _batches(self, index: int, fraction: float, cost: float) -> tuple[Iterator[Any], Batches]:
        context = self.context
        size = int(self.config.training.get("per_device_train_batch_size", 8))
        batches = Batches(
            context.inputs[index - 1], size, fraction, context.rank, context.world, context.device
        )

        def counted():
            for batch, counts in batches:
                yield batch, counts
                context.progress.advance(cost * len(batch["labels"]) * context.world)

        return counted(), batches

    def _counted(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        return (batch for batch, counts in self._batches(index, 1.0, 1)[0] if counts)

    def _gradients(self, index: int, fraction: float, statistics: Mapping[str, Any]) -> None:
        batches, counted = self._batches(index, fraction, 3)
        task, total = self.context.family.task(self.tasks[index - 1].recipe), counted.weight
        if self.method.counts_examples:
            task, total = task.counting_examples(), len(counted.chosen)
        with (
            self.context.zero.engaged(task),
            autocast(self.config.training, self.context.device.type),
            task.recomputing(self.config.training),
        ):
            gradient_pass(task, self._adapted(), batches, total, statistics)

    def _features(
        self, index: int, statistics: Callable[[list[list[str]]], Mapping[str, Any]], fraction: float = 1.0
    ) -> Mapping[str, Any]:
        batches, _ = self._batches(index, fraction, 1)
        task = self.context.family.task(self.tasks[index - 1].recipe)
        task = task.at_every_position() if self.method.every_position else task
        with self.context.zero.engaged(task), autocast(self.config.training, self.context.device.type):
            return feature_pass(
                task,
                self._adapted(),
                {n: layer.part for n, layer in self.layers.items()},
                batches,
                statistics,
            )

    def _adapted(self) -> dict[str, nn.Linear]:
        return {name: layer.module for name, layer in self.layers.items()}


def _read(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path) if path.exists() else {}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _taken(seconds: float) -> dict[str, float]:
    """What the journal says of files that another run made: the seconds that they took it."""
    return {"taken_seconds": round(seconds, 3)} if seconds else {}


def _copied(module: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(module.named_parameters(recurse=False))
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


def _from_start(delta: Delta, init: AdapterInit) -> Delta:
    """An adapter's update less the one that it began with, on the host."""
    return Delta(delta.A.cpu(), delta.B.cpu() - (init.B if init.B is not None else 0), delta.scale)


@torch.no_grad()
def _taken_back(module: nn.Module, before: Mapping[str, torch.Tensor]) -> FullDelta:
    """What training did to a module without an adapter; the module gets its values from before."""
    parameters = dict(module.named_parameters(recurse=False))
    change = FullDelta(
        {name: (trained_values(p) - before[name].float()).cpu() for name, p in parameters.items()}
    )
    with gathered(parameters.values(), write=True):
        for name, p in parameters.items():
            p.copy_(before[name])
    return change
