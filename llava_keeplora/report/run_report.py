"""Reports of run folders: read the results of one or several runs, and write their report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llava_keeplora.errors import RunError
from llava_keeplora.files import whole_folder, write_bytes
from llava_keeplora.guard.verdicts import read_marks
from llava_keeplora.journal import Journal, learned_later, rolled_back
from llava_keeplora.registries import METHODS
from llava_keeplora.report.adopted import adopted_lines
from llava_keeplora.report.capacity import layer_lines
from llava_keeplora.report.overlap import overlap
from llava_keeplora.report.resources import read_needs
from llava_keeplora.report.results import CapacityStages, Cost, LayerLines, Trial
from llava_keeplora.report.tables import bounds_first
from llava_keeplora.report.verdict import verdict_html
from llava_keeplora.report.watched import read_watched, watched_examples
from llava_keeplora.report.write_report import DOCUMENTS, write_report
from llava_keeplora.run_folder import (
    ASIDE,
    CAPACITY,
    CONFIG,
    CONSOLIDATED,
    DELTA,
    FORECAST,
    JOURNAL,
    MATRIX,
    PREPARED,
    SCORES,
    TRAIN,
    Capacity,
    Stage,
    journal_files,
    read_dumped,
    read_record,
    task_files,
    task_folder,
)
from llava_keeplora.saved_run import read_identity, recorded_base
from llava_keeplora_eval import Matrix
from llava_keeplora_eval.content import TENSORS
from llava_keeplora_eval.files import file_hash

ZERO_SHOT = "zero-shot"
#: File with the version and the hashes of the files from which a run's report was made.
STAMP = ".report"
#: Files of a method's stages that the report reads.
READ = (SCORES, PREPARED, TRAIN, CONSOLIDATED, DELTA)
#: Sections of a configuration that the page shows, as well as the methods; `config.json` has the rest.
SECTIONS = ("seed", "sequence", "model", "parts", "training", "data")


def write_run_report(*runs: str | Path, into: str | Path | None = None) -> dict[str, list[Trial]]:
    """Write the tables, plots and HTML page of a run, or of several side by side.

    Runs of a method that differ in their seeds alone are one row, mean ± sd; runs with other settings get a
    row each, named after the run.

    Args:
        runs: the run folders.
        into: the folder to write to; a single run's own when None.

    Returns:
        name → trials, one per seed, zero-shot first.

    Raises:
        RunError: a folder has no matrix, runs can't be compared, or there are several and `into` is None.
    """
    folders = [Path(run) for run in runs]
    if into is None and len(folders) > 1:
        raise RunError(
            f"the report of {len(folders)} runs belongs to none of their folders", "add --into DIR"
        )
    results = read_side_by_side(folders)
    title = f"Run {folders[0].resolve().name}" if len(folders) == 1 else f"{len(folders)} runs side by side"
    adopted = adopted_by(folders)
    head = verdict_html(folders[0]) if len(folders) == 1 else ""
    with whole_folder(folders[0] if into is None else into, replace=False) as tmp_dir:
        write_report(tmp_dir, title, results, rows_of(results) | settings_of(folders) | adopted, head)
    if into is None:
        write_bytes(folders[0] / STAMP, _stamp(folders[0]))
    return results


def report_is_current(run: Path) -> bool:
    """Return whether the report in a run's folder is complete and was made from its present stages."""
    complete = all((run / name).is_file() for name in (STAMP, *DOCUMENTS.values()))
    return complete and (run / STAMP).read_bytes() == _stamp(run)


def _stamp(run: Path) -> bytes:
    """Return the content of `STAMP` for the present stages of a run."""
    files = [run / CONFIG, *journal_files(run)]
    return "\n".join(
        [version("llava-keeplora"), *(f"{path.relative_to(run)} {file_hash(path)}" for path in files)]
    ).encode()


