"""Benchmarks of speed: this project's code against the ordinary way to do the same work.

    python scripts/bench.py                 # every benchmark, but for the long ones
    python scripts/bench.py basis           # one of them
    python scripts/bench.py basis --quick   # small sizes, to see that it works
    python scripts/bench.py basis-wide      # a 7B model's down_proj and up_proj; takes minutes
    python scripts/bench.py methods         # one task of every method; takes minutes

A benchmark is a function `(repeats, quick) -> Iterable[Row]`, listed in BENCHES.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import bench_llava
import bench_methods
import bench_passes
import bench_streaming
import torch
from bench_passes import Pair

from llava_keeplora.subspace import energy_rank, principal_basis


class Row(NamedTuple):
    """One line of the table: median seconds of the ordinary way and of ours, with a note."""

    name: str
    plain: float
    ours: float
    note: str

    @property
    def ratio(self) -> float:
        """The ordinary way's time as a multiple of ours: above 1 is faster."""
        return self.plain / self.ours

    @property
    def cost(self) -> float:
        """Our time as a multiple of the ordinary way's."""
        return self.ours / self.plain


def medians(
    functions: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True
) -> dict[str, float]:
    """Return the median seconds of each function, after one warm-up.

    The functions take turns, so that other work on the machine slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + warm_up):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn or not warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def weight_with_spectrum(out_dim: int, in_dim: int, exponent: float) -> torch.Tensor:
    """Return a weight (out, in) with singular values i^-exponent and random orthogonal factors."""
    generator = torch.Generator().manual_seed(0)
    count = min(out_dim, in_dim)
    left = torch.linalg.qr(torch.randn(out_dim, count, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(in_dim, count, generator=generator)).Q
    return (left * torch.arange(1, count + 1) ** -exponent) @ right.T


def bench_basis(repeats: int, quick: bool) -> Iterator[Row]:
    """Time `principal_basis` against a full SVD with the energy rule, on spectra like trained weights'."""
    for shape in [(256, 256)] if quick else [(1024, 1024), (2048, 2048), (2752, 1024), (4096, 1024)]:
        for exponent in (0.5, 1.0):
            yield from _basis_rows(*shape, exponent, repeats)


def bench_basis_wide(repeats: int, quick: bool) -> Iterator[Row]:
    """Time the same at the shapes of a 7B model's MLP, once each."""
    for shape in [(256, 688), (688, 256)] if quick else [(4096, 11008), (11008, 4096)]:
        for exponent in (0.5, 1.0):
            yield from _basis_rows(*shape, exponent, 1, warm_up=False)


def _basis_rows(out_dim: int, in_dim: int, exponent: float, repeats: int, warm_up: bool = True) -> list[Row]:
    weight = weight_with_spectrum(out_dim, in_dim, exponent)
    energies = (0.6, 0.85, 0.99)
    ours = {str(energy): lambda energy=energy: principal_basis(weight, energy) for energy in energies}
    seconds = medians({"svd": lambda: torch.linalg.svd(weight, full_matrices=False)} | ours, repeats, warm_up)
    # The weight was made with this spectrum; computing it would take as long as the benchmark.
    squared = torch.arange(1, min(out_dim, in_dim) + 1, dtype=torch.float64) ** (-2 * exponent)
    rows = []
    for energy in energies:
        result, rank = principal_basis(weight, energy), energy_rank(squared, energy)
        exact = float(squared[:rank].sum() / squared.sum())
        verdict = "same k" if result.rank == rank else f"k DIFFERS from {rank}"
        note = f"k={result.rank} ({verdict}), energy off by {abs(result.energy - exact):.0e}, {result.method}"
        name = f"basis {out_dim}x{in_dim} sigma~i^-{exponent} energy {energy}"
        rows.append(Row(name, seconds["svd"], seconds[str(energy)], note))
    return rows


def bench_pair(build: Callable[[bool], Pair]) -> Callable[[int, bool], list[Row]]:
    """Return the benchmark of a pair: a part of a task against the ordinary way."""

    def bench(repeats: int, quick: bool) -> list[Row]:
        name, plain, ours, note = build(quick)
        seconds = medians({"plain": plain, "ours": ours}, 1 if quick else 3 * repeats, warm_up=not quick)
        return [Row(name, seconds["plain"], seconds["ours"], note)]

    return bench


def bench_methods_of(data_root: str | None, repeats: int, quick: bool) -> Iterator[Row]:
    """Time one task of every method against sequential LoRA's."""
    return (Row(*values) for values in bench_methods.compare_methods(repeats, quick, data_root))


#: Pairs on the embedded models, which have one size, and on random models, which `quick` makes smaller.
PAIRS = {
    name: lambda quick, build=build: build()
    for name, build in (bench_passes.PAIRS | bench_llava.PAIRS).items()
} | bench_streaming.PAIRS
BENCHES: dict[str, Callable[[int, bool], Iterable[Row]]] = {
    "basis": bench_basis,
    "basis-wide": bench_basis_wide,
    "methods": partial(bench_methods_of, None),
    **{name: bench_pair(build) for name, build in PAIRS.items()},
}
#: Benchmarks that run only when they are named.
LONG = ("basis-wide", "methods")


def main() -> None:
    """Run the named benchmarks, by default all but the long ones, and print a table row per measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "bench",
        nargs="*",
        metavar="bench",
        help=f"any of: {', '.join(BENCHES)} (default: all but {', '.join(LONG)})",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, of which the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads for torch; its own choice by default")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument(
        "--data-root",
        help="for methods: the folder with the real sets, of which one is the task (default: the digits)",
    )
    args = parser.parse_args()
    BENCHES["methods"] = partial(bench_methods_of, args.data_root)
    unknown = set(args.bench) - set(BENCHES)
    if unknown:
        parser.error(f"no bench called {', '.join(sorted(unknown))}; choose from {', '.join(BENCHES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.repeats} rounds "
        f"({1 if args.quick else 3 * args.repeats} for pairs, 1 for basis-wide)"
    )
    print(
        "| what | plain s | ours s | plain / ours | ours / plain | note |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for name in args.bench or [name for name in BENCHES if name not in LONG]:
        for row in BENCHES[name](args.repeats, args.quick):
            print(
                f"| {row.name} | {row.plain:.4f} | {row.ours:.4f} | {row.ratio:.2f} | {row.cost:.2f} | "
                f"{row.note} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
