"""`llava-keeplora`: train a sequence, plan for it, report on a run, list what there is."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llava_keeplora.run_folder import IDENTITY
from llava_keeplora_eval.guard import check_words, guarded, standard_streams

if TYPE_CHECKING:
    from llava_keeplora.compare import Table, TableResult
    from llava_keeplora.config import RunConfig
    from llava_keeplora_eval import Matrix

#: What `analyze` takes for a model alone.
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (2 for what a user can repair)."""
    with standard_streams():
        parser = build_parser()
        args = parse_arguments(parser, argv)
        if not hasattr(args, "run"):
            parser.print_help()
            return 2
        return guarded(lambda: args.run(args), debug=args.debug, going_on=going_on(args))
    return 0  # Nobody reads what is left to say.


def going_on(args: argparse.Namespace) -> str:
    """What a person who stopped a command is told."""
    return (
        "every finished stage is kept, run the same command to go on"
        if args.run in (_train, _reproduce, _compare, _ablate)
        else "run the same command again"
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser of `llava-keeplora`."""
    parser = argparse.ArgumentParser(prog="llava-keeplora", description=__doc__.split(":", 1)[1].strip())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    train = commands.add_parser("train", help="run a task sequence, or go on with one")
    add_train_arguments(train)
    reproduce = commands.add_parser(
        "reproduce", help="run a configuration and compare with what was published for it"
    )
    reproduce.add_argument(
        "config",
        metavar="NAME|FILE.yaml",
        help="a shipped configuration, for instance mtil-order1, or a YAML file with `expected`",
    )
    add_settings(reproduce)
    add_methods(reproduce)
    reproduce.add_argument("--output-dir", help="the run folder (output_dir)")
    reproduce.set_defaults(run=_reproduce)
    comparing = commands.add_parser(
        "compare", help="run methods × seeds × orders of tasks, or go on with them, and make the table"
    )
    add_run_arguments(comparing)
    add_methods(comparing)
    add_table_arguments(comparing)
    comparing.set_defaults(run=_compare)
    ablate = commands.add_parser(
        "ablate", help="take KeepLoRA's parts away one at a time, sweep its thresholds, and make the table"
    )
    add_run_arguments(ablate)
    add_table_arguments(ablate)
    ablate.add_argument(
        "--energy-weights",
        type=_numbers,
        metavar="E,...",
        help="ε_w of every part, in turn (default: 0.5,0.6,0.7,0.8,0.9; '' for none)",
    )
    ablate.add_argument(
        "--energy-features",
        type=_numbers,
        metavar="E,...",
        help="ε_f of every part, in turn (default: 0.9,0.95,0.99; '' for none)",
    )
    ablate.add_argument("--seeds", type=_wholes, metavar="S,...", help="(default: the configuration's)")
    ablate.set_defaults(run=_ablate)
    plan = commands.add_parser(
        "plan", help="say what a run needs, memory, disk and steps, and whether that fits"
    )
    add_run_arguments(plan)
    add_methods(plan)
    plan.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="plan for so many GPUs, a process each (default: the CPU of this machine)",
    )
    plan.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="memory of each GPU (default: that of this machine's)"
    )
    plan.add_argument("--json", action="store_true", help="write the plan as JSON, in bytes")
    plan.set_defaults(run=_plan)
    extend = commands.add_parser("extend", help="let a run learn one more task")
    extend.add_argument("run_folder", metavar="RUN")
    extend.add_argument("--task", required=True, metavar="NAME|FILE.yaml", help="the new task")
    extend.add_argument(
        "--epochs", dest="num_train_epochs", type=float, help="of the new task (default: as for every other)"
    )
    extend.add_argument("--learning-rate", type=float, help="of the new task (default: as for every other)")
    extend.add_argument("--data-root", help="the folder with the data sets (data.root)")
    extend.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="dotted overrides of what another machine needs, for instance evaluation.batch_size=8",
    )
    extend.set_defaults(run=_extend)
    fork = commands.add_parser(
        "fork", help="copy the first tasks of a run into a new one, to try another continuation"
    )
    fork.add_argument("run_folder", metavar="RUN")
    fork.add_argument(
        "--at-task", type=int, required=True, metavar="N", help="the last task of the new run, counted from 1"
    )
    fork.add_argument("--into", required=True, metavar="DIR", help="a new folder")
    fork.set_defaults(run=_fork)
    report = commands.add_parser(
        "report", help="write the tables, pictures and page of a run, or of several side by side"
    )
    report.add_argument("run_folders", metavar="RUN", nargs="+")
    report.add_argument(
        "--into", metavar="DIR", help="the folder to write to (default: the run's own; several runs need one)"
    )
    report.set_defaults(run=_report)
    export = commands.add_parser(
        "export", help="write what a run learned as an adapter, a checkpoint or a state, and push it"
    )
    add_export_arguments(export)
    importing = commands.add_parser(
        "import", help="make a run folder of a published adapter or state, to go on with"
    )
    importing.add_argument("source", metavar="ADAPTER", help="a folder, or an id on the Hub")
    importing.add_argument("--into", required=True, metavar="RUN", help="the run folder to make")
    importing.add_argument("--revision", help="of the Hub's repository")
    importing.add_argument(
        "--base", metavar="DIR", help="where the base model lies here (default: its id on the Hub)"
    )
    importing.add_argument("--data-root", help="the folder with the data sets (data.root)")
    importing.add_argument(
        "--allow-plugin",
        action="store_true",
        help="import a method or family that the state names from what is installed here",
    )
    importing.set_defaults(run=_import)
    analyze = commands.add_parser(
        "analyze", help="say where a model keeps what it knows, or where a run's updates lie"
    )
    add_analyze_arguments(analyze)
    doctor = commands.add_parser("doctor", help="examine the machine, or every file of a run")
    doctor.add_argument("run_folder", nargs="?", metavar="RUN", help="a run folder (default: the machine)")
    doctor.set_defaults(run=_doctor)
    listing = commands.add_parser("list", help="list methods, tasks, sequences, configurations and models")
    listing.set_defaults(run=_list)
    for command in (
        train,
        reproduce,
        comparing,
        ablate,
        plan,
        extend,
        fork,
        report,
        export,
        importing,
        analyze,
        doctor,
        listing,
    ):
        command.add_argument(
            "--debug", action="store_true", help="show the traceback of an error, and more of what is done"
        )
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line whose overrides may stand before, between and after the options."""
    args, rest = parser.parse_known_args(check_words(parser, argv))
    unknown = rest if not hasattr(args, "overrides") else [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`, shared with scripts/train_seq.py."""
    add_run_arguments(parser)
    add_methods(parser)
    parser.add_argument("--output-dir", help="the run folder (output_dir)")
    # The DeepSpeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.set_defaults(run=_train)


def add_methods(parser: argparse.ArgumentParser) -> None:
    """The argument that keeps some of a configuration's methods."""
    parser.add_argument(
        "--methods",
        type=_labels,
        metavar="LABEL,...",
        help="of the configuration's methods, only these (default: all)",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a run."""
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a shipped configuration")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The arguments that change a configuration."""
    parser.add_argument("--data-root", help="the folder with the data sets (data.root)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="dotted overrides, for instance training.learning_rate=5e-4",
    )


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a table of many runs."""
    parser.add_argument("--output-dir", help="the table's folder (output_dir)")
    parser.add_argument(
        "--workers",
        type=_count,
        default=1,
        metavar="N",
        help="runs at a time; the cores are shared out, and each has one of several GPUs (default: 1)",
    )


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `export`."""
    parser.add_argument("run_folder", metavar="RUN")
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
        help="of an adapter, for instance language (default: all that were trained)",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="compress an adapter to rank R (default: exact, the tasks' ranks together)",
    )
    parser.add_argument("--no-state", action="store_true", help="leave out of an adapter what `import` needs")
    parser.add_argument(
        "--base-id",
        metavar="USER/NAME[@REVISION]",
        help="the base's name on the Hub, where the run took it from a folder",
    )
    parser.add_argument("--dtype", help="of a merged checkpoint (default: the base's own)")
    parser.add_argument(
        "--examples", type=int, default=8, help="test examples on which logits are compared (default: 8)"
    )
    parser.add_argument("--data-root", help="the folder with the data sets (data.root)")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="list what would go to the Hub; with --yes, upload it"
    )
    parser.add_argument("--yes", action="store_true", help="push for real")
    parser.set_defaults(run=_export)


def add_analyze_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `analyze`."""
    parser.add_argument(
        "model",
        metavar="MODEL|RUN",
        help="an embedded model, a folder or a Hub id; or a run folder, which needs no tasks",
    )
    parser.add_argument("--into", required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--general", type=_words, metavar="TASK,...", help="tasks of general knowledge, names or YAML files"
    )
    parser.add_argument("--specific", type=_words, metavar="TASK,...", help="tasks of specific knowledge")
    parser.add_argument(
        "--energies",
        type=_numbers,
        metavar="P,...",
        help="shares of the weights' energy to cut at (default: 0.2,0.4,0.6,0.8,0.9,0.95)",
    )
    parser.add_argument(
        "--examples", type=int, help="the most of each task's test split, evenly spaced (default: 500)"
    )
    parser.add_argument("--batch-size", type=int, help="examples per forward pass (default: 128)")
    parser.add_argument("--dtype", help="of the model (default: float32)")
    parser.add_argument("--revision", help="of the Hub's model")
    parser.add_argument("--data-root", help="the folder with the data sets")
    parser.set_defaults(run=_analyze)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _labels(text: str) -> list[str]:
    if not _words(text):
        raise argparse.ArgumentTypeError(f"'{text}' names no method; give labels, such as seq-lora,keeplora")
    return _words(text)


def _numbers(text: str) -> list[float]:
    return _each(float, text, "numbers; give some like 0.5,0.8")


def _wholes(text: str) -> list[int]:
    return _each(int, text, "whole numbers; give some like 0,1,2")


def _each(kind: Callable[[str], Any], text: str, what: str) -> list[Any]:
    try:
        return [kind(word) for word in _words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of {what}") from None


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of processes; give 1 or more")
    return int(text)


def _train(args: argparse.Namespace) -> None:
    _run(_configuration(args, output_dir=args.output_dir))


def _configuration(args: argparse.Namespace, **direct: Any) -> RunConfig:
    """Return the configuration that a command line names."""
    # Heavy imports wait until a command needs them, so that --help is quick.
    with _uncollected():
        from llava_keeplora.config import load_config

        return load_config(
            args.config, args.overrides, data_root=args.data_root, methods=args.methods, **direct
        )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import libraries without garbage collection.

    None of their objects is garbage, and looking at all of them again and again takes time.

    They are left out of later collections too; the Trainer makes one after every task.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _reproduce(args: argparse.Namespace) -> None:
    from llava_keeplora.errors import RunError
    from llava_keeplora.reproduce import check_expected, compare, comparison

    config = _configuration(args, output_dir=args.output_dir)
    check_expected(config)
    figures = compare(_run(config), config.expected)
    sys.stdout.write(f"\npublished and measured, in %\n{comparison(figures, config.expected)}")
    sys.stdout.flush()
    missed = [figure for figure in figures if not figure.met]
    if missed:
        raise RunError(
            f"{config.output_dir} misses {len(missed)} of {len(figures)} published figures by more than the "
            f"tolerance ({missed[0]})",
            f"check the data with `llava-keeplora-eval data check {config.sequence or config.tasks[0]}`, and "
            "what differs from the published settings",
        )


def _compare(args: argparse.Namespace) -> int:
    from llava_keeplora.compare import compare, load_table, write_table

    table = load_table(args.config, args.overrides, args.data_root, args.output_dir)
    outcome = compare(table, args.workers, args.methods)
    return _print_table(
        table, outcome, write_table(table, outcome) if outcome.results or outcome.tried else ""
    )


def _ablate(args: argparse.Namespace) -> int:
    from llava_keeplora.compare import compare, draw_ablation, load_ablation, write_table

    given = {"energy_weight": args.energy_weights, "energy_feature": args.energy_features}
    thresholds = {name: values for name, values in given.items() if values is not None}
    ablation = load_ablation(
        args.config, thresholds, args.seeds, args.overrides, args.data_root, args.output_dir
    )
    outcome = compare(ablation.table, args.workers)
    return _print_table(
        ablation.table,
        outcome,
        write_table(ablation.table, outcome, draw_ablation(ablation, outcome)) if outcome.results else "",
    )


def _print_table(table: Table, outcome: TableResult, text: str) -> int:
    """Print a table and where it lies, and name the runs that failed; returns the exit code."""
    if text:
        sys.stdout.write(
            f"{text}\nfolder: {table.output_dir}\ntable: {table.output_dir / 'table.md'}\npage: "
            f"{table.output_dir / 'report.html'}\n"
        )
        sys.stdout.flush()
    for failure in outcome.failures:
        sys.stderr.write(f"error: {failure}; mend it, and run the same command again\n")
    return 1 if outcome.failures else 0


def _extend(args: argparse.Namespace) -> None:
    from llava_keeplora.config import PER_TASK
    from llava_keeplora.saved_run import extended

    own = {argument: value for argument in PER_TASK if (value := getattr(args, argument)) is not None}
    _run(extended(args.run_folder, args.task, own, args.overrides, args.data_root))


def _fork(args: argparse.Namespace) -> None:
    from llava_keeplora.sequence.fork import fork

    config = fork(args.run_folder, args.at_task, args.into)
    sys.stdout.write(
        f"{args.into}: the first {len(config.tasks)} tasks of {args.run_folder}\ngo on with: llava-keeplora "
        f"extend {args.into} --task NAME|FILE.yaml\n"
    )


def _run(config: RunConfig) -> dict[str, Matrix]:
    """Run a sequence, or go on with one, and print its summary; returns label → matrix."""
    with _uncollected():
        import datasets
        import transformers

        from llava_keeplora.report.run_report import summary
        from llava_keeplora.sequence import run
        from llava_keeplora.sequence.launch import processes
        from llava_keeplora.sequence.launcher import stopped_with_launcher

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with stopped_with_launcher(), processes(config) as main_process:
        results = run(config)
        if main_process:
            sys.stdout.write(
                summary(config.output_dir, {label: [matrix] for label, matrix in results.items()})
            )
    return results


def _plan(args: argparse.Namespace) -> None:
    import dataclasses
    import json

    config = _configuration(args)
    with _uncollected():
        from llava_keeplora.errors import ConfigError
        from llava_keeplora.plan import describe, make_plan, refusal

    plan = make_plan(config, args.gpus, args.gpu_memory)
    sys.stdout.write(
        json.dumps(dataclasses.asdict(plan) | {"fits": plan.fits}, indent=1) + "\n"
        if args.json
        else describe(plan)
    )
    sys.stdout.flush()
    wrong = refusal(plan)
    if wrong is not None:
        raise ConfigError(*wrong)


def _report(args: argparse.Namespace) -> None:
    from llava_keeplora.report.run_report import summary, write_run_report

    results = write_run_report(*args.run_folders, into=args.into)
    sys.stdout.write(summary(args.into or args.run_folders[0], results))


def _export(args: argparse.Namespace) -> None:
    import transformers

    from llava_keeplora.export import export_run
    from llava_keeplora.export.hub import check_repo_id, contents, push

    transformers.utils.logging.disable_progress_bar()
    if args.push:
        check_repo_id(args.push)
    done = export_run(
        args.run_folder,
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
    sys.stdout.write(done.describe())
    if args.push and args.yes:
        sys.stdout.write(f"pushed to {push(done.folder, args.push)}\n")
    elif args.push:
        sizes = contents(done.folder)
        listed = "".join(f"  {size / 1e6:10.3f} MB  {name}\n" for name, size in sizes.items())
        sys.stdout.write(
            f"{args.push} would get {len(sizes)} files, {sum(sizes.values()) / 1e6:.3f} MB; nothing is "
            f"pushed without --yes\n{listed}"
        )


def _import(args: argparse.Namespace) -> None:
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


def _analyze(args: argparse.Namespace) -> None:
    from pathlib import Path

    import transformers

    from llava_keeplora import analysis
    from llava_keeplora.config import EvaluationConfig, ModelConfig
    from llava_keeplora.errors import ConfigError

    transformers.utils.logging.disable_progress_bar()
    given = {name: value for name in ANALYZE_MODEL if (value := getattr(args, name)) is not None}
    if not (Path(args.model) / IDENTITY).is_file():
        own = lambda *names: {name: given[name] for name in names if name in given}  # noqa: E731
        groups = {"general": given.get("general", ()), "specific": given.get("specific", ())}
        model, evaluation = (
            ModelConfig(args.model, **own("revision", "dtype")),
            EvaluationConfig(**own("batch_size")),
        )
        with analysis.output_folder(args.into) as folder:
            options = own("energies", "examples", "data_root")
            knowledge = analysis.analyze_model(model, groups, evaluation=evaluation, **options)
            analysis.write_knowledge(knowledge, folder)
        table = analysis.knowledge_table(knowledge)
    elif given:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{args.model} is a run, whose updates are measured without tasks and options of a model "
            f"({told})",
            "leave them out, or name the run's model",
        )
    else:
        with analysis.output_folder(args.into) as folder:
            updates = analysis.analyze_run(args.model)
            analysis.write_updates(Path(args.model), updates, folder)
        table = analysis.updates_table(updates)
    sys.stdout.write(f"{table}\nfolder: {args.into}\n")


def _doctor(args: argparse.Namespace) -> None:
    from llava_keeplora.doctor import examine_machine, examine_run
    from llava_keeplora.errors import RunError, UserError

    wrong = 0
    for found in examine_run(args.run_folder) if args.run_folder else examine_machine():
        wrong += isinstance(found, UserError)
        sys.stdout.write(f"{'wrong' if isinstance(found, UserError) else 'ok'}\t{found}\n")
    if wrong:
        raise RunError(
            f"{args.run_folder or 'this machine'} has {wrong} thing{'s' * (wrong > 1)} to repair",
            "each line with 'wrong' names its cure",
        )


def _list(args: argparse.Namespace) -> None:
    from llava_keeplora.config import list_configs, list_tables
    from llava_keeplora.methods import METHODS
    from llava_keeplora_eval.models import EMBEDDED
    from llava_keeplora_recipes import list_recipes, list_sequences

    lines = ["methods"]
    lines += [
        f"  {name:12} {m.info.title} {m.info.url}\n  {'':12} {m.info.needs}" for name, m in METHODS.items()
    ]
    listed = {
        "tasks": list_recipes(),
        "sequences": list_sequences(),
        "configurations": list_configs(),
        "tables": list_tables(),
        "embedded models": EMBEDDED,
    }
    for title, names in listed.items():
        lines += [title, *(f"  {name}" for name in names)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
