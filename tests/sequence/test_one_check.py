"""`data check --model`, plan, train and predict prepare a task alike: what one of them refuses, all refuse in the same sentence."""

import copy
import dataclasses
import json
import re

import pytest
import yaml
from PIL import Image

from llava_keeplora.config import EvaluationConfig, parse_config
from llava_keeplora.errors import UserError
from llava_keeplora.plan import make_plan
from llava_keeplora.sequence import run
from llava_keeplora.sequence.workspace import Workspace
from llava_keeplora_eval import predictions
from llava_keeplora_eval.cli import main
from llava_keeplora_eval.preparation import tokenize_prompts
from llava_keeplora_recipes import load_split


@pytest.fixture
def questions(tmp_path):
    """Function (train records, test records) → a recipe of questions; a record is (id, question, answer)."""

    def write(train, test):
        Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
        for split, rows in (("train", train), ("test", test)):
            records = [
                {
                    "id": i,
                    "image": "0.png",
                    "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
                }
                for i, q, a in rows
            ]
            (tmp_path / f"{split}.json").write_text(json.dumps(records))
        facts = dict(
            name="asked",
            version=1,
            kind="vqa",
            metric="exact_match",
            licence="MIT",
            source={"format": "llava_json", "path": "."},
        )
        (tmp_path / "asked.yaml").write_text(
            yaml.safe_dump(facts | {"splits": {"train": "train.json", "test": "test.json"}})
        )
        return tmp_path / "asked.yaml"

    return write


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
    from llava_keeplora_eval.chat import VICUNA_V1, Chat
    from llava_keeplora_eval.models import load_llava_processor

    processor = load_llava_processor(str(tiny_llava))
    plain = Chat(processor).prompt("What?", [])
    processor.chat_template = "{{ bos_token }}" + VICUNA_V1
    begun = Chat(processor).prompt("What?", [])
    assert begun.count(processor.tokenizer.bos_token_id) == 1 and begun[-len(plain) + 1 :] == plain[1:]


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


class Begun(Exception):
    """Stands for the first stage of a run, or the first answer."""


@pytest.fixture
def ends_where_it_begins(monkeypatch):
    """Starts end where they would claim the folder, and predictions where they would answer."""

    def begin(*args, **kwargs):
        raise Begun

    monkeypatch.setattr(Workspace, "claim", begin)
    monkeypatch.setattr(predictions, "predict_to_file", begin)


def refused(door, tree):
    """What a door says of a configuration; nothing if it lets it in."""
    try:
        door(parse_config(copy.deepcopy(tree)))
    except UserError as error:
        return str(error)
    except Begun:
        pass
    return None


RATED = {"parts": {"vision": {"learning_rate": 0.1}}}


