"""The command `analyze`: where a model keeps its knowledge, or where a run's updates lie."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llava_keeplora.cli.arguments import add_command, numbers, words
from llava_keeplora.run_folder import IDENTITY

#: Arguments that are for the analysis of a model alone, not of a run.
ANALYZE_MODEL = (
    "general",
    "specific",
    "energies",
    "examples",
    "batch_size",
    "dtype",
    "revision",
    "data_root",
)


def add_analyze(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `analyze` and return its parser."""
    parser = add_command(
        commands,
        "analyze",
        "analyze where a model keeps its knowledge, or where a run's updates lie",
        run_analyze,
    )
    parser.add_argument(
        "model",
        metavar="MODEL|RUN",
        help="an embedded model, a folder or a Hub id; or a run folder, which needs no tasks",
    )
    parser.add_argument("--into", required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--general", type=words, metavar="TASK,...", help="tasks of general knowledge, names or YAML files"
    )
    parser.add_argument("--specific", type=words, metavar="TASK,...", help="tasks of specific knowledge")
    parser.add_argument(
        "--energies",
        type=numbers,
        metavar="P,...",
        help="shares of the weights' energy in the principal part (default: 0.2,0.4,0.6,0.8,0.9,0.95)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        help="most examples of each task's test split, evenly spaced (default: 500)",
    )
    parser.add_argument("--batch-size", type=int, help="examples per forward pass (default: 128)")
    parser.add_argument("--dtype", help="the model's dtype (default: float32)")
    parser.add_argument("--revision", help="the model's revision on the Hub")
    parser.add_argument("--data-root", help="the folder with the data sets")
    return parser


def run_analyze(args: argparse.Namespace) -> None:
    """Write the analysis of a model or a run and print its table.

    Raises:
        ConfigError: options of a model are given for a run.
    """
    import transformers

    from llava_keeplora.errors import ConfigError

    transformers.utils.logging.disable_progress_bar()
    options = {name: value for name in ANALYZE_MODEL if (value := getattr(args, name)) is not None}
    if not (Path(args.model) / IDENTITY).is_file():
        table = _analyze_model(args.model, args.into, options)
    elif options:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise ConfigError(
            f"{args.model} is a run, whose updates are measured without tasks and options of a model "
            f"({names})",
            "leave them out, or name the run's model",
        )
    else:
        table = _analyze_run(args.model, args.into)
    sys.stdout.write(f"{table}\nfolder: {args.into}\n")


def _analyze_model(name_or_path: str, into: str, options: dict[str, Any]) -> str:
    from llava_keeplora import analysis
    from llava_keeplora.config import EvaluationConfig, ModelConfig

    def select(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    groups = {name: options.get(name, ()) for name in ("general", "specific")}
    with analysis.output_folder(into) as folder:
        knowledge = analysis.analyze_model(
            ModelConfig(name_or_path, **select("revision", "dtype")),
            groups,
            evaluation=EvaluationConfig(**select("batch_size")),
            **select("energies", "examples", "data_root"),
        )
        analysis.write_knowledge(knowledge, folder)
    return analysis.knowledge_table(knowledge)


def _analyze_run(run: str, into: str) -> str:
    from llava_keeplora import analysis

    with analysis.output_folder(into) as folder:
        updates = analysis.analyze_run(run)
        analysis.write_updates(Path(run), updates, folder)
    return analysis.updates_table(updates)
