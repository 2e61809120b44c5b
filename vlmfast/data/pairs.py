"""Readers of image-caption pairs on disk (a folder, a CSV file), and of images alone.

What cannot be used (a corrupt image, a missing caption) is skipped and counted: `skipped` has the
counts by reason, `describe_skipped()` the line to print. Only what makes the whole source useless raises.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vlmfast.data.batch import Sample
from vlmfast.data.images import Fit, Interpolation, check_fit, load_image
from vlmfast.data.skips import Skipped, UnreadableError
from vlmfast.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # of files in a folder


class _Pair(NamedTuple):
    image: Path
    caption: object  # the text, or the Path of the file that holds it
    id: int


def _text(pair: _Pair) -> str:
    caption = _bytes(pair.caption, "caption") if isinstance(pair.caption, Path) else pair.caption
    return caption_text(caption, f"caption of {pair.image}")


class _ListedPairs:
    """Pairs whose names are known up front and whose files are read when asked for."""

    def __init__(self, image_size: int | None, fit: Fit, interpolation: Interpolation) -> None:
        self._pairs: list[_Pair] = []
        check_fit(image_size, fit)
        self._image_size, self._fit, self._interpolation = image_size, fit, interpolation
        self.skips = Skipped()

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place; an UnreadableError error says why it cannot be read."""
        return self._read(index, (0, 0, index))

    def draw(self, index: int, seed: int, epoch: int) -> Sample | None:
        """The sample at a place, cropped as (seed, epoch) say; None if it is unreadable, which is counted."""
        try:
            return self._read(index, (seed, epoch, index))
        except UnreadableError:
            return None

    def texts(self) -> Iterator[str]:
        """The captions that can be read, in their order; no image is opened."""
        for pair in self._pairs:
            with suppress(UnreadableError):
                yield _text(pair)

    @property
    def skipped(self) -> Counter[str]:
        """How many unreadable things were met so far, by reason."""
        return self.skips.counts()

    def describe_skipped(self) -> str:
        """One line that tells what was skipped, with examples; empty if nothing was."""
        return self.skips.describe()

    def _read(self, index: int, key: tuple[int, ...]) -> Sample:
        pair = self._pairs[index]
        try:
            return Sample(self._pixels(pair.image, key), _text(pair), pair.id)
        except UnreadableError as error:
            self.skips.add(index, error)
            raise

    def _pixels(self, image: Path, key: tuple[int, ...]) -> Tensor:
        data = _bytes(image, "image")
        return load_image(data, self._image_size, self._fit, interpolation=self._interpolation, key=key, where=image)


class FolderPairs(_ListedPairs):
    """The images under a folder and their captions, in the order of their names.

    Captions come from `captions.json` ({"name.jpg": "caption" or ["caption", ...]}) or `captions.txt` (lines of name,
    tab, caption; a name may come again) in the folder, else from `name.txt` beside each `name.jpg`. An image with
    several captions makes as many samples, with one id.

    Args:
        root: the folder; images in sub-folders count too, and are named by their path from `root`.
        image_size: pixels a side, or None for images as they are, which must then have one size.
        fit, interpolation: how images are brought to that size, see `load_image`.

    Raises:
        DataError: no such folder, no image in it, both caption files, or a caption file that cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        fit: Fit = "crop",
        interpolation: Interpolation = "bicubic",
    ) -> None:
        super().__init__(image_size, fit, interpolation)
        self.root = Path(root)
        files = _files_under(self.root)
        images = _images_among(self.root, files)
        captions = self._caption_file(files)
        texts = {name for name in files if name.endswith(".txt")} if captions is None else set()
        for id, name in enumerate(images):
            beside = str(Path(name).with_suffix(".txt"))
            if captions is not None and captions.get(name):
                self._pairs += [_Pair(self.root / name, caption, id) for caption in captions.pop(name)]
            elif beside in texts:
                self._pairs.append(_Pair(self.root / name, self.root / beside, id))
            else:
                self.skips.add(name, UnreadableError("missing caption", self.root / name))
        if captions is None:
            captions = {name: [] for name in texts - {str(Path(name).with_suffix(".txt")) for name in images}}
        for name in captions:
            self.skips.add(name, UnreadableError("missing image", self.root / name, "it has a caption"))

    def _caption_file(self, files: list[str]) -> dict[str, list[object]] | None:
        """Name -> captions, or None if there is no caption file."""
        found = [name for name in ("captions.json", "captions.txt") if name in files]
        if len(found) > 1:
            raise DataError(f"FolderPairs: both {found[0]} and {found[1]} in {self.root}; leave one")
        if not found:
            return None
        path = self.root / found[0]
        if path.suffix == ".json":
            try:
                table = json.loads(path.read_text("utf-8-sig"))
            except ValueError as error:
                raise DataError(f"FolderPairs: {path} is not JSON in UTF-8: {error}") from error
            if not isinstance(table, dict):
                raise DataError(
                    f'FolderPairs: {path} must hold {{"name.jpg": "caption"}}; got a {type(table).__name__}'
                )
            return {name: value if isinstance(value, list) else [value] for name, value in table.items()}
        captions: dict[str, list[object]] = {}
        for number, line in enumerate(path.read_text("utf-8-sig", errors="surrogateescape").split("\n"), 1):
            name, tab, caption = line.partition("\t")
            if tab:
                captions.setdefault(name, []).append(caption)
            elif line.strip():
                where = f"{path}:{number}"
                self.skips.add(where, UnreadableError("line without a tab", where, line[:40]))
        return captions


class ImageFolder(_ListedPairs):
    """The images under a folder, in the order of their names; every caption is empty.

    Args:
        root: the folder; images in sub-folders count too.
        image_size: pixels a side, or None for images as they are, which must then have one size.
        fit, interpolation: how images are brought to that size, see `load_image`.

    Raises:
        DataError: no such folder, or no image in it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        fit: Fit = "crop",
        interpolation: Interpolation = "bicubic",
    ) -> None:
        super().__init__(image_size, fit, interpolation)
        self.root = Path(root)
        self.names = _images_among(self.root, _files_under(self.root))
        self._pairs = [_Pair(self.root / name, "", id) for id, name in enumerate(self.names)]

    def _read(self, index: int, key: tuple[int, ...]) -> Sample:
        try:
            return Sample(self._pixels(self._pairs[index].image, key), "", index)
        except UnreadableError as error:
            self.skips.add(index, error)
            raise


