"""What users write, licences, names and values, is shown in every document and never read as its markup."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt

from llava_keeplora.export import card
from llava_keeplora.models.usage import classification_usage
from llava_keeplora.report.html import html_rows
from llava_keeplora.report.latex_csv import latex_table
from llava_keeplora.report.tables import markdown_table
from llava_keeplora_eval import Matrix
from llava_keeplora_recipes import load_recipe

HOSTILE = (
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://a/b.png)",
    "a | b",
    "`code`",
    "**bold** _it_",
    "a\n\n# head",
    "&lt;b&gt;",
    "\\",
    "\x1b[2Jx",
    "~~gone~~",
    "<!-- c -->",
    "a_b__c_d",
    "# x",
)


def shown(text: str) -> str:
    """As a page shows it: on one line, control characters by their escapes."""
    return re.sub("\x1b", r"\\x1b", " ".join(text.splitlines()))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_is_shown_as_it_was_written(text):
    source = [
        markdown_table(["name", text], [[text, "1.0"]]),
        Matrix([text], [1.0], [[2.0]]).markdown().partition("| **T")[0],
    ]
    for table in source:
        html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(table)
        assert set(re.findall(r"<(/?\w+|!)", html)) <= {
            f"{end}{tag}" for tag in ("table", "thead", "tbody", "tr", "th", "td") for end in ("", "/")
        }, html
        tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(table)
        cells = [
            "".join(child.content for child in token.children) for token in tokens if token.type == "inline"
        ]
        assert shown(text) in cells


@pytest.mark.parametrize("text", HOSTILE)
def test_html_and_latex_hold_it_as_text(text):
    assert set(re.findall(r"<(/?\w+|!)", html_rows([[text]]))) <= {"tr", "/tr", "th", "/th"}
    row = latex_table(["name"], [[text]]).splitlines()[4]
    assert not re.search(
        r"(?<!\\)[&%$#_{}](?!\})",
        row.removesuffix(r" \\").replace(r"\textbackslash{}", "").replace(r"\textasciitilde{}", ""),
    ), row
    assert "\x1b" not in row


def test_a_cards_row_of_a_hostile_recipe_is_text_and_its_code_has_quoted_names():
    recipe = dataclasses.replace(load_recipe("digits"), licence=HOSTILE[0], homepage=HOSTILE[1])
    table = markdown_table(["task", "version", "kind", "metric", "licence", "source"], [card._task(recipe)])
    assert "<script" not in MarkdownIt("commonmark", {"html": True}).enable("table").render(table)
    usage = classification_usage("clip", "AutoModel", ['a"b', "```"], {"padding": True})
    code = card.snippet(usage, 'x"); import os #', SimpleNamespace(id='b"c', revision=None))
    compile(code, "card", "exec")
    assert "```" not in [line.strip() for line in code.splitlines()] and '"x\\"); import os #"' in code
