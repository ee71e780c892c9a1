"""docs/compare.md runs as it stands, on tiny tasks; the commands of the pages of results are tables."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from first_methods import first_of
from llava_keeplora import cli
from llava_keeplora.cli.tables import run_ablate
from llava_keeplora.compare import load_ablation, load_table
from llava_keeplora.compare.jobs import table_jobs, tuning_jobs
from llava_keeplora.config import parse_config, read_config
from llava_keeplora.methods import METHODS

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "compare.md").read_text()
#: What makes the table small enough for a test: one seed, one tiny task an order.
SMALLER = {
    "[0, 1, 2]": "[0]",
    "[birds.yaml, digits, textures]": "[colours.yaml]",
    "[textures, digits, birds.yaml]": "[corners.yaml]",
}


@pytest.fixture
def folder(run_tree, tiny_tasks, tmp_path, monkeypatch):
    """A working directory with the page's table and a run's configuration."""
    shutil.copytree(tiny_tasks[0].parent, tmp_path, dirs_exist_ok=True)
    (block,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.M | re.S)
    for shown, small in SMALLER.items():
        assert block.count(shown) == 1
        block = block.replace(shown, small)
    (tmp_path / "table.yaml").write_text(block)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree("runs/birds", tasks=["colours.yaml"])))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_runs_and_leaves_what_the_page_says(folder, started, capfd):
    commands = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.M | re.S)
        for line in block.splitlines()
    ]
    assert len(commands) == 2
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, capfd.readouterr().err
    out = folder / "runs/table"
    assert all(
        (out / name).is_file()
        for name in (
            "table.md",
            "table.tex",
            "table.csv",
            "report.html",
            "I/seed-0/keeplora/config.json",
            "tuning/keeplora-1/config.json",
        )
    )
    assert (out / "base-cache").is_dir() and len(started) == 4 + 4 + 7
    assert (folder / "runs/birds-ablation/energy-weight-I.svg").is_file()


def test_the_commands_of_the_results_are_tables_whose_runs_are_valid():
    pages = [
        (DOCS / f"{name}.md").read_text() for name in ("results", "results-tried", "results-published-regime")
    ]
    commands = re.findall(r"^    llava-keeplora (.*)$", "\n".join(pages), re.M)
    assert len(commands) == 31
    counts = []
    for command in commands:
        args = cli.parse_arguments(cli.build_parser(), shlex.split(command))
        if args.run is run_ablate:
            thresholds = {"energy_weight": args.energy_weights, "energy_feature": args.energy_features}
            table = load_ablation(
                args.config, thresholds, args.seeds, args.overrides, args.data_root, args.output_dir
            ).table
        else:
            table = load_table(args.config, args.overrides, args.data_root, args.output_dir)
        jobs = [job for made in table_jobs(table, table.methods).values() for job in made]
        assert parse_config(jobs[-1].tree).data.root == "DATA"
        counts.append(len(jobs))
    assert counts == [
        23 * 4,
        26 * 6,
        23 * 5,
        23 + 4,
        23 + 5,
        23 * 6,
        23 + 1,
        12 * 3,
        24 * 3,
        2 * 3,
        2 * 3,
        20,
        20,
        20,
        20,
        20 + 2,
        20,
        20 + 1,
        23 + 6,
        23,
        2 * 3 * 2,
        4 * 2,
        4 * 3,
        10 * 3 + 10,
        8,
        8 * 3,
        2 * 3,
        7 * 3,
        4,
        4 * 3,
        6 * 3,
    ]


@pytest.mark.parametrize(
    ("name", "family", "counts"),
    [
        ("table-real", "clip", {"I": 30, "II": 10, "small": 0}),
        ("table-real-llava", "llava", {"I": 18, "small": 0}),
    ],
)
def test_the_real_tables_try_four_settings_of_every_first_method_of_their_family(name, family, counts):
    table = load_table(name)
    tried = tuning_jobs(table)
    assert set(tried) == first_of(family)
    assert {len(jobs) for jobs in tried.values()} == {4}
    for jobs in tried.values():
        assert len({job.identity["methods"][job.label].__repr__() for job in jobs}) == 4, (
            "four different settings"
        )
    final = table_jobs(table, table.methods)
    assert {order: len(jobs) for order, jobs in final.items()} == counts
    base = parse_config(read_config(name.replace("table-", "")))
    assert (
        parse_config(final["I"][0].tree).parts == base.parts
        and parse_config(final["I"][0].tree).tasks == base.tasks
    )
    assert all(set(parse_config(job.tree).tasks) < set(base.tasks) for jobs in tried.values() for job in jobs)


@pytest.mark.parametrize(
    ("name", "family", "left_out"),
    [
        ("table-learned", "clip", {"zscl", "moe-adapters", "iap"}),  # without adapters of the same rank
        ("table-learned-llava", "llava", set()),
    ],
)
def test_the_learned_tables_tune_every_method_of_their_family_alike_and_never_the_bounds(
    name, family, left_out
):
    table = load_table(name)
    methods = {label for label, method in METHODS.items() if family in method.info.families}
    weights = {"balanced": "distillation", "task-lora-balanced": "distillation"}
    presets = weights | {"balanced-rejection": "rejection"} if family == "clip" else {}
    variants = {*presets, "task-lora-rejection"}
    assert set(table.methods) == methods - left_out - {"zero-shot"} | variants
    settings = {
        label: [parse_config(job.tree).methods[label] for job in jobs]
        for label, jobs in tuning_jobs(table).items()
    }
    for label, option in presets.items():
        assert len({one.options[option] for one in settings.pop(label)}) == 3
    tried = {
        label: tuple(one.training["learning_rate"] for one in of_label)
        for label, of_label in settings.items()
    }
    assert {label for label, rates in tried.items() if not rates} == {"individual", "joint"}
    (rates,) = set(tried.values()) - {()}
    assert len(set(rates)) == 3
    assert set(table.tuning_order.tasks["tasks"]) < set(
        parse_config(table_jobs(table, table.methods)["I"][0].tree).tasks
    )
