"""The callback that scores every task beside anyone's Trainer."""

import importlib
import json
import shutil

import pytest
import torch
from tests.memory.conftest import make_text_model, text_batches
from transformers import Trainer, TrainingArguments

from llava_keeplora import KeepLora, MatrixCallback
from llava_keeplora.errors import ConfigError, GuardError, RunError
from llava_keeplora.guard import exit_code, watch
from llava_keeplora.guard.checkpoints import Comparison, compare_checkpoints
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.models import load_clip
from llava_keeplora_eval.predictors import ClipPredictor
from llava_keeplora_recipes import load_recipe, load_split


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


@pytest.mark.slow
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
    with pytest.raises(RunError, match="sort, add"):  # One report has the scores of all labels.
        MatrixCallback(tmp_path, {"add": SCORES["add"]}, after="add", label="other")
    record = json.loads((tmp_path / "keeplora" / "matrix.json").read_text())
    assert record["tasks"] == ["sort", "add"]


# --- the guard -----------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """No plots, and each recipe's images are drawn once."""
    load = watch.load_split
    monkeypatch.setattr(
        watch,
        "load_split",
        lambda recipe, *args: DRAWN.get(recipe.name) or DRAWN.setdefault(recipe.name, load(recipe, *args)),
    )
    module = importlib.import_module("llava_keeplora.report.write_report")
    monkeypatch.setattr(module, "OF_ALL", ())
    monkeypatch.setattr(module, "OF_ONE", ())


DRAWN = {}


class Reader:
    """Answers with the right class, but for as many examples as the model has forgotten."""

    def __init__(self, model, recipe):
        self.wrong, self.classes = int(model.forgotten.get(recipe.name, 0)), recipe.classes
        assert not model.training and not torch.is_grad_enabled()

    def predict(self, examples):
        number = [int(example.id.rsplit("-", 1)[1]) for example in examples]
        return [
            "nothing" if n < self.wrong else self.classes[e.label]
            for n, e in zip(number, examples, strict=True)
        ]


RECIPES = {"shapes": "shapes", "digits": "digits"}
GUARD = {"watch": [{"task": "glyphs", "examples": 100}], "watch_tasks": {"max_drop": 5.0}}


def trained(folder, after, before, learned, guard=GUARD, scores=RECIPES, step=0):
    """Run a callback around a training that makes the model forget as many examples as it says."""
    callback = MatrixCallback(folder, scores, after, guard=guard, predictor=Reader, batch_size=200)
    model = make_text_model()
    model.forgotten = before
    callback.on_train_begin(None, State(step), None, model=model)
    model.forgotten = learned
    callback.on_train_end(None, State(3), None, model=model)
    return callback


