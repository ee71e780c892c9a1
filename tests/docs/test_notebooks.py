"""docs/notebooks: committed with the outputs of their cells, which run."""

import contextlib
import gc
import re
import warnings
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "docs/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows, by the kind of the output; numbers may differ."""
    return [sorted(output.get("data", [output.get("name")])) for output in cell.outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_has_run_in_order_and_shows_no_warning_and_no_path(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert {"image/png", "text/html"} <= {kind for output in outputs for kind in output.get("data", [])}
    assert not re.search(r"site-packages|/(home|root|tmp|work|Users)/", path.read_text())


def test_the_cells_of_the_text_model_run(monkeypatch):
    """With two steps of a few examples; as they are in the slow test."""
    monkeypatch.setattr(
        "llava_keeplora.memory.matrix_callback.write_report", lambda *arguments, **keywords: None
    )
    for name in (
        "logging.disable",
        "datasets.disable_progress_bars",
        "transformers.utils.logging.set_verbosity_error",
    ):
        monkeypatch.setattr(name, lambda *arguments: None)  # What the cells silence is other tests' too.
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    names = {}
    shorter = {
        "STEPS, BATCH_SIZE = 80, 32": "STEPS, BATCH_SIZE = 2, 4",
        "task, 960, ": "task, 8, ",
        "task, 100, ": "task, 4, ",
    }
    sources = [cell.source for cell in code_cells(read(FOLDER / "text.ipynb"))]
    imports, *sources = [source for source in sources if not source.startswith("Image(")]
    source = "\n".join(sources)
    for long, short in shorter.items():
        assert long in imports + source
        imports, source = imports.replace(long, short), source.replace(long, short)
    with contextlib.chdir(FOLDER), warnings.catch_warnings():
        exec(imports, names)
        gc.freeze()  # A Trainer collects garbage at its start; without the libraries' objects that is quick.
        exec(source, names)
    assert len(names["memory"].tasks) == 3
    matrices = names["matrices"]
    assert set(matrices) == {"lora", "keeplora"} and all(matrix.complete for matrix in matrices.values())


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_kernel_runs_every_cell_and_shows_what_is_committed(path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed, notebook = read(path), read(path)
    for cell in code_cells(notebook):
        cell.outputs = []
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    for cell, expected in zip(code_cells(notebook), code_cells(committed), strict=True):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        assert kinds(cell) == kinds(expected), cell.source
