"""YAML from anyone: plain data as YAML 1.2 means it, or one sentence, and never a long wait."""

import time

import pytest
import yaml

from llava_keeplora.config import load_config, parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora_recipes import load_recipe
from llava_keeplora_recipes.errors import RecipeError
from llava_keeplora_recipes.strict_yaml import dump_yaml, parse_yaml, read_mapping

#: Scalars that YAML 1.1 and 1.2 read differently, and what the core schema of YAML 1.2 (10.3.2) makes of them.
CORE = {
    "no": "no",
    "Yes": "Yes",
    "on": "on",
    "OFF": "OFF",
    "y": "y",
    "true": True,
    "False": False,
    "010": "010",
    "0x1F": "0x1F",
    "0b1": "0b1",
    "12:30:45": "12:30:45",
    "1:30.5": "1:30.5",
    "2020-01-01": "2020-01-01",
    "2026-13-45": "2026-13-45",
    "1_000": "1_000",
    "=": "=",
    "0": 0,
    "-7": -7,
    "+3": 3,
    "1e-3": 0.001,
    "1E5": 1e5,
    "3.": 3.0,
    ".5": 0.5,
    "-.5e-3": -0.0005,
    ".inf": ".inf",
    ".NaN": ".NaN",
    "~": None,
    "null": None,
    "": None,
    "9223372036854775807": 2**63 - 1,
}


def bomb(first, link):
    """Ten levels of which each names the one before ten times."""
    levels = [first] + [link(",".join([f"*a{level}"] * 10)) for level in range(9)]
    return "".join(f"a{level}: &a{level} {value}\n" for level, value in enumerate(levels))


REFUSED = {
    "a: !!int ''": "tag",
    "a: !mine b": "tag",
    "!!python/object/apply:os.system [x]": "tag",
    "a: ! 3": "tag",
    "a: " + "9" * 5000: "number 99.*too large",
    "a: -9223372036854775809": "too large",
    "a: 1e999": "too large",
    "a: " + "[" * 5000: "levels deep",
    "a: " + "{a: " * 100: "levels deep",
    "- " * 500 + "x": "levels deep",
    'a: "\\ud800"': "half a character",
    'a: "x\\0y"': "NUL",
    '"\\0": x': "NUL",
    "a: \ud800": "0xd800",
    "a: \x1b[31m": "0x1b",
    'a: "\\U00110000"': "chr",
    "a: &a [*a]": "alias.*inside",
    "a: &a {b: [*a]}": "alias.*inside",
    "a: *b": "undefined alias",
    bomb("[x,x,x,x,x,x,x,x,x,x]", "[{}]".format): "200000 values",
    bomb("{k: 1, l: 2}", "{{<<: [{}]}}".format): "200000 values",
    "x" * (2**21 + 1): "longer than",
    "a: 1\na: 2": "'a' occurs twice",
    "<<: {a: 1}\n<<: {b: 2}": "'<<' occurs twice",
    "{[1]: 2}": "as a key",
    "1: a\ntrue: b": "twice",
    "a: 1\n---\nb: 2": "single document",
    "a: b: c": "mapping values",
    "\ta: 1": "cannot start",
    "<<: 3": "merging",
}


def test_plain_scalars_are_read_as_yaml_1_2_means_them():
    for text, value in CORE.items():
        (read,) = parse_yaml(f"- {text}\n")
        assert read == value and type(read) is type(value), text
    assert parse_yaml("\ufeffa: 'no'\r\nb: [\"1\"]\r") == {"a": "no", "b": ["1"]}


def test_text_that_looks_like_something_else_is_written_so_that_it_stays_text():
    values = [*CORE, *CORE.values(), "<<", 1e-5, "a\x1b[31m", "- a", {"no": ["1e3"]}]
    assert parse_yaml(dump_yaml(values)) == values
    assert parse_yaml(yaml.safe_dump([text for text in CORE if "e" not in text.lower()])) == [
        text for text in CORE if "e" not in text.lower()
    ]


def test_merged_keys_are_defaults_wherever_the_mapping_stands():
    assert parse_yaml(
        "a: {b: &b {<<: &c {x: 1, y: 2}, x: 3}}\nd: {<<: *b, z: 4}\ne: {<<: [*b, {y: 5, w: 6}]}"
    ) == {
        "a": {"b": {"x": 3, "y": 2}},
        "d": {"x": 3, "y": 2, "z": 4},
        "e": {"x": 3, "y": 2, "w": 6},
    }


