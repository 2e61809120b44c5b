"""CLIP against its definition in plain functional PyTorch, its initialisation, its laws and its refusals."""

import re

import pytest
import torch
from torch.testing import assert_close

from vlmfast.errors import DTypeError, ShapeError
from vlmfast.models import ClipConfig, build_clip

EOT, LENGTH = 63, 16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**changes):
    """Widths that differ everywhere, so that a confusion of two of them is an error."""
    vision = {
        "image_size": 24,
        "layers": 3,
        "width": 48,
        "head_width": 16,
        "patch_size": 8,
        **changes.pop("vision", {}),
    }
    text = {"context_length": LENGTH, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2, **changes.pop("text", {})}
    return ClipConfig.from_dict({"embed_dim": 20, "vision_cfg": vision, "text_cfg": text, **changes})


def lively(config, dtype=torch.float64):
    """A model none of whose parameters is at a special value: zero biases and unit gains would hide mistakes."""
    model = build_clip(config, seed=0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def some_images(count=5, size=24):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def some_texts(ends=(3, 8, 1, 11, 5)):
    """Random words, the end-of-text token at each of `ends`, and then random words again rather than padding."""
    text = torch.randint(1, EOT, (len(ends), LENGTH), generator=torch.Generator().manual_seed(3))
    text[torch.arange(len(ends)), torch.tensor(ends)] = EOT
    return text


# The definition: OpenAI's model.py in explicit formulas, on a state dict.


def layer_norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attention(w, name, x, heads, causal):
    T, C = x.shape[1:]
    q, k, v = (x @ w[f"{name}.in_proj_weight"].T + w[f"{name}.in_proj_bias"]).split(C, -1)
    mixed = []
    for h in range(heads):
        part = slice(h * C // heads, (h + 1) * C // heads)
        scores = q[..., part] @ k[..., part].mT / (C // heads) ** 0.5
        if causal:
            scores = scores + torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)
        mixed.append(scores.softmax(-1) @ v[..., part])
    return linear(w, f"{name}.out_proj", torch.cat(mixed, -1))


def blocks(w, name, x, layers, heads, activation, causal):
    hidden = []
    for i in range(layers):
        block = f"{name}.resblocks.{i}"
        x = x + attention(w, f"{block}.attn", layer_norm(w, f"{block}.ln_1", x), heads, causal)
        inner = activation(linear(w, f"{block}.mlp.c_fc", layer_norm(w, f"{block}.ln_2", x)))
        x = x + linear(w, f"{block}.mlp.c_proj", inner)
        hidden.append(x)
    return x, hidden


def definition(w, config, image, text):
    activation = {
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    }
    vision, words = config.vision_cfg, config.text_cfg
    x = torch.nn.functional.conv2d(image, w["visual.conv1.weight"], stride=vision.patch_size).flatten(2).mT
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + w["visual.positional_embedding"]
    x, image_hidden = blocks(
        w,
        "visual.transformer",
        layer_norm(w, "visual.ln_pre", x),
        vision.layers,
        vision.width // vision.head_width,
        activation[config.activation(vision)],
        causal=False,
    )
    image_features = layer_norm(w, "visual.ln_post", x[:, 0]) @ w["visual.proj"]

    y = w["token_embedding.weight"][text] + w["positional_embedding"][: text.shape[1]]
    y, text_hidden = blocks(
        w, "transformer", y, words.layers, words.heads, activation[config.activation(words)], causal=True
    )
    y = layer_norm(w, "ln_final", y)
    text_features = y[torch.arange(len(text)), text.argmax(-1)] @ w["text_projection"]
    return image_features, text_features, image_hidden, text_hidden


TANH = {"act_kwargs": {"approximate": "tanh"}}


@pytest.mark.parametrize(
    "changes",
    [{}, {"quick_gelu": True}, {"vision": TANH, "text": TANH}, {"vision": {"image_size": [16, 32]}}],
    ids=["gelu", "quick_gelu", "gelu_tanh", "not square"],
)
def test_values_and_gradients_equal_the_definition(changes):
    config = tiny(**changes)
    model = lively(config)
    height, width = config.vision_cfg.image_hw
    image, text = torch.randn(5, 3, height, width, dtype=torch.float64), some_texts()

    hidden = {"visual": [], "text": []}
    for name, tower in (("visual", model.visual.transformer), ("text", model.transformer)):
        for block in tower.resblocks:
            block.register_forward_hook(lambda _m, _i, out, name=name: hidden[name].append(out))
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    image_features, text_features, image_hidden, text_hidden = definition(weights, config, image, text)
    features = model.encode_image(image), model.encode_text(text)

    close = {"rtol": 1e-10, "atol": 1e-10}  # float64 rounding, through five blocks
    assert_close(features[0], image_features, **close)
    assert_close(features[1], text_features, **close)
    for got, expected in zip(hidden["visual"], image_hidden, strict=True):
        assert_close(got, expected, **close)
    for got, expected in zip(hidden["text"], text_hidden, strict=True):
        assert_close(got, expected[:, : got.shape[1]], **close)

    out = model(image, text)
    scale = weights["logit_scale"].exp()
    unit = [x / x.norm(dim=1, keepdim=True) for x in (image_features, text_features)]
    assert_close(out["image_features"], unit[0], **close)
    assert_close(out["text_features"], unit[1], **close)
    ours = (out["logit_scale"] * out["image_features"] @ out["text_features"].T).log_softmax(1).diagonal().sum()
    theirs = (scale * unit[0] @ unit[1].T).log_softmax(1).diagonal().sum()
    expected = dict(zip(weights, torch.autograd.grad(theirs, list(weights.values())), strict=True))
    ours.backward()
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-10 * expected[name].norm(), name
        assert expected[name].norm() > 0, name


def test_the_activation_is_the_configs():
    gelu, quick, tanh = tiny(), tiny(quick_gelu=True), tiny(vision=TANH, text=TANH)
    state = lively(gelu).state_dict()
    features = []
    for config in (gelu, quick, tanh):
        model = build_clip(config).double()
        model.load_state_dict(state)
        features.append(torch.cat([model.encode_image(some_images()), model.encode_text(some_texts())]))
    assert (features[0] - features[1]).norm() > 1e-3 * features[0].norm()
    assert (features[0] - features[2]).norm() > 1e-6 * features[0].norm()


def test_pixels_and_normalised_images_give_the_same_features():
    config = tiny()
    model, image = lively(config), some_images()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (config.image_mean, config.image_std))
    assert_close(model.encode_image(image), model.encode_image((image.double() / 255 - mean) / std), rtol=0, atol=1e-10)


def test_pixels_are_normalised_with_the_configs_statistics():
    model, image = lively(tiny()), some_images()
    other = build_clip(
        ClipConfig.from_dict({**tiny().to_dict(), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    )
    other.double().load_state_dict(model.state_dict())
    assert_close(other.encode_image(image), model.encode_image(image.double() / 127.5 - 1), rtol=0, atol=1e-10)


# Text: causal, pooled at the end-of-text token.


def test_what_follows_the_end_changes_nothing():
    model, text = lively(tiny()), some_texts()
    end = text.argmax(-1)
    all_columns = model.tokens(text)  # nothing cut off
    after = torch.arange(LENGTH) > end[:, None]
    changed = model.tokens(torch.where(after, torch.ones_like(text), text))
    before = ~after[:, :, None].expand_as(changed)
    assert torch.equal(changed[before], all_columns[before])
    assert not torch.allclose(changed, all_columns)
    pooled = all_columns[torch.arange(len(text)), end] @ model.text_projection
    close = {"rtol": 0, "atol": 1e-12}
    assert_close(model.encode_text(text), pooled, **close)
    assert_close(model.encode_text(text[:, : int(end.max()) + 1]), pooled, **close)
    for row, stop in enumerate(end.tolist()):
        assert_close(model.encode_text(text[row : row + 1, : stop + 1])[0], pooled[row], **close)


def test_columns_after_the_last_end_are_never_computed():
    model, seen = lively(tiny()), []
    model.transformer.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    model.encode_text(some_texts((2, 4)))
    model.encode_text(some_texts((LENGTH - 1,)))
    assert seen == [5, LENGTH]


def test_every_token_up_to_the_end_counts():
    model, text = lively(tiny()), some_texts((6,))
    first = model.encode_text(text)
    for place in range(6):
        other = text.clone()
        other[0, place] = text[0, place] % (EOT - 1) + 1
        assert not torch.allclose(model.encode_text(other), first), place


# Initialisation.


def test_initialisation_is_openais():
    config = tiny(
        embed_dim=96,
        vision={"width": 128, "layers": 2, "image_size": 64},
        text={"width": 64, "layers": 6, "vocab_size": 500, "context_length": 80},
    )
    model = build_clip(config, seed=7)
    p = model.state_dict()

    def is_normal(name, std):
        x = p[name]
        # Five standard errors of a mean and of a standard deviation.
        assert abs(float(x.mean())) < 5 * std / x.numel() ** 0.5, name
        assert abs(float(x.std()) / std - 1) < 5 / (2 * x.numel()) ** 0.5, name
        assert float(x.abs().max()) > 2 * std, name  # a uniform of this deviation ends at 1.73

    def is_uniform(name, bound):
        x = p[name]
        assert float(x.abs().max()) <= bound, name
        assert float(x.abs().max()) > 0.9 * bound, name
        assert abs(float(x.std()) / (bound / 3**0.5) - 1) < 5 / (2 * x.numel()) ** 0.5, name

    is_normal("token_embedding.weight", 0.02)
    is_normal("positional_embedding", 0.01)
    is_normal("text_projection", 64**-0.5)
    for name in ("visual.class_embedding", "visual.positional_embedding", "visual.proj"):
        is_normal(name, 128**-0.5)
    is_uniform("visual.conv1.weight", (3 * 8 * 8) ** -0.5)
    for i in range(6):
        block = f"transformer.resblocks.{i}."
        is_normal(block + "attn.in_proj_weight", 64**-0.5)
        is_normal(block + "attn.out_proj.weight", 64**-0.5 * 12**-0.5)
        is_normal(block + "mlp.c_fc.weight", 128**-0.5)
        is_normal(block + "mlp.c_proj.weight", 64**-0.5 * 12**-0.5)
    for i in range(2):
        block = f"visual.transformer.resblocks.{i}."
        is_uniform(block + "attn.in_proj_weight", (6 / (128 + 3 * 128)) ** 0.5)
        is_uniform(block + "attn.out_proj.weight", 128**-0.5)
        is_uniform(block + "mlp.c_fc.weight", 128**-0.5)
        is_uniform(block + "mlp.c_proj.weight", 512**-0.5)
    for name in p:
        if re.search(r"in_proj_bias|out_proj\.bias|ln_\w+\.bias", name):
            assert not p[name].any(), name
        if re.search(r"ln_\w+\.weight", name):
            assert (p[name] == 1).all(), name
    assert p["logit_scale"].shape == ()
    assert float(p["logit_scale"].exp()) == pytest.approx(1 / 0.07)


def test_a_seed_gives_the_weights_and_disturbs_nothing():
    torch.manual_seed(11)
    expected = torch.randn(3)
    torch.manual_seed(11)
    first = build_clip(tiny(), seed=4).state_dict()
    assert torch.equal(torch.randn(3), expected)
    again, other = build_clip(tiny(), seed=4).state_dict(), build_clip(tiny(), seed=5).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["text_projection"], other["text_projection"])


def test_scale_and_bias_start_where_the_config_says():
    model = build_clip(tiny(init_logit_scale=2.5, init_logit_bias=-10))
    out = model(some_images(), some_texts())
    assert model.logit_scale.item() == 2.5
    assert out["logit_scale"].item() == pytest.approx(2.718281828459045**2.5)
    assert out["logit_bias"].item() == -10
    assert "logit_bias" in model.state_dict()
    assert set(build_clip(tiny())(some_images(), some_texts())) == {"image_features", "text_features", "logit_scale"}


# Names.

LINEARS = ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
BLOCK = ["attn.in_proj_weight", "attn.in_proj_bias"]
BLOCK += [f"{name}.{kind}" for name in ("ln_1", "ln_2", *LINEARS) for kind in ("weight", "bias")]


def test_state_dict_bears_open_clips_names_and_shapes():
    state = build_clip(tiny(vision={"layers": 1}, text={"layers": 1})).state_dict()
    outside_blocks = {
        "positional_embedding": (16, 32),
        "text_projection": (32, 20),
        "logit_scale": (),
        "visual.class_embedding": (48,),
        "visual.positional_embedding": (10, 48),
        "visual.proj": (48, 20),
        "visual.conv1.weight": (48, 3, 8, 8),
        "visual.ln_pre.weight": (48,),
        "visual.ln_pre.bias": (48,),
        "visual.ln_post.weight": (48,),
        "visual.ln_post.bias": (48,),
        "token_embedding.weight": (64, 32),
        "ln_final.weight": (32,),
        "ln_final.bias": (32,),
    }
    in_blocks = {f"{tower}.resblocks.0.{name}" for tower in ("visual.transformer", "transformer") for name in BLOCK}
    assert set(state) == set(outside_blocks) | in_blocks
    assert {name: tuple(state[name].shape) for name in outside_blocks} == outside_blocks
    assert state["transformer.resblocks.0.attn.in_proj_weight"].shape == (96, 32)
    assert state["visual.transformer.resblocks.0.mlp.c_proj.weight"].shape == (48, 192)


def test_no_weight_decay_names_parameters():
    model = build_clip(tiny())
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


# Ways to run it.


def test_compiles_in_one_graph():
    model = lively(tiny(init_logit_bias=-1.0), torch.float32)
    image, text = some_images(), some_texts()
    eager = model(image, text)
    sum(x.square().sum() + x.sum() for x in eager.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(image, text)
    for name, value in eager.items():
        assert_close(compiled[name], value, rtol=1e-5, atol=1e-5)
    sum(x.square().sum() + x.sum() for x in compiled.values()).backward()
    for name, p in model.named_parameters():
        assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-4)


def test_checkpointing_both_towers_changes_no_gradient():
    model, runs = lively(tiny()), []
    for tower in (model, model.visual):
        tower.transformer.resblocks[0].register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        out = model(some_images(), some_texts())
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        return torch.autograd.grad(logits.log_softmax(1).diagonal().sum(), list(model.parameters()))

    plain = gradients()
    assert len(runs) == 2
    model.set_grad_checkpointing()
    again = gradients()
    assert len(runs) == 2 + 4  # forward, and once more in the backward
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("how", ["autocast", "whole model"])
def test_bfloat16_is_near(how):
    exact = lively(tiny(quick_gelu=True))
    image, text = some_images(), some_texts()
    expected = torch.cat([exact.encode_image(image), exact.encode_text(text)])
    if how == "autocast":
        model = lively(tiny(quick_gelu=True), torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.cat([model.encode_image(image), model.encode_text(text)])
    else:
        model = lively(tiny(quick_gelu=True)).bfloat16()
        got = torch.cat([model.encode_image(image), model.encode_text(text)])
    assert got.dtype == torch.bfloat16
    # About 20 roundings in a row, each at most 2**-8 of the value, that add up like a random walk.
    assert (got.double() - expected).norm() < 20**0.5 * 2**-8 * expected.norm()


# Refusals.


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(2, 3, 24, 32), ShapeError, r"\[B, 3, 24, 24\].*got \(2, 3, 24, 32\).*Resize and crop to 24 x 24"),
        (torch.zeros(2, 24, 24, 3), ShapeError, r"got \(2, 24, 24, 3\).*channels first"),
        (torch.zeros(2, 1, 24, 24), ShapeError, r"got \(2, 1, 24, 24\)"),
        (torch.zeros(3, 24, 24), ShapeError, r"got \(3, 24, 24\)"),
        (torch.zeros(0, 3, 24, 24), ShapeError, r"B >= 1; got \(0, 3, 24, 24\)"),
        (torch.zeros(2, 3, 24, 24, dtype=torch.int64), DTypeError, r"uint8 in 0..255.*got torch.int64"),
    ],
)
def test_encode_image_refuses(image, error, message):
    with pytest.raises(error, match="(?s)encode_image: image must be.*" + message):
        build_clip(tiny()).encode_image(image)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (torch.ones(2, 17, dtype=torch.int64), ShapeError, r"at most 16 tokens; got \(2, 17\).*context_length=16"),
        (torch.ones(5, dtype=torch.int64), ShapeError, r"\[B, T\].*got \(5,\)"),
        (torch.ones(0, 5, dtype=torch.int64), ShapeError, r"B and T >= 1; got \(0, 5\)"),
        (torch.ones(2, 0, dtype=torch.int64), ShapeError, r"B and T >= 1; got \(2, 0\)"),
        (torch.ones(2, 5), DTypeError, r"int64 token ids; got torch.float32"),
        (torch.tensor([[1, 64]]), ValueError, r"\[0, 64\) \(vocab_size\); got 1..64"),
        (torch.tensor([[-1, 63]]), ValueError, r"got -1..63"),
    ],
)
def test_encode_text_refuses(text, error, message):
    with pytest.raises(error, match="(?s)encode_text: .*" + message):
        build_clip(tiny()).encode_text(text)
