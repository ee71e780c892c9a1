"""The matrix: its cells, its file, its tables, and every aggregate against formulas and publications."""

import json
import os

import numpy as np
import pytest

from llava_keeplora_eval import EvalError, Matrix, aggregates

T = 5


@pytest.fixture
def cells():
    return np.random.default_rng(0).uniform(0, 100, (T, T))


@pytest.fixture
def full(cells):
    return Matrix([f"t{i}" for i in range(T)], [50.0, 40.0, 30.0, 20.0, 10.0], cells.tolist())


def test_all_fourteen_published_mtil_matrices_give_the_published_numbers(parity):
    published = json.loads((parity / "mtil_published.json").read_text())
    matrices = np.load(parity / "mtil_matrices.npz")
    assert len(published) == 14 and set(matrices) == set(published)
    for name, numbers in published.items():
        metrics = Matrix([str(i) for i in range(11)], None, matrices[name].tolist()).metrics()
        assert {key: round(metrics[key], 1) for key in numbers} == numbers, name


def test_a_constant_model_scores_the_published_zero_shot_transfer():
    row = [24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]
    matrix = Matrix([str(i) for i in range(11)], row)
    metrics = matrix.metrics()
    assert round(metrics["zero_shot_transfer"], 1) == 69.4
    assert round(metrics["zero_shot_average"], 1) == 65.3
    constant = matrix.constant_zero_shot().metrics()
    assert constant["transfer"] == metrics["zero_shot_transfer"]
    assert constant["forgetting"] == constant["forgetting_max"] == constant["bwt"] == 0


def test_the_published_disco_ucit_bwt_follows_from_mft_and_mfn_with_mcitlibs_divisor():
    # MFT 75.87, MFN 69.66, BWT -7.45 on six tasks: 6 (MFN - MFT) / 5.
    rows = np.full((6, 6), 75.87)
    rows[-1, :5] = 75.87 + 6 * (69.66 - 75.87) / 5
    metrics = Matrix(list("abcdef"), None, rows.tolist()).metrics()
    assert round(metrics["mft"], 2) == 75.87 and round(metrics["mfn"], 2) == 69.66
    assert round(metrics["bwt"], 2) == -7.45


def test_every_aggregate_agrees_with_a_naive_formula(full, cells):
    end = T - 1
    diagonal = np.diag(cells)
    expected = {
        "transfer": np.mean([cells[:i, i].mean() for i in range(1, T)]),
        "average": cells.mean(),
        "last": cells[end].mean(),
        "forgetting": np.mean(diagonal[:end] - cells[end, :end]),
        "forgetting_max": np.mean(cells[:end, :end].max(axis=0) - cells[end, :end]),
        "bwt": np.sum(cells[end] - diagonal) / (T - 1),
        "bwt_coin": np.sum(cells[end] - diagonal) / T,
        "mft": diagonal.mean(),
        "mfn": cells[end].mean(),
        "maa": np.mean([cells[t, : t + 1].mean() for t in range(T)]),
        "zero_shot_transfer": np.mean([40, 30, 20, 10]),
        "zero_shot_average": 30,
    }
    metrics = full.metrics()
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
    per_task = full.per_task()
    assert per_task["transfer"][0] is None
    assert per_task["transfer"][1:] == pytest.approx([cells[:i, i].mean() for i in range(1, T)])
    assert per_task["average"] == pytest.approx(cells.mean(axis=0).tolist())
    assert per_task["last"] == cells[end].tolist()


def test_forgetting_from_the_best_score_is_never_below_the_drop_from_the_diagonal(full):
    metrics = full.metrics()
    assert metrics["forgetting_max"] >= metrics["forgetting"]
    assert metrics["forgetting"] == pytest.approx(-metrics["bwt"])


def test_the_zero_shot_row_enters_no_aggregate_of_the_run(full, cells):
    without = Matrix(full.tasks, None, cells.tolist()).metrics()
    metrics = full.metrics()
    assert all(metrics[name] == without[name] for name in aggregates.AGGREGATES)
    assert without["zero_shot_transfer"] is None


def test_one_task_has_no_transfer_forgetting_or_bwt_and_says_so():
    matrix = Matrix(["only"], [10.0], [[70.0]])
    metrics = matrix.metrics()
    for name in ("transfer", "forgetting", "forgetting_max", "bwt", "zero_shot_transfer"):
        assert metrics[name] is None
    assert metrics["bwt_coin"] == 0
    for name in ("average", "last", "mft", "mfn", "maa"):
        assert metrics[name] == 70
    assert "| transfer | n/a |" in matrix.metrics_markdown()


def test_a_partial_matrix_has_no_number_that_needs_a_missing_cell():
    matrix = Matrix(["a", "b"], [1.0, 2.0], [[90.0, 30.0]])
    metrics = matrix.metrics()
    assert metrics["transfer"] == 30
    assert metrics["average"] is metrics["last"] is metrics["bwt"] is metrics["mft"] is None
    assert metrics["zero_shot_transfer"] == 2
    assert not matrix.complete
    with pytest.raises(EvalError) as error:
        aggregates.last(matrix.rows)
    assert str(error.value) == (
        "the matrix has no score for task 1 after task 2, which this number needs; "
        "finish the run (start it again with the same command) before asking for it."
    )


