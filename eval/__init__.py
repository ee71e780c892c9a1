"""Predictions, scoring and the matrix; usable without the training half (imported as llava_keeplora_eval).

``llava_keeplora_eval.predictors`` is imported on its own, because it needs torch and the rest doesn't.
"""

import importlib

#: Public name → its module, imported when the name is first used: `--help` waits for none of them.
_MODULES = {
    "EvalError": "errors",
    "Matrix": "matrix",
    "Score": "scoring",
    "check_references": "references",
    "load_metric": "metrics",
    "predict_to_file": "predictions",
    "read_answers": "answer_files",
    "read_predictions": "predictions",
    "score": "scoring",
    "unmeetable": "references",
}

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


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
