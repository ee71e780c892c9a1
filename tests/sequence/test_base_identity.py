"""A run knows its base model, processor and template by content: another one is refused by every command, and doctor says so."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from llava_keeplora import cli
from llava_keeplora.config import load_config, parse_config
from llava_keeplora.errors import RunError
from llava_keeplora.saved_run import base_changes, check_base, extended, load_run, recorded_base
from llava_keeplora_eval.content import content_changes, model_content, tensors_hash


@pytest.fixture(scope="module")
def finished(tiny_clip, tiny_tasks, run_tree, driven, tmp_path_factory):
    """A finished run on a base of its own, and that base; shared, so copy both."""
    root = tmp_path_factory.mktemp("identity")
    shutil.copytree(tiny_clip, root / "base")
    tree = run_tree(
        root / "run",
        methods={"keeplora": {}},
        tasks=[str(tiny_tasks[0])],
        model={"name_or_path": str(root / "base")},
    )
    driven(parse_config(tree))
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    return root


@pytest.fixture
def place(finished, tmp_path):
    """A copy of run and base."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("run/config.json", "run/identity.json", "run.yaml"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(str(finished), str(tmp_path)))
    return tmp_path


def change_weights(base):
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["text_projection.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def change_pixels(base):
    path = next(p for p in (base / "preprocessor_config.json", base / "processor_config.json") if p.exists())
    path.write_text(path.read_text().replace("0.48145466", "0.5"))


def change_tokenizer(base):
    path = base / "tokenizer.json"
    path.write_text(path.read_text().replace('"Lowercase"', '"NFC"'))


CHANGES = {"weights": change_weights, "processor": change_pixels, "tokenizer": change_tokenizer}


def commands(place: Path, task: str) -> dict[str, list[str]]:
    run = str(place / "run")
    return {
        "train": ["train", "--config", str(place / "run.yaml")],
        "extend": ["extend", run, "--task", task],
        "fork": ["fork", run, "--at-task", "1", "--into", str(place / "fork")],
        "export": ["export", run, "--as", "merged", "--base-id", "you/clip", "--into", str(place / "merged")],
        "analyze": ["analyze", run, "--into", str(place / "analysis")],
    }


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", ["train", "extend", "fork", "export", "analyze"])
def test_a_command_on_another_base_is_refused_and_changes_nothing(place, tiny_tasks, command, change, capfd):
    CHANGES[change](place / "base")
    before = {
        path: path.read_bytes()
        for path in (place / "run").rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert cli.main(commands(place, str(tiny_tasks[1]))[command]) == 2
    what = "weights" if change == "weights" else "processor"
    assert f"is not the one that {place / 'run'} was begun with ({what} differ)" in capfd.readouterr().err
    assert before == {
        path: path.read_bytes()
        for path in (place / "run").rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_start_on_a_moved_base_looks_at_its_content_once(place, monkeypatch):
    from llava_keeplora import saved_run
    from llava_keeplora.sequence.workspace import Workspace

    (place / "base").rename(place / "moved")
    config = load_config(str(place / "run.yaml"), [f"model.name_or_path={place / 'moved'}"])
    looks = []
    monkeypatch.setattr(
        "llava_keeplora.sequence.workspace.base_content",
        lambda model: looks.append(model) or model_content(model.name_or_path),
    )
    monkeypatch.setattr(
        saved_run, "base_content", lambda model: looks.append(model) or model_content(model.name_or_path)
    )
    workspace = Workspace(config)
    workspace.check()
    workspace.claim()
    assert len(looks) == 1


def test_a_table_does_not_go_on_with_finished_runs_of_another_base(place, tiny_tasks, caplog):
    from llava_keeplora.compare.jobs import Job, run_jobs

    job = Job("keeplora", place / "run", yaml.safe_load((place / "run.yaml").read_text()))
    assert job.finished() and run_jobs([job], 1, ["keeplora"]) == []
    change_weights(place / "base")
    with pytest.raises(RunError, match=r"is not the one that .*run was begun with \(weights differ\)"):
        run_jobs([job], 1, ["keeplora"])
    shutil.rmtree(place / "base")
    assert run_jobs([job], 1, ["keeplora"]) == [] and "is not checked" in caplog.text


def test_runs_of_two_bases_with_one_name_have_rows_of_their_own_and_a_copy_of_a_base_has_not(place):
    """Also the untouched model, of which runs with other seeds share a row."""
    from llava_keeplora.report.run_report import read_side_by_side

    other = Path(shutil.copytree(place / "run", place / "other"))
    identity = json.loads((other / "identity.json").read_text())
    for content, rows in (
        (identity["base"], ["zero-shot", "keeplora"]),
        (identity["base"] | {"weights": "0", "tensors": "0"}, ["zero-shot (run)", "zero-shot (other)"]),
    ):
        changed = {
            "seed": identity["seed"] + 1,
            "base": content,
            "model": identity["model"] | {"name_or_path": "elsewhere"},
        }
        (other / "identity.json").write_text(json.dumps(identity | changed))
        found = read_side_by_side([place / "run", other])
        assert list(found)[:2] == rows, list(found)


def test_doctor_says_whether_the_base_is_the_same(place, capfd):
    assert cli.main(["doctor", str(place / "run")]) == 0
    assert "the same by content" in capfd.readouterr().out
    change_weights(place / "base")
    assert cli.main(["doctor", str(place / "run")]) != 0
    said = capfd.readouterr()
    assert "weights differ" in said.out + said.err


def test_a_base_that_lies_elsewhere_with_the_same_content_is_the_same(place, capfd):
    assert recorded_base(place / "run").items() >= model_content(str(place / "base")).items()
    (place / "base/README.md").write_text("mine")
    (place / "base").rename(place / "moved")
    words = ["train", "--config", str(place / "run.yaml"), f"model.name_or_path={place / 'moved'}"]
    assert cli.main(words) == 0, capfd.readouterr().err
    change_weights(place / "moved")
    assert cli.main(words) == 2 and "model.name_or_path: " in capfd.readouterr().err


@pytest.mark.slow
def test_an_imported_state_is_refused_on_another_base(place, capfd):
    assert (
        cli.main(
            [
                "export",
                str(place / "run"),
                "--as",
                "state",
                "--base-id",
                "you/clip",
                "--into",
                str(place / "state"),
            ]
        )
        == 0
    ), capfd.readouterr().err
    words = ["import", str(place / "state"), "--base", str(place / "base"), "--into"]
    assert cli.main([*words, str(place / "same")]) == 0, capfd.readouterr().err
    assert recorded_base(place / "same") == recorded_base(place / "run")
    change_weights(place / "base")
    assert cli.main([*words, str(place / "other")]) == 2
    assert "weights differ" in capfd.readouterr().err and not (place / "other").exists()


def test_a_run_of_an_earlier_version_goes_on_with_a_warning_and_keeps_a_record_from_then_on(
    place, drive, caplog, tiny_tasks
):
    path = place / "run/identity.json"
    identity = json.loads(path.read_text())
    identity.pop("base")
    path.write_text(json.dumps(identity))
    drive(load_run(place / "run"))
    assert "kept no record of its base model" in caplog.text
    record = model_content(str(place / "base")) | {"tensors": tensors_hash(place / "base")}
    assert recorded_base(place / "run") == record
    caplog.clear()
    drive(extended(place / "run", str(tiny_tasks[1])))
    assert "no record" not in caplog.text and recorded_base(place / "run") == record


def test_a_fork_needs_no_base_and_keeps_its_record(place, capfd):
    (place / "base").rename(place / "moved")
    assert cli.main(commands(place, "")["fork"]) == 0
    assert recorded_base(place / "fork") == recorded_base(place / "run") is not None


def test_a_fork_of_a_run_without_a_record_does_not_take_the_files_of_today_for_its_base(place, capfd):
    identity = json.loads((place / "run/identity.json").read_text())
    identity.pop("base")
    (place / "run/identity.json").write_text(json.dumps(identity))
    change_weights(place / "base")
    assert cli.main(commands(place, "")["fork"]) == 0
    assert recorded_base(place / "fork") is None
    capfd.readouterr()
    assert cli.main(["doctor", str(place / "fork")]) == 0
    assert "there is no record to check it by" in capfd.readouterr().out


def test_an_adapter_is_checked_with_its_base_model(tiny_clip, tmp_path):
    from llava_keeplora_eval.class_prompts import PromptPreparation
    from llava_keeplora_eval.models import load_preparation

    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_clip)}))
    assert isinstance(load_preparation(str(tmp_path)), PromptPreparation)