def deepspeed(stage=2, **content):
    return {
        "training": {
            "deepspeed": {
                "zero_optimization": {"stage": stage},
                "train_micro_batch_size_per_gpu": "auto",
                **content,
            }
        }
    }


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"training": {"optim": "adamx"}}, "adamx is not a valid OptimizerNames"),
        ({"training": {"adam_beta1": 2.0}}, "refuses its settings .*beta"),
        ({"training": {"lr_scheduler_type": "cosin"}}, "cosin is not a valid SchedulerType"),
        ({"training": {"lr_scheduler_kwargs": {"nope": 1}}}, "schedule 'linear' refuses its settings .*nope"),
        ({"training": {"warmup_steps": -1}}, "warmup_steps = -1"),
        ({"training": {"report_to": "no-such-tracker"}}, "report_to names 'no-such-tracker'"),
        ({"training": {"bf16": True, "fp16": True}}, "fp16 and bf16"),
        (
            {
                "training": {
                    "gradient_checkpointing": True,
                    "gradient_checkpointing_kwargs": {"use_reentrant": True},
                }
            },
            "use_reentrant is true",
        ),
        ({"training": {"optim_args": "nope=1"}}, "does not read training.optim_args.nope"),
        ({"training": {"dataloader_num_workers": -1}}, "torch refuses the data loader of 'keeplora'"),
        (
            {"training": {"dataloader_persistent_workers": True}},
            "torch refuses the data loader of 'keeplora'",
        ),
        (
            {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 64}},
            "'colours' has 24 examples for batches of 64",
        ),
        ({"training": {"num_train_epochs": [1, 2]}}, "lists 2 values for 1 tasks"),
        (
            deepspeed(train_micro_batch_size_per_gpu=3),
            "train_micro_batch_size_per_gpu=3 against training.per_device_train_batch_size=8",
        ),
        (
            deepspeed(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 77}}),
            "total_num_steps=77 against training.steps of 'colours'=3",
        ),
        (
            deepspeed(optimizer={"type": "AdamW", "params": {"lr": "auto"}}) | RATED,
            "brings its own optimizer.*parts.vision has its own",
        ),
        (
            deepspeed(3) | {"parts": {"vision": {"energy_weight": "auto"}}},
            "'auto', and ZeRO-3 holds the weights in shards",
        ),
        ({"parts": {"vision": {"rank": 32}}}, "rank is 32, and layer .* has 32 input directions"),
        (
            {"methods": {"keeplora": {"preset": "released-clip"}}, "parts": {"vision": {"targets": ["fc1"]}}},
            "square layers alone allow.*64 × 32",
        ),
        ({"memory": {"statistics_gb": 1e-9}}, "holds no statistics of the features of 'keeplora'"),
        (
            {"methods": {"keeplora": {}, "inflora": {}}, "memory": {"statistics_gb": 1e-9}},
            "holds no statistics of the features of",
        ),
        (
            {"methods": {"keeplora": {}, "zscl": {"reference": "nowhere"}}},
            "methods.zscl.reference: there is no recipe 'nowhere'",
        ),
        (
            {"methods": {"keeplora": {}, "zscl": {"reference": "shapes", "reference_texts": "/gone.txt"}}},
            "methods.zscl.reference_texts: /gone.txt cannot be read",
        ),
        ({"model": {"max_length": 5}}, "model.max_length is 5, which is of models that write answers"),
        (
            {"evaluation": {"generation": {"num_beams": 2}}},
            "evaluation.generation is .*which is of models that write answers",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_plan_and_train_say_the_same_of_a_wrong_configuration_and_let_the_mended_one_into_the_same_folder(
    changes, rule, run_tree, tiny_tasks, tmp_path, ends_where_it_begins
):
    def tree(**changes):
        return run_tree(
            tmp_path / "run", **{"tasks": [str(tiny_tasks[0])], "methods": {"keeplora": {}}} | changes
        )

    told = {door.__name__: refused(door, tree(**changes)) for door in (make_plan, run)}
    assert told["make_plan"] == told["run"]
    assert told["run"] is not None and re.search(rule, told["run"])
    assert not (tmp_path / "run/config.json").exists()
    assert refused(run, tree()) is None and refused(make_plan, tree()) is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"parts": {"language": {"rank": 64}}},
            "parts.language.rank is 64, and layer .* has 32 input directions",
        ),
        (
            {"methods": {"keeplora": {"random_resized_crop": [0.9, 1.0]}}},
            "random_resized_crop is set, which crops what CLIP trains on",
        ),
        (
            {"evaluation": {"test_prompts": "averaged"}},
            "test_prompts is 'averaged', which averages the text features of CLIP",
        ),
        ({"model": {"max_length": 513}}, "model.max_length is 513"),
        ({"training": {"optim": "adamx"}}, "adamx is not a valid OptimizerNames"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_so_they_do_of_a_llava(changes, rule, llava_tree, mixed_tasks, tmp_path, ends_where_it_begins):
    tree = lambda **changes: llava_tree(tmp_path / "run", **{"tasks": [str(mixed_tasks[0])]} | changes)  # noqa: E731
    told = {refused(door, tree(**changes)) for door in (make_plan, run)}
    assert len(told) == 1 and re.search(rule, told.pop()) and not (tmp_path / "run/config.json").exists()
    assert refused(run, tree()) is None and refused(make_plan, tree()) is None


def test_what_a_plan_proposes_is_let_in_by_a_start(run_tree, tiny_tasks):
    from llava_keeplora.plan.machine import find_machine
    from llava_keeplora.plan.plan import _changed, _Scenarios

    config = parse_config(run_tree("unset", tasks=[str(tiny_tasks[0])], methods={"keeplora": {}}))
    scenarios = _Scenarios(config, find_machine(2, 24.0))
    proposals = [changes for changes in scenarios._heavy({}) if changes.get("gpus", 2) == 2]
    assert any("training.deepspeed" in changes for changes in proposals)
    for changes in proposals:
        assert make_plan(_changed(config, changes), 2, 24.0).fits


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fsdp", "full_shard"),
        ("push_to_hub", True),
        ("neftune_noise_alpha", 5.0),
        ("use_liger_kernel", True),
        ("train_sampling_strategy", "group_by_length"),
        ("label_smoothing_factor", 0.1),
        ("auto_find_batch_size", True),
        ("eval_on_start", True),
        ("parallelism_config", {"tp_size": 2}),
        ("weight_decay", -1.0),
    ],
)
def test_arguments_that_training_fails_with_or_would_pass_over_are_refused_as_they_are_read(
    key, value, run_tree
):
    with pytest.raises(UserError, match=f"training.{key} is "):
        parse_config(run_tree("unset", training={key: value}))
    from transformers import TrainingArguments

    default = next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == key)
    assert parse_config(run_tree("unset", training={key: default})).training.get(key) == default


def test_an_argument_that_the_optimiser_reads_is_let_in(run_tree, tiny_tasks, ends_where_it_begins):
    for optim, given in (("sgd", "momentum=0.9,nesterov=true"), ("rmsprop", "alpha=0.9")):
        tree = run_tree(
            "unset",
            tasks=[str(tiny_tasks[0])],
            methods={"keeplora": {}},
            training={"optim": optim, "optim_args": given},
        )
        assert refused(make_plan, tree) is None


def picture_folder(root, train, test, **facts):
    """A recipe of classes, one picture of each."""
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


def test_several_processes_are_refused_by_a_plan_as_by_a_start_where_batches_count_in_their_order(
    run_tree, tiny_tasks
):
    tree = run_tree("unset", tasks=[str(tiny_tasks[0])], methods={"keeplora": {"preset": "released-clip"}})
    assert make_plan(parse_config(tree), 1, 24.0).fits
    with pytest.raises(
        UserError,
        match="'keeplora' averages batches in their order, which 2 processes don't have; run it in one process",
    ):
        make_plan(parse_config(tree), 2, 24.0)


def test_the_check_takes_an_adapter_whose_base_lies_elsewhere(questions, tiny_llava, tmp_path, capsys):
    recipe = questions([("a", "What?", "a cat")], [("t", "Why?", "so")])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    command = ["data", "check", str(recipe), "--model", str(tmp_path / "adapter")]
    assert main(command) == 2 and "say where it lies with --base" in capsys.readouterr().err
    assert main([*command, "--base", str(tiny_llava)]) == 0