def read_side_by_side(folders: Sequence[Path]) -> dict[str, list[Trial]]:
    """Read the results of several run folders by name; see `side_by_side`.

    Raises:
        RunError: a folder has no matrix, or runs can't be compared.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError("a run is named twice", "name every run once")
    matrices = {folder: read_results(folder) for folder in folders}
    _check_comparable(matrices)
    results = side_by_side(matrices)
    return {name: results[name] for name in bounds_first(results)}


def side_by_side(runs: Mapping[Path, Mapping[str, Matrix]]) -> dict[str, list[Trial]]:
    """Return name → trials, one per seed.

    A name is a method's label, followed by the first run's name where runs have different settings for that
    label.

    Args:
        runs: run folder → label → matrix.

    Raises:
        RunError: two runs have the same settings and the same seed.
    """
    groups: dict[tuple[str, str], dict[int, Path]] = {}
    bases = {folder: recorded_base(folder) for folder in runs}
    # Weights are compared by their tensors where every run has recorded these, else by their files.
    other = "weights" if all(TENSORS in (base or {}) for base in bases.values()) else TENSORS
    bases = {folder: base and {k: v for k, v in base.items() if k != other} for folder, base in bases.items()}
    for folder, matrices in runs.items():
        identity = read_identity(folder)
        if all(bases.values()):
            # Copies of one model may be in several folders, and the files of one folder may have changed
            # between two runs, so models are compared by content.
            identity |= {"model": identity["model"] | {"name_or_path": bases[folder], "revision": None}}
        seed = identity["seed"]
        for label in matrices:
            seeds = groups.setdefault((label, settings_key(identity, label)), {})
            if label == ZERO_SHOT and seeds:
                continue  # It is not random: another seed has the same scores.
            if seed in seeds:
                raise RunError(
                    f"{seeds[seed]} and {folder} hold '{label}' with the same settings and the same seed "
                    f"{seed}, which are no two samples",
                    "name one of them",
                )
            seeds[seed] = folder
    labels, names = [label for label, _ in groups], names_of(runs)
    results = {}
    for (label, _), seeds in sorted(groups.items(), key=lambda item: labels.index(item[0][0])):
        name = label if labels.count(label) == 1 else f"{label} ({names[next(iter(seeds.values()))]})"
        results[name] = [
            read_trial(folder / label, runs[folder][label], seed, names[folder])
            for seed, folder in sorted(seeds.items())
        ]
    return results


def settings_key(identity: Mapping[str, Any], label: str) -> str:
    """Return the settings that a method's result depends on, without the seed, as a comparable string.

    A setting that is null counts as one that is not there, as older versions left out what they did not have.
    """
    keys = ["tasks", "model", "data", "evaluation", *["guard"] * (label != ZERO_SHOT)]
    settings = [*(identity.get(key) for key in keys), identity["methods"].get(label)]
    return json.dumps(_without_null(settings), sort_keys=True)


def _without_null(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _without_null(value) for key, value in tree.items() if value is not None}
    return [_without_null(value) for value in tree] if isinstance(tree, list) else tree


def names_of(folders: Iterable[Path]) -> dict[Path, str]:
    """Return a name for each run: its folder's, with as many parent folders as make the names unique."""
    parts = {folder: folder.resolve().parts for folder in folders}
    depth = 1
    deepest = max(map(len, parts.values()), default=0)
    while len({names[-depth:] for names in parts.values()}) < len(parts) and depth < deepest:
        depth += 1
    return {folder: "/".join(names[-depth:]) for folder, names in parts.items()}


def _check_comparable(runs: Mapping[Path, Mapping[str, Matrix]]) -> None:
    """Raise RunError unless all runs score the same tasks, in the same order, on the same examples."""
    first, *others = runs
    tasks = next(iter(runs[first].values())).tasks
    examples = examples_of(first) | watched_examples(first, list(runs[first]), tasks)
    for other in others:
        other_tasks = next(iter(runs[other].values())).tasks
        if other_tasks != tasks:
            raise RunError(
                f"{first} and {other} have different tasks ({', '.join(tasks)} against "
                f"{', '.join(other_tasks)}), "
                "so their numbers can't stand side by side",
                "report them apart",
            )
        scores = examples_of(other) | watched_examples(other, list(runs[other]), tasks)
        for task, scored in scores.items():
            if examples.get(task, scored) != scored:
                raise RunError(
                    f"{first} and {other} score task '{task}' on different examples or by different metrics",
                    "report them apart",
                )


