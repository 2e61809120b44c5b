"""`vlmfast plan`: where the bytes of a training step go, and the micro-batch with which it fits."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from vlmfast.bench.plan import Towers
from vlmfast.distributed import RING_BYTES, RING_RANKS, RING_ROWS
from vlmfast.errors import VlmfastError, missing_extra
from vlmfast.models import ClipConfig, load_config
from vlmfast.ops._limits import MAX_WORKSPACE

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
RESERVE = (
    0.06  # of the memory: CUDA's context, the libraries' workspaces, and what the allocator cannot use of its blocks
)
SMALL = 256  # pairs in a micro-batch; rather than go below, blocks are computed a second time
WEIGHT = 4  # bytes: weights, gradients and AdamW's two means are float32 in either precision


@dataclass(kw_only=True)
class Config:
    """Says where the bytes of a training step go, and with which flags of train it fits into the memory.

    For example:
        vlmfast plan --model ViT-B-32 --batch 65536 --memory 80GB
        vlmfast plan --model ViT-L-14 --batch 32768 --memory 141GB --world-size 8 --siglip --json

    Bytes are counted on the model's own forward and backward, run on tensors without values; nothing is computed, and
    no GPU is needed.
    """

    model: str
    """A model's name, or the path of its JSON config."""
    batch: int
    """Pairs in a step, those of all ranks together."""
    memory: str
    """Of each rank's device: 80GB, 141GB, 24GiB, ..."""
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    """amp_bf16: bfloat16 autocast; weights stay float32."""
    siglip: bool = False
    """SigLIP's pairwise sigmoid loss instead of CLIP's softmax."""
    world_size: int = 1
    """Ranks that share the batch."""
    fsdp: bool = False
    """They share weights and optimizer, too."""
    caption_length: int | None = None
    """Tokens of a caption, start and end included: their mean, as the text tower computes no padding. Default: the
    model's context length, the most there can be."""
    json: bool = False
    """Print one JSON object."""


class DoesNotFitError(VlmfastError):
    """No micro-batch and no checkpointing makes the step fit; the message says what is missing."""


