"""A conversation with a vision-language model, of which each turn computes only what is new."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from vlmfast.models.cache import KvCache
from vlmfast.models.generation import Generation, generate
from vlmfast.models.vlm import Vlm


class Session:
    """What one conversation has computed: the keys and values of its tokens, and the features of its images.

    Each `ask` brings the whole conversation so far. Of the keys and values it keeps those up to the first token, or
    image, that differs from what it held before, and computes the rest. Images are told apart by their pixels, so an
    image that comes back, in this conversation or the next, is not encoded again.

    Args:
        model: must not change in between; `reset` after it did.
        keep_images: the most images whose features are kept; the one unused for longest goes first.
    """

    def __init__(self, model: Vlm, *, keep_images: int = 16) -> None:
        self.model = model
        self.keep_images = keep_images
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.tokens_reused = 0  # by the last `ask`
        self._features: dict[str, Tensor] = {}  # hash of an image -> [P, C], the last used last
        self._stream: list[int | str] = []  # what the cache holds: ids, and an image's hash for each of its tokens
        self._cache: KvCache | None = None
        self._prefix = 0  # tokens of it that saw each other

    @torch.no_grad()
    def ask(
        self,
        ids: Tensor,  # [T]
        images: Tensor,  # [N, 3, H, W]
        *,
        prefix: int | None = None,
        **options: Any,
    ) -> Generation:
        """What the model answers to a conversation.

        Equals, to rounding, and without image tokens in the answer:
            model.generate([ids], [images], prefix=[prefix], **options)[0]

        `tokens_reused` says afterwards of how many tokens nothing was computed: none of a prefix-LM's without `prefix`,
        as its first tokens see the last ones then. An `ask` that was interrupted, by `on_token` say, leaves the session
        as good as new.

        Args:
            ids: [T] int64 on the model's device, the whole conversation up to the answer, P image tokens an image.
            images: [N, 3, H, W], all images of the conversation in their order, see `Vlm.encode_image`; N may be 0.
            prefix: how many first tokens see each other in a prefix-LM, as it was trained: those before the
                conversation's first answer; None: all. A causal model takes no notice.
            options: of `vlmfast.models.generate`, `on_token` among them; max_new_tokens is needed.
        Raises:
            ShapeError: ids has other than N * P image tokens, is empty, or is longer than the context; prefix is longer
                than ids.
        """
        model, hashes = self.model, [_content(image) for image in images]
        x = model.splice(ids, self._encoded(images, hashes))
        stream: list[int | str] = list(ids.tolist())
        at_image = [place for place, token in enumerate(stream) if token == model.image_token_id]
        for i, place in enumerate(at_image):
            stream[place] = hashes[i // model.image_tokens]
        # The last token is computed in any case: it foretells the answer.
        reused = _common(self._stream, stream[:-1])
        if model.prefix_lm:
            seen = len(stream) if prefix is None else prefix
            reused = reused if self._prefix == seen <= reused else 0
            self._prefix = seen
            options["prefix"] = False if reused else [seen]
        if self._cache is None:
            config = model.decoder.config
            capacity = min(2 * len(x) + 1, config.context_length)
            self._cache = KvCache(config, 1, capacity, device=x.device, dtype=x.dtype)
        self._cache.truncate(reused)
        self._stream, self.tokens_reused = stream[:reused], reused
        barred = (model.image_token_id, *options.pop("suppress", ()))
        options |= {"cache": self._cache, "suppress": barred}
        (answer,) = generate(model.decoder, [x[reused:]], **options)
        self._stream = (stream + answer.tokens.tolist())[: int(self._cache.lengths[0])]
        return answer

    def _encoded(self, images: Tensor, hashes: list[str]) -> Tensor:
        """The features [N, P, C] of images, computed where they are new."""
        if not hashes:
            return images.new_empty(0, self.model.image_tokens, self.model.decoder.config.width, dtype=torch.float32)
        known, new = self._features, {each: i for i, each in enumerate(hashes) if each not in self._features}
        if new:
            features = self.model.encode_image(images[list(new.values())])
            # Each alone, so that none that is kept holds the memory of those that go.
            known = known | {name: each.clone() for name, each in zip(new, features, strict=True)}
        used = {each: known[each] for each in hashes}
        known = {each: features for each, features in known.items() if each not in used} | used
        self._features = dict(list(known.items())[max(len(known) - self.keep_images, 0) :])
        return torch.stack([used[each] for each in hashes])


def _content(image: Tensor) -> str:
    """A name for an image's pixels."""
    pixels = image.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(f"{image.dtype} {tuple(image.shape)} ".encode() + pixels.tobytes()).hexdigest()


def _common(one: list[int | str], other: list[int | str]) -> int:
    """How many entries at the start of two lists are the same."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))
