"""BLEU, ROUGE-L, CIDEr-D, exact match and CHAIR against pycocoevalcap's numbers, hand-worked ones and their laws."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from vlmfast.errors import DataError
from vlmfast.eval.caption import bleu, caption_match, chair, cider_d, rouge_l, tokenize_caption

GOLDENS = json.loads((Path(__file__).parent / "scorer_goldens.json").read_text(encoding="utf-8"))
CAPTIONS = GOLDENS["captions"]
CANDIDATES = [each["candidate"].split() for each in CAPTIONS["sets"]]
REFERENCES = [[text.split() for text in each["references"]] for each in CAPTIONS["sets"]]
SCORERS = [bleu, rouge_l, cider_d, caption_match]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def random_sets(N, words, seed):
    """N candidates, some of them a reference with a change, and their references."""
    draw = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(words)]
    candidates, references = [], []
    for _ in range(N):
        several = [draw.choices(vocabulary, k=draw.randint(1, 14)) for _ in range(draw.randint(1, 5))]
        candidate = list(draw.choice(several))
        candidate[draw.randrange(len(candidate))] = draw.choice(vocabulary)
        candidates.append(candidate + candidate[: draw.choice([0, 0, 3])])
        references.append(several)
    return candidates, references


def test_scores_are_those_of_pycocoevalcap():
    close(bleu(CANDIDATES, REFERENCES), CAPTIONS["bleu"])
    close([bleu([c], [r]) for c, r in zip(CANDIDATES, REFERENCES, strict=True)], CAPTIONS["bleu_each"])
    close(rouge_l(CANDIDATES, REFERENCES), CAPTIONS["rouge_l"])
    close(cider_d(CANDIDATES, REFERENCES), CAPTIONS["cider_d"])
    close(cider_d([several[0] for several in REFERENCES], REFERENCES).mean(), CAPTIONS["first_references_cider_d"])
    shuffled = [CANDIDATES[i] for i in CAPTIONS["order"]]
    close(cider_d(shuffled, REFERENCES).mean(), CAPTIONS["shuffled_cider_d"])


def test_scores_are_those_of_pycocoevalcap_where_it_is_installed():
    reason = "pycocoevalcap cannot be imported"
    modules = [
        pytest.importorskip(f"pycocoevalcap.{name}.{name}", reason=reason) for name in ("bleu", "rouge", "cider")
    ]
    candidates, references = random_sets(500, 60, seed=0)
    truth = {i: [" ".join(each) for each in several] for i, several in enumerate(references)}
    said = {i: [" ".join(each)] for i, each in enumerate(candidates)}
    close(bleu(candidates, references), modules[0].Bleu(4).compute_score(truth, said, verbose=0)[0])
    close(rouge_l(candidates, references), modules[1].Rouge().compute_score(truth, said)[1])
    close(cider_d(candidates, references), modules[2].Cider().compute_score(truth, said)[1])


@pytest.mark.parametrize("case", GOLDENS["tokens"], ids=lambda case: case["text"][:20])
def test_tokens_are_those_of_the_penn_treebank_tokenizer(case):
    assert tokenize_caption(case["text"]) == case["tokens"]


@pytest.mark.parametrize(
    ("text", "theirs"),
    [
        ("rock 'n' roll", "rock 'n' roll"),
        ("'tis", "'t is"),
        ("y'all", "y' all"),
        ("no. 5", "no. 5"),
        ("@home", "@home"),
    ],
)
def test_the_differences_from_it_that_are_documented(text, theirs):
    assert " ".join(tokenize_caption(text)) != theirs


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_text_scores_as_its_tokens(scorer):
    texts = ["A red square, left of the circle's edge.", "It isn't (a) dog!"]
    others = [["A red circle.", "a red square"], ["it is not a dog"]]
    split = [[tokenize_caption(text) for text in several] for several in others]
    np.testing.assert_array_equal(scorer(texts, others), scorer([tokenize_caption(text) for text in texts], split))


def test_a_reference_repeated_is_perfect():
    candidates, references = random_sets(40, 200, seed=1)
    candidates = [several[-1] for several in references]
    alone = [[candidate] for candidate in candidates]
    long = [(c, r) for c, r in zip(candidates, alone, strict=True) if len(c) >= 4]
    close(bleu(*zip(*long, strict=True)), [1, 1, 1, 1])
    close(rouge_l(candidates, references), np.ones(40))
    close(cider_d(*zip(*long, strict=True)), np.full(len(long), 10))
    assert caption_match(candidates, references).all()


def test_nothing_in_common_scores_nothing():
    candidates, references = [["x", "y", "z", "u"]] * 3, [[["a", "b", "c", "d"]], [["e"]], [["f", "g"]]]
    assert max(bleu(candidates, references)) < 1e-8
    assert not rouge_l(candidates, references).any()
    assert not cider_d(candidates, references).any()
    assert not caption_match(candidates, references).any()


@pytest.mark.parametrize("scorer", [rouge_l, cider_d, caption_match])
def test_the_order_of_items_and_of_references_changes_nothing(scorer):
    candidates, references = random_sets(60, 20, seed=2)
    order = np.random.default_rng(0).permutation(60)
    mixed = scorer([candidates[i] for i in order], [references[i][::-1] for i in order])
    close(mixed, scorer(candidates, references)[order])
    close(bleu([candidates[i] for i in order], [references[i][::-1] for i in order]), bleu(candidates, references))


def test_bleu_takes_the_closest_reference_length_and_the_shorter_of_two():
    short, long = ["a"] * 3, ["a"] * 5
    assert bleu([["a"] * 4], [[short, long]])[0] == pytest.approx(1)  # 3 and 5 are equally close to 4: 3, no penalty
    assert bleu([["a"] * 4], [[long]])[0] == pytest.approx(np.exp(1 - 5 / 4))
    assert bleu([["a"] * 4], [[long, ["a"] * 4]])[0] == pytest.approx(1)


def test_bleu_clips_counts_to_the_reference_that_has_most():
    # Papineni et al. 2002, sec. 2.1: seven "the", of which one reference has two.
    references = [[["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]]
    assert bleu([["the"] * 7], references)[0] == pytest.approx(2 / 7)


def test_bleu_is_of_the_corpus_not_a_mean():
    candidates, references = [["a"], ["b", "c", "d"]], [[["a"]], [["x", "y", "z"]]]
    assert bleu(candidates, references)[0] == pytest.approx(1 / 4)


def test_rouge_l_of_long_texts_is_that_of_the_table():
    rng = np.random.default_rng(0)
    for longest, words in ((6, 2), (90, 4), (400, 9), (70, 70)):
        a, b = (list(map(str, rng.integers(0, words, rng.integers(1, longest)))) for _ in range(2))
        row = [0] * (len(b) + 1)
        for token in a:
            row = [0, *np.maximum.accumulate([max(row[i + 1], row[i] + (token == b[i])) for i in range(len(b))])]
        p, r = row[-1] / len(a), row[-1] / len(b)
        wanted = (1 + 1.44) * p * r / (r + 1.44 * p) if row[-1] else 0.0
        assert rouge_l([a], [[b]])[0] == pytest.approx(wanted)


def test_rouge_l_by_hand():
    candidate, reference = ["police", "kill", "the", "gunman"], ["police", "killed", "the", "gunman"]
    assert rouge_l([candidate], [[reference]])[0] == pytest.approx(3 / 4)  # Lin 2004, sec. 3.1
    precise, whole = ["a", "b"], ["a", "x", "b", "y", "c", "z"]  # precision of the first, recall of the second
    got = rouge_l([["a", "x", "b"]], [[precise, ["a", "x", "b", "q", "q", "q"]]])[0]
    assert got == pytest.approx(1.0)
    p, r = 1.0, 3 / 6
    assert rouge_l([["a", "x", "b"]], [[whole]])[0] == pytest.approx((1 + 1.44) * p * r / (r + 1.44 * p))


def test_cider_d_of_one_image_is_zero_because_its_idf_is():
    assert cider_d([["a", "b"]], [[["a", "b"]]])[0] == CAPTIONS["first_alone"]["cider"] == 0


def test_cider_d_of_a_shorter_caption_by_hand():
    others = [["p"], ["q"], ["r"]]
    references = [[["a", "b", "c", "d", "e", "f", "g"]], *([each] for each in others)]
    for words in (1, 2):  # "a" and "a a": clipped to one in the numerator, one vector in direction
        cosine = 1 / (words * np.sqrt(7))
        penalty = np.exp(-((7 - words) ** 2) / (2 * 6**2))
        assert cider_d([["a"] * words, *others], references)[0] == pytest.approx(10 / 4 * cosine * penalty)


def test_cider_d_does_not_pay_for_repeating():
    references = [[["red", "square"]], [["blue", "circle"]], [["green", "star"]]]
    once = cider_d([["red", "square"], *(several[0] for several in references[1:])], references)[0]
    twice = cider_d([["red", "square"] * 2, *(several[0] for several in references[1:])], references)[0]
    assert twice < once


@pytest.mark.parametrize("scorer", [rouge_l, cider_d])
def test_a_word_more_that_is_right_is_worth_more(scorer):
    whole = ["a", "red", "square", "left", "of", "a", "blue", "circle"]
    rest = [["two", "green", "stars"], ["one", "dog"]]
    references = [[whole], *([each] for each in rest)]
    scores = [scorer([whole[:n], *rest], references)[0] for n in range(4, len(whole) + 1)]
    assert (np.diff(scores) > 0).all()


def test_chair_by_hand():
    mentioned = [["dog", "dog", "cat"], ["car"], []]
    present = [{"cat"}, {"car", "tree"}, {"dog"}]
    assert chair(mentioned, present) == (2 / 4, 1 / 3)
    assert chair([[]], [set()]) == (0.0, 0.0)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "got 0 and 0"),
        (["a"], [["a"], ["b"]], "got 1 and 2"),
        (["a", "b"], [["a"], []], r"candidate 1 must be one caption or more; got \[\]"),
        (["a"], ["a red square"], "candidate 0 must be one caption or more; got 'a red square'"),
    ],
)
def test_refusals(scorer, candidates, references, message):
    with pytest.raises(DataError, match=f"{scorer.__name__}: .*{message}"):
        scorer(candidates, references)


def test_chair_refuses_captions_without_images():
    with pytest.raises(DataError, match="got 1 and 0"):
        chair([["dog"]], [])
