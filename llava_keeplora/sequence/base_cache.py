"""A cache, shared by runs, of results that depend on the data and the untouched model alone.

It holds preprocessed images, zero-shot answers, and the statistics that a method takes of the base.

The name of an entry is a hash of everything that its files depend on, so no entry ever goes out of date. An
entry whose files are damaged is computed again.
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
from llava_keeplora.run_folder import CACHE_ENTRY, cached_rows
from llava_keeplora_eval.files import file_hash

logger = logging.getLogger(__name__)


class BaseCache:
    """A folder of entries that several runs read and write at once.

    Args:
        root: the folder; with None nothing is stored and every lookup misses.
        common: what every entry depends on, as plain data.
    """

    def __init__(self, root: str | None, common: Mapping[str, Any]):
        self._root, self._common = root and Path(root), common

    def take(self, what: Mapping[str, Any], files: Mapping[str, Path]) -> float | None:
        """Copy an entry's files to their targets.

        Args:
            what: what the files depend on, in addition to `common`.
            files: name in the entry → target path.

        Returns:
            the seconds that it took to compute them; None if there is no complete, undamaged entry.
        """
        folder = self._existing_entry(what)
        if folder is None:
            return None
        try:
            entry = read_object(folder / CACHE_ENTRY)
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
        """Store files for other runs; if two runs store the same entry at once, either's files stay.

        Args:
            what: what the files depend on, in addition to `common`.
            files: name in the entry → source path; files that do not exist are left out.
            seconds: how long it took to compute them.
        """
        folder = self._folder(what)
        if folder is not None:
            hashes = {
                name: write_bytes(folder / name, path.read_bytes())
                for name, path in files.items()
                if path.exists()
            }
            write_json(
                folder / CACHE_ENTRY, {"of": {**self._common, **what}, "files": hashes, "seconds": seconds}
            )

    def size(self, what: Mapping[str, Any]) -> int | None:
        """Return the size in bytes of the tensors that `put_rows` stored; None if there is no such entry."""
        folder = self._existing_entry(what)
        try:
            return None if folder is None else int(read_object(folder / CACHE_ENTRY)["bytes"])
        except (RunError, KeyError, TypeError, ValueError):
            return None

    def rows(self, what: Mapping[str, Any]) -> list[dict[str, Tensor]] | None:
        """Return the rows that `put_rows` stored, memory-mapped so that a machine's processes share them.

        Args:
            what: what the rows depend on, in addition to `common`.

        Returns:
            the rows in order, each as name → tensor; None if there is no complete, undamaged entry.
        """
        folder = self._existing_entry(what)
        if folder is None:
            return None
        try:
            entry = read_object(folder / CACHE_ENTRY)
            if any(file_hash(folder / name) != expected for name, expected in entry["files"].items()):
                raise ValueError("a file is not what was written")
            return [
                row
                for i, count in enumerate(entry["rows"])
                for row in _mapped(folder / cached_rows(i), count)
            ]
        except (RunError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged (%s); it is made again", folder, error)
            return None

    def put_rows(
        self, what: Mapping[str, Any], pieces: Iterable[list[dict[str, Tensor]]]
    ) -> list[dict[str, Tensor]]:
        """Store rows of tensors for other runs, and return them memory-mapped from the files.

        If they cannot be stored (no cache folder, full disk), they are returned as given.

        Args:
            what: what the rows depend on, in addition to `common`.
            pieces: the rows in chunks, one file each; a row is name → tensor.
        """
        folder, rows, hashes = self._folder(what), [], {}
        counts: list[int] = []
        for piece in pieces:
            if folder is not None:
                try:
                    path = folder / cached_rows(len(counts))
                    if hashed := _keep(path, piece):
                        hashes[path.name] = hashed
                    counts.append(len(piece))
                    piece = _mapped(path, len(piece))
                except OSError as error:
                    logger.warning(
                        "%s cannot store preprocessed images (%s); this run keeps its own in memory",
                        folder,
                        error.strerror or error,
                    )
                    folder = None
            rows += piece
        if folder is not None:
            size = sum(value.nbytes for row in rows for value in row.values())
            write_json(
                folder / CACHE_ENTRY,
                {"of": {**self._common, **what}, "files": hashes, "rows": counts, "bytes": size},
            )
        return rows

    def _existing_entry(self, what: Mapping[str, Any]) -> Path | None:
        """Return the folder of an entry if it was written completely."""
        folder = self._folder(what)
        return folder if folder is not None and (folder / CACHE_ENTRY).is_file() else None

    def _folder(self, what: Mapping[str, Any]) -> Path | None:
        text = json.dumps({**self._common, **what}, sort_keys=True)
        return None if self._root is None else self._root / hashlib.sha256(text.encode()).hexdigest()[:32]


def _keep(path: Path, rows: list[dict[str, Tensor]]) -> str | None:
    """Write rows and return the file's SHA-256; None for rows without tensors, for which no file is written.

    A file with the same content is left untouched: other processes may have it mapped.
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