@pytest.mark.usefixtures("quick")
def test_a_training_that_holds_the_limits_ships_and_its_scores_are_those_of_the_recipes(tmp_path):
    limits = GUARD | {"old_tasks": {"max_drop": 2.0}, "new_task": {"min_gain": 10.0}}
    first = trained(tmp_path, "shapes", {"shapes": 150}, {"digits": 30}, limits)
    assert first.verdict["ship"] and first.matrix.zero_shot[0] == 50 and first.matrix.rows[0][0] == 100
    record = {limit["task"]: limit for limit in first.verdict["limits"]}
    assert list(record) == ["shapes", "glyphs"] and record["shapes"]["change"] == 50
    assert record["glyphs"]["n"] == 100 and record["glyphs"]["noise"] == 0
    second = trained(tmp_path, "digits", {"digits": 90}, {"shapes": 2}, limits)
    record = {limit["task"]: limit["of"] for limit in second.verdict["limits"]}
    assert record == {"digits": "new task", "shapes": "old task", "glyphs": "watch task"}
    assert json.loads((tmp_path / "guard.json").read_text())["ship"] and exit_code(tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.index("2 of 2 tasks ship") < page.index("General ability") < page.index("glyphs before")


@pytest.mark.usefixtures("quick")
def test_a_broken_limit_stops_after_the_report_or_warns(tmp_path, caplog):
    with pytest.raises(GuardError, match=r"stops here: digits: don't ship.*cancel_task"):
        trained(tmp_path, "digits", {}, {"glyphs": 200})
    assert exit_code(tmp_path) == 3 and "worse: glyphs" in (tmp_path / "report.html").read_text()
    callback = trained(tmp_path, "digits", {}, {"glyphs": 200}, GUARD | {"on_failure": "warn"})
    assert callback.verdict["then"] == "warn" and "broken: watch task glyphs" in caplog.text
    assert len(callback.verdict["limits"][0]["flips"]) == 10
    # Trained again without the fault: nothing of the first training is left.
    assert trained(tmp_path, "digits", {}, {}).verdict["ship"] and exit_code(tmp_path) == 0


@pytest.mark.usefixtures("quick")
def test_a_task_that_the_guard_stopped_is_no_old_task_until_it_is_learned(tmp_path):
    limits = GUARD | {"old_tasks": {"max_drop": 2.0}}
    with pytest.raises(GuardError):
        trained(tmp_path, "shapes", {}, {"glyphs": 200}, limits)
    second = trained(tmp_path, "digits", {}, {"shapes": 150}, limits)
    assert [limit["task"] for limit in second.verdict["limits"]] == ["glyphs"] and second.verdict["ship"]
    assert "| shapes (stopped) |" in (tmp_path / "table.md").read_text()
    assert "shapes (stopped)" in repr(second.matrices) and "glyphs (watched)" in repr(second.matrices)
    assert second.matrices.watched["keeplora"]["digits"] == {"glyphs": 100.0}
    # Trained again and kept.
    trained(tmp_path, "shapes", {}, {}, limits)
    third = trained(tmp_path, "digits", {}, {}, limits)
    assert [limit["task"] for limit in third.verdict["limits"]] == ["shapes", "glyphs"]


@pytest.mark.usefixtures("quick")
def test_a_training_without_a_guard_leaves_no_verdict_on_the_one_that_it_replaces(tmp_path):
    with pytest.raises(GuardError):
        trained(tmp_path, "digits", {}, {"glyphs": 200})
    assert trained(tmp_path, "digits", {}, {}, guard=None).verdict is None
    assert exit_code(tmp_path) == 0 and "don't ship" not in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("quick")
def test_a_training_that_goes_on_is_judged_by_its_answers_from_before_or_refused(tmp_path):
    with pytest.raises(RunError, match="0 of 100 answers to glyphs from before.*begin the training anew"):
        trained(tmp_path, "digits", {}, {}, step=2)
    begun = MatrixCallback(tmp_path, RECIPES, "digits", guard=GUARD, predictor=Reader)
    model = make_text_model()
    model.forgotten = {}
    begun.on_train_begin(None, State(0), None, model=model)
    with pytest.raises(GuardError, match="digits: don't ship"):
        trained(tmp_path, "digits", {"glyphs": 200}, {"glyphs": 200}, step=2)
    shutil.rmtree(begun._answers.folder / "noise")
    with pytest.raises(RunError, match="0 of 100 answers to glyphs"):
        begun.on_train_begin(None, State(2), None, model=model)


def test_a_guard_that_cannot_be_evaluated_is_refused_before_the_training(tmp_path):
    def refused(match, scores=RECIPES, **changes):
        with pytest.raises(ConfigError, match=match):
            MatrixCallback(
                tmp_path, scores, "shapes", guard={**GUARD, **changes}, predictor=changes.pop("by", Reader)
            )

    refused("on_failure is rollback.*cancel_task", on_failure="rollback")
    refused("can't be evaluated: there is no recipe", watch=["gone.yaml"])
    refused("watches 'digits', a task of the run", watch=["digits"])
    refused("two tasks have the recipe 'digits'", {"shapes": "digits", "digits": "digits"})
    refused("limit for 'digits'", {"shapes": "shapes", "digits": len}, old_tasks={"max_drop": 1.0})
    refused("limit for 'shapes'", {"shapes": len}, new_task={"min_gain": 1.0})
    with pytest.raises(ConfigError, match="no limit"):
        MatrixCallback(tmp_path, RECIPES, "shapes", guard={}, predictor=Reader)
    with pytest.raises(ConfigError, match="a guard needs something that answers"):
        MatrixCallback(tmp_path, SCORES, "sort", guard=GUARD)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_verdict_in_a_trainer_is_that_of_the_command(tmp_path):
    """A real CLIP in transformers' Trainer, and `guard --base --tuned` on its checkpoints from before and after."""
    model, processor = load_clip("tiny-clip")
    model.save_pretrained(tmp_path / "base")
    data = load_split(load_recipe("digits"), "train").take(range(128))
    texts = ClipPredictor(model, processor, data.recipe).preparation.tokens(data.recipe.prompts)
    pixels = processor.image_processor(images=[e.image for e in data], return_tensors="pt")["pixel_values"]
    rows = [{"pixel_values": p, "label": label} for p, label in zip(pixels, data.labels)]

    class Contrastive(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            logits = model(pixel_values=inputs["pixel_values"], **texts).logits_per_image
            return torch.nn.functional.cross_entropy(logits, inputs["labels"])

    callback = MatrixCallback(
        tmp_path / "matrix",
        RECIPES,
        "digits",
        guard=GUARD | {"watch": ["glyphs"], "on_failure": "warn"},
        predictor=lambda model, recipe: ClipPredictor(model, processor, recipe),
    )
    args = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=20,
        learning_rate=3e-4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        per_device_train_batch_size=32,
    )
    Contrastive(model=model, args=args, train_dataset=rows, callbacks=[callback]).train()
    model.save_pretrained(tmp_path / "tuned")
    for name in ("base", "tuned"):
        for part in (processor.image_processor, processor.tokenizer):
            part.save_pretrained(tmp_path / name)
    given = Comparison(str(tmp_path / "base"), str(tmp_path / "tuned"), 5.0, 0.95, tmp_path / "guard")
    expected, found = compare_checkpoints(given, ["glyphs"]), callback.verdict
    assert found["limits"][0]["change"] < 0 and found["limits"] == expected["limits"]
    assert found["ship"] == expected["ship"]


def judge_in_a_group(rank: int, folder: str) -> None:
    """One of two processes of a training that is judged."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    with pytest.raises(GuardError):
        trained(f"{folder}/two", "digits", {"glyphs": 7}, {"glyphs": 200})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_answer_their_shares_and_come_to_the_verdict_of_one(tmp_path):
    torch.multiprocessing.spawn(judge_in_a_group, (str(tmp_path),), nprocs=2)
    with pytest.raises(GuardError):
        trained(tmp_path / "one", "digits", {"glyphs": 7}, {"glyphs": 200})
    one, two = (json.loads((tmp_path / name / "guard.json").read_text()) for name in ("one", "two"))
    assert one == two and not one["ship"]
    assert not list((tmp_path / "two").rglob("*.shard-*"))
