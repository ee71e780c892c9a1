"""Small models of other kinds than the driver's: a text model and a classifier of vectors."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_keeplora import KeepLora


def make_text_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def text_batches(seed: int, count: int = 3, size: int = 4, length: int = 10) -> list[dict[str, torch.Tensor]]:
    """Sequences of several lengths, padded on the right; labels are the tokens themselves."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 40, (size, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (size,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()
        ids = ids * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


class Classifier(nn.Module):
    """Two linear layers around a norm, with no `config` and no `forward(**batch)` that returns a loss."""

    def __init__(self, width: int = 12, classes: int = 5):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 16))
        self.head = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


def make_classifier(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier()


def vector_batches(seed: int, count: int = 3, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, 12, generator=generator)  # Features of few directions, as real ones have.
    return [
        (
            torch.randn(size, 4, generator=generator) @ mixing
            + 0.01 * torch.randn(size, 12, generator=generator),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def vector_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y), len(y)


def train(model: nn.Module, batches, loss=None, steps: int = 6, lr: float = 0.05) -> None:
    """A bare loop."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        batch = batches[step % len(batches)]
        value = model(**batch).loss if loss is None else loss(model, batch)[0]
        value.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def learned_classifier():
    """A classifier's memory after two tasks, with the weights before each and after the last."""
    model = make_classifier()
    memory = KeepLora(model, targets=["0", "3", "head"], rank=2, energy_weight=0.5, energy_feature=0.9)
    weights = [{name: layer.module.weight.detach().clone() for name, layer in memory.layers.items()}]
    bases = [{name: basis.clone() for name, basis in memory.method.bases.items()}]
    for seed in (1, 2):
        batches = vector_batches(seed)
        train(memory.begin_task(batches, vector_loss), batches, vector_loss)
        memory.end_task(batches)
        weights.append({name: layer.module.weight.detach().clone() for name, layer in memory.layers.items()})
        bases.append({name: basis.clone() for name, basis in memory.method.bases.items()})
    return memory, weights, bases
