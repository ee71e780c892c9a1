"""Steps of a guarded run without a model: the search for a share of an update, and files that move aside."""

import os
import signal
from types import SimpleNamespace

import pytest

from llava_keeplora.guard.text import shrink_lines
from llava_keeplora.journal import Entry, Journal
from llava_keeplora.run_folder import Stage
from llava_keeplora.sequence import guarding, shrinking
from llava_keeplora_eval.files import file_hash


@pytest.mark.parametrize(
    ("harm", "gain", "expected"),
    [
        (2.0, 0.0, 7 / 16),  # The measured drop may be as large as the limit, 1.
        (100.0, 0.0, 0.0),
        (0.0, 0.0, 15 / 16),
        (2.0, 4.0, 7 / 16),
        (2.0, 10.0, 0.0),  # What holds the drop gains too little.
    ],
)
def test_the_largest_share_that_holds_every_limit_is_found(monkeypatch, harm, gain, expected):
    new, old = (SimpleNamespace(name=name, test=None) for name in ("new", "old"))
    limits = [("new task", new, gain), ("old task", old, -1.0)]
    monkeypatch.setattr(shrinking, "_limits", lambda state, index: limits)
    monkeypatch.setattr(
        shrinking,
        "_answer",
        lambda state, index, share, limits: ({"new": 10 * share, "old": -(harm + 0.25) * share}, []),
    )
    monkeypatch.setattr(shrinking, "score_change", lambda data, before, after: after - before)
    record, _ = shrinking.search(None, 1)
    assert record["lambda"] == expected and len(record["trials"]) == 4
    assert "share" in " ".join(shrink_lines({"task": "new", "shrink": record}))


@pytest.mark.parametrize("stage", [Stage.SHRUNK, Stage.ROLLED_BACK])
@pytest.mark.parametrize("kill", [1, 2, 3])
def test_a_kill_while_files_move_aside_is_made_good_at_the_next_start(tmp_path, stage, kill):
    folder, names = tmp_path / "task-01-a", ["delta.safetensors", "watched/b.jsonl", "guard.json"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    hashes = {f"task-01-a/{name}": file_hash(folder / name) for name in names}
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Entry(1, Stage.TRAINED, files=hashes))
    gone = {"task": "a", "folder": "task-01-a", "aside": "aside/01-a"}
    info = {"shrunk": 0.5} if stage == Stage.SHRUNK else {"rolled_back": gone}
    journal.append(Entry(1, stage, info=info))
    context = SimpleNamespace(rank=0, barrier=lambda: None)
    state = SimpleNamespace(journal=journal, folder=tmp_path, context=context)
    if (process := os.fork()) == 0:
        rename, calls = os.rename, iter(range(1, 9))
        os.rename = lambda *paths: (
            os.kill(os.getpid(), signal.SIGKILL) if next(calls) == kill else rename(*paths)
        )
        guarding.set_aside(state)
        os._exit(0)
    os.waitpid(process, 0)
    for _ in range(2):  # The next start, and any later one.
        guarding.set_aside(state)
        aside = tmp_path / ("task-01-a/unshrunk" if stage == Stage.SHRUNK else "aside/01-a")
        assert [(aside / name).read_text() for name in names] == names
        Journal(journal.path).verify()
        left = [path for path in folder.rglob("*") if path.is_file() and aside not in path.parents]
        assert not left
