"""Predictions, scoring and the matrix; usable without the training half (imported as llava_keeplora_eval).

``llava_keeplora_eval.predictors`` is imported on its own, because it needs torch and the rest doesn't.
"""

from llava_keeplora_eval.answer_files import read_answers
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.matrix import Matrix
from llava_keeplora_eval.metrics import load_metric
from llava_keeplora_eval.predictions import predict_to_file, read_predictions
from llava_keeplora_eval.references import check_references, unmeetable
from llava_keeplora_eval.scoring import Score, score

__all__ = [
    "EvalError",
    "Matrix",
    "Score",
    "check_references",
    "load_metric",
    "predict_to_file",
    "read_answers",
    "read_predictions",
    "score",
    "unmeetable",
]
