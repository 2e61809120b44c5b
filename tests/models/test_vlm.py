"""Images among tokens: where features go, which tokens are supervised, and what is refused."""

import pytest
import torch
from torch.testing import assert_close

from vlmfast.errors import DTypeError, ShapeError
from vlmfast.models.decoder import DecoderConfig
from vlmfast.models.patch_lm import PatchLmConfig, build_patch_lm

V, IMAGE, P = 40, 39, 4
TEXT = DecoderConfig.llama(vocab_size=V, width=16, layers=2, heads=2, context_length=64)
CONFIG = PatchLmConfig(TEXT, IMAGE, image_size=8, patch_size=4)
PLACE = [IMAGE] * P


def batch(*sequences, first_label=2):
    """ids, image, labels, cu_seqlens: each token from `first_label` text tokens on is supervised."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    labels = [x.clone() for x in ids]
    for x in labels:
        text = (x != IMAGE).nonzero()[:, 0]
        x[x == IMAGE] = -100
        x[text[:first_label]] = -100
    count = sum(sequence.count(IMAGE) for sequence in sequences) // P
    image = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, *map(len, sequences)]).cumsum(0, dtype=torch.int32)
    return torch.cat(ids), image, torch.cat(labels), ends


def model(**changes):
    return build_patch_lm(PatchLmConfig(**{**vars(CONFIG), **changes}), seed=0)


def nll(model, ids, image, labels, cu_seqlens):
    """[tokens] losses of labels from all logits of each sequence alone, zeros where they are not supervised."""
    out = torch.zeros(len(ids))
    x = model.embed(ids, image)
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        logits = model.decoder.logits(model.decoder(x[None, a:b]))[0]
        out[a + 1 : b] = torch.nn.functional.cross_entropy(logits[:-1], labels[a + 1 : b], reduction="none")
    return out


SEQUENCES = [[1, *PLACE, 2, 3, 4], [1, 5], [*PLACE, *PLACE, 6, 7], [8, *PLACE, 9, *PLACE, 3, 2, 1]]


def test_features_stand_where_the_image_token_does_in_order():
    vlm = model()
    ids, image, _, _ = batch(*SEQUENCES)
    features = torch.arange(5 * P * 16, dtype=torch.float32).view(5, P, 16)
    x = vlm.splice(ids, features)
    assert torch.equal(x[ids == IMAGE], features.flatten(0, 1))
    assert torch.equal(x[ids != IMAGE], vlm.decoder.embed(ids[ids != IMAGE]))
    assert torch.equal(vlm.embed(ids, image), vlm.splice(ids, vlm.encode_image(image)))
    text = torch.tensor([1, 2, 3])
    assert torch.equal(vlm.embed(text, image[:0]), vlm.decoder.embed(text))


@pytest.mark.parametrize("count", [10, 5, 1, 0])
def test_loss_equals_that_of_all_logits_for_random_labels(count):
    vlm = model()
    ids, image, labels, ends = batch(*SEQUENCES, first_label=0)
    supervised = labels != -100
    supervised[ends[:-1].long()] = False  # nothing predicts the first token of a sequence
    order = torch.randperm(10, generator=torch.Generator().manual_seed(count))
    dropped = supervised.nonzero()[:, 0][order[count:]]
    labels[dropped], supervised[dropped] = -100, False
    expected = nll(vlm, ids, image, labels, ends)
    assert supervised.sum() == count
    each = vlm(ids, image, labels, ends, reduction="none")
    assert_close(each, expected * supervised, rtol=1e-5, atol=1e-6)
    assert_close(vlm(ids, image, labels, ends, 13), expected[supervised].sum() / max(count, 1), rtol=1e-5, atol=1e-6)
    assert_close(vlm(ids, image, labels, ends, reduction="sum"), expected[supervised].sum(), rtol=1e-5, atol=1e-6)
    assert_close(
        vlm(ids, image, labels, ends, num_supervised=7.0), expected[supervised].sum() / 7, rtol=1e-5, atol=1e-6
    )


def test_last_image_token_predicts_the_first_word():
    vlm = model()
    ids, image, _, ends = batch([*PLACE, 6, 7])
    labels = torch.tensor([-100] * P + [6, -100])
    logits = vlm.decoder.logits(vlm.decoder(vlm.embed(ids, image)[None]))[0]
    expected = torch.nn.functional.cross_entropy(logits[P - 1 : P], torch.tensor([6]))
    assert_close(vlm(ids, image, labels, ends), expected)


def test_only_supervised_rows_reach_the_last_perceptron_and_the_head():
    vlm = model()
    ids, image, labels, ends = batch(*SEQUENCES)
    seen = {}
    for name, module in {"first": vlm.decoder.layers[0].mlp, "last": vlm.decoder.layers[1].mlp}.items():
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, len(args[0])))
    vlm(ids, image, labels, ends)
    assert seen == {"first": len(ids), "last": int((labels != -100).sum())}


@pytest.mark.parametrize("kind", ["no image", "nothing supervised", "neither"])
def test_every_parameter_gets_a_gradient(kind):
    vlm = model(stem="conv")
    ids, image, labels, ends = batch([1, 2, 3]) if kind != "nothing supervised" else batch([1, *PLACE, 3])
    labels = labels if kind == "no image" else labels.fill_(-100)
    loss = vlm(ids, image, labels, ends)
    loss.backward()
    assert all(p.grad is not None for p in vlm.parameters())
    assert not any(p.grad.any() for name, p in vlm.named_parameters() if not name.startswith("decoder."))
    assert (loss > 0) == (kind == "no image")


def test_pieces_of_a_batch_add_up_to_it():
    vlm = model()
    whole = batch(*SEQUENCES)
    count = (whole[2] != -100).sum().float()
    loss = vlm(*whole)
    loss.backward()
    expected = [p.grad.clone() for p in vlm.parameters()]
    vlm.zero_grad()
    total = 0.0
    images = 0
    for sequence in SEQUENCES:
        ids, image, labels, ends = batch(sequence)
        image = whole[1][images : images + len(image)]
        images += len(image)
        piece = vlm(ids, image, labels, ends, num_supervised=count)
        piece.backward()
        total += piece.item()
    assert_close(total, loss.item(), rtol=1e-6, atol=1e-6)
    assert_close([p.grad for p in vlm.parameters()], expected, rtol=1e-4, atol=1e-6)


def test_checkpointed_gradients_are_the_same():
    vlm = model()
    grads = []
    for enable in (False, True):
        vlm.set_grad_checkpointing(enable)
        vlm.zero_grad()
        vlm(*batch(*SEQUENCES)).backward()
        grads.append([p.grad.clone() for p in vlm.parameters()])
    assert_close(*grads)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_under_autocast_it_is_nearly_the_same(stem):
    vlm = model(stem=stem)
    for parts in (batch(*SEQUENCES), batch([1, 2, 3])):
        exact = vlm(*parts)
        with torch.autocast("cpu", torch.bfloat16):
            loss = vlm(*parts)
        loss.backward()
        assert loss.dtype == torch.float32
        assert_close(loss, exact, rtol=0.02, atol=0.0)
        assert all(p.grad.dtype == torch.float32 for p in vlm.parameters())


def test_generates_and_scores_prompt_by_prompt():
    vlm = model()
    with torch.no_grad():
        vlm.decoder.lm_head.weight.mul_(20)
    prompts = [torch.tensor(x) for x in ([1, *PLACE, 2], [1, 5, 6], [*PLACE, 3, *PLACE])]
    _, image, _, _ = batch(*SEQUENCES)
    images = [image[:1], image[:0], image[1:3]]
    together = vlm.generate(prompts, images, max_new_tokens=6)
    candidates = [[torch.tensor([3, 4]), torch.tensor([7])]] * 3
    scores = vlm.score(prompts, images, candidates)
    for prompt, image, generation, score in zip(prompts, images, together, scores, strict=True):
        x = vlm.embed(prompt, image)
        for token in generation.tokens:
            logits = vlm.decoder.logits(vlm.decoder(x[None]))[0, -1]
            logits[IMAGE] = -torch.inf  # the image token is no answer
            assert int(logits.argmax()) == int(token)
            x = torch.cat([x, vlm.decoder.embed(token)[None]])
        ids = torch.cat([prompt, candidates[0][0]])
        labels = ids.clone()
        labels[: len(prompt)] = -100
        ends = torch.tensor([0, len(ids)], dtype=torch.int32)
        assert_close(score[0], -vlm(ids, image, labels, ends, reduction="sum"), rtol=1e-5, atol=1e-5)


GOOD = [1, *PLACE, 2, 3]


def changed(place, value, which=0):
    def change(parts):
        parts[which] = parts[which].clone()
        parts[which][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (changed(8, 4), ShapeError, "sequence 1 has 3 image tokens .id 39., which are no whole images of 4"),
        (changed(0, IMAGE), ShapeError, "sequence 0 has 5 image tokens"),
        (
            lambda b: b.__setitem__(1, b[1][:1]),
            ShapeError,
            "8 image tokens .id 39. for 1 images of 4 tokens, which take 4",
        ),
        (changed(12, V), ValueError, r"ids must be in \[0, 40\); got 40 in sequence 1, token 5"),
        (changed(0, -1), ValueError, r"ids must be .* got -1 in sequence 0, token 0"),
        (changed(13, V, 2), ValueError, r"labels must be in \[0, 40\) or -100; got 40 in sequence 1, token 6"),
        (changed(6, -7, 2), ValueError, "labels must be .* got -7 in sequence 0, token 6"),
        (changed(1, 9, 3), ShapeError, "sequence 0 has 5 image tokens|no whole images"),
        (changed(2, 13, 3), ShapeError, "cu_seqlens must rise from 0 to the number of tokens, 14"),
        (changed(1, 20, 3), ShapeError, "cu_seqlens must rise"),
        (lambda b: b.__setitem__(1, b[1].float()[:, :, :4]), ShapeError, r"image must be \[B, 3, 8, 8\]"),
        (lambda b: b.__setitem__(1, b[1].int()), DTypeError, "image must be uint8"),
        (lambda b: b.__setitem__(2, b[2][:-1]), ShapeError, r"ids and labels must be \[tokens\]"),
        (lambda b: b.__setitem__(0, b[0].int()), DTypeError, "ids and labels must be int64"),
        (lambda b: b.__setitem__(3, b[3].long()), DTypeError, "cu_seqlens int32"),
    ],
)
def test_a_bad_batch_is_refused_by_name(change, error, match):
    vlm = model()
    parts = list(batch(GOOD, GOOD))
    vlm(*parts)
    change(parts)
    with pytest.raises(error, match=match):
        vlm(*parts)


def test_other_refusals():
    vlm = model()
    _, image, _, _ = batch(GOOD, GOOD)
    ids = torch.tensor(GOOD)
    with pytest.raises(ShapeError, match=r"4 image tokens \(id 39\) for 2 images"):
        vlm.embed(ids, image)
    with pytest.raises(ShapeError, match=r"prompts\[1\]: 4 image tokens .id 39. for 0 images"):
        vlm.generate([ids, ids], [image[:1], image[:0]], max_new_tokens=1)
    with pytest.raises(ShapeError, match="2 prompts and the images of 1"):
        vlm.score([ids, ids], [image[:1]], [[ids]])
    with pytest.raises(
        ShapeError, match=r"prompts\[0\] must be \[T\] and images\[0\] .*; got \(1, 7\) and \(1, 3, 8, 8\)"
    ):
        vlm.generate([ids[None]], [image[:1]], max_new_tokens=1)
    with pytest.raises(ShapeError, match=r"images\[1\] \[n, 3, H, W\]; got \(7,\) and \(3, 8, 8\)"):
        vlm.generate([ids, ids], [image[:1], image[1]], max_new_tokens=1)
    with pytest.raises(DTypeError, match="all be uint8 in 0"):
        vlm.generate([ids, ids], [image[:1], image[1:] / 255], max_new_tokens=1)
    with pytest.raises(ShapeError, match="image_token_id must be in the decoder's vocabulary of 40; got 40"):
        model(image_token_id=V)
    with pytest.raises(ValueError, match="aspect must be one of pad, square, squash"):
        model(aspect="crop")
