"""Answers of a model to a recipe, kept in a file, for a verdict on two models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_keeplora.distributed import all_gather_object, get_rank, get_world_size, is_main_process
from llava_keeplora_eval import predict_to_file
from llava_keeplora_eval.predictions import join_shards, read_predictions
from llava_keeplora_eval.predictors import Predictor
from llava_keeplora_recipes import TaskData


def answer(
    predictor: Predictor,
    data: TaskData,
    path: Path,
    batch_size: int,
    device: torch.device,
    made_by: Mapping[str, Any] | None = None,
    otherwise: bool = False,
) -> dict[str, str]:
    """Return id → answer of every example, those that the file has already from there.

    Of several processes each answers its share; every one must call this.

    Args:
        predictor: what answers.
        data: the examples.
        path: the file.
        batch_size: examples per forward pass.
        device: the model's.
        made_by: see `predict_to_file`.
        otherwise: whether to answer with batches of half the size and with products in bfloat16, to see how
            much the score of one and the same model moves.
    """
    size = other_size(batch_size) if otherwise else batch_size
    with torch.autocast(device.type, torch.bfloat16, enabled=otherwise):
        predict_to_file(predictor, data, path, size, made_by=made_by, shard=(get_rank(), get_world_size()))
    all_gather_object(None)
    if is_main_process():
        join_shards(path, data)
    all_gather_object(None)
    return read_predictions(path, data)


def other_size(batch_size: int) -> int:
    """Return the batch size of answers `otherwise`."""
    return max(1, batch_size // 2)
