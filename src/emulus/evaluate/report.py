"""figures, pictures, clips and curves -> one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import PIL.Image

from emulus.evaluate.charts import Chart, draw_chart
from emulus.files import write_text
from emulus.media import Clip

Shown = PIL.Image.Image | Clip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a table of figures.

    Attributes:
        name: What was measured.
        value: As it is to be read, with its unit.
        beside: What it is to be compared with.
        meaning: How it was measured, in a sentence.
        group: Lines of one group stand under a heading of this name.
    """

    name: str
    value: str
    beside: str = ""
    meaning: str = ""
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A table of figures."""

    rows: tuple[Figure, ...]


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture or clip of a tile.

    Attributes:
        media: What to show; clips run for ever.
        label: A word or two under it.
        small: Whether it is only there to compare with.
        wide: Whether it is a sheet of many pictures, which takes all the width there is.
    """

    media: Shown
    label: str = ""
    small: bool = False
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Pictures or clips that belong together, with words under them.

    Attributes:
        shots: Side by side.
        text: The prompt, or what the model wrote.
        note: Further words in a fainter colour, such as the true caption.
    """

    shots: tuple[Shot, ...]
    text: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Tiles in a grid."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Charts side by side."""

    charts: tuple[Chart, ...]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Words in rows and columns.

    Attributes:
        head: Names of the columns; none if they need none.
        rows: As many words in each as there are columns; the first one names the row.
    """

    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Lines as they stand in a file, shown when ``title`` is clicked on."""

    title: str
    text: str


Block = Figures | Gallery | Curves | Text | Table | Listing


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a paragraph that says what is to be seen and how far to trust it, and the blocks."""

    title: str
    text: str = ""
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page.

    Attributes:
        title: Heading of the page.
        text: What it is about.
        sections: In order.
    """

    title: str
    text: str = ""
    sections: tuple[Section, ...] = ()


