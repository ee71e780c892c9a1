"""Text from anyone inside of Markdown: a name, a licence or a value is shown and never read as markup."""

from __future__ import annotations

import re

from llava_keeplora_eval.guard import printable

#: What begins code, emphasis, a link, a picture, a cell or another escape; `_` does at the edge of a word
#: alone.
_SIGNS = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def markdown_text(text: str) -> str:
    """Text as Markdown and HTML show it as it is, on one line (CommonMark 0.31, 2.4; HTML there is raw)."""
    text = (
        printable(" ".join(text.splitlines())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    return _SIGNS.sub(r"\\\g<0>", text)
