"""Pre-train an embedded model: seeded recipes for a CPU, each under three quarters of an hour.

    # train, save and evaluate
    python scripts/pretrain_tiny.py --model tiny-clip --data-root DATA
    # the same; a killed run resumes from SCRATCH
    python scripts/pretrain_tiny.py --model tiny-llava --data-root DATA --work SCRATCH
    python scripts/pretrain_tiny.py --model tiny-qwen --data-root DATA --work SCRATCH
    # print the zero-shot table
    python scripts/pretrain_tiny.py --model tiny-llava --data-root DATA --evaluate-only

The models see only `pretrain` splits: those of the rendered tasks and those of the small real sets under
`--data-root`. Everything that decides the result is written to `pretrain.json` next to the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pretraining import clip, llava, qwen, zero_shot

ASSETS = Path(__file__).parents[1] / "llava_keeplora" / "assets"
#: Name → how it is pre-trained, and how it is evaluated.
MODELS = {
    "tiny-clip": (clip.pretrain, clip.evaluate),
    "tiny-llava": (llava.pretrain, zero_shot.evaluate),
    "tiny-qwen": (qwen.pretrain, zero_shot.evaluate),
}
SETTINGS = {
    "tiny-clip": dict(steps=1200, batch=160, lr=1e-3, vocabulary=1400, bf16=False),
    "tiny-llava": dict(steps=2000, batch=32, lr=1.2e-3, vocabulary=1400, bf16=True),
    "tiny-qwen": dict(steps=2000, batch=32, lr=1.2e-3, vocabulary=1400, bf16=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="tiny-clip")
    parser.add_argument("--data-root", type=Path, required=True, help="folder with the small real sets")
    parser.add_argument("--out", type=Path, help="by default the model's folder in the package")
    parser.add_argument(
        "--work", type=Path, help="where a model that answers keeps what a killed run resumes from"
    )
    parser.add_argument(
        "--clip",
        type=Path,
        default=ASSETS / "tiny-clip",
        help="the CLIP whose image encoder tiny-llava starts from and tiny-qwen's learns from",
    )
    parser.add_argument("--evaluate-only", action="store_true")
    for name in ("steps", "batch", "vocabulary"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch's threads; by default as many as it chooses")
    args = parser.parse_args()
    for name, value in SETTINGS[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or ASSETS / args.model
    if args.threads:
        torch.set_num_threads(args.threads)
    pretrain, evaluate = MODELS[args.model]
    if args.evaluate_only:
        evaluate(args.out, args.data_root)
    else:
        pretrain(args)


if __name__ == "__main__":
    main()
