"""A set of adapters of one base: plain PEFT switches between the stages of a run, and every rank is one of vLLM's."""

import json
import re
import shutil
import typing
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPModel

from llava_keeplora import cli
from llava_keeplora.adapters import Delta, FullDelta, load_deltas
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export import adapter_set, export_set, import_state, set_card, verify
from llava_keeplora.export.adapter import combine, smallest_rank
from llava_keeplora.export.loaded_run import Base, load_learned_run
from llava_keeplora.export.verify_worker import plain_logits
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.files import file_hash
from llava_keeplora_eval.models import load_predictor
from llava_keeplora_recipes import load_split

#: vllm/config/lora.py, MaxLoRARanks.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
FAMILIES = {"clip": CLIPModel, "llava": AutoModelForImageTextToText}


def deltas_of(run):
    return [load_deltas(path) for path in sorted((run / "keeplora").glob("task-*/delta.safetensors"))]


def layer_of(key):
    return re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key).group(1)


def products(folder):
    """Layer's name → B A of an adapter's folder, in fp64 and with PEFT's scale."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = ({layer_of(k): v.double() for k, v in tensors.items() if f"lora_{x}" in k} for x in "AB")
    return {name: config["lora_alpha"] / config["r"] * (B[name] @ A[name]) for name in A}


def dense(tasks):
    """Layer's name → Σ s B A of some tasks, in fp64."""
    return {
        name: sum(t[name].scale * t[name].B.double() @ t[name].A.double() for t in tasks if name in t)
        for name in {name for task in tasks for name in task}
    }


def relative(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "clip")) for f in FAMILIES]
)
def test_every_stage_is_an_adapter_that_holds_the_sum_of_its_tasks_exactly(family, adapter_sets, finished):
    folder, done = adapter_sets(family)
    tasks = deltas_of(finished(family))
    assert [member.name for member in done.members] == sorted(p.name for p in folder.glob("task-*"))
    for count, member in enumerate(done.members, 1):
        exact, found = dense(tasks[:count]), products(folder / member.name)
        assert found.keys() == exact.keys() == member.losses.keys()
        assert max(relative(found[name], exact[name]) for name in exact) < 2e-7
        assert member.rank == 8 and member.worst < 1e-6  # Ranks 2, 4, 6 of three tasks.
        rank = max(int(torch.linalg.matrix_rank(value, rtol=1e-6)) for value in exact.values())
        assert member.rank == min(r for r in RANKS if r >= rank)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_loads_all_of_them_onto_one_base_and_switching_gives_the_answers_of_each_stage(
    family, adapter_sets, finished, tiny_clip, tiny_llava
):
    folder, done = adapter_sets(family)
    learned = load_learned_run(finished(family))
    data = load_split(learned.recipes[0], "test", learned.config["data"]["root"]).take(range(8))
    names = [member.name for member in done.members]
    base = FAMILIES[family].from_pretrained(
        tiny_clip if family == "clip" else tiny_llava, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, folder, adapter_name=names[0], subfolder=names[0])
    for name in names[1:]:
        model.load_adapter(folder, name, subfolder=name)
    expected, batch = [], None
    for count in range(1, 4):
        stage = load_learned_run(finished(family), at_task=count)
        batch, logits = verify.probe(stage.load(), data)
        expected.append(logits)
    assert (expected[0] - expected[1]).abs().max() > 1e-3 < (expected[1] - expected[2]).abs().max()
    for index in (2, 0, 1, 2):  # Back to the first task, and forth again.
        model.set_adapter(names[index])
        found = plain_logits(model.eval(), batch)
        torch.testing.assert_close(
            found, expected[index], atol=2e-5 * float(expected[index].abs().max()), rtol=0
        )
        assert (found.argmax(-1) == expected[index].argmax(-1)).all()


