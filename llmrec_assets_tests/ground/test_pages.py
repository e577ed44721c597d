"""Rendering: foreign text stays text in every field of a block, in both forms."""

from __future__ import annotations

import pytest
from page_parser import HOSTILE, PNG, Page, assert_harmless

from llmrec_assets.ground.pages import (
    Cell,
    Heading,
    Paragraph,
    Picture,
    Pictures,
    Table,
    render_html,
    render_markdown,
    visible,
)

ROWS = [[Cell(HOSTILE, HOSTILE), Cell(HOSTILE)], [Cell("plain"), Cell("")]]
GROUPED = Table(HOSTILE, [("", HOSTILE), (HOSTILE, HOSTILE)], [(HOSTILE, ROWS)])
FOLDED = Table(HOSTILE, [("", HOSTILE), ("", HOSTILE)], [("", ROWS)], folded=True)


@pytest.mark.parametrize(
    "block",
    [
        Heading(HOSTILE),
        Paragraph(HOSTILE),
        Paragraph(HOSTILE, lead=True),
        GROUPED,
        FOLDED,
        Pictures([Picture(HOSTILE, PNG, "curves/a.png")]),
    ],
    ids=["heading", "paragraph", "lead", "grouped", "folded", "pictures"],
)
def test_foreign_text_stays_text_in_every_field(block):
    assert_harmless(render_html(HOSTILE, [block]), render_markdown(HOSTILE, [block]))


def test_the_page_forbids_itself_scripts_and_loads():
    html = render_html("Title", [])
    page = Page(html)
    (policy,) = [a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert ("html", {"lang": "en"}) in page.elements
    assert any(a.get("name") == "viewport" for t, a in page.elements if t == "meta")
    head = html.split("<style>")[0]
    assert head.index("Content-Security-Policy") < head.index("<title>")


def test_every_table_has_a_caption_and_scoped_headers_and_scrolls():
    page = Page(render_html("Title", [GROUPED, FOLDED]))
    tables = [i for i, (tag, _) in enumerate(page.elements) if tag == "table"]
    assert len(tables) == 2
    for i in tables:
        assert page.elements[i - 1][1]["class"] == "scroll"
        assert page.elements[i + 1][0] == "caption"
    assert all("scope" in given for tag, given in page.elements if tag == "th")


def test_visible_text_is_one_line_and_cut():
    assert visible("a\r\nb\u2028c\td") == "a ⏎ b ⏎ c d"
    assert visible("\u200bx\u2066\ud800") == "⟨U+200B⟩x⟨U+2066⟩⟨U+D800⟩"
    assert visible("x" * 301) == "x" * 300 + " …"
    assert visible("אב ✓ Amélie") == "אב ✓ Amélie"