@pytest.mark.slow
def test_a_moved_base_is_given_to_extend_by_its_new_place(place, tiny_tasks, capfd):
    (place / "base").rename(place / "moved")
    extend = commands(place, str(tiny_tasks[1]))["extend"]
    assert cli.main(extend) == 2
    assert "model.name_or_path=DIR" in capfd.readouterr().err
    assert cli.main([*extend, f"model.name_or_path={place / 'moved'}"]) == 0


def in_shards(base):
    from safetensors.torch import load_file, save_file

    tensors = list(load_file(base / "model.safetensors").items())
    weight_map = {}
    for i in range(3):
        shard = dict(tensors[i::3])
        weight_map |= dict.fromkeys(shard, f"model-{i}.safetensors")
        save_file(shard, base / f"model-{i}.safetensors", {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickled(base):
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")


@pytest.mark.parametrize("layout", [in_shards, pickled])
def test_the_same_tensors_in_files_of_another_layout_are_the_same_base(place, capfd, layout):
    layout(place / "base")
    (place / "base/model.safetensors").unlink()
    model = load_run(place / "run").model
    check_base(place / "run", model)
    assert base_changes(place / "run", model) == []
    identity = json.loads((place / "run/identity.json").read_text())
    known, now = identity["base"], model_content(str(place / "base"))
    assert known.keys() - now.keys() == {"tensors"} and content_changes(known, now) == ["weights"]
    # A run that recorded only its files is refused, as before.
    del identity["base"]["tensors"]
    (place / "run/identity.json").write_text(json.dumps(identity))
    with pytest.raises(RunError, match="weights differ"):
        check_base(place / "run", model)


def test_the_hash_of_tensors_covers_name_type_shape_and_numbers(tmp_path):
    import torch
    from safetensors.torch import save_file

    hashes = set()
    one = torch.arange(6, dtype=torch.int32)
    for i, tensors in enumerate(
        [{"a": one}, {"b": one}, {"a": one.view(torch.float32)}, {"a": one.view(2, 3)}, {"a": one + 1}]
    ):
        (tmp_path / str(i)).mkdir()
        save_file(tensors, tmp_path / str(i) / "model.safetensors")
        hashes.add(tensors_hash(tmp_path / str(i)))
    assert len(hashes) == 5
