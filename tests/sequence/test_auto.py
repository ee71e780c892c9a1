"""Thresholds from the data: what a run chooses, where it is written, what it means, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava_keeplora import cli
from llava_keeplora.config import PartConfig
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.methods import Layer
from llava_keeplora.sequence import auto_energy
from llava_keeplora.start.check import check_auto

AUTO = {"energy_weight": "auto", "energy_feature": "auto"}
RANK, WIDTH = 2, 32


@pytest.fixture(scope="module")
def auto_config(run_config):
    """Function (output_dir, **changes) → KeepLoRA on the tiny tasks, both thresholds from the data."""
    return lambda folder, **changes: run_config(
        folder, methods={"keeplora": {}}, parts={"vision": AUTO, "text": AUTO}, **changes
    )


@pytest.fixture(scope="module")
def auto_run(auto_config, driven, tmp_path_factory):
    """A folder of it; shared, so copy it before changing it."""
    return driven(auto_config(tmp_path_factory.mktemp("auto") / "run"))


def report(run, index):
    (path,) = (run / "keeplora").glob(f"task-{index:02d}-*/consolidated.json")
    return json.loads(path.read_text())


def test_the_chosen_energy_is_in_the_bases_report_and_is_what_the_basis_holds(auto_run, tiny_clip):
    base, weights = report(auto_run, 0), load_file(tiny_clip / "model.safetensors")
    assert set(base["energy_weight"]) == {"vision", "text"}
    for name, size in base["capacity"].items():
        energy = base["energy_weight"][size["part"]]["energy"]
        squared = torch.linalg.svdvals(weights[f"{name}.weight"].double()).square()
        k = size["k"]
        assert squared[: k - 1].sum() < energy * squared.sum() <= squared[:k].sum() * (1 + 1e-6)
        assert WIDTH - k >= RANK + 2, (
            "the last of three tasks finds room to learn, the two before it to add something"
        )
    for choice in base["energy_weight"].values():
        assert (
            choice["energy"] in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
            and 0 <= choice["whole"] <= 100
        )


def test_no_task_takes_more_than_the_budgets_so_far_and_the_last_one_finds_its_rank(auto_run):
    base = report(auto_run, 0)
    for name, size in base["capacity"].items():
        assert base["feature_budget"][name] == (WIDTH - size["k"] - RANK) // 2
    cut = 0
    for index in (1, 2, 3):
        now = report(auto_run, index)
        for name, size in now["capacity"].items():
            limit = base["capacity"][name]["k"] + index * base["feature_budget"][name]
            assert size["k"] <= min(limit, WIDTH)
            energy = now["feature_energy"][name]
            assert energy["after"] >= 0.99 - 1e-9 or size["k"] == limit, (
                "what is given up of the energy is given up for want of room alone"
            )
            cut += energy["after"] < 0.99 - 1e-9
    assert cut, "a budget that never binds shows nothing"
    for name, size in report(auto_run, 2)["capacity"].items():
        assert WIDTH - size["k"] >= RANK


def test_the_choice_looks_at_training_splits_alone(auto_config, driven, tmp_path, monkeypatch):
    seen = []

    def predict(predictor, data, path, *args, **kwargs):
        seen.append((data.recipe.name, data.split, len(data)))
        path.write_text("")

    monkeypatch.setattr(auto_energy, "predict_to_file", predict)
    monkeypatch.setattr(auto_energy, "score", lambda data, path: type("Score", (), {"score": 50.0}))
    monkeypatch.setattr(auto_energy, "EXAMPLES", 10)
    run = driven(auto_config(tmp_path / "run"))
    assert set(seen) == {("colours", "train", 10), ("stripes", "train", 10), ("corners", "train", 10)}
    # A score that stays the same says that nothing needs protection.
    assert {choice["energy"] for choice in report(run, 0)["energy_weight"].values()} == {0.1}


def test_a_run_that_goes_on_keeps_what_was_chosen(
    auto_config, auto_run, driven, outcome, tmp_path, monkeypatch
):
    copy = shutil.copytree(auto_run, tmp_path / "run")
    shutil.rmtree(copy / "keeplora/task-03-corners")
    shutil.rmtree(copy / "keeplora/task-02-stripes")
    journal = copy / "keeplora/journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[: 4 + 6]))
    monkeypatch.setattr(auto_energy, "choose_energy", None)
    assert outcome(driven(auto_config(copy))) == outcome(auto_run)


@pytest.mark.slow
def test_the_updates_of_such_a_run_are_measured_at_the_chosen_energy(auto_run, tmp_path):
    assert cli.main(["analyze", str(auto_run), "--into", str(tmp_path)]) == 0
    updates = json.loads((tmp_path / "updates.json").read_text())["methods"]["keeplora"]["updates"]
    base = report(auto_run, 0)["capacity"]
    assert all(u["principal_directions"] == base[u["layer"]]["k"] and u["principal"] < 1e-9 for u in updates)


def test_a_threshold_that_is_neither_a_share_nor_auto_is_refused():
    with pytest.raises(ConfigError) as error:
        PartConfig(energy_weight="most")
    assert "energy_weight must be a number in (0, 1] or 'auto' (got 'most')" in str(error.value)


def test_a_preset_of_released_code_takes_no_auto(run_config, drive, tmp_path):
    config = run_config(
        tmp_path / "run",
        methods={"keeplora": {"preset": "released-llava"}},
        parts={"text": {"energy_feature": "auto"}},
    )
    with pytest.raises(MethodError) as error:
        drive(config)
    assert str(error.value) == (
        "parts.text.energy_feature is 'auto', but the preset 'released-llava' follows released code, which has fixed numbers; "
        "set a number, or use the preset 'paper'."
    )


def test_weights_in_shards_cannot_be_cut():
    layers = {"l": Layer("l", "vision", None, 2, 2.0, 0.95, 0.99, ("energy_weight",))}
    with pytest.raises(
        ConfigError, match="parts.vision.energy_weight is 'auto', but ZeRO-3 holds the weights in shards"
    ):
        check_auto(layers.values())