@pytest.mark.parametrize(("text", "reason"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_is_no_plain_data_or_too_much_of_it_is_refused_at_once(text, reason):
    start = time.process_time()
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_are_read_in_the_encodings_that_editors_write(tmp_path, encoding):
    (tmp_path / "a.yaml").write_bytes("a: é\r\n".encode(encoding))
    assert read_mapping(tmp_path / "a.yaml") == {"a": "é"}


@pytest.mark.parametrize("content", [b"", b"[1]", b"a: \xff", b"a: [", b"---"])
def test_a_file_that_holds_no_mapping_is_named(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match="a.yaml"):
        read_mapping(tmp_path / "a.yaml")


def test_a_recipe_may_have_classes_that_look_like_booleans_and_dates_and_survives_being_kept(tmp_path):
    from llava_keeplora_recipes.recipe_files import flat_recipe

    text = "name: n\nversion: 1\nkind: classification\nmetric: accuracy\nlicence: x\nprompt: a {c}\nclasses: [no, on, 007, 2020-01-01, '1e3']\n"
    (tmp_path / "n.yaml").write_text(
        text + "source: {format: imagefolder, path: .}\nsplits: {train: a, test: b}\n"
    )
    recipe = load_recipe(tmp_path / "n.yaml")
    assert recipe.classes == ["no", "on", "007", "2020-01-01", "1e3"]
    (tmp_path / "kept.yaml").write_text(flat_recipe(tmp_path / "n.yaml"))
    assert load_recipe(tmp_path / "kept.yaml").fingerprint == recipe.fingerprint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "n" * 300}, "300 characters.*100"),
        ({"version": "2026-13-45"}, "'version'.*whole number"),
        ({"prompt": "x" * 10**5}, "no place for the question"),
    ],
)
def test_a_recipe_of_such_values_is_refused_in_one_short_line(tmp_path, changes, reason):
    facts = {
        "name": "n",
        "version": 1,
        "kind": "vqa",
        "metric": "exact_match",
        "licence": "x",
        "source": {"format": "llava_json", "path": "."},
        "splits": {"train": "a"},
    }
    (tmp_path / "n.yaml").write_text(dump_yaml(facts | changes))
    with pytest.raises(RecipeError, match=reason) as refused:
        load_recipe(tmp_path / "n.yaml")
    assert len(str(refused.value)) < 5000 and "\n" not in str(refused.value)


def test_words_for_true_and_false_are_read_where_nothing_else_is_meant(run_tree, tmp_path):
    config = parse_config(
        run_tree(
            tmp_path / "run",
            training={"gradient_checkpointing": "off", "logging_first_step": "Yes", "run_name": "no"},
        )
    )
    assert [config.training[key] for key in ("gradient_checkpointing", "logging_first_step", "run_name")] == [
        False,
        True,
        "no",
    ]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.learning_rate=nan", "learning_rate is 'nan'"),
        ("training.learning_rate=.inf", "learning_rate"),
        ("training.learning_rate=" + "9" * 400, "too large"),
        ("seed=" + "[" * 5000, "levels deep"),
        ("seed=\udcff", "0xdcff"),
        ("a." * 2000 + "b=1", "2001 levels"),
        ("seed=!!int '3'", "tag"),
        ("seed=010x", "seed"),
        ("methods={" + "m" * 300 + ": {method: keeplora}}", "100 characters.*300"),
        ("tasks=no", "must be a list of names"),
    ],
)
def test_an_override_of_such_values_is_refused(run_tree, tmp_path, override, reason):
    (tmp_path / "run.yaml").write_text(dump_yaml(run_tree(tmp_path / "run")))
    with pytest.raises(ConfigError, match=reason) as refused:
        load_config(str(tmp_path / "run.yaml"), [override])
    assert len(str(refused.value)) < 5000 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", ["[1]", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 10**5, '{"a": "\\ud800"}', "x"]
)
def test_a_deepspeed_file_that_is_no_plain_object_is_refused_with_its_name(run_tree, tmp_path, content):
    (tmp_path / "zero.json").write_text(content)
    with pytest.raises(ConfigError, match="training.deepspeed"):
        parse_config(run_tree(tmp_path / "run", training={"deepspeed": str(tmp_path / "zero.json")}))
