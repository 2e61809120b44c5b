"""Llava against transformers' LlavaForConditionalGeneration: logits, loss, every gradient, answers; stages, parts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vlmfast.errors import DataError, ShapeError
from vlmfast.models import ClipConfig, build_clip
from vlmfast.models.decoder import DecoderConfig, build_decoder
from vlmfast.models.llava import LlavaConfig, build_llava, llava_from
from vlmfast.models.vit import VisionConfig
from vlmfast.models.weights import llava as names

V, IMAGE = 50, 47
VISION = VisionConfig(image_size=24, patch_size=8, layers=4, width=32, head_width=16, mlp_ratio=2)
TEXT = {
    "llama": DecoderConfig.llama(vocab_size=V, width=48, layers=2, heads=4, kv_heads=2, context_length=64),
    "qwen2": DecoderConfig.qwen2(vocab_size=V, width=48, layers=2, heads=4, kv_heads=2, context_length=64, tied=True),
}
CONFIG = LlavaConfig(VISION, TEXT["llama"], IMAGE)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")  # another library's


def ours(config):
    """A model whose tensors are large enough for every part to matter."""
    model = build_llava(config, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def theirs(transformers, model):
    """Transformers' model with the same weights."""
    config = transformers.LlavaConfig(**names.config_file(model.config))
    other = transformers.LlavaForConditionalGeneration(config).eval()
    state = {}
    for name, value in names.to_theirs(model.config, model.state_dict()).items():
        name = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "language_model.")
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
        state[name if name.startswith("lm_head.") else f"model.{name}"] = value
    if model.config.decoder.tied:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    other.load_state_dict(state)
    return other


def conversations(P):
    """Ids of four conversations, with 1, 2, 0 and 1 images, and how many of their first tokens are unsupervised."""
    place = [IMAGE] * P
    return [[1, *place, 5, 6, 7, 2], [1, 8, *place, 9, *place, 4, 3], [1, 11, 12, 13, 2], [*place, 6, 2]], [
        P + 2,
        5,
        2,
        P,
    ]


def batch(P):
    sequences, skipped = conversations(P)
    ids = [torch.tensor(sequence) for sequence in sequences]
    labels = [x.masked_fill((x == IMAGE) | (torch.arange(len(x)) < n), -100) for x, n in zip(ids, skipped, strict=True)]
    image = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    ends = torch.tensor([0, *map(len, ids)]).cumsum(0, dtype=torch.int32)
    return ids, labels, image, [image[:1], image[1:3], image[:0], image[3:]], ends


def pixels(model, image):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.image_mean, model.image_std))
    return (image / 255 - mean) / std


def their_output(other, model, ids, image, labels=None):
    """One conversation alone in transformers' model."""
    given = {"pixel_values": pixels(model, image)} if len(image) else {}
    return other(input_ids=ids[None], labels=None if labels is None else labels[None], **given)


