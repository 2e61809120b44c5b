"""Who computes the loss: ours and its rivals, each as functions of the same inputs, or the reason why it cannot run."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.backend import select, use_backend
from vlmfast.errors import VlmfastError
from vlmfast.ops import hinge_loss, sigmoid_loss, softmax_loss

LossName: TypeAlias = Literal["clip", "siglip", "vse", "vse-hardest"]
# (image [B, D], text [B, D], logit_scale [], logit_bias []) -> loss []; rows are unit rows, and vse is a sum over B.
LossFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

LOSSES: tuple[LossName, ...] = ("clip", "siglip", "vse", "vse-hardest")
TITLES = {"clip": "clip_loss", "siglip": "siglip_loss", "vse": "vse_loss", "vse-hardest": "vse_loss, hardest"}
PROVIDERS = (
    "vlmfast",
    "eager-one",
    "eager-two",
    "linear-cross-entropy",
    "torch-compile",
    "torch-compile-two",
    "open_clip",
    "inf-cl",
    "memeff",
    "siglip-kernel",
    "reference",
)
# Other people's kernels: name -> (the package, the module that has the loss, the loss that it computes).
PEERS = {
    "inf-cl": ("inf_cl", "inf_cl.flash", "clip"),
    "memeff": ("memeff", "memeff", "clip"),
    "siglip-kernel": ("siglip_kernel", "siglip_kernel", "siglip"),
}
LOGIT_SCALE, LOGIT_BIAS = 1 / 0.07, -10.0  # CLIP's first scale; SigLIP's first bias
MARGIN = 0.2  # of the hinge, as in VSE++

# The flops that the loss cannot do without, in units of B * B * D: (forward, forward + backward).
# The softmax needs whole rows and columns before any gradient, so its tiles are computed twice: 2 + (2 + 2 + 2).
# The hardest hinges have a gradient in at most two items a row.
LEAST_FLOPS: dict[LossName, tuple[int, int]] = {"clip": (2, 8), "siglip": (2, 6), "vse": (2, 6), "vse-hardest": (2, 2)}
# The fewest [B, B] float32 arrays that a pass holds at its peak, whatever loss and form; the others hold none.
LOGITS_HELD = {"eager-one": 3, "eager-two": 4, "torch-compile": 1, "torch-compile-two": 1, "open_clip": 4}
CHUNKS = (128, 256, 512, 1024, 2048)  # of linear_cross_entropy; its own choice ("auto") is tried too


class BenchError(VlmfastError, ValueError):
    """A benchmark was asked for that does not exist; the message names what does."""


class UnavailableError(Exception):
    """A provider cannot run; the message is the reason, as shown in the table."""


def known_providers(names: Sequence[str]) -> list[str]:
    """`names` without repetitions.

    Raises:
        BenchError: a name is no provider's, or there is none.
    """
    for name in names:
        if name not in PROVIDERS:
            near = difflib.get_close_matches(name, PROVIDERS, 1, 0.0)
            raise BenchError(f"unknown provider {name!r}; did you mean {near[0]!r}? There are {', '.join(PROVIDERS)}")
    if not names:
        raise BenchError(f"no provider named; there are {', '.join(PROVIDERS)}")
    return list(dict.fromkeys(names))


def check_options(loss: LossName, options: Mapping[str, Any]) -> None:
    """Whether our function of this loss takes these keyword arguments.

    Raises:
        BenchError: it does not; the message names one.
    """
    taken = inspect.signature(_public(loss)).parameters
    for name in options:
        if name not in taken:
            raise BenchError(f"{name}: {_public(loss).__name__} takes no such argument")


def forms(loss: LossName, provider: str, options: Mapping[str, Any] | None = None) -> dict[str, LossFn]:
    """The ways in which a provider can write the loss, by name: the harness times them and takes the fastest.

    Before the forms of another batch size are compiled, call torch.compiler.reset(): past a number of shapes a function
    silently stays uncompiled.

    Args:
        loss: which loss.
        provider: one of PROVIDERS.
        options: keyword arguments of our own function.
    Raises:
        UnavailableError: the provider cannot run this loss here; the message says why.
    """
    if provider == "eager-one":
        return EAGER_ONE[loss]
    if provider == "eager-two":
        return EAGER_TWO[loss]
    if provider == "vlmfast":
        return {"": _ours(loss, options or {})}
    if provider == "reference":
        return {"": _on_reference(_ours(loss, options or {}))}
    if provider == "linear-cross-entropy":
        return _linear_cross_entropy(loss)
    if provider in ("torch-compile", "torch-compile-two"):
        plain = EAGER_ONE if provider == "torch-compile" else EAGER_TWO
        with quiet_compiler():
            return {f"of {form}": torch.compile(fn, dynamic=False) for form, fn in plain[loss].items()}
    if provider in PEERS:
        return _peer(loss, provider)
    return _open_clip(loss)


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Hides the deprecations of torch's own that torch.compile meets, also at a compiled function's first call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def backend_of(loss: LossName, image: Tensor, text: Tensor) -> str:
    """The backend of ours that runs this loss on these embeddings."""
    family: Any = {"clip": softmax_loss, "siglip": sigmoid_loss}.get(loss, hinge_loss)
    return select(_public(loss).__name__, family.IMPLS, image.device, image, text)


# ---- ours ------------------------------------------------------------------------------------------------------------


def _public(loss: LossName) -> Callable[..., Tensor]:
    if loss == "clip":
        return softmax_loss.clip_loss
    return sigmoid_loss.siglip_loss if loss == "siglip" else hinge_loss.vse_loss


def _ours(loss: LossName, options: Mapping[str, Any]) -> LossFn:
    public = _public(loss)
    if loss == "clip":
        return lambda image, text, scale, bias: public(image, text, scale, normalize=False, **options)
    if loss == "siglip":
        return lambda image, text, scale, bias: public(image, text, scale, bias, normalize=False, **options)
    hardest = loss == "vse-hardest"
    return lambda image, text, scale, bias: public(image, text, MARGIN, hardest=hardest, normalize=False, **options)


def _on_reference(fn: LossFn) -> LossFn:
    def run(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        with use_backend("reference"):
            return fn(image, text, scale, bias)

    return run


# ---- plain PyTorch, one [B, B] matrix of logits ----------------------------------------------------------------------


def _clip_cross_entropy(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = (scale * image @ text.T).float()
    labels = torch.arange(len(z), device=z.device)
    return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2


def _clip_cross_entropy_copy(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = (scale * image @ text.T).float()
    labels = torch.arange(len(z), device=z.device)
    return (F.cross_entropy(z, labels) + F.cross_entropy(z.T.contiguous(), labels)) / 2


def _clip_log_softmax(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = (scale * image @ text.T).float()
    return -(z.log_softmax(0).diagonal() + z.log_softmax(1).diagonal()).mean() / 2


def _clip_logsumexp(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = (scale * image @ text.T).float()
    return (z.logsumexp(0) + z.logsumexp(1)).mean() / 2 - z.diagonal().mean()


def _siglip_softplus(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    # -logsigmoid(-z) = softplus(z) off the diagonal; on it -logsigmoid(z) = softplus(z) - z.
    z = (scale * image @ text.T + bias).float()
    return (F.softplus(z).sum() - z.diagonal().sum()) / len(z)


def _siglip_cross_entropy(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = (scale * image @ text.T + bias).float()
    return F.binary_cross_entropy_with_logits(z, torch.eye(len(z), device=z.device), reduction="sum") / len(z)


def _siglip_open_clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(z), device=z.device, dtype=z.dtype) - torch.ones_like(z)
    return -F.logsigmoid(signs * z).sum() / len(z)


def _vse_masked(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    s = (image @ text.T).float()
    d = s.diagonal()
    cost = (MARGIN + s - d[:, None]).clamp(min=0) + (MARGIN + s - d).clamp(min=0)
    return cost.sum() - cost.diagonal().sum()


def _vse_constant(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    # The diagonal's two hinges are MARGIN exactly and have no gradient, so they need no mask.
    s = (image @ text.T).float()
    d = s.diagonal()
    return (s + (MARGIN - d)[:, None]).relu().sum() + (s + (MARGIN - d)).relu().sum() - 2 * MARGIN * len(s)


def _hardest_masked(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    s = (image @ text.T).float()
    d = s.diagonal()
    foreign = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), -torch.inf)
    return (MARGIN + foreign.amax(1) - d).relu().sum() + (MARGIN + foreign.amax(0) - d).relu().sum()


def _hardest_indexed(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    # Only the hardest items need a gradient, so the matrix needs no graph: find them, then compute their scores.
    with torch.no_grad():
        s = (image @ text.T).fill_diagonal_(-torch.inf)
        hard_text, hard_image = s.argmax(1), s.argmax(0)
    d = (image * text).sum(1, dtype=torch.float32)
    by_image = (image * text[hard_text]).sum(1, dtype=torch.float32)
    by_text = (image[hard_image] * text).sum(1, dtype=torch.float32)
    return (MARGIN + by_image - d).relu().sum() + (MARGIN + by_text - d).relu().sum()


EAGER_ONE: dict[LossName, dict[str, LossFn]] = {
    "clip": {
        "cross_entropy": _clip_cross_entropy,
        "cross_entropy, z.T copied": _clip_cross_entropy_copy,
        "log_softmax": _clip_log_softmax,
        "logsumexp": _clip_logsumexp,
    },
    "siglip": {
        "softplus": _siglip_softplus,
        "binary_cross_entropy_with_logits": _siglip_cross_entropy,
        "logsigmoid": _siglip_open_clip,
    },
    "vse": {"diagonal subtracted": _vse_masked, "diagonal as a constant": _vse_constant},
    "vse-hardest": {"masked": _hardest_masked, "searched without a graph": _hardest_indexed},
}


# ---- the published formulas, two [B, B] matrices ---------------------------------------------------------------------


def _clip_open_clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def _vse_costs(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    scores = image @ text.T
    d = scores.diagonal().view(-1, 1)
    mask = torch.eye(len(scores), device=scores.device) > 0.5
    cost_text = (MARGIN + scores - d.expand_as(scores)).clamp(min=0).masked_fill(mask, 0)
    cost_image = (MARGIN + scores - d.T.expand_as(scores)).clamp(min=0).masked_fill(mask, 0)
    return cost_text, cost_image


def _vse_paper(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    cost_text, cost_image = _vse_costs(image, text)
    return cost_text.sum() + cost_image.sum()


def _hardest_paper(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    cost_text, cost_image = _vse_costs(image, text)
    return cost_text.max(1)[0].sum() + cost_image.max(0)[0].sum()


EAGER_TWO: dict[LossName, dict[str, LossFn]] = {
    "clip": {"open_clip's ClipLoss": _clip_open_clip},
    "siglip": {"open_clip's SigLipLoss": _siglip_open_clip},
    "vse": {"VSE++'s ContrastiveLoss": _vse_paper},
    "vse-hardest": {"VSE++'s ContrastiveLoss, max_violation": _hardest_paper},
}


# ---- other libraries -------------------------------------------------------------------------------------------------


def _linear_cross_entropy(loss: LossName) -> dict[str, LossFn]:
    """torch's own chunked function, called once a direction."""
    if loss != "clip":
        raise UnavailableError(f"linear_cross_entropy is a softmax over classes; the {loss} loss is none")
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")

    def of(chunk: int | None) -> LossFn:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

        def run(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            labels = torch.arange(len(image), device=image.device)
            rows = F.linear_cross_entropy(scale * image, text, labels, options=options)
            columns = F.linear_cross_entropy(scale * text, image, labels, options=options)
            return (rows + columns) / 2

        return run

    return {"auto chunk": of(None)} | {f"chunk {chunk}": of(chunk) for chunk in CHUNKS}


def _peer(loss: LossName, provider: str) -> dict[str, LossFn]:
    """Other people's fused kernels, called as their documentation does, with the gradient of the loss itself."""
    package, path, only = PEERS[provider]
    if loss != only:
        raise UnavailableError(f"{provider} has the {only} loss alone")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install --no-deps {package} brings it") from error
    except Exception as error:  # some ask for the GPU's kind while they are imported
        raise UnavailableError(f"{package} cannot be imported: {first_line(error)}") from error
    return {"inf-cl": _inf_cl, "memeff": _memeff, "siglip-kernel": _siglip_kernel}[provider](module)


def _inf_cl(module: Any) -> dict[str, LossFn]:
    """Its function for one GPU, once a direction: `cal_inf_loss` sums the scale's gradient over a process group."""

    def run(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        heads = {
            "scale": scale,
            "head_dim": next(width for width in (256, 128, 64, 32, 16) if not len(image[0]) % width),
        }
        return (
            module.cal_flash_loss(image, text, **heads).mean() + module.cal_flash_loss(text, image, **heads).mean()
        ) / 2

    return {"cal_flash_loss": run}


def _memeff(module: Any) -> dict[str, LossFn]:
    """With stable=False: its default scales the gradient. The temperature is a number, so it has no gradient."""
    clip = module.MemoryEfficientCLIPLoss(temperature=1 / LOGIT_SCALE, normalized_inputs=True, stable=False)
    return {"MemoryEfficientCLIPLoss": lambda image, text, scale, bias: clip(image, text)}


def _siglip_kernel(module: Any) -> dict[str, LossFn]:
    def automatic(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return module.fused_siglip_loss(image, text, scale.log(), bias)

    def longest(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return module.fused_chunked_bf16_siglip_loss(image, text, scale.log(), bias, chunk_size=16384)

    return {"automatic": automatic, "chunk 16384": longest}


def first_line(error: BaseException) -> str:
    """The kind of the error and the first line of its message; with the last where the first only leads up to it."""
    lines = str(error).strip().splitlines()
    said = lines[:1] + lines[-1:] * (len(lines) > 1 and lines[0].endswith(":"))
    return ": ".join([type(error).__name__, " ".join(said)]).removesuffix(": ")


def _open_clip(loss: LossName) -> dict[str, LossFn]:
    if loss not in ("clip", "siglip"):
        raise UnavailableError("open_clip has no hinge loss")
    module = open_clip_module("open_clip.loss")
    if loss == "clip":
        clip = module.ClipLoss()
        return {"ClipLoss": lambda image, text, scale, bias: clip(image, text, scale)}
    siglip = module.SigLipLoss()
    return {"SigLipLoss": lambda image, text, scale, bias: siglip(image, text, scale, bias)}


_stand_ins: list[torch.library.Library] = []  # operators live as long as their library object


def open_clip_module(name: str) -> Any:
    """A module of open_clip, also beside a torchvision that was built for another torch.

    Args:
        name: "open_clip", or one inside.
    Raises:
        UnavailableError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install open_clip_torch brings open_clip") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise UnavailableError(f"open_clip cannot be imported: {error}") from error
    # Such a torchvision stops open_clip's import, but its losses and towers use nothing of it: declare the two
    # operators that torchvision misses and import again.
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _stand_ins.append(library)
    return importlib.import_module(name)
