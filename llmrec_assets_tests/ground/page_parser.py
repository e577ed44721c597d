"""A rendered page as its elements, tables and text; and what foreign text must not do in one."""

from __future__ import annotations

from html.parser import HTMLParser

#: What must not act: a tag, an attribute's end, a table cell, a link, a picture, a direction
#: override, a bell, a line end.
HOSTILE = (
    "<script>alert(1)</script> \" onerror='x' | `c` [a](javascript:b) ![p](https://e.example) "
    "\u202egnp.exe \x07 x\ny"
)
PARTS = {
    *("h1", "h2", "p", "div", "figure", "figcaption", "img", "details", "summary"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "bdi"),
}
PNG = b"\x89PNG\r\n\x1a\nnot really"


class Page(HTMLParser):
    """Elements with attributes, tables as rows of cell texts, and that every tag is closed."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.tables, self.open, self.text = [], {}, [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "caption":
            self.caption = ""

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        elif "caption" in self.open:
            self.caption += data

    def table(self, start):
        (rows,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return rows

    def row(self, start, stage):
        (cells,) = [cells for cells in self.table(start) if cells[0] == stage]
        return cells


def assert_harmless(html: str, markdown: str) -> None:
    """For forms that hold ``HOSTILE``: it is shown, and is nothing but text."""
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert tags <= {"html", "head", "meta", "title", "style", "body", "main"} | PARTS
    attributes = {name for _, given in page.elements for name in given}
    assert not {name for name in attributes if name.startswith("on") or name in ("href", "style")}
    for tag, given in page.elements:
        assert "src" not in given or (tag, given["src"][:22]) == ("img", "data:image/png;base64,")
    assert "alert(1)" in page.text  # shown, not lost

    for text in (html, markdown):
        assert not set(text) & {"\u202e", "\x07"}
        assert "⟨U+202E⟩" in text

    assert "<script" not in markdown
    assert "](javascript" not in markdown
    width = None
    for line in markdown.split("\n"):
        if not line.startswith("|"):
            width = None
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line
