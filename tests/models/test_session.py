"""Sessions: a turn that computes only what is new says what a fresh computation says."""

import pytest
import torch
from torch import nn

from vlmfast.errors import ShapeError
from vlmfast.models.decoder import DecoderConfig, build_decoder
from vlmfast.models.session import Session
from vlmfast.models.vlm import Vlm

V, IMAGE, P, EOS = 31, 30, 4, tuple(range(8))


class Looks(Vlm):
    """A model with the smallest of image encoders, which counts the images that it encodes."""

    def __init__(self, prefix_lm=False, context_length=96):
        config = DecoderConfig.llama(vocab_size=V, width=32, layers=2, heads=4, context_length=context_length)
        decoder = build_decoder(config, seed=0)
        mean = std = (0.5, 0.5, 0.5)
        super().__init__(
            decoder,
            image_token_id=IMAGE,
            image_tokens=P,
            image_hw=(4, 4),
            image_mean=mean,
            image_std=std,
            aspect="square",
            prefix_lm=prefix_lm,
        )
        torch.manual_seed(0)
        self.patches = nn.Linear(12, 32)
        self.encoded = 0
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)

    def encode_image(self, image):
        self.encoded += len(image)
        return self.patches(image.float().div(255).flatten(2).unflatten(2, (P, -1)).transpose(1, 2).flatten(2))


def picture(seed):
    return torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def says(*parts):
    """Token ids: a number is that many random ids of text, "image" the tokens of an image, a tensor itself."""
    ids = []
    for n, part in enumerate(parts):
        if isinstance(part, torch.Tensor):
            ids.append(part)
        elif part == "image":
            ids.append(torch.full((P,), IMAGE))
        else:
            ids.append(torch.randint(3, IMAGE, (part,), generator=torch.Generator().manual_seed(97 * n + part)))
    return torch.cat(ids)


def turns(session):
    """Three turns, an image in the first and in the third: (ids, images, answer) of each, after it was asked."""
    images = torch.stack([picture(0), picture(1)])
    ids = says(3, "image", 6)
    for turn in range(3):
        shown = images[: 2 if turn == 2 else 1]
        answer = session.ask(ids, shown, max_new_tokens=4, eos=EOS)
        yield ids, shown, answer
        ids = torch.cat([ids, answer.tokens, torch.tensor([EOS[0]]), says(5 + turn, *["image"] * (turn == 1), 2)])


class Spy:
    """Keeps all logits that a decoder makes."""

    def __init__(self, decoder, monkeypatch):
        self.seen, logits = [], decoder.logits
        monkeypatch.setattr(decoder, "logits", lambda hidden: self.seen.append(logits(hidden)) or self.seen[-1])

    def drain(self):
        seen, self.seen = torch.cat(self.seen), []
        return seen


