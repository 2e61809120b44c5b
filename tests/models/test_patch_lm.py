"""PatchLm against a plain restatement: loss and every gradient, both stems, causal and prefix-LM; configs and disk."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vlmfast.errors import DataError, ShapeError
from vlmfast.models.decoder import DecoderConfig
from vlmfast.models.patch_lm import PatchLm, PatchLmConfig, build_patch_lm
from vlmfast.models.weights.vlm import load_vlm, save_vlm

V, IMAGE = 30, 29
TEXT = DecoderConfig.llama(vocab_size=V, width=24, layers=2, heads=4, kv_heads=2, context_length=64)
CONFIG = PatchLmConfig(TEXT, IMAGE, image_size=(8, 16), patch_size=4, image_mean=(0.4, 0.5, 0.6))
PLACE = [IMAGE] * 8
SEQUENCES = [[1, *PLACE, 2, 3, 4], [5, 6, 7], [*PLACE, 8, *PLACE, 9, 10]]
PREFIX = [10, 2, 18]


def norm(x, weight):
    return x * (x.pow(2).mean(-1, keepdim=True) + TEXT.eps).rsqrt() * weight


def turned(x):
    """Rope of [T, H, K]."""
    T, _, K = x.shape
    angle = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(0, K, 2) / K)
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def plain_logits(config, w, ids, image, prefix):
    """[T, V] of one sequence, from the tensors by name."""
    x = (image.double() / 255 - torch.tensor(config.image_mean).view(3, 1, 1)) / 0.5
    if config.stem == "patch":
        x = F.conv2d(x, w["stem.weight"], w["stem.bias"], stride=4)
    else:
        for i in (0, 2):
            x = F.gelu(F.conv2d(x, w[f"stem.convs.{i}.weight"], w[f"stem.convs.{i}.bias"], stride=2, padding=1))
        x = F.conv2d(x, w["stem.convs.4.weight"], w["stem.convs.4.bias"])
    features = x.flatten(2).transpose(1, 2) + w["positions"]  # [N, P, C]
    h = w["decoder.embed_tokens.weight"][ids]
    h = h.masked_scatter((ids == IMAGE)[:, None], features)
    T = len(ids)
    sees = torch.ones(T, T).tril().bool()
    sees[:prefix, :prefix] = True
    for i in range(TEXT.layers):
        p = {name.removeprefix(f"decoder.layers.{i}."): value for name, value in w.items()}
        x = norm(h, p["input_layernorm.weight"])
        q, k, v = ((x @ p[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, 6)) for n in "qkv")
        q, k, v = turned(q), turned(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.einsum("thk,shk->hts", q, k) / 6**0.5
        mixed = torch.einsum("hts,shk->thk", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)
        h = h + mixed.flatten(1) @ p["self_attn.o_proj.weight"].T
        x = norm(h, p["post_attention_layernorm.weight"])
        gate, up = (x @ p[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        h = h + (F.silu(gate) * up) @ p["mlp.down_proj.weight"].T
    return norm(h, w["decoder.norm.weight"]) @ w["decoder.lm_head.weight"].T


def batch():
    ids = torch.cat([torch.tensor(sequence) for sequence in SEQUENCES])
    image = torch.randint(0, 256, (3, 3, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([0, *map(len, SEQUENCES)]).cumsum(0, dtype=torch.int32)
    labels = torch.full_like(ids, -100)
    for start, end, prefix in zip(ends[:-1].tolist(), ends[1:].tolist(), PREFIX, strict=True):
        labels[start + prefix : end] = ids[start + prefix : end]
    return ids, image, labels, ends


def lively(config):
    """A model in float64 whose tensors are large enough for every part to matter."""
    model = build_patch_lm(config, seed=0).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    return model


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("prefix_lm", [False, True])
def test_loss_and_every_gradient_equal_the_plain_ones(stem, prefix_lm):
    config = replace(CONFIG, stem=stem, prefix_lm=prefix_lm)
    model = lively(config)
    ids, image, labels, ends = batch()
    loss = model(ids, image, labels, ends, prefix=torch.tensor(PREFIX))
    loss.backward()

    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    terms = []
    images = iter(image.split([1, 0, 2]))
    for start, end, prefix in zip(ends[:-1].tolist(), ends[1:].tolist(), PREFIX, strict=True):
        logits = plain_logits(config, w, ids[start:end], next(images), prefix if prefix_lm else 0)
        terms.append(F.cross_entropy(logits[:-1], labels[start + 1 : end], reduction="sum"))
    expected = sum(terms) / (labels != -100).sum()
    expected.backward()

    close = {"rtol": 1e-5, "atol": 1e-7}  # rope's angles are float32
    assert_close(loss, expected, **close)
    assert w["positions"].grad.abs().max() > 1e-4
    for name, p in model.named_parameters():
        assert_close(p.grad, w[name].grad, msg=lambda text, name=name: f"{name}: {text}", **close)


def test_the_prefix_sees_itself_whole_and_no_answer_does():
    ids, image, labels, ends = batch()
    for prefix_lm in (False, True):
        model = lively(replace(CONFIG, prefix_lm=prefix_lm))
        x = model.embed(ids, image).detach().requires_grad_()
        hidden = model.decoder(x, cu_seqlens=ends, prefix=torch.tensor(PREFIX) if prefix_lm else None)
        (early,) = torch.autograd.grad(hidden[2].sum(), x, retain_graph=True)  # a patch of the first sequence
        assert early[9].any() == prefix_lm  # the last token of its prefix
        assert not early[10:].any()
        (late,) = torch.autograd.grad(hidden[10].sum(), x)
        assert late[:11].any(1).all()
        assert not late[11:].any()
    assert_close(
        lively(CONFIG)(ids, image, labels, ends, prefix=torch.tensor(PREFIX)), lively(CONFIG)(ids, image, labels, ends)
    )


def test_a_prefix_lm_needs_a_prefix_that_leaves_the_answer_out():
    model = lively(replace(CONFIG, prefix_lm=True))
    parts = batch()
    with pytest.raises(ShapeError, match=r"a prefix-LM needs prefix \[B\], B = 3.*got None"):
        model(*parts)
    with pytest.raises(ShapeError, match=r"got \(2,\)"):
        model(*parts, prefix=torch.tensor([1, 2]))
    for wrong, sequence in (([10, 3, 18], 1), ([10, 2, 20], 2), ([-1, 2, 18], 0)):
        with pytest.raises(ShapeError, match=f"the prefix of sequence {sequence}, .* must end before the first superv"):
            model(*parts, prefix=torch.tensor(wrong))
    unsupervised = parts[2].clone().fill_(-100)
    assert model(parts[0], parts[1], unsupervised, parts[3], prefix=torch.tensor([12, 3, 19])) == 0


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_float_images_are_taken_as_normalised(stem):
    model = lively(replace(CONFIG, stem=stem)).float()
    image = batch()[1]
    normalised = (image / 255 - torch.tensor(CONFIG.image_mean).view(3, 1, 1)) / 0.5
    assert_close(model.encode_image(image), model.encode_image(normalised), rtol=1e-4, atol=1e-4)
    with pytest.raises(ShapeError, match=r"image must be \[B, 3, 8, 16\]"):
        model.encode_image(normalised[:, :, :, :8])


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_weights_of_any_precision_take_any_pixels(stem):
    image = batch()[1]
    normalised = (image / 255 - torch.tensor(CONFIG.image_mean).view(3, 1, 1)) / 0.5
    exact = lively(replace(CONFIG, stem=stem)).double().encode_image(image)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = lively(replace(CONFIG, stem=stem)).to(dtype)
        for pixels in (image, normalised):
            features = model.encode_image(pixels)
            assert features.dtype == dtype
            assert (features - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("patch_size", [2, 8, 16])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_both_stems_make_one_grid(stem, patch_size):
    model = build_patch_lm(replace(CONFIG, stem=stem, image_size=(16, 32), patch_size=patch_size), seed=0)
    rows, columns = 16 // patch_size, 32 // patch_size
    assert model.image_tokens == rows * columns
    image = torch.zeros(1, 3, 16, 32)
    before = model.encode_image(image)
    assert before.shape == (1, rows * columns, 24)
    image[:, :, -1, -1] = 5.0  # the last patch's last pixel
    moved = (model.encode_image(image) != before).any(-1)[0]
    assert moved[-1]
    assert not moved[: -columns - 2].any()


def test_at_first_images_tell_apart_what_they_show():
    for stem in ("patch", "conv"):
        model = build_patch_lm(replace(CONFIG, stem=stem, image_size=64, patch_size=8), seed=0)
        image = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        features = model.encode_image(image.repeat_interleave(8, 2).repeat_interleave(8, 3))
        assert features.std(0).mean() > 0.5 * features.mean(0).std(), stem


def test_a_seed_decides_all_weights_and_leaves_the_generator():
    state = torch.get_rng_state()
    a, b, other = (build_patch_lm(replace(CONFIG, stem="conv"), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.positions, other.positions)
    assert a.no_weight_decay() <= {name for name, _ in a.named_parameters()}


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_saved_and_loaded_bit_for_bit(tmp_path, stem):
    model = build_patch_lm(replace(CONFIG, stem=stem, prefix_lm=True, aspect="pad"), seed=0)
    (tmp_path / "words.json").write_text("{}")
    folder = save_vlm(model, tmp_path / "model", {"tokenizer.json": tmp_path / "words.json"})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads(json.dumps(model.describe()))
    assert config["model_type"] == "vlmfast_patch_lm"
    loaded = load_vlm(folder)
    assert isinstance(loaded, PatchLm)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert all(p.requires_grad for p in loaded.parameters())
    half = load_vlm(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(DataError, match="is not an empty folder"):
        save_vlm(model, folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stem": "mlp"}, "stem must be one of patch, conv; got 'mlp'"),
        ({"image_size": 10}, "image_size 10 must be a multiple of patch_size 4"),
        ({"patch_size": 0}, "must be a multiple of patch_size 0, at least 1"),
        ({"stem": "conv", "patch_size": 1}, "with stem 'conv' patch_size must be 2, 4, 8 ...; got 1"),
        ({"stem": "conv", "patch_size": 3, "image_size": 9}, "patch_size must be 2, 4, 8 ...; got 3"),
    ],
)
def test_configs_that_make_no_model_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        replace(CONFIG, **change)


def test_other_folders_are_refused_by_name(tmp_path):
    folder = save_vlm(build_patch_lm(CONFIG, seed=0), tmp_path / "model")
    path = folder / "config.json"
    good = json.loads(path.read_text())

    def refused(match, **changes):
        config = {key: value for key, value in {**good, **changes}.items() if value is not None}
        path.write_text(json.dumps(config))
        with pytest.raises(DataError, match=match):
            load_vlm(folder)

    refused("model_type 'llama' is no vision-language model", model_type="llama")
    refused("unknown: colour. Known: .*patch_size", colour=3)
    refused("image_token_id missing", image_token_id=None)
    refused(r"missing or unknown fields", decoder={**good["decoder"], "depth": 3})
    refused(r"1 of another shape: positions is \[8, 24\], not \[32, 24\]", image_size=(16, 32))
    (folder / "model.safetensors").unlink()
    refused("holds no weights")
