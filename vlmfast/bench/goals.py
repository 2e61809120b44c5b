"""What the kernels are to reach on an H200, beside what a folder of result files says they do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vlmfast.bench.document import is_result, load
from vlmfast.bench.report import Row

BLOCK = re.compile(r"<!-- goals: (\S+) -->\n(.*?)<!-- end of goals -->", re.S)
UNMEASURED = "unmeasured"
GB = 1e9
# Kernel, dtype, D (of attention K, of patches their side) and B (of top k N, of attention T, of a head its
# supervised rows).
Point: TypeAlias = tuple[str, str, int, int]
Rows: TypeAlias = dict[str, Row]  # provider -> its row
Measure: TypeAlias = Callable[[Rows], float | None]


@dataclass(frozen=True)
class Goal:
    """A line of the table: what is measured at which points, and what it is to be there."""

    what: str
    points: tuple[Point, ...]
    bounds: tuple[float, ...]  # one a point, or one for all
    at_least: bool  # else at most
    unit: str
    measure: Measure
    part: str = "loss"  # of benchmarks/gpu_check.sh

    def met(self, values: Sequence[float]) -> bool:
        """Whether each value is on the right side of its bound."""
        bounds = self.bounds * (len(values) if len(self.bounds) == 1 else 1)
        return all(v >= b if self.at_least else v <= b for v, b in zip(values, bounds, strict=True))


def rate(forward: bool) -> Measure:
    """TFLOP/s of ours."""

    def measure(rows: Rows) -> float | None:
        row = rows.get("vlmfast")
        gflops = row and (row.forward_gflops if forward else row.gflops)
        return gflops / 1e3 if gflops else None

    return measure


def times(provider: str) -> Measure:
    """How many times our time a provider takes, forward and backward."""
    return lambda rows: rows[provider].full_ratio if provider in rows else None


def ours(value: Callable[[Row], float | None]) -> Measure:
    """Some number of our own row."""
    return lambda rows: value(rows["vlmfast"]) if "vlmfast" in rows else None


def best_of(providers: Sequence[str], forward: bool) -> Measure:
    """How many times our time the fastest of some providers takes."""

    def measure(rows: Rows) -> float | None:
        ran = [rows[name] for name in providers if name in rows and "vlmfast" in rows]
        ratios = [row.forward_ratio if forward else row.full_ratio for row in ran]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    return measure


def forward_times(provider: str) -> Measure:
    """How many times our time a provider takes, forward."""
    return best_of([provider], True)


def _per(number: float | None, unit: float) -> float | None:
    return None if number is None else number / unit


LARGE, SMALL = 65536, 4096
CLIP = tuple(("clip_loss", "bfloat16", D, LARGE) for D in (512, 768, 1024))
CLIP_SMALL = tuple(("clip_loss", "bfloat16", D, SMALL) for D in (512, 768, 1024))
MILLION = ("clip_loss", "bfloat16", 512, 2**20)
SIGLIP = ("siglip_loss", "bfloat16", 768, LARGE)
HARDEST = ("vse_loss, hardest", "bfloat16", 768, LARGE)
SPLIT = ("clip_loss", "float32", 512, 8192)
TOPK = ("similarity_topk", "bfloat16", 512, 2**20)
LENGTHS = (50, 77, 197, 257, 577, 1025)
ATTENTION = tuple(("attention", "bfloat16", 64, T) for T in LENGTHS)
ATTENTION_AT = "K = 64, T = " + " / ".join(map(str, LENGTHS))
SDPA = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
PATCH = ("patch_embed", "bfloat16", 16, 1024)
REAL, FULL = (f"ViT-B-32, training step, {captions}" for captions in ("real", "77"))
STEP_REAL, STEP_FULL = (REAL, "bfloat16", 512, 2048), (FULL, "bfloat16", 512, 2048)
CACHED, CACHED_LARGE = (("cached step", "bfloat16", 512, B) for B in (4096, LARGE))
HEAD = ("linear_cross_entropy", "bfloat16", 4096, 4096)
SHARES = (0.05, 0.15, 0.5)  # of a head's rows that are supervised
HEAD_SHARES = tuple(("linear_cross_entropy", "bfloat16", 4096, round(share * 4096)) for share in SHARES)
ALL_ROWS = "vlmfast, all rows supervised"
WIDTHS = "D = 512 / 768 / 1024"
AT = f"{WIDTHS}, B = {LARGE}"
GOALS = (
    Goal(f"clip_loss, forward, {AT}", CLIP, (590, 630, 670), True, "TFLOP/s", rate(True)),
    Goal(f"clip_loss, forward and backward, {AT}", CLIP, (550, 600, 640), True, "TFLOP/s", rate(False)),
    Goal(f"clip_loss against open_clip's formula, {AT}", CLIP, (3.0, 2.7, 2.4), True, "×", times("eager-two")),
    Goal(f"… against that compiled, {AT}", CLIP, (1.6,), True, "×", times("torch-compile-two")),
    Goal(f"… against memeff, {AT}", CLIP, (2.0,), True, "×", times("memeff")),
    Goal(f"… against Inf-CL, {AT}", CLIP, (10.0,), True, "×", times("inf-cl")),
    Goal(
        f"… against open_clip's formula compiled, {WIDTHS}, B = {SMALL}",
        CLIP_SMALL,
        (1.0,),
        True,
        "×",
        times("torch-compile-two"),
    ),
    Goal(
        f"clip_loss, extra memory, {AT}; D = 512, B = {2**20}",
        (*CLIP, MILLION),
        (0.5,),
        False,
        "GB",
        ours(lambda row: _per(row.extra_bytes, GB)),
    ),
    Goal(
        f"clip_loss, memory in all, D = 512, B = {2**20}",
        (MILLION,),
        (16.0,),
        False,
        "GB",
        ours(lambda row: _per(row.process_bytes, GB)),
    ),
    Goal(
        f"siglip_loss, D = 768, B = {LARGE}",
        (SIGLIP,),
        (33.0,),
        False,
        "ms",
        ours(lambda row: row.full_ms.median if row.full_ms else None),
    ),
    Goal(f"… against siglip-kernel, D = 768, B = {LARGE}", (SIGLIP,), (1.45,), True, "×", times("siglip-kernel")),
    Goal(
        f"vse_loss, hardest, against VSE++'s, D = 768, B = {LARGE}", (HARDEST,), (8.0,), True, "×", times("eager-two")
    ),
    Goal(
        "similarity_topk against mm and topk, 8192 queries, 2²⁰ items, D = 512, k = 10",
        (TOPK,),
        (8.0,),
        True,
        "×",
        times("mm-topk"),
        "topk",
    ),
    Goal(
        f"attention, forward, against the best of flash, cuDNN and efficient, {ATTENTION_AT}",
        ATTENTION,
        (2.5, 2.0, 1.5, 1.35, 1.1, 1.0),
        True,
        "×",
        best_of(SDPA, True),
        "attention",
    ),
    Goal(
        "… forward and backward",
        ATTENTION,
        (2.0, 1.8, 1.4, 1.3, 1.1, 1.0),
        True,
        "×",
        best_of(SDPA, False),
        "attention",
    ),
    Goal(
        "patch_embed against normalising and convolving, forward, B/16, uint8",
        (PATCH,),
        (4.0,),
        True,
        "×",
        forward_times("eager"),
        "patch",
    ),
    Goal(
        "training step of ViT-B/32, B = 2048, full captions, against open_clip",
        (STEP_FULL,),
        (1.5,),
        True,
        "×",
        times("open_clip"),
        "model",
    ),
    Goal("… against open_clip compiled", (STEP_FULL,), (1.15,), True, "×", times("open_clip-compile"), "model"),
    Goal(
        "… with real caption lengths, against open_clip compiled",
        (STEP_REAL,),
        (1.5,),
        True,
        "×",
        times("open_clip-compile"),
        "model",
    ),
    Goal(
        "cached step of ViT-B/32, B = 4096, against the plain step",
        (CACHED,),
        (0.7,),
        True,
        "×",
        times("plain"),
        "step",
    ),
    Goal("… against open_clip's accum-freq 16", (CACHED,), (1.3,), True, "×", times("open_clip"), "step"),
    Goal(f"… the loss's part, B = {LARGE}", (CACHED_LARGE,), (0.03,), False, "", times("loss alone"), "step"),
    Goal(
        "linear_cross_entropy, M = 4096, D = 4096, V = 128 256, against Liger-Kernel's",
        (HEAD,),
        (5.0,),
        True,
        "×",
        times("liger"),
        "vlm",
    ),
    Goal("… against quack's", (HEAD,), (0.95,), True, "×", times("quack"), "vlm"),
    Goal(
        "… with 5 / 15 / 50 % of the rows supervised, against all of them",
        HEAD_SHARES,
        tuple(1 / (share + 0.03) for share in SHARES),
        True,
        "×",
        times(ALL_ROWS),
        "vlm",
    ),
    Goal(
        f"clip_loss, error of the loss, bfloat16, {WIDTHS}, B = {SMALL}",
        CLIP_SMALL,
        (1e-5,),
        False,
        "",
        ours(lambda row: row.loss_error),
    ),
    Goal(
        f"clip_loss, error of the gradients, bfloat16, {WIDTHS}, B = {SMALL}",
        CLIP_SMALL,
        (4e-3,),
        False,
        "",
        ours(lambda row: row.gradient_error),
    ),
    Goal(
        "clip_loss, error of the gradients, float32 as bf16x3, D = 512, B = 8192",
        (SPLIT,),
        (1e-5,),
        False,
        "",
        ours(lambda row: row.gradient_error),
    ),
)


def refreshed(text: str, results: Path) -> str:
    """The document with every table of goals, `<!-- goals: <folder> -->` to `<!-- end of goals -->`, made anew.

    Args:
        text: the document.
        results: the folder that the comments' folders lie in. One that does not exist has no results.
    Raises:
        BenchError: a file of a folder is no result.
    """

    def block(match: re.Match) -> str:
        return f"{match.group(0).splitlines()[0]}\n{table(results / match.group(1))}<!-- end of goals -->"

    return BLOCK.sub(block, text)


def table(folder: Path) -> str:
    """The goals as Markdown, each with what the folder's newest result of it says, or "unmeasured".

    Args:
        folder: of result files.
    Raises:
        BenchError: a file of the folder is no result.
    """
    points, tests = measured(folder)
    lines = ["| what | goal | measured | by |", "|---|---|---|---|"]
    for goal in GOALS:
        values = [goal.measure(points.get(point, {})) for point in goal.points]
        said = [value for value in values if value is not None]
        shown = " / ".join(UNMEASURED if value is None else _number(value) for value in values)
        if not said:
            shown = UNMEASURED
        elif len(said) == len(values):
            shown += f" {goal.unit}".rstrip() + (", met" if goal.met(said) else ", **missed**")
        bounds = " / ".join(_number(bound) for bound in goal.bounds)
        sign = "≥" if goal.at_least else "≤"
        lines.append(f"| {goal.what} | {f'{sign} {bounds} {goal.unit}'.rstrip()} | {shown} | `--part {goal.part}` |")
    lines.append(f"| the tests on the GPU | all pass | {tests} | `--part tests` |")
    return "\n".join(lines) + "\n"


def measured(folder: Path) -> tuple[dict[Point, Rows], str]:
    """Point -> provider -> row, of the newest file that has the point; and what the newest tests said.

    Args:
        folder: of result files.
    Raises:
        BenchError: a file of the folder is no result.
    """
    points: dict[Point, Rows] = {}
    tests = UNMEASURED
    files = [(json.loads(path.read_text(encoding="utf-8")), path) for path in folder.glob("*.json")]
    ours = [(str(read["date"]), path, read) for read, path in files if isinstance(read, dict) and "date" in read]
    for _, path, read in sorted(ours, key=lambda each: each[:2]):
        if read.get("part") == "tests":
            tests = _tests(read["runs"])
        else:
            fresh: dict[Point, Rows] = {}
            for point, row in _rows(path) if is_result(path) else _rows_of_script(read):
                fresh.setdefault(point, {})[row.provider] = row
            points |= fresh
    return points, tests


def _rows(path: Path) -> Iterator[tuple[Point, Row]]:
    for report in load(path):
        config, kernel = report.config, report.kernel
        if "caption_length" in config:
            kernel += f", {config['caption_length']}"
            for row in report.rows:
                yield (kernel, config["dtype"], config["dim"], row.batch), row
            continue
        usual = config.get("k", 10) == 10 and config.get("queries", 8192) == 8192
        if usual and config.get("precision") in (None, "bf16x3") and config.get("max_workspace") is None:
            for row in report.rows:
                yield (kernel, config["dtype"], config["dim"], row.batch), row


def _rows_of_script(read: dict) -> Iterator[tuple[Point, Row]]:
    """Of the benchmarks that are scripts, on a GPU, all in bfloat16."""
    rows = read.get("rows", ())
    head = [each for each in rows if each["provider"] == "vlmfast" and each.get("supervised") == 1]
    for each in [*rows, *read.get("measurements", ())]:
        dense = re.fullmatch(r"dense, T=(\d+), K=(\d+)", each.get("what", ""))
        if dense:
            T, K = map(int, dense.groups())
            point = ("attention", "bfloat16", K, T)
        elif read.get("benchmark") == "cached step":
            point = ("cached step", "bfloat16", 512, each["batch"])
        elif read.get("benchmark") == "linear_cross_entropy" and "left_out" not in each:
            supervised = round(each["supervised"] * read["sizes"]["M"])
            point = ("linear_cross_entropy", "bfloat16", read["sizes"]["D"], supervised)
            if each["provider"] == "vlmfast" and head:
                whole, part = (row["full_ms"]["median"] for row in (head[0], each))
                yield point, Row(ALL_ROWS, point[3], full_ratio=whole / part)
        elif read.get("op") == "patch_embed":
            point = ("patch_embed", "bfloat16", each["patch"], each["batch"])
        else:
            continue
        ratios = {name: each.get(f"{name}_ratio", each.get(f"{name}_ms_ratio")) for name in ("forward", "full")}
        yield point, Row(each["provider"], point[3], forward_ratio=ratios["forward"], full_ratio=ratios["full"])


def _tests(runs: Sequence[dict]) -> str:
    ran = [run for run in runs if "passed" in run]
    passed, failed, skipped = (sum(run[name] for run in ran) for name in ("passed", "failed", "skipped"))
    text = f"{passed} passed, {failed} failed, {skipped} skipped"
    ended = len(ran) == len(runs) and all(run["end"] == "complete" for run in ran)
    return text + ("" if ended else "; not all were run")


def _number(value: float) -> str:
    if value < 0.01:
        return f"{value:.0e}"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}".rstrip("0").rstrip(".")
