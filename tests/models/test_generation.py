"""Generation: the tokens that transformers writes, whatever stands beside a prompt, and how likely they are."""

import itertools

import pytest
import torch

from vlmfast.errors import ShapeError
from vlmfast.models import generation
from vlmfast.models.cache import KvCache
from vlmfast.models.decoder import Decoder, DecoderConfig, build_decoder
from vlmfast.models.generation import _drawn, _filtered, generate, score
from vlmfast.models.weights.decoder import save_decoder

V, CONTEXT, EOS = 29, 48, tuple(range(6))
SIZES = {"vocab_size": V, "width": 32, "layers": 2, "heads": 4, "context_length": CONTEXT}
CONFIGS = {
    "llama": DecoderConfig.llama(**SIZES, kv_heads=2),
    "qwen2": DecoderConfig.qwen2(**SIZES, kv_heads=1),
    "gpt2": DecoderConfig.gpt2(**SIZES),
}


def peaky(family):
    """A random decoder that is sure enough of its next tokens for them not to repeat one another."""
    torch.manual_seed(1)
    decoder = Decoder(CONFIGS[family])
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return decoder


@pytest.fixture(scope="module")
def decoder():
    return peaky("llama")


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, transformers, tmp_path_factory):
    """The same random decoder, ours and as transformers loads it."""
    folder, ours = tmp_path_factory.mktemp(request.param), peaky(request.param)
    save_decoder(ours, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return ours, theirs


def prompt(seed, length=7):
    return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(seed))


MIXED = [prompt(0, 3), prompt(1, 12), prompt(2, 1), prompt(3, 12), prompt(4, 7)]


