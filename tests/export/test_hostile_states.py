"""A state whose hashes agree may hold anything: import checks what it holds, and makes no run of what a run never wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llava_keeplora.errors import RunError, UserError
from llava_keeplora.export import import_state
from llava_keeplora.export.inspect_state import _check_tensor
from llava_keeplora.methods import Holding
from llava_keeplora_eval.files import file_hash

LAYER = "vision_model.encoder.layers.0.self_attn.q_proj"
TASK = "keeplora/task-01-colours"


@pytest.fixture(scope="module")
def hostile(states, tmp_path_factory):
    """A copy of a state to change and mend again."""
    return Path(shutil.copytree(states(3), tmp_path_factory.mktemp("hostile") / "state"))


@pytest.fixture
def refused(hostile, tiny_clip, tmp_path):
    """Function (file, change) → the sentence with which the state is refused, that file changed and all hashes made to agree."""

    def run(name, change):
        path, journal, manifest = (
            hostile / name,
            hostile / name.split("/")[0] / "journal.jsonl",
            hostile / "state.json",
        )
        if not journal.is_file():
            journal = hostile / "keeplora/journal.jsonl"
        before = {each: each.read_bytes() for each in {path, journal, manifest}}
        try:
            change(path)
            entries = (
                [json.loads(line) for line in journal.read_text().splitlines()] if path != journal else []
            )
            for entry in entries:
                entry["files"] = {
                    own: file_hash(journal.parent / own) if journal.parent / own == path else value
                    for own, value in entry["files"].items()
                }
            if entries:
                journal.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
            content = json.loads(manifest.read_text())
            content["files"] |= {
                each.relative_to(hostile).as_posix(): file_hash(each) for each in (path, journal)
            }
            manifest.write_text(json.dumps(content))
            with pytest.raises(UserError) as caught:
                import_state(str(hostile), tmp_path / "run", base=str(tiny_clip))
        finally:
            for each, data in before.items():
                each.write_bytes(data)
        assert list(tmp_path.iterdir()) == [], "nothing is left of a refused import"
        assert "\n" not in str(caught.value) and ".run." not in str(caught.value)
        return str(caught.value)

    return run


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"metric": "subprocess:getoutput"},
            "metric 'subprocess:getoutput', which is not built in and would be executed; add --allow-plugin",
        ),
        ({"metric": "/tmp/evil.py:run"}, "metric '/tmp/evil.py:run' by a path"),
        (
            {"source": {"format": "os:system", "path": "x"}},
            "reader 'os:system', which is not built in and would be executed",
        ),
    ],
)
def test_a_recipe_that_names_a_plugin_is_refused_before_anything_of_it_runs(
    refused, hostile, changes, sentence
):
    recipe = min(hostile.glob("recipes/*.yaml")).relative_to(hostile).as_posix()
    said = refused(recipe, lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes)))
    assert sentence in said and recipe in said


def tensors(change):
    def rewrite(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        found = load_file(path)
        change(found)
        save_file({name: value.contiguous() for name, value in found.items()}, path, metadata)

    return rewrite


def put(name, value):
    return tensors(lambda found: found.__setitem__(name, value(found[name]) if callable(value) else value))


def spoilt(number):
    def change(tensor):
        other = tensor.clone()
        other.view(-1)[3] = number
        return other

    return change


def test_whole_numbers_may_be_large_but_positions_lie_within_their_tensor():
    path, positions = Path("state.safetensors"), Holding((2,), integer=True, below=45_088_768)
    _check_tensor(path, "last", torch.tensor([0, 45_088_767], dtype=torch.int32), positions, {})
    _check_tensor(path, "hashes", torch.tensor([-(2**63), 2**63 - 1]), Holding((None,), integer=True), {})
    for wrong in (-1, 45_088_768):
        with pytest.raises(RunError, match="'last' that are not from 0 to 45088767"):
            _check_tensor(path, "last", torch.tensor([0, wrong]), positions, {})


def test_the_state_as_it_is_is_imported(hostile, tiny_clip, tmp_path):
    import_state(str(hostile), tmp_path / "run", base=str(tiny_clip))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(f"{LAYER}.B", spoilt(float("nan"))), "not finite"),
        (put(f"{LAYER}.A", spoilt(float("inf"))), "not finite"),
        (put(f"{LAYER}.B", spoilt(1e38)), "above 1e+06"),
        (put(f"{LAYER}.B", lambda B: B[:-1]), "of shape (31, 2), and on this base it is (32, 2)"),
        (put(f"{LAYER}.A", lambda A: A.T), "of shape (32, 2), and on this base it is (32, 32)"),
        (put(f"{LAYER}.A", lambda A: A[:0]), "a delta of rank 0"),
        (put(f"{LAYER}.A", torch.tensor(1.0)), "a delta of rank 0"),
        (put(f"{LAYER}.B", lambda B: B.to(torch.int32)), "as int32, and it is floating point"),
        (tensors(lambda found: found.pop(f"{LAYER}.B")), "holds no task's deltas (without '"),
        (tensors(lambda found: (found.pop(f"{LAYER}.A"), found.pop(f"{LAYER}.B"))), "holds no task's deltas"),
        (
            put("vision_model.no.such.weight", torch.ones(2)),
            "changes 'vision_model.no.such', which the method does not train",
        ),
        (
            put("vision_model.post_layernorm.weight", torch.ones(32)),
            "changes 'vision_model.post_layernorm', which the method does not train",
        ),
        (lambda path: path.write_bytes(b""), "cannot be read as safetensors"),
        (lambda path: save_file(load_file(path), path), "holds no task's deltas"),
        (lambda path: save_file(load_file(path), path, {"scales": "[" * 100_000}), "holds no task's deltas"),
        (
            lambda path: save_file(load_file(path), path, {"scales": json.dumps({LAYER: float("nan")})}),
            "a scale is no finite number",
        ),
    ],
)
def test_deltas_that_no_training_on_this_base_leaves_are_refused(refused, change, words):
    told = refused(f"{TASK}/delta.safetensors", change)
    assert words in told and "task-01-colours/delta.safetensors" in told


@pytest.mark.parametrize("task", ["keeplora/task-00-base", TASK])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda M: M * 100, "columns are not orthonormal"),
        (lambda M: M.flip(1).roll(1, 0) + 0.1, "columns are not orthonormal"),
        (lambda M: torch.cat([M, M[:, :1]], dim=1), "columns are not orthonormal"),
        (lambda M: torch.zeros_like(M), "columns are not orthonormal"),
        (spoilt(float("nan")), "not finite"),
        (lambda M: M[:0], "of shape (0, "),
        (lambda M: M[:, 0], "and on this base it is (32, any)"),
        (lambda M: M.to(torch.int64), "as int64, and it is floating point"),
        (lambda M: torch.randn(32, 40), "columns of 32 rows"),
    ],
)
def test_a_basis_that_protects_nothing_or_is_of_another_base_is_refused(refused, task, change, words):
    told = refused(f"{task}/state.safetensors", put(LAYER, change))
    assert words in told and "state.safetensors" in told and LAYER in told


def test_a_basis_of_a_layer_that_is_not_there_and_one_that_is_missing_are_refused(refused):
    told = refused(
        f"{TASK}/state.safetensors", put("vision_model.encoder.layers.7.mlp.fc1", torch.eye(32)[:, :1])
    )
    assert (
        "has the tensor 'vision_model.encoder.layers.7.mlp.fc1', which 'keeplora' does not keep on this base"
        in told
    )
    told = refused("keeplora/task-00-base/state.safetensors", tensors(lambda found: found.pop(LAYER)))
    assert f"lacks the tensor '{LAYER}' of task 0" in told


@pytest.mark.parametrize(
    "name",
    [
        "zero-shot/task-00-base/scores.json",
        f"{TASK}/scores.json",
        f"{TASK}/prepared.json",
        f"{TASK}/train.json",
        f"{TASK}/consolidated.json",
        "keeplora/matrix.json",
        "config.json",
        "identity.json",
    ],
)
@pytest.mark.parametrize(
    "text",
    ["[]", "null", "", '{"a":' * 3000 + "1" + "}" * 3000, '{"colours": 1, "capacity": [], "history": {}}'],
)
def test_json_of_another_kind_is_refused_by_name(refused, name, text):
    assert name in refused(name, lambda path: path.write_text(text))


def without(key):
    def change(path):
        content = json.loads(path.read_text())
        content.pop(key)
        path.write_text(json.dumps(content))

    return change


def test_a_base_without_the_capacity_that_its_tasks_have_is_refused(refused):
    told = refused("keeplora/task-00-base/consolidated.json", without("capacity"))
    assert "has the capacity of other layers than the base's" in told


@pytest.mark.parametrize("text", ["", "{}\n{}\n", "[]\n[]\n"])
def test_a_journal_that_is_none_is_refused(refused, text):
    assert refused("keeplora/journal.jsonl", lambda path: path.write_text(text))


def test_an_adapter_that_lost_a_tensor_or_a_file_is_refused_though_its_state_is_whole(
    exported, tiny_clip, tmp_path
):
    folder = shutil.copytree(exported("clip")[0], tmp_path / "adapter")
    import_state(str(folder), tmp_path / "whole", base=str(tiny_clip))
    weights = folder / "adapter_model.safetensors"
    found = load_file(weights)
    found.popitem()
    save_file(found, weights)
    with pytest.raises(RunError, match="adapter_model.safetensors is not what the export wrote; restore it"):
        import_state(str(folder), tmp_path / "run", base=str(tiny_clip))
    weights.unlink()
    with pytest.raises(RunError, match="adapter_model.safetensors is not what the export wrote"):
        import_state(str(folder), tmp_path / "run", base=str(tiny_clip))
    assert not (tmp_path / "run").exists()
