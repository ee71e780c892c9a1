"""A whole run of every type of image-text-to-text model: what is protected stays, and plain transformers and PEFT load
what was learned."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llava_keeplora.adapters import load_deltas
from llava_keeplora.config import parse_config
from llava_keeplora.export import export_run
from llava_keeplora.sequence import runner
from llava_keeplora_eval.chat import Chat
from llava_keeplora_eval.chat_text import render
from llava_keeplora_eval.models import load_predictor
from llava_keeplora_eval.processors import load_chat_processor
from llava_keeplora_recipes import load_recipe, load_split
from small_vlms import SMALL_VLMS

#: Run in every suite; the others behind the slow marker.
QUICK = ("qwen3_vl",)
PART = {"rank": 2, "alpha": 2, "energy_weight": 0.5, "energy_feature": 0.9}


@pytest.fixture(
    scope="module", params=[k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in SMALL_VLMS]
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base(kind, small_vlm):
    return small_vlm(kind)


@pytest.fixture(scope="module")
def run(kind, base, mixed_tasks, tmp_path_factory):
    from llava_keeplora.config import ModelConfig
    from llava_keeplora.models import load_model

    parts = {part: dict(PART) for part in load_model(ModelConfig(str(base))).targets}
    folder = tmp_path_factory.mktemp(kind) / "run"
    tree = {
        "output_dir": str(folder),
        "tasks": [str(mixed_tasks[0]), str(mixed_tasks[2])],
        "model": {"name_or_path": str(base)},
        "parts": parts,
        "methods": {"keeplora": {}},
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.05,
            "use_cpu": True,
        },
        "evaluation": {"batch_size": 8, "max_new_tokens": 6},
    }
    before = hashes(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_run_report", lambda root: None)
        runner.run(parse_config(tree))
    assert hashes(base) == before, "the base's files are not touched"
    return folder


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def answers_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_what_is_learned_leaves_the_protected_subspace_alone(run):
    bases = load_file(run / "keeplora/task-00-base/state.safetensors")
    for task in sorted((run / "keeplora").glob("task-0[12]-*")):
        deltas = load_deltas(task / "delta.safetensors")
        assert deltas.keys() == bases.keys()
        assert any(float(delta.dense().norm()) > 0 for delta in deltas.values())
        for name, delta in deltas.items():
            dense = delta.dense().double()
            assert float((dense @ bases[name].double()).norm()) <= 1e-5 * max(1.0, float(dense.norm())), name
            torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(len(delta.A)), atol=1e-5, rtol=0)
        new = load_file(task / "state.safetensors")
        bases = {
            name: torch.cat([bases[name], new[name]], 1) if name in new else bases[name] for name in bases
        }


def test_the_zero_shot_row_is_the_bases_own_answers(run, base, mixed_tasks):
    """By plain transformers: the processor's own call, and `generate` with all that it returns."""
    recipe = load_recipe(mixed_tasks[0])
    data = load_split(recipe, "test")
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    processor, chat = load_chat_processor(str(base)), Chat(load_chat_processor(str(base)))
    own = model.generation_config.eos_token_id
    stops = [*chat.end_ids, *(own if isinstance(own, list) else [own])]
    begin, answers = processor.tokenizer.bos_token, []
    for example in list(data)[::4]:
        text = render(processor, example.question, 1)
        inputs = processor(
            text=[text],
            images=[example.images],
            add_special_tokens=not (begin and text.startswith(begin)),
            return_tensors="pt",
        )
        inputs.pop("labels", None)
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=6, do_sample=False, eos_token_id=stops, pad_token_id=chat.pad_id
            )
        said = out[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(said, skip_special_tokens=True).strip())
    rows = sorted((run / "zero-shot").rglob("questions*.jsonl"))
    assert answers_of(rows[0])[::4] == answers


def test_plain_peft_and_plain_transformers_load_what_was_learned(
    run, base, mixed_tasks, quick_reload, tmp_path
):
    recipe = load_recipe(mixed_tasks[2])
    data = load_split(recipe, "test")
    examples = [data[i] for i in range(len(data))]
    learned = sorted((run / "keeplora").glob("task-02-*/predictions/corners.jsonl"))[0]
    for form in ("adapter", "merged"):
        folder = tmp_path / form
        export_run(run, form, folder, base_id="you/base")
        source = {"base": str(base)} if form == "adapter" else {}
        assert load_predictor(str(folder), recipe, "cpu", 6, **source).predict(examples) == answers_of(
            learned
        )
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    ).merge_and_unload()
    for (name, merged), (_, added) in zip(plain.named_parameters(), adapted.named_parameters(), strict=True):
        torch.testing.assert_close(merged, added, atol=1e-5, rtol=1e-4, msg=name)
