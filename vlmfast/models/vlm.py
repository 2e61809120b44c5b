"""What all vision-language models share: image features among a text's tokens, and a loss on the text alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.errors import DTypeError, ShapeError
from vlmfast.models.decoder import Decoder
from vlmfast.models.generation import Generation, generate, score

ASPECTS = ("pad", "square", "squash")
IGNORED = -100  # the label of a token that is not supervised


class Vlm(nn.Module):
    """A decoder that reads images among its tokens; `PatchLm` and `Llava` say how an image becomes its tokens.

    `forward` is the training loss. Of a packed stream of tokens, only those that predict a supervised label reach the
    last block's perceptron and the head: with 576 image, 60 prompt and 100 answer tokens that is 100 of 736.

    Args:
        decoder: the language model.
        image_token_id: the id that stands where one feature of an image goes.
        image_tokens: P, features of an image.
        image_hw: (H, W) of images in pixels.
        image_mean, image_std: of each channel, for pixels in 0..1.
        aspect: how images are made (H, W), "pad", "square" or "squash" as `vlmfast.data.LlavaJson` says.
        prefix_lm: whether the tokens of a sequence's prefix see each other, and not only those before them.
    Raises:
        ShapeError: image_token_id is not in the decoder's vocabulary.
        ValueError: aspect is unknown.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        image_token_id: int,
        image_tokens: int,
        image_hw: tuple[int, int],
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        aspect: str,
        prefix_lm: bool = False,
    ) -> None:
        super().__init__()
        if aspect not in ASPECTS:
            raise ValueError(f"Vlm: aspect must be one of {', '.join(ASPECTS)}; got {aspect!r}")
        if not 0 <= image_token_id < decoder.config.vocab_size:
            raise ShapeError(
                f"image_token_id must be in the decoder's vocabulary of {decoder.config.vocab_size}; "
                f"got {image_token_id}"
            )
        self.decoder = decoder
        self.image_token_id = image_token_id
        self.image_tokens = image_tokens
        self.image_hw = image_hw
        self.image_mean = image_mean
        self.image_std = image_std
        self.aspect = aspect
        self.prefix_lm = prefix_lm

    def encode_image(self, image: Tensor) -> Tensor:
        """What stands for images among a decoder's tokens: [N, P, C].

        Args:
            image: [N, 3, H, W], N >= 1; uint8 in 0..255, or floating and normalised with image_mean and image_std.
        Raises:
            ShapeError: image is not [N, 3, H, W] of the model's size.
            DTypeError: it is neither uint8 nor floating.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The config as JSON can hold it, with a "model_type"."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward, which then runs each block a second time."""
        self.decoder.set_grad_checkpointing(enable)

    def splice(
        self,
        ids: Tensor,  # [tokens]
        features: Tensor,  # [N, P, C]
    ) -> Tensor:
        """What the decoder takes, [tokens, C]: each id's embedding, and image features where `image_token_id` stands.

        Equals:
            x = decoder.embed(ids)
            x[ids == image_token_id] = features.flatten(0, 1)

        Args:
            ids: [tokens] int64.
            features: [N, P, C], what `encode_image` returned, in the order of their places in ids. N may be 0.
        Raises:
            ShapeError: ids has other than N * P image tokens.
        """
        at_image = ids == self.image_token_id
        found, count = int(at_image.sum()), features.shape[:2].numel()
        if found != count:
            raise ShapeError(self._misfit("ids", found, len(features)))
        return self._splice(ids, at_image, features)

    def embed(self, ids: Tensor, image: Tensor) -> Tensor:
        """What the decoder takes, [tokens, C]: `splice(ids, encode_image(image))`.

        Args:
            ids: [tokens] int64, with P image tokens an image.
            image: [N, 3, H, W], see `encode_image`; N may be 0.
        Raises:
            ShapeError: ids has other than N * P image tokens.
        """
        return self.splice(ids, self._features(image))

    def forward(
        self,
        ids: Tensor,  # [tokens]
        image: Tensor,  # [N, 3, H, W]
        labels: Tensor,  # [tokens]
        cu_seqlens: Tensor,  # [B + 1]
        max_seqlen: int | None = None,
        *,
        prefix: Tensor | None = None,  # [B]
        num_supervised: Tensor | float | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Mean cross-entropy of each supervised token, given all tokens before it in its sequence, in nats.

        Equals, of one sequence, without the logits of tokens that predict no supervised one:
            logits = decoder.logits(decoder(embed(ids, image)[None]))[0]
            F.cross_entropy(logits[:-1], labels[1:])        # ignore_index=-100

        The last token of an image predicts the first one of the text behind it. A batch without any image gives every
        trainable parameter a gradient too, of zero for those that only images use, as DistributedDataParallel needs.

        Args:
            ids: [tokens] int64, B sequences one after the other; P image tokens stand where an image goes.
            image: [N, 3, H, W], in the order of their places in ids, see `encode_image`; N may be 0.
            labels: [tokens] int64: a token's own id where it is supervised, -100 elsewhere. Those of first tokens
                count for nothing, as no token predicts them.
            cu_seqlens: [B + 1] int32, 0 and then where each sequence ends.
            max_seqlen: no sequence is longer. None: read from cu_seqlens.
            prefix: [B] int64, how many first tokens of each sequence see each other; a causal model takes no notice.
            num_supervised: what "mean" divides by instead of the supervised tokens, as `vlmfast.linear_cross_entropy`.
            reduction: "mean", "sum", or "none": [tokens] losses, of labels[i] in place i, 0 where it is not supervised.
        Returns: [] float32, or [tokens]. Without a supervised token 0.
        Raises:
            ShapeError: the shapes do not fit each other, a sequence has image tokens that are not whole images or other
                than N in all, or a prefix-LM has no prefix or one that reaches into its supervised tokens.
            DTypeError: ids or labels are not int64, or cu_seqlens not int32.
            ValueError: an id or a label is not in the vocabulary.
        """
        shifted, count = self._check_batch(ids, image, labels, cu_seqlens, prefix)
        at_image = ids == self.image_token_id
        x = self._splice(ids, at_image, self._features(image))
        # Without a supervised token one row goes through, for zero gradients.
        rows = torch.nonzero_static(shifted != IGNORED, size=max(count, 1), fill_value=0)[:, 0]
        hidden = self.decoder(
            x, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, prefix=prefix if self.prefix_lm else None, rows=rows
        )
        loss = self.decoder.loss(hidden, shifted[rows], reduction=reduction, num_supervised=num_supervised)
        if reduction != "none":
            return loss
        return loss.new_zeros(len(ids) + 1).index_copy(0, rows + 1, loss)[:-1]

    def _features(self, image: Tensor) -> Tensor:
        """[N, P, C]; of no image, zeros that hang on every trainable parameter which images go through."""
        encode_image = partial(type(self).encode_image, self)  # without the hooks of FSDP2, which run already
        if len(image):
            return encode_image(image)
        if hasattr(self, "unshard"):  # FSDP2: a rank without images gathers the tower's parameters as the others do
            return encode_image(image.new_zeros(1, 3, *self.image_hw))[:0]
        used = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("decoder.")]
        nothing = sum((p.sum() for p in used), torch.zeros((), device=image.device))
        return nothing.expand(0, self.image_tokens, self.decoder.config.width)

    def _splice(self, ids: Tensor, at_image: Tensor, features: Tensor) -> Tensor:
        x = self.decoder.embed(ids.masked_fill(at_image, 0))
        places = torch.nonzero_static(at_image, size=features.shape[:2].numel())[:, 0]
        return x.index_copy(0, places, features.flatten(0, 1).to(x.dtype))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor],
        images: Sequence[Tensor],
        *,
        prefix: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """What the model goes on with, prompt by prompt.

        Args:
            prompts: B times [T_b] int64, with P image tokens an image; of any lengths.
            images: B times [n_b, 3, H, W], the images of each prompt, see `encode_image`; n_b may be 0.
            prefix: how many first tokens of each prompt see each other in a prefix-LM, as it was trained: those before
                the conversation's first answer; None: all. A causal model takes no notice.
            options: of `vlmfast.models.generate`; max_new_tokens is needed. The image token is never written
                unless `suppress` says otherwise.
        Raises:
            ShapeError: prompts and images differ in number or are no [T] and [n, 3, H, W], or a prompt has other than
                n_b * P image tokens.
            DTypeError: some images are uint8 and others floating.
        """
        options = {"suppress": (self.image_token_id,), **options}
        return generate(self.decoder, self._prompts(prompts, images), prefix=self._seen(prefix), **options)

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Tensor],
        images: Sequence[Tensor],
        continuations: Sequence[Sequence[Tensor]],
        *,
        prefix: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """How likely each continuation of each prompt is: B times a summed log-probability each, in nats.

        Args:
            prompts, images, prefix: as for `generate`.
            continuations: B times the candidates, each [n] int64.
        Raises:
            ShapeError, DTypeError: as for `generate`.
        """
        return score(self.decoder, self._prompts(prompts, images), continuations, prefix=self._seen(prefix))

    def _seen(self, prefix: Sequence[int] | None) -> bool | Sequence[int]:
        return self.prefix_lm and (True if prefix is None else prefix)

    def _prompts(self, prompts: Sequence[Tensor], images: Sequence[Tensor]) -> list[Tensor]:
        """Each prompt's embeddings [T_b, C]; all images go through the tower together."""
        if len(prompts) != len(images) or not len(prompts):
            raise ShapeError(f"Vlm: {len(prompts)} prompts and the images of {len(images)}; give each prompt its own")
        for b, (ids, image) in enumerate(zip(prompts, images, strict=True)):
            if ids.dim() != 1 or image.dim() != 4:
                raise ShapeError(
                    f"Vlm: prompts[{b}] must be [T] and images[{b}] [n, 3, H, W]; got {tuple(ids.shape)} and "
                    f"{tuple(image.shape)}"
                )
            found = int((ids == self.image_token_id).sum())
            if found != len(image) * self.image_tokens:
                raise ShapeError(self._misfit(f"prompts[{b}]", found, len(image)))
        shown = [image for image in images if len(image)] or [images[0]]
        if len({image.is_floating_point() for image in shown}) > 1:
            raise DTypeError("Vlm: images must all be uint8 in 0..255, or all floating and normalised; got both")
        image = torch.cat(shown)
        return list(self.embed(torch.cat(list(prompts)), image).split([len(ids) for ids in prompts]))

    def _misfit(self, what: str, found: int, images: int) -> str:
        P = self.image_tokens
        return (
            f"{what}: {found} image tokens (id {self.image_token_id}) for {images} images of {P} tokens, which take "
            f"{images * P}. Each image is {P} image tokens in a row, at its place in the text"
        )

    def _check_batch(
        self, ids: Tensor, image: Tensor, labels: Tensor, cu_seqlens: Tensor, prefix: Tensor | None
    ) -> tuple[Tensor, int]:
        """What each token predicts, [tokens], -100 where that is not supervised; and how many do. A GPU waits once."""
        _check_shapes(ids, labels, cu_seqlens)
        tokens, P, V = len(ids), self.image_tokens, self.decoder.config.vocab_size
        bounds = cu_seqlens.long().clamp(0, tokens)
        start, end = bounds[:-1], bounds[1:]
        shifted = labels.roll(-1)
        shifted[(end - 1).clamp(min=0)] = IGNORED
        on = shifted != IGNORED
        held = _within(ids == self.image_token_id, start, end)  # [B] image tokens
        wrong = {
            "cu_seqlens": torch.cat([bounds != cu_seqlens, start > end, bounds[:1] != 0, bounds[-1:] != tokens]),
            "ids": (ids < 0) | (ids >= V),
            "labels": (on & ((shifted < 0) | (shifted >= V))).roll(1),
            "images": held % P != 0,
        }
        if self.prefix_lm:
            if prefix is None or prefix.shape != start.shape:
                raise ShapeError(
                    f"Vlm: a prefix-LM needs prefix [B], B = {len(start)}: how many tokens of each sequence see each "
                    f"other; got {None if prefix is None else tuple(prefix.shape)}"
                )
            # Row i predicts token i + 1: the prefix's last row may be supervised, those before it may not.
            seen = _within(on, start, torch.minimum(start + prefix - 1, end))
            wrong["prefix"] = (seen > 0) | (prefix < 0) | (prefix > end - start)
        count, images, *bad = torch.stack([on.sum(), held.sum(), *(x.any().long() for x in wrong.values())]).tolist()
        if any(bad) or images != len(image) * P:
            name = next((name for name, is_bad in zip(wrong, bad, strict=True) if is_bad), "")
            first = int(wrong[name].nonzero()[0]) if name else 0
            sequence = int((end <= first).sum())  # of token `first`
            if name == "cu_seqlens":
                raise ShapeError(
                    f"Vlm: cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {cu_seqlens}"
                )
            if name in ("ids", "labels"):
                values, ignored = (ids, "") if name == "ids" else (labels, f" or {IGNORED}")
                raise ValueError(
                    f"Vlm: {name} must be in [0, {V}){ignored}; got {int(values[first])} in sequence {sequence}, "
                    f"token {first - int(start[sequence])}"
                )
            if name == "images":
                raise ShapeError(
                    f"Vlm: sequence {first} has {int(held[first])} image tokens (id {self.image_token_id}), which are "
                    f"no whole images of {P} tokens. The batch has {images} for {len(image)} images"
                )
            if prefix is not None and name == "prefix":
                raise ShapeError(
                    f"Vlm: the prefix of sequence {first}, {int(prefix[first])} of its "
                    f"{int(end[first] - start[first])} tokens, must end before the first supervised one, which would "
                    "see itself"
                )
            raise ShapeError(self._misfit("Vlm", images, len(image)))
        return shifted, count


def _check_shapes(ids: Tensor, labels: Tensor, cu_seqlens: Tensor) -> None:
    if ids.dim() != 1 or not len(ids) or labels.shape != ids.shape or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        shapes = ", ".join(str(tuple(x.shape)) for x in (ids, labels, cu_seqlens))
        raise ShapeError(f"Vlm: ids and labels must be [tokens], packed, and cu_seqlens [B + 1]; got {shapes}")
    if ids.dtype != torch.int64 or labels.dtype != torch.int64 or cu_seqlens.dtype != torch.int32:
        dtypes = f"{ids.dtype}, {labels.dtype} and {cu_seqlens.dtype}"
        raise DTypeError(f"Vlm: ids and labels must be int64 and cu_seqlens int32; got {dtypes}")


def _within(marks: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """[B]: how many of the marked tokens lie in start[b] .. end[b]; none where that is empty."""
    before = F.pad(marks.cumsum(0), (1, 0))
    return before[torch.maximum(start, end)] - before[start]
