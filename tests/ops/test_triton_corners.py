"""Inputs that the Triton kernels meet seldom: other strides, default dtypes and lengths; and their memory at any N."""

import math
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmfast import clip_loss, info_nce_loss, normalized_similarity, siglip_loss, similarity_topk, use_backend, vse_loss
from vlmfast.ops import _configs, _limits, _tiles
from vlmfast.ops.hinge_loss import _triton as hinge_loss
from vlmfast.ops.softmax_loss import _triton as softmax_loss
from vlmfast.testing import pairs

LOSSES = {
    "clip": clip_loss,
    "smooth": partial(clip_loss, label_smoothing=0.1),
    "siglip": partial(siglip_loss, logit_bias=-2.0),
    "vse": lambda image, text, scale: vse_loss(image, text, 0.1) + 0 * scale,
    "hardest": lambda image, text, scale: vse_loss(image, text, 0.1, hardest=True) + 0 * scale,
}


def gradients(call, *inputs):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_s_default_dtype_changes_no_bit(triton_backend, default_dtype, dtype):
    """Partial results are float32, whatever torch makes by default: scripts set bfloat16 to build large models."""
    image, text, scale = pairs(70, 40)
    calls = [partial(gradients, loss, image, text, scale) for loss in LOSSES.values()]
    calls += [partial(similarity_topk, image, text, 5), lambda: [normalized_similarity(image, text)]]
    expected = [call() for call in calls]
    default_dtype(dtype)
    for call, values in zip(calls, expected, strict=True):
        for ours, value in zip(call(), values, strict=True):
            assert ours.dtype == value.dtype
            assert torch.equal(ours, value)


@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("strided", [lambda ids: ids.repeat_interleave(2)[::2], lambda ids: ids[:1].expand(len(ids))])
def test_ids_of_any_strides_are_read_where_they_lie(backend, positives, strided):
    image, text, scale = pairs(70, 40)
    ids = strided(torch.arange(70) // 3)
    assert ids.stride() != (1,)
    ways = {"positives": positives, "directions": "both"}
    ours = info_nce_loss(image, text, scale, query_ids=ids, key_ids=ids, **ways)
    ids = ids.clone(memory_format=torch.contiguous_format)
    assert torch.equal(ours, info_nce_loss(image, text, scale, query_ids=ids, key_ids=ids, **ways))


def test_a_bfloat16_row_whose_square_passes_float32_has_a_length(triton_backend):
    image, text, scale = pairs(70, 40, dtype=torch.bfloat16)
    image[3] *= 1e20
    assert image[3].float().square().sum() == math.inf
    ours = gradients(clip_loss, image, text, scale)
    with use_backend("reference"):
        exact = gradients(clip_loss, image.double(), text.double(), scale.double())
    assert float(ours[0]) == pytest.approx(float(exact[0]), rel=1e-5)
    for value, truth in zip(ours[1:3], exact[1:3], strict=True):
        assert ((value.double() - truth).norm(dim=1) <= 4e-3 * truth.norm(dim=1)).all()


def test_a_single_row_of_a_wider_matrix_has_descriptors(triton_backend, monkeypatch):
    """A matrix of one row is contiguous whatever its stride, and the copy unit takes no stride but whole 16 bytes."""
    monkeypatch.setattr(_limits, "PRECISION", "bf16x3")
    pair = _tiles.pair

    def with_descriptors(*args, **options):
        p = pair(*args, **options)
        p.constants["TMA"] = True
        return p

    monkeypatch.setattr(_tiles, "pair", with_descriptors)
    table, text, scale = pairs(70, 67, dtype=torch.bfloat16)
    query, text = table[8:9, :64], text[:, :64].contiguous()
    assert query.is_contiguous()
    assert query.stride() == (67, 1)
    assert query.data_ptr() % 16 == 0
    assert torch.equal(info_nce_loss(query, text, scale), info_nce_loss(query.clone(), text, scale))


@pytest.mark.parametrize("B", [300, 700])
def test_the_first_of_equal_foreigners_is_the_hardest(triton_backend, monkeypatch, B):
    """All texts but one are the same, in tiles that are merged some at a time: each image's hardest is text 0 or 1."""
    monkeypatch.setattr(_tiles, "EDGE", 2**14)
    monkeypatch.setattr(hinge_loss, "_GROUP", 2)
    found = []
    add = hinge_loss._add_rows
    monkeypatch.setattr(hinge_loss, "_add_rows", lambda to, at, rows: found.append(at) or add(to, at, rows))
    image, text, _ = pairs(B, 8)
    text = text[:1].expand(B, 8).contiguous()
    vse_loss(image.requires_grad_(), text.requires_grad_(), 0.2, hardest=True)
    _, row_at = found
    assert row_at.tolist() == [1] + [0] * (B - 1)


# Without running a kernel


@pytest.fixture
def on_hopper(monkeypatch):
    """Every launch is left out, on tensors without data, with the tiles of an H200."""
    if _tiles.MISSING:
        pytest.skip(_tiles.MISSING)
    monkeypatch.setenv("VLMFAST_TUNED", "0")
    monkeypatch.setattr(_tiles, "target", lambda device: "sm_90")
    monkeypatch.setattr(_tiles, "launch", lambda *args, **options: None)
    monkeypatch.setattr(_tiles, "_accumulate", lambda *args, **options: None)
    with _configs.trying(None):
        yield


class Peak(TorchDispatchMode):
    """A mode that counts the bytes of all tensors that were made in it and live at one time."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live, self.bytes = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize(
    ("N", "D"), [(4096, 512), (65536, 512), (65536, 1024), (131072, 512), (131072, 1024), (262144, 512)]
)
def test_softmax_needs_less_than_half_a_gigabyte_at_any_batch(on_hopper, N, D):
    """Beside embeddings and their gradients, in bfloat16 and by default, forward and backward."""
    with torch.device("meta"):
        x, y = torch.empty(2, N, D, dtype=torch.bfloat16)
        number, vector = torch.empty((), dtype=torch.float32), torch.empty(N, dtype=torch.float32)
        ids = torch.empty(N, dtype=torch.int64)
    plan = (x, y, number, ids, ids, vector, vector, None, None, "index", 0.0, True)
    own = min(_limits.MAX_WORKSPACE, 2 * N * N)
    with Peak(x, number, vector, ids) as forward:
        _, *saved = softmax_loss.forward(*plan, "bf16x3", _limits.MAX_WORKSPACE - own)
    assert forward.bytes <= 0.5e9
    with Peak(x, number, vector, ids, *saved) as backward:
        dx, dy, _ = softmax_loss.backward(number, *plan, *saved, True, True, "bf16x3", own)
    kept = sum(tensor.nbytes for tensor in saved)
    assert backward.bytes + kept - dx.nbytes - dy.nbytes <= 0.5e9


@pytest.mark.parametrize("N", [1, 2, 100, 1000, 1024, 4096, 5000])
def test_powers_are_kept_in_one_layout_for_all_n(on_hopper, N):
    """What Triton asks of an argument, whether it is a multiple of 16, is the same for all: one kernel is compiled."""
    with torch.device("meta"):
        x = torch.empty(N, 512, dtype=torch.bfloat16)
    kept = softmax_loss.Kept.empty(_tiles.pair(x, x, False, "bf16x3", kind="softmax"), 2**27)
    _, powers_stride, others, others_stride, rows = kept.arguments
    assert rows == N
    assert powers_stride % 16 == others_stride % 16 == 4 * others.storage_offset() % 16 == 0
