"""Readers of image-caption pairs on disk (a folder, a CSV file, webdataset tars), and of images alone.

What cannot be used (a corrupt image, a missing caption, a tar cut short) is skipped and counted: `skipped` has the
counts by reason, `describe_skipped()` the line to print. Only what makes the whole source useless raises.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vlmfast.data.batch import Sample, permutation, random_int
from vlmfast.data.images import Fit, Interpolation, check_fit, load_image
from vlmfast.data.skips import Skipped, UnreadableError
from vlmfast.errors import DataError, missing_extra

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # of files in a folder
TAR_IMAGE_KEYS = ("jpg", "png", "jpeg", "webp")  # of members in a tar, the first found is taken; open_clip's list
SHARD_STRIDE = 2**32  # index of a record = number of its shard * SHARD_STRIDE + number within the shard

log = logging.getLogger(__name__)


class _Pair(NamedTuple):
    image: Path
    caption: object  # the text, or the Path of the file that holds it
    id: int


class _ListedPairs:
    """Pairs whose names are known up front and whose files are read when asked for."""

    def __init__(self, image_size: int | None, fit: Fit, interpolation: Interpolation) -> None:
        self._pairs: list[_Pair] = []
        check_fit(image_size, fit)
        self._image_size, self._fit, self._interpolation = image_size, fit, interpolation
        self._skipped = Skipped()

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

    @property
    def skipped(self) -> Counter[str]:
        """How many unreadable things were met so far, by reason."""
        return self._skipped.counts()

    def describe_skipped(self) -> str:
        """One line that tells what was skipped, with examples; empty if nothing was."""
        return self._skipped.describe()

    def _read(self, index: int, key: tuple[int, ...]) -> Sample:
        image, caption, id = self._pairs[index]
        try:
            text = _caption(_bytes(caption, "caption") if isinstance(caption, Path) else caption, f"caption of {image}")
            return Sample(self._pixels(image, key), text, id)
        except UnreadableError as error:
            self._skipped.add(index, error)
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
                self._skipped.add(name, UnreadableError("missing caption", self.root / name))
        if captions is None:
            captions = {name: [] for name in texts - {str(Path(name).with_suffix(".txt")) for name in images}}
        for name in captions:
            self._skipped.add(name, UnreadableError("missing image", self.root / name, "it has a caption"))

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
                self._skipped.add((path, number), UnreadableError("line without a tab", f"{path}:{number}", line[:40]))
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
            self._skipped.add(index, error)
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
        self._skipped.add(("line", line), UnreadableError(reason, f"{self.path}:{line}", detail))


class WebdatasetPairs:
    """The pairs in webdataset tars, as img2dataset writes them: `000.jpg`, `000.txt`, `000.json`, `001.jpg`, ...

    Read as a stream: `batches` shuffles the shards and then, through a buffer of encoded samples, their records; the
    order depends on (seed, epoch) alone. A tar cut short gives what precedes the cut.

    Args:
        urls: paths or URLs, as webdataset takes them: braces ("{00000..00331}.tar"), several joined by "::",
            "pipe:command"; or a list of them.
        image_size: pixels a side, or None for images as they are, which must then have one size.
        fit, interpolation: how images are brought to that size, see `load_image`.
        caption_key: suffix of the member with the caption, or "json:field" for a field of the .json member.
        shuffle_buffer: how many encoded samples are held for shuffling.

    Raises:
        DataError: no url, or a local tar that does not exist.
        MissingExtraError: webdataset is not installed.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        image_size: int | None = None,
        fit: Fit = "crop",
        interpolation: Interpolation = "bicubic",
        caption_key: str = "txt",
        shuffle_buffer: int = 1000,
    ) -> None:
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise missing_extra("webdataset", "data") from error
        self.urls = [url for entry in ([urls] if isinstance(urls, str) else urls) for url in expand_urls(str(entry))]
        absent = [url for url in self.urls if ":" not in url and url != "-" and not os.path.isfile(url)]
        if absent or not self.urls:
            raise DataError(f"WebdatasetPairs: no such tar: {', '.join(absent[:3]) or urls} ({len(absent)} absent)")
        self.caption_key, self.shuffle_buffer = caption_key, shuffle_buffer
        check_fit(image_size, fit)
        self._image_size, self._fit, self._interpolation = image_size, fit, interpolation
        self._skipped = Skipped()

    @property
    def skipped(self) -> Counter[str]:
        """How many unreadable things were met so far, by reason."""
        return self._skipped.counts()

    def describe_skipped(self) -> str:
        """One line that tells what was skipped, with examples; empty if nothing was."""
        return self._skipped.describe()

    def __iter__(self) -> Iterator[Sample]:
        """The readable samples, in the order of the shards."""
        for record in self.records(0, 0, shuffle=False):
            if (decoded := self.decode(record, 0, 0)) is not None:
                yield decoded[1]

    def records(self, seed: int, epoch: int, shuffle: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, members by suffix) of each record of one epoch, not decoded."""
        shards = permutation(len(self.urls), seed, epoch) if shuffle else np.arange(len(self.urls))
        stream = (record for shard in shards.tolist() for record in self._shard(shard))
        return _shuffled(stream, self.shuffle_buffer, seed, epoch) if shuffle and self.shuffle_buffer > 1 else stream

    def decode(self, record: tuple[int, dict[str, Any]], seed: int, epoch: int) -> tuple[int, Sample] | None:
        """(index, sample), cropped as (seed, epoch) say; None if it is unreadable, which is counted."""
        index, members = record
        where = f"{members['__url__']}: {members['__key__']}"
        try:
            image = next((members[key] for key in TAR_IMAGE_KEYS if key in members), None)
            if image is None:
                raise UnreadableError("missing image", where, f"members {[key for key in members if key[0] != '_']}")
            text = self._text(members, where)
            pixels = load_image(
                image,
                self._image_size,
                self._fit,
                interpolation=self._interpolation,
                key=(seed, epoch, index),
                where=where,
            )
            return index, Sample(pixels, text, index)
        except UnreadableError as error:
            self._skipped.add(index, error)
            return None

    def _text(self, members: dict[str, Any], where: str) -> str:
        suffix, _, field = self.caption_key.partition(":")
        if suffix not in members:
            raise UnreadableError("missing caption", where, f"no member .{suffix}")
        if not field:
            return _caption(members[suffix], where)
        try:
            table = json.loads(members[suffix])
        except ValueError as error:
            raise UnreadableError("bad JSON", where, str(error)) from error
        return _caption(table.get(field) if isinstance(table, dict) else None, where)

    def _shard(self, shard: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, members) of each record of one tar."""
        from webdataset.tariterators import group_by_keys

        url = self.urls[shard]

        def twice(error: Exception) -> bool:
            self._skipped.add((url, str(error)), UnreadableError("second member of one name", url, str(error.args[0])))
            return True

        members = ({"fname": name, "data": data, "__url__": url} for name, data in self._members(url))
        for number, record in enumerate(group_by_keys(members, handler=twice)):
            yield shard * SHARD_STRIDE + number, record

    def _members(self, url: str) -> Iterator[tuple[str, bytes]]:
        """(name, content) of each file in the tar at `url`; what stops the reading is counted and logged."""
        from webdataset.gopen import gopen, set_options

        last = ""
        try:
            with gopen(url) as stream:
                set_options(stream, ignore_status=[0, 141, -signal.SIGPIPE])  # a pipe that we leave early is no error
                with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
                    for member in tar:
                        if reason := _no_part_of_a_sample(member):
                            self._skipped.add((url, member.name), UnreadableError(reason, f"{url}: {member.name}"))
                        elif member.isfile():
                            yield member.name, tar.extractfile(member).read()  # type: ignore[union-attr]
                        last = member.name
                        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                    if tar.fileobj.read(2 * tarfile.RECORDSIZE).strip(b"\0"):  # type: ignore[union-attr]
                        raise tarfile.ReadError("more data after the end mark; tars cannot be joined by cat")
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            reason = "tar cut short" if last else "tar not readable"
            problem = UnreadableError(reason, url, f"{error}; used up to {last}" if last else str(error))
            if self._skipped.add(url, problem):
                log.warning("%s", problem)


class _Header(tarfile.TarInfo):
    """A header that tells the end mark from a damaged or missing header, which tarfile takes for an end too."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the end mark should be") from error


def _no_part_of_a_sample(member: tarfile.TarInfo) -> str:
    """Why a member cannot belong to a sample; empty for files that can, and for folders."""
    from webdataset.tariterators import base_plus_ext

    if member.isfile():
        return "" if base_plus_ext(member.name)[0] else "member without a suffix"
    return "" if member.isdir() else "link in a tar"


def _shuffled(stream: Iterator[Any], size: int, seed: int, epoch: int) -> Iterator[Any]:
    """The items of the stream, through a buffer from which a random one leaves for each that comes."""
    buffer: list[Any] = []
    for number, item in enumerate(stream):
        if len(buffer) < size:
            buffer.append(item)
        else:
            place = random_int(seed, epoch, number) % size
            buffer[place], item = item, buffer[place]
            yield item
    for place in permutation(len(buffer), seed, epoch, size):
        yield buffer[place]


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


def _caption(value: object, where: object) -> str:
    """The caption in bytes or in text, without the white space around it."""
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
