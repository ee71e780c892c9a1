"""A merged checkpoint holds base + deltas, whatever form the base had in the run."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_keeplora import cli
from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export import export_merged
from llava_keeplora.sequence import runner

RUNS = {"plain": {}, "nf4": {"model": {"quantization": "nf4"}}}


@pytest.fixture(scope="module")
def finished(llava_tree, tmp_path_factory):
    """Function (form) → a finished run of the tiny LLaVA."""
    done = {}

    def run(form):
        if form not in done:
            done[form] = tmp_path_factory.mktemp(form) / "run"
            runner.run(parse_config(llava_tree(done[form], **RUNS[form])))
        return done[form]

    return run


@pytest.mark.parametrize("form", RUNS)
def test_every_weight_is_the_base_and_the_sum_of_its_deltas(form, finished, tiny_llava, tmp_path):
    export_merged(finished(form), tmp_path / "merged", dtype="float32")
    base = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    deltas = [load_deltas(path) for path in sorted((finished(form) / "keeplora").glob("task-*/delta.safetensors"))]
    assert len(deltas) == 3
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear):
            exact = layer.weight.double() + sum(task[name].dense().double() for task in deltas if name in task)
            torch.testing.assert_close(merged.get_submodule(name).weight.double(), exact, rtol=0, atol=1e-6)
    AutoProcessor.from_pretrained(tmp_path / "merged")


def test_the_deviation_is_rounding_in_fp32_larger_in_bf16_and_that_of_the_quantisation_for_an_nf4_base(finished, tmp_path):
    exact = export_merged(finished("plain"), tmp_path / "exact", dtype="float32")
    rounded = export_merged(finished("plain"), tmp_path / "rounded")
    quantised = export_merged(finished("nf4"), tmp_path / "quantised")
    assert exact.largest < 1e-5 and exact.same == 1.0 and exact.examples == 8 and exact.tasks == 3
    assert exact.relative < rounded.relative < quantised.relative < 0.5


def test_the_command_says_what_it_merged_and_how_far_the_logits_are(finished, tmp_path, capsys):
    assert cli.main(["export", str(finished("nf4")), "--as", "merged", "--into", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert "base and 3 tasks merged, bfloat16" in out and "logits of 8 examples" in out and "largest deviation" in out
    assert json.loads((tmp_path / "merged/config.json").read_text()).get("quantization_config") is None


def test_what_cannot_be_merged_is_refused_with_the_cure(finished, tmp_path):
    run = finished("plain")
    with pytest.raises(RunError, match="is not a run folder"):
        export_merged(tmp_path, tmp_path / "new")
    with pytest.raises(RunError, match="has no method 'seq-lora'.*--method: keeplora"):
        export_merged(run, tmp_path / "new", label="seq-lora")
    with pytest.raises(ConfigError, match="not an empty folder.*--into"):
        export_merged(run, run)
    with pytest.raises(ConfigError, match="the dtype is 'float8'"):
        export_merged(run, tmp_path / "new", dtype="float8")


def test_a_damaged_delta_is_refused(llava_tree, finished, tmp_path):
    import shutil

    run = shutil.copytree(finished("plain"), tmp_path / "copy")
    path = next((run / "keeplora").glob("task-02-*/delta.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(RunError, match="delta.safetensors is not what task 2 wrote"):
        export_merged(run, tmp_path / "new")
