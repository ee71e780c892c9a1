"""Reports: plots that are there, a page that needs nothing else, tables that tell the truth."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from llava_keeplora.report import ReportError, Trial, heatmap, protected_fraction_plot, write_report
from llava_keeplora.report.figures import PNG_COLOURS
from llava_keeplora.report.heatmap import colour_limits, draw_heatmap
from llava_keeplora_eval import Matrix

DOCUMENTS = {"html", "json", "table", "latex", "summary", "scores"}


@pytest.fixture
def matrix():
    return Matrix(["a", "b"], [10.0, 20.0], [[90.0, 30.0], [80.0, 70.0]])


def layers(k, parts=("vision", "text"), width=8):
    return {f"{part}.layer.{i}": {"in": width, "k": k + i, "part": part} for part in parts for i in range(2)}


@pytest.fixture
def capacity():
    return [layers(1), layers(3), layers(5)]


class Page(HTMLParser):
    """What a browser would fetch, what it would show as text, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.references, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.references += [value for key, value in attributes if key in ("src", "srcset", "href", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_heatmap_is_written_as_png_and_svg(tmp_path, matrix):
    png, svg = heatmap(matrix, tmp_path / "map.png", "title")
    assert (png.name, svg.name) == ("map.png", "map.svg")
    picture = Image.open(png)
    assert (
        picture.width > 400
        and len(picture.getcolors()) <= PNG_COLOURS
        and picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    )
    assert svg.read_text().lstrip().startswith("<?xml")
    assert heatmap(matrix, tmp_path / "keeplora-v0.2")[0].name == "keeplora-v0.2.png"


def test_a_heatmap_names_every_task_and_every_score_with_zero_shot_on_top(matrix):
    axes = draw_heatmap(matrix, "title").axes[0]
    cells = sorted((text.get_position()[1], text.get_position()[0], text.get_text()) for text in axes.texts)
    assert [text for _, _, text in cells] == ["10.0", "20.0", "90.0", "30.0", "80.0", "70.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["zero-shot", "a", "b"]
    outlined = [patch.get_xy() for patch in axes.patches if not patch.get_fill()]
    assert outlined == [(0, 1.25), (1, 2.25)]


def test_a_heatmap_of_a_run_in_progress_marks_what_is_not_measured(matrix):
    axes = draw_heatmap(Matrix(["a", "b"], None, [[90.0, 30.0]])).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["-", "-", "30.0", "90.0"]
    draw_heatmap(Matrix(["a"]))


def test_colours_span_the_tens_around_the_scores():
    assert colour_limits([Matrix(["a"], [62.0], [[88.0]]), Matrix(["a"], None, [[95.0]])]) == (60, 100)
    assert colour_limits([Matrix(["a"], None, [[70.0]])]) == (70, 80)
    assert colour_limits([Matrix(["a"])]) == (0, 100)


def test_the_protected_fraction_is_drawn_per_part_and_layer_with_gaps(tmp_path, capacity):
    from llava_keeplora.report.capacity import draw_protected_fraction

    del capacity[1]["text.layer.1"]
    figure = draw_protected_fraction(capacity)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == ["vision (2 layers)", "text (2 layers)"]
    assert [line.get_ydata().tolist() for line in panels["vision (2 layers)"].lines] == [
        [1 / 8, 3 / 8, 5 / 8],
        [2 / 8, 4 / 8, 6 / 8],
    ]
    gap = panels["text (2 layers)"].lines[1].get_ydata()
    assert gap[0] == 2 / 8 and gap[1] != gap[1] and gap[2] == 6 / 8
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["weights", "task 1", "task 2"]
    png, svg = protected_fraction_plot(capacity, tmp_path / "capacity")
    assert png.exists() and svg.exists()


def test_layers_are_ordered_by_their_numbers_not_by_their_letters():
    from llava_keeplora.report.capacity import draw_protected_fraction

    names = ["m.10.fc1", "m.2.fc1", "m.2.attn", "m.1.fc1"]
    legend = (
        draw_protected_fraction([{name: {"in": 4, "k": 1, "part": "text"} for name in names}])
        .axes[0]
        .get_legend()
    )
    assert [text.get_text() for text in legend.get_texts()] == ["1.fc1", "2.attn", "2.fc1", "10.fc1"]


def test_many_layers_are_distinguished_by_colour_instead_of_names():
    from llava_keeplora.report.capacity import draw_protected_fraction

    many = {f"layer.{i}": {"in": 10, "k": 1, "part": "vision"} for i in range(9)}
    panel, bar = draw_protected_fraction([many]).axes
    assert panel.get_legend() is None and bar.get_ylabel() == "layer, first to last"


@pytest.mark.parametrize(
    ("stages", "names", "sentence"),
    [
        (
            [],
            None,
            "the capacity names no layer; leave the plot out, or run a method that protects directions.",
        ),
        (
            [{"l": {"in": 4, "k": 5, "part": "text"}}],
            None,
            "layer 'l' of stage 0 protects 5 of 4 directions; give 0 <= k <= in, and in above 0.",
        ),
        (
            [{"l": {"in": 4, "k": 1}}],
            None,
            "layer 'l' of stage 0 has the keys ['in', 'k']; give it 'in', 'k' and 'part'.",
        ),
        ([layers(1)], ["a", "b"], "1 stages of capacity have 2 names; give one name per stage."),
    ],
)
def test_a_capacity_that_is_not_one_is_refused_in_a_sentence(tmp_path, stages, names, sentence):
    with pytest.raises(ReportError) as error:
        protected_fraction_plot(stages, tmp_path / "c.png", names)
    assert str(error.value) == sentence
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_one_page_that_loads_nothing_else(tmp_path, matrix, capacity):
    settings = {"model": "https://example.org/<model>", "ranks": {"r": 4}, "note": '"quoted" & so'}
    results = {"keep<lora>": [Trial(matrix, capacity=capacity)], "seq": [Trial(matrix)]}
    paths = write_report(tmp_path / "out", "A & B", results, settings)
    assert set(paths) == DOCUMENTS | {
        "curves",
        "forgetting",
        "heatmap/keep<lora>",
        "heatmap/seq",
        "capacity/keep<lora>",
    }
    assert all(path.exists() for path in paths.values())
    text = paths["html"].read_text()
    page = Page(text)
    assert page.open == [] and len(page.references) == 5
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"url\(|@import|<script|<link", text)
    words = " ".join(page.words)
    for shown in ("A & B", "keep<lora>", "https://example.org/<model>", '{"r": 4}', '"quoted" & so'):
        assert shown in words
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_the_summary_starts_with_the_model_that_never_changes(tmp_path, matrix):
    table = write_report(tmp_path, "t", {"run": [Trial(matrix)]})["table"].read_text()
    assert table.startswith(
        "# t\n\n"
        "| run | Transfer | Average | Last | Forgetting | BWT |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| zero-shot | 20.0 | 15.0 | 15.0 | 0.0 | 0.0 |\n"
        "| run | 30.0 | 67.5 | 75.0 | 10.0 | -10.0 |\n"
    )
    assert matrix.markdown() in table


@pytest.mark.slow
def test_runs_with_other_zero_shot_scores_get_a_row_each(tmp_path, matrix):
    other = Matrix(["a", "b"], [20.0, 10.0], matrix.rows)
    table = write_report(tmp_path, "t", {"x": [Trial(matrix)], "y": [Trial(other)], "z": [Trial(matrix)]})[
        "table"
    ].read_text()
    assert re.findall(
        r"^\| (zero-shot[^|]*) \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", table, re.M
    ) == [
        "zero-shot (x)",
        "zero-shot (y)",
    ]


@pytest.mark.slow
def test_a_zero_shot_baseline_among_the_results_is_the_summarys_first_row_and_no_image(tmp_path, matrix):
    baseline = Matrix(matrix.tasks, matrix.zero_shot)
    paths = write_report(tmp_path, "t", {"zero-shot": [Trial(baseline)], "run": [Trial(matrix)]})
    assert set(paths) == DOCUMENTS | {"curves", "forgetting", "heatmap/run"}
    assert paths["table"].read_text().count("| zero-shot | 20.0 | 15.0 | 15.0 | 0.0 | 0.0 |") == 1
    assert Page(paths["html"].read_text()).words.count("zero-shot") == 2  # the summary and the run's numbers
    alone = write_report(tmp_path, "t", {"zero-shot": [Trial(baseline)]})
    assert "heatmap/zero-shot" in alone


def test_a_run_in_progress_and_a_single_task_are_reported_up_to_their_last_stage(tmp_path):
    half = Trial(Matrix(["a", "b"], None, [[90.0, 30.0]]), capacity=[layers(1), layers(2)])
    assert (
        "| half | 30.0 | n/a | n/a | n/a | n/a |"
        in write_report(tmp_path, "t", {"half": [half]})["table"].read_text()
    )
    one = Trial(Matrix(["a"], [5.0], [[9.0]]))
    assert (
        "| one | n/a | 9.0 | 9.0 | n/a | n/a |"
        in write_report(tmp_path, "t", {"one": [one]})["table"].read_text()
    )


@pytest.mark.slow
def test_labels_that_differ_in_signs_or_case_get_files_of_their_own(tmp_path):
    small = [Trial(Matrix(["a"], None, [[1.0]]))]
    paths = write_report(tmp_path, "t", {"a/b": small, "a b": small, "A.b": small, "a.B": small})
    files = {path.name.casefold() for name, path in paths.items() if name.startswith("heatmap")}
    assert len(files) == 4 and all(file.endswith(".png") for file in files)


def test_images_are_named_as_their_methods_are(tmp_path):
    small = [Trial(Matrix(["a"], None, [[1.0]]))]
    paths = write_report(tmp_path, "t", dict.fromkeys(("keeplora", "keeplora+", "keeplora++"), small))
    assert {path.stem for name, path in paths.items() if name.startswith("heatmap")} == {
        "heatmap-keeplora",
        "heatmap-keeplora+",
        "heatmap-keeplora++",
    }


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        ({}, "there are no results to report; give at least one matrix."),
        (
            {"a": [Trial(Matrix(["s", "t"]))], "b": [Trial(Matrix(["t", "s"]))]},
            "'a' and 'b' have different tasks (s, t against t, s); report them apart, because their scores mean different things.",
        ),
        (
            {"a": [Trial(Matrix(["t"]), capacity=[layers(1)] * 3)]},
            "a capacity of 3 stages belongs to a matrix of 1 tasks; "
            "give the stage of the weights, then one stage per task at most.",
        ),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_and_writes_nothing(tmp_path, results, sentence):
    with pytest.raises(ReportError) as error:
        write_report(tmp_path / "out", "t", results)
    assert str(error.value) == sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_drawing_leaves_pyplot_alone(tmp_path):
    program = (
        "import sys\n"
        "from llava_keeplora.report import heatmap\n"
        "from llava_keeplora_eval import Matrix\n"
        f"heatmap(Matrix(['a'], None, [[1.0]]), {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_scores_say_what_was_lost_to_style_and_how_many_images_were_dropped():
    from llava_keeplora.report.tables import SCORE_COLUMNS, score_rows

    def score(value, lenient, compliance, dropped=0):
        return dict(
            metric="exact_match",
            metric_version=1,
            score=value,
            lenient=lenient,
            compliance=compliance,
            n=50,
            dropped=dropped,
        )

    def flipped(stage):  # files keep their keys sorted, and the order of learning is another one
        return dict(reversed(stage.items()))

    base = {"a": score(10.0, 20.0, 30.0), "b": score(0.0, 0.0, 0.0)}
    first = {"a": score(90.0, 91.0, 99.0), "b": score(1.0, 2.0, 3.0)}
    second = {"a": score(40.0, 90.0, 44.0, dropped=2), "b": score(80.0, None, None)}
    rows = [
        dict(zip(("task", *SCORE_COLUMNS), row))
        for row in score_rows(["a", "b"], [flipped(base), flipped(first), flipped(second)])
    ]
    assert rows[0] == {
        "task": "a",
        "metric": "exact_match v1",
        "after learning it": "90.0",
        "at the end": "40.0",
        "lenient then": "91.0",
        "lenient now": "90.0",
        "compliance then": "99.0",
        "compliance now": "44.0",
        "n": "50",
        "dropped": "2",
    }
    assert (rows[1]["after learning it"], rows[1]["lenient now"]) == ("80.0", "n/a")
    # In the middle of a run the tasks not yet learned are as they are now.
    assert score_rows(["a", "b"], [base, first])[1][2:4] == ["1.0", "1.0"]


def test_bounds_are_a_group_after_zero_shot_and_before_the_methods_in_every_document(tmp_path, matrix):
    bound = Matrix(["a", "b"], [10.0, 20.0], [[None, None], [95.0, 85.0]])
    base = Matrix(["a", "b"], [10.0, 20.0], [])
    results = {"first": matrix, "joint": bound, "second": matrix, "zero-shot": base, "individual": bound}
    paths = write_report(tmp_path, "t", {name: [Trial(one)] for name, one in results.items()})
    order = ["zero-shot", "joint", "individual", "first", "second"]
    for kind, start in (
        ("table", r"^\| {} \|"),
        ("latex", r"^{} &"),
        ("summary", r"^{},"),
        ("html", r">{}</t[hd]>"),
    ):
        text = paths[kind].read_text()
        places = [re.search(start.format(name), text, re.M) for name in order]
        assert all(places), (kind, places)
        assert [found.start() for found in places] == sorted(found.start() for found in places), kind
    for kind in ("table", "latex"):
        assert (
            "Bounds, learned in no order and with Last alone: joint, individual." in paths[kind].read_text()
        )
    text = paths["json"].read_text()
    assert [text.index(f'"{name}"') for name in order] == sorted(text.index(f'"{name}"') for name in order)
