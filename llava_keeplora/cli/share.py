"""Commands that exchange results with others: `export`, `import`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from llava_keeplora.cli.arguments import add_command
from llava_keeplora.cli.run_sequence import prepared_process, print_summary

if TYPE_CHECKING:
    from llava_keeplora.export import AdapterSet, Exported


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
        choices=("adapter", "set", "merged", "state"),
        required=True,
        help="adapter: a PEFT LoRA of the base; set: one for every task, to switch between; merged: base and "
        "updates in one checkpoint; state: what `import` needs to go on",
    )
    parser.add_argument(
        "--into", metavar="DIR", help="a new folder, or an earlier export's (default: RUN/export/FORM)"
    )
    parser.add_argument("--method", help="the method's label, where the run has several")
    parser.add_argument(
        "--at-task", type=int, metavar="T", help="the model after task T (default: the last finished one)"
    )
    _add_shapes(parser)
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


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that shape an adapter or a set."""
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
        "--each",
        choices=("stage", "task"),
        help="adapters of a set: the model after each task, or each task's own update (default: stage)",
    )
    parser.add_argument(
        "--loss",
        type=float,
        metavar="E",
        help="the largest relative Frobenius error of a layer in a set (default: 0, exact)",
    )
    parser.add_argument(
        "--no-state",
        action="store_true",
        help="write an adapter or a set without the state that `import` needs",
    )


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
    parser.add_argument(
        "--task",
        metavar="NAME|FILE.yaml",
        help="what an adapter or merged checkpoint without a state learned: the run's first task",
    )
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
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="dotted overrides of the new run's settings, with --task",
    )
    return parser


def run_export(args: argparse.Namespace) -> None:
    """Write an export, verify it, and push it if `--push` and `--yes` are given."""
    import transformers

    from llava_keeplora.export.hub import check_repo_id, contents, push

    transformers.utils.logging.disable_progress_bar()
    if args.push:
        check_repo_id(args.push)
    export = _exported(args)
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


def _exported(args: argparse.Namespace) -> AdapterSet | Exported:
    """Write the export that the arguments ask for; options of another form are refused."""
    from llava_keeplora.errors import ConfigError
    from llava_keeplora.run import Run

    shapes = {"set": ("each", "loss"), "adapter": ("rank",), "merged": ("dtype",)}
    for form, options in shapes.items():
        for option in options:
            if form != args.form and getattr(args, option) is not None:
                raise ConfigError(
                    f"--{option} shapes the form {form}, and the form is {args.form}",
                    f"leave it out, or export --as {form}",
                )
    shaped = {option: getattr(args, option) for options in shapes.values() for option in options}
    return Run.open(args.run_folder).export(
        args.form,
        args.into,
        label=args.method,
        at_task=args.at_task,
        parts=args.parts and args.parts.split(","),
        with_state=not args.no_state,
        base_id=args.base_id,
        name=args.push,
        examples=args.examples,
        data_root=args.data_root,
        **{option: value for option, value in shaped.items() if value is not None},
    )


def run_import(args: argparse.Namespace) -> None:
    """Create a run folder from a published adapter or state."""
    if args.task:
        return _import_plain(args)
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


def _import_plain(args: argparse.Namespace) -> None:
    """Create a run whose first task is an adapter or a checkpoint that comes without a state."""
    with prepared_process() as Run:
        from llava_keeplora.adopt.new_run import adopting_run

        source = f"{args.source}@{args.revision}" if args.revision else args.source
        config = adopting_run(
            source, args.task, args.into, base=args.base, overrides=args.overrides, data_root=args.data_root
        )
        run = Run(config)
        print_summary(run, run.train())
