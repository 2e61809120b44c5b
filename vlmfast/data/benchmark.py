"""CLIP_benchmark's layout of a data set on disk.

ROOT/dataset_type.txt                        retrieval or classification; classification where it is missing
     classnames.txt                          one a line, in the order of the labels
     zeroshot_classification_templates.txt   one a line, {c} where the name goes
     test/nshards.txt                        how many tars there are
          0.tar, 1.tar, ...                  000.webp (or png, jpg, jpeg), and 000.cls (a label) or 000.txt (captions,
                                             one a line)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmfast.errors import DataError

SHARDS = "nshards.txt"


@dataclass(frozen=True)
class Benchmark:
    """One split of such a data set."""

    kind: Literal["classification", "retrieval"]
    tars: list[str]
    prompts: list[list[str]]  # of each class, in the order of the labels; empty for retrieval


def is_benchmark(root: str | Path, split: str) -> bool:
    """Whether there is a split of that name, laid out so, under `root` (a folder, or "" for none)."""
    return bool(root) and (Path(root) / split / SHARDS).is_file()


def read_benchmark(root: str | Path, split: str) -> Benchmark:
    """The split of the data set under `root`.

    Args:
        root: a local folder.
        split: such as "test".
    Raises:
        DataError: a file is missing or not what it should be, a template has no place for the name, or the data set is
            of a kind that is not built here.
    Source: CLIP_benchmark `build_wds_dataset`.
    """
    root = Path(root)
    count = _lines(root / split / SHARDS)[0]
    if not count.isdecimal() or int(count) == 0:
        raise DataError(f"{root / split / SHARDS}: must hold the number of tars; got {count!r}")
    tars = [str(root / split / f"{number}.tar") for number in range(int(count))]
    type_file = root / "dataset_type.txt"
    kind = _lines(type_file)[0].lower() if type_file.is_file() else "classification"
    if kind == "retrieval":
        return Benchmark("retrieval", tars, [])
    if kind != "classification":
        raise DataError(f"{type_file}: {kind!r} is not built here; built: classification, retrieval")
    names = _lines(root / "classnames.txt")
    templates = _lines(root / "zeroshot_classification_templates.txt")
    if wrong := [template for template in templates if "{c}" not in template]:
        raise DataError(f"{root}: template {wrong[0]!r} has no place for the name; write {{c}}")
    prompts = [[template.replace("{c}", name) for template in templates] for name in names]
    return Benchmark("classification", tars, prompts)


def _lines(path: Path) -> list[str]:
    """The lines of a file, without white space around them; at least one, none empty."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: {error}") from None
    if not lines or not all(lines):
        raise DataError(f"{path}: " + (f"line {lines.index('') + 1} is empty" if lines else "is empty"))
    return lines
