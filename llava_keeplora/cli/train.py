"""Commands that add tasks to a run: `train`, `extend`, `adopt`, `fork`."""

from __future__ import annotations

import argparse
import sys
import tempfile

from llava_keeplora.cli.arguments import add_command, add_methods, add_run_arguments, add_settings
from llava_keeplora.cli.run_sequence import load_run_config, prepared_process, print_summary
from llava_keeplora.errors import ConfigError

#: Help of the overrides of a run that exists.
OF_THE_MACHINE = (
    "dotted overrides of settings that depend on the machine, for instance evaluation.batch_size=8"
)


def add_train(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `train` and return its parser."""
    parser = add_command(commands, "train", "run a task sequence, or resume one", run_train)
    add_train_arguments(parser)
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train`, which scripts/train_seq.py takes too."""
    add_run_arguments(parser)
    add_methods(parser)
    parser.add_argument("--output-dir", help="the run folder (output_dir)")
    # The DeepSpeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.set_defaults(run=run_train, resumes=True)


def add_extend(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `extend` and return its parser."""
    parser = add_command(commands, "extend", "train one more task in a run", run_extend)
    parser.add_argument(
        "run_folder",
        metavar="RUN|CHECKPOINT",
        help="the run folder, whose tasks are all learned; with --into, a checkpoint whose knowledge is kept",
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--task", metavar="NAME|FILE.yaml", help="the new task")
    task.add_argument(
        "--retry", metavar="TASK", help="a task of the run that its guard rolled back, to learn once more"
    )
    parser.add_argument(
        "--into", metavar="RUN", help="the run folder to create, where a checkpoint is extended"
    )
    parser.add_argument(
        "--epochs",
        dest="num_train_epochs",
        type=float,
        help="epochs of the new task (default: as for every other)",
    )
    parser.add_argument(
        "--learning-rate", type=float, help="learning rate of the new task (default: as for every other)"
    )
    add_settings(parser, OF_THE_MACHINE)
    return parser


def add_adopt(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `adopt` and return its parser."""
    parser = add_command(
        commands,
        "adopt",
        "make an adapter or a merged checkpoint that was trained elsewhere a task of a run",
        run_adopt,
        resumes=True,
    )
    parser.add_argument(
        "source",
        metavar="ADAPTER|CHECKPOINT",
        help="a PEFT LoRA adapter or a merged checkpoint of the run's base: folder or USER/NAME[@REVISION]",
    )
    parser.add_argument("--into", required=True, metavar="RUN", help="the run folder")
    parser.add_argument("--task", required=True, metavar="NAME|FILE.yaml", help="the task that it learned")
    add_settings(parser, OF_THE_MACHINE)
    return parser


def add_fork(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `fork` and return its parser."""
    parser = add_command(
        commands,
        "fork",
        "copy the first tasks of a run into a new one, to try another continuation",
        run_fork,
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run folder, which stays as it is")
    parser.add_argument(
        "--at-task", type=int, required=True, metavar="N", help="the last task of the new run, counted from 1"
    )
    parser.add_argument("--into", required=True, metavar="DIR", help="a new folder")
    return parser


def run_train(args: argparse.Namespace) -> int:
    """Run or resume the sequence of a configuration."""
    config = load_run_config(args, output_dir=args.output_dir)
    with prepared_process() as Run:
        run = Run(config)
        return print_summary(run, run.train())


def run_extend(args: argparse.Namespace) -> int:
    """Train one more task in a run folder, or a first one on a checkpoint."""
    if args.into and args.retry:
        raise ConfigError("--retry is of a run, which --into begins", "leave --into out")
    if args.into:
        return extend_checkpoint(args)
    with prepared_process() as Run:
        run = Run.open(args.run_folder, overrides=args.overrides, data_root=args.data_root)
        training = {"num_train_epochs": args.num_train_epochs, "learning_rate": args.learning_rate}
        scores = run.retry(args.retry, **training) if args.retry else run.extend(args.task, **training)
        return print_summary(run, scores, run.tasks[-1])


def extend_checkpoint(args: argparse.Namespace) -> int:
    """Train a task on a checkpoint in a new run, which protects what the checkpoint's weights know."""
    with prepared_process() as Run:
        from llava_keeplora.adopt.new_run import new_run

        given = {"num_train_epochs": args.num_train_epochs, "learning_rate": args.learning_rate}
        training = [f"training.{key}={value}" for key, value in given.items() if value is not None]
        config = new_run(
            args.run_folder,
            args.task,
            args.into,
            overrides=[*training, *args.overrides],
            data_root=args.data_root,
        )
        run = Run(config)
        return print_summary(run, run.train())


def add_start_adapter(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `start-adapter` and return its parser."""
    parser = add_command(
        commands,
        "start-adapter",
        "write a PEFT adapter with KeepLoRA's A, for a trainer of your own; `adopt` takes it back",
        run_start_adapter,
    )
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--model", help="the model whose knowledge is kept: a folder or an id on the Hub")
    origin.add_argument("--run", dest="run_folder", help="a run folder, whose tasks are kept as well")
    parser.add_argument("--task", required=True, metavar="NAME|FILE.yaml", help="the task to be trained")
    parser.add_argument("--into", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--method", help="the method's label, where the run has several")
    add_settings(parser, "dotted overrides, for instance parts.language.rank=32")
    return parser


def run_start_adapter(args: argparse.Namespace) -> None:
    """Write an adapter that another trainer begins with."""
    with prepared_process(), tempfile.TemporaryDirectory() as folder:
        from llava_keeplora.adopt.new_run import new_run
        from llava_keeplora.saved_run import extended
        from llava_keeplora.sequence.launch import processes
        from llava_keeplora.sequence.start_adapter import write_start_adapter

        settings = {"overrides": args.overrides, "data_root": args.data_root}
        config = (
            extended(args.run_folder, args.task, **settings)
            if args.run_folder
            else new_run(args.model, args.task, f"{folder}/run", **settings)
        )
        with processes(config):
            started = write_start_adapter(config, args.into, args.method)
    sys.stdout.write(
        f"{started.folder}: a LoRA on {started.layers} layers of {started.base}; freeze every lora_A, see "
        "its README.md\n"
    )


def run_adopt(args: argparse.Namespace) -> int:
    """Make an update that was trained elsewhere a task of a run."""
    with prepared_process() as Run:
        run = Run.open(args.into, overrides=args.overrides, data_root=args.data_root)
        scores = run.adopt(args.source, args.task)
        return print_summary(run, scores, run.tasks[-1])


def run_fork(args: argparse.Namespace) -> None:
    """Copy the first tasks of a run into a new folder."""
    from llava_keeplora.sequence.fork import fork

    config = fork(args.run_folder, args.at_task, args.into)
    sys.stdout.write(
        f"{args.into}: the first {len(config.tasks)} tasks of {args.run_folder}\ngo on with: llava-keeplora "
        f"extend {args.into} --task NAME|FILE.yaml\n"
    )
