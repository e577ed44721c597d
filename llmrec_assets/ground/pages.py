"""Blocks of a page, and their rendering as Markdown and as one self-contained HTML page.

What belongs here: what a heading, a table or a picture looks like in either form, and that foreign
text stays text. What does not: which blocks a page has and what they say (``report_page``), drawing
curves (``plots``).

Text of a block may be foreign, as titles and model answers are: control and direction characters
are shown by their code, everything is escaped, and the page forbids itself scripts and any load
from elsewhere.
"""

from __future__ import annotations

import base64
import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from llmrec_assets.ground.report import markdown_table


@dataclass(frozen=True)
class Heading:
    """Of a section; the page's title is none."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A ``lead`` is set off: it says what matters most."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Cell:
    """``note`` stands after the text, smaller; ``kind`` is a CSS class."""

    text: str
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """``columns`` are (group, name), the first heads the rows; ``sections`` are (heading, rows).
    A ``folded`` one is opened by its reader, in HTML."""

    caption: str
    columns: Sequence[tuple[str, str]]
    sections: Sequence[tuple[str, list[list[Cell]]]]
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """PNG bytes, and the path relative to the Markdown at which it looks for them."""

    title: str
    png: bytes
    path: str


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side."""

    pictures: Sequence[Picture]


Block = Heading | Paragraph | Table | Pictures


def visible(text: str, limit: int | None = 300) -> str:
    """Foreign text on one line, with nothing in it that a reader cannot see.

    Line ends become ⏎; control, direction, zero-width and lone surrogate characters become their
    code, e.g. ⟨U+202E⟩; beyond ``limit`` characters it is cut.
    """
    text = " ⏎ ".join(text.splitlines()).replace("\t", " ")
    text = text if limit is None or len(text) <= limit else text[:limit] + " …"
    return "".join(
        f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character)[0] == "C" else character
        for character in text
    )


# ---- Markdown ------------------------------------------------------------------------------------


def render_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks under ``title`` as Markdown; pictures are shown by their ``path``."""
    parts = [f"# {_markdown_text(title)}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {_markdown_text(block.text)}")
        elif isinstance(block, Paragraph):
            parts.append(_markdown_text(block.text))
        elif isinstance(block, Pictures):
            for picture in block.pictures:
                alt = _markdown_text(picture.title).replace("[", "&#91;").replace("]", "&#93;")
                parts.append(f"![{alt}]({picture.path})")
        elif isinstance(block, Table):
            parts += [f"**{_markdown_text(block.caption)}**", _markdown_rows(block)]
    return "\n\n".join(parts) + "\n"


def _markdown_rows(table: Table) -> str:
    names = [_markdown_text(f"{group} {name}".strip()) for group, name in table.columns]
    lines = []
    for heading, rows in table.sections:
        if heading:
            lines.append([visible(heading), *[""] * (len(names) - 1)])
        for row in rows:
            lines.append([f"{visible(c.text)} {visible(c.note)}".strip() for c in row])
    return markdown_table(pd.DataFrame(lines, columns=names))


def _markdown_text(text: str) -> str:
    """Prose, escaped as ``report.markdown_table`` escapes a cell, but never cut."""
    escaped = "".join(
        f"&#{ord(character)};" if character in "&<|\\`*_!~" else character
        for character in visible(text, limit=None)
    )
    return escaped.replace("](", "]&#40;")


# ---- HTML ----------------------------------------------------------------------------------------

#: The page may show its own pictures and style itself; it may do nothing else.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)

_STYLE = """
:root { color-scheme: light dark; --paper: #fdfcf9; --ink: #1f2528; --soft: #5c676d;
  --rule: #d9d6cd; --band: #f3f1ea; --hit: #1b6e3c; --hit-band: #e3f2e6; --model: #1f5f8b; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191b; --ink: #e4e6e3; --soft: #9aa5aa;
  --rule: #363c40; --band: #1e2325; --hit: #7fd29b; --hit-band: #1c3325; --model: #7db9e0; } }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 Georgia, "DejaVu Serif", serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .7rem;
  border-top: 1px solid var(--rule); }
p { max-width: 46rem; margin: .6rem 0; overflow-wrap: anywhere; color: var(--soft);
  font-size: .92rem; }
p.lead { color: var(--ink); font-size: 1.06rem; padding-left: 1rem;
  border-left: 3px solid var(--model); }
