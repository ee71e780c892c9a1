"""A run in a process of its own that is killed (SIGKILL) at one moment, told by number; moments are counted as they come.

A moment is a batch through the model (a gradient, a training step, features, a token of an answer), an optimiser step, half
of a file's bytes written, a whole file without its name yet, half of a journal's line, or half of a batch of answers.
"""

from __future__ import annotations

import builtins
import functools
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from forked import SERVER, ensure_server


class Moments:
    """Counts moments, and kills at one of them.

    Args:
        fatal: the number of the last one, or ("STAGE TASK", kind, number among these); None to live.
        log: a file, to which the killed process writes what it was doing.
    """

    def __init__(self, fatal: int | tuple[str, str, int] | None, log: Path):
        self.fatal, self.log, self.count, self.stage = fatal, log, 0, "start"
        self.place, self.alike = self.stage, Counter()

    def pass_by(self, kind: str, before_death=lambda: None) -> None:
        """One moment."""
        self.count += 1
        self.alike[self.place, kind] += 1
        if self.fatal in (self.count, (self.place, kind, self.alike[self.place, kind])):
            before_death()
            with open(self.log, "a") as file:
                file.write(f"{self.stage} {kind}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def calls(self, owner, name: str, kind: str) -> None:
        """Every call of a function is a moment, before it begins."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*args, **kwargs):
            self.pass_by(kind)
            return inner(*args, **kwargs)

        setattr(owner, name, outer)

    def stages(self, table: dict) -> None:
        """Remember which stage runs; the table has a function for each."""
        for stage, inner in table.items():

            def outer(run, index, stage=stage, inner=inner):
                self.stage, self.place = stage, f"{stage} {index}"
                return inner(run, index)

            table[stage] = outer

    def writes(self, module, kind: str) -> None:
        """Every write to a file that a module opens is a moment, when half of it is on disk."""

        def opened(*args, **kwargs):
            file = builtins.open(*args, **kwargs)
            whole = file.write

            def write(content):
                self.pass_by(kind, lambda: (whole(content[: len(content) // 2]), file.flush()))
                return whole(content)

            return _Written(file, write)

        module.open = opened


class _Written:
    """A file with a `write` of its own."""

    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)


def live(tree: dict, fatal: int | tuple[str, str, int] | None, log: str, counted) -> None:
    """Inside the process: run, and tell how many moments there were."""
    import torch
    from transformers import CLIPModel, LlavaForConditionalGeneration

    from llava_keeplora import journal
    from llava_keeplora.config import parse_config
    from llava_keeplora.sequence import method_run, runner, trainer
    from llava_keeplora_eval import files, predictions

    torch.set_num_threads(1)
    moments = Moments(fatal, Path(log))
    moments.stages(method_run.STAGES)
    moments.calls(LlavaForConditionalGeneration, "forward", "generation")
    moments.calls(CLIPModel, "get_image_features", "images")
    moments.calls(trainer.TaskTrainer, "training_step", "batch")
    moments.calls(trainer._AfterStep, "on_step_end", "step")
    moments.calls(files.os, "replace", "rename")
    moments.calls(files.os, "rename", "move")
    moments.writes(files, "file")
    moments.writes(journal, "journal")
    moments.writes(predictions, "answers")
    runner.write_run_report = lambda root: None
    told = os.open(f"{log}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(told, 1), os.dup2(told, 2)
    runner.run(parse_config(tree))
    counted.put(moments.count)


def start(tree: dict, fatal: int | tuple[str, str, int] | None, log: Path) -> int | None:
    """Run in a process of its own.

    Returns:
        how many moments there were, or None if it was killed.
    """
    ensure_server()
    counted = SERVER.SimpleQueue()
    process = SERVER.Process(target=live, args=(tree, fatal, str(log), counted))
    process.start()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, Path(f"{log}.err").read_text()[-2000:]
    return counted.get()


if str(Path(__file__).parent) not in sys.path:
    # The other process imports this module by its name.
    sys.path.insert(0, str(Path(__file__).parent))
