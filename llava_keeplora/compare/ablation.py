"""KeepLoRA with one part taken away at a time, and with its thresholds swept.

A table of one method's variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_keeplora.compare.jobs import make_job
from llava_keeplora.compare.run_table import TableResult
from llava_keeplora.compare.table import Table, load_table, merged
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.report.figures import LIGHT, encode, save
from llava_keeplora.report.html import Picture
from llava_keeplora.report.sweep import draw_sweep
from llava_keeplora_eval.matrix import ZERO_SHOT

METHOD = "keeplora"
#: label → what is taken away.
WITHOUT: dict[str, dict[str, Any]] = {
    "keeplora-without-weights": {"protect_weights": False},
    "keeplora-without-features": {"protect_features": False},
    "keeplora-random-A": {"init": "random"},
}
#: The values that are tried of a threshold, its name on a plot, and the label of the run that does without
#: it.
SWEPT = {
    "energy_weight": ((0.5, 0.6, 0.7, 0.8, 0.9), "ε_w", "keeplora-without-weights"),
    "energy_feature": ((0.9, 0.95, 0.99), "ε_f", "keeplora-without-features"),
}


@dataclass(frozen=True)
class Ablation:
    """A table of variants.

    Args:
        table: the table.
        sweeps: threshold → its value → the label.
    """

    table: Table
    sweeps: dict[str, dict[float, str]]


def load_ablation(
    name_or_path: str,
    thresholds: Mapping[str, Sequence[float]] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    data_root: str | None = None,
    output_dir: str | None = None,
) -> Ablation:
    """Make a table of ablations from a run's configuration.

    Args:
        name_or_path: a configuration with KeepLoRA among its methods; what it sets for it, every variant has.
        thresholds: `energy_weight` or `energy_feature` → the values that every adapted part takes in turn;
            those of `SWEPT` when left out.
        seeds: of every variant; the configuration's when None.
        overrides, data_root: see `load_config`.
        output_dir: the table's folder; the configuration's with `-ablation` behind it when None.

    Raises:
        ConfigError: see `load_config`; or KeepLoRA is not among the methods, or settings are to be tried.
    """
    own_seeds = [] if seeds is None else [f"seeds={list(seeds)}"]
    table = load_table(name_or_path, [*overrides, *own_seeds], data_root, output_dir)
    if table.tuning:
        raise ConfigError(
            f"'{name_or_path}' has `tuning`, and an ablation tries no settings",
            "add tuning=null to take KeepLoRA as it is there, or write the chosen ones into it",
        )
    own = next(
        (settings for label, settings in table.methods.items() if settings.get("method", label) == METHOD),
        None,
    )
    if own is None:
        raise ConfigError(
            f"'{name_or_path}' has no method {METHOD}, so there is nothing to take away from it",
            f"add `{METHOD}: {{}}` to its methods",
        )
    own = {"method": METHOD, **own}
    resolved = parse_config(make_job(table, METHOD, table.orders[0], 0, METHOD, own).tree).methods[METHOD]
    adapted = [part for part, settings in resolved.parts.items() if settings.train == "adapter"]
    methods, sweeps = {METHOD: own, **{label: merged(own, change) for label, change in WITHOUT.items()}}, {}
    for threshold, (usual, _, _) in SWEPT.items():
        values = (thresholds or {}).get(threshold, usual)
        sweeps[threshold] = {value: f"{METHOD}-{threshold.replace('_', '-')}-{value}" for value in values}
        methods |= {
            label: merged(own, {"parts": {part: {threshold: value} for part in adapted}})
            for value, label in sweeps[threshold].items()
        }
    place = (
        table.output_dir if output_dir else table.output_dir.with_name(f"{table.output_dir.name}-ablation")
    )
    return Ablation(Table(place, table.run, methods, table.orders), sweeps)


def draw_ablation(ablation: Ablation, outcome: TableResult) -> dict[str, Picture]:
    """Write Transfer, Average and Last over each threshold as PNG and SVG into the table's folder.

    Returns:
        name of the files → the picture, for the page.
    """
    pictures = {}
    for order, results in outcome.results.items():
        for threshold, (_, sign, without) in SWEPT.items():
            drawn = draw_sweep(results, METHOD, ablation.sweeps[threshold], (ZERO_SHOT, without), sign, LIGHT)
            if drawn is not None:
                name = f"{threshold.replace('_', '-')}-{order}"
                png = encode(drawn, "png")
                pictures[name] = Picture(
                    png,
                    f"Order {order}: scores over {sign}, the same in every adapted part; dashed, what has "
                    "none.",
                )
                save(drawn, ablation.table.output_dir / f"{name}.png", png)
    return pictures