def equal(answer, other):
    assert answer.tokens.tolist() == other.tokens.tolist()
    assert answer.finished == other.finished
    torch.testing.assert_close(answer.log_probs, other.log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix_lm", [False, True])
def test_three_turns_have_the_logits_of_fresh_ones(prefix_lm, monkeypatch):
    model = Looks(prefix_lm)
    session, spy = Session(model), Spy(model.decoder, monkeypatch)
    ends, before = set(), 0
    for ids, images, answer in turns(session):
        ours = spy.drain()
        equal(answer, model.generate([ids], [images], max_new_tokens=4, eos=EOS)[0])
        ends.add(answer.finished)
        assert (ours - spy.drain()).abs().max() <= 1e-4
        # What was fed: the conversation, and the answer but for a last token that nothing came after.
        assert session.tokens_reused == (0 if prefix_lm else before)
        before = len(ids) + len(answer.log_probs) - 1
    assert len(ends) == 2, "an answer that ended, and one that was cut"


def test_a_prefix_lm_goes_on_as_it_was_trained():
    model = Looks(True)
    session, images = Session(model), picture(0)[None]
    ids = says(3, "image", 6)
    prefix, reused = len(ids), 0
    for turn in range(3):
        answer = session.ask(ids, images, prefix=prefix, max_new_tokens=4)
        assert session.tokens_reused == reused
        equal(answer, model.generate([ids], [images], prefix=[prefix], max_new_tokens=4)[0])
        (score,) = model.score([ids], [images], [[answer.tokens]], prefix=[prefix])
        whole, wanted = torch.cat([ids, answer.tokens]), torch.cat([torch.full_like(ids, -100), answer.tokens])
        ends = torch.tensor([0, len(whole)], dtype=torch.int32)
        trained = model(whole, images, wanted, ends, prefix=torch.tensor([prefix]), reduction="sum")
        torch.testing.assert_close(score[0], -trained, atol=1e-4, rtol=0)
        torch.testing.assert_close(answer.log_probs.sum(), -trained, atol=1e-4, rtol=0)
        ids, reused = torch.cat([whole, says(5 + turn)]), len(whole) - 1  # the answer's last token was not read
    other = session.ask(ids, images, max_new_tokens=4)
    assert session.tokens_reused == 0, "all of it is the prefix now"
    equal(other, model.generate([ids], [images], max_new_tokens=4)[0])


def test_only_the_rest_is_computed(monkeypatch):
    model, lengths = Looks(), []
    session, forward = Session(model), model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda x, **rest: lengths.append(x.shape[-2]) or forward(x, **rest))
    for ids, _, _ in turns(session):
        assert lengths[0] == len(ids) - session.tokens_reused
        assert set(lengths[1:]) <= {1}
        lengths.clear()
    assert session.tokens_reused > 20
    assert model.encoded == 2, "each image once"


def test_a_question_asked_again_computes_its_last_token():
    session, ids, images = Session(Looks()), says(3, "image", 6), picture(0)[None]
    first = session.ask(ids, images, max_new_tokens=4)
    equal(session.ask(ids, images, max_new_tokens=4), first)
    assert session.tokens_reused == len(ids) - 1


def test_images_are_told_apart_by_their_pixels():
    model = Looks()
    session, ids = Session(model), says(3, "image", 2, "image", 6)
    session.ask(ids, torch.stack([picture(0), picture(1)]), max_new_tokens=4)
    shown = torch.stack([picture(0), picture(2)])
    equal(session.ask(ids, shown, max_new_tokens=4), model.generate([ids], [shown], max_new_tokens=4)[0])
    assert session.tokens_reused == 3 + P + 2
    equal(session.ask(ids, shown.clone(), max_new_tokens=4), model.generate([ids], [shown], max_new_tokens=4)[0])
    assert session.tokens_reused == len(ids) - 1
    swapped = shown.flip(0)
    equal(session.ask(ids, swapped, max_new_tokens=4), model.generate([ids], [swapped], max_new_tokens=4)[0])
    assert session.tokens_reused == 3


def test_features_are_kept_up_to_a_number():
    model = Looks()
    session, ids = Session(model, keep_images=2), says(3, "image", 6)

    def encoded(*seeds):
        model.encoded = 0
        for seed in seeds:
            session.ask(ids, picture(seed)[None], max_new_tokens=1)
        return model.encoded

    assert encoded(0, 1, 0, 1) == 2
    assert encoded(0, 2) == 1  # 1, unused for longest, goes
    assert encoded(0, 2) == 0
    assert encoded(1) == 1
    twice = torch.stack([picture(5), picture(5)])
    model.encoded = 0
    session.ask(says(3, "image", "image", 1), twice, max_new_tokens=1)
    assert model.encoded == 1


