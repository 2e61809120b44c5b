"""Texts without what follows their end: the same embeddings and gradients as of the whole context, for less."""

import pytest
import torch
from torch.testing import assert_close

from vlmfast.models import ClipConfig, build_clip

EOT, LENGTH = 63, 16
ENDS = (3, 8, 1, 11, 5, 8)


def tower(pool="argmax", **text):
    config = {"context_length": LENGTH, "vocab_size": 64, "width": 32, "heads": 4, "layers": 3, **text}
    if pool == "eos":
        config |= {"pool_type": "eos", "eos_id": EOT}
    vision = {"image_size": 8, "layers": 1, "width": 16, "head_width": 16, "patch_size": 8}
    model = build_clip(ClipConfig.from_dict({"embed_dim": 20, "vision_cfg": vision, "text_cfg": config}), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # as if trained: no bias is 0, no gain 1
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def some_texts(ends=ENDS):
    """Random words, the end-of-text token at each of `ends`, then random words again rather than padding."""
    text = torch.randint(1, EOT, (len(ends), LENGTH), generator=torch.Generator().manual_seed(3))
    text[torch.arange(len(ends)), torch.tensor(ends)] = EOT
    return text


def tokens_computed(model, text):
    """How many tokens' attention is projected in the first block: seen without a hook, which would stop the packing."""
    seen, project = [], model.transformer.resblocks[0].attn.out_proj
    forward = project.forward
    project.forward = lambda x: seen.append(x.shape[:-1].numel()) or forward(x)
    model.encode_text(text)
    del project.forward
    return seen[0]


def both(model, text):
    """(embeddings, gradient of each parameter by name) packed, and of the whole context."""
    results = []
    upstream = torch.randn(len(text), 20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith(("visual", "logit"))}
    for whole in (False, True):
        if whole:
            features = model.project(model.tokens(text)[torch.arange(len(text)), model.end(text)])
        else:
            model.packing = True
            features = model.encode_text(text)
        gradients = torch.autograd.grad(features, list(parameters.values()), upstream.to(features.dtype))
        results.append((features, dict(zip(parameters, gradients, strict=True))))
    return results


@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_and_gradients_are_those_of_the_whole_context(pool, checkpointing):
    """Token embedding and positions included. In float64, so that what is left is no mistake hidden by rounding."""
    model, text = tower(pool).double(), some_texts()
    model.transformer.checkpointing = checkpointing
    (packed, gradients), (whole, expected) = both(model, text)
    assert_close(packed, whole, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-12 * expected[name].norm(), name
        assert expected[name].norm() > 0, name


def test_to_a_millionth_in_float32():
    model, text = tower(), some_texts()
    (packed, gradients), (whole, expected) = both(model, text)
    assert (packed - whole).norm() <= 1e-6 * whole.norm()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


def test_places_after_the_longest_text_have_no_gradient():
    model = tower()
    model.encode_text(some_texts()).square().sum().backward()
    assert not model.positional_embedding.grad[max(ENDS) + 1 :].any()
    assert model.positional_embedding.grad[: max(ENDS) + 1].any(1).all()


def test_only_tokens_up_to_the_end_are_computed():
    model, text = tower(), some_texts()
    packed, columns = sum(end + 1 for end in ENDS), len(ENDS) * (max(ENDS) + 1)
    assert tokens_computed(model, text) == packed
    model.packing = False
    assert tokens_computed(model, text) == columns
    model.packing = None
    assert tokens_computed(model, some_texts((7, 7, 7))) == 3 * 8  # nothing to gain: dense, and cut off


@pytest.mark.parametrize("where", ["transformer", "a block", "a part"])
def test_a_hook_sees_padded_texts(where):
    model, text, shapes = tower(), some_texts(), []
    part = {
        "transformer": model.transformer,
        "a block": model.transformer.resblocks[1],
        "a part": model.transformer.resblocks[2].mlp,
    }[where]
    packed = model.encode_text(text)
    handle = part.register_forward_hook(lambda _m, _i, out: shapes.append(out.dim()))
    assert_close(model.encode_text(text), packed, rtol=1e-5, atol=1e-5)
    model.packing = True
    model.encode_text(text)
    handle.remove()
    assert shapes == [3, 2]
    model.packing = None
    assert tokens_computed(model, text) == sum(end + 1 for end in ENDS)


@pytest.mark.parametrize("changes", [{"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "first"}])
def test_where_every_token_counts_none_is_dropped(changes):
    model, text = tower(**changes), some_texts()
    for packing in (None, True):
        model.packing = packing
        assert tokens_computed(model, text) == len(ENDS) * LENGTH


def test_compiled_texts_are_padded():
    """Else each number of tokens would compile anew."""
    model = tower()
    torch.compiler.reset()
    compiled = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")
    for ends in (ENDS, (2, 4, 9, 9, 1, 3)):
        assert_close(compiled(some_texts(ends)), model.encode_text(some_texts(ends)), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_in_bfloat16_packing_rounds_no_worse():
    exact = tower().double()
    text = some_texts()
    expected = exact.encode_text(text).detach()
    errors = []
    for packing in (True, False):
        model = tower().bfloat16()
        model.packing = packing
        errors.append(float((model.encode_text(text).detach().double() - expected).norm() / expected.norm()))
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["token_embedding", "ln_final"])
def test_who_looks_beside_the_transformer_sees_padded_texts_too(name, packing):
    model, text, shapes = tower(), some_texts(), []
    model.packing = None if packing else False
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    model.encode_text(text)
    handle.remove()
    assert shapes == [(len(ENDS), max(ENDS) + 1, 32)]


def test_an_image_tower_s_last_perceptron_sees_the_class_tokens_alone():
    model, rows = tower(), []
    image = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    forward = model.visual.transformer.resblocks[-1].mlp.forward
    model.visual.transformer.resblocks[-1].mlp.forward = lambda x: rows.append(x.shape[:-1]) or forward(x)
    pooled = model.encode_image(image)
    assert_close(
        pooled, model.visual.ln_post(model.visual.tokens(image)[:, 0]) @ model.visual.proj, rtol=1e-5, atol=1e-5
    )
    assert rows == [(5,), (5, 2)]
