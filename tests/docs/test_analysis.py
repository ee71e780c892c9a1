"""docs/analysis.md: its commands run, its files are those that are written, and its rule is the code's."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from llava_keeplora import cli
from llava_keeplora.analysis import ENERGIES, choose_energy, svd_split
from llava_keeplora.config import AUTO_LIMITS, PartConfig
from llava_keeplora.sequence import auto_energy

TEXT = (Path(__file__).parents[2] / "docs/analysis.md").read_text()
#: What makes a command small enough for a test.
SMALLER = {"tiny-clip": ["--examples", "4", "--energies", "0.5"], "runs/birds": []}


@pytest.fixture
def folder(run_config, tiny_tasks, tmp_path, monkeypatch):
    """A working directory with a run on two tasks."""
    from llava_keeplora.sequence import runner

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_run_report", lambda root: None)
        runner.run(
            run_config("runs/birds", methods={"keeplora": {}}, tasks=[str(path) for path in tiny_tasks[:2]])
        )
    return tmp_path


@pytest.mark.usefixtures("undrawn")
def test_every_command_runs_and_writes_the_files_that_are_listed(folder, capfd):
    commands = [
        shlex.split(line)
        for block in re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.M | re.S)
        for line in block.splitlines()
    ]
    assert len(commands) == 2
    for command in commands:
        assert cli.main([*command[1:], *SMALLER[command[2]]]) == 0, capfd.readouterr().err
    stems = {name.replace("METHOD", "keeplora") for name in re.findall(r"^\| `([\w.-]+)`", TEXT, flags=re.M)}
    written = {path.name for place in ("knowledge", "updates") for path in (folder / place).iterdir()}
    assert stems == {
        "knowledge.md",
        "knowledge.png",
        "knowledge.csv",
        "updates.md",
        "updates.csv",
        "places-keeplora",
        "principal-keeplora",
        "overlap-keeplora",
    }
    assert all(stem in written or {f"{stem}.png", f"{stem}.svg"} <= written for stem in stems)


def test_the_long_command_of_the_results_is_one():
    (command,) = re.findall(r"^    llava-keeplora (.*)$", TEXT, flags=re.M)
    args = cli.parse_arguments(cli.build_parser(), command.split())
    assert (args.model, args.general[0], args.specific[0], args.examples) == (
        "tiny-clip",
        "shapes",
        "digits",
        200,
    )


def test_the_settings_that_it_shows_are_valid():
    (block,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.M | re.S)
    assert PartConfig(**yaml.safe_load(block)["parts"]["vision"]).auto == ("energy_weight", "energy_feature")


def test_the_numbers_of_the_rules_are_those_of_the_code():
    assert re.search(r"0\.2, 0\.4, 0\.6, 0\.8, 0\.9 and 0\.95", TEXT) and ENERGIES == (
        0.2,
        0.4,
        0.6,
        0.8,
        0.9,
        0.95,
    )
    assert (
        "0.95, 0.9, 0.8, ..., 0.1" in TEXT
        and choose_energy.CANDIDATES[:3] == (0.95, 0.9, 0.8)
        and choose_energy.CANDIDATES[-1] == 0.1
    )
    assert "95 % of" in TEXT and svd_split.KEPT == 0.95
    assert (
        f"{auto_energy.EXAMPLES} examples of each **training**" in TEXT
        and f"aims at {AUTO_LIMITS['energy_feature']} " in TEXT
    )