def test_kept_features_do_not_hold_those_that_went():
    session = Session(Looks(), keep_images=1)
    session.ask(says(3, "image", "image", 1), torch.stack([picture(0), picture(1)]), max_new_tokens=1)
    (kept,) = session._features.values()
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_a_changed_history_is_computed_from_the_change_on():
    model = Looks()
    session, images = Session(model), picture(0)[None]
    ids = says(3, "image", 10)
    session.ask(ids, images, max_new_tokens=8)
    other = ids.clone()
    other[12] = (other[12] + 1) % IMAGE
    equal(session.ask(other, images, max_new_tokens=8), model.generate([other], [images], max_new_tokens=8)[0])
    assert session.tokens_reused == 12
    text = torch.cat([ids[:3], says(6)])
    equal(session.ask(text, images[:0], max_new_tokens=8), model.generate([text], [images[:0]], max_new_tokens=8)[0])
    assert session.tokens_reused == 3


def test_an_interrupted_answer_leaves_no_trace():
    model = Looks()
    session, images, ids = Session(model), picture(0)[None], says(3, "image", 6)
    seen = []

    def stop(row, token):
        seen.append(token)
        if len(seen) == 3:
            raise KeyboardInterrupt

    before = says(3, "image", 9, 8)
    session.ask(before, images, max_new_tokens=1)
    with pytest.raises(KeyboardInterrupt):
        session.ask(ids, images, max_new_tokens=8, on_token=stop)
    for each in (before, torch.cat([ids, torch.tensor(seen), says(4)]), ids):
        answer = session.ask(each, images, max_new_tokens=8)
        equal(answer, model.generate([each], [images], max_new_tokens=8)[0])
    assert answer.tokens[:3].tolist() == seen


@pytest.mark.parametrize("options", [{"beams": 3}, {"temperature": 1.0, "seed": 3, "suppress": (5,)}])
def test_options_are_those_of_generate(options):
    model = Looks()
    session, images = Session(model), picture(0)[None]
    barred = {**options, "suppress": (IMAGE, *options.get("suppress", ()))}
    for ids in (says(3, "image", 6), says(3, "image", 6, 5)):
        answer = session.ask(ids, images, max_new_tokens=8, **options)
        equal(answer, model.generate([ids], [images], max_new_tokens=8, **barred)[0])
    assert session.tokens_reused == 3 + P + 6


def test_an_answer_has_no_image_tokens(monkeypatch):
    model = Looks()
    logits, liked = model.decoder.logits, torch.zeros(V).index_fill(0, torch.tensor([IMAGE]), 1000.0)
    monkeypatch.setattr(model.decoder, "logits", lambda hidden: logits(hidden) + liked)
    answer = Session(model).ask(says(3, "image", 6), picture(0)[None], max_new_tokens=4)
    assert len(answer.tokens) == 4
    assert IMAGE not in answer.tokens


def test_what_does_not_fit_is_refused():
    session = Session(Looks(context_length=24))
    with pytest.raises(ShapeError, match="image tokens"):
        session.ask(says(3, "image"), picture(0)[None][:0], max_new_tokens=1)
    session.ask(says(3, "image", 6), picture(0)[None], max_new_tokens=1)
    with pytest.raises(ShapeError, match=r"prompt 0 has 26 tokens .* context is 24: shorten"):
        session.ask(says(3, "image", 6, 13), picture(0)[None], max_new_tokens=1)
    with pytest.raises(ShapeError, match="prompt 0 must be"):
        session.ask(says(0), picture(0)[None][:0], max_new_tokens=1)
    answer = session.ask(says(3, "image", 6, 11), picture(0)[None], max_new_tokens=9)
    assert (len(answer.tokens), answer.finished) == (1, False)


def test_reset_forgets():
    model = Looks()
    session, images, ids = Session(model), picture(0)[None], says(3, "image", 6)
    session.ask(ids, images, max_new_tokens=1)
    with torch.no_grad():
        model.patches.weight.mul_(-1)
    session.reset()
    equal(session.ask(ids, images, max_new_tokens=4), model.generate([ids], [images], max_new_tokens=4)[0])
    assert session.tokens_reused == 0
