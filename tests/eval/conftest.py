"""Fakes of a recipe and its data, a tiny random CLIP, and predictors that remember what they were asked."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

CLASSES = ["cat", "dog", "red bird"]


@dataclass
class FakeExample:
    id: str
    image: Image.Image
    question: str
    answers: list[str]
    label: int


@dataclass
class FakeRecipe:
    name: str = "pets"
    version: int = 1
    classes: list[str] = field(default_factory=lambda: list(CLASSES))
    metric: str = "accuracy"
    kind: str = "classification"

    @property
    def prompts(self) -> list[str]:
        return [f"a photo of a {name}." for name in self.classes]


@dataclass
class FakeData:
    """Ten little images; the label of example i is i % 3."""

    recipe: FakeRecipe = field(default_factory=FakeRecipe)
    split: str = "test"
    fingerprint: str = "f00d"
    count: int = 10
    dropped: list[str] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        return [f"pet-{i}" for i in range(self.count)]

    @property
    def labels(self) -> list[int]:
        return [i % len(self.recipe.classes) for i in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> FakeExample:
        label = self.labels[index]
        picture = Image.new("RGB", (40, 30), (25 * index, 40, 255 - 25 * index))
        return FakeExample(self.ids[index], picture, "What is it?", [self.recipe.classes[label]], label)


class Recorder:
    """Answers every example rightly, remembers the ids, and can be killed after so many calls."""

    def __init__(self, die_after: int | None = None):
        self.asked: list[str] = []
        self.calls = 0
        self.die_after = die_after

    def predict(self, examples):
        if self.calls == self.die_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.asked += [example.id for example in examples]
        return [example.answers[0] for example in examples]


@pytest.fixture
def data():
    return FakeData()


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture
def fake_data():
    return FakeData


@pytest.fixture
def fake_recipe():
    return FakeRecipe


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A random CLIP of a few thousand weights with a word-level tokenizer, saved as a checkpoint folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "photo", "of", "cat", "dog", "red", "bird", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=16,
    )
    width = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = CLIPConfig(
        text_config=dict(
            **width, **special, vocab_size=len(words), max_position_embeddings=16, projection_dim=8
        ),
        vision_config=dict(**width, image_size=16, patch_size=8, projection_dim=8),
        projection_dim=8,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-clip")
    CLIPModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of published numbers; tests that need it are skipped where it is not."""
    default = Path(__file__).resolve().parents[3] / "shared" / "parity"
    folder = Path(os.environ.get("LLAVA_KEEPLORA_PARITY", default))
    if not (folder / "mtil_matrices.npz").exists():
        pytest.skip("no parity folder; set LLAVA_KEEPLORA_PARITY")
    return folder
