"""Ctrl-C and SIGTERM sent to a real run: it says how to go on, and going on ends as if nobody had stopped it."""

import signal
import sys
import time

from llava_keeplora.config import load_config


def wait_for(path, text, process, start=0):
    """Wait until a file says something after its first `start` characters."""
    while not (path.exists() and text in path.read_text()[start:]):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_a_stopped_run_says_how_to_go_on_and_ends_the_same(
    config_file, start, launch, driven, script, tmp_path
):
    config = config_file()
    driven(load_config(str(config), [], output_dir=str(tmp_path / "undisturbed")))
    command = [sys.executable, script, "--config", config, "--output-dir", tmp_path / "stopped"]
    journal = tmp_path / "stopped/keeplora/journal.jsonl"
    for number, code, moment in ((signal.SIGTERM, 143, "PREPARED"), (signal.SIGINT, 130, "TRAINED")):
        # A signal that comes late finds later stages in the journal: only what this start adds shows that it has begun.
        before = len(journal.read_text()) if journal.exists() else 0
        process = start(command)
        wait_for(journal, moment, process, start=before)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == code, err
        assert (
            err.splitlines()[-1] == "stopped; every finished stage is kept, run the same command to go on"
            and "Traceback" not in err
        )
    assert launch(command)[0] == 0
    learned = [
        path.relative_to(tmp_path / "undisturbed")
        for path in (tmp_path / "undisturbed").rglob("*")
        if path.suffix == ".safetensors" or path.name == "matrix.json"
    ]
    assert len(learned) == 2 + 3 + 2 * 2, "matrices, states, adapters and deltas"
    for name in learned:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), (
            name
        )
    assert not list((tmp_path / "stopped").rglob(".*.part"))
