"""A sequence file: tasks in order, with epochs where they are part of a protocol."""

import pytest

from llava_keeplora_recipes import RecipeError, list_recipes, list_sequences, load_recipe, load_sequence


@pytest.mark.parametrize("name", list_sequences())
def test_every_shipped_sequence_names_shipped_recipes_once(name):
    sequence = load_sequence(name)
    assert sequence.name == name and sequence.description
    assert set(sequence.tasks) <= set(list_recipes())


def test_the_demo_needs_no_files_and_has_at_least_six_tasks():
    own = {"demo", "llava-demo", "llava-real", "real-order1", "real-order2"}
    published = {"mtil-order1", "mtil-order2", "ucit", "mllm-dcl", "mllm-acl", "coin", "cl-vista"}
    assert own | published == set(list_sequences())
    assert len(load_sequence("demo").tasks) >= 6


@pytest.mark.parametrize(("name", "files"), [("llava-demo", False), ("llava-real", True)])
def test_a_llava_sequence_mixes_all_kinds_of_task(name, files):
    recipes = [load_recipe(task) for task in load_sequence(name).tasks]
    kinds = [r.kind for r in recipes]
    assert set(kinds) == {"classification", "vqa", "captioning"} and len(kinds) >= 4
    assert all((r.source["format"] != "rendered") == files for r in recipes)


def test_the_second_orders_hold_the_tasks_of_the_first():
    for name in ("mtil", "real"):
        first, second = load_sequence(f"{name}-order1"), load_sequence(f"{name}-order2")
        assert sorted(first.tasks) == sorted(second.tasks) and first.tasks != second.tasks


def test_mtil_order_two_is_the_published_permutation_with_its_epochs():
    first, second = load_sequence("mtil-order1"), load_sequence("mtil-order2")
    assert second.tasks == [first.tasks[i] for i in (9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2)]
    assert first.epochs == [10] * 10 + [5]
    assert second.epochs == [5, 2, 5, 5, 5, 5, 10, 10, 10, 10, 10]


def test_recipes_of_a_users_sequence_are_found_next_to_it(tmp_path, make):
    sequence = load_sequence(make.yaml(tmp_path / "mine.yaml", name="mine", tasks=["digits", "my/pets.yaml"]))
    assert sequence.tasks == ["digits", str(tmp_path / "my" / "pets.yaml")]
    assert sequence.epochs is None


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (
            {"tasks": ["digits"], "epoch": [1]},
            "mine.yaml has the unknown key 'epoch'; did you mean 'epochs'.",
        ),
        ({"name": "mine"}, "mine.yaml lacks the key 'tasks'; add 'tasks:' to "),
        ({"name": "mine", "tasks": []}, "mine.yaml has no list of recipe names under 'tasks'; "),
        (
            {"name": "mine", "tasks": ["digits", "digits"]},
            "mine.yaml lists the task 'digits' twice; a task is learned once; ",
        ),
        (
            {"name": "mine", "tasks": ["digits"], "epochs": [1, 2]},
            "mine.yaml gives the epochs [1, 2] for 1 tasks; ",
        ),
        (
            {"name": "mine", "tasks": ["digits"], "not_scored": {"Math": None}},
            "mine.yaml has no reason in text for 'Math' under 'not_scored'; write why it cannot be scored.",
        ),
        (
            {"name": "mine", "tasks": ["digits"], "epochs": [0]},
            "mine.yaml gives the epochs [0] for 1 tasks; ",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_its_cure(tmp_path, make, facts, sentence):
    with pytest.raises(RecipeError) as caught:
        load_sequence(make.yaml(tmp_path / "mine.yaml", **facts))
    assert str(caught.value).startswith(sentence)


def test_an_unknown_sequence_is_answered_with_the_nearest_one():
    with pytest.raises(RecipeError, match="there is no sequence 'real-order3'; did you mean 'real-order"):
        load_sequence("real-order3")
