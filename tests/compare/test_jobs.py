"""Runs at once: their part of the machine, and what happens to them when the table is stopped."""

import os
import signal
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import yaml

from llava_keeplora import cli
from llava_keeplora.compare import compare, jobs, table, writers
from llava_keeplora.config import load_config
from llava_keeplora.guard import DONT_SHIP
from llava_keeplora.run_folder import Stage
from llava_keeplora.saved_run import read_identity, run_identity
from llava_keeplora.sequence.stages import STAGES
from llava_keeplora_eval.guard import guarded


@pytest.fixture
def job(make_table, tmp_path):
    one = make_table(tmp_path / "table")
    return jobs.table_jobs(one, one.methods)["I"][0]


def test_workers_share_out_the_cores_and_the_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert jobs._share(0, 3) == {"OMP_NUM_THREADS": "2"} and jobs._share(0, 16) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert [jobs._share(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == [
        "1",
        "3",
        "1",
    ] and jobs._share(0, 3)["OMP_NUM_THREADS"] == "5"


def test_a_run_reads_its_configuration_as_the_table_has_it(make_table, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: None)
    training = {
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1.0e-5},
    }
    one = make_table(tmp_path / "t🙂", training=training)
    job = jobs.table_jobs(one, one.methods)["I"][0]
    job.config_file.parent.mkdir(parents=True)
    jobs.start(job, 0, 1)
    found = load_config(str(job.config_file))
    assert found.training["lr_scheduler_kwargs"] == {"min_lr": 1e-5} and found.output_dir == str(job.folder)


def test_a_run_that_is_refused_leaves_the_configuration_of_the_run_that_is_in_its_folder(
    make_table, tmp_path, monkeypatch
):
    codes = iter([0, 2])
    ended = lambda *args, **kwargs: SimpleNamespace(poll=partial(int, next(codes)))  # noqa: E731
    monkeypatch.setattr(subprocess, "Popen", ended)
    files = []
    for rank in (2, 1):
        methods = {"seq-lora": {"parts": {"vision": {"rank": rank}}}}
        table = make_table(tmp_path / "table", methods=methods)
        (job,) = jobs.table_jobs(table, table.methods)["I"]
        job.folder.mkdir(parents=True, exist_ok=True)
        failures = jobs.run_jobs([job], 1, ["seq-lora"])
        files.append(job.config_file.read_bytes())
    assert [failure.job for failure in failures] == [job] and files[0] == files[1]


def test_no_more_run_at_once_than_there_are_workers(make_table, tmp_path, monkeypatch):
    many = make_table(tmp_path / "table", seeds=[0, 1, 2])
    running, most = [], []

    class Process:
        def __init__(self, slot):
            running.append(slot)
            most.append(sorted(running))
            self.looks = 0

        def poll(self):
            self.looks += 1
            return None if self.looks < 3 else running.pop() * 0

    monkeypatch.setattr(jobs, "start", lambda job, slot, workers: Process(slot))
    monkeypatch.setattr(jobs, "PAUSE", 0)
    assert jobs.run_jobs(jobs.table_jobs(many, many.methods)["I"], 2, many.methods) == []
    assert len(most) == 6 and max(map(len, most)) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_table_stops_its_runs(job, monkeypatch, capfd, number, code):
    processes = []

    def start(*_):
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        return processes[-1]

    monkeypatch.setattr(jobs, "start", start)
    assert (
        guarded(
            lambda: jobs.run_jobs([job], 1, [job.label]),
            debug=False,
            going_on="run the same command to go on",
        )
        == code
    )
    assert processes[0].returncode == -signal.SIGTERM
    assert capfd.readouterr().err.splitlines()[-1] == "stopped; run the same command to go on"


def test_a_killed_table_goes_on_and_says_the_same(make_table, started, tmp_path, monkeypatch):
    undisturbed = compare(make_table(tmp_path / "undisturbed"))
    del started[:]
    real = STAGES[Stage.TRAINED]

    def killed(state, index):
        if state.config.label == "keeplora" and index == 2:
            raise KeyboardInterrupt
        return real(state, index)

    with monkeypatch.context() as patch:
        patch.setitem(STAGES, Stage.TRAINED, killed)
        with pytest.raises(KeyboardInterrupt):
            compare(make_table(tmp_path / "killed"))
    del started[:]
    outcome = compare(make_table(tmp_path / "killed"))
    assert [job.label for job in started] == ["keeplora"], "the first method's run was finished"
    for name, trials in undisturbed.results["I"].items():
        assert [trial.matrix for trial in trials] == [trial.matrix for trial in outcome.results["I"][name]]


def test_a_finished_run_that_its_guard_would_not_ship_is_no_failure(job, started, monkeypatch):
    start = jobs.start

    def dont_ship(*args):
        start(*args)
        return SimpleNamespace(poll=lambda: DONT_SHIP)

    monkeypatch.setattr(jobs, "start", dont_ship)
    assert jobs.run_jobs([job], 1, [job.label]) == [] and job.finished()


@pytest.fixture
def command(run_tree, tiny_tasks, tmp_path, capfd):
    """Function (methods, *arguments) → (exit code, stdout, errors on stderr) of `compare` on one task, its runs in processes of their own."""

    def run(methods, *arguments):
        (tmp_path / "table.yaml").write_text(
            yaml.safe_dump(run_tree(tmp_path / "out", tasks=[str(tiny_tasks[0])], methods=methods))
        )
        code = cli.main(["compare", "--config", str(tmp_path / "table.yaml"), *arguments])
        out, err = capfd.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("error: ")]

    return run


def test_the_command_starts_its_runs_as_a_user_would_and_prints_the_table(command, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "write_report", lambda *args: None)  # the images are other tests'
    code, said, errors = command({"seq-lora": {}})
    out = tmp_path / "out"
    assert code == 0 and errors == []
    assert (
        said.startswith("# Table out\n\n## Order I\n\nTasks: colours.")
        and f"\nHTML report: {out / 'report.html'}\n" in said
    )
    assert {"table.md", "table.tex", "table.csv", "table.json", "report.html", table.CACHE, "I"} == {
        path.name for path in out.iterdir()
    }
    assert "| seq-lora |" in (out / "I/seed-0/seq-lora.log").read_text()
    # The run that it made is one like any other.
    assert run_identity(load_config(str(out / "I/seed-0/seq-lora.yaml"))) == read_identity(
        out / "I/seed-0/seq-lora"
    )


@pytest.mark.slow
def test_of_two_runs_at_once_one_fails_and_is_named_with_its_log(command, tmp_path):
    code, said, errors = command(
        {"seq-lora": {}, "keeplora": {"parts": {"vision": {"energy_weight": 1.0}}}}, "--workers", "2"
    )
    place = tmp_path / "out/I/seed-0"
    scores = said.split("## Settings")[0]
    assert code == 1 and "| seq-lora |" in scores and "| keeplora |" not in scores
    assert len(errors) == 1 and errors[0].startswith(f"error: {place}/keeplora failed (layer ")
    assert errors[0].endswith(f"see {place}/keeplora.log; mend it, and run the same command again")
    assert "error: layer" in (place / "keeplora.log").read_text()
    assert {"report.html", "curves.png", "heatmap-seq-lora.svg"} <= {
        path.name for path in (tmp_path / "out/I").iterdir()
    }
