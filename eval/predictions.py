"""Predictions on disk: one appended JSON line per example, so that a killed run loses at most one line."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.files import sync_folder, write_atomic
from llava_keeplora_eval.interruption import finishing
from llava_keeplora_recipes import TaskData
from llava_keeplora_recipes.strict_json import decode_text, parse_json

if TYPE_CHECKING:
    from llava_keeplora_eval.predictors import Predictor  # needs torch, which reading predictions doesn't

log = logging.getLogger(__name__)

#: Keys of a line that identify the data that it was predicted for.
SOURCE = {"recipe", "version", "fingerprint"}
KEYS = {"id", "text"} | SOURCE
#: Key of a line with a hash of everything else that the answer depends on, such as the model; a file next to
#: the answers has it in full, see `maker_path`.
MADE_BY = "made_by"
#: Key of a line whose answer was routed: the name of the task of which what was learned answered, null for
#: the untouched model. See `Predictor`.
ROUTED_TO = "routed_to"
#: Keys that not every line has.
OPTIONAL = {MADE_BY, ROUTED_TO}


def read_predictions(path: str | Path, data: TaskData) -> dict[str, str]:
    """Read the predictions made so far for one task and split.

    A killed process may leave a last line without its line end: it is logged and ignored, so that its
    example is predicted again.

    Args:
        path: the JSONL file; a missing file has no predictions.
        data: the task and split that the predictions are for.

    Returns:
        id → predicted text, in the order of the file.

    Raises:
        EvalError: a line is no prediction, or is one for another recipe, version or data; an id is repeated
            or not in the data; or lines were made by different models.
    """
    return {key: record["text"] for key, record in _read_records(Path(path), data).items()}


def count_routes(path: str | Path, data: TaskData) -> dict[str, Any] | None:
    """Count what answered the examples of a task and split, where the answers were routed.

    Args, Raises:
        see `read_predictions`.

    Returns:
        `tasks`, name → examples answered with what was learned of that task, and `base`, those of the
        untouched model; None if no answer was routed.
    """
    records = _read_records(Path(path), data).values()
    routes = Counter(record[ROUTED_TO] for record in records if ROUTED_TO in record)
    return (
        {"tasks": {name: routes[name] for name in routes if name}, "base": routes[None]} if routes else None
    )


def _read_records(path: Path, data: TaskData) -> dict[str, dict[str, Any]]:
    """Return id → line, in the order of the file; see `read_predictions`."""
    if not path.exists():
        return {}
    lines, torn = _complete_lines(path)
    if torn:
        log.warning("%s ends in the middle of a line (%d bytes): its example is predicted again", path, torn)
    records = [_record(path, number, line) for number, line in enumerate(lines, start=1)]
    for number, record in enumerate(records, start=1):
        check_source(path, number, record, data)
    _check_ids(path, [record["id"] for record in records], data)
    makers = [record.get(MADE_BY) for record in records]
    other = next((number for number, maker in enumerate(makers, start=1) if maker != makers[0]), None)
    if other is not None:
        raise EvalError(
            f"line {other} of {path} was made by another model or with other settings than line 1",
            "score answers of one model in one file",
        )
    return {record["id"]: record for record in records}


def predict_to_file(
    predictor: Predictor,
    data: TaskData,
    path: str | Path,
    batch_size: int = 64,
    sync_every: int = 1000,
    advance: Callable[[int], object] | None = None,
    shard: tuple[int, int] = (0, 1),
    rounds: Callable[[int], int] | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> int:
    """Predict every example that is missing in a file, and append each batch when it is done.

    Each of several processes writes its share to a file of its own, without waiting for the others;
    `join_shards` merges these files when all are done.

    Args:
        predictor: the model that answers.
        data: the task and split.
        path: the JSONL file; created with its folder if it is missing, else continued.
        batch_size: examples per call of the predictor.
        sync_every: number of lines after which the file is forced to disk; it is at the end as well.
        advance: called with the number of examples of each batch, for a progress bar; without it, a bar is
            shown when the work takes over two seconds.
        shard: (rank of this process, number of processes).
        rounds: function from this process's number of batches to the largest one of all processes, for a
            predictor that needs all processes at once (weights in shards).
        made_by: what the answers depend on besides the data, as plain data: it is written next to the file,
            and its hash to each line. None if the caller records it, as a run does.

    Returns:
        How many examples were predicted now.

    Raises:
        EvalError: the file has answers for other data (see ``read_predictions``) or of another model, or the
            predictor does not return one text per example.
    """
    path, missing, source = _begin_share(Path(path), data, shard, made_by)
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    turns = rounds(len(batches)) if rounds else len(batches)
    title = f"predict {data.recipe.name}"
    with (
        open(path, "a", encoding="utf-8", newline="\n") as file,
        tqdm(total=len(missing), desc=title, delay=2, disable=True if advance else None) as bar,
    ):
        _append(
            file,
            predictor,
            data,
            [*batches, *[[]] * (turns - len(batches))],
            source,
            sync_every,
            advance or bar.update,
        )
    sync_folder(path.parent)
    return len(missing)


def _begin_share(
    path: Path, data: TaskData, shard: tuple[int, int], made_by: Mapping[str, Any] | None
) -> tuple[Path, list[int], dict[str, Any]]:
    """Return a process's file, the rows that it still has to predict, and the source keys of its lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rank, world = shard
    done = _read_shards(path, data)
    source = {
        "recipe": data.recipe.name,
        "version": data.recipe.version,
        "fingerprint": data.fingerprint,
        **_record_maker(path, made_by),
    }
    # Shares are by position in the data, not among the missing examples: processes may read the shards at
    # different times.
    ids = data.ids
    missing = [row for row in range(rank, len(data), world) if ids[row] not in done]
    if world > 1:
        path = _shard(path, rank)
    _drop_torn_line(path)
    return path, missing, source


