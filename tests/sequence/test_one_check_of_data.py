"""`data check --model`, plan, train and predict prepare a task's data alike and refuse it in the same sentences."""

import json
import re

import pytest
import yaml
from PIL import Image

from doors import Begun, refused
from llava_keeplora.config import EvaluationConfig, parse_config
from llava_keeplora.errors import UserError
from llava_keeplora.plan import make_plan
from llava_keeplora.sequence import run
from llava_keeplora_eval.class_prompts import tokenize_prompts
from llava_keeplora_eval.cli import main
from llava_keeplora_recipes import load_split


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [("What?", " ", "has an empty answer"), ("What?", "so " * 900, r"and the model takes 512")],
)
def test_what_training_refuses_the_check_and_the_plan_refuse_too(
    questions, llava_tree, tiny_llava, tmp_path, capsys, question, answer, reason
):
    recipe = questions(
        [("a", "What?", "a cat"), ("b", question, answer), ("c", question, answer)], [("t", "Why?", "so")]
    )
    config = llava_tree(tmp_path / "run", tasks=[str(recipe)])
    sentences = []
    for enter in (make_plan, run):
        with pytest.raises(UserError, match=reason) as error:
            enter(parse_config(config))
        sentences.append(str(error.value))
    assert (
        sentences[0] == sentences[1]
        and "record 'b' of asked" in sentences[0]
        and "(and 1 more of 3 examples)" in sentences[0]
    )
    assert main(["data", "check", str(recipe), "--model", str(tiny_llava)]) == 2
    assert [
        f"record '{i}'" in line
        for i, line in zip(
            "bc", (x for x in capsys.readouterr().out.splitlines() if reason in x), strict=True
        )
    ] == [True] * 2


def test_clip_shows_the_class_prompt_with_its_special_tokens(capsys):
    from transformers import AutoTokenizer

    from llava_keeplora.models import ASSETS
    from llava_keeplora_recipes import load_recipe

    assert main(["data", "check", "shapes", "--split", "test", "--model", "tiny-clip"]) == 0
    out = capsys.readouterr().out.splitlines()
    data = load_split(load_recipe("shapes"), "test")
    tokenizer = AutoTokenizer.from_pretrained(str(ASSETS / "tiny-clip"))
    lengths = [len(tokenizer(p)["input_ids"]) for p in data.recipe.prompts]
    assert (
        f"    class prompts: {len(lengths)}, longest {max(lengths)} of {tokenizer.model_max_length} tokens"
        in out
    )
    expected = tokenizer(data.recipe.prompts[data.labels[0]])["input_ids"]
    first = next(line for line in out if "ids: " in line)
    assert [int(i) for i in first.strip().removeprefix("ids: ⟦").removesuffix("⟧").split()] == expected


def test_a_template_that_begins_with_the_begin_token_begins_once(tiny_llava):
    from llava_keeplora_eval.chat import Chat
    from llava_keeplora_eval.chat_text import VICUNA_V1
    from llava_keeplora_eval.processors import load_chat_processor

    processor = load_chat_processor(str(tiny_llava))
    plain = Chat(processor).prompt("What?", [])
    processor.chat_template = "{{ bos_token }}" + VICUNA_V1
    begun = Chat(processor).prompt("What?", [])
    assert begun.prompt.count(processor.tokenizer.bos_token_id) == 1
    assert begun.prompt[-len(plain) + 1 :] == plain.prompt[1:]


def test_an_answer_ends_where_the_models_tokens_do_and_the_check_counts_such_questions(
    questions, tiny_llava, caplog
):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import Prepared, load_model
    from llava_keeplora_recipes import load_recipe

    data = load_split(load_recipe(questions([("a", "What?", "a cat")], [("t", "Why?", "so")])), "test")
    free = load_model(ModelConfig(str(tiny_llava)), EvaluationConfig(max_new_tokens=8))
    tokens = len(free.preparation.ask(data)[0])
    tight = load_model(
        ModelConfig(str(tiny_llava), max_length=tokens + 3), EvaluationConfig(max_new_tokens=8)
    )
    tight.model = free.model
    tight.check(data)
    assert "1 of 1 questions leave fewer than 8 tokens for an answer, 3 at the least" in caplog.text
    answers = [
        f.predictor(data.recipe, Prepared(f, data), tokens=n).predict([data[0]])
        for f, n in ((tight, 8), (free, 3))
    ]
    assert answers[0] == answers[1], "greedy, so what is cut off at 3 tokens is what 3 tokens are"


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_llava):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import open_model

    with pytest.raises(UserError, match="model.max_length is 513.*positions for 512"):
        open_model(ModelConfig(str(tiny_llava), max_length=513))


def picture_folder(root, train, test, **facts):
    """A recipe of classes, one image of each."""
    for split, names in (("train", train), ("test", test)):
        for i, name in enumerate(names):
            (root / "pets" / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), (20 * i, 0, 200 * (split == "test"))).save(
                root / "pets" / split / name / "0.png"
            )
    facts = {"metric": "accuracy", "classes": "from-source", **facts}
    facts |= dict(
        name="pets",
        version=1,
        kind="classification",
        licence="MIT",
        prompt="a {c}",
        splits={"train": "train", "test": "test"},
    )
    (root / "pets.yaml").write_text(
        yaml.safe_dump(facts | {"source": {"format": "imagefolder", "path": "pets"}})
    )
    return root / "pets.yaml"


#: Of the tests' CLIP, which takes 12 tokens: two special ones, "a", and a class.
LONGEST = " ".join(["red"] * 9)