VARIANTS = {
    "1.5": {},
    "qwen2, tied": {"decoder": TEXT["qwen2"]},
    "full, last layer": {"select": "full", "feature_layer": -1, "activation": "gelu"},
    "layer 2, no bias": {"feature_layer": 2, "projector_bias": False},
    "1, linear": {"projector": "linear"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_logits_loss_and_every_gradient_equal_transformers(transformers, variant, tower):
    model = ours(replace(CONFIG, **VARIANTS[variant]))
    model.freeze(tower=tower == "frozen")
    other = theirs(transformers, model)
    ids, labels, image, images, ends = batch(model.image_tokens)

    x = model.embed(torch.cat(ids), image)
    x.retain_grad()
    logits = model.decoder.logits(model.decoder(x, cu_seqlens=ends)).split([len(part) for part in ids])
    loss = model(torch.cat(ids), image, torch.cat(labels), ends)
    loss.backward()

    count = sum(int((part[1:] != -100).sum()) for part in labels)
    total = 0.0
    for part, label, pictures, mine in zip(ids, labels, images, logits, strict=True):
        out = their_output(other, model, part, pictures, label)
        assert_close(mine, out.logits[0], rtol=1e-4, atol=1e-5)
        total = total + out.loss * int((label[1:] != -100).sum()) / count
    assert_close(loss, total, rtol=1e-5, atol=1e-6)
    total.backward()

    their_grads = {name: p.grad for name, p in other.named_parameters()}
    checked = set()
    for name, expected in gradients_under_our_names(model, their_grads).items():
        p = model.get_parameter(name)
        if not p.requires_grad:
            continue
        checked.add(name.partition(".")[0])
        got = torch.zeros_like(p) if p.grad is None else p.grad
        # The embedding of the image token is read by transformers and then overwritten: zero in both.
        assert_close(got, expected, rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert checked == {"multi_modal_projector", "decoder"} | ({"vision_tower"} if tower == "trained" else set())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if tower == "frozen":
        assert all(p.grad is None for p in model.vision_tower.parameters())


def gradients_under_our_names(model, grads):
    """Transformers' gradients, of every tensor that has one, zeros elsewhere; the projector's identity left out."""
    plain = {}
    built = model.state_dict()
    for name, expected in names.to_theirs(model.config, built).items():
        key = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "language_model.")
        key = key.replace("vision_tower.vision_model.", "vision_tower.")
        grad = grads.get(key if key.startswith("lm_head.") else f"model.{key}")
        plain[name] = torch.zeros_like(expected) if grad is None else grad
    if model.config.projector == "linear":
        plain = {name: value for name, value in plain.items() if ".linear_2." not in name}
    return names.to_ours(model.config, plain, built, "gradients")


def test_gradient_of_image_features_equals_transformers(transformers):
    model = ours(CONFIG)
    other = theirs(transformers, model)
    ids, labels, _, images, _ = batch(model.image_tokens)
    ends = torch.tensor([0, len(ids[1])], dtype=torch.int32)
    kept = {}
    model.multi_modal_projector.register_forward_hook(lambda _m, _a, out: (out.retain_grad(), kept.update(ours=out))[0])
    other.model.multi_modal_projector.register_forward_hook(
        lambda _m, _a, out: (out.retain_grad(), kept.update(theirs=out))[0]
    )
    model(ids[1], images[1], labels[1], ends).backward()
    their_output(other, model, ids[1], images[1], labels[1]).loss.backward()
    assert kept["ours"].grad.abs().max() > 1e-3
    assert_close(kept["ours"].grad, kept["theirs"].grad, rtol=1e-4, atol=1e-6)


def test_linear_projector_equals_its_formula():
    model = ours(replace(CONFIG, projector="linear"))
    image = batch(model.image_tokens)[2]
    hidden = model.vision_tower.ln_pre(
        model.vision_tower.conv1(image, model.vision_tower.class_embedding, model.vision_tower.positional_embedding)
    )
    for block in model.vision_tower.transformer.resblocks[:3]:  # of four
        hidden = block(hidden)
    linear = model.multi_modal_projector.linear_1
    assert_close(model.encode_image(image), hidden[:, 1:] @ linear.weight.T + linear.bias)


@pytest.mark.parametrize("text", TEXT)
def test_greedy_answers_and_their_likelihoods_equal_transformers(transformers, text):
    model = ours(replace(CONFIG, decoder=TEXT[text]))
    with torch.no_grad():
        model.decoder.head_weight.mul_(5)  # so that no two tokens are nearly as likely
    other = theirs(transformers, model)
    ids, _, _, images, _ = batch(model.image_tokens)
    mine = model.generate(ids, images, max_new_tokens=8, eos=(2,), suppress=())
    scores = model.score(ids, images, [[generation.tokens] if len(generation.tokens) else [] for generation in mine])
    for part, pictures, generation, score in zip(ids, images, mine, scores, strict=True):
        given = {"pixel_values": pixels(model, pictures)} if len(pictures) else {}
        out = other.generate(
            input_ids=part[None],
            attention_mask=torch.ones_like(part)[None],
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **given,
        )
        tokens = out.sequences[0, len(part) :]
        assert torch.equal(generation.tokens, tokens[tokens != 2])
        nats = torch.stack([logits[0].float().log_softmax(-1) for logits in out.logits]).gather(1, tokens[:, None])[
            :, 0
        ]
        assert_close(generation.log_probs, nats, rtol=1e-4, atol=1e-4)
        if len(generation.tokens):
            assert_close(score[0], nats[: len(generation.tokens)].sum(), rtol=1e-4, atol=1e-4)


def test_blocks_behind_the_feature_layer_never_run():
    model = ours(CONFIG)
    ran = []
    for i, block in enumerate(model.vision_tower.transformer.resblocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.vision_tower.ln_post.register_forward_hook(lambda *_: ran.append("ln_post"))
    model.encode_image(batch(1)[2])
    assert ran == [0, 1, 2]


def trained(model):
    return {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_each_stage_changes_its_parts_alone():
    model = build_llava(CONFIG, seed=0)
    ids, labels, image, _, ends = batch(model.image_tokens)
    assert trained(model) == {"multi_modal_projector", "decoder"}  # the tower is frozen at first
    for stage, parts in [
        ({"decoder": True}, {"multi_modal_projector"}),
        ({}, {"multi_modal_projector", "decoder"}),
        ({"tower": False}, {"multi_modal_projector", "decoder", "vision_tower"}),
        ({"projector": True}, {"decoder"}),
    ]:
        model.freeze(**stage)
        assert trained(model) == parts
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(torch.cat(ids), image, torch.cat(labels), ends).backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {name.partition(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == parts
    unused = [*model.vision_tower.transformer.resblocks[3:].parameters(), *model.vision_tower.ln_post.parameters()]
    model.freeze(tower=False)
    assert not any(p.requires_grad for p in unused)


@pytest.mark.parametrize("stage", [{"decoder": True}, {}, {"tower": False}])
def test_text_alone_gives_every_trained_parameter_a_gradient(stage):
    model = build_llava(CONFIG, seed=0)
    model.freeze(**stage)
    ids, labels, image, _, _ = batch(model.image_tokens)
    ends = torch.tensor([0, len(ids[2])], dtype=torch.int32)
    model(ids[2], image[:0], labels[2], ends).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not any(p.grad.any() for p in model.multi_modal_projector.parameters())


def test_no_graph_is_kept_through_a_frozen_tower():
    model = build_llava(CONFIG, seed=0)
    seen = []
    model.multi_modal_projector.register_forward_pre_hook(lambda _m, args: seen.append(args[0].requires_grad))
    image = batch(1)[2]
    model.encode_image(image)
    model.freeze(tower=False)
    model.encode_image(image)
    assert seen == [False, True]


def test_put_together_from_a_clip_and_a_decoder():
    clip = build_clip(ClipConfig(embed_dim=16, vision_cfg=VISION, quick_gelu=True, image_mean=(0.1, 0.2, 0.3)), seed=0)
    decoder = build_decoder(TEXT["llama"], seed=1)
    model = llava_from(clip, decoder, image_token_id=V, feature_layer=-3, projector="linear", aspect="square", seed=2)
    assert model.config.activation == "quick_gelu"
    assert model.image_mean == (0.1, 0.2, 0.3)
    assert model.config.blocks == 2
    assert model.aspect == "square"
    assert model.decoder.config.vocab_size == V + 1
    for name in ("embed_tokens", "lm_head"):
        old, new = decoder.get_submodule(name).weight, model.decoder.get_submodule(name).weight
        assert torch.equal(new[:V], old)
        assert_close(new[V], old.mean(0))
    image = batch(1)[2]
    assert_close(model.vision_tower.tokens(image), clip.visual.tokens(image))
    with torch.no_grad():
        model.decoder.norm.weight.zero_()
    assert decoder.norm.weight.all()  # a copy
    kept = llava_from(clip, decoder, image_token_id=3, seed=2)
    assert kept.decoder.config == decoder.config
    ids = torch.tensor([1, 2, 4])
    assert_close(kept.decoder(kept.decoder.embed(ids)[None]), decoder(decoder.embed(ids)[None]))
    with pytest.raises(ShapeError, match="image_token_id must be in the decoder's vocabulary of 50; got 51"):
        llava_from(clip, decoder, image_token_id=V + 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"vision": replace(VISION, pool_type="map")},
            "must be a ViT with a class token; got one that is pooled by 'map'",
        ),
        ({"vision": VisionConfig(image_size=64, layers=(1, 1, 1, 1), width=8)}, "got one that is a ResNet"),
        ({"decoder": DecoderConfig.gpt2(vocab_size=V, width=48, layers=1, heads=4, context_length=8)}, "got GPT-2"),
        ({"projector": "mlp3x"}, "projector must be one of linear, mlp2x_gelu; got 'mlp3x'"),
        ({"select": "cls"}, "select must be one of default, full; got 'cls'"),
        ({"activation": "relu"}, "activation must be one of .*; got 'relu'"),
        ({"feature_layer": -6}, r"feature_layer must be in -5 .. 4, as the image tower has 4 blocks; got -6"),
    ],
)
def test_configs_that_make_no_model_are_refused(change, match):
    with pytest.raises((DataError, ShapeError), match=match):
        replace(CONFIG, **change)


def test_gelu_between_the_projector_s_maps_is_the_exact_one():
    model = ours(CONFIG)
    projector = model.multi_modal_projector
    x = torch.linspace(-4, 4, 64).view(2, 32)
    z = x @ projector.linear_1.weight.T + projector.linear_1.bias
    expected = F.linear(0.5 * z * (1 + torch.erf(z / 2**0.5)), projector.linear_2.weight, projector.linear_2.bias)
    assert_close(projector(x), expected, rtol=1e-5, atol=1e-6)
