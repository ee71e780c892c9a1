"""Time of one task with every method, without evaluation, against sequential LoRA's.

Numbers come from the run's journal: preparing (the first-step gradient), training for one epoch,
consolidating (features and bases), and what a method does with the base before the first task.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from llava_keeplora.config import load_config
from llava_keeplora.journal import Journal
from llava_keeplora.methods import METHODS
from llava_keeplora.run_folder import JOURNAL
from llava_keeplora.sequence import run

PLAIN = "seq-lora"
#: A row that comes first and decodes the images for all others.
FIRST = ("opens-the-images", "{method: seq-lora}")
#: Label and settings of KeepLoRA with its two passes over all the data, instead of the shares it chooses.
ALL_DATA = ("keeplora-all-data", "{method: keeplora, gradient_fraction: 1.0, feature_fraction: 1.0}")
STAGES = ("PREPARED", "TRAINED", "CONSOLIDATED")


def compare_methods(
    repeats: int, quick: bool, data_root: str | None
) -> Iterator[tuple[str, float, float, str]]:
    """Yield (name, median seconds of sequential LoRA, of the method, note) for every method that learns.

    Args:
        repeats: number of runs of all methods, after one as a warm-up.
        quick: whether an epoch is two steps, without a warm-up.
        data_root: the folder with the real sets; scikit-learn's digits are used when None.
    """
    labels = [name for name, method in METHODS.items() if method.trainable and "clip" in method.info.families]
    changes = [
        "sequence=null",
        f"tasks=[{'trashnet' if data_root else 'digits'}]",
        "training.num_train_epochs=1",
    ] + quick * ["training.max_steps=2"]
    methods = dict([FIRST, *((label, "{}") for label in labels), ALL_DATA])
    changes += [f"methods={{{', '.join(f'{name}: {options}' for name, options in methods.items())}}}"] + [
        f"data.root={data_root}"
    ] * bool(data_root)
    seconds, bytes_ = defaultdict(list), defaultdict(list)
    for turn in range(1 if quick else repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            run(load_config("real", [*changes, f"output_dir={folder}/run"]))
            for label in methods:
                work = [
                    entry
                    for entry in Journal(Path(folder, "run", label, JOURNAL)).entries
                    if entry.stage in STAGES
                ]
                if turn or quick:
                    seconds[label].append(sum(entry.seconds for entry in work))
                    bytes_[label].append(max(entry.info["peak_bytes"] for entry in work))
    medians, peaks = (
        {label: statistics.median(values) for label, values in samples.items()}
        for samples in (seconds, bytes_)
    )
    for label in methods:
        if label not in (PLAIN, FIRST[0]):
            note = (
                f"one task, one epoch; peak {peaks[label] / 1e6:.0f} MB of the process, "
                f"{PLAIN} {peaks[PLAIN] / 1e6:.0f}"
            )
            yield f"{label} / {PLAIN}", medians[PLAIN], medians[label], note
