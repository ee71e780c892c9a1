"""What `gradient_fraction: auto` and `feature_fraction: auto` read, and what their results are worth.

    python scripts/bench_shares.py --data-root DATA [--sets trashnet emoji] [--seeds 3] [--epochs 1]

For every set, and every seed of the reading order: the shares that the rule of `methods/shares.py` reads on
the embedded CLIP, with the layers and energies of the configuration `real`; the energy of all data's gradient
that A holds, divided by what A of all data holds, over all layers and in the worst one; the least energy of
all data's features that a layer's basis holds, minus ε_f; and the time of both passes, divided by that of
both over all data.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from llava_keeplora.capture import feature_pass, gradient_pass
from llava_keeplora.config import load_config
from llava_keeplora.methods.base import Layer, TaskContext
from llava_keeplora.methods.layers import in_layer
from llava_keeplora.methods.shares import AUTO, read_features, read_gradients
from llava_keeplora.models import load_model
from llava_keeplora.sequence.data import Batches, ImageCache
from llava_keeplora.steps import Budget
from llava_keeplora.subspace import DenseGradient, SecondMoment, principal_basis
from llava_keeplora_recipes import load_recipe, load_split

SETS = ("trashnet", "emoji", "signdigits")
BATCH = 32


class Bench:
    """A task on the embedded CLIP: its data in memory, its layers and their W_p.

    Args:
        name: of the set.
        data_root: the folder with the real sets.
        changes: of the configuration `real`.
    """

    def __init__(self, name: str, data_root: str | None):
        config = load_config("real", [f"data.root={data_root}"] * bool(data_root))
        family = load_model(config.model)
        family.model.requires_grad_(False)
        data = load_split(load_recipe(name), "train", data_root)
        self.inputs = family.inputs(data, ImageCache(family.prepare, budget_gb=2.0).split(data))
        self.task = family.task(data.recipe)
        self.layers: dict[str, Layer] = {}
        for part in family.parts:
            settings = config.parts[part]
            for layer, module in family.linear_layers(part, settings.targets).items():
                self.layers[layer] = Layer(
                    layer,
                    part,
                    module,
                    settings.rank,
                    settings.alpha,
                    settings.energy_weight,
                    settings.energy_feature,
                )
        self.modules = {layer: settings.module for layer, settings in self.layers.items()}
        self.bases = {
            layer: principal_basis(settings.module.weight.detach(), settings.energy_weight).basis
            for layer, settings in self.layers.items()
        }
        self.inputs.collate(range(len(self.inputs)))  # decodes the images

    def gradients(self, share: Any, statistics: Mapping[str, Any]) -> None:
        """Run the gradient pass over a share, as the driver does."""
        batches = Batches(self.inputs, BATCH, share)
        earlier = getattr(share, "start", 0)
        for statistic in statistics.values() if earlier else ():
            statistic.matrix *= earlier / share.stop
        total = batches.weight * (share.stop / (share.stop - earlier) if earlier else 1)
        gradient_pass(self.task, self.modules, batches, total, statistics)

    def features(self, make: Any, share: Any = 1.0) -> Mapping[str, Any]:
        """Run the feature pass over a share, as the driver does."""
        parts = {name: layer.part for name, layer in self.layers.items()}
        return feature_pass(self.task, self.modules, parts, Batches(self.inputs, BATCH, share), make)

    def dense(self) -> dict[str, DenseGradient]:
        """Return an empty statistic of every layer's gradient."""
        return {
            name: DenseGradient(module.out_features, module.in_features, self.bases[name])
            for name, module in self.modules.items()
        }

    def moments(self, groups: list[list[str]]) -> dict[str, SecondMoment]:
        """Return an empty statistic of every input."""
        made = {}
        for names in groups:
            made |= dict.fromkeys(names, SecondMoment(self.modules[names[0]].in_features))
        return made

    def extend(self, name: str, statistic: SecondMoment) -> Any:
        """Return what features add to a layer's basis."""
        return statistic.directions(self.bases[name], self.layers[name].energy_feature)


def rows(bench: Bench, seeds: int, epochs: float) -> list[list[str]]:
    """Return a row of the table for each seed."""
    started = time.perf_counter()
    full, moments = bench.dense(), bench.features(bench.moments)
    bench.gradients(1.0, full)
    full_seconds = time.perf_counter() - started
    best = {name: statistic.held_out(bench.layers[name].rank) for name, statistic in full.items()}
    table = []
    for seed in range(seeds):
        budget = Budget.of(
            {"num_train_epochs": epochs, "per_device_train_batch_size": BATCH}, len(bench.inputs), 1
        )
        ctx = TaskContext(1, "", bench.layers, bench.gradients, bench.features, seed, 10**9, budgets=[budget])
        started = time.perf_counter()
        gradients = bench.dense()
        read_gradients(
            ctx, gradients, {name: layer.rank for name, layer in bench.layers.items()}, AUTO, in_layer
        )
        features, _ = read_features(ctx, bench.moments, bench.extend, bench.bases, AUTO)
        seconds = time.perf_counter() - started
        # What A of the share holds of all data's gradient.
        held = {
            name: best[name].energy(statistic.held_out(bench.layers[name].rank).A)
            for name, statistic in gradients.items()
        }
        optimum = {name: held_out.energy(held_out.A) for name, held_out in best.items()}
        short = min(
            moments[name].held(bench.bases[name], bench.extend(name, statistic).new)
            - bench.layers[name].energy_feature
            for name, statistic in features.items()
        )
        records = [SimpleNamespace(**ctx.report[f"{kind}_share"]) for kind in ("gradient", "feature")]
        described = [f"{record.share:.3f} ({record.ended_by})" for record in records]
        table.append(
            [
                described[0],
                f"{1 - records[0].expected_loss:.3f}",
                f"{sum(held.values()) / sum(optimum.values()):.3f}",
                f"{min(held[name] / optimum[name] for name in held):.3f}",
                described[1],
                f"{-records[1].expected_loss:+.4f}",
                f"{short:+.4f}",
                f"{seconds / full_seconds:.2f}",
            ]
        )
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", help="the folder with the real sets")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0, help="of the training that limits the passes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ["set", "seed", "share for A", "A estimated", "A", "worst layer"]
    names += ["share for M_t", "M_t estimated", "M_t", "time of all data's"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name in args.sets:
        for seed, row in enumerate(rows(Bench(name, args.data_root), args.seeds, args.epochs)):
            print(f"| {name} | {seed} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
