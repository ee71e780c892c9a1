"""A metric says of each reference whether an answer can meet it, before anything is predicted."""

import re
from types import SimpleNamespace

import pytest

from llava_keeplora.start.tasks import load_task
from llava_keeplora_eval import EvalError, check_references, predict_to_file, score, unmeetable
from llava_keeplora_eval.cli import main
from llava_keeplora_eval.data_check import metric_error
from llava_keeplora_eval.metrics import METRICS, AnswerMetric, general, metric_record

#: metric → accepted texts that an answer to the letter meets, and those that it doesn't.
SAID = {
    "accuracy": (["cat", "red_bird", "Cat "], ["", " "]),
    "exact_match": (["cat", "cafe\u0301", "a  b", "."], ["", "\n"]),
    "option_letter": (["B", "b", "(B)", "B. a dog"], ["2", "BB", "a dog", ""]),
    "yes_no": (["yes", "No", "True", "Yes."], ["1", "maybe", ""]),
    "numeric": (["3", "three", "1,000", "50%", " 3 ", "\uff13"], ["a dozen", "3 dogs", ""]),
    "vqa_accuracy": (["A", "the", ".", "two dogs"], [" "]),
    "coin_textvqa": (["A", "the", ".", "two dogs"], [" "]),
    "ucit_exact_match": (["Cat", "a. b"], ["cat ", ""]),  # the prediction is stripped, the answer isn't
    "dcl_rs": (
        ["yes", "rural area", "."],
        ["1.2", "U.S.", "", "Unanswerable"],
    ),  # the answer loses its periods
    "dcl_med": (["liver"], ["Unanswerable", ""]),
    "dcl_fin": (["A", "yes"], ["a b", "A."]),  # the prediction loses spaces and periods
    "acl_vp": (["(A)", "."], [" "]),
    "coin_scienceqa": (["A", "E"], ["F", "2", "(A)"]),  # at most five options
    "coin_gqa": (["table"], ["Table", "table."]),  # the prediction loses its case and its last periods
    "coin_vizwiz": (["blue"], [""]),
    "coin_vqav2": (["blue"], [""]),
    "coin_imagenet": (["tabby cat"], [""]),
    "coin_ocrvqa": (["jane doe"], ["Unanswerable"]),
    "coin_grounding": (
        ["[0.10,0.10,0.50,0.50]"],
        ["[0.1,0.1,0.5,0.5]", "on the left", "[0.10,0.10,0.10,0.50]"],
    ),
    "caption_rouge_l": (["a dog"], ["", "? !"]),
    "ucit_caption_mean": (["a dog"], [" ... "]),
}
INPUTS = {"coin_grounding": {"sizes": [640, 480]}}


@pytest.mark.parametrize("metric", SAID)
def test_each_reference_is_said_to_be_met_or_not(metric):
    met, unmet = SAID[metric]
    references = [[text] for text in met + unmet]
    inputs = {key: [value] * len(references) for key, value in INPUTS.get(metric, {}).items()}
    assert unmeetable(metric, references, **inputs) == list(range(len(met), len(references)))


def test_every_rule_is_asked_or_takes_more_than_texts():
    rules = {name for name, record in METRICS.items() if isinstance(record, AnswerMetric)}
    labelled = {record.name for record in general.METRICS}  # refuse a record whose label can't be met
    assert rules - set(SAID) - labelled == {"dcl_ad", "dcl_sci", "acl_ocr"}
    assert unmeetable("acl_ocr", [["a"], ["", "b"], [""]], answer_types=["x"] * 3) == [2]
    given = {"questions": ["Which states", "What"], "images": ["map_1.png", "AI2D_1.png"]}
    assert unmeetable("dcl_sci", [["ohio, utah"], [" leaf"]], **given) == [1]


def test_one_of_several_accepted_texts_is_enough_where_any_is_compared():
    assert unmeetable("option_letter", [["2", "B"], ["2", "3"], []]) == [1, 2]
    assert unmeetable("ucit_exact_match", [["", "cat"]]) == [0]  # an official file has one answer


@pytest.mark.parametrize(
    ("references", "unmet"),
    [
        ([["a dog"]], [0]),  # a single example has every word of all
        ([["a dog"], ["a dog"], ["A dog."]], [0, 1, 2]),
        ([["a dog"], ["a dog runs"]], [0]),
        ([["a dog"], ["dog a"]], []),  # the order of words tells them apart
        ([["a dog"], ["a cat"], ["!"]], [2]),
    ],
)
def test_cider_needs_words_that_not_every_example_has(references, unmet):
    assert unmeetable("caption_cider", references) == unmet


