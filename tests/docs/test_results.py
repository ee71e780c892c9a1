"""The numbers of README, docs/results.md and docs/results-tried.md are those of the result files in docs/results."""

import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest

from llava_keeplora.compare import load_table
from llava_keeplora.compare.jobs import table_jobs
from llava_keeplora.config import make_method, parse_config

ROOT = Path(__file__).parents[2]
RUNS = json.loads((ROOT / "docs/results/table-learned.json").read_text())
FAST = json.loads((ROOT / "docs/results/table-learned-fast.json").read_text())
GUARD = json.loads((ROOT / "docs/results/table-guard.json").read_text())
TRIED = json.loads((ROOT / "docs/results/table-learned-tried.json").read_text())
LLAVA_HALF = json.loads((ROOT / "docs/results/table-learned-llava-400.json").read_text())
LLAVA_TRIED = json.loads((ROOT / "docs/results/table-learned-llava-tried.json").read_text())
LLAVA_RUNS = json.loads((ROOT / "docs/results/table-learned-llava.json").read_text())
ABLATIONS = json.loads((ROOT / "docs/results/table-learned-ablations.json").read_text())
VARIANTS = json.loads((ROOT / "docs/results/table-learned-variants.json").read_text())
SEARCHED = json.loads((ROOT / "docs/results/table-learned-llava-search.json").read_text())
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()
RESULTS_TRIED = (ROOT / "docs/results-tried.md").read_text()
LEARNED, LLAVA = (
    RESULTS.split(f"\n## {family} where tasks are learned\n")[1].split("\n## ")[0]
    for family in ("CLIP", "LLaVA")
)
#: Rows that are no methods of the plot: variants of methods, and one seed in another precision.
UNDRAWN = {
    "unprotected",
    "keeplora in fp32",
    "keeplora, random A",
    "keeplora, SplitLoRA's rule",
    "merge, ties",
    "merge, wise-ft",
    "merge, condu",
    "eblora, distillation 3",
    "eblora, distillation 10",
    "balanced, random A",
    "balanced, interpolation 0.5",
    "task-lora-balanced, λ 10",
    "task-lora-balanced, given task",
}
NAMES = {"Transfer": "transfer", "Average": "average", "Last": "last", "Forgetting": "forgetting"}