class CsvPairs(_ListedPairs):
    """The pairs that a CSV file lists, in its order, with open_clip's defaults for the columns.

    Args:
        path: the file, UTF-8, its first line the names of the columns.
        image_key: column with paths of images; relative ones start at `root`.
        caption_key: column with captions.
        separator: one character.
        root: folder of relative paths; None is the working directory, as in open_clip.
        image_size: pixels a side, or None for images as they are, which must then have one size.
        fit, interpolation: how images are brought to that size, see `load_image`.

    Raises:
        DataError: no such file, no such column (the error names those that there are), or no row.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        image_key: str = "filepath",
        caption_key: str = "title",
        separator: str = "\t",
        root: str | os.PathLike[str] | None = None,
        image_size: int | None = None,
        fit: Fit = "crop",
        interpolation: Interpolation = "bicubic",
    ) -> None:
        super().__init__(image_size, fit, interpolation)
        self.path, self._root = Path(path), Path(root or "")
        if not self.path.is_file():
            raise DataError(f"CsvPairs: {self.path} is not a file")
        ids: dict[str, int] = {}
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, delimiter=separator, strict=True)
            try:
                header = next(rows, [])
            except csv.Error:
                header = []
            for key, value in (("image_key", image_key), ("caption_key", caption_key)):
                if value not in header:
                    raise DataError(
                        f"CsvPairs: {self.path} has no column {value!r}; it has {str(header)[:200]} with separator "
                        f"{separator!r}. "
                        f"Set {key} or separator"
                    )
            image_column, caption_column = header.index(image_key), header.index(caption_key)
            for line, row in self._rows(rows):
                if len(row) <= max(image_column, caption_column):
                    self._skip(line, "short row", f"{len(row)} of {len(header)} columns")
                else:
                    name = row[image_column]
                    self._pairs.append(_Pair(self._root / name, row[caption_column], ids.setdefault(name, len(ids))))
        if not self._pairs:
            raise DataError(f"CsvPairs: {self.path} has no row that can be used. {self.describe_skipped()}".rstrip())

    def _rows(self, rows: Any) -> Iterator[tuple[int, list[str]]]:
        """(line number, cells) of each well-formed row."""
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:  # a stray quote swallows lines up to the next quote: each is a lost row
                for lost in range(line, max(rows.line_num, line) + 1):
                    self._skip(lost, "bad row", f"{error}; the row begins on line {line}")
                continue
            if row:
                yield line, row

    def _skip(self, line: int, reason: str, detail: str) -> None:
        where = f"{self.path}:{line}"
        self.skips.add(where, UnreadableError(reason, where, detail))


def _files_under(root: Path) -> list[str]:
    """Paths from `root` of all files under it, sorted; a folder that cannot be listed raises."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")

    def stop(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    found = []
    for folder, _, names in os.walk(root, onerror=stop, followlinks=True):
        inside = Path(folder).relative_to(root).as_posix()
        found += names if inside == "." else [f"{inside}/{name}" for name in names]
    return sorted(found)


def _images_among(root: Path, files: list[str]) -> list[str]:
    """The images among the files under `root`, by their suffixes, of which there must be one."""
    images = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise DataError(f"no image under {root} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return images


def _bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UnreadableError(f"missing {what}", path) from error
    except OSError as error:
        raise UnreadableError("file not readable", path, str(error.strerror)) from error


def caption_text(value: object, where: object) -> str:
    """The caption in bytes or in text, without the white space around it.

    Args:
        value: what stands where the caption should be.
        where: the file's name, for the error.

    Raises:
        UnreadableError: "missing caption", "caption not a text", "caption not UTF-8" or "empty caption".
    """
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
        if text is None:
            raise UnreadableError("missing caption", where)
        if not isinstance(text, str):
            raise UnreadableError("caption not a text", where, type(text).__name__)
        text.encode("utf-8")  # refuses bytes that came through as surrogates
    except UnicodeError as error:
        raise UnreadableError("caption not UTF-8", where, str(error)) from error
    if not text.strip():
        raise UnreadableError("empty caption", where)
    return text.strip()
