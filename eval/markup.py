"""Escaping of untrusted text for Markdown, so that a name or a value is never interpreted as markup."""

from __future__ import annotations

import re

from llava_keeplora_eval.guard import printable

#: Characters that begin code, emphasis, a link, an image, a cell or an escape; `_` does at a word's edge.
_SIGNS = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def markdown_text(text: str) -> str:
    """Escape a text so that Markdown and HTML show it literally, on one line (CommonMark 0.31, 2.4)."""
    text = (
        printable(" ".join(text.splitlines())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    return _SIGNS.sub(r"\\\g<0>", text)