def tables(text):
    """Header and rows of every Markdown table, as lists of cells."""
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        header, _, *rows = (
            [cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()
        )
        yield header, rows


def shown(numbers, name):
    """A mean over seeds as the documentation prints it."""
    mean, deviation = numbers[f"{name}_mean"], numbers[f"{name}_sd"]
    if mean is None:
        return "n/a"
    return f"{mean:.1f}" if deviation is None or numbers["n"] == 1 else f"{mean:.1f} ± {deviation:.1f}"


@pytest.mark.parametrize("text", [README, LEARNED, LLAVA], ids=["README", "CLIP", "LLaVA"])
def test_the_tables_of_the_learned_regime_are_those_of_the_result_file(text):
    files = {"method": RUNS["I"], "order 1 at 2e-3": FAST["I"], "order 2 at 2e-3": FAST["II"]}
    files |= {"order I at 2e-3": LLAVA_RUNS["I"], "order I, 400 images": LLAVA_HALF["I"]}
    files["order I, tuned by Average"] = LLAVA_RUNS["I"] | LLAVA_RUNS["tuned"]
    found = [(header, rows) for header, rows in tables(text) if header[0] in files and header[-1] == "n"]
    assert found
    for header, rows in found:
        for label, *cells in rows:
            # The README has rows of both rates in one table.
            label, _, rate = label.partition(" at ")
            numbers = (FAST["I"] if rate == "2e-3" else files[header[0]])[label]
            expected = [shown(numbers, NAMES[column]) for column in header[1:-1]]
            assert cells == [*expected, str(numbers["n"])], label


def test_the_ablations_are_those_of_the_result_file_and_its_means_those_of_its_runs():
    (rows,) = [rows for header, rows in tables(LEARNED) if header[0].startswith("ablation")]
    assert [row[0] for row in rows] == ["keeplora", "keeplora in fp32", *ABLATIONS]
    for label, *cells, n in rows:
        numbers = ABLATIONS.get(label) or FAST["I"][label]
        assert (cells, n) == ([shown(numbers, name) for name in NAMES.values()], str(numbers["n"])), label
    for numbers in ABLATIONS.values():
        assert len({run["seed"] for run in numbers["runs"]}) == numbers["n"]
        for name in NAMES.values():
            values = [run[name] for run in numbers["runs"]]
            assert numbers[f"{name}_mean"] == pytest.approx(statistics.mean(values))
            if len(values) > 1:
                assert numbers[f"{name}_sd"] == pytest.approx(statistics.stdev(values))


@pytest.mark.parametrize(
    ("text", "settings"), [(LEARNED, TRIED), (LLAVA, LLAVA_TRIED)], ids=["CLIP", "LLaVA"]
)
def test_the_curves_are_those_of_the_settings_tried(text, settings):
    header, rows = next((header, rows) for header, rows in tables(text) if header[0] == "tuned by Average")
    tried = {
        (one["label"], one["settings"]["training"]["learning_rate"]): one
        for one in settings
        if "training" in one["settings"]
    }
    assert {(row[0], float(rate)) for row in rows for rate in header[1:]} == set(tried)
    for label, *cells in rows:
        for rate, cell in zip(header[1:], cells, strict=True):
            metrics, mark = tried[label, float(rate)]["metrics"], "**" * tried[label, float(rate)]["chosen"]
            scores = ", ".join(f"{metrics[name]:.1f}" for name in ("transfer", "average", "last"))
            assert cell == f"{mark}{scores}{mark}", (label, rate)


def test_the_weights_of_the_balanced_rows_are_those_of_the_settings_tried():
    header, rows = next((header, rows) for header, rows in tables(LEARNED) if header[0] == "distillation")
    assert header[1:] == ["balanced", "task-lora-balanced"]
    table = load_table("table-learned")
    for column, label in enumerate(header[1:], start=1):
        tried = {one["settings"]["distillation"]: one for one in TRIED if one["label"] == label}
        assert [int(row[0]) for row in rows] == sorted(tried)
        for row in rows:
            metrics, mark = tried[int(row[0])]["metrics"], "**" * tried[int(row[0])]["chosen"]
            scores = ", ".join(f"{metrics[name]:.1f}" for name in ("transfer", "average", "last"))
            assert row[column] == f"{mark}{scores}{mark}", (label, row)
        row = parse_config(table_jobs(table, {label: table.methods[label]})["I"][0].tree).methods[label]
        assert make_method(row).distillation == next(w for w, one in tried.items() if one["chosen"])


@pytest.fixture(scope="module")
def drawing():
    """The script that draws the plots."""
    spec = importlib.util.spec_from_file_location("draw_results", ROOT / "scripts/draw_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_in(axes):
    return {text.get_text() for text in axes.texts}


def panels(figure, methods, settings):
    """Check legend and first panel of a plot, and return the names in its legend and the other two panels."""
    (legend,) = figure.legends
    coloured = {text.get_text() for text in legend.get_texts()}
    assert coloured == {"zero-shot", *methods}
    tried, tuned, other = figure.axes
    drawn = {line.get_label().removeprefix("_") for line in tried.lines}
    assert drawn >= {one["label"] for one in settings} and names_in(tried) <= drawn - coloured
    return coloured, tuned, other


def test_the_plot_of_the_results_has_every_method_of_the_result_files(drawing):
    coloured, tuned, fast = panels(drawing.tradeoff(), drawing.COLOURED, TRIED)
    assert names_in(tuned) | coloured >= set(RUNS["I"])
    assert names_in(fast) == set(FAST["I"]) - UNDRAWN - coloured


def test_the_plot_of_llava_has_every_method_of_its_result_files(drawing):
    coloured, tuned, half = panels(drawing.llava_tradeoff(), drawing.LLAVA_COLOURED, LLAVA_TRIED)
    assert names_in(tuned) | coloured >= {*LLAVA_RUNS["I"], *LLAVA_RUNS["tuned"]}
    assert names_in(half) == set(LLAVA_HALF["I"]) - {"keeplora++, rejection"} - coloured


def test_the_plot_of_the_readme_names_every_method_of_the_result_files_at_its_point(drawing):
    (axes,) = drawing.readme_tradeoff().axes
    assert names_in(axes) == set(FAST["I"]) - UNDRAWN | {"better"}
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    named = {name for name, colour in colours.items() if colour != drawing.GREY}
    assert named == {"zero-shot", "better", *drawing.COLOURED}


def test_the_variants_tried_are_those_of_the_result_file():
    header, rows = next((header, rows) for header, rows in tables(RESULTS_TRIED))
    names = [name.lower() for name in header[1:]]
    assert names == ["transfer", "average", "last"]
    zero_shot, keeplora, *variants = rows
    assert variants == [[one["settings"], *(f"{one[name]:.1f}" for name in names)] for one in VARIANTS]
    (fast,) = [
        one["metrics"]
        for one in TRIED
        if one["label"] == "keeplora" and one["settings"]["training"]["learning_rate"] == 2e-3
    ]
    untouched = [fast["zero_shot_transfer"], *[fast["zero_shot_average"]] * 2]
    assert zero_shot == ["zero-shot", *(f"{score:.1f}" for score in untouched)]
    assert keeplora == ["KeepLoRA at 2e-3", *(f"{fast[name]:.1f}" for name in names)]
    (balanced,) = [one for one in TRIED if one["label"] == "balanced" and one["chosen"]]
    (same,) = [one for one in VARIANTS if one["settings"] == "`distillation: 10`"]
    assert [round(balanced["metrics"][name], 1) for name in names] == [same[name] for name in names]


def test_the_table_under_the_guard_is_that_of_the_result_file():
    (rows,) = [rows for header, rows in tables(LEARNED) if header[0] == "under the guard"]
    assert [row[0] for row in rows] == list(GUARD)
    for label, ships, whole, *scores, n in rows:
        runs = GUARD[label]
        assert (ships, whole) == tuple(", ".join(str(run[key]) for run in runs) for key in ("ships", "whole"))
        for cell, key in zip(scores, ("transfer", "last", "forgetting"), strict=True):
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            assert cell == f"{statistics.mean(values):.1f}{spread}", (label, key)
        assert int(n) == len(runs)


def test_the_table_of_the_tasks_searched_is_that_of_the_result_file():
    header, rows = next((header, rows) for header, rows in tables(LLAVA) if header[0] == "task")
    kinds = {"classification": "classes", "vqa": "questions", "captioning": "captions"}
    assert {row[0] for row in rows} == set(SEARCHED)
    for task, kind, held_out, *scores in rows:
        numbers = SEARCHED[task]
        assert (kind, held_out) == (kinds[numbers["kind"]], str(numbers["held_out"]))
        assert scores == [f"{numbers[key]:.1f}" if key in numbers else "" for key in header[3:]], task


def test_individual_training_gains_ten_points_on_every_task_of_the_learned_llava_table():
    for task in load_table("table-learned-llava").order("I").tasks["tasks"]:
        assert SEARCHED[task]["8 epochs"] - SEARCHED[task]["zero-shot"] >= 10, task