def test_predict_gives_the_answers_that_the_run_gave_after_that_stage(adapter_sets, finished, tiny_llava):
    folder, done = adapter_sets("llava")
    learned = load_learned_run(finished("llava"))
    tokens = learned.config["evaluation"]["max_new_tokens"]
    recipe = learned.recipes[0]
    data = load_split(recipe, "test", learned.config["data"]["root"])
    answers = []
    for member in done.members:
        path = finished("llava") / "keeplora" / member.name / f"predictions/{recipe.name}.jsonl"
        answers.append([json.loads(line)["text"] for line in path.read_text().splitlines()])
        model = load_predictor(str(folder / member.name), recipe, "cpu", tokens, base=str(tiny_llava))
        assert model.predict([data[i] for i in range(len(data))]) == answers[-1]
    assert answers[0] != answers[2], "the stages answer differently"


@pytest.mark.parametrize("family", FAMILIES)
def test_single_tasks_are_their_own_updates_and_add_up_to_the_stages(family, adapter_sets, finished):
    folder, done = adapter_sets(family, each="task", with_state=False)
    tasks, total = deltas_of(finished(family)), {}
    for task, member in zip(tasks, done.members, strict=True):
        own = products(folder / member.name)
        assert max(relative(own[name], value) for name, value in dense([task]).items()) < 2e-7
        total = {name: total.get(name, 0) + value for name, value in own.items()}
        assert member.own is None and member.rank == 8
    exact = dense(tasks)
    assert max(relative(total[name], exact[name]) for name in exact) < 5e-7
    manifest = json.loads((folder / "keeplora_export.json").read_text())
    assert [entry["tasks"] for entry in manifest["adapters"]] == [
        [r] for r in manifest_tasks(finished(family))
    ]
    assert all("scores" not in entry for entry in manifest["adapters"])
    text = (folder / "README.md").read_text()
    assert "one for every task's own update" in text and "keeplora_state" not in text
    assert "model.base_model.set_adapter([" in text and "those of the sums" in text


def manifest_tasks(run):
    return Matrix.from_json(run / "keeplora/matrix.json").tasks


def test_the_manifest_has_base_ranks_losses_scores_and_hashes_of_every_stage(adapter_sets, finished):
    folder, done = adapter_sets("llava")
    manifest = json.loads((folder / "keeplora_export.json").read_text())
    matrix = Matrix.from_json(finished("llava") / "keeplora/matrix.json")
    assert (manifest["form"], manifest["each"], manifest["tasks"]) == ("set", "stage", 3)
    assert (manifest["base_id"], manifest["base_revision"]) == ("you/tiny-base", "abc123")
    identity = json.loads((finished("llava") / "identity.json").read_text())
    assert manifest["base"] == identity["base"] and manifest["max_lora_rank"] == 8
    for count, entry in enumerate(manifest["adapters"], 1):
        assert entry["name"] == f"task-{count:02d}-{matrix.tasks[count - 1]}"
        assert entry["tasks"] == matrix.tasks[:count] and entry["rank"] == 8
        assert entry["scores"] == dict(zip(matrix.tasks, matrix.rows[count - 1]))
        assert entry["loss"]["layers"].keys() == products(folder / entry["name"]).keys()
        config = json.loads((folder / entry["name"] / "adapter_config.json").read_text())
        assert set(config["target_modules"]) <= set(manifest["target_modules"])
        own = json.loads((folder / entry["name"] / "keeplora_export.json").read_text())
        assert own["form"] == "adapter" and own["base"] == manifest["base"] and own["tasks"] == count
    files = {path.relative_to(folder).as_posix() for path in folder.glob("task-*/adapter_*")}
    assert files == {name for name in manifest["files"] if "/adapter_" in name}
    assert all(file_hash(folder / name) == value for name, value in manifest["files"].items())


