"""Commands that exchange results with others: `export`, `import`."""

from __future__ import annotations

import argparse
import sys

from llava_keeplora.cli.arguments import add_command


def add_export(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `export` and return its parser."""
    parser = add_command(
        commands,
        "export",
        "write a run's result as an adapter, a checkpoint or a state, and push it",
        run_export,
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run folder")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("adapter", "merged", "state"),
        required=True,
        help="adapter: a PEFT LoRA of the base; merged: base and updates in one checkpoint; state: what "
        "`import` needs to go on",
    )
    parser.add_argument(
        "--into", metavar="DIR", help="a new folder, or an earlier export's (default: RUN/export/FORM)"
    )
    parser.add_argument("--method", help="the method's label, where the run has several")
    parser.add_argument(
        "--at-task", type=int, metavar="T", help="the model after task T (default: the last finished one)"
    )
    parser.add_argument(
        "--parts",
        metavar="PART,...",
        help="parts of the model in an adapter, for instance language (default: all trained ones)",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="compress an adapter to rank R (default: exact, the sum of the tasks' ranks)",
    )
    parser.add_argument(
        "--no-state", action="store_true", help="write an adapter without the state that `import` needs"
    )
    parser.add_argument(
        "--base-id",
        metavar="USER/NAME[@REVISION]",
        help="the base's name on the Hub, if the run loaded it from a folder",
    )
    parser.add_argument("--dtype", help="dtype of a merged checkpoint (default: the base's own)")
    parser.add_argument(
        "--examples", type=int, default=8, help="test examples on which logits are compared (default: 8)"
    )
    parser.add_argument("--data-root", help="the folder with the data sets (data.root)")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="list what would go to the Hub; with --yes, upload it"
    )
    parser.add_argument("--yes", action="store_true", help="push for real")
    return parser


def add_import(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `import` and return its parser."""
    parser = add_command(
        commands,
        "import",
        "create a run folder from a published adapter or state, to continue it",
        run_import,
    )
    parser.add_argument("source", metavar="ADAPTER", help="a folder, or an id on the Hub")
    parser.add_argument("--into", required=True, metavar="RUN", help="the run folder to create")
    parser.add_argument("--revision", help="revision of the Hub's repository")
    parser.add_argument(
        "--base", metavar="DIR", help="folder of the base model (default: the base's id on the Hub)"
    )
    parser.add_argument("--data-root", help="the folder with the data sets (data.root)")
    parser.add_argument(
        "--allow-plugin",
        action="store_true",
        help="allow plug-ins that the state names, as they are installed here, to be executed",
    )
    return parser


def run_export(args: argparse.Namespace) -> None:
    """Write an export, verify it, and push it if `--push` and `--yes` are given."""
    import transformers

    from llava_keeplora.export.hub import check_repo_id, contents, push
    from llava_keeplora.run import Run

    transformers.utils.logging.disable_progress_bar()
    if args.push:
        check_repo_id(args.push)
    export = Run.open(args.run_folder).export(
        args.form,
        args.into,
        label=args.method,
        at_task=args.at_task,
        parts=args.parts and args.parts.split(","),
        rank=args.rank,
        with_state=not args.no_state,
        base_id=args.base_id,
        name=args.push,
        dtype=args.dtype,
        examples=args.examples,
        data_root=args.data_root,
    )
    sys.stdout.write(export.describe())
    if args.push and args.yes:
        sys.stdout.write(f"pushed to {push(export.folder, args.push)}\n")
    elif args.push:
        sizes = contents(export.folder)
        listed = "".join(f"  {size / 1e6:10.3f} MB  {name}\n" for name, size in sizes.items())
        sys.stdout.write(
            f"{args.push} would get {len(sizes)} files, {sum(sizes.values()) / 1e6:.3f} MB; nothing is "
            f"pushed without --yes\n{listed}"
        )


def run_import(args: argparse.Namespace) -> None:
    """Create a run folder from a published adapter or state."""
    from llava_keeplora.export import import_state

    config = import_state(
        args.source,
        args.into,
        revision=args.revision,
        base=args.base,
        data_root=args.data_root,
        allow_plugin=args.allow_plugin,
    )
    sys.stdout.write(
        f"{args.into} goes on from what was published; `llava-keeplora train --config {config}` trains what "
        "is left of its tasks, "
        f"`llava-keeplora extend {args.into} --task NAME` another one\n"
    )
