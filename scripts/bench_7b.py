"""One task on LLaVA-1.5-7B's architecture with random weights: seconds and peak memory of every stage.

    # bf16, full size; needs a GPU of 40 GiB
    python scripts/bench_7b.py
    # the language model in four bits; needs 24 GiB
    python scripts/bench_7b.py --quantization nf4
    # torch.linalg.svd and the dense gradient as well
    python scripts/bench_7b.py --against
    # A from one pass; flat spectra take six, trained weights rarely two
    python scripts/bench_7b.py --one-pass
    # a scaled-down copy, for instance for a CPU
    python scripts/bench_7b.py --scale 0.25 --images 16 --steps 5

The stages are the library's own passes over all linear layers of the language model, as in the published UCIT
setting: rank 32 (times the scale), energy 0.6, activations recomputed in the backward pass. Gaussian weights
have flatter spectra than trained ones, so their bases are larger and take longer.

Peak memory is what PyTorch had allocated on a GPU, weights included; on a CPU the resident memory of the
process above what it had before the model was made.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from random_llava import Size, language_layers, random_batch, random_llava
from torch import Tensor, nn

from llava_keeplora.adapters import AdapterInit, attach, dense_weight, detach
from llava_keeplora.capture import feature_pass, gradient_pass
from llava_keeplora.methods import Layer, TaskContext
from llava_keeplora.methods.gradient_init import gradient_statistic
from llava_keeplora.methods.keeplora import KeepLora
from llava_keeplora.methods.presets import PaperRules
from llava_keeplora.models.llava import LlavaTask
from llava_keeplora.models.quantization import keep_form
from llava_keeplora.subspace import principal_basis, sketch_width

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ENERGY, RANK = 0.6, 32
GIB = 2**30


class Memory:
    """Peak bytes of a device since the last reset; see the module's docstring."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.before = 0
        self.reset()
        self.before = 0 if self.cuda else self.peak()

    def reset(self) -> None:
        """Start a new measurement from the present memory."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux then counts the peak resident set from the present one (proc(5), clear_refs).
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak since the last reset, in bytes."""
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return (
            1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))
            - self.before
        )


