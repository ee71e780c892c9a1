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
    dtype: torch.dtype | None = None,
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
        dtype: the precision of products; the model's when None.
    """
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        predict_to_file(
            predictor, data, path, batch_size, made_by=made_by, shard=(get_rank(), get_world_size())
        )
    all_gather_object(None)
    if is_main_process():
        join_shards(path, data)
    all_gather_object(None)
    return read_predictions(path, data)


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the data type of a model's weights; of quantised ones, that of the rest."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
