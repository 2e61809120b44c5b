"""Image-caption pairs in webdataset tars, as img2dataset writes them."""

from __future__ import annotations

import json
import logging
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlmfast.data.batch import Sample
from vlmfast.data.images import Fit, Interpolation, check_fit, load_image
from vlmfast.data.pairs import caption_text
from vlmfast.data.skips import Skipped, UnreadableError
from vlmfast.data.stream import SHARD_STRIDE, SOURCE_STRIDE
from vlmfast.errors import DataError, missing_extra

IMAGE_KEYS = ("jpg", "png", "jpeg", "webp")  # suffixes of members, the first found is taken; open_clip's list

log = logging.getLogger(__name__)


class WebdatasetPairs:
    """The pairs in webdataset tars, as img2dataset writes them: `000.jpg`, `000.txt`, `000.json`, `001.jpg`, ...

    Read as a stream of shards, in the order that stream.py describes. A tar cut short gives what precedes the cut.

    Args:
        urls: paths or URLs, as webdataset takes them: braces ("{00000..00331}.tar"), several joined by "::",
            "pipe:command"; or a list of them.
        image_size: pixels a side, or None for images as they are, which must then have one size.
        fit, interpolation: how images are brought to that size, see `load_image`.
        caption_key: suffix of the member with the caption, or "json:field" for a field of the .json member.
        shuffle_buffer: how many encoded samples are held for shuffling.
        resampled: draw each epoch's shards with replacement, as open_clip's --dataset-resampled.

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
        resampled: bool = False,
    ) -> None:
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise missing_extra("webdataset", "data") from error
        self.urls = [url for entry in ([urls] if isinstance(urls, str) else urls) for url in expand_urls(str(entry))]
        absent = [url for url in self.urls if ":" not in url and url != "-" and not os.path.isfile(url)]
        if absent or not self.urls:
            raise DataError(f"WebdatasetPairs: no such tar: {', '.join(absent[:3]) or urls} ({len(absent)} absent)")
        self.shards, self.shuffle_buffer, self.resampled = len(self.urls), shuffle_buffer, resampled
        self.caption_key = caption_key
        check_fit(image_size, fit)
        self._image_size, self._fit, self._interpolation = image_size, fit, interpolation
        self.skips = Skipped()

    @property
    def num_samples(self) -> int | None:
        """Samples as the files beside the tars tell, those that cannot be read included; None without such files.

        Beside the tars of each folder lies `sizes.json` ({"00000.tar": 10000, ...}) or `__len__` (a number).

        Raises:
            DataError: such a file cannot be read, or does not name one of the tars.
        """
        folders: dict[str, list[str]] = {}
        for url in self.urls:
            folder, name = os.path.split(url.removeprefix("file:"))
            if ":" in folder + name:  # a pipe, or another machine's
                return None
            folders.setdefault(folder, []).append(name)
        counts = [_count(Path(folder), names) for folder, names in folders.items()]
        return None if None in counts else sum(counts)  # type: ignore[arg-type]

    @property
    def skipped(self) -> Counter[str]:
        """How many unreadable things were met so far, by reason."""
        return self.skips.counts()

    def describe_skipped(self) -> str:
        """One line that tells what was skipped, with examples; empty if nothing was."""
        return self.skips.describe()

    def __iter__(self) -> Iterator[Sample]:
        """The readable samples, in the order of the shards."""
        for shard in range(self.shards):
            for index, record in enumerate(self.records(shard), shard * SHARD_STRIDE):
                if (sample := self.decode(record, index, 0, 0)) is not None:
                    yield sample

    def texts(self) -> Iterator[str]:
        """The captions that can be read, in the order of the shards; no image is decoded."""
        for shard in range(self.shards):
            for record in self.records(shard):
                with suppress(UnreadableError):
                    yield self._text(record, f"{record['__url__']}: {record['__key__']}")

    def records(self, shard: int) -> Iterator[dict[str, Any]]:
        """The members by suffix, and "__key__" and "__url__", of each record of one tar."""
        from webdataset.tariterators import group_by_keys

        url = self.urls[shard]

        def twice(error: Exception) -> bool:
            problem = UnreadableError("second member of one name", url, str(error.args[0]))
            self.skips.add(str(problem), problem)
            return True

        members = ({"fname": name, "data": data, "__url__": url} for name, data in self._members(url))
        return group_by_keys(members, handler=twice)

    def decode(self, record: dict[str, Any], index: int, seed: int, epoch: int) -> Sample | None:
        """The sample of a record, cropped as (seed, epoch, index) say; None if it is unreadable, which is counted."""
        where = f"{record['__url__']}: {record['__key__']}"
        try:
            image = next((record[key] for key in IMAGE_KEYS if key in record), None)
            if image is None:
                raise UnreadableError("missing image", where, f"members {[key for key in record if key[0] != '_']}")
            text = self._text(record, where)
            pixels = load_image(
                image,
                self._image_size,
                self._fit,
                interpolation=self._interpolation,
                key=(seed, epoch, index),
                where=where,
            )
            return Sample(pixels, text, index)
        except UnreadableError as error:
            self.skips.add(index % SOURCE_STRIDE, error)  # one record, alone or in a mixture
            return None

    def _text(self, members: dict[str, Any], where: str) -> str:
        suffix, _, field = self.caption_key.partition(":")
        if suffix not in members:
            raise UnreadableError("missing caption", where, f"no member .{suffix}")
        if not field:
            return caption_text(members[suffix], where)
        try:
            table = json.loads(members[suffix])
        except ValueError as error:
            raise UnreadableError("bad JSON", where, str(error)) from error
        return caption_text(table.get(field) if isinstance(table, dict) else None, where)

    def _members(self, url: str) -> Iterator[tuple[str, bytes]]:
        """(name, content) of each file in the tar at `url`; what stops the reading is counted and logged."""
        from webdataset.gopen import gopen, set_options

        last = ""
        try:
            with gopen(url) as stream:
                # Of a pipe: whether its tar is whole, the end mark tells; a program that is left early may exit anyhow.
                set_options(stream, ignore_errors=True)
                with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
                    for member in tar:
                        if reason := _no_part_of_a_sample(member):
                            where = f"{url}: {member.name}"
                            self.skips.add(where, UnreadableError(reason, where))
                        elif member.isfile():
                            yield member.name, tar.extractfile(member).read()  # type: ignore[union-attr]
                        last = member.name
                        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                    if tar.fileobj.read(2 * tarfile.RECORDSIZE).strip(b"\0"):  # type: ignore[union-attr]
                        raise tarfile.ReadError("more data after the end mark; tars cannot be joined by cat")
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            reason = "tar cut short" if last else "tar not readable"
            problem = UnreadableError(reason, url, f"{error}; used up to {last}" if last else str(error))
            if self.skips.add(url, problem):
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


def _count(folder: Path, names: list[str]) -> int | None:
    """How many samples `folder` says that its tars of these names hold; None if it says nothing. open_clip's rule."""
    sizes, length = folder / "sizes.json", folder / "__len__"
    path = sizes if sizes.is_file() else length
    if not path.is_file():
        return None
    try:
        if path is length:
            return int(path.read_text("utf-8"))
        table = json.loads(path.read_text("utf-8"))
        return sum(int(table[name]) for name in names)
    except KeyError as error:
        raise DataError(f"{path}: has no entry for {error.args[0]!r}; add it, or give the number of samples") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: does not tell numbers of samples ({error}); mend it or give the number") from error
