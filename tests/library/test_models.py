"""`Run` with a model and a processor of the caller, in the place of a checkpoint."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPModel, TrainerCallback

from llava_keeplora import Run
from llava_keeplora.config import parse_config
from llava_keeplora.errors import UserError
from llava_keeplora.models import ASSETS
from llava_keeplora_eval.content import object_content, save_processor
from llava_keeplora_eval.models import load_clip_processor
from llava_keeplora_eval.processors import load_chat_processor


class StopAt(TrainerCallback):
    """Stands for an interrupt at a step."""

    def __init__(self, step):
        self.left = step

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def learned(run) -> dict[str, str]:
    """Deltas, states and scores by their bytes."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(run).rglob("*"))
        if path.name in ("delta.safetensors", "state.safetensors", "matrix.json")
    }


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def clip(tiny_clip):
    """A tiny CLIP and its processor."""
    return {"model": CLIPModel.from_pretrained(tiny_clip), "processor": load_clip_processor(str(tiny_clip))}


@pytest.fixture(scope="module")
def tree(run_tree, files):
    """Function (output_dir, **changes) → KeepLoRA on two tasks of files, without a model."""

    def build(folder, **changes):
        tasks = [str(files[name]) for name in ("colours", "stripes")]
        changes = {"methods": {"keeplora": {}}, "tasks": tasks, "model": None} | changes
        return run_tree(folder, **changes)

    return build


