"""The search for the fastest tiles of a GPU: each candidate is checked, then timed in turns with the best so far."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.backend import use_backend
from vlmfast.bench import machine, timing
from vlmfast.bench.meter import meter
from vlmfast.bench.providers import BenchError
from vlmfast.bench.timing import Spread, spread
from vlmfast.errors import BackendError
from vlmfast.ops import _configs, _tiles
from vlmfast.ops._configs import CANDIDATES, Case, Config
from vlmfast.ops.hinge_loss import vse_loss
from vlmfast.ops.sigmoid_loss import siglip_loss
from vlmfast.ops.similarity import similarity_topk
from vlmfast.ops.softmax_loss import clip_loss

Call: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GAIN = 0.02  # a tile that is faster by less than this is not worth an entry
MATCH = 0.3  # a text is MATCH * its image + a random unit row: solved pairs would have no gradient left to compare
# How far the results of two tiles may be apart, which differ by the order of float32 sums: a loss, any item of a top k,
# and gradients, where some entries of G are rounded the other way (relative length, by what is multiplied).
LOSS_APART, INDICES_APART = 1e-5, 1e-3
GRADIENTS_APART = {"bfloat16": 2**-9, "float16": 2**-12, "bf16x3": 2**-14, "tf32": 2**-11}
IEEE_APART = 2**-16


def _pass(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The loss, and its gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def _number(like: Tensor, value: float) -> Tensor:
    return torch.full((), value, device=like.device)


# Op -> kind of its kernels over tiles (_configs.KINDS) -> all that it computes: forward, and backward where it has one.
CALLS: dict[str, dict[str, Call]] = {
    "clip": {"softmax": lambda x, y: _pass(clip_loss, x, y, _number(x, 1 / 0.07))},
    "siglip": {"sigmoid": lambda x, y: _pass(siglip_loss, x, y, _number(x, 1 / 0.07), _number(x, -10.0))},
    "hinge": {
        "hinge": lambda x, y: _pass(partial(vse_loss, margin=0.2), x, y),
        "hardest": lambda x, y: _pass(partial(vse_loss, margin=0.2, hardest=True), x, y),
    },
    "topk": {"topk": lambda x, y: similarity_topk(x, y, min(10, len(y)))},
}


@dataclass(frozen=True)
class Tune:
    """The fastest tiles for this machine's GPU, measured, and kept where the ops find them."""

    dim: str = "512,768,1024"
    """Embedding widths D, joined by commas; each stands for those down to the next lower of 64, 128, 256, 512, 768."""
    dtype: str = "bfloat16,float32"
    """Types of the embeddings, joined by commas."""
    ops: str = "clip,siglip,hinge,topk"
    """Which ops, joined by commas."""
    batch: int = 16384
    """Pairs in a batch; the tiles that are found serve every batch size."""
    rounds: int = 5
    """The fewest rounds of a comparison; every round runs both tiles once."""
    seconds: float = 0.2
    """Rounds go on for so long at least."""
    json: Path | None = None
    """Write everything that was measured here, with machine, versions and commit."""
    dry_run: bool = False
    """List the candidates and measure nothing; no GPU is needed."""
    target: str | None = None
    """Whose candidates --dry-run lists (sm_80, sm_90, sm_100, gfx942); this machine's GPU, else all."""


@dataclass
class Trial:
    """One tile on one op: what it computed, and its launches, to be repeated."""

    config: Config
    case: Case
    results: tuple[Tensor, ...]
    launches: list[Callable[[], Any]]
    registers: int | None  # the most a thread; None where Triton does not say
    spilled: int

    def run(self) -> None:
        """Launches the kernels over tiles once more, forward and backward, and nothing else of the op."""
        for launch in self.launches:
            launch()


@dataclass
class Row:
    """One candidate: its time and that of the best tile so far in the same rounds, or why it is none."""

    tile: Config
    outcome: str
    registers: int | None = None
    ms: Spread | None = None
    best_ms: Spread | None = None


