"""Answers of the model to the tasks' test splits."""

from __future__ import annotations

import functools
from pathlib import Path

from llava_keeplora.methods import AnswerContext
from llava_keeplora.run_folder import PREDICTIONS, file_name
from llava_keeplora.sequence.method_state import MethodState
from llava_keeplora.start import Task
from llava_keeplora_eval import predict_to_file
from llava_keeplora_eval.predictions import join_shards, read_predictions
from llava_keeplora_eval.predictors import Predictor


def predictions_path(state: MethodState, index: int, task: Task) -> Path:
    """Return the file of the answers to a task's test split, as given after `index` tasks."""
    return state.path(index, PREDICTIONS) / f"{file_name(task.name)}.jsonl"


def predict(state: MethodState, index: int, task: Task, path: Path, batch_size: int | None = None) -> None:
    """Answer this process's share of a task's test split; processes wait for each other only afterwards.

    Args:
        state: the method's state; the model has the weights to be scored.
        index: number of tasks learned.
        task: the task to answer.
        path: the file of the answers, continued if it exists.
        batch_size: examples per forward pass; the configuration's when None.
    """
    context = state.context
    cost = context.family.eval_cost * context.world
    predict_to_file(
        task_predictor(state, index, task),
        task.test,
        path,
        batch_size=batch_size or context.config.evaluation.batch_size,
        advance=lambda count: context.progress.advance(cost * count),
        shard=(context.rank, context.world),
        # With ZeRO-3 every prediction gathers the weights from all processes, so all make equally many.
        rounds=context.most if context.zero.partitions else None,
    )


def predict_whole(
    state: MethodState, index: int, task: Task, path: Path, batch_size: int | None = None
) -> None:
    """Answer a task's test split in all processes, and wait until the file is whole; see `predict`."""
    predict(state, index, task, path, batch_size)
    state.context.barrier()
    if state.context.rank == 0:
        join_shards(path, task.test)
    state.context.barrier()


def read_answers(state: MethodState, index: int, task: Task, folder: str) -> dict[str, str]:
    """Return id → the answer to a recipe's examples after `index` tasks, from PREDICTIONS or WATCHED."""
    place = state.path(index)
    if index == 0:  # The first row with the same prompts has answered for all.
        place = state.context.workspace.task(state.first_alike, 0, "base")
    return read_predictions(place / folder / f"{file_name(task.name)}.jsonl", task.test)


def task_predictor(state: MethodState, index: int, task: Task, tokens: int | None = None) -> Predictor:
    """Return the predictor of a task's test examples after `index` tasks; the model's own for index 0."""
    context = state.context
    predictor = context.family.predictor(task.recipe, context.cache.split(task.test), tokens)
    if state.averaged:
        predictor = predictor.with_test_prompts()  # type: ignore[attr-defined]  # CLIP's, see `check_rows`
    if not index:
        return predictor
    return state.method.predictor_of(predictor, _answer_context(state, index, task))


def _answer_context(state: MethodState, index: int, task: Task) -> AnswerContext:
    context, learned = state.context, state.tasks[:index]
    return AnswerContext(
        task.name,
        [other.name for other in learned],
        functools.partial(state.deltas, index),
        context.family.model,
        context.base,
        task.recipe,
        [other.recipe for other in learned],
        lambda tokens: context.family.predictor(task.recipe, context.cache.split(task.test), tokens),
    )
