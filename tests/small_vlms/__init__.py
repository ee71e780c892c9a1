"""Small checkpoints of image-text-to-text models: the real architecture, layout of files, special tokens and chat
template of each type, random weights."""

from .writers import SMALL_VLMS, write_small_vlm

__all__ = ["SMALL_VLMS", "write_small_vlm"]
