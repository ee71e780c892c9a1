"""Predictions, scoring and the accuracy matrix; imported as ``llava_keeplora_eval``.

The package does not need ``llava_keeplora``. Its public names don't need torch either;
``llava_keeplora_eval.predictors`` does, and is imported separately.
"""

import importlib

#: Public name → its module, imported when the name is first used, so that `--help` is quick.
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
