"""Reading of regular files, with the likely cause in the error if a file is missing."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from pathlib import Path
from urllib.parse import unquote

#: Things other than regular files that a path may lead to: a test of the mode, and words.
KINDS = [
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
]

#: Folder → its entries' names, by their form without letter case and in one Unicode form.
Listings = dict[str, dict[str, str]]


def read_file(path: str | Path, listings: Listings | None = None) -> bytes:
    """Return the content of a regular file; nothing else is opened, as a pipe could block for ever.

    Args:
        path: the file; links are followed.
        listings: cache of folder listings for `likely_cause`, for when many files are read.

    Raises:
        OSError: the file is missing or cannot be read; the message is a clause with the path.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            what = next((words for test, words in KINDS if test(mode)), "no file")
            raise OSError(f"'{path}' is {what}, not a file")
        return Path(path).read_bytes()
    except FileNotFoundError:
        cause = likely_cause(str(path), {} if listings is None else listings)
        raise FileNotFoundError(f"no such file '{path}'{cause and f': {cause}'}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OSError(f"'{path}' cannot be opened: {reason}") from None


def likely_cause(path: str, listings: Listings) -> str:
    """Return the likely cause of a missing file, as a clause; empty if none is likely."""
    if os.path.islink(path):
        return f"it is a link to '{os.readlink(path)}'"
    if scheme := re.search(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+):/", path):
        return f"its name is a URL ({scheme[1]}:), and images are read from files"
    if "\\" in path:
        similar = _similar_path(path.replace("\\", "/"), listings)
        example = f", as in '{similar}'" if similar else ""
        return f"its name has backslashes, and folders are parted by '/'{example}"
    parts = path.split("/")
    for size in range(1, len(parts) // 2 + 1):
        for start in range(len(parts) - 2 * size + 1):
            if parts[start : start + size] == parts[start + size : start + 2 * size]:
                single = "/".join(parts[: start + size] + parts[start + 2 * size :])
                if os.path.lexists(single):
                    return f"a folder is doubled, '{single}' is there"
    if similar := _similar_path(path, listings):
        same_case = unicodedata.normalize("NFC", similar) == unicodedata.normalize("NFC", path)
        return f"'{similar}' is there, in another {'Unicode form' if same_case else 'letter case'}"
    if "%" in path and os.path.lexists(unquote(path)):
        return f"'{unquote(path)}' is there, and the name is percent-encoded"
    folder, stem = os.path.dirname(path) or ".", _folded(Path(path).stem)
    other = sorted(name for folded, name in _listing(folder, listings).items() if Path(folded).stem == stem)
    return f"'{os.path.join(folder, other[0])}' is there, with another ending" if other else ""


def _similar_path(path: str, listings: Listings) -> str:
    """Return the path of a file that differs in letter case or Unicode form alone; empty if there is none."""
    similar = "/" if path.startswith("/") else ""
    for part in filter(None, path.split("/")):
        if os.path.lexists(os.path.join(similar, part)):
            similar = os.path.join(similar, part)
            continue
        folder = similar or "."
        names = _listing(folder, listings)
        if _folded(part) not in names:
            return ""
        similar = os.path.join(similar, names[_folded(part)])
    return similar


def _listing(folder: str, listings: Listings) -> dict[str, str]:
    if folder not in listings:
        try:
            listings[folder] = {_folded(name): name for name in os.listdir(folder)}
        except OSError:
            listings[folder] = {}
    return listings[folder]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
