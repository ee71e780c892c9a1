"""The command `guard`: the verdict on two checkpoints or adapters that were made elsewhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_keeplora.cli.arguments import add_command
from llava_keeplora.cli.run_sequence import without_collection


def add_guard(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `guard` and return its parser."""
    parser = add_command(
        commands,
        "guard",
        "judge a tuned checkpoint or adapter against its base on recipes that it must not get worse at",
        run_guard,
        resumes=True,
    )
    model = "a folder with a checkpoint or an adapter, or an id on the Hub"
    parser.add_argument("--base", required=True, help=f"the model before: {model}")
    parser.add_argument("--tuned", required=True, help=f"the model after: {model}")
    parser.add_argument(
        "--watch",
        required=True,
        nargs="+",
        metavar="NAME|FILE.yaml",
        help="the recipes, whose test is answered",
    )
    parser.add_argument(
        "--max-drop", type=float, default=1.0, metavar="POINTS", help="largest accepted drop (default: 1.0)"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="of all limits together (default: 0.95)"
    )
    parser.add_argument("--into", default="guard", metavar="DIR", help="folder of answers and verdict")
    parser.add_argument(
        "--summary", metavar="FILE.md", help="write the verdict as Markdown, for a pull request"
    )
    parser.add_argument("--data-root", help="the folder with the data sets")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per forward pass (default: 64)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="most tokens of an answer (default: 128)"
    )
    return parser


def run_guard(args: argparse.Namespace) -> int:
    """Print the verdict on two models and return its exit code."""
    with without_collection():
        from llava_keeplora.config.guard import DropLimit
        from llava_keeplora.guard import DONT_SHIP, verdict_lines
        from llava_keeplora.guard.checkpoints import Comparison, append_step_summary, compare_checkpoints
        from llava_keeplora.guard.text import verdict_markdown

    DropLimit(args.max_drop)
    given = Comparison(
        args.base,
        args.tuned,
        args.max_drop,
        args.confidence,
        Path(args.into),
        args.data_root,
        args.batch_size,
        args.max_new_tokens,
    )
    verdict = compare_checkpoints(given, args.watch)
    text = verdict_markdown(verdict)
    append_step_summary(text)
    if args.summary:
        Path(args.summary).write_text(text, encoding="utf-8")
    sys.stdout.write("\n".join(verdict_lines(verdict)) + "\n")
    return 0 if verdict["ship"] else DONT_SHIP
