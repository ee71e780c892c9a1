"""`data check` tells what a task's files hold, everything that is wrong with them, and what a model is shown."""

import io
import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from llava_keeplora_eval.cli import main
from llava_keeplora_eval.data_check import check


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def record(name, question="What?", image="0.png", answer="a cat", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns} | more


@pytest.fixture
def task(tmp_path):
    """Write a question task of images 0.png to 3.png with these train and test records; its YAML."""

    def write(train, test=None, **changes):
        folder = tmp_path / "q"
        folder.mkdir(exist_ok=True)
        for i in range(4):
            (folder / f"{i}.png").write_bytes(encoded(i))
        (folder / "train.json").write_text(json.dumps(train))
        (folder / "test.json").write_text(json.dumps(test or [record("t", image="3.png")]))
        facts = dict(name="q", version=1, kind="vqa", metric="exact_match", licence="MIT")
        facts |= dict(
            source={"format": "llava_json", "path": "q"}, splits={"train": "train.json", "test": "test.json"}
        )
        path = tmp_path / "q.yaml"
        path.write_text(yaml.safe_dump(facts | changes, sort_keys=False))
        return path

    return write


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(["data", "check", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return call


def test_a_sound_task_is_described_split_by_split(task, run):
    rows = [
        record("a"),
        record("b", "How many?", ["1.png", "2.png"], "two"),
        record("c", "Why?", None, "a cat"),
    ]
    code, out, err = run(task(rows, expected_sizes={"train": 3, "test": 1}))
    assert (code, err) == (0, "")
    assert out[:5] == [
        "q v1 (vqa, exact_match)",
        "  train: 3 examples of 3 expected",
        "    images: 3 shown, 3 different, 1 examples without one, 1 examples with several",
        "    questions: 3 different, longest 9 characters",
        "    answers: 2 different, 0 examples with an empty one, longest 5 characters, most frequent 'a cat' (2 of 3)",
    ]
    assert "  test: 1 examples of 1 expected" in out


def test_three_examples_are_shown_with_the_learned_part_marked(task, run):
    rows = [record(str(i), f"Number {i}?", [f"{n}.png" for n in range(i % 3)], f"the {i}") for i in range(9)]
    _, out, _ = run(task(rows), "--split", "train")
    assert out[5:] == [
        "    [0]", "    USER: Number 0? ASSISTANT: ⟦the 0⟧",
        "    [4]", "    USER: <image>", "    Number 4? ASSISTANT: ⟦the 4⟧",
        "    [8]", "    USER: <image>", "    <image>", "    Number 8? ASSISTANT: ⟦the 8⟧",
    ]  # fmt: skip


def test_conversations_and_videos_are_counted_and_shown_with_every_turn(task, run):
    turns = record("a", "<image>What?", image=["0.png"])["conversations"]
    rows = [
        {"id": "a", "image": "0.png", "system": "Be brief.", "conversations": [*turns, *record("", "Sure?", answer="yes")["conversations"]]},
        record("b", "How many?", None, "two", video=["1.png", "2.png", "1.png"]),
    ]  # fmt: skip
    source = {"format": "llava_json", "path": "q", "frames": 2}
    code, out, err = run(task(rows, source=source), "--split", "train")
    assert (code, err) == (0, "")
    assert out[2].startswith("    images: 3 shown, 2 different,") and out[2].endswith(
        "2 of them frames of 1 videos"
    )
    assert out[3].endswith(", 1 examples with earlier turns, 1 at the most, 1 examples with a system message")
    assert out[6:] == [
        "    Be brief. USER: <image>", "    What? ASSISTANT: ⟦a cat⟧ USER: Sure? ASSISTANT: ⟦yes⟧",
        "    [b]", "    USER: <image>", "    <image>", "    How many? ASSISTANT: ⟦two⟧",
    ]  # fmt: skip


def test_a_model_shows_them_in_its_chat_template_with_its_end_token(task, run, tiny_llava):
    _, out, _ = run(task([record("a")]), "--split", "train", "--model", tiny_llava)
    assert out[5].startswith("    tokens: longest ") and out[6:-1] == [
        "    [a]",
        "    A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: <image>",
        "    What? ASSISTANT:⟦ a cat</s>⟧",
    ]


def test_the_ids_shown_are_those_that_the_model_is_trained_on(task, run, tiny_llava):
    from transformers import AutoProcessor

    _, out, _ = run(task([record("a")]), "--split", "train", "--model", tiny_llava)
    before, marked = out[-1].strip().removeprefix("ids: ").removesuffix("⟧").split("⟦")

    def ids(shown):
        return [
            int(i)
            for piece in re.findall(r"(\d+)(?: × (\d+))?", shown)
            for i in [piece[0]] * int(piece[1] or 1)
        ]

    text = "\n".join(line.removeprefix("    ") for line in out[7:-1]).replace("⟦", "").replace("⟧", "")
    processor = AutoProcessor.from_pretrained(str(tiny_llava))
    whole = processor(text=text, images=Image.open(io.BytesIO(encoded(0))))["input_ids"][0]
    assert ids(before) + ids(marked) == list(whole)
    assert ids(marked) == processor.tokenizer(" a cat</s>", add_special_tokens=False)["input_ids"]


def test_every_problem_of_every_split_is_listed_and_the_exit_code_says_so(task, run, tmp_path):
    train = [
        record("a"),
        record("b", "<image><image> Two?"),
        record("c", image="none.png"),
        record("d", image="broken.png"),
        {"id": "e"},
    ]
    path = task(train, [record("t"), record("t")])
    (tmp_path / "q" / "broken.png").write_bytes(b"no picture")
    code, out, err = run(path)
    errors = [line.strip() for line in out if line.strip().startswith("error:")]
    assert code == 2 and err == f"error: {path} has 5 problems, listed above; correct them and check again.\n"
    assert len(errors) == 5
    assert errors[0].startswith(
        "error: record 'b' of train.json marks 2 images in its question and names 1; "
    )
    assert errors[1].startswith(
        "error: record 'e' of train.json has neither 'conversations' nor 'text' and 'answer'; "
    )
    assert (
        f"error: an image of 'c' in q/train cannot be read (no such file '{tmp_path}/q/none.png'); replace it, or correct its path."
        in errors
    )
    assert any(
        e.startswith("error: an image of 'd' in q/train cannot be read (cannot identify image file")
        for e in errors
    )
    assert errors[-1].startswith("error: q/test has 1 ids more than once (t); ")
    assert "  train: 1 examples" in out and any(
        "2 examples left out because one cannot be read" in line for line in out
    )


def test_a_missing_file_is_a_problem_of_its_split_alone(task, run, tmp_path):
    path = task([record("a")])
    (tmp_path / "q" / "train.json").unlink()
    code, out, _ = run(path)
    assert code == 2 and "  train: 0 examples" in out and "  test: 1 examples" in out


def test_what_can_be_used_and_is_worth_a_look_is_only_a_warning(task, run):
    rows = [record("a"), record("b", answer=" "), record("c", image="1.png")]
    code, out, err = run(task(rows, [record("t"), record("u", image="1.png")], expected_sizes={"train": 40}))
    assert code == 2 and "has 1 problem, listed" in err
    assert (
        "    error: record 'b' of q (train.json) has an empty answer, so there is nothing to learn from it; complete or remove the record."
        in out
    )
    assert [line.strip() for line in out if "warning" in line] == [
        "warning: 3 examples and not 40: scores are not comparable with those of others",
        "warning: 1 examples have an empty answer",
        "warning: 1 of 3 examples of q (train), 33.3 %, get 0 from the metric 'exact_match' because their accepted text "
        "is empty (b: ' '); complete or remove these records",
        "warning: 2 different images are in 'train' too (t = a, u = c)",
    ]


def test_references_that_no_answer_can_meet_are_a_problem_where_they_are_scored(task, run):
    rows = [record("a", answer="2"), record("b", answer="(B)", image="1.png")]
    code, out, _ = run(task(rows, [record("t", answer="2", image="2.png")], metric="option_letter"))
    assert code == 2 and any("warning: 1 of 2 examples of q (train), 50.0 %, get 0" in line for line in out)
    assert any(
        "error: 1 of 1 examples of q (test), 100.0 %, get 0 from the metric 'option_letter'" in line
        for line in out
    )
    code, out, _ = run(task(rows[:1], rows, metric="option_letter"))
    assert code == 0 and any("warning: 1 of 2 examples of q (test), 50.0 %" in line for line in out)


def test_a_scored_split_without_what_its_metric_needs_is_a_problem(task, run):
    code, out, _ = run(task([record("a")], metric="acl_ocr"))
    assert code == 2
    assert [
        line
        for line in out
        if "error" in line and "needs the answer_type of every example, and 1 id (t) of q (test)" in line
    ]


def test_a_metric_that_does_not_exist_is_a_problem(task, run):
    code, out, _ = run(task([record("a")], metric="exact_mach"))
    assert code == 2 and any(
        "error: there is no metric 'exact_mach'; did you mean 'exact_match'" in line for line in out
    )


def test_classes_are_asked_and_answered_as_a_generative_model_is(tmp_path, run):
    for split in ("train", "test"):
        for i, name in enumerate(("big_dog", "cat")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            (tmp_path / "pets" / split / name / "0.png").write_bytes(encoded(i))
    facts = dict(
        name="pets", version=1, kind="classification", metric="accuracy", licence="MIT", prompt="a {c}"
    )
    facts |= dict(
        classes=["cat", "big_dog"], instruction="Which pet?", splits={"train": "train", "test": "test"}
    )
    (tmp_path / "pets.yaml").write_text(
        yaml.safe_dump(facts | {"source": {"format": "imagefolder", "path": "pets"}})
    )
    _, out, _ = run(tmp_path / "pets.yaml", "--split", "test")
    assert "    Which pet? ASSISTANT: ⟦big dog⟧" in out


def test_a_sequence_checks_each_of_its_tasks(task, run, tmp_path):
    task([record("a")])
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"name": "two", "tasks": ["q.yaml", "ucit/iconqa"]}))
    code, out, err = run(tmp_path / "two.yaml", "--data-root", tmp_path)
    assert [line for line in out if not line.startswith(" ")] == [
        "q v1 (vqa, exact_match)",
        "ucit/iconqa v1 (vqa, ucit_exact_match)",
    ]
    assert code == 2 and err.endswith(
        "two.yaml has 2 problems, listed above; correct them and check again.\n"
    )
    assert sum("the data of 'ucit/iconqa' is not there" in line for line in out) == 2