@dataclass(frozen=True)
class Part:
    """One line of the plan."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Plan:
    """A step that fits, on each rank."""

    parts: list[Part]
    memory_bytes: int
    micro_batch_size: int
    batch_size: int  # of a rank
    grad_checkpointing: bool
    max_workspace: int  # bytes, of the loss
    command: str

    @property
    def total_bytes(self) -> int:
        """What the parts take together."""
        return sum(part.bytes for part in self.parts)


def run(config: Config) -> None:
    """Prints the plan.

    Args:
        config: the flags.
    """
    plan = make(config)
    if config.json:
        print(json.dumps(asdict(plan) | {"total_bytes": plan.total_bytes}, indent=1))
    else:
        show(plan)


def make(config: Config) -> Plan:
    """The plan with the largest micro-batch that fits.

    The whole batch at once, if that fits; else micro-batches, a power of two, of at least 256 pairs; else whatever is
    larger with the blocks computed twice (checkpointing). What is then left goes to the loss's workspace.

    Args:
        config: the flags.
    Raises:
        DoesNotFitError: not even a micro-batch of one pair fits.
        ValueError: a number is below 1, the ranks do not share the batch evenly, the memory has no unit that is known,
            captions are longer than the model takes, or --fsdp is given for one rank.
    """
    architecture = load_config(config.model)
    longest = architecture.text_cfg.context_length
    tokens = longest if config.caption_length is None else config.caption_length
    if config.batch < 1 or config.world_size < 1 or config.batch % config.world_size:
        raise ValueError(
            f"--batch {config.batch} must be a multiple of --world-size {config.world_size}, both at least 1"
        )
    if not 1 <= tokens <= longest:
        raise ValueError(f"--caption-length must be 1 .. {longest}, the model's context length; got {tokens}")
    if config.fsdp and config.world_size == 1:
        raise ValueError("--fsdp shares the model among ranks; give it a --world-size above 1")
    memory = parse_bytes(config.memory)
    towers = Towers(architecture, precision=config.precision, tokens=tokens)
    B = config.batch // config.world_size
    sizes = [2**i for i in range((B - 1).bit_length())] + [B]
    if isinstance(architecture.vision_cfg.layers, tuple):  # batch norms see whole batches only
        sizes = [B]

    def parts(size: int, checkpointing: bool) -> list[Part]:
        return _parts(config, architecture, towers, B, size, checkpointing)

    def left(size: int, checkpointing: bool) -> int:
        return int(memory * (1 - RESERVE)) - sum(part.bytes for part in parts(size, checkpointing))

    size, checkpointing = _largest(sizes, lambda size: left(size, False)), False
    if size < min(SMALL, B) and len(sizes) > 1:
        size, checkpointing = max((size, False), (_largest(sizes, lambda size: left(size, True)), True))
    if size == 0:
        raise DoesNotFitError(_missing(config, memory, parts(sizes[0], len(sizes) > 1)))
    kept_tiles = _kept_tiles(config, B, left(size, checkpointing))
    lines = parts(size, checkpointing)
    if kept_tiles:
        lines.append(Part("kept tiles", kept_tiles, "of the loss, so that its backward multiplies less"))
    lines.append(Part("reserve", int(memory * RESERVE), f"{RESERVE:.0%} for driver, libraries and allocator: assumed"))
    workspace = MAX_WORKSPACE + kept_tiles
    return Plan(lines, memory, size, B, checkpointing, workspace, _command(config, B, size, checkpointing, workspace))


def show(plan: Plan) -> None:
    """Prints the plan as a table, and the command line that carries it out.

    Args:
        plan: from `make`.
    Raises:
        MissingExtraError: rich is missing.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise missing_extra("rich", "cli") from None
    table = Table(box=None, pad_edge=False)
    table.add_column("each rank holds")
    table.add_column("GB", justify="right")
    table.add_column("")
    for part in plan.parts:
        table.add_row(part.name, f"{part.bytes / 1e9:.2f}", part.why)
    table.add_section()
    free = plan.memory_bytes - plan.total_bytes
    table.add_row(
        "together", f"{plan.total_bytes / 1e9:.2f}", f"of {plan.memory_bytes / 1e9:.2f}, {free / 1e9:.2f} free"
    )
    Console().print(table)
    print(f"\n{plan.command}")


