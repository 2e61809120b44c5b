"""A report as one HTML page that needs no other file: cards with numbers, sections, tables, plots and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any

from torch import Tensor

from vlmfast.errors import missing_extra

OURS, REFERENCE, RIVAL = "#0b7a75", "#e8871e", "#9aa5b1"


def page(
    title: str,
    introduction: str,
    cards: Sequence[tuple[str, str, bool]],
    sections: Sequence[tuple[str, str, str]],
    footer: str,
    *,
    note: str = "",
) -> str:
    """The whole page.

    Args:
        title: its heading.
        introduction: a paragraph under it.
        cards: (number, what it is, whether it is as promised).
        sections: (heading, paragraph, HTML).
        footer: the machine, the date.
        note: a warning under the cards, if there is one.
    """
    return PAGE.substitute(
        title=escape(title),
        introduction=escape(introduction),
        cards="".join(
            f'<div class="card{"" if reached else " missed"}"><b>{escape(number)}</b><span>{escape(what)}</span></div>'
            for number, what, reached in cards
        ),
        note=f"<p class=note>{escape(note)}</p>" if note else "",
        body="".join(f"<section><h2>{head}</h2><p>{text}</p>{content}</section>" for head, text, content in sections),
        footer=escape(footer),
        ours=OURS,
    )


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the row of "vlmfast" marked.

    Args:
        title: its heading, or "".
        header: a cell a column.
        rows: of cells.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        kind = " class=ours" if cells[0] == "vlmfast" else ""
        return f"<tr{kind}>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f"{head}<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def picture(image: Tensor, what: str) -> str:
    """An <img> of the image's own pixels.

    Args:
        image: [3, H, W] uint8.
        what: it shows.
    Raises:
        MissingExtraError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("Pillow", "data") from None
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "png")
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def figure(**options: Any) -> Any:
    """A new matplotlib Figure in the page's manner.

    Args:
        options: of matplotlib's Figure.
    Raises:
        MissingExtraError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "demo") from None
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path"})
    return Figure(**options)


def svg(drawing: Any, what: str) -> str:
    """A figure as inline SVG.

    Args:
        drawing: from `figure`.
        what: it shows.
    """
    file = io.StringIO()
    drawing.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    return f'<div class="plot" role="img" aria-label="{escape(what)}">{text[text.index("<svg") :]}</div>'


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>vlmfast: $title</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0 }
main { max-width: 980px; margin: 0 auto; padding: 32px 20px }
h1 { margin: 0 0 4px; font-size: 30px }
h2 { margin: 0 0 4px; font-size: 21px }
h3 { margin: 22px 0 8px; font-size: 16px }
p { margin: 0 0 14px; color: #52606d; max-width: 46em }
section { background: #fff; border-radius: 12px; padding: 22px 24px; margin: 18px 0; box-shadow: 0 1px 3px #0002 }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 }
.card { flex: 1 1 150px; background: #fff; border-radius: 12px; padding: 14px 16px; border-top: 4px solid $ours;
  box-shadow: 0 1px 3px #0002 }
.card b { display: block; font-size: 26px; color: $ours }
.card span { display: block; font-size: 13px; line-height: 1.35; color: #52606d }
.card.missed { border-top-color: #c0392b }
.card.missed b, .note { color: #c0392b }
.plot svg { width: 100%; height: auto }
.strip { display: flex; flex-wrap: wrap; gap: 6px }
figure { margin: 0; text-align: center; font-size: 13px }
figure img { display: block; width: 48px; height: 48px; image-rendering: pixelated; border-radius: 5px;
  border: 3px solid }
.hit img { border-color: #2f9e61 }
.miss img { border-color: #c0392b }
.hit figcaption { color: #2f7a52 }
.miss figcaption { color: #c0392b; font-weight: 600 }
i { color: #52606d; font-weight: 400; font-style: normal }
.query { display: flex; align-items: center; gap: 14px; margin: 6px 0 }
.query q { flex: 0 0 300px; font-size: 15px }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 14px }
.shots figure { text-align: left; font-size: 14px; line-height: 1.4 }
.shots figure img { width: 100%; height: auto; aspect-ratio: 1; margin: 0 0 5px }
.shots q { display: block; color: #52606d }
.shots b { font-weight: 600 }
.bar { display: flex; align-items: center; gap: 6px; font-size: 12px; color: #52606d }
.bar span { flex: 0 0 64px; overflow: hidden; text-overflow: ellipsis }
.bar u { display: block; height: 8px; background: $ours; border-radius: 4px }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #e4e7eb }
th:first-child, td:first-child { text-align: left }
th { color: #52606d; font-weight: 600 }
.ours { font-weight: 700; color: $ours }
footer { color: #7b8794; font-size: 13px }
</style></head><body><main>
<h1>$title</h1>
<p>$introduction</p>
<div class="cards">$cards</div>$note
$body
<footer>$footer</footer>
</main></body></html>
""")
