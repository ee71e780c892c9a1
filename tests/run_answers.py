"""What a finished run's files answer, against what the run itself answered."""

from __future__ import annotations

from pathlib import Path

from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.export.predict import load_run_predictor
from llava_keeplora_eval.predictions import read_predictions
from llava_keeplora_recipes import load_split


def assert_predictor_answers_as_the_run(run: Path, label: str, after: int) -> None:
    """Assert that the predictor of a method after some tasks gives the run's own answers to every task's test split."""
    (folder,) = (run / label).glob(f"task-{after:02}-*/predictions")
    for recipe in load_learned_run(run, label).recipes:
        data = load_split(recipe, "test")
        answers = load_run_predictor(run, recipe, label, after).predict(list(data))
        told = read_predictions(folder / f"{recipe.name}.jsonl", data)
        assert answers == [told[key] for key in data.ids], recipe.name
