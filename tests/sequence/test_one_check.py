"""`data check --model`, plan, train and predict prepare a task alike: what one of them refuses, all refuse in the same sentence."""

import json

import pytest
import yaml
from PIL import Image

from llava_keeplora.config import EvaluationConfig, parse_config
from llava_keeplora.errors import UserError
from llava_keeplora.plan import make_plan
from llava_keeplora.sequence import run
from llava_keeplora_eval.cli import main


@pytest.fixture
def questions(tmp_path):
    """Function (train records, test records) → a recipe of questions; a record is (id, question, answer)."""

    def write(train, test):
        Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
        for split, rows in (("train", train), ("test", test)):
            records = [
                {"id": i, "image": "0.png", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for i, q, a in rows
            ]
            (tmp_path / f"{split}.json").write_text(json.dumps(records))
        facts = dict(name="asked", version=1, kind="vqa", metric="exact_match", licence="MIT", source={"format": "llava_json", "path": "."})
        (tmp_path / "asked.yaml").write_text(yaml.safe_dump(facts | {"splits": {"train": "train.json", "test": "test.json"}}))
        return tmp_path / "asked.yaml"

    return write


@pytest.fixture
def said(capsys, llava_tree, tmp_path, monkeypatch):
    """Function (recipe, model) → what each door says."""

    def ask(recipe, model, tree=llava_tree, **changes):
        config = tree(tmp_path / "run", tasks=[str(recipe)], **changes)
        config["model"]["name_or_path"] = str(model)
        told = {}
        for door, enter in (("plan", make_plan), ("train", run)):
            with pytest.raises(UserError) as error:
                enter(parse_config(config))
            told[door] = str(error.value)
        assert not (tmp_path / "run/config.json").exists(), "a refused start leaves the folder free"
        capsys.readouterr()
        assert main(["data", "check", str(recipe), "--model", str(model)]) == 2
        told["check"] = " ".join(line.strip().removeprefix("error: ") for line in capsys.readouterr().out.splitlines() if "error:" in line)
        assert main(["predict", "--task", str(recipe), "--model", str(model), "--output", str(tmp_path / "out.jsonl"), "--device", "cpu"]) == 2
        told["predict"] = capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")
        assert not (tmp_path / "out.jsonl").exists(), "refused before the first answer"
        return told

    return ask


def test_a_question_without_room_for_its_answer_is_refused_alike_by_all_doors(questions, said, tiny_llava):
    told = said(questions([("a", "What?", "a cat")], [("t", "why " * 900, "so")]), tiny_llava)
    assert len(set(told.values())) == 1
    assert told["predict"].startswith("record 't' of asked (test.json) has ") and "and the model takes 512; shorten" in told["predict"]


def test_a_class_prompt_that_is_too_long_is_refused_alike_by_all_doors(said, run_tree, tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "z7" * 100):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "pets" / split / name / "0.png")
    facts = dict(name="pets", version=1, kind="classification", metric="accuracy", licence="MIT", prompt="a {c}", classes="from-source")
    facts |= dict(splits={"train": "train", "test": "test"}, source={"format": "imagefolder", "path": "pets"})
    (tmp_path / "pets.yaml").write_text(yaml.safe_dump(facts))
    told = said(tmp_path / "pets.yaml", "tiny-clip", run_tree, methods={"keeplora": {}})
    assert len({sentence for sentence in told.values()} - {told["check"]}) == 1 and told["train"] in told["check"]
    assert "tokens and the model takes" in told["train"]


@pytest.mark.parametrize(("question", "answer", "reason"), [("What?", " ", "has an empty answer"), ("What?", "so " * 900, r"and the model takes 512")])
def test_what_training_refuses_the_check_and_the_plan_refuse_too(questions, llava_tree, tiny_llava, tmp_path, capsys, question, answer, reason):
    recipe = questions([("a", "What?", "a cat"), ("b", question, answer), ("c", question, answer)], [("t", "Why?", "so")])
    config = llava_tree(tmp_path / "run", tasks=[str(recipe)])
    sentences = []
    for enter in (make_plan, run):
        with pytest.raises(UserError, match=reason) as error:
            enter(parse_config(config))
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1] and "record 'b' of asked" in sentences[0] and "(and 1 more of 3 examples)" in sentences[0]
    assert main(["data", "check", str(recipe), "--model", str(tiny_llava)]) == 2
    assert [f"record '{i}'" in line for i, line in zip("bc", (x for x in capsys.readouterr().out.splitlines() if reason in x), strict=True)] == [True] * 2


def test_clip_shows_the_class_prompt_with_its_special_tokens(capsys):
    from transformers import AutoTokenizer

    from llava_keeplora.models import ASSETS
    from llava_keeplora_recipes import load_recipe

    assert main(["data", "check", "shapes", "--split", "test", "--model", "tiny-clip"]) == 0
    out = capsys.readouterr().out.splitlines()
    data = load_recipe("shapes").load("test")
    tokenizer = AutoTokenizer.from_pretrained(str(ASSETS / "tiny-clip"))
    lengths = [len(tokenizer(p)["input_ids"]) for p in data.recipe.prompts]
    assert f"    class prompts: {len(lengths)}, longest {max(lengths)} of {tokenizer.model_max_length} tokens" in out
    expected = tokenizer(data.recipe.prompts[data.labels[0]])["input_ids"]
    first = next(line for line in out if "ids: " in line)
    assert [int(i) for i in first.strip().removeprefix("ids: ⟦").removesuffix("⟧").split()] == expected


def test_clip_refuses_questions_at_every_door_but_scoring(questions, capsys):
    recipe = questions([("a", "What?", "a cat")], [("t", "Why?", "so")])
    assert main(["data", "check", str(recipe), "--model", "tiny-clip"]) == 2
    assert "task 'asked' is vqa, and CLIP does classification only" in capsys.readouterr().out


def test_a_template_that_begins_with_the_begin_token_begins_once(tiny_llava):
    from llava_keeplora_eval.chat import VICUNA_V1, Chat
    from llava_keeplora_eval.models import load_llava_processor

    processor = load_llava_processor(str(tiny_llava))
    plain = Chat(processor).prompt("What?", [])
    processor.chat_template = "{{ bos_token }}" + VICUNA_V1
    begun = Chat(processor).prompt("What?", [])
    assert begun.count(processor.tokenizer.bos_token_id) == 1 and begun[-len(plain) + 1 :] == plain[1:]


def test_an_answer_ends_where_the_models_tokens_do_and_the_check_counts_such_questions(questions, tiny_llava, caplog):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import Prepared, load_model
    from llava_keeplora_recipes import load_recipe

    data = load_recipe(questions([("a", "What?", "a cat")], [("t", "Why?", "so")])).load("test")
    free = load_model(ModelConfig(str(tiny_llava)), EvaluationConfig(max_new_tokens=8))
    tokens = len(free.preparation.ask(data)[0])
    tight = load_model(ModelConfig(str(tiny_llava), max_length=tokens + 3), EvaluationConfig(max_new_tokens=8))
    tight.model = free.model
    tight.check(data)
    assert "1 of 1 questions leave fewer than 8 tokens for an answer, 3 at the least" in caplog.text
    answers = [f.predictor(data.recipe, Prepared(f, data), tokens=n).predict([data[0]]) for f, n in ((tight, 8), (free, 3))]
    assert answers[0] == answers[1], "greedy, so what is cut off at 3 tokens is what 3 tokens are"


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_llava):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import open_model

    with pytest.raises(UserError, match="model.max_length is 513.*positions for 512"):
        open_model(ModelConfig(str(tiny_llava), max_length=513))
