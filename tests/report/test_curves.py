"""The plots of several methods draw the numbers of the matrices, the Trainer's log and the journal."""

import pytest

from llava_keeplora.methods import METHODS
from llava_keeplora.report import Cost, Trial
from llava_keeplora.report.cost import cost_rows, draw_costs
from llava_keeplora.report.curves import draw_curves, draw_forgetting, draw_losses
from llava_keeplora.report.figures import LIGHT, fill, style
from llava_keeplora.report.results import mean_lines, spread
from llava_keeplora_eval import Matrix

TASKS = ["a", "b", "c"]
ONE = Matrix(TASKS, [10.0, 20.0, 30.0], [[90.0, 25.0, 30.0], [70.0, 80.0, 35.0], [60.0, 50.0, 85.0]])
OTHER = Matrix(TASKS, [10.0, 20.0, 30.0], [[80.0, 25.0, 30.0], [80.0, 80.0, 35.0], [70.0, 60.0, 95.0]])
BASELINE = Matrix(TASKS, [10.0, 20.0, 30.0])


@pytest.fixture
def results():
    return {"zero-shot": [Trial(BASELINE)], "lora": [Trial(ONE), Trial(OTHER)]}


def line_of(axes, name):
    (line,) = [line for line in axes.lines if line.get_label() == name]
    return dict(zip(line.get_xdata(), line.get_ydata()))


def test_a_panel_per_task_shows_means_over_seeds_and_the_level_line_of_the_untouched_model(results):
    panels = draw_curves(results, LIGHT).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["1 a", "2 b", "3 c"]
    assert line_of(panels[0], "lora") == {0: 10.0, 1: 85.0, 2: 75.0, 3: 65.0}
    assert line_of(panels[1], "zero-shot") == dict.fromkeys(range(4), 20.0)
    assert len({axes.get_ylim() for axes in panels}) == 1, "one scale, so that heights mean the same"
    (band,) = list(panels[0].collections)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(85 + 50**0.5), (
        "the sample deviation of 80 and 90"
    )


@pytest.mark.filterwarnings("error")
def test_panels_are_as_large_with_the_names_of_30_methods_above_them_as_with_one():
    def height(methods):
        figure = draw_curves(
            {f"a method {i}": [Trial(Matrix(["a"], [1.0], [[2.0]]))] for i in range(methods)}, LIGHT
        )
        figure.draw_without_rendering()
        return figure.axes[0].get_window_extent().height

    assert height(30) == pytest.approx(height(1), rel=0.02)


def test_all_methods_of_the_package_differ_from_each_other_in_lines_and_bars():
    looks = [style(position) for position in range(len(list(METHODS)))]
    bars = [fill(position, LIGHT) for position in range(len(looks))]
    assert len({str(look) for look in looks}) == len({str(bar) for bar in bars}) == len(looks) > 20


def test_forgetting_ends_at_the_metric_and_shows_each_tasks_share(results):
    over, by = draw_forgetting(results, LIGHT).axes
    expected = (ONE.metrics()["forgetting"] + OTHER.metrics()["forgetting"]) / 2
    assert line_of(over, "lora") == {2: 10.0, 3: pytest.approx(expected)}
    assert [bar.get_width() for bar in by.patches] == [20.0, 25.0]
    assert [label.get_text() for label in by.get_yticklabels()] == ["a", "b"]


def test_forgetting_in_the_middle_of_a_run_is_that_so_far_and_before_the_second_task_there_is_none():
    _, by = draw_forgetting({"lora": [Trial(Matrix(TASKS, None, ONE.rows[:2]))]}, LIGHT).axes
    assert [bar.get_width() for bar in by.patches] == [20.0]
    assert draw_forgetting({"lora": [Trial(Matrix(TASKS, None, ONE.rows[:1]))]}, LIGHT) is None


def test_losses_are_means_at_the_steps_that_all_seeds_logged():
    trials = [Trial(ONE, losses={"a": [(10, 2.0), (20, 1.0)]}), Trial(OTHER, losses={"a": [(10, 4.0)]})]
    panels = draw_losses({"zero-shot": [Trial(BASELINE)], "lora": trials}, LIGHT).axes
    assert line_of(panels[0], "lora") == {10: 3.0} and len(panels[1].lines) == 0
    assert all(tick == int(tick) for tick in panels[0].get_xticks()) and panels[0].get_xlim()[0] == 0, (
        "steps are whole"
    )
    assert draw_losses({"lora": [Trial(ONE)]}, LIGHT) is None


def test_costs_are_bars_in_seconds_and_gib_and_memory_not_measured_has_no_panel():
    costs = {"EVALUATED": Cost(30.0, 2**30, "gpu"), "TRAINED": Cost(60.0, 2**31, "gpu")}
    time, memory = draw_costs({"lora": [Trial(ONE, costs=costs)]}, LIGHT).axes
    assert [bar.get_width() for bar in time.patches if bar.get_width() == bar.get_width()] == [60.0, 30.0]
    assert [bar.get_width() for bar in memory.patches if bar.get_width() == bar.get_width()] == [2.0, 1.0]
    assert (time.get_xlabel(), memory.get_xlabel()) == (
        "time, all tasks together (s)",
        "highest peak of memory (GiB)",
    )
    assert len(draw_costs({"lora": [Trial(ONE, costs={"TRAINED": Cost(60.0)})]}, LIGHT).axes) == 1
    assert draw_costs({"lora": [Trial(ONE)]}, LIGHT) is None
    assert cost_rows([Trial(ONE, costs=costs)]) == [
        ["train", "60.0", "2048", "gpu"],
        ["score every task", "30.0", "1024", "gpu"],
    ]


def test_more_methods_than_colours_are_distinguished_by_their_lines_and_bars():
    many = {f"m{i}": [Trial(ONE)] for i in range(8)}
    over, by = draw_forgetting(many, LIGHT).axes
    lines = [line for line in over.lines if line.get_label().startswith("m")]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 8
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in by.patches}) == 8


def test_long_names_stay_in_their_panels():
    names = [f"a-task-with-an-unusually-long-name-{i}" for i in range(8)]
    figure = draw_curves({"lora": [Trial(Matrix(names, [1.0] * 8, [[1.0] * 8] * 8))]}, LIGHT)
    figure.draw_without_rendering()
    titles = [axes._left_title.get_window_extent() for axes in figure.axes]
    assert not any(one.overlaps(other) for i, one in enumerate(titles) for other in titles[:i])


def test_means_over_seeds_say_nothing_where_a_seed_is_missing():
    assert (
        spread([1.0, 2.0, 4.5]) == "2.5 ± 1.8"
        and spread([1.0]) == "1.0"
        and spread([1.0, None]) == "n/a"
        and spread([3.0, 3.0]) == "3.0"
    )
    assert mean_lines([{"text": {"l": [0.0, 1.0], "only": [1.0]}}, {"text": {"l": [1.0]}}]) == {
        "text": {"l": [0.5]}
    }


def test_a_single_logged_loss_of_a_bound_is_a_point_and_its_scores_stay_a_line():
    bound = Matrix(["a", "b"], [10.0, 20.0], [[None, None], [50.0, 60.0]])
    trials = {"joint": [Trial(bound, losses={"b": [(10, 2.0)]})]}
    (point,) = draw_losses(trials, LIGHT).axes[1].lines
    assert point.get_markersize() == 3 and list(point.get_ydata()) == [2.0]
    level = draw_curves(trials, LIGHT).axes[0].lines[0]
    assert level.get_markersize() == 0 and set(level.get_ydata()) == {50.0}