def test_cells_are_set_by_name_or_number_and_survive_the_file_to_the_last_bit(tmp_path):
    matrix = Matrix(["a", "b"])
    matrix.set_cell(None, "a", 1 / 3)
    matrix.set_cell("a", 1, 0.1 + 0.2)
    matrix.set_cell(1, "b", 100)
    path = tmp_path / "matrix.json"
    matrix.to_json(path)
    matrix.to_json(path)
    assert Matrix.from_json(path) == matrix
    assert matrix.zero_shot == [1 / 3, None] and matrix.rows == [[None, 0.1 + 0.2], [None, 100.0]]
    assert [file.name for file in tmp_path.iterdir()] == ["matrix.json"]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "matrix.json"
    matrix = Matrix(["a"], [1.0], [[2.0]])
    matrix.to_json(path)
    before = path.read_bytes()

    def broken(_):
        raise OSError("disk full")

    monkeypatch.setattr("llava_keeplora_eval.files.os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        Matrix(["a"], [1.0], [[3.0]]).to_json(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["matrix.json"]


def test_the_markdown_table_starts_with_zero_shot_and_ends_with_the_mtil_lines():
    matrix = Matrix(["a", "b"], [1.0, 2.0], [[90.0, 30.04], [80.0, 70.0]])
    assert matrix.markdown() == (
        "| after | a | b | mean |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| zero-shot | 1.0 | 2.0 | 1.5 |\n"
        "| a | 90.0 | 30.0 | 60.0 |\n"
        "| b | 80.0 | 70.0 | 75.0 |\n"
        "| **Transfer** | n/a | 30.0 | 30.0 |\n"
        "| **Average** | 85.0 | 50.0 | 67.5 |\n"
        "| **Last** | 80.0 | 70.0 | 75.0 |\n"
    )
    assert "30.04" in matrix.markdown(precision=2)


def test_the_csv_holds_unrounded_cells_and_leaves_missing_ones_empty():
    matrix = Matrix(["a", "b,c"], [1.0, 2.0], [[1 / 3, 30.0], [None, 70.0]])
    assert matrix.csv() == 'after,a,"b,c"\nzero-shot,1.0,2.0\na,0.3333333333333333,30.0\n"b,c",,70.0\n'


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: Matrix([]),
            "a matrix needs at least one task and unique names, got []; name every task of the sequence once.",
        ),
        (
            lambda: Matrix(["a", "a"]),
            "a matrix needs at least one task and unique names, got ['a', 'a']; name every task of the sequence once.",
        ),
        (
            lambda: Matrix(["a"], None, [[1.0], [2.0]]),
            "a matrix of 1 tasks has 2 rows; give one row per trained task at most.",
        ),
        (
            lambda: Matrix(["a"], [1.0, 2.0]),
            "row 'zero-shot' has 2 cells for 1 tasks; give one score per task at most.",
        ),
        (
            lambda: Matrix(["a"], None, [[float("nan")]]),
            "row 'after a' has the score nan, which is not a finite number; give percents, or None.",
        ),
        (
            lambda: Matrix(["cats"]).set_cell(0, "cat", 1.0),
            "the matrix has no task 'cat'; did you mean 'cats'.",
        ),
        (
            lambda: Matrix(["a"]).set_cell(1, 0, 1.0),
            "the matrix has no task number 1; count from 0 to 0, in training order.",
        ),
    ],
)
def test_a_bad_matrix_is_refused_in_a_sentence(build, sentence):
    with pytest.raises(EvalError) as error:
        build()
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "there is no matrix file"),
        ("{", "is not a readable matrix file"),
        ("[1]", "is not a matrix file: it lacks the keys format, tasks, zero_shot and rows"),
        (
            '{"format": 9, "tasks": ["a"], "zero_shot": null, "rows": []}',
            "has matrix format 9, and this version reads format 1",
        ),
    ],
)
def test_a_file_that_is_no_matrix_is_refused_in_a_sentence(tmp_path, content, part):
    path = tmp_path / "matrix.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EvalError) as error:
        Matrix.from_json(path)
    assert part in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "matrix.json")
    with pytest.raises(EvalError, match="is a pipe"):
        Matrix.from_json(tmp_path / "matrix.json")


def test_scores_of_a_bound_are_all_in_its_one_row_whichever_task_they_are_measured_after():
    bound = Matrix(["a", "b"], of_bound=True)
    bound.set_cell(None, "a", 10.0)
    bound.set_cell("a", "a", 90.0)
    bound.set_cell("b", "b", 80.0)
    assert (bound.zero_shot, bound.rows) == ([10.0, None], [[None, None], [90.0, 80.0]])
    assert bound.scores_after("a") == bound.scores_after(1) == [90.0, 80.0]

    method = Matrix(["a", "b"], rows=[[90.0, 20.0], [85.0, 80.0]])
    assert method.scores_after("a") == [90.0, 20.0]
    with pytest.raises(EvalError, match="no task number 2"):
        method.scores_after(2)
