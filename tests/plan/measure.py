"""Run a configuration and print the peak memory of each of its stages, in bytes over what was there before.

    python measure.py WARM_UP.json RUN.json [export]

The first run is a tiny one: it brings every library and thread in, so that the second one's memory is its own. Where there is a GPU,
memory is that of PyTorch's tensors on it; elsewhere it is the process's resident memory, with the kernel's peaks (VmHWM, set back at the
start of a stage), so that none is missed. That of `export` is the costliest form's, of this process or the one that loads it again, which
counts its own peak: what the kernel tells of a child (`ru_maxrss`) starts with the parent's size at the fork.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from llava_keeplora.config import parse_config
from llava_keeplora.export import FORMS, export_run, export_set, verify
from llava_keeplora.run_folder import Stage
from llava_keeplora.sequence import runner
from llava_keeplora.sequence.method_run import MethodRun
from llava_keeplora.sequence.run_context import RunContext
from llava_keeplora.sequence.stages import STAGES

GPU = torch.cuda.is_available()
peaks: dict[str, int] = {}
running: list[str] = []


def status(key: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":")
    )
    return 1024 * int(line.split()[1])


def held() -> int:
    """Bytes, with nothing that could be freed."""
    gc.collect()
    if GPU:
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")


def close() -> None:
    if running:
        peaks[running[-1]] = max(
            peaks.get(running[-1], 0), torch.cuda.max_memory_allocated() if GPU else status("VmHWM")
        )
    restart()


def restart() -> None:
    """Peaks are counted from now on."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def staged(owner, method, stage) -> None:
    """Count a method's peak for a stage, `stage(arguments)`; inside another stage, what runs inside counts for the inner one alone."""
    inner = owner[method] if isinstance(owner, dict) else getattr(owner, method)

    def outer(*args, **kwargs):
        close()
        running.append(stage(args))
        try:
            return inner(*args, **kwargs)
        finally:
            close()
            running.pop()

    owner.update({method: outer}) if isinstance(owner, dict) else setattr(owner, method, outer)


def run(tree: dict, forms: tuple[str, ...], workers: dict[str, int]) -> dict[str, int]:
    before = held()
    peaks.clear()
    runner.run(parse_config(tree))
    found = {stage: peak - before for stage, peak in peaks.items()}
    return found | ({"export": max(exported(tree, form, workers) for form in forms)} if forms else {})


def exported(tree: dict, form: str, workers: dict[str, int]) -> int:
    """The peak of one export, of this process or the one that it starts.

    `workers` holds the peak of that process in the warm-up's export, which a process without a model would have too, and gets this one's.
    """
    before = held()
    restart()
    parts = (
        [part for part, own in tree["parts"].items() if (own or {}).get("train") != "full"]
        if form in ("adapter", "set")
        else None
    )
    verify.verify_in_fresh_process = lambda tmp_dir: workers.update({form: checked(tmp_dir)})
    without_model = workers.get(form, 0)
    options = {"label": next(iter(tree["methods"])), "parts": parts, "base_id": "user/base"}
    export_set(tree["output_dir"], **options) if form == "set" else export_run(
        tree["output_dir"], form, **options
    )
    return max(status("VmHWM") - before, workers[form] - without_model)


def checked(folder: Path) -> int:
    """Load an export again in a fresh process, as `verify_in_fresh_process` does, and return that one's peak."""
    code = "from llava_keeplora.export.verify_worker import main; main(); print(open('/proc/self/status').read())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True
    )
    return 1024 * int(next(line for line in done.stdout.splitlines() if line.startswith("VmHWM:")).split()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    runner.write_run_report = lambda root: None
    staged(RunContext, "load", lambda args: "load")
    staged(runner, "BaseWeights", lambda args: "load")
    staged(MethodRun, "rebuild", lambda args: "load")
    staged(STAGES, Stage.PREPARED, lambda args: "gradient")
    staged(STAGES, Stage.TRAINED, lambda args: "train")
    staged(STAGES, Stage.CONSOLIDATED, lambda args: "features" if args[1] else "basis")
    staged(STAGES, Stage.EVALUATED, lambda args: "evaluate")
    warm_up, measured = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    forms = (*FORMS, "set") if "export" in sys.argv[3:] else ()
    workers: dict[str, int] = {}
    run(warm_up, forms, workers)
    sys.stdout.write(json.dumps(run(measured, forms, workers)) + "\n")