@dataclass
class Outcome:
    """What was found for one op, dtype and width."""

    op: str
    dtype: str
    dim: int
    batch: int
    case: Case
    shipped: Config
    best: Config
    shipped_ms: Spread | None = None  # in turns with the best, once more, after the search; None: nothing was better
    best_ms: Spread | None = None
    stored: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """The share of the shipped tile's time that the best saves."""
        return 1 - self.best_ms.median / self.shipped_ms.median if self.best_ms and self.shipped_ms else 0.0


def main(config: Tune) -> list[Outcome]:
    """What was found, printed as a table and written to the file that the config names.

    Progress goes to stderr, a line a candidate.

    Args:
        config: what to tune.
    Raises:
        BackendError: there is no GPU that the kernels run on.
        BenchError: an op, dtype, width or target is unknown.
        OSError: a file cannot be written.
    """
    if config.dry_run:
        print(listing(config.target))
        return []
    _need_gpu()
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
    for name in ("batch", "rounds"):
        if getattr(config, name) < 1:
            raise BenchError(f"{name} must be at least 1; got {getattr(config, name)}")
    outcomes = tune(
        [_width(text) for text in config.dim.split(",")],
        _split(config.dtype, DTYPES, "dtype"),
        _split(config.ops, CALLS, "ops"),
        batch=config.batch,
        rounds=config.rounds,
        seconds=config.seconds,
        say=partial(print, file=sys.stderr, flush=True),
    )
    if config.json is not None:
        write_json(outcomes, config.json)
    print(table(outcomes))
    print(f"stored: {_configs.cache_file()} ({sum(outcome.stored for outcome in outcomes)} tiles of this run)")
    return outcomes


