"""One step: what it changes, what it reports, and what it refuses to let into the weights."""

import math

import pytest
import torch
from standin import Towers, batches, loss_fn
from torch import nn

from vlmfast.train import NonFiniteError, adamw, plain_step

BATCH = next(batches(0))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_is_forward_backward_step():
    ours, theirs = Towers(), Towers()
    optimizer, plain = adamw(ours), adamw(theirs)
    for step in range(3):
        torch.manual_seed(step)
        metrics = plain_step(ours, loss_fn, BATCH, optimizer, 1e-2, step=step + 1)
        torch.manual_seed(step)
        plain.zero_grad()
        loss = loss_fn(theirs, BATCH)["contrastive_loss"]
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm().item()
        for group in plain.param_groups:
            group["lr"] = 1e-2
        plain.step()
        with torch.no_grad():
            theirs.logit_scale.clamp_(0, math.log(100))
        assert metrics["contrastive_loss"] == loss.item()
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics["lr"] == 1e-2
        assert same(bits(ours), bits(theirs))
    assert set(metrics) == {"contrastive_loss", "accuracy", "logit_scale", "lr", "grad_norm"}


@pytest.mark.parametrize(("start", "direction", "end"), [(math.log(99.9), -1.0, 100.0), (0.01, 1.0, 1.0)])
def test_logit_scale_is_clamped_and_reported_as_the_multiplier(start, direction, end):
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(start))
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = plain_step(model, lambda m, _: {"a_loss": direction * m.logit_scale}, None, sgd, 1.0, step=1)
    assert metrics["logit_scale"] == pytest.approx(math.exp(start), rel=1e-6)
    assert model.logit_scale.exp().item() == pytest.approx(end, rel=1e-6)
    assert 0 <= model.logit_scale.item() <= torch.tensor(math.log(100)).item()


def test_a_scale_of_shape_one():
    model = Towers()
    model.logit_scale = nn.Parameter(torch.tensor([9.0]))
    metrics = plain_step(model, loss_fn, BATCH, adamw(model), 1e-3, step=1)
    assert metrics["logit_scale"] == pytest.approx(math.exp(9), rel=1e-6)
    assert model.logit_scale.tolist() == [torch.tensor(math.log(100)).item()]


def test_losses_are_summed_and_the_rest_is_reported():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)

    def two(model, _):
        w = model.weight.sum()
        return {"a_loss": 2 * w + 1, "b_loss": 3 * w, "accuracy": 7 * w + 0.5}

    metrics = plain_step(model, two, None, sgd, 0.1, step=1)
    assert model.weight.item() == pytest.approx(-0.5)
    assert metrics == {"a_loss": 1, "b_loss": 0, "accuracy": 0.5, "loss": 1, "grad_norm": 5, "lr": 0.1}


def test_clipping_shortens_the_gradient_and_reports_its_length():
    model = nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    steep = {"a_loss": 30 * model.weight.sum()}
    metrics = plain_step(model, lambda *_: steep, None, sgd, 1.0, step=1, grad_clip_norm=0.5)
    assert metrics["grad_norm"] == 60
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("poison", "name"),
    [
        (lambda loss: loss * math.nan, "contrastive_loss is nan"),
        (lambda loss: loss + math.inf, "contrastive_loss is inf"),
        (lambda loss: loss + (0 * loss).sqrt(), "grad_norm is nan"),  # a finite value with an infinite slope
    ],
)
def test_what_is_not_finite_stops_and_never_reaches_the_weights(poison, name):
    model = Towers()
    model.x[1].track_running_stats = False
    before = bits(model)
    optimizer = adamw(model)
    with pytest.raises(NonFiniteError, match=rf"step 12: {name}.*after step 11.*lower lr"):
        plain_step(
            model,
            lambda *a: {"contrastive_loss": poison(loss_fn(*a)["contrastive_loss"])},
            BATCH,
            optimizer,
            1,
            step=12,
        )
    assert same(bits(model), before)
    assert not optimizer.state


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("amp_bf16", torch.bfloat16)])
def test_precision_rules_the_forward_alone(precision, dtype):
    model = Towers()
    seen = {}

    def look(model, batch):
        seen["dtype"] = (batch.x @ batch.x.T).dtype
        return loss_fn(model, batch)

    plain_step(model, look, BATCH, adamw(model), 1e-3, step=1, precision=precision)
    assert seen["dtype"] == dtype
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_refusals():
    model = Towers()
    with pytest.raises(ValueError, match="one of fp32, amp_bf16; got 'fp16'"):
        plain_step(model, loss_fn, BATCH, adamw(model), 1e-3, step=1, precision="fp16")
    with pytest.raises(ValueError, match=r"'..._loss'; got \['loss_sum'\]"):
        plain_step(model, lambda *_: {"loss_sum": model.logit_scale}, BATCH, adamw(model), 1e-3, step=1)
