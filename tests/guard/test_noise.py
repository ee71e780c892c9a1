"""The noise floor: one rule for runs, callbacks and the command."""

import pytest
import torch

from llava_keeplora.guard.noise import NOISE_EXAMPLES, noise_examples, noise_record, variants
from llava_keeplora_recipes import load_recipe, load_split


@pytest.mark.parametrize(
    ("batch", "dtype", "expected"),
    [
        (64, torch.float32, [(32, None), (64, torch.bfloat16)]),
        (3, torch.bfloat16, [(1, None), (3, torch.float16)]),
        (1, torch.float16, [(2, None), (1, torch.bfloat16)]),
    ],
)
def test_batches_and_precision_are_changed_one_at_a_time(batch, dtype, expected):
    assert [(v.batch_size, v.dtype) for v in variants(batch, dtype)] == expected


def test_the_noise_is_the_largest_change_on_at_most_200_examples_without_resampling(monkeypatch):
    for name in ("mean_change", "rescored_change"):
        monkeypatch.setattr(f"llava_keeplora_eval.paired_scores.{name}", None)
    data = load_split(load_recipe("shapes"), "test")
    few = noise_examples(data)
    assert len(data) > len(few) == NOISE_EXAMPLES == 200
    right = {key: data.recipe.classes[label] for key, label in zip(data.ids, data.labels)}
    again = {
        "batches": {key: right[key] for key in few.ids},
        "precision": {key: "nothing" if i < 3 else right[key] for i, key in enumerate(few.ids)},
    }
    record = noise_record(few, right, again)
    assert record == {
        "points": pytest.approx(1.5),
        "flips": 3,
        "n": 200,
        "by": {"batches": 0.0, "precision": pytest.approx(1.5)},
    }
