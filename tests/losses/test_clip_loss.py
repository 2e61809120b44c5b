"""ClipLoss in the place of open_clip's, and InfoNceLoss."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from vlmfast import ClipLoss, InfoNceLoss, clip_loss, info_nce_loss, use_backend
from vlmfast.errors import BackendError, ShapeError, VlmfastError
from vlmfast.ops.softmax_loss import IMPLS
from vlmfast.testing import assert_accurate, draw, pairs


class OpenClipLoss(torch.nn.Module):
    """open_clip 3.3.0's ClipLoss for one process, restated."""

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        logits_per_image = logit_scale * image_features @ text_features.T
        logits_per_text = logit_scale * text_features @ image_features.T
        if logit_bias is not None:
            logits_per_image += logit_bias
            logits_per_text += logit_bias
        return logits_per_image, logits_per_text

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        labels = torch.arange(per_image.shape[0], dtype=torch.long)
        total_loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        return {"contrastive_loss": total_loss} if output_dict else total_loss


def features(B=65, D=33, dtype=torch.float32):
    """As open_clip's models hand them over: normalised, with the scale exp'd."""
    image, text, scale = pairs(B, D, dtype=torch.float64)
    return F.normalize(image, dim=1).to(dtype), F.normalize(text, dim=1).to(dtype), scale


def gradients(loss, inputs, **options):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    value = loss(**leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves.values())]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_open_clip_s_loss(backend, biased, shape):
    image, text, scale = features()
    inputs = {"image_features": image, "text_features": text, "logit_scale": scale.reshape(shape)}
    if biased:
        inputs["logit_bias"] = torch.full(shape, -10.0)
    ours = gradients(ClipLoss(), inputs)
    exact = gradients(OpenClipLoss(), {name: tensor.double() for name, tensor in inputs.items()})
    sizes = (1.0, scale / 65, scale / 65, 1.0, 1.0)
    for value, truth, size in zip(ours, exact, sizes, strict=False):
        assert_accurate(value, truth, size=size, cond=scale)
    if biased:
        assert torch.equal(ours[-1], torch.zeros(shape))


