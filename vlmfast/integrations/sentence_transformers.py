"""sentence-transformers: its ranking losses, plain and cached, without the matrix of all scores."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import BackendError, missing_extra
from vlmfast.integrations._patch import Applied, Patches, known_version
from vlmfast.ops.softmax_loss import info_nce_loss

ROWS, COLUMNS = 1024, 2048
"""Scores that are held at one time where no op of ours has the loss: 8 MiB of float32."""

_PATCHES = Patches("sentence_transformers")
_SETTINGS = {
    "scale",
    "similarity_fct",
    "gather_across_devices",
    "directions",
    "partition_mode",
    "hardness_mode",
    "hardness_strength",
}
_CACHE_SETTINGS = {"mini_batch_size", "mini_batch_num_tokens", "show_progress_bar"}


def apply(*, plain: bool = True, cached: bool = True, loss: nn.Module | None = None) -> Applied:
    """Gives the multiple negatives ranking losses of sentence-transformers 6 vlmfast's computation, until `undo`.

    Values and gradients stay what they were, up to rounding, for every `directions`, `partition_mode`,
    `hardness_mode`, any number of negatives and `gather_across_devices`; they are computed in float32 also under
    autocast. The scores of all queries and documents are never held, nor the rows of them that the cached loss holds.
    Losses with a similarity of their own, and embeddings that are not dense [B, D], take the original path.

    Args:
        plain: `MultipleNegativesRankingLoss`, its `compute_loss_from_embeddings`.
        cached: `CachedMultipleNegativesRankingLoss`, its `calculate_loss`; all else of it stays as it is.
        loss: this loss alone instead of the classes.
    Returns:
        What stands patched: `with apply(): ...` undoes at the end what that call has changed.
    Raises:
        MissingExtraError: sentence-transformers is not installed.
        BackendError: its version or the losses' arguments are not known, or `loss` is of another class; nothing is
            patched then.
    """
    try:
        import sentence_transformers
        from sentence_transformers.sentence_transformer import losses
    except ImportError as error:
        raise missing_extra("sentence-transformers", "st") from error

    version = sentence_transformers.__version__
    known_version("sentence-transformers", version, known="6.x", pattern=r"6\.")
    ranking, cached_ranking = losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss
    _known_settings(ranking, {"model"} | _SETTINGS, version)
    _known_settings(cached_ranking, {"model"} | _SETTINGS | _CACHE_SETTINGS, version)
    if loss is not None and not isinstance(loss, ranking | cached_ranking):
        raise BackendError(
            f"apply: loss must be a MultipleNegativesRankingLoss or its cached form; got {type(loss).__name__}"
        )
    changes: list[tuple[Any, str, Any]] = []
    for kind, name, wrapped, wanted in (
        (ranking, "compute_loss_from_embeddings", _plain, plain),
        (cached_ranking, "calculate_loss", _cached, cached),
    ):
        replacement = wrapped(_PATCHES.original(kind, name))
        if loss is None and wanted:
            changes.append((kind, name, replacement))
        elif isinstance(loss, kind):
            changes.append((loss, name, replacement.__get__(loss)))
    return _PATCHES.replace(changes)


def undo() -> None:
    """Puts back every method that `apply` replaced, as it was."""
    _PATCHES.undo()


def _known_settings(kind: type[nn.Module], known: set[str], version: str) -> None:
    new = inspect.signature(kind).parameters.keys() - known
    if new:
        raise BackendError(
            f"sentence-transformers {version}: {kind.__name__} takes {', '.join(sorted(new))}, which this vlmfast does "
            "not know, so nothing was patched. Use the unpatched loss, or another version"
        )


@functools.cache
def _plain(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def compute_loss_from_embeddings(self: Any, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        if not _takes(self, embeddings):
            return original(self, embeddings, labels)
        return _ranking_loss(self, embeddings)

    return compute_loss_from_embeddings


@functools.cache
def _cached(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def calculate_loss(
        self: Any, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        if not _takes(self, [column[0] for column in reps]):
            return original(self, reps, labels, with_backward=with_backward)
        loss = _ranking_loss(self, [torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    return calculate_loss


def _takes(loss: Any, embeddings: list[Tensor]) -> bool:
    """Whether these are dense vectors, compared in one of the two ways that we know, at a scale that is not learned."""
    from sentence_transformers.util import cos_sim, dot_score

    dense = all(x.layout == torch.strided and x.dim() == 2 and x.is_floating_point() for x in embeddings)
    known = loss.similarity_fct in (cos_sim, dot_score) and isinstance(loss.scale, int | float)
    return dense and known and len(embeddings) > 1


def _ranking_loss(loss: Any, embeddings: list[Tensor]) -> Tensor:
    """The loss of queries [B, D], their documents [B, D] and any number of columns [B, D] of negatives."""
    from sentence_transformers.util import all_gather_with_grad, cos_sim, get_rank

    B, offset, normalize = len(embeddings[0]), 0, loss.similarity_fct is cos_sim
    if loss.gather_across_devices:
        embeddings, offset = [all_gather_with_grad(column) for column in embeddings], get_rank() * B
    queries, docs = embeddings[0], torch.cat(embeddings[1:])  # [N, D], [copies * N, D]
    mine, copies = slice(offset, offset + B), len(embeddings) - 1
    directions = set(loss.directions)
    hardness = loss.hardness_mode if loss.hardness_strength > 0 else None

    if hardness is None and (directions == {"query_to_doc"} or loss.partition_mode == "per_direction"):
        nce = functools.partial(info_nce_loss, logit_scale=loss.scale, normalize=normalize)
        if "doc_to_query" not in directions:
            return nce(queries[mine], docs, offset=offset)
        if len(docs) == B:
            return nce(queries, docs, directions="both")
        return (nce(queries[mine], docs, offset=offset) + nce(docs[mine], queries, offset=offset)) / 2

    with torch.autocast(queries.device.type, enabled=False):
        queries, docs = _vectors(queries, normalize), _vectors(docs, normalize)
        s, hard = loss.scale, loss.scale + loss.hardness_strength
        penalised = {
            None: (s, [s] * copies),
            "in_batch_negatives": (hard, [s] * copies),
            "hard_negatives": (s, [s] + [hard] * (copies - 1)),
            "all_negatives": (hard, [s] + [hard] * (copies - 1)),
        }
        terms = {
            "query_to_doc": _Term(QUERIES, DOCS, *penalised[hardness]),
            "query_to_query": _Term(QUERIES, QUERIES, s, [0.0]),
            "doc_to_query": _Term(DOCS, QUERIES, s, [s]),
            "doc_to_doc": _Term(DOCS, DOCS, s, [0.0] * copies),
        }
        chosen = [term for name, term in terms.items() if name in directions]
        softmaxes = [chosen] if loss.partition_mode == "joint" else [[term] for term in chosen]
        log_sums = torch.stack([_LogSums.apply(joint, s, mine, queries, docs) for joint in softmaxes]).mean(0)
        return (log_sums - s * (queries[mine] * docs[mine]).sum(1)).mean()


def _vectors(x: Tensor, normalize: bool) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(x, dim=1) if normalize else x


QUERIES, DOCS = 0, 1


class _Term(NamedTuple):
    """One direction: what is compared with what, and the factors of its scores."""

    rows: int  # QUERIES or DOCS: this rank's [B, D]
    keys: int  # all of them, [copies * N, D]; row i's own are offset + i and every N further on
    scale: float
    own_scales: list[float]  # one for each copy; 0.0 leaves the row's own key out


class _LogSums(torch.autograd.Function):
    """Each row's log-sum-exp [B] over all terms; to the gradient every score was multiplied with `scale`."""

    @staticmethod
    def forward(ctx, terms, scale, mine, *vectors):
        sums = vectors[QUERIES].new_full((mine.stop - mine.start,), -torch.inf)
        for _, rows, _, z in _tiles(terms, mine, vectors):
            sums[rows] = torch.logaddexp(sums[rows], z.logsumexp(1))
        ctx.terms, ctx.scale, ctx.mine = terms, scale, mine
        ctx.save_for_backward(sums, *vectors)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        sums, *vectors = ctx.saved_tensors
        gradients = [torch.zeros_like(x) for x in vectors]
        # The cached loss calls backward under autocast, which would round these products.
        with torch.autocast(grad.device.type, enabled=False):
            for term, rows, columns, z in _tiles(ctx.terms, ctx.mine, vectors):
                shares = z.sub_(sums[rows, None]).exp_().mul_(ctx.scale * grad[rows, None])
                gradients[term.rows][ctx.mine][rows].addmm_(shares, vectors[term.keys][columns])
                gradients[term.keys][columns].addmm_(shares.T, vectors[term.rows][ctx.mine][rows])
        return None, None, None, *gradients


def _tiles(terms: list[_Term], mine: slice, vectors: Sequence[Tensor]) -> Iterator[tuple[_Term, slice, slice, Tensor]]:
    """(term, rows, columns, their logits) of every tile; the logits may be overwritten."""
    for top in range(0, mine.stop - mine.start, ROWS):
        rows = slice(top, top + ROWS)
        for term in terms:
            queries, keys = vectors[term.rows][mine], vectors[term.keys]
            N = len(keys) // len(term.own_scales)
            for left in range(0, len(keys), COLUMNS):
                columns = slice(left, left + COLUMNS)
                z = (queries[rows] @ keys[columns].T).mul_(term.scale)
                for copy, own in enumerate(term.own_scales):
                    diagonal = z.diagonal(copy * N + mine.start + top - left)  # empty where it misses the tile
                    diagonal.mul_(own / term.scale) if own else diagonal.fill_(-torch.inf)
                yield term, rows, columns, z
