"""Decoders against transformers' own, packed against alone, and all that a call may leave out against all of it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vlmfast.errors import DataError, DTypeError, ShapeError
from vlmfast.models.cache import KvCache
from vlmfast.models.decoder import DecoderConfig, build_decoder
from vlmfast.models.weights.decoder import config_to_hf, to_theirs

V, CONTEXT = 61, 32
SIZES = {"vocab_size": V, "width": 24, "layers": 3, "heads": 4, "context_length": CONTEXT}
FAMILIES = {
    "gpt2": DecoderConfig.gpt2(**SIZES),
    "llama": DecoderConfig.llama(**SIZES, kv_heads=2, head_width=10, mlp_width=40),
    "qwen2": DecoderConfig.qwen2(**SIZES, kv_heads=1, mlp_width=40, tied=True),
}
EXACT64 = {"rtol": 1e-9, "atol": 1e-11}  # float64 rounding through three blocks
LENGTHS = (9, 1, 17, 0, 9, 5)
CU_SEQLENS = torch.tensor((0, *LENGTHS)).cumsum(0).int()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def config(request):
    return FAMILIES[request.param]


def lively(config, dtype=torch.float64):
    """A decoder in which every tensor matters: biases are not 0, gains not 1."""
    decoder = build_decoder(config)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.2)
    return decoder.to(dtype).eval()


def their_model(transformers, decoder, attention):
    """The model of transformers with the decoder's weights."""
    content = config_to_hf(decoder.config)
    theirs = transformers.AutoConfig.for_model(content.pop("model_type"), **content)
    model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation=attention)
    model = model.to(decoder.head_weight.dtype).eval()
    missing, unknown = model.load_state_dict(to_theirs(decoder.config, decoder.state_dict()), strict=False)
    assert not unknown
    assert missing == ["lm_head.weight"] * decoder.config.tied
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # Theirs rounds to float32 in a float64 model.
            module.forward = lambda x, m=module: F.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
    return model


def gradients(decoder):
    """Every gradient by name; of a decoder that was given gradients for all."""
    found = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    assert all(grad is not None and grad.any() for grad in found.values())
    decoder.zero_grad()
    return found


