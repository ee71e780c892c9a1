"""Ablations of KeepLoRA: tables with one part removed at a time, and with its thresholds swept.

A plug-in method that has KeepLoRA's options can be ablated as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from llava_keeplora.compare.jobs import make_job
from llava_keeplora.compare.run_table import TableResult
from llava_keeplora.compare.table import Table, load_table, merged
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError
from llava_keeplora.registries import METHODS
from llava_keeplora.report.figures import LIGHT, encode, save
from llava_keeplora.report.html import PlotImage
from llava_keeplora.report.sweep import draw_sweep
from llava_keeplora_eval.matrix import ZERO_SHOT

METHOD = "keeplora"
#: Suffix of a variant's label → the options that remove a part.
WITHOUT: dict[str, dict[str, Any]] = {
    "without-weights": {"protect_weights": False},
    "without-features": {"protect_features": False},
    "random-A": {"init": "random"},
}
#: Threshold → the values to try, its symbol on a plot, and the suffix of the label of the run without it.
SWEPT = {
    "energy_weight": ((0.5, 0.6, 0.7, 0.8, 0.9), "ε_w", "without-weights"),
    "energy_feature": ((0.9, 0.95, 0.99), "ε_f", "without-features"),
}


@dataclass(frozen=True)
class Ablation:
    """A table of one method's variants.

    Args:
        table: the table.
        method: label of the complete method.
        sweeps: threshold → its value → the label of that variant.
        bounds: labels of the table's bounds, which the variants are read against.
    """

    table: Table
    method: str
    sweeps: dict[str, dict[float, str]]
    bounds: tuple[str, ...] = ()


def load_ablation(
    name_or_path: str,
    thresholds: Mapping[str, Sequence[float]] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    data_root: str | None = None,
    output_dir: str | None = None,
) -> Ablation:
    """Load a run's configuration as a table of ablations.

    Args:
        name_or_path: a configuration with KeepLoRA, or a plug-in with its options, among its methods; its
            settings there are those of every variant.
        thresholds: `energy_weight` or `energy_feature` → the values to try, the same for all adapted parts;
            those of `SWEPT` when left out.
        seeds: the seeds of every variant; the configuration's when None.
        overrides, data_root: see `load_config`.
        output_dir: the table's folder; the configuration's with the suffix `-ablation` when None.

    Raises:
        ConfigError: see `load_config`; or KeepLoRA is not among the methods, or the table has `tuning`.
    """
    seed_override = [] if seeds is None else [f"seeds={list(seeds)}"]
    table = load_table(name_or_path, [*overrides, *seed_override], data_root, output_dir)
    if table.tuning:
        raise ConfigError(
            f"'{name_or_path}' has `tuning`, and an ablation tries no settings",
            "add tuning=null to take KeepLoRA as it is there, or write the chosen ones into it",
        )
    method, settings = _ablated_method(table, name_or_path)
    job = make_job(table, method, table.orders[0], 0, method, settings)
    parts = parse_config(job.tree).methods[method].parts
    adapted = [name for name, part in parts.items() if part.train == "adapter"]
    bounds = tuple(
        label
        for label, name in _names(table).items()
        if isinstance(name, str) and name in METHODS and METHODS[name].bound
    )
    methods = {label: table.methods[label] for label in bounds} | {method: settings}
    methods |= {f"{method}-{end}": merged(settings, options) for end, options in WITHOUT.items()}
    sweeps = {}
    for threshold, (default, _, _) in SWEPT.items():
        values = (thresholds or {}).get(threshold, default)
        sweeps[threshold] = {value: f"{method}-{threshold.replace('_', '-')}-{value}" for value in values}
        methods |= {
            label: merged(settings, {"parts": {part: {threshold: value} for part in adapted}})
            for value, label in sweeps[threshold].items()
        }
    folder = table.output_dir
    folder = folder if output_dir else folder.with_name(f"{folder.name}-ablation")
    others = tuple(label for label in table.other_budget if label in bounds)
    ablated = Table(folder, table.run, methods, table.orders, other_budget=others)
    return Ablation(ablated, method, sweeps, bounds)


def _names(table: Table) -> dict[str, Any]:
    """Return label → the name of its method."""
    return {label: settings.get("method", label) for label, settings in table.methods.items()}


def _ablated_method(table: Table, name_or_path: str) -> tuple[str, dict[str, Any]]:
    """Return label and settings of the method to ablate: KeepLoRA, else the first plug-in with its options.

    Raises:
        ConfigError: the table has neither, or several of which none is called `keeplora`.
    """
    names = _names(table)
    labels = [label for label, name in names.items() if name == METHOD]
    if labels:
        if len(labels) > 1 and METHOD not in labels:
            raise ConfigError(
                f"'{name_or_path}' has several rows of the method {METHOD} ({', '.join(labels)})",
                f"name the one to ablate {METHOD}",
            )
        return METHOD, {"method": METHOD, **table.methods[METHOD if METHOD in labels else labels[0]]}
    needed = {option for options in WITHOUT.values() for option in options}
    plugins = {
        label: name for label, name in names.items() if isinstance(name, str) and METHODS.is_plugin(name)
    }
    for label, name in plugins.items():
        if needed <= {field.name for field in fields(METHODS[name].Options)}:
            return label, {"method": name, **table.methods[label]}
    raise ConfigError(
        f"'{name_or_path}' has no method {METHOD} and no plug-in with its options, so there is nothing to "
        "take away",
        f"add `{METHOD}: {{}}` to its methods",
    )


def draw_ablation(ablation: Ablation, outcome: TableResult) -> dict[str, PlotImage]:
    """Plot Transfer, Average and Last over each threshold, as PNG and SVG in the table's folder.

    Returns:
        name of the files → the plot, for the page.
    """
    images = {}
    for order, results in outcome.results.items():
        for threshold, (_, sign, without) in SWEPT.items():
            levels = (ZERO_SHOT, f"{ablation.method}-{without}", *ablation.bounds)
            figure = draw_sweep(results, ablation.method, ablation.sweeps[threshold], levels, sign, LIGHT)
            if figure is not None:
                name = f"{threshold.replace('_', '-')}-{order}"
                png = encode(figure, "png")
                images[name] = PlotImage(
                    png,
                    f"Order {order}: scores over {sign}, the same in every adapted part; dashed, what has "
                    "none; dash-dotted, bounds.",
                )
                save(figure, ablation.table.output_dir / f"{name}.png", png)
    return images
