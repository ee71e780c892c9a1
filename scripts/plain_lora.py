"""One task by transformers' `Trainer` and PEFT alone: what a user would write without this project.

    python scripts/plain_lora.py --model MODEL --data FOLDER --classes cat dog --prompt "a photo of {}."

Trains LoRA on the attention of both encoders of a CLIP, scores it before and after, and writes the adapter.
`scripts/bench_whole.py` compares the time with that of `llava-keeplora train`, so nothing of this project is
imported here, and nothing is done twice: every image is decoded once and stays in memory.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoProcessor, CLIPModel, Trainer, TrainingArguments, set_seed


class Classifier(torch.nn.Module):
    """A CLIP that classifies images by one prompt a class.

    Args:
        model: with or without adapters.
        prompts: what the text encoder takes.
    """

    def __init__(self, model, prompts):
        super().__init__()
        self.model, self.prompts = model, prompts

    def text(self):
        """Return the classes' features, of length 1."""
        return normalize(self.model.get_text_features(**self.prompts).pooler_output, dim=-1)

    def logits(self, pixel_values, text):
        """Return the images' similarities to the classes, scaled."""
        image = normalize(self.model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)
        return self.model.logit_scale.exp() * image @ text.T

    def forward(self, pixel_values, labels):
        """Return loss and logits of a batch."""
        logits = self.logits(pixel_values, self.text())
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def load(folder, classes, processor):
    """Return the images of a folder with one folder a class, as the model takes them, and their labels."""
    files = [
        (path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())
    ]
    images = []
    for start in range(0, len(files), 256):
        batch = [Image.open(path).convert("RGB") for path, _ in files[start : start + 256]]
        images.append(processor.image_processor(images=batch, return_tensors="pt")["pixel_values"])
    return torch.cat(images), torch.tensor([label for _, label in files])


@torch.no_grad()
def accuracy(classifier, images, labels, batch=100):
    """Return the percentage of images whose class is the most similar."""
    classifier.eval()
    text = classifier.text()
    answers = [
        classifier.logits(images[i : i + batch], text).argmax(-1) for i in range(0, len(images), batch)
    ]
    return 100 * (torch.cat(answers) == labels).float().mean().item()


def main():
    """Score, train, score, and write the adapter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="holds train and test, each a folder a class"
    )
    parser.add_argument("--classes", nargs="+", required=True)
    parser.add_argument("--prompt", required=True, help="of a class, for {}")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    set_seed(0)
    processor = AutoProcessor.from_pretrained(args.model)
    model = CLIPModel.from_pretrained(args.model)
    train, test = (load(args.data / split, args.classes, processor) for split in ("train", "test"))
    texts = [args.prompt.format(name) for name in args.classes]
    classifier = Classifier(model, processor.tokenizer(texts, padding=True, return_tensors="pt"))
    zero_shot = accuracy(classifier, *test)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets)
    classifier.model = get_peft_model(model, lora).base_model.model
    trainer = Trainer(
        model=classifier,
        args=TrainingArguments(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            learning_rate=args.rate,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=torch.utils.data.TensorDataset(*train),
        data_collator=lambda batch: dict(
            zip(("pixel_values", "labels"), map(torch.stack, zip(*batch, strict=True)), strict=True)
        ),
    )
    trainer.train()
    torch.save(
        {n: p for n, p in model.named_parameters() if p.requires_grad}, Path(args.output, "adapter.pt")
    )
    print(json.dumps({"zero_shot": zero_shot, "last": accuracy(classifier, *test)}))


if __name__ == "__main__":
    main()