def test_a_shipped_sequence_is_found_by_name():
    lines = check("mllm-acl", split="test")
    assert next(lines) == "mllm_acl/ocr v1 (vqa, acl_ocr)"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("no-such",), "there is no recipe 'no-such'"),
        (("shapes", "--split", "tset"), "shapes has 1 problem, listed above"),
        (("shapes", "--model", "no/such/model"), "there is no folder 'no/such/model'"),
        (("shapes", "--base", "no/such/model"), "--base is 'no/such/model', and no model is given"),
    ],
)
def test_a_mistake_in_the_command_is_reported_in_one_sentence(run, arguments, sentence):
    code, _, err = run(*arguments)
    assert code == 2 and err.startswith(f"error: {sentence}") and err.count("\n") == 1


def test_the_list_names_sequences_and_what_they_leave_out(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "\nsequences\n" in out and "6 tasks  UCIT in its published order" in out
    assert "without Math: MathVista's protocol" in out


def test_examples_refused_for_their_text_are_not_reported_as_unreadable_images(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "x.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    (tmp_path / "t.yaml").write_text(
        "{name: t, version: 1, kind: vqa, metric: exact_match, licence: CC0-1.0, "
        "source: {format: llava_json, path: .}, splits: {train: x.json, test: x.json}}"
    )
    assert main(["data", "check", str(tmp_path / "t.yaml")]) == 2
    out = capsys.readouterr().out
    assert "'1' in t/train has nothing to ask" in out
    assert "no readable image" not in out
