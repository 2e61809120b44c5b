"""The metrics of a run: one JSON object a line, and the same values in TensorBoard on request."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlmfast.errors import DataError, missing_extra
from vlmfast.train.checkpoint import replace_text

FILE = "metrics.jsonl"


class MetricsLog:
    """Writer of `out/metrics.jsonl`: {"step": 10, "train/contrastive_loss": 2.3, ...}, keys as in open_clip's logs.

    Args:
        out: the run's folder.
        keep_to: lines of later steps are cut off, so that a run that goes on from step `keep_to` doubles none.
        tensorboard: also write event files to out/tensorboard.
        silent: write nothing: for a rank that is not the first.

    Attributes:
        last: the last value of every key, "step" included, also from the lines that were kept.

    Raises:
        DataError: a line of the file, other than one that a dying process left half written at its end, is no JSON.
        MissingExtraError: tensorboard is asked for and not installed.
    """

    def __init__(self, out: Path, keep_to: int = 0, *, tensorboard: bool = False, silent: bool = False):
        self.last: dict[str, float] = {}
        self._board: Any = _event_writer(out / "tensorboard", keep_to + 1) if tensorboard and not silent else None
        path = out / FILE
        if path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= keep_to]
            for record in kept:
                self.last.update(record)
            if not silent:
                replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = (Path(os.devnull) if silent else path).open(
            "a", encoding="utf-8", buffering=1
        )  # a line reaches the system as one write

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line."""
        record = {"step": step, **values}
        self.last.update(record)
        self._file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def sync(self) -> None:
        """Have every line on the disk before going on."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, parsed; a half-written last line is left out.

    Args:
        path: the file.

    Returns:
        One dictionary a line, each with a "step".

    Raises:
        DataError: a line before the last is no JSON object with a "step".
    """
    records = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f'{path}: line {number} is not a JSON object with a "step"; got {line[:80]!r}') from error
        records.append(record)
    return records


def _event_writer(folder: Path, purge_step: int) -> Any:
    """TensorBoard's writer, which hides what an earlier process wrote from purge_step on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing_extra("tensorboard", "log") from error
    return SummaryWriter(str(folder), purge_step=purge_step)