.scroll { overflow-x: auto; margin: 1rem 0 1.4rem; }
.scroll:focus-visible { outline: 2px solid var(--model); }
table { border-collapse: collapse; font: .84rem/1.4 "Helvetica Neue", Arial, "DejaVu Sans",
  sans-serif; }
caption, figcaption, summary { text-align: left; padding: 0 0 .4rem;
  font: 600 .88rem/1.4 "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
th, td { padding: .38rem .6rem; text-align: left; vertical-align: top; max-width: 19rem;
  border-bottom: 1px solid var(--rule); overflow-wrap: break-word; }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; overflow-wrap: normal; }
thead th[scope=colgroup] { text-align: center; border-bottom-color: var(--soft); }
tbody th { font-weight: 600; min-width: 6.5rem; }
tbody th[scope=rowgroup] { color: var(--soft); font-weight: 600; background: var(--band);
  font-size: .78rem; letter-spacing: .02em; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.published, .refused { color: var(--soft); }
.published { font-style: italic; }
.hit { background: var(--hit-band); color: var(--hit); font-weight: 600; }
.worse { font-weight: 600; }
.note { display: block; font-size: .78rem; font-weight: 400; color: var(--soft); }
figure { margin: 1rem 0 1.4rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.curves figure { margin: 0; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--rule); }
summary { cursor: pointer; }
@media print { .scroll { overflow: visible; } body { max-width: none; } }
"""


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks under ``title`` as a page that loads nothing; pictures stand in it."""
    head = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_html_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{_html_text(title)}</h1>",
    ]
    return "\n".join([*head, *map(_html_block, blocks), "</main>\n</body>\n</html>\n"])


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{_html_text(block.text)}</h2>"
    if isinstance(block, Paragraph):
        kind = ' class="lead"' if block.lead else ""
        return f"<p{kind}>{_html_text(block.text)}</p>"
    if isinstance(block, Pictures):
        figures = "\n".join(map(_html_picture, block.pictures))
        return f'<div class="curves">\n{figures}\n</div>'
    return _html_table(block)


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    title = _html_text(picture.title)
    return (
        f'<figure><figcaption>{title}</figcaption><img alt="{title}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


def _html_table(table: Table) -> str:
    caption = _html_text(table.caption)
    lines = [f"<caption>{caption}</caption>", f"<thead>{_html_head(table.columns)}</thead>"]
    for heading, rows in table.sections:
        lines.append("<tbody>")
        if heading:
            lines.append(
                f'<tr><th scope="rowgroup" colspan="{len(table.columns)}">'
                f"{_html_text(heading)}</th></tr>"
            )
        lines += [f"<tr>{_html_row(row)}</tr>" for row in rows]
        lines.append("</tbody>")
    body = "\n".join(lines)
    # the container takes the keyboard's focus, so that a wide table scrolls without a mouse
    scroll = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f"<table>\n{body}\n</table></div>"
    )
    if not table.folded:
        return scroll
    return f"<details><summary>{caption}</summary>{scroll}</details>"


def _html_head(columns: Sequence[tuple[str, str]]) -> str:
    """One line of column headers, or two where columns stand in groups."""
    groups = [group for group, _ in columns]
    deep = ' rowspan="2"' if any(groups) else ""
    first, second = "", ""
    for position, (group, name) in enumerate(columns):
        if not group:
            first += f'<th scope="col"{deep}>{_html_text(name)}</th>'
            continue
        second += f'<th scope="col" class="number">{_html_text(name)}</th>'
        if position == groups.index(group):
            span = groups.count(group)
            first += f'<th scope="colgroup" colspan="{span}">{_html_text(group)}</th>'
    return f"<tr>{first}</tr>" + (f"<tr>{second}</tr>" if second else "")


def _html_row(row: Sequence[Cell]) -> str:
    cells = []
    for position, cell in enumerate(row):
        # isolated, so that right-to-left text cannot reorder its neighbours
        inner = f"<bdi>{_html_cell(cell.text)}</bdi>" if cell.text else ""
        if cell.note:
            inner += f'<bdi class="note">{_html_cell(cell.note)}</bdi>'
        kind = f' class="{cell.kind}"' if cell.kind else ""
        tag, scope = ("td", "") if position else ("th", ' scope="row"')
        cells.append(f"<{tag}{scope}{kind}>{inner}</{tag}>")
    return "".join(cells)


def _html_cell(text: str) -> str:
    return html.escape(visible(text), quote=True)


def _html_text(text: str) -> str:
    return html.escape(visible(text, limit=None), quote=True)
