"""KeepLoRA with a part taken away, and over its thresholds."""

import json

import pytest
import yaml

from llava_keeplora import cli
from llava_keeplora.compare import compare, draw_ablation, load_ablation
from llava_keeplora.errors import ConfigError
from llava_keeplora.report.figures import LIGHT
from llava_keeplora.report.results import Trial
from llava_keeplora.report.sweep import draw_sweep
from llava_keeplora_eval import Matrix

LABELS = ["keeplora", "keeplora-without-weights", "keeplora-without-features", "keeplora-random-A"]


@pytest.fixture(scope="session")
def config_file(run_tree, tiny_tasks, tmp_path_factory):
    """A run's YAML: its KeepLoRA has a label and an option of its own."""
    path = tmp_path_factory.mktemp("ablation") / "run.yaml"
    methods = {"seq-lora": {}, "ours": {"method": "keeplora", "form": "literal"}}
    path.write_text(
        yaml.safe_dump(
            run_tree(path.parent / "run", tasks=[str(task) for task in tiny_tasks[:2]], methods=methods)
        )
    )
    return path


@pytest.fixture(scope="session")
def ablated(config_file, here):
    """An ablation over two ε_w, finished."""
    ablation = load_ablation(str(config_file), {"energy_weight": [0.6, 0.3], "energy_feature": []})
    with here():
        outcome = compare(ablation.table)
    return ablation, outcome


def method_of(ablation, label):
    (found,) = json.loads((ablation.table.output_dir / "I/seed-0" / label / "config.json").read_text())[
        "methods"
    ].values()
    return found


def test_every_part_is_taken_away_and_every_value_of_a_threshold_is_tried(ablated):
    ablation, outcome = ablated
    assert list(outcome.results["I"]) == [
        "zero-shot",
        *LABELS,
        "keeplora-energy-weight-0.6",
        "keeplora-energy-weight-0.3",
    ]
    options = {label: method_of(ablation, label)["options"] for label in LABELS}
    whole = options["keeplora"]
    assert whole["form"] == "literal" and ablation.table.output_dir.name == "run-ablation"
    changes = [
        {key: value for key, value in options[label].items() if value != whole[key]} for label in LABELS[1:]
    ]
    assert changes == [{"protect_weights": False}, {"protect_features": False}, {"init": "random"}]
    for value in (0.3, 0.6):
        parts = method_of(ablation, f"keeplora-energy-weight-{value}")["parts"]
        assert {(name, part["energy_weight"], part["energy_feature"]) for name, part in parts.items()} == {
            ("vision", value, 0.9),
            ("text", value, 0.9),
        }


def test_the_row_that_is_called_keeplora_is_ablated_and_of_several_others_none(config_file):
    rows = ["methods.first={method: keeplora, preset: balanced}", "methods.keeplora={}"]
    ablation = load_ablation(str(config_file), {"energy_weight": [0.6]}, overrides=rows)
    assert "preset" not in ablation.table.methods["keeplora"]
    with pytest.raises(ConfigError, match="several rows of the method keeplora .ours, first.; name the one"):
        load_ablation(str(config_file), {"energy_weight": [0.6]}, overrides=rows[:1])


def test_a_table_s_bounds_stay_beside_the_variants_and_are_lines_of_the_plot(config_file, here):
    overrides = ["methods.alone={method: individual}", "methods.joint={}"]
    with here():
        ablation = load_ablation(str(config_file), {"energy_weight": [0.6]}, overrides=overrides)
        longer = ["methods.joint.training.num_train_epochs=2", "other_budget=[joint]"]
        uneven = load_ablation(str(config_file), {"energy_weight": [0.6]}, overrides=[*overrides, *longer])
    assert list(ablation.table.methods)[:3] == ["alone", "joint", "keeplora"]
    assert ablation.bounds == ("alone", "joint")
    assert uneven.table.other_budget == ("joint",) and ablation.table.other_budget == ()
    swept = Matrix(["a", "b"], [10.0, 20.0], [[50.0, 30.0], [40.0, 60.0]])
    bound = Matrix(["a", "b"], [10.0, 20.0], [[None, None], [90.0, 80.0]])
    results = {"keeplora-energy-weight-0.6": [Trial(swept)], "joint": [Trial(bound)]}
    figure = draw_sweep(results, "keeplora", ablation.sweeps["energy_weight"], ablation.bounds, "ε_w", LIGHT)
    lines = [
        [line.get_ydata()[0] for line in axes.lines if line.get_label() == "joint"] for axes in figure.axes
    ]
    assert lines == [[], [], [85.0]]