def tune(
    dims: Sequence[int] = (512, 768, 1024),
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    ops: Sequence[str] = tuple(CALLS),
    *,
    batch: int = 16384,
    device: str = "cuda",
    rounds: int = 5,
    seconds: float = 0.2,
    candidates: Mapping[Config, str] | None = None,
    timed: Callable[[Trial], float] | None = None,
    store: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """What was found for each op, width and dtype; tiles that are better by more than 2 % are stored for later calls.

    A candidate counts only if loss and gradients equal those of the shipped tile within rounding, and if it spills
    nothing. It is timed in turns with the best so far, and the best of all once more with the shipped one.

    Args:
        dims: embedding widths D.
        dtypes: of the embeddings, names in DTYPES.
        ops: names in CALLS.
        batch: pairs.
        device: "cuda", or "cpu" under Triton's interpreter.
        rounds: the fewest rounds of a comparison.
        seconds: rounds go on for so long at least.
        candidates: tile -> the kinds of kernel to try it for; default: those of the device's target.
        timed: seconds of a trial's kernels; default: on the device's own clock.
        store: whether to keep what is found, in `_configs.cache_file()`.
        say: takes a line of progress at a time.
    Raises:
        OSError: the file of tuned tiles cannot be written.
    """
    clock = meter(device)
    place = torch.empty(0, device=device).device
    candidates = CANDIDATES[_configs.target(place)] if candidates is None else candidates
    timed = timed or (lambda trial: clock.timed(trial.run))
    if store:
        _configs.store(place, {})  # a folder that cannot be written is better known now than after the search
    outcomes = []
    for dtype in dtypes:
        for dim in dims:
            for op in ops:
                x, y = pairs(batch, dim, DTYPES[dtype], place, items=4 * batch if op == "topk" else batch)
                for kind, call in CALLS[op].items():
                    tiles = [tile for tile, kinds in candidates.items() if kind in kinds.split()]
                    shipped = _attempt(partial(call, x, y), None)
                    outcome = Outcome(op, dtype, dim, batch, shipped.case, shipped.config, shipped.config)
                    say(f"{op} ({kind}) {dtype} D={dim}: shipped {shipped.config}")
                    compare = partial(_in_turns, timed, rounds, seconds)
                    _search(outcome, partial(call, x, y), shipped, tiles, compare, clock.recover, say)
                    if store:
                        _configs.store(place, {outcome.case: outcome.best if outcome.gain > GAIN else None})
                        outcome.stored = outcome.gain > GAIN
                    outcomes.append(outcome)
    return outcomes


def pairs(batch: int, dim: int, dtype: torch.dtype, device: torch.device, items: int) -> tuple[Tensor, Tensor]:
    """Random rows, each weakly matched to one of the other side.

    Args:
        batch: B.
        dim: D.
        dtype: of both.
        device: of both.
        items: N, at least B; those from B on match nobody.
    Returns: x [B, D], y [N, D].
    """
    generator = torch.Generator(device).manual_seed(0)
    x, y = (F.normalize(torch.randn(n, dim, generator=generator, device=device), dim=1) for n in (batch, items))
    y[:batch] += MATCH * x
    return x.to(dtype), y.to(dtype)


def listing(target: str | None) -> str:
    """The candidates of a target, a line each; of this machine's GPU, or of all targets, if it is None.

    Args:
        target: a key of CANDIDATES.
    Raises:
        BenchError: it is unknown.
    """
    if target is None and torch.cuda.is_available():
        target = _configs.target(torch.device("cuda"))
    targets = list(CANDIDATES) if target is None else _split(target, CANDIDATES, "target")
    lines = [f"{name}  {tile!s:<30} {kinds}" for name in targets for tile, kinds in CANDIDATES[name].items()]
    return "\n".join(lines)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as lines of columns.

    Args:
        outcomes: of `tune`.
    """
    lines = [f"{'kernels':<10} {'operands':<10} {'D':>5}  {'tile':<30} {'ms':>9} {'shipped':>9} {'gain':>7}"]
    for o in outcomes:
        times = [f"{s.median:9.3f}" if s else f"{'-':>9}" for s in (o.best_ms, o.shipped_ms)]
        gain = f"{100 * o.gain:6.1f}%" if o.best_ms else "shipped"
        row = f"{o.case.kind:<10} {o.case.operands:<10} {o.dim:>5}  {o.best!s:<30} {' '.join(times)} {gain}"
        lines.append(row + ("  stored" if o.stored else ""))
    return "\n".join(lines)


def write_json(outcomes: Sequence[Outcome], path: Path) -> None:
    """Writes all that was measured, one object, with machine, versions and commit.

    Args:
        outcomes: of `tune`.
        path: of the file.
    """
    facts: dict[str, Any] = {"schema": "vlmfast-tune-1", "date": machine.now(), "machine": machine.machine()}
    facts |= {"versions": machine.versions(), "commit": machine.commit()}
    if torch.cuda.is_available():
        facts["machine"]["gpu"] = machine.gpu()
    rows = [asdict(o) | {"case": o.case._asdict(), "gain": o.gain} for o in outcomes]
    path.write_text(json.dumps(facts | {"outcomes": rows}, indent=1) + "\n", encoding="utf-8")


def _search(
    outcome: Outcome,
    call: Callable[[], tuple[Tensor, ...]],
    shipped: Trial,
    tiles: Sequence[Config],
    compare: Callable[[Trial, Trial], tuple[Spread, Spread]],
    recover: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Fills in the outcome: every candidate, and the best in turns with the shipped one."""
    best = shipped
    for tile in tiles:
        if tile == shipped.config:
            continue
        row = Row(tile, "")
        outcome.rows.append(row)
        try:
            trial = _attempt(call, tile)
            row.registers = trial.registers
            row.outcome = f"spills {trial.spilled} registers" if trial.spilled else apart(trial, shipped)
        except Exception as error:  # whatever Triton's compiler, or the launch of a tile that is too large, raises
            row.outcome = f"cannot run: {str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}"
            recover()
        if not row.outcome:
            row.ms, row.best_ms = compare(trial, best)
            faster = 1 - row.ms.median / row.best_ms.median
            row.outcome = f"{row.ms.median:.3f} ms against {row.best_ms.median:.3f}, {100 * faster:+.1f} %"
            if faster > 0:
                best = trial
        say(f"  {tile}: {row.outcome}")
    if best is not shipped:
        outcome.best = best.config
        outcome.best_ms, outcome.shipped_ms = compare(best, shipped)


def _in_turns(
    timed: Callable[[Trial], float], rounds: int, seconds: float, one: Trial, other: Trial
) -> tuple[Spread, Spread]:
    """Milliseconds of each, the two in turns."""
    calls = {"one": partial(timed, one), "other": partial(timed, other)}
    samples = timing.interleave(calls, rounds, seconds=seconds)
    ours, theirs = (spread([1e3 * sample for sample in samples[name]]) for name in calls)
    return ours, theirs


def _attempt(call: Callable[[], tuple[Tensor, ...]], config: Config | None) -> Trial:
    """Runs the op with a tile, None: the shipped one."""
    with use_backend("triton"), _configs.trying(config) as asked, _recorded() as launches:
        results = call()
        config = config or launches[0][0]
    compiled = [kernel for _, _, kernel in launches]
    registers = [kernel.n_regs for kernel in compiled if getattr(kernel, "n_regs", None)]
    spilled = max(getattr(kernel, "n_spills", None) or 0 for kernel in compiled)
    return Trial(config, asked[0], results, [again for _, again, _ in launches], max(registers, default=None), spilled)


@contextmanager
def _recorded() -> Iterator[list[tuple[Config, Callable[[], Any], Any]]]:
    """(tile, the launch once more, the compiled kernel) of every launch over tiles."""
    found: list[tuple[Config, Callable[[], Any], Any]] = []
    launch = _tiles.launch

    def record(*args: Any, config: Config | None = None, **constants: Any) -> Any:
        compiled = launch(*args, config=config, **constants)
        if config is not None:
            found.append((config, partial(launch, *args, config=config, **constants), compiled))
        return compiled

    _tiles.launch = record  # type: ignore[assignment]
    try:
        yield found
    finally:
        _tiles.launch = launch


def apart(trial: Trial, shipped: Trial) -> str:
    """Nothing, or in words how a trial's results differ from the shipped tile's by more than rounding.

    Args:
        trial: a candidate's.
        shipped: the same op's on the same inputs.
    """
    gradients = GRADIENTS_APART.get(trial.case.operands, IEEE_APART)
    for place, (ours, theirs) in enumerate(zip(trial.results, shipped.results, strict=True)):
        if ours.is_floating_point():
            error = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-300))
            most = gradients if place else LOSS_APART
        else:
            error, most = float((ours != theirs).double().mean()), INDICES_APART
        if not error <= most:
            return f"its result {place} is {error:.1e} from the shipped tile's; rounding explains {most:.1e}"
    return ""


def _need_gpu() -> None:
    """Raises BackendError where there is no GPU that the kernels run on."""
    why: str | None = f"torch {torch.__version__} sees none (torch.cuda.is_available() is False)"
    if torch.cuda.is_available():
        example = torch.empty(1, 1, device="cuda")
        why = _tiles.unsupported(example, example)
    if why is not None:
        raise BackendError(f"needs a GPU: {why}")


def _split(text: str, known: Mapping[str, Any], name: str) -> list[str]:
    """The names in `text`, joined by commas."""
    names = [part.strip() for part in text.split(",")]
    for part in names:
        if part not in known:
            raise BenchError(f"{name}: unknown {part!r}; choose of {', '.join(known)}")
    return names


def _width(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise BenchError(f"dim: expected widths such as 512,768; got {text!r}")
    return int(text)