class Bench:
    """One task, stage by stage.

    Args:
        args: the parsed command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size = Size() if args.scale == 1.0 else Size().scaled(args.scale)
        self.rank = args.rank or max(4, round(RANK * args.scale))
        self.memory = Memory(self.device)
        self.highest = 0
        convert = quantise if args.quantization == "nf4" else lambda module: None
        self.model = self.stage(
            "build", lambda: random_llava(self.size, DTYPES[args.dtype], self.device, convert)
        )
        self.task = LlavaTask(self.model)
        self.modules = language_layers(self.model)
        self.layers = {
            name: Layer(name, "language", module, self.rank, self.rank / 4, ENERGY, 0.99)
            for name, module in self.modules.items()
        }
        self.numbers = sum(module.in_features * module.out_features for module in self.modules.values())
        self.method = KeepLora(KeepLora.Options(gradient="sketch"))

    def stage(
        self,
        name: str,
        run: Callable[[], object],
        note: Callable[[object], str] = lambda result: "",
        counts: bool = True,
    ):
        """Run a stage and print a line of the table.

        Args:
            name: the stage's name.
            run: the stage.
            note: formats its result for the last column.
            counts: whether it is a part of a task, whose peak counts for the whole task.

        Returns:
            the stage's result.
        """
        self.memory.reset()
        start = time.perf_counter()
        result = run()
        peak = self.memory.peak()
        self.highest = max(self.highest, peak if counts else 0)
        print(
            f"| {name} | {time.perf_counter() - start:.2f} | {peak / GIB:.3f} | {note(result)} |", flush=True
        )
        return result

    def batches(self, images: int) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Yield batches with `images` images in all."""
        for start in range(0, images, self.args.batch):
            yield (
                random_batch(
                    self.size,
                    min(self.args.batch, images - start),
                    self.args.text,
                    self.args.answer,
                    start,
                    self.device,
                ),
                True,
            )

    def context(self, index: int, **passes: Callable[..., object]) -> TaskContext:
        """Return the method's context of the base (0) or of the task (1)."""
        pass_functions = {
            "gradients": lambda fraction, statistics: self.gradients(statistics),
            "features": lambda make, fraction: self.features(make),
        } | passes
        return TaskContext(
            index,
            "task",
            self.layers,
            seed=0,
            statistics_bytes=int(self.args.statistics_gb * 1e9),
            **pass_functions,
        )

    def gradients(self, statistics: Mapping[str, object]) -> Mapping[str, object]:
        """Fill statistics by one gradient pass over the images."""
        total = sum(self.task.weight(batch) for batch, _ in self.batches(self.args.images))
        gradient_pass(self.task, self.modules, self.batches(self.args.images), total, statistics)
        return statistics

    def features(self, make: Callable[[list[list[str]]], Mapping[str, object]]) -> Mapping[str, object]:
        """Fill statistics by one forward pass over the images."""
        return feature_pass(
            self.task,
            self.modules,
            dict.fromkeys(self.modules, "language"),
            self.batches(self.args.images),
            make,
        )

    def one_pass(self, sketched: bool = True) -> Mapping[str, object]:
        """Run the first pass of gradients, sketched or dense."""
        width = sketch_width(self.rank) if sketched else None
        return self.gradients(
            {
                name: gradient_statistic(layer, self.method.bases[name], width, 0)
                for name, layer in self.layers.items()
            }
        )

    def init_adapters(self) -> tuple[Mapping[str, AdapterInit], list[int]]:
        """Return the adapters, by as many gradient passes as A takes, and how many layers each pass fed."""
        fed: list[int] = []

        def gradients(fraction: float, statistics: Mapping[str, object]) -> None:
            fed.append(len(statistics))
            self.gradients(statistics)

        return self.method.init_adapters(self.context(1, gradients=gradients)), fed

    def prepare_from(self, statistics: dict[str, object]) -> dict[str, AdapterInit]:
        """Return the adapters by the first pass alone; its statistics are freed on the way."""
        directions = {
            name: PaperRules.directions(statistics.pop(name), self.method.bases[name], self.rank)
            for name in list(statistics)
        }
        return {
            name: AdapterInit(result.A.shape[1], result.A.shape[1] / 4, result.A.T)
            for name, result in directions.items()
        }

    def train(self, inits: Mapping[str, AdapterInit]) -> None:
        """Train B by steps of AdamW, with A frozen."""
        wrapper = attach(self.model, inits)
        optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=2e-4)
        for batch, _ in self.batches(self.args.steps * self.args.batch):
            optimiser.zero_grad()
            self.task(**batch)["loss"].backward()
            optimiser.step()
        detach(wrapper)

    def after_task(self) -> str:
        """Extend the bases by the features, with the second pass that sketches need.

        Returns:
            a description of the statistics of each pass.
        """
        passes: list[str] = []

        def features(
            make: Callable[[list[list[str]]], Mapping[str, object]], fraction: float
        ) -> Mapping[str, object]:
            if passes and self.args.one_pass:
                return {}
            statistics = self.features(make)
            kinds = ", ".join(sorted({type(statistic).__name__ for statistic in statistics.values()}))
            passes.append(f"{kinds} of {len(statistics)} layers")
            return statistics

        self.method.after_task(self.context(1, features=features))
        return ", then ".join(passes)

    def run(self) -> None:
        """Run every stage of a task, then the ordinary ways if `--against` is given."""

        def sizes(_):
            size = sum(basis.nbytes for basis in self.method.bases.values()) / GIB
            return f"{len(self.modules)} layers, {size:.3f} GiB on the host"

        self.stage("basis", lambda: self.method.after_task(self.context(0)), sizes)
        self.model.train()
        self.task.activation_checkpointing_enable()
        tokens = self.size.image_tokens + self.args.text
        images = f"{self.args.images} images, {tokens} tokens each, batches of {self.args.batch}"
        first = self.stage("first gradient pass, sketch", self.one_pass, lambda _: images)
        fed = lambda pair: f"rank {self.rank}; layers fed per pass: {', '.join(map(str, pair[1]))}"  # noqa: E731
        if self.args.one_pass:
            inits = self.stage(
                "A from that pass", lambda: self.prepare_from(first), lambda _: f"rank {self.rank}"
            )
        else:
            first.clear()
            inits, _ = self.stage("A, all the passes it asks for", self.init_adapters, fed)
        self.stage(
            "training", lambda: self.train(inits), lambda _: f"{self.args.steps} steps of {self.args.batch}"
        )
        self.task.activation_checkpointing_disable()
        self.model.eval()
        self.stage("features", self.after_task, lambda passes: f"{images}; {passes}")
        print(f"| whole task | | {self.highest / GIB:.3f} | the most of its stages |", flush=True)
        if self.args.against:
            self.against()

    def against(self) -> None:
        """Run the ordinary ways: a full SVD of one weight of each shape, and the dense gradient."""
        shapes = {(module.out_features, module.in_features): name for name, module in self.modules.items()}
        for shape, name in shapes.items():
            weight = dense_weight(self.modules[name]).detach()
            text = "x".join(map(str, shape))
            svd = lambda: torch.linalg.svd(weight.float(), full_matrices=False) and None  # noqa: E731
            self.stage(f"torch.linalg.svd {text}", svd, counts=False)
            ours = lambda: principal_basis(weight, ENERGY)  # noqa: E731
            self.stage(
                f"principal_basis {text}", ours, lambda basis: f"k={basis.rank}, {basis.method}", counts=False
            )
        self.model.train()
        self.task.activation_checkpointing_enable()
        dense = f"{4 * self.numbers / GIB:.3f} GiB of gradients"
        self.stage(
            "first gradient pass, dense", lambda: self.one_pass(sketched=False), lambda _: dense, counts=False
        )


