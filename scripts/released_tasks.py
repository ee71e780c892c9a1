"""Start the authors' released KeepLoRA code, from a checkout of it, on the small CLIP.

    python scripts/released_tasks.py --code CHECKOUT/MTIL --model MODEL --output FOLDER \
        --tasks '[{"data": "FOLDER", "classes": ["glass"], "prompt": "a photo of {}."}]'

The checkout is https://github.com/MaolinLuo/KeepLoRA, and needs torchvision, continuum, yacs, ftfy and regex.
Its own functions train, keep and score; what they lack is given to them here: the weights in the layout of
OpenAI's CLIP, class prompts in the model's vocabulary, images of the model's size. It prints the seconds of
processor time of every stage as JSON. `scripts/bench_whole.py --released CHECKOUT/MTIL` runs it.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path


def seconds():
    """Return the processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def state_of(model):
    """Return the weights of a `transformers.CLIPModel` in the layout of OpenAI's CLIP.

    One token is added, a copy of the end of a text with the highest id, where OpenAI's CLIP looks for it.
    """
    import torch

    vision, text = model.vision_model, model.text_model
    words = text.embeddings.token_embedding.weight
    state = {
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight,
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.proj": model.visual_projection.weight.T,
        "token_embedding.weight": torch.cat([words, words[model.config.text_config.eos_token_id][None]]),
        "positional_embedding": text.embeddings.position_embedding.weight,
        "text_projection": model.text_projection.weight.T,
        "logit_scale": model.logit_scale,
    }
    norms = {
        "visual.ln_pre": vision.pre_layrnorm,
        "visual.ln_post": vision.post_layernorm,
        "ln_final": text.final_layer_norm,
    }
    for prefix, layers in (
        ("visual.transformer", vision.encoder.layers),
        ("transformer", text.encoder.layers),
    ):
        for i, layer in enumerate(layers):
            block, attention = f"{prefix}.resblocks.{i}", layer.self_attn
            for kind in ("weight", "bias"):
                stacked = [attention.q_proj, attention.k_proj, attention.v_proj]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat([getattr(m, kind) for m in stacked])
            norms |= {
                f"{block}.attn.out_proj": attention.out_proj,
                f"{block}.ln_1": layer.layer_norm1,
                f"{block}.ln_2": layer.layer_norm2,
                f"{block}.mlp.c_fc": layer.mlp.fc1,
                f"{block}.mlp.c_proj": layer.mlp.fc2,
            }
    for name, module in norms.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def openai_clip(path):
    """Return the small CLIP as a model of the released code."""
    from clip.model import CLIP
    from transformers import CLIPModel

    source = CLIPModel.from_pretrained(path)
    vision, text = source.config.vision_config, source.config.text_config
    model = CLIP(
        source.config.projection_dim,
        vision.image_size,
        vision.num_hidden_layers,
        vision.hidden_size,
        vision.patch_size,
        text.max_position_embeddings,
        text.vocab_size + 1,
        text.hidden_size,
        text.hidden_size // 64,
        text.num_hidden_layers,
    )
    model.load_state_dict(state_of(source))
    # OpenAI's models have 64 numbers a head, which its constructor takes for granted.
    towers = (model.visual.transformer, vision), (model.transformer, text)
    for tower, config in towers:
        for block in tower.resblocks:
            block.attn.num_heads = config.num_attention_heads
    return model.eval()


def patch(path):
    """Give the released code the model's weights and its vocabulary."""
    import model.customClip as custom
    import torch
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, text = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path).text_config

    def tokenize(prompt):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int)
        ids[ids == text.eos_token_id] = text.vocab_size
        return torch.nn.functional.pad(ids, (0, text.max_position_embeddings - ids.shape[1]))

    custom.clip.tokenize = tokenize
    custom._tokenizer = tokenizer
    # It imports the framework's other parts, which take the function by name.
    import trainer.framework4MTIL as framework

    framework.load_clip_to_cpu = custom.load_clip_to_cpu = lambda cfg, prec: openai_clip(path)
    return framework


