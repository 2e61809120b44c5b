"""Every provider computes the same loss, or says why it cannot run."""

import sys

import pytest
import torch

from vlmfast.bench import loss, providers
from vlmfast.bench.providers import LOSSES, PEERS, PROVIDERS, BenchError, UnavailableError
from vlmfast.testing import assert_accurate

B, D = 37, 24


def forms(name, provider):
    try:
        return providers.forms(name, provider)
    except UnavailableError as why:
        pytest.skip(str(why))


def value_and_gradients(fn, dtype):
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in loss.pairs(B, D, torch.float32, seed=1)]
    return loss.values_and_gradients(loss.bind(fn, leaves), leaves)


def by_hand(name):
    """The loss in float64, pair by pair, as the paper writes it."""

    def run(image, text, scale, bias):
        z, s, pair = scale * image @ text.T, image @ text.T, range(B)
        if name == "clip":
            return (
                -sum((z[i, i] - z[i].exp().sum().log()) + (z[i, i] - z[:, i].exp().sum().log()) for i in pair) / 2 / B
            )
        if name == "siglip":
            signs = 2 * torch.eye(B, dtype=z.dtype) - 1
            return (1 + (-signs * (z + bias)).exp()).log().sum() / B
        d = s.diagonal()
        wrong = ~torch.eye(B, dtype=torch.bool)
        by_row, by_column = (
            (providers.MARGIN + s - d[:, None]).relu() * wrong,
            (providers.MARGIN + s - d).relu() * wrong,
        )
        if name == "vse-hardest":
            return by_row.amax(1).sum() + by_column.amax(0).sum()
        return (by_row + by_column).sum()

    return value_and_gradients(run, torch.float64)


# torch-compile compiles the eager forms, which takes a while; its errors are measured in every benchmark. Other
# people's kernels need a GPU.
ALIKE = [(name, provider) for name in LOSSES for provider in ("vlmfast", "eager-one", "eager-two", "reference")]
EXPECTED = [*ALIKE, ("clip", "linear-cross-entropy"), ("clip", "open_clip"), ("siglip", "open_clip")]


@pytest.mark.parametrize(("name", "provider"), EXPECTED)
def test_every_form_of_every_provider_is_the_papers_formula(name, provider):
    exact = by_hand(name)
    for form, fn in forms(name, provider).items():
        values = value_and_gradients(fn, torch.float32)
        assert values.keys() >= exact.keys(), f"{provider}, {form}"
        for what, tensor in exact.items():
            assert_accurate(
                values[what].float(), tensor, size=tensor.abs().max(), cond=2 * B, name=f"{provider}, {form}: {what}"
            )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_name_resolves_or_gives_a_reason(name, provider):
    found, reason = {}, ""
    try:
        found = providers.forms(name, provider)
    except UnavailableError as why:
        reason = str(why)
    assert found or (len(reason) > 10 and provider in ("linear-cross-entropy", "open_clip", *PEERS))
    assert all(callable(fn) for fn in found.values())


def test_a_missing_open_clip_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "open_clip.loss", raising=False)
    with pytest.raises(UnavailableError, match="pip install open_clip_torch"):
        providers.forms("clip", "open_clip")


def test_an_old_torch_is_a_reason(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(UnavailableError, match=r"2\.13 has"):
        providers.forms("clip", "linear-cross-entropy")


def test_an_unknown_provider_names_the_nearest():
    with pytest.raises(BenchError, match="did you mean 'eager-one'"):
        providers.known_providers(["eager-oen"])
    with pytest.raises(BenchError, match="no provider named"):
        providers.known_providers([])
    assert providers.known_providers(["vlmfast", "reference", "vlmfast"]) == ["vlmfast", "reference"]


def test_ours_says_its_backend(backend):
    image, text, *_ = loss.pairs(B, D, torch.float32, seed=0)
    for name in LOSSES:
        assert providers.backend_of(name, image, text) == backend


def test_pairs_are_weakly_matched_unit_rows():
    image, text, scale, bias = loss.pairs(512, 64, torch.float32, seed=3)
    assert_accurate(torch.stack([image.norm(dim=1), text.norm(dim=1)]), torch.ones(2, 512, dtype=torch.float64))
    cosines = (image * text).sum(1)
    assert 0.2 < cosines.mean() < 0.4
    assert scale.item() == pytest.approx(1 / 0.07)
    assert all(leaf.requires_grad for leaf in (image, text, scale, bias))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("out of memory\nadvice", "RuntimeError: out of memory"),
        ("at 52:14:\n  s = tl.dot(a, b)\nwrong shapes", "RuntimeError: at 52:14: wrong shapes"),
        ("", "RuntimeError"),
    ],
)
def test_a_failure_is_one_line(message, said):
    assert providers.first_line(RuntimeError(message)) == said
