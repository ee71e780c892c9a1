"""One checkpoint out of base and deltas: what a quantised base cannot take up is merged once, into an unquantised copy."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from llava_keeplora.models import Family

#: Of one file; the Hub, and machines with little memory, like several better than one huge one.
SHARD = "5GB"
#: Training changes nothing of a processor, so its files go along as they are, in whatever format the base has them.
PROCESSOR = (
    "*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt", "*.model",
)


def write_merged(folder: Path, family: Family) -> None:
    """Write an ordinary checkpoint with its processor.

    Args:
        folder: where to.
        family: the unquantised base, whose layers carry W_0 + Σ s_i B_i A_i, summed in fp32 and rounded to its dtype once.
    """
    family.model.save_pretrained(folder, max_shard_size=SHARD)
    path = Path(family.path)
    base = path if path.is_dir() else Path(snapshot_download(family.path, revision=family.revision, allow_patterns=list(PROCESSOR)))
    for file in {file for pattern in PROCESSOR for file in base.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, folder / file.name)
