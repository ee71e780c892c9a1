"""The fresh process that loads an export again; `verify.py` starts it.

It uses the ordinary loaders of transformers and PEFT and the models' own forward passes; only a state is
loaded by this package, because no other program reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from llava_keeplora.config import ModelConfig
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.files import write_json, write_tensors
from llava_keeplora.models import open_model


def main() -> None:
    """Load the export that `job.json` names, in every way that is supported, and write what comes of it.

    The working folder has `job.json` and `batch.safetensors`, and gets `logits.safetensors` and `layers.json`
    (the number of adapted layers).
    """
    job = json.loads(Path("job.json").read_text())
    batch = load_file("batch.safetensors")
    logits, layers = {}, {}
    for way, model in _loaded(job):
        layers[way] = _adapted_layers(model)
        logits[way] = plain_logits(model, batch)
        if way == "float32":
            logits["bfloat16"] = plain_logits(model.to(torch.bfloat16), batch)
        del model
    write_tensors(Path("logits.safetensors"), logits)
    write_json(Path("layers.json"), layers)


def _loaded(job: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (way of loading, model in fp32); the logits of `float32` are those that the card reports.

    A set's ways are the names of its adapters.
    """
    folder, auto = job["folder"], getattr(transformers, job["auto_class"])
    if job["form"] == "state":
        learned = load_learned_run(folder)
        # A state names plug-ins without their places, which are known here.
        settings = dict(learned.config["methods"][learned.label])
        settings["method"] = job["method"] or settings["method"]
        named = {
            "model": {**learned.config["model"], **job["opened_by"]},
            "methods": {**learned.config["methods"], learned.label: settings},
        }
        yield "float32", replace(learned, config={**learned.config, **named}).load("float32").model
    elif job["form"] == "merged":
        _ = open_model(ModelConfig(folder, **job["opened_by"])).processor  # type: ignore[attr-defined]  # Read when asked for.
        yield "float32", auto.from_pretrained(folder, dtype=torch.float32).eval()
    elif job["form"] == "set":
        yield from _switched(job)
    else:
        # The base is not bound to a name, so that it is freed before the next model is loaded.
        yield (
            "float32",
            PeftModel.from_pretrained(
                auto.from_pretrained(job["base"], revision=job["revision"], dtype=torch.float32), folder
            ).eval(),
        )
        yield "by the folder alone", auto.from_pretrained(folder, dtype=torch.float32).eval()


def _switched(job: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (adapter's name, base with that adapter alone); the one before is removed from memory."""
    base = getattr(transformers, job["auto_class"]).from_pretrained(
        job["base"], revision=job["revision"], dtype=torch.float32
    )
    first, *others = job["adapters"]
    model = PeftModel.from_pretrained(base, job["folder"], adapter_name=first, subfolder=first).eval()
    yield first, model
    for before, name in zip(job["adapters"], others):
        model.load_adapter(job["folder"], name, subfolder=name)
        model.set_adapter(name)
        model.delete_adapter(before)
        yield name, model.eval()


def _adapted_layers(model: nn.Module) -> int:
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return sum(any(name in layer.lora_A for name in layer.active_adapters) for layer in layers)


@torch.no_grad()
def plain_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return a probe's logits by the model's own forward pass, in fp32.

    Args:
        model: a model of transformers or PEFT.
        batch: see `probe`.
    """
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value for key, value in batch.items()
    }
    labels, rows = inputs.pop("labels"), inputs.pop("image_rows", None)
    out = model(**inputs)
    if rows is None:
        return out.logits_per_image.float()
    return out.logits[:, :-1][labels[:, 1:] >= 0].float()


if __name__ == "__main__":
    main()
