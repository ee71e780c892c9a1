"""Every command of the README and of docs/evaluation.md runs, in their order, on the files that the README shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import forked

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
#: These set up an environment or start the suite that is running; the Makefile test below holds what they do.
BY_MAKE = {"make demo", "make test", "pip install -c constraints.txt -e ."}
#: What makes a command small enough for a test.
SMALLER = {
    "deepspeed": ["tasks=[birds.yaml]", "training.max_steps=2", "training.per_device_train_batch_size=8"],
}
#: A shipped task of a thousand images, in the place of which a test's folder has a small one.
SMALL = {"glyphs": "glyphs.yaml"}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands() -> list[str]:
    """The lines of the README's bash blocks, the first column of its table of commands, and the evaluation page's blocks."""
    table = re.findall(r"^\| `(llava-keeplora[^`]*)` \|", README, flags=re.M)
    shown = [*blocks("bash"), *table, *blocks("bash", (ROOT / "docs/evaluation.md").read_text())]
    return [line for block in shown for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder: the README's two files, some images of birds, and the clone's scripts."""
    path = tmp_path_factory.mktemp("readme")
    (path / "scripts").symlink_to(ROOT / "scripts")
    for text in blocks("yaml"):
        (path / re.match(r"# (\S+)", text).group(1)).write_text(text)
    for split, count in (("train", 8), ("test", 2)):
        for shade, name in enumerate(("robin", "house_sparrow", "blue_tit")):
            (path / "birds" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (48, 48), (80 * shade, 10 * i, 40 if split == "train" else 60)).save(
                    path / "birds" / split / name / f"{i}.png"
                )
    (path / "receipts").mkdir()
    for split in ("train", "test"):
        Image.new("RGB", (48, 48), (90, 120, 40)).save(path / "receipts" / f"{split}.png")
        turns = [{"from": "human", "value": "<image>\nHow much is it?"}, {"from": "gpt", "value": "12.50"}]
        (path / "receipts" / f"{split}.json").write_text(
            json.dumps([{"id": split, "image": f"{split}.png", "conversations": turns}])
        )
    (path / "glyphs.yaml").write_text(
        (path / "birds.yaml").read_text().replace("name: birds", "name: glyphs")
    )
    return path


def test_the_readme_is_read_in_ten_minutes_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)", README)
    assert len(targets) > 15 and not [target for target in targets if not (ROOT / target).is_file()]


def test_the_readme_names_the_files_that_it_shows(folder):
    assert {"birds.yaml", "receipts.yaml", "run.yaml"} <= {p.name for p in folder.iterdir()}


def test_the_loop_of_the_readme_trains_and_protects(tmp_path):
    """Its four lines, around a small text model."""
    from tests.memory.conftest import make_text_model, text_batches
    from transformers import Trainer, TrainingArguments

    from llava_keeplora import KeepLora

    (block,) = blocks("python")
    model, batches = make_text_model(), text_batches(1)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    names = {
        "KeepLora": KeepLora,
        "Trainer": Trainer,
        "model": model,
        "batches": batches,
        "dataset": [{key: value[i] for key, value in batches[0].items()} for i in range(4)],
        "args": TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
    }
    exec(block.replace("rank=16", "rank=2"), names)
    assert [task.name for task in names["memory"].tasks] == ["task-1"]
    assert not before.equal(model.model.layers[0].self_attn.q_proj.weight)


def test_the_run_of_the_readme_is_a_valid_configuration(folder, monkeypatch):
    from llava_keeplora.config import load_config

    monkeypatch.chdir(folder)
    assert load_config("run.yaml").tasks == ("birds.yaml", "digits", "textures")


def test_every_command_of_the_readme_runs(folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = 0
    for command in commands():
        if command in BY_MAKE:
            continue
        words = [SMALL.get(word, word) for word in shlex.split(command)]
        words += SMALLER.get(words[0], [])
        if words[0] == "deepspeed":
            done = subprocess.run(
                words,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=4 * forked.patience(),
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code, out, err = forked.run(words, cwd=folder, env=environment)
        assert code == 0, f"{command}\n{out[-2000:]}\n{err[-2000:]}"
        ran += 1
    assert ran == 16
    assert (folder / "runs/birds/report.html").is_file() and (folder / "answers.jsonl").is_file()


@pytest.mark.slow
def test_every_bench_runs():
    code, out, err = forked.run([sys.executable, ROOT / "scripts/bench.py", "--quick"], 4 * forked.patience())
    assert code == 0 and out.count("\n| ") >= 15, err


def test_make_does_what_the_readme_says():
    made = (ROOT / "Makefile").read_text()
    assert "-c constraints.txt -e '.[test]'" in made
    for config in ("demo", "demo-llava", "demo-qwen"):
        assert (
            f"deepspeed scripts/train_seq.py --config {config}\n" in made
            and f"`deepspeed scripts/train_seq.py --config {config}`" in README
        )
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_every_shipped_configuration_is_valid():
    from llava_keeplora.config import list_configs, load_config

    for name in list_configs():
        assert load_config(name).methods
