"""One checkpoint out of base and deltas: what a quantised base cannot take up is merged once, into an unquantised copy."""

from __future__ import annotations

from pathlib import Path

from llava_keeplora.models import Family

#: Of one file; the Hub, and machines with little memory, like several better than one huge one.
SHARD = "5GB"


def write_merged(folder: Path, family: Family) -> None:
    """Write an ordinary checkpoint with its processor.

    Args:
        folder: where to.
        family: the unquantised base, whose layers carry W_0 + Σ s_i B_i A_i, summed in fp32 and rounded to its dtype once.
    """
    family.model.save_pretrained(folder, max_shard_size=SHARD)
    family.processor.save_pretrained(folder)
