"""The command line: exit codes, one sentence per mistake, the traceback on demand, quick help."""

import os
import signal
import sys

import pytest

import forked
from llava_keeplora import cli
from llava_keeplora_eval.files import write_atomic
from llava_keeplora_eval.guard import guarded


def sentence(capfd, *arguments) -> str:
    """Run `train`, which must end with code 2 and one line on stderr."""
    assert cli.main(["train", *map(str, arguments)]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err and out == ""
    return lines[0]


def spoil(own_tasks, how):
    import yaml

    folder, facts = own_tasks[0].parent / "colours", yaml.safe_load(own_tasks[0].read_text())
    if how == "truncated image":
        image = folder / "train/red/0.png"
        image.write_bytes(image.read_bytes()[:90])
    elif how == "empty class":
        for image in (folder / "train/red").iterdir():
            image.unlink()
    elif how == "label outside":
        facts["classes"] = ["red", "green", "blue"]
    elif how == "duplicate ids":
        import datasets

        path = own_tasks[1].parent / "stripes/train.parquet"
        table = datasets.Dataset.from_parquet(str(path))
        datasets.Dataset.from_dict(
            table.to_dict() | {"id": ["same"] * len(table)},
            features=datasets.Features(table.features | {"id": datasets.Value("string")}),
        ).to_parquet(str(path))
        stripes = yaml.safe_load(own_tasks[1].read_text())
        stripes["source"]["columns"] = {"image": "image", "label": "label", "id": "id"}
        own_tasks[1].write_text(yaml.safe_dump(stripes))
    own_tasks[0].write_text(yaml.safe_dump(facts))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated image", "1 of 24 images of colours/train cannot be read"),
        ("empty class", "colours/train (red)"),
        ("label outside", "grey"),
        ("duplicate ids", "stripes/train has 1 ids more than once (same)"),
    ],
)
def test_bad_data_ends_with_code_2_and_one_sentence(own_tasks, config_file, tmp_path, capfd, how, words):
    path = config_file(tasks=[str(p) for p in own_tasks[:2]], methods={"seq-lora": {}})
    spoil(own_tasks, how)
    assert words in sentence(capfd, "--config", path, "--output-dir", tmp_path / "run")


def test_a_bad_configuration_ends_with_code_2_and_one_sentence(config_file, capfd, tmp_path):
    assert "unknown key 'parts.vision.rnak'; did you mean 'rank'." in sentence(
        capfd, "--config", config_file(), "parts.vision.rnak=2"
    )
    assert "there is no configuration 'gone.yaml'" in sentence(capfd, "--config", "gone.yaml")
    assert "did you mean 'learning_rate'" in sentence(
        capfd, "--config", config_file(), "training.learnin_rate=2"
    )


def test_debug_shows_the_traceback(config_file, capfd):
    from llava_keeplora.errors import ConfigError

    with pytest.raises(ConfigError, match="parts.vision.rnak"):
        cli.main(["train", "--debug", "--config", str(config_file()), "parts.vision.rnak=2"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_finishes_the_file_being_written_and_says_how_to_go_on(
    capfd, tmp_path, monkeypatch, number, code
):
    """The signal comes in the middle of a write, between its bytes and its new name."""
    written, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda *paths: (os.kill(os.getpid(), number), written.append(paths), replace(*paths))
    )

    def action():
        write_atomic(tmp_path / "whole", "content")
        pytest.fail("it went on")

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert guarded(action, debug=False, going_on="run the same command to go on") == code
    assert (tmp_path / "whole").read_text() == "content" and written
    assert capfd.readouterr().err == "stopped; run the same command to go on\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_list_names_everything(capfd):
    assert cli.main(["list"]) == 0
    out = capfd.readouterr().out
    assert all(name in out for name in ("keeplora", "seq-lora", "demo", "digits"))
    needs = (
        "models of two encoders and models that write; merges",
        "models of two encoders; needs reference data; merges",
        "models of two encoders; needs the task at test time; extra at test: one product with the image features; "
        "does not merge (`rejection`: the base answers what resembles no learned task)",
    )
    assert all(f" {words}\n" in out for words in needs), "what a method asks for stands below it"


@pytest.mark.usefixtures("undrawn")
def test_report_writes_a_finished_run_again(run_config, tmp_path, capfd, tiny_tasks, monkeypatch):
    from llava_keeplora.sequence import runner

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_run_report", lambda root: None)
        runner.run(run_config(tmp_path / "run", methods={"seq-lora": {}}, tasks=[str(tiny_tasks[0])]))
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "seq-lora" in capfd.readouterr().out and (tmp_path / "run/report.html").is_file()
    assert cli.main(["report", str(tmp_path)]) == 2


@pytest.mark.usefixtures("undrawn")
def test_a_run_in_bf16_goes_through(config_file, capfd, tmp_path, tiny_tasks):
    arguments = [
        "--config",
        config_file(tasks=[str(tiny_tasks[0])]),
        "--output-dir",
        tmp_path / "run",
        "training.bf16=true",
    ]
    assert cli.main(["train", *map(str, arguments)]) == 0
    assert "| keeplora |" in capfd.readouterr().out


GROWTH = """
import gc, sys
from pathlib import Path
if "bounded" in sys.argv:
    from llava_keeplora_eval.guard import bound_caches
    bound_caches()
import torch
layer = torch.nn.Linear(512, 512, dtype=torch.bfloat16)

def held(lengths):
    for n in lengths:
        layer(torch.ones(n, 512, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    gc.collect()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

print(held(range(1, 91)), held(range(91, 136)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="resident memory is read from Linux's /proc"
)
def test_memory_of_a_bf16_run_on_a_cpu_grows_little_with_new_lengths_of_a_batch():
    # What a compiled product takes depends on the processor: 2 MB a length without the bound on one, 1 MB on another. The
    # bounded caches are nearly full after 90 lengths: 45 more take 8 MB then, and 81 MB without the bound.
    environment = {
        k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")
    }  # Another test's command may have set them here.
    growth = {}
    for bound in ("bounded", "libraries"):
        code, out, err = forked.run([sys.executable, "-c", GROWTH, bound], env=environment)
        assert code == 0, err
        before, after = map(float, out.split())
        growth[bound] = after - before
    assert growth["libraries"] > 30 and growth["bounded"] < 0.2 * growth["libraries"], growth