def examples_of(run: Path) -> dict[str, tuple]:
    """Return task → fingerprint of its examples and its metric, from the zero-shot row."""
    path = run / ZERO_SHOT / task_folder(0, "base") / SCORES
    scores = read_record(path) if path.exists() else {}
    return {
        task: tuple(score.get(key) for key in ("fingerprint", "metric", "metric_version", "metric_source"))
        for task, score in scores.items()
    }


def rows_of(results: Mapping[str, Sequence[Trial]]) -> dict[str, str]:
    """Return the runs that each row of the report is made from; empty for a report of one run."""
    runs = {trial.run for trials in results.values() for trial in trials}
    rows = {
        name: ", ".join(f"{trial.run} (seed {trial.seed})" for trial in trials)
        for name, trials in results.items()
    }
    return {f"row {name}": text for name, text in rows.items()} if len(runs) > 1 else {}


def adopted_by(folders: Sequence[Path]) -> dict[str, str]:
    """Return what the page says of tasks that were adopted: method and task → a sentence."""
    lines = [
        line
        for folder in folders
        for label in read_dumped(folder)["methods"]
        for line in adopted_lines(label, folder / label)
    ]
    return {f"adopted ({number})": line for number, line in enumerate(lines, start=1)}


def settings_of(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the settings that the page shows, one entry per run where they differ between runs."""
    configs = {name: read_dumped(folder) for folder, name in names_of(folders).items()}
    for config in configs.values():
        config["methods"] = {
            label: {"method": METHODS.portable_name(m["method"]), **m["options"]}
            for label, m in config["methods"].items()
        }
    settings: dict[str, Any] = {}
    for key in (*SECTIONS, "methods"):
        values = {name: config.get(key) for name, config in configs.items()}
        equal = all(value == next(iter(values.values())) for value in values.values())
        settings |= (
            {key: next(iter(values.values()))}
            if equal
            else {f"{key} ({name})": value for name, value in values.items()}
        )
    return settings


# --- one folder ------------------------------------------------------------------------------------


def read_results(run: Path) -> dict[str, Matrix]:
    """Return label → matrix of every method of a run, zero-shot first, then in the configuration's order.

    Raises:
        RunError: the run has no matrix yet, or a file that the report reads was damaged.
    """
    labels = [ZERO_SHOT, *read_dumped(run)["methods"]]
    matrices = {
        label: Matrix.from_json(run / label / MATRIX)
        for label in dict.fromkeys(labels)
        if (run / label / MATRIX).exists()
    }
    if not matrices:
        raise RunError(f"{run} holds no matrix yet", "run its training first")
    for label in matrices:
        Journal(run / label / JOURNAL).verify(READ)
    return matrices


def read_trial(folder: Path, matrix: Matrix, seed: int, run: str) -> Trial:
    """Read all results from a method's folder."""
    entries = Journal(folder / JOURNAL).entries
    gone, later = rolled_back(entries), learned_later(entries)
    tasks = _folders(folder, matrix, gone)
    own = [
        path if place not in later else folder / ASIDE for place, path in enumerate(tasks.values(), start=1)
    ]
    capacity = read_capacity(folder)
    return Trial(
        matrix=matrix,
        seed=seed,
        run=run,
        folder=folder,
        capacity=capacity,
        captured=read_captured(folder, capacity),
        overlap=overlap([path / DELTA for path in own]),
        losses={name: losses for name, path in tasks.items() if (losses := read_losses(path / TRAIN))},
        costs=read_costs(folder),
        needs=read_needs(folder),
        scores=read_scores(folder, tasks, gone),
        rolled_back=gone,
        watched=read_watched(folder, matrix.tasks),
        marks=read_marks(folder, matrix.tasks),
    )


def _folders(folder: Path, matrix: Matrix, gone: Sequence[str]) -> dict[str, Path]:
    """Return task → its folder; of one that was rolled back (`gone`), a path where nothing is."""
    learned = [name for name in matrix.tasks if name not in gone]
    places = {name: task_folder(index, name) for index, name in enumerate(learned, start=1)}
    return {name: folder / places.get(name, ASIDE) for name in matrix.tasks}


def read_scores(
    folder: Path, tasks: Mapping[str, Path], gone: Sequence[str]
) -> list[Mapping[str, Mapping[str, Any]]]:
    """Read task → score of every stage that was scored: the base's, then after each task.

    After a task that was rolled back they are those of the stage before, as in the matrix.

    Args:
        folder: the method's folder.
        tasks: task → its folder, in order; see `_folders`.
        gone: names of the tasks that were rolled back.
    """
    stages: list[Mapping[str, Mapping[str, Any]]] = []
    for name, place in {"": folder / task_folder(0, "base"), **tasks}.items():
        path = place / SCORES
        stages.append(stages[-1] if name in gone else read_record(path) if path.exists() else {})
    while stages and not stages[-1]:
        stages.pop()
    return stages


def read_capacity(folder: Path) -> CapacityStages:
    """Read one dict per stage, layer → {in, k, part}: the base first, then after each task.

    Empty for methods without a protected subspace.
    """
    stages = []
    for path in task_files(folder, CONSOLIDATED):
        capacity = read_record(path).get(CAPACITY)
        if capacity:
            stages.append(capacity)
    return stages


def room_line(name: str, folder: Path) -> str | None:
    """Return a sentence on how many more tasks a method has capacity for; None without a forecast."""
    paths = task_files(folder, CONSOLIDATED)
    last = read_record(paths[-1]) if paths else {}
    if FORECAST not in last:
        return None
    finite = [
        (forecast["tasks"], forecast["left"], layer)
        for layer, forecast in last[FORECAST].items()
        if forecast["tasks"] is not None
    ]
    if not finite:
        return f"room of {name}: no layer's protected subspace grows"
    tasks, left, layer = min(finite)
    growth, width = last[FORECAST][layer]["growth"], Capacity.from_dict(last[CAPACITY][layer]).width
    return (
        f"room of {name}: {tasks} more task{'' if tasks == 1 else 's'} at full rank, if each adds as many "
        "directions as those so far; "
        f"the first layer to fill is {layer}, {left} of {width} directions left, {growth:.1f} fewer a task"
    )


def read_captured(folder: Path, capacity: CapacityStages) -> LayerLines:
    """Read the share of each layer's residual gradient energy that its adapter holds, task by task."""
    parts = {name: Capacity.from_dict(size).part for stage in capacity for name, size in stage.items()}
    tasks = []
    for path in task_files(folder, PREPARED):
        gradient = read_record(path)["report"].get("gradient", {})
        tasks.append(
            {
                (parts.get(name, "layers"), name): numbers["captured"]
                for name, numbers in gradient.items()
                if "captured" in numbers
            }
        )
    return layer_lines(tasks)


def read_losses(path: Path) -> list[tuple[int, float]]:
    """Read (optimiser step, training loss) pairs as the Trainer logged them; empty before training."""
    history = read_record(path)["history"] if path.exists() else []
    return [(record["step"], record["loss"]) for record in history if "loss" in record]


def read_costs(folder: Path) -> dict[str, Cost]:
    """Read stage → its cost over all tasks, from the journal."""
    stages: dict[str, list] = {}
    for entry in Journal(folder / JOURNAL).history:
        if entry.stage not in (Stage.PLANNED, Stage.CLOSED):
            stages.setdefault(entry.stage, []).append(entry)
    costs = {}
    for stage, entries in stages.items():
        peaks = [
            (entry.info["peak_bytes"], entry.info.get("peak_of", ""))
            for entry in entries
            if "peak_bytes" in entry.info
        ]
        costs[stage] = Cost(sum(entry.seconds for entry in entries), *max(peaks, default=(None, "")))
    return costs
