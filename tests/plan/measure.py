"""Run a configuration and print the peak memory of each of its stages, in bytes over what was there before.

    python measure.py WARM_UP.json RUN.json [export]

The first run is a tiny one: it brings every library and thread in, so that the second one's memory is its own. Where there is a GPU,
memory is that of PyTorch's tensors on it; elsewhere it is the process's resident memory, with the kernel's peaks (VmHWM, set back at the
start of a stage), so that none is missed. That of `export` is the costliest form's, of this process or the one that loads it again.
"""

import ctypes
import gc
import json
import resource
import sys
from pathlib import Path

import torch

from llava_keeplora.config import parse_config
from llava_keeplora.export import FORMS, export_run
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


def run(tree: dict, forms: tuple[str, ...]) -> dict[str, int]:
    before = held()
    peaks.clear()
    runner.run(parse_config(tree))
    found = {stage: peak - before for stage, peak in peaks.items()}
    return found | ({"export": max(exported(tree, form) for form in forms)} if forms else {})


def exported(tree: dict, form: str) -> int:
    """The peak of one export, of this process or the one that it starts."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    before = held()
    restart()
    parts = (
        [part for part, own in tree["parts"].items() if (own or {}).get("train") != "full"]
        if form == "adapter"
        else None
    )
    export_run(tree["output_dir"], form, label=next(iter(tree["methods"])), parts=parts, base_id="user/base")
    # The warm-up's children were as large as a process that loads a model of no size.
    return max(
        status("VmHWM") - before, 1024 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - children)
    )


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
    forms = FORMS if "export" in sys.argv[3:] else ()
    run(warm_up, forms)
    sys.stdout.write(json.dumps(run(measured, forms)) + "\n")
