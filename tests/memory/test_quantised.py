"""A memory of a base in NF4, whose weights stay in the form in which they were loaded."""

import bitsandbytes as bnb
import pytest
import torch
from tests.memory.conftest import text_batches, train
from transformers import LlamaConfig, LlamaForCausalLM

from llava_keeplora import KeepLora


def make_nf4_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            quantised = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                quant_type="nf4",
                compute_dtype=torch.float32,
            )
            quantised.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            model.model.set_submodule(name, quantised.to("cpu"))
    return model.eval()


@torch.no_grad()
def function_of(layer: torch.nn.Linear) -> torch.Tensor:
    """(out, in): what the layer computes."""
    return layer(torch.eye(layer.in_features)).T


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_tasks_on_an_nf4_base_act_as_their_adapters_did(tmp_path, evaluated_before):
    """bitsandbytes repacks weights in the first evaluation on some CPUs; expanded as they are, they are noise."""
    model, batches = make_nf4_model(), text_batches(1)
    if evaluated_before:
        model(**batches[0])
    memory = KeepLora(model, targets=["q_proj", "down_proj"], rank=2, energy_weight=0.5)
    layer = memory.layers["model.layers.0.self_attn.q_proj"].module
    vh = torch.linalg.svd(function_of(layer).double()).Vh
    basis = memory.method.bases["model.layers.0.self_attn.q_proj"].double()
    # The strongest direction is protected up to what the kernels round.
    assert float((basis.T @ vh[0]).norm()) > 0.99
    for _ in range(2):
        wrapper = memory.begin_task(batches)
        train(wrapper, batches)
        with torch.no_grad():
            expected = wrapper.eval()(**batches[0]).logits
        memory.end_task(batches)
        with torch.no_grad():
            assert torch.allclose(model.eval()(**batches[0]).logits, expected, atol=1e-5)
    if not evaluated_before:  # Repacking has rounded the scales.
        again = KeepLora.load(make_nf4_model(), memory.save(tmp_path / "memory"))
        with torch.no_grad():
            assert torch.allclose(again.model.eval()(**batches[0]).logits, expected, atol=1e-5)
