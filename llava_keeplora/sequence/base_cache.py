"""A cache, shared by runs, of what is computed of data and the untouched model.

It holds images as the model takes them, zero-shot answers, and a method's base statistics.

The name of an entry is a hash of everything that its files depend on, so nothing in the cache goes out of
date. An entry whose files are damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from llava_keeplora.errors import RunError
from llava_keeplora.files import write_bytes, write_json
from llava_keeplora.records import read_object
from llava_keeplora_eval.files import file_hash

logger = logging.getLogger(__name__)

#: Of an entry, written last: what its files depend on, their hashes, and how long it took to make them.
ENTRY = "entry.json"


class BaseCache:
    """A folder of entries that several runs read and write at once.

    Args:
        root: the folder; None keeps nothing and finds nothing.
        common: what everything in it depends on, as plain data.
    """

    def __init__(self, root: str | None, common: Mapping[str, Any]):
        self._root, self._common = root and Path(root), common

    def take(self, what: Mapping[str, Any], files: Mapping[str, Path]) -> float | None:
        """Copy an entry's files to where they belong.

        Args:
            what: what they depend on beside what is common.
            files: name in the entry → where it belongs.

        Returns:
            the seconds that it took to make them; None where there is no whole entry.
        """
        folder = self._found(what)
        if folder is None:
            return None
        try:
            entry = read_object(folder / ENTRY)
            contents = {name: (folder / name).read_bytes() for name in entry["files"]}
            if any(
                hashlib.sha256(contents[name]).hexdigest() != expected
                for name, expected in entry["files"].items()
            ):
                raise ValueError("a file is not what was written")
            targets, seconds = {name: files[name] for name in contents}, float(entry["seconds"])
        except (RunError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged (%s); it is made again", folder, error)
            return None
        for name, target in targets.items():
            write_bytes(target, contents[name])
        return seconds

    def put(self, what: Mapping[str, Any], files: Mapping[str, Path], seconds: float) -> None:
        """Keep files for other runs; of two runs that do so at once, either's are kept.

        Args:
            what: what they depend on beside what is common.
            files: name in the entry → where it lies; those that are not there are no part of it.
            seconds: what it took to make them.
        """
        folder = self._folder(what)
        if folder is not None:
            hashes = {
                name: write_bytes(folder / name, path.read_bytes())
                for name, path in files.items()
                if path.exists()
            }
            write_json(folder / ENTRY, {"of": {**self._common, **what}, "files": hashes, "seconds": seconds})

    def size(self, what: Mapping[str, Any]) -> int | None:
        """Bytes of the tensors that `put_rows` kept; None where nothing says so."""
        folder = self._found(what)
        try:
            return None if folder is None else int(read_object(folder / ENTRY)["bytes"])
        except (RunError, KeyError, TypeError, ValueError):
            return None

    def rows(self, what: Mapping[str, Any]) -> list[dict[str, Tensor]] | None:
        """What `put_rows` kept, mapped from the files, so that all processes of a machine hold it once.

        None where there is no whole entry.

        Args:
            what: what it depends on beside what is common.
        """
        folder = self._found(what)
        if folder is None:
            return None
        try:
            entry = read_object(folder / ENTRY)
            if any(file_hash(folder / name) != expected for name, expected in entry["files"].items()):
                raise ValueError("a file is not what was written")
            return [
                row for i, count in enumerate(entry["rows"]) for row in _mapped(folder / _piece(i), count)
            ]
        except (RunError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged (%s); it is made again", folder, error)
            return None

    def put_rows(
        self, what: Mapping[str, Any], pieces: Iterable[list[dict[str, Tensor]]]
    ) -> list[dict[str, Tensor]]:
        """Keep rows of tensors for other runs, and give them back, mapped from the files.

        Where nothing can be kept, as they are.

        Args:
            what: what they depend on beside what is common.
            pieces: rows, a file's at a time; a row's tensors by name.
        """
        folder, rows, hashes, counts = self._folder(what), [], {}, []
        for piece in pieces:
            if folder is not None:
                try:
                    path = folder / _piece(len(counts))
                    if hashed := _keep(path, piece):
                        hashes[path.name] = hashed
                    counts.append(len(piece))
                    piece = _mapped(path, len(piece))
                except OSError as error:
                    logger.warning(
                        "%s cannot keep prepared pictures (%s); this run holds its own",
                        folder,
                        error.strerror or error,
                    )
                    folder = None
            rows += piece
        if folder is not None:
            size = sum(value.nbytes for row in rows for value in row.values())
            write_json(
                folder / ENTRY,
                {"of": {**self._common, **what}, "files": hashes, "rows": counts, "bytes": size},
            )
        return rows

    def _found(self, what: Mapping[str, Any]) -> Path | None:
        """The folder of an entry that is there."""
        folder = self._folder(what)
        return folder if folder is not None and (folder / ENTRY).is_file() else None

    def _folder(self, what: Mapping[str, Any]) -> Path | None:
        text = json.dumps({**self._common, **what}, sort_keys=True)
        return None if self._root is None else self._root / hashlib.sha256(text.encode()).hexdigest()[:32]


def _piece(number: int) -> str:
    return f"rows-{number:05d}.safetensors"


def _keep(path: Path, rows: list[dict[str, Tensor]]) -> str | None:
    """Write rows and return the file's SHA-256; None without a tensor, which safetensors has no file for.

    A file that holds the same already stays: other processes have it mapped.
    """
    tensors = {f"{i}.{key}": value.contiguous() for i, row in enumerate(rows) for key, value in row.items()}
    if not tensors:
        return None
    content = save(tensors)
    hashed = hashlib.sha256(content).hexdigest()
    return hashed if path.is_file() and file_hash(path) == hashed else write_bytes(path, content)


def _mapped(path: Path, count: int) -> list[dict[str, Tensor]]:
    rows: list[dict[str, Tensor]] = [{} for _ in range(count)]
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                row, key = name.split(".", 1)
                rows[int(row)][key] = file.get_tensor(name)
    return rows