def test_the_card_has_the_commands_of_every_server_and_its_code_runs(
    adapter_sets, tiny_llava, tmp_path, monkeypatch, capsys
):
    folder, done = adapter_sets("llava")
    text = (folder / "README.md").read_text()
    assert (
        "vllm serve you/tiny-base \\\n  --revision abc123 \\\n  --enable-lora --max-lora-rank 8 \\\n"
        "  --enable-tower-connector-lora \\\n  --max-cpu-loras 3 \\\n  --lora-modules task-01-questions="
        "you/llava-set/task-01-questions task-02-captions=you/llava-set/task-02-captions "
        "task-03-corners=you/llava-set/task-03-corners\n"
    ) in text
    last = {"lora_name": "task-03-corners", "lora_path": "you/llava-set/task-03-corners"}
    # With layers of the encoder, which SGLang takes for the language model's, SGLang's are left out.
    assert "sglang.launch_server" not in text and "SGLang 0.5.23 tells layers apart by their number" in text
    language = replace(done, language_only=True)
    paths = {member.name: f"you/llava-set/{member.name}" for member in done.members}
    served = "\n".join(set_card._serving(Base("you/tiny-base", "abc123", None), language, paths))
    for place, shown in (("8000/v1/", text), ("30000/", served)):
        assert (
            f"curl http://localhost:{place}load_lora_adapter -H 'Content-Type: application/json' "
            f"-d '{json.dumps(last)}'"
        ) in shown
        assert f"localhost:{place}unload_lora_adapter" in shown
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in text
    assert '"model": "you/tiny-base:task-03-corners"' in served
    assert "python -m sglang.launch_server --model-path you/tiny-base" in served
    assert "SGLang 0.5.23" not in served and "--enable-tower-connector-lora" not in served
    leaves = {name.rsplit(".", 1)[-1] for name in products(folder / "task-03-corners")}
    assert f"--lora-target-modules {' '.join(sorted(leaves))} \\\n" in served
    assert "llava-keeplora import you/llava-set --into runs/continued" in text
    assert "base_model:adapter:you/tiny-base" in text and "/tmp/" not in text
    code = re.search(r"^```python\n(.*?)^```", text, flags=re.M | re.S).group(1)
    (tmp_path / "you").mkdir()
    (tmp_path / "you/tiny-base").symlink_to(tiny_llava)
    (tmp_path / "you/llava-set").symlink_to(folder)
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out


def test_a_set_is_continued_like_an_adapter(adapter_sets, tiny_clip, tmp_path):
    folder, _ = adapter_sets("clip")
    config = import_state(str(folder), tmp_path / "run", base=str(tiny_clip))
    assert config.is_file() and len(deltas_of(tmp_path / "run")) == 3


def random_tasks(ranks, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: Delta(
                torch.randn(rank, fan_in, generator=generator) * 2.0**-index,
                torch.randn(fan_out, rank, generator=generator),
                0.7,
            )
            for name, (fan_out, fan_in) in widths.items()
        }
        for index, rank in enumerate(ranks)
    ]


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.2, 0.6, 0.95])
def test_the_rank_is_the_smallest_of_vllms_within_the_loss_and_the_loss_is_the_dense_one(loss):
    tasks = random_tasks([6, 6, 6], {"a": (24, 40), "b": (30, 20)})
    exact, rank = dense(tasks), smallest_rank(tasks, loss)

    def best(value, k):
        U, S, Vh = torch.linalg.svd(value)
        return relative(U[:, : len(S[:k])] * S[:k] @ Vh[: len(S[:k])], value)

    assert rank == next(k for k in RANKS if all(best(v, k) <= max(loss, 1e-6) for v in exact.values()))
    combined = combine(tasks, rank, rank)
    losses = {name: relative(d.B.double() @ d.A.double(), exact[name]) for name, d in combined.layers.items()}
    assert all(len(delta.A) == rank for delta in combined.layers.values())
    for name, value in losses.items():
        assert combined.losses.get(name, 0.0) == pytest.approx(value, rel=1e-5, abs=3e-7)
        assert value <= loss + 3e-7
    whole = sum(value.square().sum() for value in exact.values())
    lost = sum((losses[name] * value.norm()) ** 2 for name, value in exact.items())
    assert combined.error == pytest.approx(float((lost / whole).sqrt()), rel=1e-5, abs=3e-7)