@pytest.fixture(scope="module")
def finished(tree, clip, tmp_path_factory):
    """A run on the tiny CLIP as an object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_keeplora.sequence.runner.write_run_report", lambda root: None)
        folder, before = tmp_path_factory.mktemp("given") / "run", object_content(**clip)
        Run(tree(folder), **clip).train()
        assert object_content(**clip) == before, "the caller's model has its own weights and settings again"
        assert all(p.requires_grad for p in clip["model"].parameters())
    return folder


def test_a_clip_object_gives_bit_for_bit_what_its_checkpoint_gives(
    finished, tree, tiny_clip, driven, tmp_path
):
    driven(parse_config(tree(tmp_path / "run", model={"name_or_path": str(tiny_clip)})))
    assert learned(finished) == learned(tmp_path / "run") and len(learned(finished)) > 4


@pytest.mark.slow
def test_a_llava_object_does_too_and_goes_on_after_a_stop(llava_tree, tiny_llava, driven, tmp_path):
    settings = {"tasks": llava_tree("")["tasks"][:2]}
    driven(parse_config(llava_tree(tmp_path / "files", **settings)))
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    given, before = {"model": model, "processor": load_chat_processor(str(tiny_llava))}, weights(model)
    config = llava_tree(tmp_path / "object", **settings, model=None)
    with pytest.raises(KeyboardInterrupt):
        Run(config, **given, callbacks=[StopAt(4)]).train()
    assert same(model, before)
    Run.open(tmp_path / "object", **given).train()
    assert learned(tmp_path / "object") == learned(tmp_path / "files") and same(model, before)


def test_the_record_says_what_the_model_was(finished, clip):
    config, identity = (json.loads((finished / n).read_text()) for n in ("config.json", "identity.json"))
    assert config["model"]["object"] == identity["model"]["object"] == "CLIPModel"
    assert set(identity["base"]) == {f"object_{k}" for k in ("weights", "config", "processor", "stops")}


def test_another_model_or_none_is_refused_and_nothing_is_lost(finished, clip):
    before, other = learned(finished), copy.deepcopy(clip["model"])
    with torch.no_grad():
        other.logit_scale.add_(1e-3)
    with pytest.raises(UserError, match="object_weights differ"):
        Run.open(finished, model=other, processor=clip["processor"]).train()
    with pytest.raises(UserError, match="a CLIPModel, which is not given.*model=model"):
        Run.open(finished).train()
    assert learned(finished) == before


def test_the_processor_is_the_same_after_it_was_used(clip, tmp_path):
    before = object_content(**clip)
    clip["processor"].tokenizer(["a", "a photo of"], padding=True, truncation=True, return_tensors="pt")
    assert object_content(**clip) == before
    save_processor(clip["processor"], tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert written["padding"] is written["truncation"] is None and written["model"]["vocab"]


def test_what_needs_no_model_works_without_it(finished, capsys):
    from llava_keeplora.cli import main
    from llava_keeplora_eval.cli import main as eval_main

    assert (
        main(["doctor", str(finished)]) == 0 and "object of a program, a CLIPModel" in capsys.readouterr().out
    )
    assert eval_main(["matrix", str(finished)]) == 0
    assert Run.open(finished).matrix.to_pandas().shape == (3, 2)
    assert main(["export", str(finished), "--as", "merged"]) == 2
    assert "Run.open(FOLDER, model=model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_an_object_predicts_exports_and_is_extended(finished, clip, files, tmp_path, quick_reload):
    shutil.copytree(finished, tmp_path / "run")
    run, before = Run.open(tmp_path / "run", **clip), weights(clip["model"])
    answers = run.predictor("colours", at_task=2).predict(list(run.data("colours")))
    path = finished / "keeplora" / "task-02-stripes" / "predictions" / "colours.jsonl"
    assert answers == [json.loads(line)["text"] for line in path.read_text().splitlines()]
    with pytest.raises(UserError, match="base_id"):
        run.export("adapter")
    assert run.export("merged", tmp_path / "merged", base_id="user/tiny", examples=2).tasks == 2
    assert run.extend(str(files["corners"]))["keeplora"].complete and same(clip["model"], before)


def test_the_exported_state_of_an_object_goes_on_from_the_checkpoint(
    finished, clip, tiny_clip, files, tmp_path, quick_reload
):
    from llava_keeplora.export import import_state

    run = Run.open(finished, **clip)
    run.export("adapter", tmp_path / "state", base_id="user/tiny", examples=2)
    state = json.loads((tmp_path / "state" / "keeplora_state" / "config.json").read_text())
    assert state["model"]["name_or_path"] == "user/tiny" and "object" not in state["model"]
    import_state(
        tmp_path / "state", tmp_path / "run", base=str(tiny_clip), data_root=str(files["colours"].parent)
    )
    assert Run.open(tmp_path / "run").matrix["keeplora"].rows[:2] == run.matrix["keeplora"].rows


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda given, c: given.pop("processor"), "no processor is given"),
        (lambda given, c: given.pop("model"), "no model is given"),
        (lambda given, c: given.update(model="tiny-clip"), "model is a str"),
        (lambda given, c: given.update(model=copy.deepcopy(given["model"]).half()), "float16.*model.float"),
        (lambda given, c: given.update(processor=given["processor"].tokenizer), "has an image_processor and"),
        (lambda given, c: c.update(model={"name_or_path": "tiny-clip"}), "names the model 'tiny-clip'"),
        (lambda given, c: c.update(model={"quantization": "nf4"}), "model.quantization is nf4"),
        (
            lambda given, c: c.update(model={"attn_implementation": "eager"}),
            "computes attention as it was loaded to; call its set_attn_implementation",
        ),
        (
            lambda given, c: c["training"].update(deepspeed={"zero_optimization": {"stage": 3}}),
            "ZeRO-3.*a whole model is given",
        ),
    ],
)
def test_an_object_that_does_not_fit_is_refused_in_one_sentence(tree, clip, tmp_path, spoil, match):
    given, config = dict(clip), tree(tmp_path / "run")
    spoil(given, config)
    with pytest.raises(UserError, match=match):
        Run(config, **given)
    assert not (tmp_path / "run").exists()


def test_the_processor_of_another_model_is_refused(tree, clip, tmp_path):
    with pytest.raises(UserError, match="processor is not the model's"):
        Run(
            tree(tmp_path / "run"),
            model=clip["model"],
            processor=load_clip_processor(str(ASSETS / "tiny-clip")),
        )


def test_adapters_on_the_model_are_refused(tree, clip, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(clip["model"]), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="differs.*tensors.*unload adapters"):
        Run(tree(tmp_path / "run"), model=adapted, processor=clip["processor"]).train()


def test_a_model_whose_copy_a_method_needs_is_copied_with_its_own_weights(clip):
    from llava_keeplora.adapters import BaseWeights, FullDelta

    model = copy.deepcopy(clip["model"])
    layer = "visual_projection"
    base = BaseWeights({layer: model.get_submodule(layer)})
    base.apply([{layer: FullDelta({"weight": torch.ones_like(model.visual_projection.weight)})}])
    assert same(base.copy_of(model), weights(clip["model"])) and not same(model, weights(clip["model"]))


@pytest.mark.slow
def test_a_checkpoint_is_adopted_into_a_run_on_an_object_as_into_one_on_files(
    finished, tree, clip, tiny_clip, files, driven, tmp_path
):
    tuned, before = copy.deepcopy(clip["model"]), weights(clip["model"])
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if name.endswith("q_proj.weight"):
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    tuned.save_pretrained(tmp_path / "tuned")
    shutil.copytree(finished, tmp_path / "object")
    Run.open(tmp_path / "object", **clip).adopt(tmp_path / "tuned", str(files["corners"]))
    driven(parse_config(tree(tmp_path / "files", model={"name_or_path": str(tiny_clip)})))
    Run.open(tmp_path / "files").adopt(tmp_path / "tuned", str(files["corners"]))
    assert learned(tmp_path / "object") == learned(tmp_path / "files") and same(clip["model"], before)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_a_given_model_of_another_type_is_opened_and_saved_whole(small_vlm, name, tmp_path):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import GivenModel, load_model, open_model

    source = small_vlm(name)
    model, processor = AutoModelForImageTextToText.from_pretrained(source), load_chat_processor(str(source))
    given = GivenModel(model, processor)
    open_model(given.describe(ModelConfig()), given=given).load(torch.float32)
    given.save(tmp_path)
    saved = load_model(ModelConfig(str(tmp_path)))
    assert same(saved.model, weights(model)) and saved.processor.chat_template == processor.chat_template
    assert saved.processor.video_processor.settings == processor.video_processor.settings
