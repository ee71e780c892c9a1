"""A method and a family of one's own together: planned, killed and resumed, exported, run by `compare`'s children."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llava_keeplora.cli import main
from llava_keeplora.config import load_config
from llava_keeplora.export.run_export import export_run
from llava_keeplora.saved_run import extended, read_identity
from llava_keeplora_eval.cli import main as evaluate

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
LABEL = "quiet_lora-QuietLora"


@pytest.fixture(scope="module")
def home(tmp_path_factory, run_tree, tiny_tasks):
    """A folder with both plug-ins, and a configuration and a table that name them."""
    folder = tmp_path_factory.mktemp("doors")
    for name in ("quiet_lora.py", "half_clip.py"):
        shutil.copyfile(EXAMPLES / name, folder / name)
    tree = run_tree(
        folder / "run",
        methods={"quiet_lora:QuietLora": {"strength": 10.0}},
        tasks=[str(task) for task in tiny_tasks[:2]],
        model={"family": "half_clip.py:HalfClip"},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    table = {
        "base": str(folder / "run.yaml"),
        "output_dir": str(folder / "table"),
        "seeds": [0],
        "methods": tree["methods"],
    }
    (folder / "table.yaml").write_text(yaml.safe_dump(table))
    return folder


@pytest.fixture(scope="module")
def finished(home, driven):
    return driven(load_config(str(home / "run.yaml")))


def weights(run: Path) -> dict[Path, bytes]:
    return {path.relative_to(run): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


@pytest.mark.slow
def test_a_run_that_is_killed_after_every_stage_ends_with_the_same_weights(
    home, finished, stopped_run, tmp_path
):
    assert weights(stopped_run(home / "run.yaml", tmp_path / "run", LABEL)) == weights(finished)


def test_its_checkpoint_is_the_base_but_for_the_layers_that_the_family_adapts(
    finished, tiny_clip, tmp_path, quick_reload
):
    export_run(finished, "merged", tmp_path / "merged", base_id="user/base", examples=2)
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_clip, tmp_path / "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all(".layers.1.self_attn." in name for name in changed)
    deltas = [load_file(path) for path in sorted(finished.glob(f"{LABEL}/task-*/delta.safetensors"))]
    assert len(deltas) == 2
    name = next(name for name in sorted(changed) if name.endswith("q_proj.weight"))
    layer = name.removesuffix(".weight")
    expected = base[name] + sum(product(delta, layer) for delta in deltas)
    torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-5)


def product(delta: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """B A of a layer's update, of rank 2 with alpha 2."""
    A, B = (next(v for k, v in delta.items() if layer in k and k.endswith(f"{side}")) for side in "AB")
    return B @ A


def test_its_adapter_names_these_layers_alone_and_answers_outside_of_the_run(
    home, finished, tiny_clip, tiny_tasks, tmp_path, quick_reload
):
    export_run(finished, "adapter", tmp_path / "adapter", base_id="user/base", examples=2)
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert held and all(".layers.1.self_attn." in name for name in held)
    command = ["predict", "--model", str(tmp_path / "adapter"), "--base", str(tiny_clip)]
    command += ["--task", str(tiny_tasks[1]), "--device", "cpu", "--output"]
    assert evaluate([*command, str(tmp_path / "plain.jsonl")]) == 0
    family = f"{home / 'half_clip.py'}:HalfClip"
    assert evaluate([*command, str(tmp_path / "own.jsonl"), "--family", family]) == 0
    texts = [
        [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("plain", "own")
    ]
    assert texts[0] == texts[1] != []


def test_its_state_is_written_from_any_folder_and_learns_on_where_both_are_installed(
    home, finished, tiny_clip, tiny_tasks, tmp_path, quick_reload, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    export_run(finished, "state", tmp_path / "state", base_id="user/base", examples=2)
    assert str(home) not in (tmp_path / "state/config.json").read_text()
    arguments = ["import", str(tmp_path / "state"), "--base", str(tiny_clip), "--into", str(tmp_path / "run")]
    assert main(arguments) == 2 and "--allow-plugin" in capsys.readouterr().err
    monkeypatch.chdir(home)
    assert main([*arguments, "--allow-plugin"]) == 0
    monkeypatch.chdir(tmp_path)
    run = extended(tmp_path / "run", str(tiny_tasks[2]))
    assert run.model.family == f"{home / 'half_clip.py'}:HalfClip" and len(run.tasks) == 3


def test_it_is_planned(home, finished, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config", str(home / "run.yaml"), "--json"]) == 0
    (method,) = json.loads(capsys.readouterr().out)["methods"]
    (first, _) = sorted(finished.glob(f"{LABEL}/task-*/delta.safetensors"))
    assert method["label"] == LABEL and method["steps"] == [3, 3]
    # A and B of every adapted layer train, and are the task's update
    assert method["trainable"] == sum(tensor.numel() for tensor in load_file(first).values())


@pytest.mark.slow
def test_the_children_of_a_table_find_both_from_another_folder(
    home, finished, forked_children, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    compare = ["compare", "--config", str(home / "table.yaml")]
    assert main(compare) == 0
    (identity,) = (home / "table").glob("*/seed-0/*/identity.json")
    recorded = read_identity(identity.parent)
    assert recorded["model"]["family"] == "half_clip:HalfClip"
    assert list(recorded["methods"][LABEL]["source"]) == ["quiet_lora.py"]
    assert weights(identity.parent) == weights(finished)
    for page in ("table.md", "table.tex", "report.html"):
        assert str(home) not in (home / "table" / page).read_text()
    with open(home / "quiet_lora.py", "a") as file:
        file.write("\n# changed\n")
    assert main(compare) == 1
    assert "the file quiet_lora.py of the plug-in" in capsys.readouterr().err