def test_tasks_whose_directions_repeat_or_whose_layers_are_narrow_need_no_sum_of_ranks():
    repeated = random_tasks([8], {"a": (40, 30)}) * 3
    assert smallest_rank(repeated) == 8 and combine(repeated, 8, 8).worst < 1e-12
    narrow = random_tasks([6, 6, 6], {"a": (40, 16)})
    assert smallest_rank(narrow) == 16
    assert relative(combine(narrow, 16, 16).layers["a"].dense().double(), dense(narrow)["a"]) < 1e-6


def test_what_no_rank_of_vllm_holds_is_refused_with_the_loss_that_would_do():
    tasks = random_tasks([300, 300], {"a": (620, 610)})
    with pytest.raises(ConfigError, match=r"rank 512.*--loss allows 0; allow more with --loss 0\.\d+, or"):
        smallest_rank(tasks)
    _, S, _ = torch.linalg.svd(dense(tasks)["a"])
    loss = float((S[512:].square().sum() / S.square().sum()).sqrt())
    assert smallest_rank(tasks, loss * 1.001) == 512


def test_layers_that_were_trained_in_full_are_refused():
    full = {"b": FullDelta({"weight": torch.ones(3, 3)})}
    with pytest.raises(
        ConfigError, match="1 layers have updates of full rank, which no LoRA.*first b.; leave"
    ):
        smallest_rank([random_tasks([2], {"a": (4, 4)})[0] | full])


def test_a_lossy_set_states_its_loss(finished, tmp_path, quick_reload):
    done = export_set(
        finished("llava"), tmp_path / "set", loss=0.9, parts=["language"], at_task=2, base_id="you/base"
    )
    exact = dense(deltas_of(finished("llava"))[:2])
    assert [member.rank for member in done.members] == [1, 1] and done.language_only
    for name, value in products(tmp_path / "set" / done.members[1].name).items():
        assert done.members[1].losses[name] == pytest.approx(relative(value, exact[name]), rel=1e-4)
    assert 0 < done.members[1].worst <= 0.9 and done.members[1].own.relative > 0
    text = (tmp_path / "set/README.md").read_text()
    assert "no layer loses more than 90.00% of its update's norm" in text
    assert "Left out, though the run trained them: vision." in text
    assert "--enable-tower-connector-lora" not in text
    assert "in the worst layer" in done.describe() and "left out" in done.describe()


def test_options_of_another_form_and_values_out_of_range_are_refused(finished, tmp_path, capsys):
    run = str(finished("clip"))

    def refused(*options):
        into = tmp_path / "new"
        assert cli.main(["export", run, "--base-id", "you/base", "--into", str(into), *options]) == 2
        assert not into.exists()
        return capsys.readouterr().err

    assert "--each shapes the form set, and the form is adapter" in refused(
        "--as", "adapter", "--each", "task"
    )
    assert "--loss shapes the form set" in refused("--as", "merged", "--loss", "0.1")
    assert "--rank shapes the form adapter" in refused("--as", "set", "--rank", "8")
    assert "--dtype shapes the form merged" in refused("--as", "set", "--dtype", "float16")
    for loss in ("-0.1", "1", "nan"):
        assert f"--loss is {loss}, but it is a share of an update's norm" in refused(
            "--as", "set", "--loss", loss
        )
    assert "--parts names 'texts'" in refused("--as", "set", "--parts", "texts")
    with pytest.raises(ConfigError, match="--each is 'stages'; choose one of stage, task"):
        export_set(run, tmp_path / "new", each="stages")


def test_the_command_line_writes_a_set_to_the_runs_own_folder(finished, tmp_path, capsys, quick_reload):
    run = shutil.copytree(finished("clip"), tmp_path / "run")
    command = [
        "export",
        str(run),
        "--as",
        "set",
        "--at-task",
        "1",
        "--base-id",
        "you/base",
        "--examples",
        "2",
    ]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert f"{run}/export/set: the model after every task, as 1 adapters of one base" in out
    assert "task-01-colours: rank 8 on 16 layers; against the run's own model" in out
    assert (run / "export/set/task-01-colours/adapter_model.safetensors").is_file()


