"""A merged checkpoint holds base + deltas, whatever form the base had in the run."""

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_keeplora import cli
from llava_keeplora.adapters import load_deltas
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export import export_run, merged

pytestmark = pytest.mark.usefixtures("quick_reload")


def merge(run, into, **options):
    return export_run(run, "merged", into, base_id="you/base", **options)


@pytest.mark.parametrize("form", ["plain", pytest.param("nf4", marks=pytest.mark.slow)])
def test_every_weight_is_the_base_and_the_sum_of_its_deltas(form, finished, tiny_llava, tmp_path):
    merge(finished(form), tmp_path / "merged", dtype="float32")
    base = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    deltas = [
        load_deltas(path) for path in sorted((finished(form) / "keeplora").glob("task-*/delta.safetensors"))
    ]
    assert len(deltas) == 3
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear):
            exact = layer.weight.double() + sum(
                task[name].dense().double() for task in deltas if name in task
            )
            torch.testing.assert_close(merged.get_submodule(name).weight.double(), exact, rtol=0, atol=1e-6)
    AutoProcessor.from_pretrained(tmp_path / "merged")


@pytest.mark.slow
def test_the_deviation_is_rounding_in_fp32_larger_in_bf16_and_that_of_the_quantisation_for_an_nf4_base(
    finished, tmp_path
):
    exact = merge(finished("plain"), tmp_path / "exact", dtype="float32")
    rounded = merge(finished("plain"), tmp_path / "rounded", dtype="bfloat16")
    quantised = merge(finished("nf4"), tmp_path / "quantised", dtype="bfloat16")
    assert exact.own.largest < 1e-5 and exact.own.same == 1.0 and exact.examples == 8 and exact.tasks == 3
    assert (
        exact.own.relative
        < rounded.own.relative
        <= rounded.bfloat16.relative
        < quantised.bfloat16.relative
        < 0.5
    )
    # Whatever was rounded, what was written is what is loaded.
    assert max(one.reloaded.largest for one in (exact, rounded, quantised)) < 1e-5


def test_the_command_says_what_it_merged_and_how_far_the_logits_are(finished, tmp_path, capsys):
    assert (
        cli.main(
            [
                "export",
                str(finished("nf4")),
                "--as",
                "merged",
                "--into",
                str(tmp_path / "merged"),
                "--base-id",
                "you/base",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "base and updates merged, after 3 tasks" in out
        and "logits of 8 examples in fp32" in out
        and "in bfloat16: largest deviation" in out
    )
    assert json.loads((tmp_path / "merged/config.json").read_text()).get("quantization_config") is None


def test_the_default_is_the_bases_own_dtype_and_a_cast_says_what_rounding_loses_of_the_update(
    finished, tiny_llava, tmp_path, capsys
):
    own = merge(finished("plain"), tmp_path / "own")
    assert own.rounding.dtype == own.rounding.base == "float32" and own.rounding.lost < 1e-3
    assert json.loads((tmp_path / "own/config.json").read_text())["dtype"] == "float32"
    cast = merge(finished("plain"), tmp_path / "cast", dtype="bfloat16")

    base = dict(
        AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float64).named_parameters()
    )
    written = dict(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "cast", dtype=torch.float64).named_parameters()
    )
    totals: dict[str, torch.Tensor] = {}
    for path in (finished("plain") / "keeplora").glob("task-*/delta.safetensors"):
        for module, delta in load_deltas(path).items():
            changes = (
                {"weight": delta.scale * delta.B.double() @ delta.A.double()}
                if hasattr(delta, "A")
                else delta.parameters
            )
            for name, change in changes.items():
                totals[f"{module}.{name}"] = totals.get(f"{module}.{name}", 0) + change.double()

    def lost(prefix: str) -> float:
        names = [name for name in totals if name.startswith(prefix)]
        error = sum((written[n] - base[n].bfloat16().double() - totals[n]).square().sum() for n in names)
        return float((error / sum(totals[n].square().sum() for n in names)).sqrt().detach())

    assert cast.rounding.lost == pytest.approx(lost(""), rel=1e-3) and cast.rounding.lost > 1e-3
    for part, prefix in (
        ("vision", "model.vision_tower"),
        ("connector", "model.multi_modal_projector"),
        ("language", "model.language_model"),
    ):
        assert cast.rounding.parts[part] == pytest.approx(lost(prefix), rel=1e-3)
    record = json.loads((tmp_path / "cast/keeplora_export.json").read_text())["rounding"]
    assert (
        record["lost"] == cast.rounding.lost and record["dtype"] == "bfloat16" and record["base"] == "float32"
    )
    assert (
        "rounding loses" in cast.describe()
        and "where the base has float32: rounding loses" in (tmp_path / "cast/README.md").read_text()
    )


def test_a_large_checkpoint_is_written_in_shards_and_the_tasks_before_the_last_alone_can_be_merged(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(merged, "SHARD", "100KB")
    done = merge(finished("plain"), tmp_path / "sharded", at_task=1, dtype="float32")
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    assert done.tasks == 1 and len(set(index["weight_map"].values())) > 1
    card = (tmp_path / "sharded/README.md").read_text()
    assert "taught 1 task: questions." in card and "library_name: transformers" in card


@pytest.mark.slow
def test_an_earlier_export_is_replaced_and_nothing_else_is(finished, tmp_path):
    folder = tmp_path / "merged"
    merge(finished("plain"), folder, at_task=1)
    (folder / "left-over").touch()
    assert merge(finished("plain"), folder).tasks == 3 and not (folder / "left-over").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(
        ConfigError, match="mine is there already and not an empty folder; choose another one with --into"
    ):
        merge(finished("plain"), tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").exists()


def test_what_cannot_be_merged_is_refused_with_the_cure(finished, tmp_path):
    run = finished("plain")
    with pytest.raises(RunError, match="is not a run folder"):
        merge(tmp_path, tmp_path / "new")
    with pytest.raises(RunError, match="has no method 'seq-lora'.*--method: keeplora"):
        merge(run, tmp_path / "new", label="seq-lora")
    with pytest.raises(ConfigError, match="not an empty folder.*--into"):
        merge(run, run)
    with pytest.raises(ConfigError, match="the dtype is 'float8'"):
        merge(run, tmp_path / "new", dtype="float8")
    with pytest.raises(ConfigError, match="--parts and --rank shape an adapter, and the form is 'merged'"):
        merge(run, tmp_path / "new", rank=4)


def test_a_damaged_delta_is_refused(finished, tmp_path):
    run = shutil.copytree(finished("plain"), tmp_path / "copy")
    path = next((run / "keeplora").glob("task-02-*/delta.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(RunError, match="delta.safetensors is not what task 2 wrote"):
        merge(run, tmp_path / "new")
