"""The command `llava-keeplora`, with the processor time of every stage in its run's folder.

    python scripts/staged.py train --config demo --output-dir RUN

It writes RUN/stages.json: a list of [method, task's number, stage, seconds of processor time], and with the
stage `start` the seconds before the first one and `end` those after the last one.
"""

import json
import os
import sys
from pathlib import Path


def seconds() -> float:
    """Return the processor seconds of this process and its children so far."""
    return sum(os.times()[:4])


def main() -> int:
    """Run the command line, and write what its stages took."""
    from llava_keeplora.cli import main as command
    from llava_keeplora.cli.run_sequence import prepared_process

    with prepared_process():  # with the imports of the command
        from llava_keeplora.sequence import method_run

    taken, last = [], [0.0]

    def timed(stage, function):
        def run(state, index):
            before = seconds()
            taken or taken.append(["", 0, "start", before])
            try:
                return function(state, index)
            finally:
                last[0] = seconds()
                taken.append([state.config.label, index, str(stage), last[0] - before])

        return run

    method_run.STAGES = {stage: timed(stage, function) for stage, function in method_run.STAGES.items()}
    code = command()
    taken or taken.append(["", 0, "start", seconds()])
    taken.append(["", 0, "end", seconds() - (last[0] or seconds())])
    folder = Path(sys.argv[sys.argv.index("--output-dir") + 1])
    (folder / "stages.json").write_text(json.dumps(taken))
    return code


if __name__ == "__main__":
    sys.exit(main())
