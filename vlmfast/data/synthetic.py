"""Random pictures with captions, for throughput: nothing to read, nothing to decode, nothing to learn."""

from __future__ import annotations

import numpy as np
import torch

from vlmfast.data.batch import Sample
from vlmfast.data.order import random_bits, random_int

PLAIN = (  # words that are one token each of OpenAI's vocabulary
    "a an the of on in with and at by near under over two three old new small large red blue green black white brown "
    "dark bright photo picture view man woman child dog cat bird horse car train boat street house tree river lake "
    "mountain beach sky sun snow table chair room window door cup plate food bread fruit flower grass field road "
    "bridge city night day summer winter walking sitting standing running holding looking wearing playing open"
)
WORDS = tuple(PLAIN.split())
CAPTION_WORDS = (3, 23)  # with start and end 5 to 25 tokens, 15 on average: the captions of our benchmarks


class Synthetic:
    """Noise and words made from (seed, index), the same in every epoch; open_clip's --dataset-type synthetic.

    Args:
        size: how many samples.
        image_size: pixels a side.

    Raises:
        ValueError: size or image_size < 1.
    """

    def __init__(self, size: int, image_size: int) -> None:
        if size < 1 or image_size < 1:
            raise ValueError(f"Synthetic: size and image_size must be at least 1; got {size} and {image_size}")
        self.size, self.image_size = size, image_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return self.draw(range(self.size)[index], 0, 0)

    def draw(self, index: int, seed: int, epoch: int) -> Sample:
        """The sample at a place; its id is the place."""
        shape = 3, self.image_size, self.image_size
        words = -(-shape[0] * shape[1] * shape[2] // 8)  # of 64 bits
        pixels = np.random.Philox(key=random_int(seed, index)).random_raw(words).view(np.uint8)
        return Sample(torch.from_numpy(pixels[: np.prod(shape)].reshape(shape)), self.caption(index, seed), index)

    def caption(self, index: int, seed: int = 0) -> str:
        """The caption at a place, without making the picture."""
        low, high = CAPTION_WORDS
        length, *places = random_bits(seed, index, np.arange(1 + high)).tolist()
        return " ".join(WORDS[place % len(WORDS)] for place in places[: low + length % (high - low + 1)])
