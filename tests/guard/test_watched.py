"""A part of a watched recipe: whole units of its metric, chosen by ids."""

import pytest
from PIL import Image

from llava_keeplora.guard.watch import chosen
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.paired_scores import paired_change
from llava_keeplora_recipes import load_recipe, load_split


@pytest.fixture
def mme(tmp_path):
    """Six images of MME with two questions each."""
    folder = tmp_path / "MME/MME_Benchmark_release_version/OCR"
    folder.mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text("Is it x?\tYes\nIs it y?\tNo\n")
    return load_split(load_recipe("mme"), "test", tmp_path)


def test_a_part_of_mme_has_both_questions_of_every_image(mme):
    part = chosen(mme, 5)
    assert len(part) == 4 and [i for i in mme.ids if i in part.ids] == part.ids
    assert len({key.split("#")[0] for key in part.ids}) == 2
    answers = dict.fromkeys(part.ids, "yes")
    assert paired_change(part, answers, answers, 0.95).n == 2
    assert set(part.ids) < set(chosen(mme, 8).ids) and chosen(mme, 99).ids == mme.ids


def test_fewer_examples_than_one_unit_are_refused(mme):
    with pytest.raises(EvalError, match="mme scores 2 examples together, and examples is 1"):
        chosen(mme, 1)
