"""A contact sheet: what a search found, as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from vlmfast.data.images import decode_image
from vlmfast.data.skips import UnreadableError
from vlmfast.errors import missing_extra

SIDE = 192  # pixels of a thumbnail's longer side, at most
QUALITY = 80  # of its JPEG


@dataclass(frozen=True)
class Hit:
    """One thing that was found."""

    text: str  # a file's name or a caption
    score: float  # cosine
    image: Path | None = None  # None: a caption


@dataclass(frozen=True)
class Found:
    """A query and what was found for it, best first."""

    query: str  # a caption or a file's name
    hits: Sequence[Hit]
    image: Path | None = None  # of the query; None: a caption


def contact_sheet(found: Sequence[Found], facts: Sequence[str]) -> str:
    """The HTML page: a section a query, a thumbnail a hit; no script, and nothing outside the page is asked for.

    A file that is missing or no image is shown as a frame with the reason.

    Args:
        found: queries and their hits.
        facts: lines below, such as the model's name.
    Raises:
        MissingExtraError: Pillow is not installed.
    """
    sections = "".join(_section(each) for each in found)
    return PAGE.substitute(sections=sections, facts="".join(f"<p>{_escaped(fact)}</p>" for fact in facts))


def thumbnail(path: Path) -> str:
    """The image's thumbnail as a data URI: JPEG, or PNG for images that are as small already.

    Args:
        path: an image file.
    Raises:
        UnreadableError: there is no such file, or it is no whole image.
        MissingExtraError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError:
        raise missing_extra("Pillow", "data") from None
    try:
        image = decode_image(path.read_bytes(), path)
    except OSError as error:
        raise UnreadableError("file not readable", path, str(error.strerror)) from None
    file = io.BytesIO()
    if max(image.size) <= SIDE:
        image.save(file, "PNG")
    else:
        image.thumbnail((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
        image.save(file, "JPEG", quality=QUALITY)
    kind = "png" if file.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _section(found: Found) -> str:
    query = (
        f"<q>{_escaped(found.query)}</q>"
        if found.image is None
        else f"{_picture(found.image)}<b>{_escaped(found.query)}</b>"
    )
    cells = "".join(_cell(hit) for hit in found.hits)
    kind = "captions" if all(hit.image is None for hit in found.hits) else "images"
    return f'<section><div class="query">{query}</div><ol class="{kind}">{cells}</ol></section>'


def _cell(hit: Hit) -> str:
    picture = "" if hit.image is None else _picture(hit.image)
    return f"<li>{picture}<span><b>{hit.score:.3f}</b> {_escaped(hit.text)}</span></li>"


def _picture(path: Path) -> str:
    try:
        return f'<img alt="" src="{thumbnail(path)}">'
    except UnreadableError as error:
        return f'<div class="lost">{escape(error.reason)}</div>'


def printable(text: str) -> str:
    """The text with question marks for bytes of file names that are no UTF-8, which no page or terminal could show."""
    return text.encode("utf-8", "replace").decode()


def _escaped(text: str) -> str:
    return escape(printable(text))


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>vlmfast search</title><style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0 }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px }
section { background: #fff; border-radius: 12px; padding: 18px 22px; margin: 0 0 18px; box-shadow: 0 1px 3px #0002 }
.query { display: flex; align-items: center; gap: 16px; font-size: 20px; margin: 0 0 14px; overflow-wrap: anywhere }
ol { list-style: none; margin: 0; padding: 0 }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 14px }
img, .lost { display: block; width: 100%; height: 168px; object-fit: contain; background: #eef1f5; border-radius: 8px }
.query img, .query .lost { width: 168px; flex: none }
.lost { display: grid; place-items: center; color: #b03a2e; font-size: 13px }
li span { display: block; font-size: 13px; overflow-wrap: anywhere; margin-top: 5px; color: #52606d }
li b { color: #0b6e75; font-variant-numeric: tabular-nums; margin-right: 4px }
.captions li { border-top: 1px solid #e4e7eb; padding: 5px 0 }
.captions li span { font-size: 15px; color: inherit; margin: 0 }
footer { color: #7b8794; font-size: 13px; overflow-wrap: anywhere }
footer p { margin: 2px 0 }
</style></head><body><main>$sections<footer>$facts</footer></main></body></html>
""")
