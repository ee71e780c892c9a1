"""A merged checkpoint of a run's base becomes a task of the run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_keeplora.adapters import Delta, FullDelta, load_deltas
from llava_keeplora.adopt.checkpoint import stored_dtype
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export import import_state, run_export
from llava_keeplora.saved_run import extended


@pytest.fixture
def run(one_task_run, tmp_path):
    return Path(shutil.copytree(one_task_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def changed_clip(tiny_clip):
    """Function (folder, change, dtype) → a copy of the tiny CLIP whose parameters a function has changed."""
    from transformers import CLIPModel

    def write(folder, change, dtype=torch.float32):
        model = CLIPModel.from_pretrained(tiny_clip)
        with torch.no_grad():
            change(dict(model.named_parameters()))
        model.to(dtype).save_pretrained(folder)
        return folder

    return write


def add_noise(parameters):
    generator = torch.Generator().manual_seed(0)
    for name, p in parameters.items():
        if name.endswith("q_proj.weight"):
            p += 0.05 * torch.randn(p.shape, generator=generator)


@pytest.mark.slow
def test_a_merged_adapter_is_the_adapter(run, peft_adapter, driven, tiny_clip, tiny_tasks, tmp_path):
    from peft import PeftModel
    from transformers import CLIPModel

    adapter = peft_adapter(tmp_path / "adapter")
    PeftModel.from_pretrained(
        CLIPModel.from_pretrained(tiny_clip), adapter
    ).merge_and_unload().save_pretrained(tmp_path / "merged")
    other = Path(shutil.copytree(run, tmp_path / "other"))
    found = []
    for folder, source in ((run, adapter), (other, tmp_path / "merged")):
        driven(extended(folder, str(tiny_tasks[1]), source=str(source)))
        found.append(load_deltas(folder / "keeplora/task-02-stripes/delta.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, delta in found[0].items():
        assert isinstance(found[1][name], Delta) and len(found[1][name].A) == 2
        torch.testing.assert_close(found[1][name].dense(), delta.dense(), atol=2e-6, rtol=0)


@pytest.mark.slow
def test_any_other_difference_is_taken_exactly_and_everything_later_knows_it(
    run, changed_clip, driven, tiny_clip, tiny_tasks, tmp_path, monkeypatch
):
    checkpoint = changed_clip(tmp_path / "tuned", add_noise)
    driven(extended(run, str(tiny_tasks[1]), source=str(checkpoint)))
    taken = load_deltas(run / "keeplora/task-02-stripes/delta.safetensors")
    M = load_file(run / "keeplora/task-00-base/state.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_clip, checkpoint))
    features = load_file(run / "keeplora/task-01-colours/state.safetensors")
    assert len(taken) == 4
    for name, delta in taken.items():
        assert isinstance(delta, FullDelta)
        basis = torch.cat([M[name], features[name]], dim=1).double() if name in features else M[name].double()
        change = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        torch.testing.assert_close(
            delta.dense().double(), change - change @ basis @ basis.T, atol=1e-6, rtol=0
        )
    driven(extended(run, str(tiny_tasks[2])))
    monkeypatch.setattr(
        run_export, "verify_export", lambda folder, form, base, batch, meant, layers: (meant, meant)
    )
    options = {"base_id": "you/base"}
    state = run_export.export_run(run, "state", tmp_path / "state", **options).folder
    import_state(str(state), tmp_path / "again", base=str(tiny_clip), data_root=str(tiny_tasks[0].parent))
    with pytest.raises(ConfigError, match="4 layers have updates of full rank.*export --as merged"):
        run_export.export_run(run, "adapter", tmp_path / "adapter", **options)
    run_export.export_run(run, "merged", tmp_path / "merged", **options)


def test_rounding_of_what_did_not_change_is_no_change(run, changed_clip, driven, tiny_tasks, tmp_path):
    checkpoint = changed_clip(tmp_path / "half", add_noise, torch.bfloat16)
    driven(extended(run, str(tiny_tasks[1]), source=str(checkpoint)))
    assert stored_dtype(checkpoint) is torch.bfloat16, "held as it is stored"
    taken = load_deltas(run / "keeplora/task-02-stripes/delta.safetensors")
    assert sorted(taken) == sorted(name for name in taken if name.endswith("q_proj")) and len(taken) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: None, "has the weights of the run's base"),
        (lambda p: p["visual_projection.weight"].add_(1), "changes 1 modules that 'keeplora' does not train"),
        (
            lambda p: p["text_model.encoder.layers.0.self_attn.q_proj.bias"].add_(1),
            "changes the bias of 'text_model.encoder.layers.0.self_attn.q_proj'",
        ),
    ],
)
def test_other_checkpoints_are_refused(run, changed_clip, driven, tiny_tasks, tmp_path, change, message):
    checkpoint = changed_clip(tmp_path / "other", change)
    with pytest.raises(RunError, match=message):
        driven(extended(run, str(tiny_tasks[1]), source=str(checkpoint)))
    assert json.loads((run / "config.json").read_text())["adopted"] == []