def assert_same_gradients(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(found[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize(
    ("dtype", "attention", "tolerance"),
    [
        (torch.float64, "sdpa", EXACT64),
        (torch.float32, "eager", {"rtol": 1e-4, "atol": 2e-5}),  # logits of size 10, 2**-24 each, some 10 sums deep
    ],
    ids=["float64", "float32"],
)
def test_equals_transformers(transformers, config, dtype, attention, tolerance):
    decoder = lively(config, dtype)
    theirs = their_model(transformers, decoder, attention)
    ids = torch.randint(V, (3, 19))
    labels = torch.where(torch.rand(3, 19) < 0.7, ids, -100)
    expected = theirs(ids, labels=labels)
    expected.loss.backward()

    hidden = decoder(decoder.embed(ids))
    loss = decoder.loss(hidden[:, :-1], labels[:, 1:])
    loss.backward()
    assert_close(decoder.logits(hidden), expected.logits, **tolerance)
    assert_close(loss, expected.loss.to(loss.dtype), rtol=1e-5, atol=1e-6)  # theirs is computed in float32
    names = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = to_theirs(config, gradients(decoder))
    # Their float32 loss rounds gradients, too: all of them are of size 1e-2 and larger.
    assert_same_gradients(found, {name: names[name] for name in found}, rtol=1e-4, atol=1e-5)
    assert names.keys() - found.keys() <= {"lm_head.weight"}


@pytest.mark.filterwarnings("ignore")
def test_float64_gradients_equal_transformers(transformers, config):
    decoder = lively(config)
    theirs = their_model(transformers, decoder, "sdpa")
    ids, weight = torch.randint(V, (3, 19)), torch.randn(3, 19, V, dtype=torch.float64)
    (theirs(ids).logits * weight).sum().backward()
    (decoder.logits(decoder(decoder.embed(ids))) * weight).sum().backward()
    names = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = to_theirs(config, gradients(decoder))
    assert_same_gradients(found, {name: names[name] for name in found}, rtol=1e-9, atol=1e-9)


def alone(decoder, x, **options):
    """The hidden states of packed sequences, each in a call of its own."""
    parts = []
    for b, (start, stop) in enumerate(zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True)):
        if stop > start:
            own = {name: value[b : b + 1] for name, value in options.items()}
            parts.append(decoder(x[None, start:stop], **own)[0])
    return torch.cat(parts)


@pytest.mark.parametrize("prefix", [None, (3, 1, 17, 0, 0, 40)], ids=["causal", "prefix"])
def test_packed_sequences_are_what_each_is_alone(config, prefix):
    decoder = lively(config)
    ids, weight = torch.randint(V, (sum(LENGTHS),)), torch.randn(sum(LENGTHS), config.width, dtype=torch.float64)
    options = {} if prefix is None else {"prefix": torch.tensor(prefix)}
    expected = alone(decoder, decoder.embed(ids), **options)
    (expected * weight).sum().backward()
    expected_gradients = {name: p.grad for name, p in decoder.named_parameters() if name != "lm_head.weight"}
    decoder.zero_grad()
    found = decoder(decoder.embed(ids), cu_seqlens=CU_SEQLENS, **options)
    (found * weight).sum().backward()
    assert_close(found, expected, **EXACT64)
    for name, grad in expected_gradients.items():
        assert_close(decoder.get_parameter(name).grad, grad, rtol=1e-9, atol=1e-9)
    again = decoder(decoder.embed(ids), cu_seqlens=CU_SEQLENS, max_seqlen=20, **options)  # not the longest, a bound
    assert torch.equal(again, found)


@pytest.mark.filterwarnings("ignore")
def test_a_prefix_is_the_mask_that_it_says(transformers, config):
    decoder = lively(config)
    theirs = their_model(transformers, decoder, "sdpa")
    T, prefix = 12, torch.tensor([0, 1, 5, 12])
    ids, weight = torch.randint(V, (4, T)), torch.randn(4, T, V, dtype=torch.float64)
    seen = torch.zeros(4, 1, T, T, dtype=torch.bool)
    for b, length in enumerate(prefix.tolist()):
        for query in range(T):
            for key in range(T):
                seen[b, 0, query, key] = key <= query or (query < length and key < length)
    expected = theirs(ids, attention_mask=seen).logits
    (expected * weight).sum().backward()
    found = decoder.logits(decoder(decoder.embed(ids), prefix=prefix))
    (found * weight).sum().backward()
    assert_close(found, expected, **EXACT64)
    names = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = to_theirs(config, gradients(decoder))
    assert_same_gradients(found, {name: names[name] for name in found}, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_wanted_rows_are_rows_of_all(config, packed, prefix):
    decoder = lively(config)
    x = decoder.embed(torch.randint(V, (sum(LENGTHS),)))
    x, options = (x, {"cu_seqlens": CU_SEQLENS}) if packed else (x.view(1, -1, config.width)[:, :CONTEXT], {})
    B = len(LENGTHS) if packed else 1
    options |= {"prefix": torch.full((B,), 4)} if prefix else {}
    rows = torch.tensor([30, 2, 2, 9])
    weight = torch.randn(4, config.width, dtype=torch.float64)
    expected = decoder(x, **options).flatten(0, -2)[rows]
    (expected * weight).sum().backward(retain_graph=True)
    expected_gradients = {name: p.grad for name, p in decoder.named_parameters() if name != "lm_head.weight"}
    decoder.zero_grad()
    found = decoder(x, rows=rows, **options)
    (found * weight).sum().backward()
    assert_close(found, expected, **EXACT64)
    for name, grad in expected_gradients.items():
        assert_close(decoder.get_parameter(name).grad, grad, rtol=1e-9, atol=1e-9)


def test_unwanted_rows_are_spared_the_last_perceptron():
    decoder = lively(FAMILIES["llama"])
    seen = [[], [], []]
    for block, sizes in zip(decoder.layers, seen, strict=True):
        block.mlp.register_forward_hook(lambda module, args, out, sizes=sizes: sizes.append(len(args[0])))
    decoder(decoder.embed(torch.randint(V, (2, 8))), rows=torch.tensor([7, 15]))
    assert seen == [[16], [16], [2]]


def test_checkpointing_runs_blocks_twice_and_changes_no_gradient(config):
    decoder = lively(config)
    x = decoder.embed(torch.randint(V, (sum(LENGTHS),))).detach()
    options = {"cu_seqlens": CU_SEQLENS, "prefix": torch.tensor([2] * len(LENGTHS)), "rows": torch.tensor([1, 30])}
    labels = torch.tensor([3, 4])
    calls = []
    decoder.layers[1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for enable in (False, True):
        decoder.set_grad_checkpointing(enable)
        decoder.loss(decoder(x, **options), labels).backward()
        found.append({name: p.grad for name, p in decoder.named_parameters() if "embed" not in name})
        decoder.zero_grad()
    assert len(calls) == 3
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


def test_the_loss_is_cross_entropy_of_the_logits(config):
    decoder = lively(config)
    hidden = decoder(decoder.embed(torch.randint(V, (2, 7))))
    labels = torch.randint(V, (2, 7))
    labels[0, :5] = -100
    z = decoder.logits(hidden).flatten(0, 1)
    each = F.cross_entropy(z, labels.flatten(), reduction="none").view(2, 7)
    assert_close(decoder.loss(hidden, labels), each.sum() / 9, **EXACT64)
    assert_close(decoder.loss(hidden, labels, reduction="none"), each, **EXACT64)
    assert_close(decoder.loss(hidden, labels, num_supervised=20), each.sum() / 20, **EXACT64)


def test_no_supervised_token_gives_every_parameter_a_zero_gradient(config):
    decoder = lively(config)
    hidden = decoder(decoder.embed(torch.randint(V, (2, 7))))
    decoder.loss(hidden, torch.full((2, 7), -100)).backward()
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_positions_are_those_that_are_given(config):
    decoder = lively(config)
    x = decoder.embed(torch.randint(V, (2, 6)))
    assert torch.equal(decoder(x, positions=torch.arange(6).expand(2, 6)), decoder(x))
    moved = decoder(x, positions=torch.arange(3, 9).expand(2, 6))
    if config.positions == "rope":
        # Only differences of positions reach the scores; their angles are float32.
        assert_close(moved, decoder(x), rtol=1e-4, atol=1e-5)
        moved = decoder(x, positions=torch.arange(6).flip(0).expand(2, 6))
    assert not torch.allclose(moved, decoder(x), rtol=1e-2)


def test_low_precision_is_near(config):
    decoder = lively(config, torch.float32)
    ids = torch.randint(V, (2, 16))
    expected = decoder.logits(decoder(decoder.embed(ids)))
    size = expected.abs().max().item()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = decoder.logits(decoder(decoder.embed(ids)))
    low = decoder.bfloat16()
    whole = low.logits(low(low.embed(ids)))
    for found in (mixed, whole):
        assert found.dtype == torch.bfloat16
        assert_close(found.float(), expected, rtol=0, atol=size * 2**-4)  # 2**-9 a rounding, some 30 on the way


def test_a_seed_decides_the_weights_as_gpt2_draws_them(config):
    before = torch.random.get_rng_state()
    first, second = build_decoder(config, seed=3), build_decoder(config, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
        if "norm" in name or name.endswith("bias"):
            assert (parameter == float(name.endswith("weight"))).all(), name
            continue
        onto_stream = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
        std = 0.02 / math.sqrt(2 * config.layers) if onto_stream else 0.02
        assert abs(parameter.std() / std - 1) < 4 / math.sqrt(2 * parameter.numel()), name  # four deviations


def test_tied_decoders_have_one_matrix():
    tied, own = build_decoder(FAMILIES["qwen2"]), build_decoder(FAMILIES["llama"])
    assert tied.head_weight is tied.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()
    assert own.head_weight is own.lm_head.weight


def test_a_config_survives_json(config):
    content = json.loads(json.dumps(config.to_dict()))
    assert DecoderConfig.from_dict(content) == config
    with pytest.raises(DataError, match=r"missing or unknown fields: dropout, width"):
        DecoderConfig.from_dict({**{k: v for k, v in content.items() if k != "width"}, "dropout": 0.1})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": 0}, ShapeError, r"at least 1; got layers 0"),
        ({"heads": 0}, ShapeError, r"at least 1; got heads 0"),
        ({"kv_heads": 3}, ShapeError, r"kv_heads 3 must divide heads 4"),
        ({"head_width": 5}, ShapeError, r"head_width must be even; got 5"),
        ({"norm": "batch"}, DataError, r"norm must be one of rms, layer; got 'batch'"),
        ({"positions": "alibi"}, DataError, r"positions must be one of rope, learned; got 'alibi'"),
        ({"activation": "relu"}, DataError, r"activation must be one of .*silu; got 'relu'"),
        ({"gated": False}, DataError, r"bias must be True where gated is False"),
    ],
)
def test_configs_that_are_no_decoder(change, error, message):
    with pytest.raises(error, match=message):
        DecoderConfig.llama(**{**SIZES, **change})


@pytest.mark.parametrize("family", [DecoderConfig.llama, DecoderConfig.qwen2, DecoderConfig.gpt2])
def test_missing_sizes_are_named(family):
    with pytest.raises(DataError, match=r"DecoderConfig: missing sizes: width, heads$"):
        family(**{name: size for name, size in SIZES.items() if name not in ("width", "heads")})


def test_what_does_not_fit_is_named(config):
    decoder = lively(config)
    x = decoder.embed(torch.zeros(2, 6, dtype=torch.int64))
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)
    filled = KvCache(config, 2, CONTEXT, dtype=torch.float64)
    decoder(x, cache=filled)
    for call, error, message in [
        (lambda: decoder(x[0]), ShapeError, r"x must be \[B, T, C\], C = 24; got \(6, 24\)"),
        (lambda: decoder(x, cu_seqlens=ends), ShapeError, r"x must be \[tokens, C\] with cu_seqlens"),
        (lambda: decoder(torch.zeros(2, 6, 1).long()), ShapeError, r"got \(2, 6, 1\)\. Use decoder\.embed\(ids\)"),
        (lambda: decoder(x.repeat(1, 6, 1)), ShapeError, r"a sequence has 36 tokens; the context_length is 32"),
        (lambda: decoder(x.repeat(6, 1, 1).flatten(0, 1), cu_seqlens=6 * ends), ShapeError, r"has 36 tokens"),
        (lambda: decoder(x[0], cu_seqlens=ends), ValueError, r"end at the number of tokens, 6; got 0 and 12"),
        (lambda: decoder(x[0], cu_seqlens=ends[1:]), ValueError, r"start at 0 .* got 6 and 12"),
        (
            lambda: decoder(x[0], cu_seqlens=torch.tensor([0, 5, 3, 6], dtype=torch.int32), max_seqlen=5),
            ShapeError,
            r"cu_seqlens must not fall; got \[0, 5, 3, 6\]",
        ),
        (
            lambda: decoder(x.flatten(0, 1), cu_seqlens=ends.long(), cache=filled),
            DTypeError,
            r"cu_seqlens must be int32; got torch\.int64",
        ),
        (lambda: decoder(x, positions=torch.arange(6)), ShapeError, r"positions must be \(2, 6\); got \(6,\)"),
        (
            lambda: decoder(x, positions=torch.full((2, 6), 32)),
            ValueError,
            r"positions must be in \[0, 32\).*32 \.\. 32",
        ),
        (lambda: decoder(x, positions=torch.full((2, 6), -1)), ValueError, r"got -1 \.\. -1"),
        (lambda: decoder(x, prefix=torch.tensor(3)), ShapeError, r"prefix must be \[2\], one length a sequence"),
        (lambda: decoder.embed(torch.tensor([3, V])), ValueError, r"ids must be in \[0, 61\); got 3 \.\. 61"),
        (lambda: decoder.embed(torch.tensor([-1, 4])), ValueError, r"got -1 \.\. 4"),
        (lambda: decoder.loss(x, torch.zeros(12).long()), ShapeError, r"labels must be \(2, 6\).*got \(12,\)"),
    ]:
        with pytest.raises(error, match=message):
            call()