def quantise(module: nn.Module) -> None:
    """Quantise a module's linear layers to NF4 with quantised scales, one after the other."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear:
                continue
            form = {"compress_statistics": True, "quant_type": "nf4"}
            quantised = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=layer.weight.dtype,
                device="meta",
                **form,
            )
            quantised.weight = Params4bit(layer.weight.data, requires_grad=False, module=quantised, **form)
            setattr(parent, name, quantised.to(layer.weight.device))
    keep_form(module)


def main() -> None:
    """Run the task and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="widths, depths and image as a share of the 7B model's"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the weights")
    parser.add_argument(
        "--quantization", choices=("nf4",), help="of the language model's linear layers, by bitsandbytes"
    )
    parser.add_argument("--rank", type=int, help="of the adapters; 32 times the scale by default")
    parser.add_argument("--images", type=int, default=64, help="of the gradient and the feature pass")
    parser.add_argument("--steps", type=int, default=50, help="training steps")
    parser.add_argument("--batch", type=int, default=4, help="images in a batch")
    parser.add_argument("--text", type=int, default=128, help="text tokens of an example, at most")
    parser.add_argument("--answer", type=int, default=16, help="of these, tokens to be learned")
    parser.add_argument(
        "--statistics-gb",
        type=float,
        default=4.0,
        help="for the features, in 10^9 bytes, as a run's memory.statistics_gb",
    )
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="take A and the features from one pass each, however good it is",
    )
    parser.add_argument("--against", action="store_true", help="measure the plain ways too")
    parser.add_argument("--threads", type=int, help="CPU threads for torch; its own choice by default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {where}, {args.quantization or args.dtype}, scale {args.scale:g}")
    print("| stage | seconds | peak GiB | note |\n|---|---|---|---|", flush=True)
    Bench(args).run()


if __name__ == "__main__":
    main()
