"""A training of two tasks on several processes: `loop.py FOLDER trainer|accelerate [DEEPSPEED_JSON]`.

Each process reads every second example, and the task's data are not divisible by the number of processes.
"""

import sys

import torch
from tests.memory.conftest import make_text_model, text_batches
from transformers import Trainer, TrainingArguments

from llava_keeplora import KeepLora
from llava_keeplora.distributed import get_rank, get_world_size


def training_arguments(folder: str, deepspeed: str | None) -> TrainingArguments:
    """Anew for every task: accelerate's state belongs to one DeepSpeed engine."""
    return TrainingArguments(
        output_dir=f"{folder}/trainer",
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        report_to=[],
        use_cpu=True,
        deepspeed=deepspeed,
        save_strategy="no",
        disable_tqdm=True,
    )


def main(folder: str, loop: str, deepspeed: str | None = None) -> None:
    if loop == "trainer":
        training_arguments(folder, deepspeed)  # Creates the group of processes, which the passes share.
    else:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
    model = make_text_model()
    memory = KeepLora(model, targets=["q_proj", "v_proj"], rank=2, energy_weight=0.6)
    for seed in (1, 2):
        batches = text_batches(seed, count=5)
        share = batches[get_rank() :: get_world_size()]
        trained = memory.begin_task(share)
        if loop == "trainer":
            rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(4)]
            trainer = Trainer(model=trained, args=training_arguments(folder, deepspeed), train_dataset=rows)
            trainer.train()
        else:
            optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.02)
            loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)
            prepared, optimizer, loader = accelerator.prepare(trained, optimizer, loader)
            for _ in range(2):
                for batch in loader:
                    accelerator.backward(prepared(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        memory.end_task(share)
    if get_rank() == 0:
        memory.save(f"{folder}/memory")


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
