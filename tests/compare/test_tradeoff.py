"""Transfer against Last: the curves of the settings tried, what tuning for one alone gives, the plot."""

from types import SimpleNamespace

import pytest

from llava_keeplora.compare.run_table import TableResult, Tried
from llava_keeplora.compare.tradeoff import TRADEOFF, curves, draw_tradeoff, extremes, tradeoff_figure


def trial(label, transfer, last, chosen=False):
    return Tried(label, {}, {"transfer": transfer, "average": None, "last": last}, chosen)


@pytest.fixture
def tried():
    return [
        trial("seq-lora", 50.0, 40.0, chosen=True),
        trial("seq-lora", 30.0, 55.0),
        trial("seq-lora", 45.0, 50.0),
        trial("individual", None, 70.0, chosen=True),
    ]


def test_a_curve_runs_through_all_settings_in_order_of_last_and_bounds_have_none(tried):
    assert curves(tried) == {"seq-lora": [(40.0, 50.0), (50.0, 45.0), (55.0, 30.0)]}


def test_a_bound_whose_settings_were_tried_is_a_line_at_the_chosen_one(tried):
    (panel,) = tradeoff_figure(["seq-lora", "individual"], tried, {}).axes
    assert [line.get_xdata()[0] for line in panel.lines if line.get_label() == "individual"] == [70.0]


def test_tuned_for_one_alone_is_the_setting_with_the_largest_of_it(tried):
    best = extremes(tried, "seq-lora")
    assert best == {"transfer": tried[0], "last": tried[1]} and extremes(tried, "individual") is None


def test_the_plot_is_written_as_png_and_svg_and_not_at_all_without_transfer(tried, tmp_path):
    table = SimpleNamespace(output_dir=tmp_path, methods={"seq-lora": {}, "individual": {}})
    assert not draw_tradeoff(table, TableResult({}, tried[3:], {}, [])) and not list(tmp_path.iterdir())
    images = draw_tradeoff(table, TableResult({}, tried, {}, []))
    assert images[TRADEOFF].png == (tmp_path / f"{TRADEOFF}.png").read_bytes()
    assert "seq-lora" in (tmp_path / f"{TRADEOFF}.svg").read_text()
