"""Predictions on disk: continued where they stopped, and refused where they don't belong."""

import json
import logging

import pytest

from llava_keeplora_eval import EvalError, predict_to_file, read_predictions
from llava_keeplora_eval.predictions import count_routes, join_shards


def line(key="pet-0", text="cat", recipe="pets", version=1, fingerprint="f00d"):
    return json.dumps(
        {"id": key, "text": text, "recipe": recipe, "version": version, "fingerprint": fingerprint}
    )


def test_every_id_gets_one_line_in_order_with_its_source(tmp_path, data, recorder):
    path = tmp_path / "new" / "predictions.jsonl"
    assert predict_to_file(recorder(), data, path, batch_size=4) == 10
    records = [json.loads(text) for text in path.read_text().splitlines()]
    assert [record["id"] for record in records] == data.ids
    assert records[1] == {"id": "pet-1", "text": "dog", "recipe": "pets", "version": 1, "fingerprint": "f00d"}


def test_a_killed_run_continues_at_the_next_missing_id(tmp_path, data, recorder):
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(recorder(die_after=2), data, path, batch_size=3)
    second = recorder()
    assert predict_to_file(second, data, path, batch_size=3) == 4
    assert second.asked == data.ids[6:]
    whole = tmp_path / "whole.jsonl"
    predict_to_file(recorder(), data, whole)
    assert path.read_bytes() == whole.read_bytes()
    third = recorder()
    assert predict_to_file(third, data, path) == 0 and third.calls == 0


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_last_line_is_reported_and_predicted_again(tmp_path, data, recorder, caplog, cut):
    path = tmp_path / "predictions.jsonl"
    predict_to_file(recorder(), data, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with caplog.at_level(logging.WARNING):
        assert predict_to_file(recorder(), data, path) == 1
    assert "ends in the middle of a line" in caplog.text and "predicted again" in caplog.text
    assert path.read_bytes() == whole


def test_a_missing_file_holds_no_predictions(tmp_path, data):
    assert read_predictions(tmp_path / "none.jsonl", data) == {}


def test_text_outside_ascii_and_line_breaks_come_back_as_they_were(tmp_path, data):
    class Answers:
        def predict(self, examples):
            return ["zwei\nZeilen, größer\u2028als" for _ in examples]

    path = tmp_path / "predictions.jsonl"
    predict_to_file(Answers(), data, path)
    assert set(read_predictions(path, data).values()) == {"zwei\nZeilen, größer\u2028als"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            line() + "\nnot json\n",
            "line 2 of {path} is not a prediction with the keys fingerprint, id, recipe, text, version; "
            "remove that line, and its example is predicted again.",
        ),
        (
            '{"id": "pet-0", "text": "cat"}\n',
            "line 1 of {path} is not a prediction with the keys fingerprint, id, recipe, text, version; "
            "remove that line, and its example is predicted again.",
        ),
        (
            line(version=2) + "\n",
            "line 1 of {path} was predicted for version 2, and the data has version 1; "
            "predict into a new file, or score with the recipe, split and data that it was made for.",
        ),
        (
            line(fingerprint="beef") + "\n",
            "line 1 of {path} was predicted for fingerprint beef, and the data has fingerprint f00d; "
            "predict into a new file, or score with the recipe, split and data that it was made for.",
        ),
        (
            line(recipe="cars") + "\n",
            "line 1 of {path} was predicted for recipe cars, and the data has recipe pets; "
            "predict into a new file, or score with the recipe, split and data that it was made for.",
        ),
        (
            line() + "\n" + line() + "\n",
            "{path} has more than one prediction for 1 id (pet-0); remove the lines that don't belong.",
        ),
        (
            "".join(line(key=f"x{i}") + "\n" for i in range(5)),
            "{path} has predictions for 5 ids (x0, x1, x2, ...) that pets (test) doesn't have; "
            "check the task, the split and the data root, or predict into a new file.",
        ),
    ],
)
def test_a_file_that_does_not_belong_is_refused_and_left_alone(tmp_path, data, recorder, content, sentence):
    path = tmp_path / "predictions.jsonl"
    path.write_text(content)
    with pytest.raises(EvalError) as error:
        predict_to_file(recorder(), data, path)
    assert str(error.value) == sentence.format(path=path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (
            lambda n: ["cat"] * (n - 1),
            "the predictor gave 9 texts for 10 examples; return one text per example, in order.",
        ),
        (
            lambda n: [None] * n,
            "the predictor gave NoneType for example pet-0; return text, empty if need be.",
        ),
        (
            lambda n: ["\ud83d"] * n,
            "the predictor gave half a character, '\\ud83d', for example pet-0; "
            "decode the answer as a whole, with errors='replace'.",
        ),
    ],
)
def test_a_predictor_that_breaks_its_promise_is_refused(tmp_path, data, texts, sentence):
    class Broken:
        def predict(self, examples):
            return texts(len(examples))

    path = tmp_path / "predictions.jsonl"
    with pytest.raises(EvalError) as error:
        predict_to_file(Broken(), data, path)
    assert str(error.value) == sentence
    assert path.read_text() == ""


