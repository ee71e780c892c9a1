"""A run that would compute in bfloat16 on a CPU that is slow at it says so when it starts."""

import logging

import pytest

from llava_keeplora import cli, precision
from llava_keeplora.sequence.runner import opened
from llava_keeplora.sequence.workspace import Workspace

SLOW = "no fast products of bfloat16 matrices on this CPU"


@pytest.fixture
def told(run_config, one_label, tmp_path, monkeypatch, caplog):
    """Function (fast, **sections) → what the start of a run says about bfloat16."""

    def start(fast, **sections):
        monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: fast)
        config = run_config(tmp_path / "run", **one_label("seq-lora"), **sections)
        with caplog.at_level(logging.WARNING), opened(Workspace(config)):
            pass
        return [r.getMessage() for r in caplog.records if SLOW in r.getMessage()]

    return start


@pytest.mark.parametrize(
    ("sections", "cure"),
    [
        ({"training": {"bf16": True}}, "as in fp32: training.bf16=false"),
        (
            {"training": {"bf16": True}, "model": {"dtype": "bfloat16"}},
            "as in fp32: model.dtype=float32 training.bf16=false",
        ),
    ],
)
def test_a_run_in_bfloat16_on_a_cpu_without_it_says_so_with_the_cure(told, sections, cure):
    (sentence,) = told(False, **sections)
    assert sentence.endswith(cure)


def test_nothing_is_said_of_fp32_or_where_bfloat16_is_fast(told):
    assert told(False) == []
    assert told(True, training={"bf16": True}) == []


def test_doctor_says_that_a_cpu_is_slow_in_bfloat16(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    from llava_keeplora.doctor import machine

    for fast in (True, False):
        monkeypatch.setattr(machine, "cpu_multiplies_bfloat16", lambda fast=fast: fast)
        cli.main(["doctor"])
        assert ("slow in bfloat16: train in fp32" in capfd.readouterr().out) is not fast