def parse_bytes(text: str) -> int:
    """The bytes that a text such as "80GB" or "24GiB" names.

    Args:
        text: a number and a unit.
    Raises:
        ValueError: it is something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in UNITS:
        raise ValueError(f"--memory must be a number with a unit, such as 80GB or 24GiB; got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def _parts(
    config: Config, architecture: ClipConfig, towers: Towers, B: int, size: int, checkpointing: bool
) -> list[Part]:
    """What lies in memory at the highest moment of a step of B pairs in micro-batches of `size`."""
    W, P, D = config.world_size if config.fsdp else 1, towers.parameters, architecture.embed_dim
    H, T = architecture.vision_cfg.image_hw, architecture.text_cfg.context_length
    held = towers.held(size, checkpointing)
    pair = held.features // size  # bytes of an image's and a text's features
    # FSDP2 gathers what is in no block, and a block while it fetches the next.
    gathered = 0 if W == 1 else towers.outside_blocks + 2 * towers.largest_block
    whole = W > 1 and size < B
    parts = [
        Part("weights", WEIGHT * (P // W + gathered), f"{P / 1e6:.1f} M parameters in float32{_shared(W)}"),
        Part(
            "gradients",
            WEIGHT * (P if whole else P // W + gathered),
            "float32, whole until the last micro-batch" if whole else f"float32{_shared(W)}",
        ),
        Part("optimizer", 2 * WEIGHT * P // W, f"AdamW's two means{_shared(W)}"),
        Part("batch", B * (3 * H[0] * H[1] + 8 * (T + 2)), f"{B} uint8 images of {H[0]} x {H[1]}, and token ids"),
        Part("features", 2 * B * pair, "of the whole batch, and their gradients"),
        Part("activations", held.kept, f"of {size} pairs at a time" + ", only the blocks' inputs" * checkpointing),
    ]
    loss = MAX_WORKSPACE + 2 * 4 * B * D + 2 * 8 * B  # tiles, float32 sums of two gradients, two log-sum-exps
    loss += _travelling(config.world_size, B, D, pair // 2, config.siglip)
    # The loss is computed while a micro-batch's activations are held, and done before that one's backward.
    if (backward := held.peak - held.kept) >= loss:
        return [*parts, Part("backward", backward, "what it needs beside, at its highest; the loss needs less")]
    return [*parts, Part("loss", loss, "tiles, and sums of gradients in float32; the backward needs less")]


def _shared(W: int) -> str:
    return f", shared by {W} ranks, and what is gathered" * (W > 1)


def _largest(sizes: list[int], left: Callable[[int], int]) -> int:
    """The largest of the sizes that leaves at least 0 bytes, or 0 if none does; what is left falls with the size."""
    fitting = bisect.bisect_left(sizes, True, key=lambda size: left(size) < 0)
    return sizes[fitting - 1] if fitting else 0


def _travelling(W: int, B: int, D: int, row: int, siglip: bool) -> int:
    """Bytes of other ranks' rows, and of what is computed of them, that the loss holds; `row` bytes each."""
    if W == 1:
        return 0
    if siglip or (W >= RING_RANKS and B >= RING_ROWS) or W * B * row >= RING_BYTES:
        rings = 2 if siglip else 1  # SigLIP's go both ways; each holds a block, the next, and two sums in float32
        return rings * 2 * B * (row + 4 * D)
    return 3 * W * B * row  # gathered rows, what is computed of them, and what comes home


def _kept_tiles(config: Config, B: int, spare: int) -> int:
    """Bytes that the softmax loss gets to keep tiles in; a sigmoid loss keeps none, and neither does float32."""
    if config.siglip or config.precision == "fp32" or config.world_size > 1:
        return 0
    return max(min(spare, 2 * B * B), 0) >> 20 << 20


def _missing(config: Config, memory: int, parts: list[Part]) -> str:
    needed, usable = sum(part.bytes for part in parts), int(memory * (1 - RESERVE))
    told = ", ".join(f"{part.name} {_size(part.bytes)}" for part in sorted(parts, key=lambda part: -part.bytes))
    more = "--fsdp, " * (not config.fsdp and config.world_size > 1)
    return (
        f"{config.model} with {config.batch} pairs a step on {config.world_size} rank{'s' * (config.world_size > 1)} "
        f"does not fit into {config.memory} each, even with the least micro-batch: it needs {_size(needed)} "
        f"({told}), {_size(usable)} are usable and {_size(needed - usable)} are missing. Take {more}a smaller "
        "--batch, more ranks (--world-size) or more --memory"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _command(config: Config, B: int, size: int, checkpointing: bool, workspace: int) -> str:
    many = config.world_size > 1
    words = [
        f"VLMFAST_MAX_WORKSPACE={workspace}" * (workspace > MAX_WORKSPACE),
        f"torchrun --nproc-per-node {config.world_size} -m -- vlmfast.cli train" if many else "vlmfast train",
        f"--model {config.model} --batch-size {B}",
        f"--micro-batch-size {size}" * (size < B),
        f"--precision {config.precision}",
        "--grad-checkpointing" * checkpointing,
        "--siglip" if config.siglip else "--positives pair",
        "--fsdp" * config.fsdp,
    ]
    return " ".join(filter(None, words))