def write_report(report: Report, path: Path) -> None:
    """Write a page atomically; it holds all of its pictures, and no script.

    Raises:
        EmulusError: The disk is full or the folder may not be written to.
    """
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page as HTML. Everything that is said in the report is escaped."""
    links = "".join(
        f'<a href="#s{number}">{html.escape(section.title)}</a>' for number, section in enumerate(report.sections)
    )
    body = "".join(_section(number, section) for number, section in enumerate(report.sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(report.title)}</title><style>{STYLE}</style></head>\n<body>\n<header>"
        f"<h1>{html.escape(report.title)}</h1>{_paragraph(report.text)}<nav>{links}</nav></header>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _section(number: int, section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    heading = f"<h2>{html.escape(section.title)}</h2>"
    return f'<section id="s{number}">{heading}{_paragraph(section.text)}\n{blocks}</section>\n'


def _block(block: Block) -> str:
    match block:
        case Figures():
            return _figures(block.rows)
        case Gallery():
            return _gallery(block.tiles)
        case Curves():
            return f'<div class="curves">{"".join(_chart(chart) for chart in block.charts)}</div>'
        case Text():
            return _paragraph(block.text)
        case Table():
            return _table(block)
        case Listing():
            title, text = html.escape(block.title), html.escape(block.text)
            return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""


def _table(table: Table) -> str:
    names = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    head = f"<thead><tr>{names}</tr></thead>" if names else ""
    lines = []
    for first, *rest in table.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    return f'<div class="scroll"><table class="plain">{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _figures(rows: Sequence[Figure]) -> str:
    lines, group = [], ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f'<tr class="group"><th colspan="3" scope="colgroup">{html.escape(group)}</th></tr>')
        meaning = f"<small>{html.escape(row.meaning)}</small>" if row.meaning else ""
        lines.append(
            f'<tr><th scope="row">{html.escape(row.name)}{meaning}</th>'
            f'<td class="value">{html.escape(row.value)}</td><td>{html.escape(row.beside)}</td></tr>'
        )
    head = "<tr><th>Figure</th><th>Emulus</th><th>Beside it</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _gallery(tiles: Sequence[Tile]) -> str:
    if any(shot.wide for tile in tiles for shot in tile.shots):
        kind = " sheets"
    else:
        # Two large pictures side by side need wider tiles.
        kind = " pairs" if any(sum(not shot.small for shot in tile.shots) > 1 for tile in tiles) else ""
    return f'<div class="gallery{kind}">{"".join(map(_tile, tiles))}</div>'


def _tile(tile: Tile) -> str:
    shots = "".join(_shot(shot, tile.text) for shot in tile.shots)
    note = f"<small>{html.escape(tile.note)}</small>" if tile.note else ""
    return (
        f'<figure><div class="shots">{shots}</div><figcaption dir="auto">{html.escape(tile.text)}{note}'
        "</figcaption></figure>"
    )


def _shot(shot: Shot, text: str) -> str:
    picture = shot.media.frames[0] if isinstance(shot.media, Clip) else shot.media
    # Small pictures are shown larger, in whole steps, so that their pixels stay square.
    least, most = (512, 1024) if shot.wide else (128, 256)
    width = max(least // picture.width, 1) * picture.width
    width, height = (side * min(width, most) // picture.width for side in picture.size)
    if shot.small:
        width, height = width // 2, height // 2
    label = f"<span>{html.escape(shot.label)}</span>" if shot.label else ""
    return (
        f'<div><img src="{data_uri(shot.media)}" width="{width}" height="{height}" '
        f'alt="{html.escape(f"{shot.label} {text}".strip())}">{label}</div>'
    )


def _chart(chart: Chart) -> str:
    legend = "".join(
        f'<span class="key {"dot" if line.dots else "line"} c{line.colour}">{html.escape(line.name)}</span>'
        for line in chart.lines
    )
    title = f"<b>{html.escape(chart.title)}</b> <small>{html.escape(chart.y)}</small>"
    return f'<figure><figcaption>{title}</figcaption>{draw_chart(chart)}<div class="legend">{legend}</div></figure>'


def data_uri(media: Shown) -> str:
    """A picture (PNG while small, else WebP) or a clip (animated WebP) as an address that holds it."""
    buffer = BytesIO()
    if isinstance(media, Clip):
        kind, first = "webp", media.frames[0]
        first.save(
            buffer,
            "WEBP",
            save_all=True,
            append_images=media.frames[1:],
            duration=_durations(len(media.frames), media.fps),
            loop=0,
            quality=88,
            method=4,
        )
    elif media.width * media.height <= 2**16:
        kind = "png"
        media.save(buffer, "PNG", optimize=True)
    else:
        kind = "webp"
        media.save(buffer, "WEBP", quality=92, method=4)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _durations(frames: int, fps: float) -> list[int]:
    """Whole milliseconds of each frame, such that they do not drift from the rate."""
    ends = [round(1000 * (place + 1) / fps) for place in range(frames)]
    return [max(end - start, 1) for start, end in zip([0, *ends], ends, strict=False)]


STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #667079; --paper: #fbfbfa; --card: #fff;
  --edge: #e3e5e7; --c0: #2563c9; --c1: #d1621b; --c2: #2b8a57; --c3: #8b46b8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ea; --faint: #9aa3ab; --paper: #15171a;
  --card: #1d2024; --edge: #33383e; --c0: #79a8f5; --c1: #f0a06a; --c2: #6cc797; --c3: #c795ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-weight: 650; font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 .5rem; }
h2 { font-weight: 620; font-size: 1.3rem; letter-spacing: -0.01em; margin: 0 0 .25rem; }
p { max-width: 72ch; margin: .25rem 0 1rem; color: var(--faint); }
section { margin-top: 3rem; }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; font-size: .9rem; }
a { color: var(--c0); text-decoration: none; }
a:hover { text-decoration: underline; }
small { display: block; color: var(--faint); font-size: .82rem; font-weight: 400; line-height: 1.4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--edge);
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .55rem .8rem; border-top: 1px solid var(--edge);
  font-weight: 400; }
thead th { font-size: .82rem; color: var(--faint); }
th[scope=row] { width: 52%; }
td.value { font-weight: 640; white-space: nowrap; }
tr.group th { padding-top: 1.1rem; font-weight: 620; border-top: 1px solid var(--edge); }
.plain th[scope=row] { width: auto; white-space: nowrap; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--c0); }
pre { overflow-x: auto; padding: .8rem; background: var(--card); border: 1px solid var(--edge); border-radius: 6px;
  font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(14.5rem, 100%), 1fr)); gap: 1rem; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.sheets { grid-template-columns: repeat(auto-fill, minmax(min(32rem, 100%), 1fr)); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--edge); border-radius: 6px; }
.shots { display: flex; flex-wrap: wrap; align-items: flex-end; gap: .5rem; }
.shots div { font-size: .72rem; color: var(--faint); line-height: 1.3; }
.shots img { display: block; max-width: 100%; height: auto; border-radius: 3px; image-rendering: pixelated; }
figcaption { margin-top: .5rem; font-size: .9rem; line-height: 1.4; overflow-wrap: anywhere; }
.curves figcaption { margin: 0 0 .4rem; }
.curves figcaption small { display: inline; }
.chart { display: block; width: 100%; height: auto; }
.chart .grid { stroke: var(--edge); stroke-width: 1; }
.chart .tick { fill: var(--faint); font-size: 11px; }
.chart .end { text-anchor: end; }
.chart .middle { text-anchor: middle; }
.chart .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.chart .line.c0 { stroke: var(--c0); } .chart .line.c1 { stroke: var(--c1); }
.chart .line.c2 { stroke: var(--c2); } .chart .line.c3 { stroke: var(--c3); }
.chart .dot { stroke: var(--card); stroke-width: 1.5; }
.chart .dot.c0 { fill: var(--c0); } .chart .dot.c1 { fill: var(--c1); }
.chart .dot.c2 { fill: var(--c2); } .chart .dot.c3 { fill: var(--c3); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .8rem; color: var(--faint); }
.key::before { content: ""; display: inline-block; margin-right: .4rem; vertical-align: middle; }
.key.line::before { width: 14px; height: 2px; }
.key.dot::before { width: 8px; height: 8px; border-radius: 50%; }
.key.c0::before { background: var(--c0); } .key.c1::before { background: var(--c1); }
.key.c2::before { background: var(--c2); } .key.c3::before { background: var(--c3); }
"""
