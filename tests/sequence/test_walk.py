"""From `train` on the command line to the optimiser step: the calls that CONTRIBUTING.md shows are those of a run."""

import inspect
import re
from pathlib import Path

import pytest
import transformers
import yaml
from torch.optim.optimizer import register_optimizer_step_pre_hook

from llava_keeplora.cli import main
from llava_keeplora.cli.train import run_train
from llava_keeplora.sequence.train_stage import train

ROOT = Path(__file__).parents[2]
PACKAGES = [ROOT / name for name in ("llava_keeplora", "eval", "data_recipes")]


class Reached(BaseException):
    """The first optimiser step; what called it, outermost first."""


@pytest.fixture
def calls(run_tree, tmp_path):
    """The code objects from the command's function to the optimiser step of a small run."""

    def stop(optimizer, args, kwargs):
        raise Reached([frame.frame.f_code for frame in inspect.stack(context=0)][::-1])

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree(tmp_path / "run", methods={"seq-lora": {}})))
    hook = register_optimizer_step_pre_hook(stop)
    try:
        with pytest.raises(Reached) as reached:
            main(["train", "--config", str(tmp_path / "run.yaml")])
    finally:
        hook.remove()
    (stack,) = reached.value.args
    return stack[stack.index(run_train.__code__) :]


def test_six_calls_lead_from_the_command_to_the_trainer_and_contributing_names_them(calls):
    trainers = inspect.unwrap(transformers.Trainer.train).__code__
    hops = calls[1 : calls.index(trainers) + 1]
    assert train.__code__ in hops and len(hops) <= 6
    assert all(any(folder in Path(code.co_filename).parents for folder in PACKAGES) for code in hops[:-1])
    rows = re.findall(r"^\| `([\w.]+)` \| `?([\w/.]+)`? \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    files = [str(Path(code.co_filename).relative_to(ROOT)) for code in calls[:1] + hops[:-1]]
    assert rows == [
        *((code.co_qualname, file) for code, file in zip(calls[:1] + hops[:-1], files, strict=True)),
        ("Trainer.train", "transformers"),
    ]
