"""Adapters that plain PEFT makes for the tiny CLIP, and a run to take them over."""

import pytest
import torch


@pytest.fixture(scope="session")
def peft_adapter(tiny_clip):
    """Function (folder, seed, **LoraConfig) → a folder of an adapter as PEFT saves it, with random A and B."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPModel

    def write(folder, seed=0, **settings):
        settings = {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"],
        } | settings
        model = get_peft_model(CLIPModel.from_pretrained(tiny_clip), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def peft_update(tiny_clip):
    """Function (adapter folder) → layer → ΔW in fp64, as PEFT merges it into fp64 weights."""
    from peft import PeftModel
    from transformers import CLIPModel

    def merge(folder):
        base = CLIPModel.from_pretrained(tiny_clip, dtype=torch.float64)
        before = {name: p.detach().clone() for name, p in base.named_parameters()}
        merged = PeftModel.from_pretrained(base, folder).double().merge_and_unload()
        changes = {name: p.detach() - before[name] for name, p in merged.named_parameters()}
        return {name.removesuffix(".weight"): c for name, c in changes.items() if bool(c.any())}

    return merge


@pytest.fixture(scope="session")
def one_task_run(run_config, driven, tmp_path_factory, tiny_tasks):
    """A folder with KeepLoRA on the first task; shared, so copy it."""
    return driven(
        run_config(
            tmp_path_factory.mktemp("one") / "run", tasks=[str(tiny_tasks[0])], methods={"keeplora": {}}
        )
    )
