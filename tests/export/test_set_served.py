"""A set of adapters as somebody serves it: in a process of its own, by plain transformers and PEFT."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from llava_keeplora.adapters import load_deltas
from llava_keeplora.export import export_set

#: What somebody who serves a set runs, without this package.
PLAIN_PEFT = """
import sys
sys.modules["llava_keeplora"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
base, folder, *names = sys.argv[1:]
model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder, adapter_name=names[0], subfolder=names[0])
[model.load_adapter(folder, name, subfolder=name) for name in names[1:]]
inputs, logits = load_file("inputs.safetensors"), {}
for name in [*names, *reversed(names)]:
    model.set_adapter(name)
    with torch.no_grad():
        found = model.eval()(**inputs).logits_per_image
    assert name not in logits or torch.equal(found, logits[name])
    logits[name] = found
save_file({name: value.contiguous() for name, value in logits.items()}, "logits.safetensors")
"""


@pytest.mark.slow
def test_in_a_fresh_process_with_plain_peft_every_stage_is_the_base_with_its_sum(
    finished, tiny_clip, tmp_path
):
    done = export_set(
        finished("clip"), tmp_path / "set", base_id="you/base"
    )  # Verified in a process of its own.
    names = [member.name for member in done.members]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(4, 3, 16, 16, generator=generator),
        "input_ids": torch.randint(1, 20, (3, 6), generator=generator),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    save_file(inputs, tmp_path / "inputs.safetensors")
    command = [sys.executable, "-c", PLAIN_PEFT, str(tiny_clip), str(tmp_path / "set"), *names]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = load_file(tmp_path / "logits.safetensors")
    tasks = [load_deltas(p) for p in sorted(finished("clip").glob("keeplora/task-*/delta.safetensors"))]
    for count, name in enumerate(names, 1):
        model = CLIPModel.from_pretrained(tiny_clip, dtype=torch.float64)
        with torch.no_grad():
            for layer, delta in (item for task in tasks[:count] for item in task.items()):
                model.get_submodule(layer).weight += delta.scale * delta.B.double() @ delta.A.double()
            expected = model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
        torch.testing.assert_close(
            found[name].double(),
            expected.logits_per_image,
            atol=1e-4,
            rtol=1e-5,
            msg=lambda m: f"{name}: {m}",
        )