def asks(metric, answers):
    ids = [f"q{i}" for i in range(len(answers))]
    kind = "captioning" if metric.startswith("caption") else "vqa"
    recipe = SimpleNamespace(name="asks", version=1, kind=kind, metric=metric)

    class Data(SimpleNamespace):
        def __len__(self):
            return len(self.ids)

        def __getitem__(self, index):
            return SimpleNamespace(id=self.ids[index])

    return Data(recipe=recipe, split="test", fingerprint="f00d", dropped=[], ids=ids, answers=answers,
                questions=["?"] * len(ids), meta=[{}] * len(ids))  # fmt: skip


def test_the_sentence_has_number_share_first_ones_and_cure():
    assert check_references(asks("option_letter", [["A"], ["(B)"]])) is None
    sentence = check_references(asks("option_letter", [["A"], ["1"], ["2", "3"], ["x" * 90], ["5"]]))
    assert sentence.startswith(
        "4 of 5 examples of asks (test), 80.0 %, get 0 from the metric 'option_letter'"
    )
    assert "(q1: '1', q2: '2' or '3', q3: 'xxxxx" in sentence and "x..., ...)" not in sentence
    assert sentence.endswith(
        "the option's letter and nothing else: write the answers so, or choose another metric"
    )


@pytest.mark.parametrize(
    ("metric", "answers", "why"),
    [("option_letter", [["1"], ["2"]], "letter"), ("caption_cider", [["a dog"]], "CIDEr.*single example")],
)
def test_a_split_of_which_nothing_can_be_met_is_refused_before_and_at_scoring(tmp_path, metric, answers, why):
    data = asks(metric, answers)
    with pytest.raises(EvalError, match=f"{len(data)} of {len(data)} examples.*100.0 %.*{why}"):
        check_references(data)
    predictor = SimpleNamespace(predict=lambda examples: ["a dog"] * len(examples))
    predict_to_file(predictor, data, tmp_path / "p.jsonl")
    with pytest.raises(EvalError, match=why):
        score(data, tmp_path / "p.jsonl")


def test_what_scoring_refuses_is_refused_before_a_run():
    with pytest.raises(EvalError, match="1 of 2 examples.*q1: '...'.*no word"):
        check_references(asks("caption_rouge_l", [["a dog"], ["..."]]))
    boxes = asks("coin_grounding", [["[0.10,0.10,0.50,0.50]"], ["on the left"]])
    boxes.meta = [{"size": [8, 8]}] * 2
    with pytest.raises(EvalError, match="'on the left' is no box"):
        check_references(boxes)


def test_a_score_counts_them_and_the_command_says_it_first(tmp_path, monkeypatch, capsys):
    data = asks("numeric", [["3"], ["a dozen"]])
    predict_to_file(SimpleNamespace(predict=lambda examples: ["3", "12"]), data, tmp_path / "p.jsonl")
    result = score(data, tmp_path / "p.jsonl")
    assert (result.score, result.unmeetable) == (50, 1) and str(result).endswith(
        "(1/2, 1 that no answer can meet)"
    )
    monkeypatch.setattr("llava_keeplora_eval.cli._load", lambda arguments: data)
    assert main(["score", "--task", "asks", "--predictions", str(tmp_path / "p.jsonl")]) == 0
    assert capsys.readouterr().err.startswith("warning: 1 of 2 examples of asks (test), 50.0 %, get 0 from")


def kind_of(classes, labels=(0, 1), metric="accuracy", kind="classification", answers=None):
    recipe = SimpleNamespace(name="pets", kind=kind, metric=metric, classes=classes)
    ids, count = [f"r{i}" for i in range(len(answers or labels))], len(answers or labels)

    class Data(SimpleNamespace):
        def __len__(self):
            return count

    return Data(
        recipe=recipe,
        split="test",
        labels=list(labels),
        ids=ids,
        answers=answers,
        questions=[None] * count,
        meta=[{}] * count,
    )


@pytest.mark.parametrize(
    ("classes", "metric", "pairs"),
    [
        (["cat", "cat.", "dog"], "accuracy", 1),
        (["ice-cream", "ice cream"], "accuracy", 1),
        (["C", "C++", "C#"], "accuracy", 3),
        (["don't", "dont"], "accuracy", 1),
        (["1", "1.0", "01", "2"], "numeric", 3),
        (["one", "1", "two"], "numeric", 1),
        (["Cat", "cat"], "exact_match", 1),
    ],
)
def test_classes_that_a_score_takes_for_each_other_are_reported(classes, metric, pairs):
    data = kind_of(classes, metric=metric)
    said = check_references(data)
    assert f"takes {pairs} pairs of classes of pets for one and the same" in said and repr(classes[0]) in said
    swapped = metric_record(metric).compute([classes[1], classes[0]], [[c] for c in classes[:2]])
    assert max(swapped[metric], swapped["lenient"]) == 1


