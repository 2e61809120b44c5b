"""Who computes the loss: ours and its rivals, each as functions of the same inputs, or the reason why it cannot run."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.backend import select, use_backend
from vlmfast.errors import VlmfastError
from vlmfast.ops import hinge_loss, sigmoid_loss, softmax_loss

LossName: TypeAlias = Literal["clip", "siglip", "vse"]
# (image [B, D], text [B, D], logit_scale [], logit_bias []) -> loss []; rows are unit rows, and vse is a sum over B.
LossFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

LOSSES: tuple[LossName, ...] = ("clip", "siglip", "vse")
PROVIDERS = (
    "vlmfast",
    "eager-one",
    "eager-two",
    "linear-cross-entropy",
    "torch-compile",
    "open_clip",
    "reference",
)
MARGIN = 0.2  # of the hinge, as in VSE++

# The flops that the loss cannot do without, in units of B * B * D: (forward, forward + backward).
# The softmax needs whole rows and columns before any gradient, so its tiles are computed twice: 2 + (2 + 2 + 2).
LEAST_FLOPS: dict[LossName, tuple[int, int]] = {"clip": (2, 8), "siglip": (2, 6), "vse": (2, 6)}
# The fewest [B, B] float32 arrays that a pass holds at its peak, whatever loss and form; the others hold none.
LOGITS_HELD = {"eager-one": 3, "eager-two": 4, "torch-compile": 1, "open_clip": 4}
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


def forms(loss: LossName, provider: str) -> dict[str, LossFn]:
    """The ways in which a provider can write the loss, by name: the harness times them and takes the fastest.

    Raises:
        UnavailableError: the provider cannot run this loss here; the message says why.
    """
    if provider == "eager-one":
        return EAGER_ONE[loss]
    if provider == "eager-two":
        return EAGER_TWO[loss]
    if provider == "vlmfast":
        return {"": OURS[loss]}
    if provider == "reference":
        return {"": _on_reference(OURS[loss])}
    if provider == "linear-cross-entropy":
        return _linear_cross_entropy(loss)
    if provider == "torch-compile":
        torch.compiler.reset()  # each batch size compiles anew; past a limit of versions it would silently stay eager
        with quiet_compiler():
            return {f"of {form}": torch.compile(fn, dynamic=False) for form, fn in EAGER_ONE[loss].items()}
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
    family: Any = {"clip": softmax_loss, "siglip": sigmoid_loss, "vse": hinge_loss}[loss]
    return select(f"{loss}_loss", family.IMPLS, image.device, image, text)


# ---- ours ------------------------------------------------------------------------------------------------------------


OURS: dict[LossName, LossFn] = {
    "clip": lambda image, text, scale, bias: softmax_loss.clip_loss(image, text, scale, normalize=False),
    "siglip": lambda image, text, scale, bias: sigmoid_loss.siglip_loss(image, text, scale, bias, normalize=False),
    "vse": lambda image, text, scale, bias: hinge_loss.vse_loss(image, text, MARGIN, normalize=False),
}


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
}


# ---- the published formulas, two [B, B] matrices ---------------------------------------------------------------------


def _clip_open_clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def _vse_paper(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    scores = image @ text.T
    d = scores.diagonal().view(-1, 1)
    mask = torch.eye(len(scores), device=scores.device) > 0.5
    cost_text = (MARGIN + scores - d.expand_as(scores)).clamp(min=0).masked_fill(mask, 0)
    cost_image = (MARGIN + scores - d.T.expand_as(scores)).clamp(min=0).masked_fill(mask, 0)
    return cost_text.sum() + cost_image.sum()


EAGER_TWO: dict[LossName, dict[str, LossFn]] = {
    "clip": {"open_clip's ClipLoss": _clip_open_clip},
    "siglip": {"open_clip's SigLipLoss": _siglip_open_clip},
    "vse": {"VSE++'s ContrastiveLoss": _vse_paper},
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


def _open_clip(loss: LossName) -> dict[str, LossFn]:
    if loss == "vse":
        raise UnavailableError("open_clip has no hinge loss")
    module = _open_clip_losses()
    if loss == "clip":
        clip = module.ClipLoss()
        return {"ClipLoss": lambda image, text, scale, bias: clip(image, text, scale)}
    siglip = module.SigLipLoss()
    return {"SigLipLoss": lambda image, text, scale, bias: siglip(image, text, scale, bias)}


_stand_ins: list[torch.library.Library] = []  # operators live as long as their library object


def _open_clip_losses() -> Any:
    try:
        return importlib.import_module("open_clip.loss")
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install open_clip_torch brings open_clip") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise UnavailableError(f"open_clip cannot be imported: {error}") from error
    # A torchvision built for another torch stops open_clip's import, but its losses use nothing of torchvision: declare
    # the two operators that torchvision misses and import again.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _stand_ins.append(library)
    return importlib.import_module("open_clip.loss")
