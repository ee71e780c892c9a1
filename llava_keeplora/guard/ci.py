"""Files that run the guard on a checkpoint by themselves: a GitHub workflow and a pre-commit hook."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from llava_keeplora.errors import ConfigError
from llava_keeplora.files import write_bytes

#: Where GitHub and pre-commit look for their files, from the root of a repository.
WORKFLOW, HOOK = Path(".github/workflows/guard.yml"), Path(".pre-commit-config.yaml")

_WORKFLOW = """\
# Written by `llava-keeplora guard init`. Judges a checkpoint against its base on every pull request: the
# verdict is the step's summary, and the job fails if a limit is broken (3) or can't be evaluated (2).
name: guard
on:
  pull_request:
  workflow_dispatch:
permissions:
  contents: read
jobs:
  guard:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
        with:
          lfs: true
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - name: Install
        env:
          # What pip installs; the repository variable LLAVA_KEEPLORA replaces it (Settings, Variables).
          PACKAGE: ${{{{ vars.LLAVA_KEEPLORA || {package} }}}}
        run: pip install "${{PACKAGE:?set the repository variable LLAVA_KEEPLORA, for instance to git+https://...}}"
      - name: Judge the checkpoint
        env:
          HF_TOKEN: ${{{{ secrets.HF_TOKEN }}}}  # for private models and data on the Hub
        run: |
{command}
      - name: Keep the answers and the verdict
        if: always()
        uses: actions/upload-artifact@v4
        with:
          name: guard
          path: {into}
          if-no-files-found: ignore
"""

_HOOK = """\
# Written by `llava-keeplora guard init`. `pre-commit install` makes it part of every commit.
"""


def workflow_text(words: Sequence[str], into: str) -> str:
    """Return a GitHub workflow that runs a command line.

    Args:
        words: the words of the command.
        into: the folder with the command's files, which are kept with the run.
    """
    lines = " ".join(f"\\\n{' ' * 12}{w}" if w.startswith("--") else shlex.quote(w) for w in words)
    package = "'" + requirement().replace("'", "''") + "'"  # As GitHub's expressions quote text.
    return _WORKFLOW.format(package=package, command=f"{' ' * 10}{lines}", into=yaml_text(into))


def requirement() -> str:
    """Return what pip installs elsewhere to get this package as it is here; empty if nothing is known.

    A package from an index has its version; one from a Git URL that and its commit (PEP 610); one from a
    folder the address of the repository that the folder is a clone of, and its commit if that is published.
    """
    package = distribution("llava-keeplora")
    record = json.loads(package.read_text("direct_url.json") or "{}")
    if not record:
        return f"llava-keeplora=={package.version}"
    url, commit = record["url"], record.get("vcs_info", {}).get("commit_id", "")
    if "dir_info" in record:
        folder = unquote(urlsplit(url).path)
        url = _git(folder, "remote", "get-url", "origin")
        commit = (
            _git(folder, "rev-parse", "HEAD") if _git(folder, "branch", "-r", "--contains", "HEAD") else ""
        )
    if ssh := re.fullmatch(r"(?:ssh://)?git@([^:/]+)[:/](.+)", url):
        url = f"https://{ssh[1]}/{ssh[2]}"
    if not url.startswith("https://"):
        return ""
    parts = urlsplit(url)  # Without a user's token.
    url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return f"llava-keeplora @ git+{url}{f'@{commit}' if commit else ''}"


def _git(folder: str, *words: str) -> str:
    """Return what a command of Git prints in a folder; empty if it fails or there is no Git."""
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def hook_text(words: Sequence[str], watched: Sequence[str]) -> str:
    """Return a pre-commit configuration that runs a command line.

    Args:
        words: the words of the command.
        watched: files and folders of the repository whose change starts it; every commit does without any.
    """
    patterns = [re.escape(Path(path).as_posix()) for path in watched]
    when = {"files": f"^({'|'.join(patterns)})(/|$)"} if patterns else {"always_run": True}
    hook = {
        "id": "guard",
        "name": "the checkpoint is not worse than its base",
        "entry": shlex.join(words),
        "language": "system",
        "pass_filenames": False,
        "verbose": True,
        **when,
    }
    content = {"repos": [{"repo": "local", "hooks": [hook]}]}
    return _HOOK + yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True)


def yaml_text(text: str) -> str:
    """Return a text as a YAML value on one line."""
    return yaml.safe_dump(text, width=1000, allow_unicode=True).splitlines()[0]


def write_ci(root: Path, words: Sequence[str], into: str, watched: Sequence[str]) -> list[Path]:
    """Write the workflow and the hook, and return their paths.

    Args:
        root: the repository's root.
        words, into, watched: see `workflow_text` and `hook_text`.

    Raises:
        ConfigError: one of the files exists, in which case none is written; or a word has a line break.
    """
    if broken := [word for word in words if "\n" in word or "\r" in word]:
        raise ConfigError(f"{broken[0]!r} has a line break, and a command is one line", "rename it")
    if there := [str(path) for path in (WORKFLOW, HOOK) if (root / path).exists()]:
        raise ConfigError(
            f"`guard init` overwrites nothing, and there is already {' and '.join(there)}",
            "move what is there away, or run this in an empty folder and join the files by hand",
        )
    texts = {WORKFLOW: workflow_text(words, into), HOOK: hook_text(words, watched)}
    for path, text in texts.items():
        write_bytes(root / path, text.encode())
    return list(texts)