def same(ours, other, tolerance=1e-5):
    for a, b in zip(ours, other, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.finished == b.finished
        torch.testing.assert_close(a.log_probs, b.log_probs, atol=tolerance, rtol=0)


def agrees(generation, theirs, eos):
    """Whether transformers' tokens, padded behind their end, are ours."""
    n, rest = len(generation.tokens), theirs[len(generation.tokens) :]
    ended = rest[0] in eos if generation.finished else not rest
    return theirs[:n] == generation.tokens.tolist() and ended


def test_greedy_tokens_are_those_of_transformers(both):
    ours, theirs = both
    finished = 0
    for seed, eos in itertools.product(range(4), ((), EOS)):
        ids = prompt(seed)
        (generation,) = generate(ours, [ids], max_new_tokens=16, eos=eos)
        out = theirs.generate(
            ids[None], attention_mask=torch.ones(1, 7), max_new_tokens=16, eos_token_id=[*eos] or None
        )
        assert agrees(generation, out[0, 7:].tolist(), eos)
        finished += generation.finished
    assert 0 < finished < 8, "both ways to end must occur"


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_are_those_of_transformers(both, beams):
    ours, theirs = both
    ends, best = set(), set()
    options = itertools.product((0.0, 1.0, 2.0), (False, True, "never"), ((), EOS))
    for i, (length_penalty, early_stopping, eos) in enumerate(options):
        seed = i // 2 % 2
        ids, rules = prompt(seed), {"length_penalty": length_penalty, "early_stopping": early_stopping}
        (generation,) = generate(ours, [ids], max_new_tokens=12, eos=eos, beams=beams, **rules)
        out = theirs.generate(
            ids[None],
            attention_mask=torch.ones(1, 7),
            max_new_tokens=12,
            eos_token_id=[*eos] or None,
            num_beams=beams,
            return_dict_in_generate=True,
            output_scores=True,
            **rules,
        )
        assert agrees(generation, out.sequences[0, 7:].tolist(), eos), (seed, rules, eos)
        total = generation.log_probs.sum() / len(generation.log_probs) ** length_penalty
        assert float(total) == pytest.approx(float(out.sequences_scores[0]), abs=1e-4)
        ends.add(generation.finished)
        best.add((seed, *generation.tokens.tolist()))
    assert len(ends) == 2, "both ways to end must occur"
    assert len(best) > 2, "the options must matter"


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_row_is_what_it_is_alone(family, beams):
    decoder = peaky(family)
    options = {"max_new_tokens": 16, "eos": EOS, "beams": beams}
    together = generate(decoder, MIXED, **options)
    same(together, [generate(decoder, [each], **options)[0] for each in MIXED])
    assert len({len(each.tokens) for each in together}) > 1, "rows must end at different steps"


def test_draws_of_a_row_are_its_own(decoder):
    options = {"max_new_tokens": 12, "eos": EOS, "temperature": 1.5, "top_k": 20, "top_p": 0.95}
    seeds = [7, 8, 9, 10, 11]
    together = generate(decoder, MIXED, seed=7, **options)
    same(together, generate(decoder, MIXED, seed=seeds, **options))
    same(
        together, [generate(decoder, [each], seed=seed, **options)[0] for each, seed in zip(MIXED, seeds, strict=True)]
    )
    same(together[::-1], generate(decoder, MIXED[::-1], seed=seeds[::-1], **options))
    alike = generate(decoder, [MIXED[1]] * 5, seed=7, **options)
    assert len({tuple(each.tokens.tolist()) for each in alike}) > 1, "another seed must draw other tokens"


@pytest.mark.parametrize("family", CONFIGS)
def test_with_a_cache_each_step_is_what_it_is_from_scratch(family):
    decoder = peaky(family)
    (generation,) = generate(decoder, [prompt(5)], max_new_tokens=20)
    ids = prompt(5)
    with torch.no_grad():
        for token, log_prob in zip(generation.tokens, generation.log_probs, strict=True):
            likely = decoder.logits(decoder(decoder.embed(ids)[None])[0, -1]).log_softmax(-1)
            assert int(likely.argmax()) == int(token)
            torch.testing.assert_close(likely[token], log_prob, atol=1e-5, rtol=0)
            ids = torch.cat([ids, token[None]])


def test_a_prefix_sees_itself_and_the_answer_does_not(decoder):
    answers = generate(decoder, MIXED, max_new_tokens=8, prefix=True)
    with torch.no_grad():
        for ids, answer in zip(MIXED, answers, strict=True):
            whole = torch.cat([ids, answer.tokens])
            x = decoder.embed(whole)[None]
            likely = decoder.logits(decoder(x, prefix=torch.tensor([len(ids)]))[0, len(ids) - 1 : -1]).log_softmax(-1)
            assert likely.argmax(-1).tolist() == answer.tokens.tolist()
            torch.testing.assert_close(likely.amax(-1), answer.log_probs, atol=1e-5, rtol=0)
    causal = generate(decoder, MIXED, max_new_tokens=8)
    assert [a.tokens.tolist() for a in answers] != [b.tokens.tolist() for b in causal]


def test_a_prefix_may_be_the_first_tokens_of_a_prompt(decoder):
    seen = [len(ids) // 2 for ids in MIXED]
    answers = generate(decoder, MIXED, max_new_tokens=8, prefix=seen)
    for ids, length, answer in zip(MIXED, seen, answers, strict=True):
        (score_of_it,) = score(decoder, [ids], [[answer.tokens]], prefix=[length])
        torch.testing.assert_close(score_of_it[0], answer.log_probs.sum(), atol=1e-4, rtol=0)
        with torch.no_grad():
            x = decoder.embed(torch.cat([ids, answer.tokens]))[None]
            likely = decoder.logits(decoder(x, prefix=torch.tensor([length]))[0, len(ids) - 1 : -1]).log_softmax(-1)
        assert likely.argmax(-1).tolist() == answer.tokens.tolist()
        torch.testing.assert_close(likely.amax(-1), answer.log_probs, atol=1e-5, rtol=0)
    whole = generate(decoder, MIXED, max_new_tokens=8, prefix=True)
    same(generate(decoder, MIXED, max_new_tokens=8, prefix=[len(ids) for ids in MIXED]), whole, 0)
    assert [a.tokens.tolist() for a in answers] != [b.tokens.tolist() for b in whole]


def test_embeddings_are_prompts_too(decoder):
    mixed = [each if i % 2 else decoder.embed(each) for i, each in enumerate(MIXED)]
    same(generate(decoder, mixed, max_new_tokens=5), generate(decoder, MIXED, max_new_tokens=5), 0)


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_room_for_long_answers_is_made_as_they_are_written(temperature, monkeypatch):
    decoder = build_decoder(DecoderConfig.llama(**{**SIZES, "context_length": 4096}), seed=0)
    likeliest = generate(decoder, [prompt(0)], max_new_tokens=4)
    made, create = [], KvCache.__init__
    monkeypatch.setattr(
        KvCache, "__init__", lambda self, *args, **rest: made.append(self) or create(self, *args, **rest)
    )
    monkeypatch.setattr(generation, "FIRST_ROOM", 2)
    same(generate(decoder, [prompt(0)], max_new_tokens=4, temperature=temperature), likeliest)
    assert made[0].capacity == 2 * (7 + 2 - 1), "doubled once"


def test_a_cache_goes_on_from_what_it_holds(decoder):
    rows, options = [prompt(seed, 12) for seed in range(6)], {"max_new_tokens": 9, "eos": EOS}
    cache = KvCache(decoder.config, 6, 4)
    generate(decoder, [each[:5] for each in rows], max_new_tokens=1, cache=cache)
    assert cache.lengths.tolist() == [5] * 6
    for beams in (3, 1):
        cache.truncate(5)
        answers = generate(decoder, [each[5:] for each in rows], beams=beams, cache=cache, **options)
        same(answers, generate(decoder, rows, beams=beams, **options))
    lengths = sorted(len(each.log_probs) for each in answers)
    assert lengths[0] < lengths[1], "one row must end alone"
    assert cache.lengths.tolist() == [12 + lengths[0] - 1] * 6


def test_filters_are_those_of_transformers(transformers):
    log_probs = torch.randn(6, V, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(-1)
    log_probs[0, 4] = log_probs[0, 9]  # alike
    log_probs[1] = torch.tensor([0.5, 0.25, 0.25] + [0.0] * (V - 3)).log()  # they add up to a top_p, to the bit
    for temperature, top_k, top_p in itertools.product((0.5, 1.0, 2.0), (None, 1, 5, 100), (None, 0.1, 0.5, 0.7, 1.0)):
        warpers = [transformers.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
        warpers += [transformers.TopPLogitsWarper(top_p)] if top_p else []
        expected = log_probs
        for warper in warpers:
            expected = warper(None, expected)
        torch.testing.assert_close(_filtered(log_probs, temperature, top_k, top_p), expected, atol=0, rtol=0)


def test_draws_fall_as_the_probabilities_say():
    log_probs = torch.tensor([[0.0, 0.5, 0.3, 0.15, 0.05]]).log()
    draws = torch.arange(1000, dtype=torch.float64)[:, None] / 1000
    for top_k, expected in ((None, [0, 500, 300, 150, 50]), (2, [0, 625, 375, 0, 0])):
        drawn = _drawn(draws, 1.0, top_k, None, log_probs.expand(1000, -1), list(range(1000)), 0)
        counts = torch.bincount(drawn, minlength=5)
        assert (counts - torch.tensor(expected)).abs().max() <= 1
        assert not counts[torch.tensor(expected) == 0].any(), "not even the lowest draw"


def test_drawn_tokens_keep_the_models_own_log_probs(decoder):
    (drawn,) = generate(decoder, [prompt(0)], max_new_tokens=10, temperature=2.0, top_k=5)
    expected = score(decoder, [prompt(0)], [[drawn.tokens]])[0]
    torch.testing.assert_close(drawn.log_probs.sum()[None], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", [False, True])
def test_scores_are_sums_of_log_probs(decoder, prefix):
    candidates = [
        [prompt(10 * row + n, n) for n in range(1, row + 1)] for row in range(len(MIXED))
    ]  # none for the first
    mixed = [each if i % 2 else decoder.embed(each) for i, each in enumerate(MIXED)]
    scores = score(decoder, mixed, candidates, prefix=prefix)
    assert [len(each) for each in scores] == [0, 1, 2, 3, 4]
    for ids, its, found in zip(MIXED, candidates, scores, strict=True):
        for each, value in zip(its, found, strict=True):
            x = decoder.embed(torch.cat([ids, each]))[None]
            hidden = decoder(x, prefix=torch.tensor([len(ids)]) if prefix else None)[0, len(ids) - 1 : -1]
            expected = decoder.logits(hidden).log_softmax(-1).gather(1, each[:, None]).sum()
            torch.testing.assert_close(value, expected.detach(), atol=1e-5, rtol=1e-5)
    for a, b in zip(scores, score(decoder, mixed, candidates, prefix=prefix, at_once=3), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_computed_once_for_all_its_continuations(decoder, monkeypatch):
    seen, forward = [], Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, x, **rest: seen.append(len(x)) or forward(self, x, **rest))
    score(decoder, [prompt(0, 20), prompt(1, 10)], [[prompt(2, 4), prompt(3, 1), prompt(4, 3)], [prompt(5, 2)]])
    assert seen == [30, 3 + 0 + 2 + 1]


def test_tokens_stream_as_they_are_chosen(decoder):
    seen = []
    options = {"max_new_tokens": 16, "eos": EOS}
    answers = generate(decoder, MIXED, on_token=lambda row, token: seen.append((row, token)), **options)
    turns = itertools.zip_longest(*(each.tokens.tolist() for each in answers))
    expected = [(row, token) for turn in turns for row, token in enumerate(turn) if token is not None]
    assert seen == expected
    seen.clear()
    answers = generate(decoder, MIXED, beams=2, on_token=lambda row, token: seen.append((row, token)), **options)
    assert seen == [(row, token) for row, each in enumerate(answers) for token in each.tokens.tolist()]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_token_that_ends_is_not_written(decoder, beams):
    answers = generate(decoder, MIXED, max_new_tokens=16, eos=EOS, beams=beams)
    assert any(each.finished for each in answers)
    for each in answers:
        assert not set(each.tokens.tolist()) & set(EOS)
        assert len(each.log_probs) == len(each.tokens) + each.finished
        assert (each.tokens.dtype, each.log_probs.dtype) == (torch.int64, torch.float32)
    same(generate(decoder, MIXED, max_new_tokens=16, eos=torch.tensor(sorted(EOS)), beams=beams), answers, 0)


@pytest.mark.parametrize("beams", [1, 3])
def test_suppressed_tokens_are_never_written(decoder, beams):
    usual = generate(decoder, MIXED, max_new_tokens=8, beams=beams)
    barred = usual[0].tokens[:2].tolist()
    answers = generate(decoder, MIXED, max_new_tokens=8, beams=beams, suppress=barred)
    assert not {token for each in answers for token in each.tokens.tolist()} & set(barred)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("left", [0, 1, 3])
def test_the_context_ends_what_it_must(decoder, beams, left):
    prompts = [prompt(9, CONTEXT - left), *(prompt(seed, 2) for seed in range(5))]
    full, *others = generate(decoder, prompts, max_new_tokens=6, beams=beams)
    assert len(full.tokens) == left + 1  # the last token need not be read
    assert {len(each.tokens) for each in others} == {6}
    assert not full.finished


def test_a_prompt_longer_than_the_context_is_named(decoder):
    with pytest.raises(ShapeError, match=r"generate: prompt 1 has 49 tokens .* context is 48: shorten"):
        generate(decoder, [prompt(0), prompt(1, CONTEXT + 1)], max_new_tokens=1)
    cache = KvCache(decoder.config, 1, 8)
    generate(decoder, [prompt(0, 40)], max_new_tokens=1, cache=cache)
    with pytest.raises(ShapeError, match=r"prompt 0 has 49 tokens"):
        generate(decoder, [prompt(1, 9)], max_new_tokens=1, cache=cache)
    with pytest.raises(ShapeError, match=r"after prompt 0 .* has room for 3 tokens; a continuation has 4"):
        score(decoder, [prompt(0, CONTEXT - 2)], [[prompt(0, 3), prompt(1, 4)]])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "max_new_tokens must be at least 1; got 0", {"max_new_tokens": 0}),
        (ValueError, r"temperature must be 0, or in \[1e-06, inf\); got -1.0", {"temperature": -1.0}),
        (ValueError, r"temperature must be .*; got 1e-40", {"temperature": 1e-40}),
        (ValueError, r"temperature must be .*; got nan", {"temperature": float("nan")}),
        (ValueError, "top_k must be at least 1", {"temperature": 1.0, "top_k": 0}),
        (ValueError, r"top_p must be in \(0, 1\]", {"temperature": 1.0, "top_p": 1.1}),
        (ValueError, "beams must be at least 1", {"beams": 0}),
        (ValueError, "early_stopping must be", {"beams": 2, "early_stopping": "soon"}),
        (ValueError, "temperature must be 0 with 2 beams", {"beams": 2, "temperature": 1.0}),
        (ValueError, "give a temperature above 0", {"top_k": 5}),
        (ShapeError, "one for each of 1 prompts; got 2", {"temperature": 1.0, "seed": [1, 2]}),
        (ShapeError, "at least one prompt", {"prompts": []}),
        (ShapeError, r"prefix must be a number of each .* \[7\]; got \[8\]", {"prefix": [8]}),
        (ShapeError, r"prefix must be a number of each .* \[7\]; got \[2, 3\]", {"prefix": [2, 3]}),
        (ValueError, r"suppress must be some ids in \[0, ", {"suppress": [CONFIGS["llama"].vocab_size]}),
        (ValueError, "and leave at least one", {"suppress": range(CONFIGS["llama"].vocab_size)}),
        (ShapeError, r"prompt 0 must be \[T\] ids or \[T, C\], T >= 1; got \(0,\)", {"prompts": [prompt(0, 0)]}),
        (ShapeError, r"prompt 0 must be .*; got \(2, 3\)", {"prompts": [torch.zeros(2, 3, dtype=torch.int64)]}),
        (ShapeError, "the cache has 2 rows and there are 1 prompts", {"cache": KvCache(CONFIGS["llama"], 2, 4)}),
    ],
)
def test_what_is_refused(decoder, error, message, options):
    options = {"prompts": [prompt(0)], "max_new_tokens": 2, **options}
    with pytest.raises(error, match=message):
        generate(decoder, options.pop("prompts"), **options)


def test_a_prefix_cannot_lie_in_a_cache(decoder):
    cache = KvCache(decoder.config, 1, 8)
    generate(decoder, [prompt(0)], max_new_tokens=2, prefix=True, cache=cache)
    with pytest.raises(ValueError, match="none of them can lie in the cache already"):
        generate(decoder, [prompt(1)], max_new_tokens=2, prefix=True, cache=cache)


def test_continuations_that_are_refused(decoder):
    with pytest.raises(ShapeError, match="2 prompts need as many lists of continuations; got 1"):
        score(decoder, MIXED[:2], [[prompt(0)]])
    with pytest.raises(ShapeError, match=r"a continuation of prompt 1 must be \[n\] with n >= 1; got \(0,\)"):
        score(decoder, MIXED[:2], [[prompt(0)], [prompt(0, 0)]])
    with pytest.raises(ValueError, match="ids of continuations must be at least 0; got -100"):
        score(decoder, MIXED[:1], [[torch.tensor([3, -100])]])