def test_features_are_taken_as_given(backend):
    image, text, scale = features()
    longer = ClipLoss()(2 * image, text, scale)
    assert_accurate(longer, OpenClipLoss()(2 * image.double(), text.double(), scale), cond=2 * scale)
    assert not torch.isclose(longer, ClipLoss()(image, text, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_short_floats_is_float32(backend, dtype):
    """(e) And nearer to the truth than logits held in bfloat16 can be."""
    image, text, scale = features(dtype=dtype)
    exact = OpenClipLoss()(image.double(), text.double(), scale.double())
    with torch.autocast(image.device.type, dtype):
        loss = ClipLoss()(image, text, scale)
    assert loss.dtype == torch.float32
    assert_accurate(loss, exact, cond=scale)


def test_sides_of_different_dtypes(backend):
    image, text, scale = features()
    loss = ClipLoss()(image.bfloat16(), text, scale)
    assert_accurate(loss, OpenClipLoss()(image.bfloat16().double(), text.double(), scale.double()), cond=scale)


def test_open_clip_s_ways_to_call_it(backend):
    """3.3 passes features by position, 4.x loss(**model_out, output_dict=True)."""
    image, text, scale = features()
    loss = ClipLoss(False, True, True, 0, 1, False)
    expected = clip_loss(image, text, scale, normalize=False)
    assert torch.equal(loss(image, text, scale), expected)
    out = loss(image, text, scale, output_dict=True)
    assert list(out) == ["contrastive_loss"]
    assert torch.equal(out["contrastive_loss"], expected)
    model_out = {"image_features": image, "text_features": text, "logit_scale": scale}
    assert torch.equal(loss(**model_out, output_dict=True)["contrastive_loss"], expected)
    model_out["logit_bias"] = torch.zeros(())
    assert torch.equal(loss(**model_out, output_dict=True)["contrastive_loss"], expected)
    assert torch.equal(loss(**model_out | {"logit_bias": None}), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dist_logit_scale'"):
        loss(**model_out, dist_logit_scale=scale)


def test_a_bias_alone_keeps_its_place_in_the_graph(backend):
    """(g) Everything else frozen, DistributedDataParallel still finds the bias used."""
    image, text, scale = features()
    bias = torch.tensor([3.0], dtype=torch.bfloat16, requires_grad=True)
    loss = ClipLoss()(image, text, scale, bias)
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.equal(bias.grad, torch.zeros(1, dtype=torch.bfloat16))


def test_logits_and_labels_for_those_who_want_them():
    image, text, scale = features(5)
    for bias in (None, torch.tensor(-2.0)):
        theirs = OpenClipLoss().get_logits(image, text, scale, bias)
        for ours, expected in zip(ClipLoss().get_logits(image, text, scale, bias), theirs, strict=True):
            assert torch.equal(ours, expected)
    assert ClipLoss().get_ground_truth(torch.device("cpu"), 5).tolist() == [0, 1, 2, 3, 4]


def test_labels_are_cached_where_asked():
    loss, device = ClipLoss(cache_labels=True), torch.device("cpu")
    assert (loss.prev_num_logits, loss.labels) == (0, {})
    labels = loss.get_ground_truth(device, 5)
    assert loss.get_ground_truth(device, 5) is labels
    assert loss.prev_num_logits == 5
    assert loss.get_ground_truth(device, 3).tolist() == [0, 1, 2]
    loss.prev_num_logits = 5  # as after a call on another device: open_clip would now hand out the three labels
    assert loss.get_ground_truth(device, 5).tolist() == [0, 1, 2, 3, 4]
    loss = ClipLoss()
    loss.get_ground_truth(device, 5)
    assert (loss.prev_num_logits, loss.labels) == (0, {})


def test_a_subclass_s_logits_are_obeyed(backend):
    class Margin(ClipLoss):
        def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
            per_image, per_text = super().get_logits(image_features, text_features, logit_scale, logit_bias)
            margin = torch.eye(len(per_image))
            return per_image - margin, per_text - margin

    class Rolled(ClipLoss):
        def get_ground_truth(self, device, num_logits):
            return super().get_ground_truth(device, num_logits).roll(1)

    image, text, scale = features()
    z = scale * image @ text.T - torch.eye(65)
    labels = torch.arange(65)
    expected = (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
    torch.testing.assert_close(Margin()(image, text, scale), expected)
    z, labels = scale * image @ text.T, labels.roll(1)
    expected = (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
    torch.testing.assert_close(Rolled()(image, text, scale, output_dict=True)["contrastive_loss"], expected)


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_patched_method_is_obeyed(monkeypatch, where):
    image, text, scale = features()
    expected = ClipLoss()(image, text.roll(1, 0), scale)  # text j is now that of image j + 1
    with monkeypatch.context() as patch:
        loss = ClipLoss()
        rolled = loss.get_ground_truth(image.device, 65).roll(-1)
        target = loss if where == "instance" else ClipLoss
        patch.setattr(target, "get_ground_truth", lambda *_: rolled)
        z = scale * image @ text.T
        by_hand = (F.cross_entropy(z, rolled) + F.cross_entropy(z.T, rolled)) / 2
        torch.testing.assert_close(loss(image, text, scale), by_hand)
    with monkeypatch.context() as patch:
        loss = ClipLoss()
        own = loss.get_logits
        target = loss if where == "instance" else ClipLoss

        def rolled_logits(*args):
            image, text, *rest = args[-3:]
            return own(image, text.roll(1, 0), *rest)

        patch.setattr(target, "get_logits", rolled_logits)
        torch.testing.assert_close(loss(image, text, scale), expected)


def test_a_bias_may_be_a_number_and_must_be_one():
    image, text, scale = features()
    loss = ClipLoss()
    assert torch.equal(loss(image, text, scale, -2.0), loss(image, text, scale))
    with pytest.raises(ShapeError, match=r"ClipLoss: logit_bias must hold one number.*\(65,\)"):
        loss(image, text, scale, torch.zeros(65))


def test_a_subclass_of_forward_alone_keeps_the_fused_loss(backend, monkeypatch):
    class Doubled(ClipLoss):
        def forward(self, *args, **options):
            return 2 * super().forward(*args, **options)

    image, text, scale = features()
    expected = 2 * clip_loss(image, text, scale, normalize=False)
    monkeypatch.setattr(ClipLoss, "_loss_of_own_logits", None)
    assert torch.equal(Doubled()(image, text, scale), expected)


def test_refusals():
    with pytest.raises(VlmfastError, match="ClipLoss: use_horovod=True is not supported"):
        ClipLoss(use_horovod=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunk_size'"):
        ClipLoss(chunk_size=4)
    with pytest.raises(ValueError, match=r"ClipLoss: transport must be 'auto', 'gather' or 'ring'; got 'star'"):
        ClipLoss(transport="star")


@pytest.mark.parametrize("local_loss", [False, True])
def test_the_biased_flags_are_warned_of(local_loss, recwarn):
    with pytest.warns(UserWarning, match="ClipLoss: local_loss=.*[Pp]ass .*gather_with_grad=True"):
        ClipLoss(local_loss=local_loss, world_size=2)
    ClipLoss(local_loss=local_loss, gather_with_grad=True, world_size=2)
    ClipLoss(local_loss=local_loss)
    assert not recwarn


def test_several_ranks_need_torch_distributed():
    image, text, scale = features()
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=1, world_size=2)
    for call in (loss, loss.get_logits):
        with pytest.raises(
            BackendError, match=r"torch\.distributed has no process group: start the program with torch"
        ):
            call(image, text, scale)


def test_local_labels_count_the_rows_of_the_ranks_before():
    loss = ClipLoss(True, True, cache_labels=True, rank=2, world_size=3)
    for _ in range(2):
        assert loss.get_ground_truth(torch.device("cpu"), 4).tolist() == [8, 9, 10, 11]
    assert ClipLoss(False, True, rank=2, world_size=3).get_ground_truth(torch.device("cpu"), 3).tolist() == [0, 1, 2]


def test_it_has_no_state_and_can_be_copied(backend):
    image, text, scale = features()
    loss = ClipLoss(cache_labels=True)
    assert not loss.state_dict()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(image, text, scale), loss(image, text, scale))


def test_it_compiles_whole(backend):
    torch.compiler.reset()
    image, text, scale = features()
    inputs = {"image_features": image, "text_features": text, "logit_scale": scale, "logit_bias": torch.zeros(1)}
    loss = ClipLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled, inputs), gradients(loss, inputs)))


def test_training_with_it_is_training_with_open_clip_s(backend):
    """Twenty steps of two linear towers from one start: the losses stay together."""
    losses = {}
    for name, loss in (("ours", ClipLoss()), ("theirs", OpenClipLoss())):
        generator = torch.Generator().manual_seed(0)
        pixels, words = draw(torch.randn, 2, 64, 20, generator=generator)
        words = pixels @ draw(torch.randn, 20, 20, generator=generator) + words
        towers = [draw(torch.randn, 20, 8, generator=generator).requires_grad_() for _ in range(2)]
        log_scale = torch.tensor(1 / 0.07).log().requires_grad_()
        optimiser = torch.optim.AdamW([*towers, log_scale], lr=1e-2)
        losses[name] = []
        for _ in range(20):
            image, text = (F.normalize(x @ tower, dim=1) for x, tower in zip((pixels, words), towers, strict=True))
            value = loss(image, text, log_scale.exp())
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            losses[name].append(value.detach())
    ours, theirs = torch.stack(losses["ours"]), torch.stack(losses["theirs"])
    assert ours[-1] < 0.8 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_info_nce_loss_keeps_its_settings(backend):
    query, key, scale = pairs(9, 8)
    ids = {"query_ids": torch.arange(9) // 2, "key_ids": torch.arange(9) // 3}
    loss = InfoNceLoss(positives="in", directions="both", normalize=False)
    expected = info_nce_loss(query, key, scale, positives="in", directions="both", normalize=False, **ids)
    assert torch.equal(loss(query, key, scale, **ids), expected)
    assert repr(loss) == "InfoNceLoss(positives='in', directions='both', label_smoothing=0.0, normalize=False)"
    smooth = InfoNceLoss(label_smoothing=0.1)
    labels = torch.arange(9).roll(1)
    assert torch.equal(smooth(query, key, scale, labels), info_nce_loss(query, key, scale, labels, label_smoothing=0.1))
    assert torch.equal(InfoNceLoss()(query[:5], key, scale, offset=4), info_nce_loss(query[:5], key, scale, offset=4))


def test_a_forced_backend_is_the_one_that_runs(backend, monkeypatch):
    image, text, scale = features()
    for other in IMPLS.keys() - {backend}:
        monkeypatch.setattr(IMPLS[other], "forward", None)
    with use_backend(backend):
        assert ClipLoss()(image, text, scale) > 0