def test_an_adapter_that_loads_as_something_else_is_refused_and_no_set_stays(
    finished, tmp_path, monkeypatch, quick_reload
):
    write = adapter_set.write_adapter

    def doubled(folder, *arguments):
        write(folder, *arguments)
        if "stripes" in folder.name:
            path = folder / "adapter_model.safetensors"
            save_file({k: 2 * v for k, v in load_file(path).items()}, path, {"format": "pt"})

    monkeypatch.setattr(adapter_set, "write_adapter", doubled)
    with pytest.raises(RunError, match="gives other logits after loading .adapter 'task-02-stripes'"):
        export_set(finished("clip"), tmp_path / "new", base_id="you/base")
    assert list(tmp_path.iterdir()) == []


#: vllm/model_executor/models/llava.py: prefixes of names before and after, and the layers of vLLM's model.
PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
VLLM_LAYERS = {
    "language": r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "connector": r"multi_modal_projector\.linear_[12]",
    "vision": r"vision_tower\.vision_model\.encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.fc[12])",
}
#: What vllm/lora/peft_helper.py refuses: key → values that it takes.
LEGAL = {
    "bias": ("none",),
    "modules_to_save": (None,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
}


def test_every_adapter_keeps_vllms_rules_and_its_names_are_vllms_but_for_a_clip_tower(adapter_sets):
    folder, done = adapter_sets("llava")
    for member in done.members:
        config = json.loads((folder / member.name / "adapter_config.json").read_text())
        assert all(config.get(key, takes[0]) in takes for key, takes in LEGAL.items())
        assert config["r"] == config["lora_alpha"] == member.rank in RANKS and member.rank <= done.max_rank
        assert not {"rank_pattern", "alpha_pattern"} & config.keys() and isinstance(
            config["target_modules"], list
        )
        for key, value in load_file(folder / member.name / "adapter_model.safetensors").items():
            assert value.shape["lora_B" in key] == member.rank
            name = layer_of(key)
            before = next(prefix for prefix in PREFIXES if name.startswith(prefix))
            mapped = PREFIXES[before] + name.removeprefix(before)
            found = any(re.fullmatch(pattern, mapped) for pattern in VLLM_LAYERS.values())
            # Transformers 5 has no `vision_model` there, vLLM 0.33 has; the card says so.
            assert found == ("vision_tower" not in name)
            assert "vision_tower" not in name or re.fullmatch(
                VLLM_LAYERS["vision"], mapped.replace("vision_tower.", "vision_tower.vision_model.")
            )
    assert "vision_tower.vision_model" in (folder / "README.md").read_text()


def test_vllms_own_loader_takes_every_adapter(adapter_sets, monkeypatch):
    peft_helper = pytest.importorskip("vllm.lora.peft_helper")
    lora_model = pytest.importorskip("vllm.lora.lora_model")
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.model_executor.models.utils import WeightsMapper

    monkeypatch.setattr(lora_model, "PIN_MEMORY", False, raising=False)  # It needs a device.
    assert typing.get_args(MaxLoRARanks) == RANKS
    folder, done = adapter_sets("llava")
    limits = LoRAConfig(max_lora_rank=done.max_rank, max_cpu_loras=3)
    for member in done.members:
        helper = peft_helper.PEFTHelper.from_local_dir(str(folder / member.name), 4096)
        helper.validate_legal(limits)
        assert helper.vllm_lora_scaling_factor == 1.0
        loaded = lora_model.LoRAModel.from_local_checkpoint(
            str(folder / member.name),
            set(done.targets),
            helper,
            device="cpu",
            dtype=torch.float32,
            weights_mapper=WeightsMapper(orig_to_new_prefix=PREFIXES),
        )
        exact = products(folder / member.name)
        assert len(loaded.loras) == len(exact) and loaded.rank == member.rank
        for name, value in exact.items():
            before = next(prefix for prefix in PREFIXES if name.startswith(prefix))
            layer = loaded.loras[PREFIXES[before] + name.removeprefix(before)]
            found = layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
            torch.testing.assert_close(found, value, atol=1e-9, rtol=1e-7)
