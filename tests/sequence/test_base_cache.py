"""What runs share of the untouched model: bit for bit what each would have computed, and never what is damaged or of something else."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_keeplora.methods import METHODS
from llava_keeplora.run_folder import Stage
from llava_keeplora.sequence import answers, stages
from llava_keeplora.sequence.base_cache import BaseCache
from llava_keeplora.sequence.data import ImageCache
from llava_keeplora_recipes import load_recipe, load_split


@pytest.fixture(scope="module")
def filled(run_config, driven, tmp_path_factory, tiny_tasks):
    """A base cache after a run with seed 0 on the first two tasks; copy it before changing it."""
    root = tmp_path_factory.mktemp("cache")
    driven(
        run_config(
            root / "first", tasks=[str(path) for path in tiny_tasks[:2]], base_cache=str(root / "cache")
        )
    )
    return root / "cache"


def watch_computed(patch):
    """Return a list that gets what is computed of the untouched model, in order."""
    found = []
    for module, name in ((answers, "predict"), (stages, "_consolidate")):
        real = getattr(module, name)

        def watched(state, index, *more, real=real):
            if index == 0:
                found.append((state.config.label, *(task.name for task in more[:1])))
            return real(state, index, *more)

        patch.setattr(module, name, watched)
    return found


@pytest.fixture
def computed(monkeypatch):
    """What is computed of the untouched model, in order."""
    return watch_computed(monkeypatch)


@pytest.fixture(scope="module")
def alone(run_config, driven, tmp_path_factory, tiny_tasks):
    """(A run without a cache with another seed on the two tasks the other way round, what it computed); shared."""
    tasks = [str(path) for path in tiny_tasks[1::-1]]
    with pytest.MonkeyPatch.context() as patch:
        found = watch_computed(patch)
        return driven(run_config(tmp_path_factory.mktemp("alone") / "run", seed=3, tasks=tasks)), found


@pytest.fixture
def other(run_config, tiny_tasks, tmp_path):
    """Function (name, cache, **changes) → a run with another seed on the two tasks the other way round."""
    tasks = [str(path) for path in tiny_tasks[1::-1]]
    return lambda name, cache, **changes: run_config(
        tmp_path / name, seed=3, tasks=tasks, base_cache=cache and str(cache), **changes
    )


def test_another_seed_and_order_take_everything_over_and_end_bit_for_bit_as_without(
    filled, other, alone, drive, left_behind, computed, tmp_path
):
    nothing = {("zero-shot",), ("seq-lora",)}  # They have nothing to consolidate.
    assert set(alone[1]) == nothing | {("keeplora",), ("zero-shot", "colours"), ("zero-shot", "stripes")}
    drive(other("taking", filled))
    assert set(computed) == nothing
    expected, taking = left_behind(alone[0]), left_behind(tmp_path / "taking")
    for entries in taking.values():
        for entry in entries if isinstance(entries, list) else ():
            entry["info"].pop("taken_seconds", None)
    assert taking == expected


@pytest.mark.parametrize("energy", [0.5, "auto"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.base_is_cacheable])
def test_a_base_that_is_called_fixed_depends_on_neither_seed_nor_order(
    run_config, tiny_tasks, drive, stopped, left_behind, monkeypatch, tmp_path, name, energy
):
    def stop(state, index):
        raise stopped

    monkeypatch.setitem(stages.STAGES, Stage.PREPARED, stop)
    tasks, found = [str(path) for path in tiny_tasks[:2]], []
    for seed, order in ((0, tasks), (3, tasks[::-1])):
        with pytest.raises(stopped):
            drive(
                run_config(
                    tmp_path / f"{seed}",
                    seed=seed,
                    tasks=order,
                    methods={name: {}},
                    parts={"vision": {"energy_weight": energy}},
                )
            )
        found.append(
            {
                file: value
                for file, value in left_behind(tmp_path / f"{seed}").items()
                if file.startswith(f"{name}/task-00-base/")
            }
        )
    assert found[0] == found[1] and len(found[0]) == 3, "state, report, scores"


def test_the_journal_says_how_long_answers_took_the_run_that_made_them(filled, other, drive, tmp_path):
    drive(other("taking", filled, methods={"seq-lora": {}}))
    folder = tmp_path / "taking/zero-shot"
    (entry,) = (
        one for one in map(json.loads, (folder / "journal.jsonl").open()) if one["stage"] == "EVALUATED"
    )
    made = [
        one["seconds"]
        for one in (json.loads(path.read_text()) for path in filled.glob("*/entry.json"))
        if one["of"]["stage"] == "EVALUATED"
    ]
    assert len(made) == 2 and entry["info"]["taken_seconds"] == pytest.approx(sum(made), abs=1e-3)


@pytest.mark.slow
def test_an_interrupted_run_takes_over_the_rest(
    filled, other, alone, stopped, run_to_the_end, outcome, monkeypatch, tmp_path
):
    real, stops = stages.score_task, []

    def stop_once(state, index, task):
        if not stops:
            stops.append(task.name)
            raise stopped
        return real(state, index, task)

    monkeypatch.setattr(stages, "score_task", stop_once)
    assert run_to_the_end(other("stopped", filled)) == 2
    assert outcome(tmp_path / "stopped") == outcome(alone[0])


@pytest.mark.parametrize("change", [{"model": {"dtype": "bfloat16"}}, {"data": {"holdout": 0.5}}])
def test_another_model_or_other_examples_are_computed_anew(filled, other, drive, computed, tmp_path, change):
    cache = shutil.copytree(filled, tmp_path / "cache")
    drive(other("run", cache, methods={"keeplora": {}}, **change))
    assert {("keeplora",), ("zero-shot", "colours"), ("zero-shot", "stripes")} <= set(computed)


@pytest.mark.slow
def test_other_weights_under_the_same_name_are_another_model(other, drive, computed, tiny_clip, tmp_path):
    model, cache = shutil.copytree(tiny_clip, tmp_path / "model"), tmp_path / "cache"
    drive(other("first", cache, model={"name_or_path": str(model)}))
    del computed[:]
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: 1.1 * value for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    drive(other("second", cache, model={"name_or_path": str(model)}))
    assert ("zero-shot", "colours") in computed and ("keeplora",) in computed


@pytest.mark.slow
def test_other_settings_are_another_base(filled, other, drive, computed, tmp_path):
    cache = shutil.copytree(filled, tmp_path / "cache")
    drive(
        other("run", cache, methods={"keeplora": {"protect_weights": False}, "again": {"method": "keeplora"}})
    )
    assert ("keeplora",) in computed and ("again",) not in computed, "a label is only a name"


def test_a_damaged_entry_is_made_again(filled, other, drive, computed, caplog, tmp_path):
    cache = shutil.copytree(filled, tmp_path / "cache")
    entries = {path.parent: json.loads(path.read_text()) for path in cache.glob("*/entry.json")}
    (answers,) = (folder for folder, entry in entries.items() if entry["of"].get("task") == "colours")
    (base,) = (folder for folder, entry in entries.items() if entry["of"]["stage"] == "CONSOLIDATED")
    whole = (answers / "predictions.jsonl").read_text()
    (answers / "predictions.jsonl").write_text(whole.replace('"text": "', '"text": "not ', 1))
    (base / "state.safetensors").unlink()
    drive(other("run", cache, methods={"keeplora": {}}))
    assert (
        ("zero-shot", "colours") in computed
        and ("zero-shot", "stripes") not in computed
        and ("keeplora",) in computed
    )
    assert f"{answers} is damaged (a file is not what was written); it is made again" in caplog.text
    assert (answers / "predictions.jsonl").read_text() == whole and (base / "state.safetensors").is_file()


# --- images --------------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch):
    """How many images are decoded and prepared for the cache, in order of the calls."""
    counts, make = [], ImageCache.make
    monkeypatch.setattr(
        ImageCache,
        "make",
        lambda self, data, indices: (counts.append(len(indices)), make(self, data, indices))[1],
    )
    return counts


@pytest.mark.slow
def test_images_that_another_run_prepared_are_not_prepared_again_unless_damaged(
    filled, other, drive, prepared, caplog, tmp_path
):
    cache = shutil.copytree(filled, tmp_path / "cache")
    drive(other("taking", cache, methods={"seq-lora": {}}))
    assert prepared == []
    folders = [
        path.parent
        for path in cache.glob("*/entry.json")
        if json.loads(path.read_text())["of"]["stage"] == "PICTURES"
    ]
    assert len(folders) == 4, "two splits of two tasks"
    damaged = folders[0] / "rows-00000.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    drive(other("again", cache, methods={"seq-lora": {}}))
    assert (
        len(prepared) == 1
        and f"{folders[0]} is damaged (a file is not what was written); it is made again" in caplog.text
    )
    assert damaged.read_bytes() == whole


def test_rows_come_back_as_they_are_whatever_their_shapes_and_without_a_folder_too(tmp_path):
    rows = [
        {"pixels": torch.randn(3, i, 4).bfloat16().mT, "sizes": torch.tensor([i, 4])} if i % 4 else {}
        for i in range(8)
    ]
    pieces = [rows[:1], rows[1:4], rows[4:5], rows[5:]]  # Two of them are text alone.
    for root in (str(tmp_path / "cache"), None):
        cache, what = BaseCache(root, {"model": "m"}), {"stage": "PICTURES", "data": "d"}
        assert cache.rows(what) is None and cache.size(what) is None
        for found in (cache.put_rows(what, iter(pieces)), cache.rows(what) if root else rows):
            assert len(found) == len(rows) and all(
                row.keys() == mine.keys() for row, mine in zip(found, rows)
            )
            assert all(
                torch.equal(row[key], value) for row, mine in zip(found, rows) for key, value in mine.items()
            )
        assert BaseCache(root, {"model": "other"}).rows(what) is None
        assert cache.size(what) == (
            sum(value.nbytes for row in rows for value in row.values()) if root else None
        )


def test_a_file_that_others_have_mapped_is_not_replaced_by_the_same(tmp_path):
    cache, what, rows = BaseCache(str(tmp_path), {}), {"data": "d"}, [{"pixels": torch.ones(3)}]
    cache.put_rows(what, iter([rows]))
    (file,) = tmp_path.glob("*/rows-*.safetensors")
    before = file.stat()
    cache.put_rows(what, iter([rows]))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_disk_that_takes_no_images_leaves_the_run_with_its_own(tmp_path, caplog):
    (tmp_path / "file").touch()
    cache, rows = (
        BaseCache(str(tmp_path / "file"), {}),
        [{"pixels": torch.ones(3)}, {"pixels": torch.zeros(3)}],
    )
    assert cache.put_rows({"data": "d"}, iter([rows[:1], rows[1:]])) == rows
    assert "cannot store preprocessed images (Not a directory)" in caplog.text


def test_the_same_images_in_another_order_are_other_rows(tmp_path):
    data = load_split(load_recipe("digits"), "test").take(range(6))
    other = data.take(range(5, -1, -1))
    assert data.fingerprint == other.fingerprint and data.ids == other.ids[::-1]

    def pixels(example):
        return torch.tensor(np.asarray(example.image))

    for _ in range(2):  # Made, and then taken over.
        cache = ImageCache(
            lambda examples: [{"pixels": pixels(example)} for example in examples],
            1.0,
            BaseCache(str(tmp_path), {}),
        )
        assert all(
            torch.equal(cache.split(split).take([0])[0]["pixels"], pixels(split[0]))
            for split in (data, other)
        )


@pytest.mark.slow
def test_images_beyond_the_budget_are_neither_kept_nor_taken(filled, other, drive, prepared, tmp_path):
    cache = shutil.copytree(filled, tmp_path / "cache")
    drive(other("taking", cache, methods={"seq-lora": {}}, data={"cache_gb": 0.0}))
    assert len(prepared) > 4
    drive(other("own", tmp_path / "empty", methods={"seq-lora": {}}, data={"cache_gb": 0.0}))
    kept = [json.loads(path.read_text())["of"]["stage"] for path in (tmp_path / "empty").glob("*/entry.json")]
    assert kept and "PICTURES" not in kept


def test_a_run_keeps_no_trace_of_where_it_looked(filled, other, drive, tmp_path):
    drive(other("run", filled, methods={"seq-lora": {}}))
    assert (
        str(filled)
        not in (tmp_path / "run/config.json").read_text() + (tmp_path / "run/identity.json").read_text()
    )