def test_the_plot_shows_each_metric_over_the_threshold(ablated):
    ablation, outcome = ablated
    figure = draw_sweep(
        outcome.results["I"],
        "keeplora",
        ablation.sweeps["energy_weight"],
        ["zero-shot", "not there"],
        "ε_w",
        LIGHT,
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Transfer", "Average", "Last"]
    for axes, metric in zip(figure.axes, ("transfer", "average", "last")):
        line, level = axes.get_lines()
        matrices = [
            Matrix.from_json(ablation.table.output_dir / f"I/seed-0/{label}/{label}/matrix.json")
            for label in ("keeplora-energy-weight-0.3", "keeplora-energy-weight-0.6")
        ]
        assert list(line.get_xdata()) == [0.3, 0.6] and list(line.get_ydata()) == pytest.approx(
            [matrix.metrics()[metric] for matrix in matrices]
        )
        zero = matrices[0].zero_shot
        assert list(level.get_ydata()) == pytest.approx(
            [zero[1] if metric == "transfer" else sum(zero) / 2] * 2
        )


def test_the_images_lie_next_to_the_table_and_a_threshold_that_is_not_swept_has_none(ablated):
    ablation, outcome = ablated
    assert list(draw_ablation(ablation, outcome)) == ["energy-weight-I"]
    assert {"energy-weight-I.png", "energy-weight-I.svg"} == {
        path.name for path in ablation.table.output_dir.iterdir() if path.suffix in (".png", ".svg")
    }


def test_one_command_makes_the_table_and_the_plot(ablated, config_file, started, capfd):
    """Its runs are finished already."""
    assert (
        cli.main(
            [
                "ablate",
                "--config",
                str(config_file),
                "--energy-weights",
                "0.6,0.3",
                "--energy-features",
                "",
                "--seeds",
                "0",
            ]
        )
        == 0
    )
    out = capfd.readouterr().out
    assert (
        started == []
        and "| keeplora-random-A | " in out
        and "| keeplora-random-A | method=keeplora form=literal init=random |" in out
    )
    page = (ablated[0].table.output_dir / "report.html").read_text()
    assert page.count("<img ") == 1 and "dashed, what has none" in page


def test_a_part_that_is_trained_in_full_has_no_threshold(llava_tree, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(llava_tree(tmp_path / "run")))
    ablation = load_ablation(str(tmp_path / "run.yaml"), seeds=[3, 4], output_dir=str(tmp_path / "out"))
    assert ablation.table.orders[0].seeds == (3, 4) and ablation.table.output_dir == tmp_path / "out"
    assert list(ablation.sweeps["energy_weight"]) == [0.5, 0.6, 0.7, 0.8, 0.9] and list(
        ablation.sweeps["energy_feature"]
    ) == [0.9, 0.95, 0.99]
    assert ablation.table.methods["keeplora-energy-weight-0.5"] == {
        "method": "keeplora",
        "parts": {"vision": {"energy_weight": 0.5}, "language": {"energy_weight": 0.5}},
    }


def test_parts_that_the_method_alone_names_are_swept_and_wrong_ones_are_reported(run_tree, tmp_path):
    tree = run_tree(tmp_path / "run")
    own = {"method": "keeplora", "parts": tree.pop("parts")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tree, "methods": {"ours": own}}))
    ablation = load_ablation(str(tmp_path / "run.yaml"), {"energy_weight": [0.6, 0.3], "energy_feature": []})
    swept = [ablation.table.methods[label]["parts"] for label in ablation.sweeps["energy_weight"].values()]
    assert [{part: settings["energy_weight"] for part, settings in parts.items()} for parts in swept] == [
        dict.fromkeys(own["parts"], value) for value in (0.6, 0.3)
    ]
    for wrong in (["vision"], {"vision": 5}):
        (tmp_path / "run.yaml").write_text(
            yaml.safe_dump({**tree, "parts": wrong, "methods": {"keeplora": {}}})
        )
        with pytest.raises(ConfigError, match="parts"):
            load_ablation(str(tmp_path / "run.yaml"))


def test_thresholds_that_are_nearly_the_same_are_two_and_a_tuning_is_not_dropped_unsaid(run_tree, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree(tmp_path / "run")))
    swept = load_ablation(str(tmp_path / "run.yaml"), {"energy_weight": [0.5, 0.50000001]}).sweeps[
        "energy_weight"
    ]
    assert len(set(swept.values())) == 2
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(run_tree(tmp_path / "run", tuning={"settings": {"seq-lora": [], "keeplora": []}}))
    )
    with pytest.raises(ConfigError, match="has `tuning`, and an ablation tries no settings; add tuning=null"):
        load_ablation(str(tmp_path / "run.yaml"))
    assert load_ablation(str(tmp_path / "run.yaml"), overrides=["tuning=null"]).table.tuning is None


def test_without_keeplora_there_is_nothing_to_take_away(run_tree, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree(tmp_path / "run", methods={"seq-lora": {}})))
    with pytest.raises(ConfigError, match="has no method keeplora.*nothing to take away; add `keeplora: {}`"):
        load_ablation(str(tmp_path / "run.yaml"))


def test_a_plugin_with_the_options_of_keeplora_is_ablated_under_its_own_label(run_tree, tiny_tasks, tmp_path):
    (tmp_path / "ours.py").write_text(
        "from llava_keeplora.methods.keeplora import KeepLora\n\n\nclass Ours(KeepLora):\n    pass\n"
    )
    tree = run_tree(
        tmp_path / "run",
        tasks=[str(tiny_tasks[0])],
        methods={"seq-lora": {}, "mine": {"method": f"{tmp_path / 'ours.py'}:Ours"}},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    ablation = load_ablation(str(tmp_path / "run.yaml"), {"energy_weight": [0.6], "energy_feature": []})
    assert ablation.method == "mine"
    assert list(ablation.table.methods) == [
        "mine",
        "mine-without-weights",
        "mine-without-features",
        "mine-random-A",
        "mine-energy-weight-0.6",
    ]
    assert all(m["method"].endswith("ours.py:Ours") for m in ablation.table.methods.values())
