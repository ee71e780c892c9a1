"""Updates trained elsewhere: PEFT adapters and merged checkpoints, read as deltas of a base."""

from llava_keeplora.adopt.source import Source, Update, check_layers, find_source, read_update

__all__ = ["Source", "Update", "check_layers", "find_source", "read_update"]
