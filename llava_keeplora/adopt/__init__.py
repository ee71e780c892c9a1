"""Updates trained elsewhere: PEFT adapters and merged checkpoints, read as deltas of a base."""

from llava_keeplora.adopt.source import (
    Source,
    Update,
    check_layers,
    check_unchanged,
    find_source,
    read_update,
)

__all__ = ["Source", "Update", "check_layers", "check_unchanged", "find_source", "read_update"]
