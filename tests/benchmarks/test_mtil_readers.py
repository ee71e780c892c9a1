"""The readers of MTIL's official layouts keep what every reader promises."""

import pytest

from llava_keeplora_recipes import load_recipe
from llava_keeplora_recipes.testing import check_reader

#: One task for each format.
TASKS = {
    "aircraft": "image_list",
    "caltech101": "random_split",
    "cifar100": "cifar_python",
    "mnist": "idx",
    "flowers": "flowers_mat",
    "stanfordcars": "cars_mat",
}


@pytest.mark.parametrize("task", TASKS)
def test_a_reader_of_an_official_layout_keeps_the_promises(task, mtil, mtil_recipes):
    recipe = load_recipe(mtil_recipes[f"mtil/{task}"])
    assert recipe.source["format"] == TASKS[task]
    check_reader(recipe, mtil.root)
