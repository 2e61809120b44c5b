"""Scores of captions: BLEU, ROUGE-L, CIDEr-D, exact match and CHAIR, number for number those of pycocoevalcap.

A caption is a text, which `tokenize_caption` splits, or the sequence of its tokens, which is taken as it is: with equal
tokens the scores equal pycocoevalcap's. Scores are on its scales: CIDEr-D goes to 10, the others to 1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TypeAlias

import numpy as np

from vlmfast.errors import DataError

Caption: TypeAlias = str | Sequence[str]  # a text, or its tokens
Ngrams: TypeAlias = "Counter[tuple[str, ...]]"

LONGEST = 4  # n-grams
TINY, SMALL = 1e-15, 1e-9  # BLEU adds them to what is counted and to what it is divided by
BETA = 1.2  # ROUGE-L: how much recall weighs against precision
SIGMA = 6.0  # CIDEr-D: of the penalty on a difference in length

STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = set(".?!,:;'\"`-")
FUSED = re.compile(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))")
CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))\b")
TOKEN = re.compile(
    r"n't\b|'(?:s|m|d|ll|re|ve)\b"
    r"|\b(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|ltd|co|corp|prof|ave|mt)\."
    r"|\b(?:[^\W\d_]\.)+(?!\w)"  # initials: u.s., e.g., and a last single letter
    r"|\d+(?:[.,:/]\d+)+"
    r"|\w+(?:[-/.&@]\w+|'[^\W\d_]\w*)*"
    r"|[!?]{2,}|\S"
)


def tokenize_caption(text: str) -> list[str]:
    """The lower-case tokens of a caption, by the main rules of the Penn Treebank, without the punctuation marks.

    Clitics are split off ("isn't" -> "is n't", "man's" -> "man 's"); hyphenated words, numbers and abbreviations stay
    whole; symbols such as & and % are tokens. As in pycocoevalcap, brackets stay, as "-lrb-" and so on: its list of
    punctuation has them in upper case, its tokens are in lower case. So do runs of ! and ?, which the list lacks.

    Args:
        text: a caption.
    Source: simplified from Stanford's PTBTokenizer (CoreNLP 3.4.1) as pycocoevalcap calls it; docs/scorers.md says how
        often the two differ, and where.
    """
    text = CLITIC.sub(r" \1", FUSED.sub(r"\1 ", text.translate(STRAIGHT).lower()))
    return [BRACKETS.get(token, token) for token in TOKEN.findall(text) if token not in DROPPED]


def bleu(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of the whole corpus.

    Its quirks: the reference length is that of the closest reference, the shorter of two equally close ones; 1e-15 is
    added to each count of right n-grams and 1e-9 to what it is divided by, instead of smoothing. The score of one
    caption is that of a corpus of one.

    Args:
        candidates: N captions.
        references: of each candidate at least one.
    Raises:
        DataError: there are no candidates, or the references are not as many, or one has none.
    Source: Papineni et al. 2002; pycocoevalcap's Bleu(4) with option="closest".
    """
    right, guessed, length, wanted = [0] * LONGEST, [0] * LONGEST, 0, 0
    for candidate, several in _tokenized("bleu", candidates, references):
        best: Ngrams = Counter()  # of each n-gram, the most that one reference has
        for reference in several:
            best |= _ngrams(reference)
        length += len(candidate)
        wanted += min((abs(len(each) - len(candidate)), len(each)) for each in several)[1]
        for n in range(LONGEST):
            guessed[n] += max(0, len(candidate) - n)
        for ngram, count in (_ngrams(candidate) & best).items():
            right[len(ngram) - 1] += count
    ratio = (length + TINY) / (wanted + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(LONGEST):
        product *= (right[n] + TINY) / (guessed[n] + SMALL)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores[0], scores[1], scores[2], scores[3]


def rouge_l(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> np.ndarray:
    """ROUGE-L of each candidate: the F-measure, with beta 1.2, of its longest common subsequence with the references.

    Its quirk: the best precision and the best recall may be those of two references. The corpus has the mean.

    Args:
        candidates: N captions.
        references: of each candidate at least one.

    Returns:
        [N] float64 in [0, 1]; 0 for an empty candidate.

    Raises:
        DataError: there are no candidates, or the references are not as many, or one has none.
    Source: Lin 2004; pycocoevalcap's Rouge.
    """
    scores = []
    for candidate, several in _tokenized("rouge_l", candidates, references):
        common = [_common_subsequence(candidate, reference) for reference in several]
        precision = max(common) / max(1, len(candidate))
        recall = max(length / max(1, len(reference)) for length, reference in zip(common, several, strict=True))
        weighed = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / weighed if weighed else 0.0)
    return np.array(scores)


def cider_d(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> np.ndarray:
    """CIDEr-D of each candidate: ten times its mean tf-idf cosine to its references, over n-grams of 1 to 4 tokens.

    Equals, for each n, with h and r the tf-idf vectors of candidate and reference:
        (minimum(h, r) * r).sum() / (h.norm() * r.norm()) * exp(-(bigrams(h) - bigrams(r)) ** 2 / (2 * 6 ** 2))

    Its quirks: the idf is log(N) - log(df), df in how many of the N sets of references the n-gram occurs and at least
    1, so that one candidate alone scores 0, and what a candidate scores depends on the others; the counts are clipped
    in the numerator, not in the norms; the penalty's lengths are counted in bigrams, which differ as the words do, one
    caption being empty apart, and that scores 0. The corpus has the mean.

    Args:
        candidates: N captions.
        references: of each candidate at least one.

    Returns:
        [N] float64 in [0, 10].

    Raises:
        DataError: there are no candidates, or the references are not as many, or one has none.
    Source: Vedantam et al. 2015; pycocoevalcap's Cider, which is CIDEr-D by another name.
    """
    items = [
        (_ngrams(candidate), [_ngrams(reference) for reference in several])
        for candidate, several in _tokenized("cider_d", candidates, references)
    ]
    found_in = Counter(ngram for _, several in items for ngram in set().union(*several))
    rarity = {ngram: math.log(len(items)) - math.log(count) for ngram, count in found_in.items()}

    def weigh(counts: Ngrams) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        """tf-idf of each n-gram, the norms for each n, the number of bigrams."""
        weights = {ngram: count * rarity.get(ngram, math.log(len(items))) for ngram, count in counts.items()}
        squares = [0.0] * LONGEST
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return weights, [math.sqrt(square) for square in squares], bigrams

    scores = []
    for candidate, several in items:
        ours, our_norms, our_length = weigh(candidate)
        total = 0.0
        for reference in several:
            theirs, their_norms, their_length = weigh(reference)
            alike = [0.0] * LONGEST
            for ngram in ours.keys() & theirs.keys():
                alike[len(ngram) - 1] += min(ours[ngram], theirs[ngram]) * theirs[ngram]
            cosines = (a / (x * y) for a, x, y in zip(alike, our_norms, their_norms, strict=True) if x and y)
            total += sum(cosines) * math.exp(-((our_length - their_length) ** 2) / (2 * SIGMA**2))
        scores.append(10 * total / LONGEST / len(several))
    return np.array(scores)


def caption_match(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> np.ndarray:
    """Which candidates have the very tokens of one of their references.

    Args:
        candidates: N captions.
        references: of each candidate at least one.

    Returns:
        [N] bool.

    Raises:
        DataError: there are no candidates, or the references are not as many, or one has none.
    """
    return np.array(
        [candidate in several for candidate, several in _tokenized("caption_match", candidates, references)]
    )


def chair(mentioned: Sequence[Sequence[str]], present: Sequence[Collection[str]]) -> tuple[float, float]:
    """(CHAIR_i, CHAIR_s): the fraction of the mentions, and of the captions, that name an object that is not there.

    Its quirk: an object that a caption names twice is two mentions. Without a mention CHAIR_i is 0.

    Args:
        mentioned: the objects that each of N captions names.
        present: the objects that each of the N images shows.
    Raises:
        DataError: there are no captions, or the images are not as many.
    Source: Rohrbach et al. 2018, "Object Hallucination in Image Captioning", sec. 2.
    """
    if not mentioned or len(mentioned) != len(present):
        raise DataError(f"chair: needs the objects of each caption and image; got {len(mentioned)} and {len(present)}")
    wrong = [sum(name not in there for name in names) for names, there in zip(mentioned, present, strict=True)]
    return sum(wrong) / max(1, sum(map(len, mentioned))), sum(map(bool, wrong)) / len(wrong)


def _tokenized(
    name: str, candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> list[tuple[list[str], list[list[str]]]]:
    """(tokens, tokens of each reference) of each candidate."""
    if not candidates or len(candidates) != len(references):
        raise DataError(f"{name}: needs references of each candidate; got {len(candidates)} and {len(references)}")
    for row, several in enumerate(references):
        if isinstance(several, str) or not several:
            raise DataError(f"{name}: references of candidate {row} must be one caption or more; got {several!r}")

    def tokens(caption: Caption) -> list[str]:
        return tokenize_caption(caption) if isinstance(caption, str) else list(caption)

    pairs = zip(candidates, references, strict=True)
    return [(tokens(candidate), [tokens(reference) for reference in several]) for candidate, several in pairs]


def _ngrams(tokens: Sequence[str]) -> Ngrams:
    lengths = range(1, LONGEST + 1)
    return Counter(tuple(tokens[i : i + n]) for n in lengths for i in range(len(tokens) - n + 1))


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: a row of the table is one whole number, a bit for each token of `a`.

    A bit is 0 where the row grows by one. Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: Counter[str] = Counter()
    for i, token in enumerate(a):
        places[token] |= 1 << i
    every = row = (1 << len(a)) - 1
    for token in b:
        same = row & places[token]
        row = ((row + same) | (row - same)) & every
    return len(a) - row.bit_count()
