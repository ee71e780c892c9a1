"""The command line, from a model and a task to a score, and from a matrix file to its tables."""

import json
import subprocess
import sys

import pytest

from llava_keeplora_eval import Matrix
from llava_keeplora_eval.cli import main


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def small_digits(tmp_path, monkeypatch):
    """The rendered digits, only the first thirty of them."""
    from llava_keeplora_eval import cli

    load = cli.load_split
    monkeypatch.setattr(cli, "load_split", lambda *a, **k: load(*a, **k).take(range(30)))


def test_predict_then_score_gives_a_line_and_the_same_number_as_json(run, tiny_clip, tmp_path, small_digits):
    output = tmp_path / "digits.jsonl"
    predict = ("predict", "--model", tiny_clip, "--task", "digits", "--output", output, "--device", "cpu")
    assert run(*predict)[:2] == (0, f"{output}: 30 predicted now, 30 in all\n")
    assert run(*predict)[1] == f"{output}: 0 predicted now, 30 in all\n"
    code, text, _ = run("score", "--task", "digits", "--predictions", output)
    line, errors = text.splitlines()
    record = json.loads(run("score", "--task", "digits", "--predictions", output, "--json")[1])
    assert code == 0 and line.startswith("digits v1 (test): accuracy v1 ") and line.endswith("/30)")
    assert record["score"] == 100 * record["correct"] / 30
    assert errors.startswith("errors: ")
    assert sum(int(word) for word in errors.split() if word.isdigit()) == 30 - record["correct"]


@pytest.fixture
def matrix_file(tmp_path):
    path = tmp_path / "run" / "keeplora" / "matrix.json"
    path.parent.mkdir(parents=True)
    Matrix(["a", "b"], [1.0, 2.0], [[90.0, 30.0], [80.0, 70.0]]).to_json(path)
    return path


def test_a_matrix_file_is_shown_in_every_format(run, matrix_file):
    matrix = Matrix.from_json(matrix_file)
    assert run("matrix", matrix_file) == (0, matrix.markdown() + "\n" + matrix.metrics_markdown(), "")
    assert "| a | 90.000 | 30.000 | 60.000 |" in run("matrix", matrix_file, "--precision", 3)[1]
    assert run("matrix", matrix_file, "--format", "csv")[1] == matrix.csv()
    assert json.loads(run("matrix", matrix_file, "--format", "json")[1]) == matrix.to_dict()


def test_a_run_folder_shows_every_matrix_in_it_under_its_name(run, matrix_file):
    folder = matrix_file.parents[1]
    assert run("matrix", folder)[1] == run("matrix", matrix_file)[1]
    (folder / "seq-lora").mkdir()
    Matrix(["a"], None, [[5.0]]).to_json(folder / "seq-lora" / "matrix.json")
    shown = run("matrix", folder)[1]
    assert shown.index("## keeplora") < shown.index("| after | a | b |") < shown.index("## seq-lora")
    assert set(json.loads(run("matrix", folder, "--format", "json")[1])) == {"keeplora", "seq-lora"}
    assert run("matrix", folder, "--format", "csv")[1].count("after,a") == 2


def test_the_list_names_every_recipe_with_its_metric(run):
    code, listing, _ = run("list")
    assert code == 0
    assert any(
        line.split()[:4] == ["digits", "v1", "classification", "accuracy"] for line in listing.splitlines()
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("score", "--task", "digts", "--predictions", "x.jsonl"), ("digts", "did you mean 'digits'")),
        (
            ("score", "--task", "digits", "--predictions", "x.jsonl"),
            ("there is no predictions file x.jsonl",),
        ),
        (
            ("score", "--task", "digits", "--split", "tset", "--predictions", "x.jsonl"),
            ("tset", "did you mean 'test'"),
        ),
        (("matrix", "nowhere.json"), ("there is no matrix file nowhere.json", "check the path")),
        (("matrix", "."), (". holds no matrix.json, nor does a folder in it", "give the folder of a run")),
        (
            ("predict", "--model", "no-such-folder/at-all/here", "--task", "digits", "--output", "x.jsonl"),
            ("there is no folder 'no-such-folder/at-all/here'", "give a folder with a checkpoint"),
        ),
    ],
)
def test_a_mistake_is_reported_in_one_sentence_with_exit_code_2(run, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for part in parts:
        assert part in err


def test_debug_raises_the_error_itself(run):
    with pytest.raises(Exception, match="there is no matrix file"):
        run("matrix", "nowhere.json", "--debug")


def test_a_reader_that_stops_reading_is_no_error(matrix_file):
    program = "import sys, llava_keeplora_eval.cli as cli; sys.exit(cli.main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", program, "matrix", matrix_file], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_batch_of_no_examples_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--model", "m", "--task", "t", "--output", "o", "--batch-size", "0"])
    assert stop.value.code == 2
    assert "0 is not at least 1" in capsys.readouterr().err


def test_nothing_of_it_imports_the_training_half_or_needs_torch_for_a_matrix():
    program = (
        "import sys\n"
        "import llava_keeplora_eval.cli, llava_keeplora_eval.models as models\n"
        "assert not {'torch', 'evaluate', 'transformers'} & set(sys.modules), 'slow start'\n"
        "from llava_keeplora_eval.errors import EvalError\n"
        "try:\n"
        "    models.resolve_model('tiny-clip')\n"
        "except EvalError as error:\n"
        "    assert 'not installed' in str(error)\n"
        "import llava_keeplora_eval.predictors\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'llava_keeplora'], 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