@pytest.mark.parametrize(
    "classes", [["cat", "dog"], ["dog", "hot dog"], ["+", "*", "\N{CAT FACE}", "\N{DOG FACE}"], ["1", "10"]]
)
@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "caption_rouge_l"])
def test_classes_that_every_score_distinguishes_are_not_reported(classes, metric):
    assert metric_record(metric).alike(classes) == []


@pytest.mark.parametrize("empty", ["", "\u00a0", "\u200b", " \ufeff"])
def test_an_empty_accepted_text_is_reported_as_empty_and_not_as_one_of_a_wrong_form(empty):
    data = kind_of(None, metric="option_letter", kind="vqa", answers=[[empty], ["A"], ["2"]])
    said = check_references(data)
    assert (
        "1 of 3 examples of pets (test), 33.3 %, get 0 from the metric 'option_letter' because their accepted text is empty (r0"
        in said
    )
    assert (
        "complete or remove these records; 1 of 3 examples" in said
        and "even if their accepted text is answered to the letter (r2" in said
    )
    with pytest.raises(
        EvalError, match="because their accepted text is empty.*; complete or remove these records.$"
    ) as caught:
        check_references(kind_of(None, metric="exact_match", kind="vqa", answers=[[empty]]))
    assert "to the letter" not in str(caught.value)
    assert metric_record("exact_match").compute([empty], [[empty]])["exact_match"] == 0


def test_a_metric_says_which_kinds_of_tasks_it_scores():
    kinds = {name: record.kinds for name, record in METRICS.items()}
    short = {"accuracy", "exact_match", "option_letter", "numeric", "yes_no"}
    captions = {"caption_rouge_l", "caption_cider", "caption_meteor", "ucit_caption_mean"}
    assert {name for name, scored in kinds.items() if scored == ("classification", "vqa")} == short
    assert {name for name, scored in kinds.items() if scored == ("captioning",)} == captions
    assert all(kinds[name] == ("vqa",) for name in kinds.keys() - short - captions)
    assert AnswerMetric("mine", 1, lambda text, answers: True, "x").kinds == (
        "classification",
        "vqa",
        "captioning",
    )


@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        ("vqa", "caption_cider"),
        ("classification", "vqa_accuracy"),
        ("classification", "coin_imagenet"),
        ("captioning", "exact_match"),
    ],
)
def test_a_metric_of_another_kind_of_task_is_refused_by_every_door(
    kind, metric, tmp_path, monkeypatch, capsys
):
    data = kind_of(["cat", "dog"], metric=metric, kind=kind, answers=[["cat"], ["dog"]])
    sentence = f"the metric '{metric}' scores tasks of the kind .*, and 'pets' is of the kind {kind}; choose"
    (tmp_path / "p.jsonl").write_text(
        '{"id": "r0", "prediction": "cat"}\n{"id": "r1", "prediction": "dog"}\n'
    )
    for door in (lambda: check_references(data), lambda: score(data, tmp_path / "p.jsonl")):
        with pytest.raises(EvalError, match=sentence):
            door()
    assert re.search(sentence, str(metric_error(data.recipe)))
    with pytest.raises(EvalError, match=sentence):
        load_task(data.recipe, None)
    monkeypatch.setattr("llava_keeplora_eval.cli._load", lambda arguments: data)
    assert main(["predict", "--task", "pets", "--model", "none", "--output", str(tmp_path / "o.jsonl")]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_predict_says_which_references_no_answer_can_meet_and_goes_on(tmp_path, monkeypatch, capsys):
    for answers, share in (([["3"], ["a dozen"]], "1 of 2"), ([["few"], ["a dozen"]], "2 of 2")):
        monkeypatch.setattr("llava_keeplora_eval.cli._load", lambda arguments: asks("numeric", answers))
        arguments = [
            "predict",
            "--task",
            "asks",
            "--model",
            str(tmp_path),
            "--output",
            str(tmp_path / "o.jsonl"),
        ]
        assert main(arguments) == 2  # there is no model
        warning, error = capsys.readouterr().err.strip().split("\n", 1)
        assert warning.startswith(f"warning: {share} examples of asks (test)") and str(tmp_path) in error
