"""A user's own script around `Run`, which a launcher starts: `run_script.py CONFIG.json TASK.yaml`."""

import json
import sys
from pathlib import Path

from llava_keeplora import Run


def main() -> None:
    config, task = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    run = Run(json.loads(Path(config).read_text()))
    run.train()
    matrix = run.extend(task, num_train_epochs=1)
    if run.is_main_process:
        Path(run.folder, "seen.json").write_text(json.dumps(matrix["keeplora"].rows))


if __name__ == "__main__":
    main()