def configuration(args, side):
    """Return the released configuration of the first order, with this run's size, rank and training."""
    from model.setup_cfg import setup_cfg

    shipped = Path(args.code, "configs", "keeplora_order1.yaml")
    cfg = setup_cfg(argparse.Namespace(config_path=str(shipped), gpu_id="0", opts=[]))
    cfg.prec, cfg.input_size, cfg.log_path = "fp32", (side, side), args.output
    cfg.tasks = [str(i) for i in range(len(args.tasks))]
    cfg.optim.batch_size, cfg.optim.lr = args.batch, args.rate
    cfg.optim.epoch_list = [args.epochs] * len(args.tasks)
    cfg.v_adapter_dim = cfg.t_adapter_dim = args.rank
    cfg.v_prin_subspace_threshold = cfg.t_prin_subspace_threshold = args.energy_feature
    cfg.v_prin_subspace_threshold2, cfg.t_prin_subspace_threshold2 = args.energy_weight
    return cfg


def load(tasks, path):
    """Return the tasks' images in the released code's form, preprocessed as the model asks."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(path).image_processor
    side = processor.size["height"]
    how = transforms.Compose(
        [
            lambda image: image.convert("RGB"),
            transforms.Resize((side, side), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    data = {
        split: [ImageFolder(os.path.join(task["data"], split), how) for task in tasks]
        for split in ("train", "test")
    }
    for task, split in zip(tasks, data["train"], strict=True):
        if split.classes != task["classes"]:
            sys.exit(f"the folders of {task['data']} are {split.classes}, and the classes {task['classes']}")
    return data, side


def timed(spent, *where):
    """Add the processor seconds of functions, given as (owner, name, stage), to `spent`."""

    def wrapped(function, stage):
        def call(*args, **kwargs):
            before = seconds()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] += seconds() - before

        return call

    for owner, name, stage in where:
        setattr(owner, name, wrapped(getattr(owner, name), stage))


def main():
    """Score the untouched model, learn the tasks with the released code, and print what each stage took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--code", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", type=json.loads, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--energy-weight", type=float, nargs=2, default=(0.85, 0.5))
    parser.add_argument("--energy-feature", type=float, default=0.95)
    args = parser.parse_args()
    sys.path.insert(0, args.code)
    os.makedirs(args.output, exist_ok=True)
    framework = patch(args.model)
    import torch
    from model import prin_subspace_helper
    from model.keeplora_helper import KeepLoRAHelper
    from model.prin_subspace import PrinSubspace

    data, side = load(args.tasks, args.model)
    cfg = configuration(args, side)
    torch.manual_seed(0)
    classes = [task["classes"] for task in args.tasks]
    prompts = [lambda name, prompt=task["prompt"]: prompt.format(name) for task in args.tasks]
    spent = defaultdict(float, start=seconds())
    stages = framework.Trainer
    timed(
        spent,
        (framework.Framework4MTIL, "evaluate_all", "scoring"),
        (stages, "estimate_gradient", "gradient"),
        (stages, "init_keeplora_with_grad", "A"),
        (stages, "train_one_task", "training"),
        (stages, "save_model", "weights"),
        (stages, "load_model", "weights"),
        (KeepLoRAHelper, "accumulate_features_for_task", "features"),
        (PrinSubspace, "update_prin_subspace", "bases"),
        (prin_subspace_helper, "get_accumulated_weight_matrix_list", "bases"),
    )
    stdout, sys.stdout = sys.stdout, sys.stderr
    cfg.zero_shot, before = True, seconds()
    zero_shot = framework.Framework4MTIL(cfg, classes, prompts)
    zero_shot.model.eval()
    zero_shot.train_and_evaluate(data)
    spent["zero-shot"] = seconds() - before
    first = json.loads(Path(zero_shot.metric_writer_path).read_text().splitlines()[-1])
    cfg.zero_shot = False
    trained = framework.Framework4MTIL(cfg, classes, prompts)
    trained.train_and_evaluate(data)
    rows = [json.loads(line) for line in Path(trained.metric_writer_path).read_text().splitlines()]
    matrix = [row["acc_per_task"] for row in rows if "acc_per_task" in row]
    sys.stdout = stdout
    spent["training"] -= spent["gradient"] + spent["A"]
    spent["other"] = seconds() - sum(spent.values())
    print(
        json.dumps({"zero_shot": first["acc_per_task"], "last": matrix[-1], "stages": spent}, sort_keys=True)
    )


if __name__ == "__main__":
    main()
