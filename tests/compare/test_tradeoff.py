"""Transfer against Last: the curves of the settings tried, what tuning for one alone gives, the plot."""

from types import SimpleNamespace

import pytest

from llava_keeplora.compare.run_table import TableResult, Tried
from llava_keeplora.compare.tradeoff import (
    GREY,
    TRADEOFF,
    curves,
    draw_rows,
    draw_tradeoff,
    extremes,
    joined,
    label_rows,
    method_looks,
    tradeoff_figure,
)
from llava_keeplora.report.figures import LIGHT, new_figure


def trial(label, transfer, last, chosen=False, **settings):
    return Tried(label, settings, {"transfer": transfer, "average": None, "last": last}, chosen)


def at_rate(label, rate, *scores, **options):
    return trial(label, *scores, training={"learning_rate": rate}, **options)


def row(last, transfer=None, spread=None):
    return {"last_mean": last, "last_sd": spread, "transfer_mean": transfer, "transfer_sd": spread}


@pytest.fixture
def tried():
    return [
        at_rate("seq-lora", 1e-3, 50.0, 40.0, chosen=True),
        at_rate("seq-lora", 4e-3, 30.0, 55.0),
        at_rate("seq-lora", 2e-3, 45.0, 35.0),
        trial("individual", None, 70.0, chosen=True),
    ]


def test_a_curve_runs_through_all_settings_in_the_order_of_their_number_and_bounds_have_none(tried):
    assert curves(tried) == {"seq-lora": [(40.0, 50.0), (35.0, 45.0), (55.0, 30.0)]}
    assert joined(tried, "seq-lora")


@pytest.mark.parametrize(
    "settings",
    [
        [{"rate": 1, "rank": 4}, {"rate": 2, "rank": 8}],  # two numbers
        [{"form": "delta"}, {"form": "literal"}],
        [{"rate": 1}, {"rank": 4}],
        [{"rate": 1}, {}],
        [{"rate": 1}, {"rate": 1}],
        [{"whole": True}, {"whole": False}],
    ],
)
def test_settings_that_do_not_differ_in_one_number_are_points_alone(settings):
    tried = [trial("keeplora", 50.0 - i, 40.0, **one) for i, one in enumerate(settings)]
    assert curves(tried) == {"keeplora": [(40.0, 50.0), (40.0, 49.0)]} and not joined(tried, "keeplora")
    (panel,) = tradeoff_figure(["keeplora"], tried, {}).axes
    assert [line.get_linestyle() for line in panel.lines] == ["None"]


def test_a_bound_whose_settings_were_tried_is_a_line_at_the_chosen_one_with_its_name(tried):
    (panel,) = tradeoff_figure(["seq-lora", "individual"], tried, {}).axes
    assert [line.get_xdata()[0] for line in panel.lines if line.get_label() == "_individual"] == [70.0]
    assert [text.get_text() for text in panel.texts] == ["individual"]


def test_zero_shot_is_a_point_of_the_settings_tried(tried):
    tried[0].metrics.update(zero_shot_transfer=48.0, zero_shot_average=33.0)
    (panel,) = tradeoff_figure(["seq-lora", "individual"], tried, {}).axes
    (line,) = (line for line in panel.lines if line.get_label() == "zero-shot")
    assert line.get_xydata().tolist() == [[33.0, 48.0]]


def test_methods_with_settings_have_colours_of_their_own_and_others_are_grey_with_their_name(tried):
    rows = {"zero-shot": row(33.0, 48.0), "seq-lora": row(40.0, 50.0, 1.0), "ewc": row(38.0, 41.0)}
    figure = tradeoff_figure(["seq-lora", "ewc"], tried, {"order 1": rows | {"joint": row(60.0)}})
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"seq-lora", "zero-shot"}
    names = {text.get_text(): text.get_color() for text in figure.axes[1].texts}
    assert names == {"joint": GREY, "ewc": GREY}
    looks = method_looks(["a", "b", "zero-shot", "c", "d", "e", "f"])
    assert len({look["color"] for look in looks.values()}) == 7


def test_a_curve_that_is_not_to_be_in_colour_is_grey_with_its_name_at_its_end(tried):
    tried += [at_rate("ewc", 1e-3, 48.0, 39.0), at_rate("ewc", 4e-3, 35.0, 45.0, chosen=True)]
    figure = tradeoff_figure(["seq-lora", "ewc", "individual"], tried, {}, coloured=["seq-lora"])
    (panel,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["seq-lora"]
    (line,) = (line for line in panel.lines if line.get_label() == "_ewc")
    assert line.get_color() == GREY and line.get_xydata().tolist() == [[39.0, 48.0], [45.0, 35.0]]
    (name,) = (text for text in panel.texts if text.get_text() == "ewc")
    assert name.get_color() == GREY and name.xy == (45.0, 35.0)


def test_no_name_covers_a_point_or_another_name_and_one_without_a_place_is_left_out():
    axes = new_figure((3, 3), LIGHT).subplots()
    rows = {f"method-{i}": row(50.0 + i / 100, 50.0) for i in range(30)} | {"joint": row(50.1)}
    draw_rows(axes, rows, {})
    label_rows(axes, rows, dict.fromkeys(rows, GREY))
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text() != "joint"}
    assert 2 < len(boxes) < 30
    points = axes.transData.transform([(one["last_mean"], 50.0) for one in rows.values()])
    for name, box in boxes.items():
        assert not box.count_overlaps([other for label, other in boxes.items() if label != name])
        assert not any(box.contains(*point) for point in points)


def test_tuned_for_one_alone_is_the_setting_with_the_largest_of_it(tried):
    best = extremes(tried, "seq-lora")
    assert best == {"transfer": tried[0], "last": tried[1]} and extremes(tried, "individual") is None


def test_the_plot_is_written_as_png_and_svg_and_not_at_all_without_transfer(tried, tmp_path):
    table = SimpleNamespace(output_dir=tmp_path, methods={"seq-lora": {}, "individual": {}})
    assert not draw_tradeoff(table, TableResult({}, tried[3:], {}, [])) and not list(tmp_path.iterdir())
    images = draw_tradeoff(table, TableResult({}, tried, {}, []))
    assert images[TRADEOFF].png == (tmp_path / f"{TRADEOFF}.png").read_bytes()
    assert "seq-lora" in (tmp_path / f"{TRADEOFF}.svg").read_text()