def _append(
    file: TextIO,
    predictor: Predictor,
    data: TaskData,
    batches: Sequence[Sequence[int]],
    source: Mapping[str, Any],
    sync_every: int,
    advance: Callable[[int], object],
) -> None:
    """Predict batches of rows and append their lines; an empty batch is a call without an effect on the file.

    Such calls keep processes in step whose predictor needs all of them at once.
    """
    unsynced = 0
    for rows in batches:
        if not rows:
            predictor.predict([data[0]])
            continue
        examples = [data[index] for index in rows]
        texts = _checked(predictor.predict(examples), examples)
        routes = [{ROUTED_TO: name} for name in getattr(predictor, ROUTED_TO, ())] or [{}] * len(examples)
        lines = (
            json.dumps({"id": example.id, "text": text, **route, **source}, ensure_ascii=False) + "\n"
            for example, text, route in zip(examples, texts, routes, strict=True)
        )
        with finishing():
            file.write("".join(lines))
            file.flush()
        unsynced += len(examples)
        if unsynced >= sync_every:
            os.fsync(file.fileno())
            unsynced = 0
        advance(len(examples))
    file.flush()
    os.fsync(file.fileno())


def join_shards(path: str | Path, data: TaskData) -> None:
    """Merge the files of several processes into one, in the order of the data, and remove them.

    Args:
        path: the file as it was given to `predict_to_file`.
        data: the task and split.
    """
    path = Path(path)
    shards = _shards(path)
    if not shards:
        return
    records = _read_shards(path, data)
    _recorded_maker(path)  # The shards must have one maker.
    lines = [json.dumps(records[key], ensure_ascii=False) + "\n" for key in data.ids if key in records]
    write_atomic(path, "".join(lines))
    for shard in shards:
        shard.unlink()


def maker_path(path: str | Path) -> Path:
    """Return the path of the file that records what a file of answers depends on besides the data.

    It is `answers.made_by.json` for `answers.jsonl`.
    """
    return Path(path).with_suffix(f".{MADE_BY}.json")


def _record_maker(path: Path, made_by: Mapping[str, Any] | None) -> dict[str, str]:
    """Check that a file's answers were made by the same model and settings, and record these.

    Returns:
        the key `MADE_BY` of each line; empty without `made_by`.

    Raises:
        EvalError: the file has answers that something else made.
    """
    maker = (
        {}
        if not made_by
        else {MADE_BY: hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]}
    )
    if _recorded_maker(path, maker.get(MADE_BY)) != maker.get(MADE_BY):
        raise EvalError(
            f"{path} holds answers {_difference(path, made_by)}",
            "predict into a new file, or remove this one",
        )
    if maker:
        write_atomic(maker_path(path), json.dumps(made_by, indent=1, sort_keys=True) + "\n")
    return maker


def _recorded_maker(path: Path, otherwise: str | None = None) -> str | None:
    """Return `MADE_BY` of the first line of a file and its shards.

    Args:
        path: the file.
        otherwise: the result if none of them has a line.

    Raises:
        EvalError: two of these files have different values.
    """
    makers = {}
    for file in (*_shards(path), path):
        lines = _complete_lines(file)[0] if file.exists() else []
        if lines:
            makers[file] = _record(file, 1, lines[0]).get(MADE_BY)
    if len(set(makers.values())) > 1:
        raise EvalError(
            f"{path} and its shards hold answers of two models or settings",
            f"remove {', '.join(file.name for file in makers)}, and predict again",
        )
    return next(iter(makers.values()), otherwise)