#: What is wrong → the model, (recipe's maker and its arguments), doors that let it in as it says nothing of what they read, and the rule.
DATA = {
    "a question that leaves no room": (
        "llava",
        [("a", "What?", "a cat")],
        [("t", "why " * 900, "so")],
        {},
        (),
        "record 't' .* the model takes 512",
    ),
    "an empty answer to learn": (
        "llava",
        [("a", "What?", " ")],
        [("t", "Why?", "so")],
        {},
        ("predict",),
        "record 'a' .* has an empty answer",
    ),
    "a special token": (
        "llava",
        [("a", "What?", "a cat")],
        [("t", "Why </s>?", "so")],
        {},
        (),
        "record 't' .* holds </s>, a special token",
    ),
    "references that no answer meets": (
        "llava",
        [("a", "What?", "A")],
        [("t", "Why?", "1")],
        {"metric": "option_letter"},
        ("predict",),
        "1 of 1 examples .*option_letter",
    ),
    "a metric that is none": (
        "llava",
        [("a", "What?", "A")],
        [("t", "Why?", "1")],
        {"metric": "nope"},
        (),
        "there is no metric 'nope'",
    ),
    "questions for CLIP": (
        "clip",
        [("a", "What?", "A")],
        [("t", "Why?", "1")],
        {},
        (),
        "task 'asked' is vqa, and CLIP does classification only",
    ),
    "a class prompt one token too long": (
        "clip",
        ["cat", LONGEST + " red"],
        ["cat", LONGEST + " red"],
        {},
        (),
        "has 13 tokens and the model takes 12",
    ),
    "the longest class prompt": (
        "clip",
        ["cat", LONGEST],
        ["cat", LONGEST],
        {},
        ("check", "predict", "plan", "train"),
        "",
    ),
    "a class of the test split alone": (
        "clip",
        ["cat", "dog"],
        ["cat", "dog", "owl"],
        {},
        (),
        "'owl', which is none of the 2 classes",
    ),
    "a class without training data": (
        "clip",
        ["cat", "dog"],
        ["cat", "dog", "owl"],
        {"classes": ["cat", "dog", "owl"]},
        ("predict",),
        "1 of 3 classes have no example",
    ),
    "a class with a special token": (
        "clip",
        ["cat", "<end>"],
        ["cat", "<end>"],
        {},
        (),
        "holds <end>, which is a special token",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_every_door_says_the_same_of_the_same_data(
    case, questions, run_tree, llava_tree, tiny_llava, tiny_clip, tmp_path, capsys, ends_where_it_begins
):
    kind, train, test, facts, let_in, rule = DATA[case]
    recipe = (
        questions(train, test)
        if isinstance(train[0], tuple)
        else picture_folder(tmp_path, train, test, **facts)
    )
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | facts))
    tree = (llava_tree if kind == "llava" else run_tree)(
        tmp_path / "run", tasks=[str(recipe)], methods={"keeplora": {}}
    )
    model = str(tiny_llava if kind == "llava" else tiny_clip)
    told = {"plan": refused(make_plan, tree), "train": refused(run, tree)}
    capsys.readouterr()
    code = main(["data", "check", str(recipe), "--model", model])
    errors = [
        line.strip().removeprefix("error: ")
        for line in capsys.readouterr().out.splitlines()
        if "error: " in line
    ]
    told["check"] = errors[0] if code else None
    try:
        main(
            [
                "predict",
                "--task",
                str(recipe),
                "--model",
                model,
                "--output",
                str(tmp_path / "out.jsonl"),
                "--device",
                "cpu",
            ]
        )
        told["predict"] = capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")
    except Begun:
        told["predict"] = None
    assert [door for door in ("check", "predict", "plan", "train") if told[door] is None] == [*let_in]
    sentences = {sentence for sentence in told.values() if sentence}
    assert len(sentences) == bool(rule) and len(errors) == bool(rule)
    assert all(re.search(rule, sentence) for sentence in sentences)


def test_a_long_class_is_shown_by_its_beginning_and_its_length(tiny_clip):
    from transformers import AutoTokenizer

    with pytest.raises(
        UserError, match=r"^the prompt 'a (red ){19}re\.\.\.' \(402 characters\) has 103 tokens"
    ):
        tokenize_prompts(AutoTokenizer.from_pretrained(tiny_clip), ["a " + "red " * 100])


def test_more_new_tokens_than_there_is_room_for_are_said_by_every_door(
    questions, llava_tree, tiny_llava, tmp_path, capsys, caplog, ends_where_it_begins
):
    recipe = questions([("a", "What?", "a cat")], [("t", "why " * 70, "so")])
    tree = llava_tree(tmp_path / "run", tasks=[str(recipe)], evaluation={"max_new_tokens": 128})
    for door in (make_plan, run):
        caplog.clear()
        assert refused(door, tree) is None
        assert "1 of 1 questions leave fewer than 128 tokens for an answer" in caplog.text
    assert main(["data", "check", str(recipe), "--model", str(tiny_llava)]) == 0
    assert "warning: 1 of 1 questions leave fewer than 128 tokens for an answer" in capsys.readouterr().out
    caplog.clear()
    with pytest.raises(Begun):
        main(
            [
                "predict",
                "--task",
                str(recipe),
                "--model",
                str(tiny_llava),
                "--output",
                str(tmp_path / "out.jsonl"),
                "--device",
                "cpu",
            ]
        )
    assert "1 of 1 questions leave fewer than 128 tokens for an answer" in caplog.text


def test_the_check_takes_an_adapter_whose_base_lies_elsewhere(questions, tiny_llava, tmp_path, capsys):
    recipe = questions([("a", "What?", "a cat")], [("t", "Why?", "so")])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    command = ["data", "check", str(recipe), "--model", str(tmp_path / "adapter")]
    assert main(command) == 2 and "say where it lies with --base" in capsys.readouterr().err
    assert main([*command, "--base", str(tiny_llava)]) == 0
