"""Exports of a method that trains the whole model: merged, or as what another run goes on from; no adapter holds it."""

import pytest
import torch
from transformers import CLIPModel

from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import load_config, parse_config
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export import export_run, import_state

pytestmark = pytest.mark.usefixtures("quick_reload")


@pytest.fixture(scope="module")
def run(run_tree, driven, tiny_tasks, tmp_path_factory):
    """A finished run of ZSCL on two tasks."""
    methods = {"zscl": {"reference": str(tiny_tasks[2]), "reference_batch": 8}}
    return driven(
        parse_config(
            run_tree(
                tmp_path_factory.mktemp("whole") / "run",
                methods=methods,
                tasks=[str(path) for path in tiny_tasks[:2]],
            )
        )
    )


def delta_files(run):
    return sorted((run / "zscl").glob("task-*/delta.safetensors"))


def test_a_merged_model_is_the_base_and_the_sum_of_all_changes(run, tiny_clip, tmp_path):
    done = export_run(run, "merged", tmp_path / "merged", base_id="you/base", dtype="float32")
    assert done.own.largest < 1e-5 and not done.left_out
    card = (tmp_path / "merged/README.md").read_text()
    assert 'reference "corners.yaml"' in card and str(tmp_path.parent) not in card
    base, merged = (
        dict(CLIPModel.from_pretrained(path).named_parameters()) for path in (tiny_clip, tmp_path / "merged")
    )
    tasks = [
        {
            f"{name}.{own}": value
            for name, delta in load_deltas(path).items()
            for own, value in delta.changes().items()
        }
        for path in delta_files(run)
    ]
    assert len(tasks) == 2 and all(task.keys() == base.keys() - {"logit_scale"} for task in tasks)
    for name, p in merged.items():
        torch.testing.assert_close(
            p, base[name] + sum(task.get(name, torch.zeros(())) for task in tasks), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("parts", [None, ["vision"]])
def test_an_adapter_is_refused_in_a_sentence(run, tmp_path, parts):
    with pytest.raises(
        ConfigError,
        match="layers have updates of full rank, which no LoRA adapter holds exactly .first .*; export --as merged.$",
    ):
        export_run(run, "adapter", tmp_path / "adapter", base_id="you/base", parts=parts)


@pytest.mark.slow
def test_a_state_goes_on_elsewhere_and_learns_what_the_run_learned(
    run, tiny_clip, tiny_tasks, driven, tmp_path
):
    export_run(run, "state", tmp_path / "state", base_id="you/base", at_task=1)
    config = import_state(
        str(tmp_path / "state"), tmp_path / "more", base=str(tiny_clip), data_root=str(tiny_tasks[0].parent)
    )
    assert [path.parent.name for path in delta_files(tmp_path / "more")] == ["task-01-colours"]
    # Which images and texts are looked at is known from the state, where they lie here is for the user to say.
    with pytest.raises(ConfigError, match="methods.zscl.reference: .*corners.yaml"):
        driven(load_config(str(config)))
    with pytest.raises(RunError, match="the reference data has changed since .* was planned .fingerprint: "):
        driven(load_config(str(config), [f"methods.zscl.reference={tiny_tasks[1]}"]))
    driven(load_config(str(config), [f"methods.zscl.reference={tiny_tasks[2]}"]))
    for ours, theirs in zip(delta_files(tmp_path / "more"), delta_files(run), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
