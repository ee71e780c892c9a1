"""The memory around other people's loops: transformers' Trainer, TRL's SFTTrainer, accelerate, ZeRO-2."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.memory.conftest import make_text_model, text_batches
from transformers import Trainer, TrainingArguments

from llava_keeplora import KeepLora
from llava_keeplora.adapters import lora_layers

ROOT = Path(__file__).parents[2]


def check_identities(memory: KeepLora, first_states: int = 1) -> None:
    """Every task's update is zero on what was protected before it, and A has orthonormal rows."""
    for t, task in enumerate(memory.tasks, 1):
        for name, delta in task.deltas.items():
            before = torch.cat([state[name] for state in memory.states[:t] if name in state], dim=1).double()
            update = delta.dense().double()
            assert update.norm() > 1e-4
            assert (update @ before).norm() < 1e-5 * update.norm()
            A = delta.A.double()
            assert torch.allclose(A @ A.T, torch.eye(len(A), dtype=torch.float64), atol=1e-5)


def rows(seed: int) -> list[dict[str, torch.Tensor]]:
    return [{key: v[i] for key, v in batch.items()} for batch in text_batches(seed) for i in range(4)]


def arguments(folder: Path, **settings) -> dict:
    gc.freeze()  # A Trainer collects garbage at its start; without the libraries' objects that is quick.
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }


@pytest.mark.parametrize("recomputing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_in_transformers_trainer_only_B_moves(tmp_path, recomputing):
    model = make_text_model()
    memory = KeepLora(model, targets=["q_proj", "v_proj"], rank=2, energy_weight=0.6)
    for seed in (1, 2):
        trained = memory.begin_task(text_batches(seed))
        args = TrainingArguments(**arguments(tmp_path, gradient_checkpointing=recomputing))
        Trainer(model=trained, args=args, train_dataset=rows(seed)).train()
        memory.end_task(text_batches(seed))
    check_identities(memory)


def test_a_trainer_that_was_killed_resumes_with_A_frozen(tmp_path):
    """The checkpoint holds A and B; loading it makes both trainable in PEFT's own way."""
    deltas = []
    for killed in (False, True):
        model = make_text_model()
        memory = KeepLora(model, targets=["q_proj"], rank=2, energy_weight=0.6)
        folder = tmp_path / str(killed)
        settings = arguments(folder, save_strategy="steps", save_steps=2)
        trained = memory.begin_task(text_batches(1))
        Trainer(
            model=trained,
            args=TrainingArguments(
                **{**settings, "max_steps": 2 if killed else 4, "lr_scheduler_type": "constant"}
            ),
            train_dataset=rows(1),
        ).train()
        if killed:  # A new process: the same base, the same task, the checkpoint.
            model = make_text_model()
            memory = KeepLora(model, targets=["q_proj"], rank=2, energy_weight=0.6)
            trained = memory.begin_task(text_batches(1))
            Trainer(
                model=trained,
                args=TrainingArguments(**{**settings, "lr_scheduler_type": "constant"}),
                train_dataset=rows(1),
            ).train(resume_from_checkpoint=True)
            assert not any(
                layer.lora_A["default"].weight.requires_grad for layer in lora_layers(model).values()
            )
        memory.end_task(text_batches(1))
        deltas.append(memory.tasks[0].deltas)
    assert all(torch.equal(delta.B, deltas[1][name].B) for name, delta in deltas[0].items())


def make_tokenizer():
    """Words of one letter, with the special tokens that TRL needs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True, "packing_strategy": "wrapped"},
        {"gradient_checkpointing": True},
        {"completion_only_loss": True},
    ],
    ids=["plain", "packing", "gradient-checkpointing", "completion-only"],
)
def test_in_trls_sft_trainer_only_B_moves(tmp_path, settings):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = make_text_model(), make_tokenizer()
    memory = KeepLora(model, targets=["q_proj", "v_proj"], rank=2, energy_weight=0.6)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        letters = [
            " ".join("abcdefghij"[i] for i in torch.randint(0, 10, (8,), generator=generator))
            for _ in range(12)
        ]
        data = (
            Dataset.from_dict({"prompt": [x[:7] for x in letters], "completion": [x[7:] for x in letters]})
            if "completion_only_loss" in settings
            else Dataset.from_dict({"text": letters})
        )
        trained = memory.begin_task(text_batches(seed))
        defaults = {"max_length": 16, "gradient_checkpointing": False, "bf16": False}
        trainer = SFTTrainer(
            model=trained,
            args=SFTConfig(**{**arguments(tmp_path), **defaults, **settings}),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
        memory.end_task(list(trainer.get_train_dataloader()))
    check_identities(memory)


def run_loop(folder: Path, command: list[str], *rest: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "tests/memory/loop.py"), str(folder), *rest],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def memory_of(folder: Path) -> KeepLora:
    return KeepLora.load(make_text_model(), folder / "memory")


def launched(program: str, *arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / program), *arguments]


@pytest.mark.slow
def test_two_processes_of_accelerate_protect_what_one_does(tmp_path):
    """Five batches on two processes: three and two."""
    run_loop(tmp_path / "one", [sys.executable], "accelerate")
    run_loop(
        tmp_path / "two",
        launched(
            "accelerate",
            "launch",
            "--cpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
        ),
        "accelerate",
    )
    one, two = memory_of(tmp_path / "one"), memory_of(tmp_path / "two")
    check_identities(two)
    for name, basis in one.states[0].items():
        assert torch.equal(basis, two.states[0][name])
    for name, delta in one.tasks[0].deltas.items():
        other = two.tasks[0].deltas[name]
        # The first task's A comes from the same mean over all batches, however they are shared out.
        assert torch.allclose(delta.A.T @ delta.A, other.A.T @ other.A, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2])
def test_zero_2_on_two_processes(tmp_path, stage):
    config = tmp_path / "zero.json"
    config.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": stage},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "zero_allow_untested_optimizer": True,
            }
        )
    )
    run_loop(tmp_path, launched("deepspeed", "--num_accelerators", "2"), "trainer", str(config))
    check_identities(memory_of(tmp_path))