def _difference(path: Path, made_by: Mapping[str, Any] | None) -> str:
    """Return how the recorded maker of a file differs from another one, as the end of a sentence."""
    try:
        before = json.loads(maker_path(path).read_text(encoding="utf-8"))
        changed = [
            key
            for key in sorted(before.keys() | (made_by or {}).keys())
            if before.get(key) != (made_by or {}).get(key)
        ]
    except (OSError, ValueError, AttributeError, RecursionError):
        return "of which no record says what made them" if made_by else "of another model or other settings"
    return f"that were made otherwise ({', '.join(changed)} differ)"


def _shard(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.shard-{rank}.jsonl")


def _shards(path: Path) -> list[Path]:
    """Return the files of all processes that work, or worked, on a file of answers."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.shard-*.jsonl"))


def _read_shards(path: Path, data: TaskData) -> dict[str, dict[str, Any]]:
    """Return id → line of the predictions made so far, in the file and in those of single processes."""
    records: dict[str, dict[str, Any]] = {}
    for file in (*_shards(path), path):
        records |= _read_records(file, data)
    return records


def first_ids(ids: list[str], limit: int = 3) -> str:
    """Return a count and the first few ids, for messages: ``7 ids (a, b, c, ...)``."""
    names = ", ".join(key if len(key) <= 60 else f"{key[:60]}..." for key in ids[:limit])
    names += ", ..." if len(ids) > limit else ""
    return f"{len(ids)} id{'s' if len(ids) != 1 else ''} ({names})"


def _complete_lines(path: Path) -> tuple[list[bytes], int]:
    """Return the lines that have their line end, and the number of bytes after the last line end."""
    *lines, rest = path.read_bytes().split(b"\n")
    return lines, len(rest)


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    _, torn = _complete_lines(path)
    if torn:
        os.truncate(path, path.stat().st_size - torn)


def _record(path: Path, number: int, line: bytes) -> dict:
    try:
        record = parse_json(decode_text(line))
    except ValueError:
        record = None
    texts = (
        isinstance(record, dict)
        and all(isinstance(record.get(key, ""), str) for key in ("id", "text", MADE_BY))
        and isinstance(record.get(ROUTED_TO), str | None)
    )
    if not texts or record.keys() - OPTIONAL != KEYS:
        raise EvalError(
            f"line {number} of {path} is not a prediction with the keys {', '.join(sorted(KEYS))}",
            "remove that line, and its example is predicted again",
        )
    return record


def check_source(path: Path, number: int, record: dict, data: TaskData) -> None:
    """Refuse a line that was predicted for another recipe, version or data.

    Raises:
        EvalError: naming the line and the key that differs.
    """
    expected = {"recipe": data.recipe.name, "version": data.recipe.version, "fingerprint": data.fingerprint}
    for key, value in expected.items():
        if record[key] != value:
            raise EvalError(
                f"line {number} of {path} was predicted for {key} {record[key]}, and the data has {key} "
                f"{value}",
                "predict into a new file, or score with the recipe, split and data that it was made for",
            )


def _check_ids(path: Path, ids: list[str], data: TaskData) -> None:
    repeated = [key for key, count in Counter(ids).items() if count > 1]
    if repeated:
        raise EvalError(
            f"{path} has more than one prediction for {first_ids(repeated)}",
            "remove the lines that don't belong",
        )
    known = set(data.ids)
    unknown = [key for key in ids if key not in known]
    if unknown:
        raise EvalError(
            f"{path} has predictions for {first_ids(unknown)} that {data.recipe.name} ({data.split}) doesn't "
            "have",
            "check the task, the split and the data root, or predict into a new file",
        )


def _checked(texts: list[str], examples: list) -> list[str]:
    if len(texts) != len(examples):
        raise EvalError(
            f"the predictor gave {len(texts)} texts for {len(examples)} examples",
            "return one text per example, in order",
        )
    for text, example in zip(texts, examples):
        if not isinstance(text, str):
            raise EvalError(
                f"the predictor gave {type(text).__name__} for example {example.id}",
                "return text, empty if need be",
            )
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise EvalError(
                f"the predictor gave half a character, {ascii(text)[:60]}, for example {example.id}",
                "decode the answer as a whole, with errors='replace'",
            )
    return texts
