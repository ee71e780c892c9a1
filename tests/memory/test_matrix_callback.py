"""The callback that scores every task beside anyone's Trainer."""

import json

import pytest
import torch
from tests.memory.conftest import make_text_model, text_batches
from transformers import Trainer, TrainingArguments

from llava_keeplora import KeepLora, MatrixCallback
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora_eval import Matrix


def token_accuracy(batches):
    """Percent of the next tokens that the model ranks first."""

    def score(model) -> float:
        assert not model.training and not torch.is_grad_enabled()
        right = total = 0
        for batch in batches:
            labels = batch["labels"][:, 1:]
            guesses = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
                :, :-1
            ]
            right += int(((guesses.argmax(-1) == labels) & (labels != -100)).sum())
            total += int((labels != -100).sum())
        return 100.0 * right / total

    return score


SCORES = {name: token_accuracy(text_batches(seed, count=1)) for seed, name in enumerate(("sort", "add"), 1)}


@torch.no_grad()
def scored(model) -> list[float]:
    return [score(model.eval()) for score in SCORES.values()]


def train(model, folder, callback, **settings):
    args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=3,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    rows = [{key: v[i] for key, v in text_batches(1)[0].items()} for i in range(4)]
    Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback]).train()


def test_every_row_is_what_the_model_scores_at_that_moment_and_the_report_is_written(tmp_path):
    model = make_text_model()
    memory = KeepLora(model, targets=["q_proj", "down_proj"], rank=4, energy_weight=0.4)
    rows = [scored(model)]
    for seed, name in enumerate(SCORES, 1):
        callback = MatrixCallback(tmp_path / "matrix", SCORES, after=name)
        train(memory.begin_task(text_batches(seed)), tmp_path, callback)
        memory.end_task(text_batches(seed))
        rows.append(scored(model))
    matrix = Matrix.from_json(tmp_path / "matrix" / "keeplora" / "matrix.json")
    assert matrix.zero_shot == pytest.approx(rows[0])
    for row, expected in zip(matrix.rows, rows[1:], strict=True):
        assert row == pytest.approx(expected)
    assert callback.matrices["keeplora"].rows == matrix.rows
    page = (tmp_path / "matrix" / "report.html").read_text()
    assert "sort" in page and "keeplora" in page and (tmp_path / "matrix" / "table.md").exists()


def test_labels_of_one_folder_are_reported_together_and_modes_come_back(tmp_path):
    for label in ("plain", "keeplora"):
        model = make_text_model()
        model.model.layers[0].eval()
        callback = MatrixCallback(tmp_path, SCORES, after="sort", label=label)
        callback.on_train_begin(None, State(0), None, model=model.train())
        model.model.layers[0].eval()
        callback.on_train_end(None, State(3), None, model=model)
        assert model.training and not model.model.layers[0].training
    assert list(callback.matrices) == ["keeplora", "plain"]
    assert (tmp_path / "heatmap-plain.png").exists() and (tmp_path / "heatmap-keeplora.png").exists()


class State:
    def __init__(self, step: int):
        self.global_step = step


def test_a_training_that_goes_on_has_no_untouched_model_to_score(tmp_path, caplog):
    callback = MatrixCallback(tmp_path, SCORES, after="sort")
    callback.on_train_begin(None, State(2), None, model=make_text_model())
    assert "step 2" in caplog.text and callback.matrix.zero_shot is None


def test_a_row_that_is_there_is_kept(tmp_path):
    MatrixCallback(tmp_path, SCORES, after="sort").on_train_begin(
        None, State(0), None, model=make_text_model()
    )
    first = MatrixCallback(tmp_path, SCORES, after="add").matrix.zero_shot
    callback = MatrixCallback(tmp_path, SCORES, after="add")
    callback.on_train_begin(None, State(0), None, model=make_text_model(seed=5))
    assert callback.matrix.zero_shot == first


def test_bad_input_is_refused_before_the_training(tmp_path):
    with pytest.raises(ConfigError, match="'sotr'"):
        MatrixCallback(tmp_path, SCORES, after="sotr")
    with pytest.raises(ConfigError, match="a/b"):
        MatrixCallback(tmp_path, SCORES, after="sort", label="a/b")
    MatrixCallback(tmp_path, SCORES, after="sort").on_train_begin(
        None, State(0), None, model=make_text_model()
    )
    with pytest.raises(RunError, match="sort, add"):
        MatrixCallback(tmp_path, {"add": SCORES["add"]}, after="add")
    record = json.loads((tmp_path / "keeplora" / "matrix.json").read_text())
    assert record["tasks"] == ["sort", "add"]