class Shouting:
    """Answers with the id in capitals, and counts."""

    def __init__(self):
        self.asked = []

    def predict(self, examples):
        self.asked += [example.id for example in examples]
        return [example.id.upper() for example in examples]


@pytest.mark.parametrize("worlds", [(2,), (3, 2), (2, 1), (1, 3)])
def test_shares_of_several_processes_join_to_the_file_that_one_process_writes(tmp_path, data, worlds):
    """Also where a later start has another number of processes than the one that was killed."""
    alone, path = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    predict_to_file(Shouting(), data, alone, batch_size=2)
    asked = []
    for attempt, world in enumerate(worlds):
        killed = attempt + 1 < len(worlds)
        for rank in range(world):
            predictor = Shouting()
            if killed and rank == world - 1 and world > 1:
                continue  # this one did not come to it
            predict_to_file(predictor, data, path, batch_size=2, shard=(rank, world))
            asked += predictor.asked
    join_shards(path, data)
    assert path.read_bytes() == alone.read_bytes()
    assert sorted(asked) == sorted(data.ids), "every example is answered once"
    assert [p.name for p in tmp_path.glob("shared*")] == ["shared.jsonl"]


@pytest.mark.parametrize("rank", [0, 1])
def test_shares_are_of_one_model_and_their_file_says_which(tmp_path, data, rank):
    """Also where the process that goes on has no line of its own yet, or the file itself is the other model's."""
    path = tmp_path / "shared [1].jsonl"
    predict_to_file(Shouting(), data, path, shard=(1, 2), made_by={"model": "A"})
    with pytest.raises(EvalError, match="holds answers that were made otherwise"):
        predict_to_file(Shouting(), data, path, shard=(rank, 2), made_by={"model": "B"})
    with pytest.raises(EvalError, match="made otherwise"):
        predict_to_file(Shouting(), data, path, made_by={"model": "B"})
    predict_to_file(Shouting(), data, path, shard=(0, 2), made_by={"model": "A"})
    join_shards(path, data)
    alone = tmp_path / "alone.jsonl"
    predict_to_file(Shouting(), data, alone, made_by={"model": "A"})
    assert path.read_bytes() == alone.read_bytes()
    with pytest.raises(EvalError, match="made otherwise"):
        predict_to_file(Shouting(), data, path, shard=(rank, 2), made_by={"model": "B"})


class Routing(Shouting):
    """Answers with what was learned of "a", or of "b"; every third example is the base's."""

    def predict(self, examples):
        numbers = [int(example.id.removeprefix("pet-")) for example in examples]
        self.routed_to = [("a", "b", None)[number % 3] for number in numbers]
        return super().predict(examples)


@pytest.mark.parametrize("world", [1, 3])
def test_what_answered_an_example_is_recorded_beside_the_answer_and_counted(tmp_path, data, world):
    path = tmp_path / "routed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(Routing(), data, path, batch_size=2, shard=(0, world), advance=interrupt)
    for rank in range(world):
        predict_to_file(Routing(), data, path, batch_size=2, shard=(rank, world))
    join_shards(path, data)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [found["routed_to"] for found in lines] == ["a", "b", None] * 3 + ["a"]
    assert read_predictions(path, data) == {key: key.upper() for key in data.ids}
    assert count_routes(path, data) == {"tasks": {"a": 4, "b": 3}, "base": 3}
    plain = tmp_path / "plain.jsonl"
    predict_to_file(Shouting(), data, plain)
    assert count_routes(plain, data) is None and "routed_to" not in plain.read_text()


def interrupt(count):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("key", "value"), [("routed_to", 1), ("routed_to", ["a"]), ("made_by", None)])
def test_a_line_with_something_else_than_a_name_is_no_prediction(tmp_path, data, key, value):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(json.loads(line()) | {key: value}) + "\n")
    with pytest.raises(EvalError, match="line 1 of .* is not a prediction"):
        read_predictions(path, data)


def test_shares_of_two_models_are_not_joined(tmp_path, data):
    path = tmp_path / "shared.jsonl"
    predict_to_file(Shouting(), data, path, shard=(0, 2), made_by={"model": "A"})
    other = tmp_path / "other.jsonl"
    predict_to_file(Shouting(), data, other, shard=(1, 2), made_by={"model": "B"})
    (tmp_path / "other.shard-1.jsonl").rename(tmp_path / "shared.shard-1.jsonl")
    with pytest.raises(EvalError, match="of two models or settings"):
        join_shards(path, data)
    assert len(list(tmp_path.glob("shared.shard-*"))) == 2, "nothing is lost"


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        line()[:-1] + ', "id": "pet-1"}',
        line().replace("cat", "\\ud83d"),
        "9" * 5000,
        "\0" * 40,
    ],
)
def test_a_hostile_line_is_refused_in_one_sentence(tmp_path, data, recorder, line):
    path = tmp_path / "predictions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(EvalError, match="line 1 of .* is not a prediction with the keys"):
        predict_to_file(recorder(), data, path)
