"""Predictions on disk: one JSON line per example id, appended, so that a killed run loses a line at most."""

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
from llava_keeplora_recipes.strict_json import decode_text, parse_json

if TYPE_CHECKING:
    from llava_keeplora_eval.predictors import Predictor
    from llava_keeplora_recipes import TaskData

log = logging.getLogger(__name__)

#: What a line says of the data that it was predicted for.
SOURCE = {"recipe", "version", "fingerprint"}
KEYS = {"id", "text"} | SOURCE
#: A hash of what the answer depends on beside the data; what that is stands in a file beside, see
#: `maker_path`.
MADE_BY = "made_by"


def read_predictions(path: str | Path, data: TaskData) -> dict[str, str]:
    """Read the predictions made so far for one task and split.

    A last line without its line end is what a killed writer leaves: it is reported in the log and left
    out, so that its example is predicted again.

    Args:
        path: the JSONL file; a missing file holds no predictions.
        data: the task and split that the predictions are for.

    Returns:
        The text of each predicted id, in file order.

    Raises:
        EvalError: a line that is no prediction, a prediction for another recipe, version or data, a
            duplicate id, an id that is not in the data.
    """
    path = Path(path)
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
    return {record["id"]: record["text"] for record in records}


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
    """Predict every example that the file doesn't hold yet, appending each batch as it is done.

    Of several processes each predicts its share into a file of its own, without waiting for the others; when
    all are done, `join_shards` makes one file of them.

    Args:
        predictor: what answers.
        data: the task and split.
        path: the JSONL file, created with its folder when missing, continued when there.
        batch_size: examples per call of the predictor.
        sync_every: lines after which the file is forced to disk, as it is at the end.
        advance: called with the number of examples of each batch, for a caller's own progress bar; a bar is
            shown without it when the work takes over two seconds.
        shard: this process and how many there are.
        rounds: number of batches of this process → of the process that has most, where the predictor needs
            all processes at once (weights in shards).
        made_by: what the answers depend on besides the data, as plain data, kept next to the file; each line
            has its hash. None where the caller holds that elsewhere, as a run does.

    Returns:
        How many examples were predicted now.

    Raises:
        EvalError: the file holds answers for other data (see ``read_predictions``) or made by something
            else, or the predictor gives another number of texts than examples, or something else than text.
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
    """Return a process's file, the rows that it still has to predict, and what each of its lines records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rank, world = shard
    done = _read_shards(path, data)
    source = {
        "recipe": data.recipe.name,
        "version": data.recipe.version,
        "fingerprint": data.fingerprint,
        **_claim(path, made_by),
    }
    # By position in the data, not among the missing: processes may look at the shards at different times.
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
    """Predict batches of rows and append their lines; without rows, take part and drop the answer."""
    unsynced = 0
    for rows in batches:
        if not rows:
            predictor.predict([data[0]])
            continue
        examples = [data[index] for index in rows]
        texts = _checked(predictor.predict(examples), examples)
        lines = (
            json.dumps({"id": example.id, "text": text, **source}, ensure_ascii=False) + "\n"
            for example, text in zip(examples, texts)
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
    """Make one file, in the order of the data, of what several processes predicted; the shards are removed.

    Args:
        path: the file as it was given to `predict_to_file`.
        data: the task and split.
    """
    path = Path(path)
    shards = _shards(path)
    if not shards:
        return
    texts = _read_shards(path, data)
    maker = {MADE_BY: held} if (held := _held_maker(path)) else {}
    source = {
        "recipe": data.recipe.name,
        "version": data.recipe.version,
        "fingerprint": data.fingerprint,
        **maker,
    }
    lines = [
        json.dumps({"id": key, "text": texts[key], **source}, ensure_ascii=False) + "\n"
        for key in data.ids
        if key in texts
    ]
    write_atomic(path, "".join(lines))
    for shard in shards:
        shard.unlink()


def maker_path(path: str | Path) -> Path:
    """Return where it stands what a file of answers depends on beside the data.

    `answers.made_by.json` beside `answers.jsonl`.
    """
    return Path(path).with_suffix(f".{MADE_BY}.json")


def _claim(path: Path, made_by: Mapping[str, Any] | None) -> dict[str, str]:
    """Refuse to go on with a file that something else made, and write down what makes it.

    Returns:
        what each line says of it.
    """
    wanted = (
        {}
        if not made_by
        else {MADE_BY: hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]}
    )
    if _held_maker(path, wanted.get(MADE_BY)) != wanted.get(MADE_BY):
        raise EvalError(
            f"{path} holds answers {_difference(path, made_by)}",
            "predict into a new file, or remove this one",
        )
    if wanted:
        write_atomic(maker_path(path), json.dumps(made_by, indent=1, sort_keys=True) + "\n")
    return wanted


def _held_maker(path: Path, otherwise: str | None = None) -> str | None:
    """What the first line of a file and of its shards says of their maker.

    Args:
        path: the file.
        otherwise: what is returned where none of them holds a line.

    Raises:
        EvalError: two of them are of different makers.
    """
    held = {}
    for file in (*_shards(path), path):
        lines = _complete_lines(file)[0] if file.exists() else []
        if lines:
            held[file] = _record(file, 1, lines[0]).get(MADE_BY)
    if len(set(held.values())) > 1:
        raise EvalError(
            f"{path} and its shards hold answers of two models or settings",
            f"remove {', '.join(file.name for file in held)}, and predict again",
        )
    return next(iter(held.values()), otherwise)


def _difference(path: Path, made_by: Mapping[str, Any] | None) -> str:
    """Say how the maker of a file differs from another one."""
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
    """The files of all processes that work, or worked, on a file of answers."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.shard-*.jsonl"))


def _read_shards(path: Path, data: TaskData) -> dict[str, str]:
    """What is predicted so far, in the file itself and by any number of processes beside it."""
    texts: dict[str, str] = {}
    for file in (*_shards(path), path):
        texts |= read_predictions(file, data)
    return texts


def first_ids(ids: list[str], limit: int = 3) -> str:
    """``3 ids (a, b, c)`` or ``7 ids (a, b, c, ...)``: a count and the first few, for messages."""
    names = ", ".join(key if len(key) <= 60 else f"{key[:60]}..." for key in ids[:limit])
    names += ", ..." if len(ids) > limit else ""
    return f"{len(ids)} id{'s' if len(ids) != 1 else ''} ({names})"


def _complete_lines(path: Path) -> tuple[list[bytes], int]:
    """The lines that have their line end, and the number of bytes after the last line end."""
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
    texts = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("id", "text"))
    if not texts or record.keys() - {MADE_BY} != KEYS or not isinstance(record.get(MADE_BY, ""), str):
        raise EvalError(
            f"line {number} of {path} is not a prediction with the keys {', '.join(sorted(KEYS))}",
            "remove that line, and its example is predicted again",
        )
    return record


def check_source(path: Path, number: int, record: dict, data: TaskData) -> None:
    """Refuse a line that was predicted for another recipe, version or data.

    Raises:
        EvalError: names the line and what differs.
    """
    wanted = {"recipe": data.recipe.name, "version": data.recipe.version, "fingerprint": data.fingerprint}
    for key, value in wanted.items():
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
