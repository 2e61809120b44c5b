"""What decoders are made of, each against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vlmfast.layers.gated import GatedMlp
from vlmfast.layers.linear import Linear
from vlmfast.layers.norm import RmsNorm
from vlmfast.layers.rotary import apply_rotary, rotary
from vlmfast.testing import assert_accurate

EXACT64 = {"rtol": 1e-12, "atol": 1e-12}  # float64 rounding of a few hundred terms


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 24)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_and_its_gradients_are_the_definition(shape, eps):
    norm = RmsNorm(shape[-1], eps).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.float64)
    weight = norm.weight.detach().clone().requires_grad_()
    expected = rms_norm(x, weight, eps)
    expected_gradients = torch.autograd.grad(expected, (x, weight), grad)
    found = norm(x)
    assert_close(found, expected, **EXACT64)
    for one, other in zip(torch.autograd.grad(found, (x, norm.weight), grad), expected_gradients, strict=True):
        assert_close(one, other, **EXACT64)
    with torch.no_grad():
        assert_close(norm(x), expected, **EXACT64)
    frozen = norm.requires_grad_(False)
    assert_close(torch.autograd.grad(frozen(x), x, grad)[0], expected_gradients[0], **EXACT64)


def test_rms_norm_has_the_same_gradient_when_autocast_spans_the_backward():
    norm, x, grad = RmsNorm(64), torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
    expected = torch.autograd.grad(norm(x), x, grad)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(norm(x), x, grad)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_rounds_once(dtype, training):
    norm = RmsNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = (20 * torch.randn(5, 64)).to(dtype)
    with torch.set_grad_enabled(training):
        found = norm(x)
    assert found.dtype == dtype
    expected = rms_norm(x.double(), norm.weight.double(), norm.eps)
    assert_accurate(found, expected, size=expected.abs().max())


def test_rms_norm_refuses_a_second_derivative():
    x = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(RmsNorm(4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_pairs_of_features_turn_like_complex_numbers():
    positions = torch.tensor([0, 1, 7, 30])
    x = torch.randn(4, 3, 10, dtype=torch.float64)
    cos, sin = rotary(positions, 10, 100.0, torch.float64)
    pairs = torch.complex(x[..., :5], x[..., 5:])
    steps = 1 / 100.0 ** (torch.arange(0, 10, 2, dtype=torch.float32) / 10)
    turned = pairs * torch.polar(torch.ones(4, 1, 5, dtype=torch.float64), (positions[:, None, None] * steps).double())
    # Cosines are rounded to float32, as Hugging Face rounds them.
    assert_close(apply_rotary(x, cos, sin), torch.cat([turned.real, turned.imag], -1), rtol=1e-6, atol=1e-6)
    assert_close(apply_rotary(x, cos, sin), x * cos + x.roll(5, -1) * sin, **EXACT64)
    assert torch.equal(apply_rotary(x, cos, sin)[0], x[0])


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    scores = []
    for at in (0, 5, 40):
        tables = rotary(torch.tensor([at, at + 3]), 16, 10000.0, torch.float64)
        turned = apply_rotary(torch.cat([k, q]), *tables)
        scores.append((turned[0] * turned[1]).sum())
    assert_close(scores[1:], scores[:1] * 2, rtol=1e-5, atol=1e-5)  # angles are float32
    assert abs(scores[0] - (q * k).sum()) > 0.1


def test_the_gradient_of_a_turn_is_the_turn_back():
    tables = rotary(torch.arange(3), 6, 10000.0, torch.float64)
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, *tables), x)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary(x, *tables).square(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_turn_rounds_once(dtype):
    x = torch.randn(9, 2, 8).to(dtype)
    tables = rotary(torch.arange(9), 8, 10000.0, dtype)
    assert tables[0].dtype == torch.float32
    found = apply_rotary(x, *tables)
    assert found.dtype == dtype
    assert torch.equal(found, apply_rotary(x.float(), *tables).to(dtype))


@pytest.mark.parametrize("bias", [False, True])
def test_the_gate_multiplies(bias):
    mlp = GatedMlp(6, 10, bias=bias).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate = x @ mlp.gate_proj.weight.T + (mlp.gate_proj.bias if bias else 0)
    up = x @ mlp.up_proj.weight.T + (mlp.up_proj.bias if bias else 0)
    expected = (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T + (mlp.down_proj.bias if bias else 0)
    assert_close(mlp(x), expected, **EXACT64)
    tanh = GatedMlp(6, 10, "gelu_tanh").double()
    expected = F.gelu(x @ tanh.gate_proj.weight.T, approximate="tanh") * (x @ tanh.up_proj.weight.T)
    assert_close(tanh(x), expected @ tanh.down_proj.weight.T, **EXACT64)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"GatedMlp: activation must be one of .*silu; got 'swish'"):
        GatedMlp(6, 10, "swish")


@pytest.mark.parametrize("shape", [(1, 48), (2, 48), (4, 48), (8, 48), (9, 48), (1, 1, 48), (2, 3, 48), (48,), (0, 48)])
@pytest.mark.parametrize("width", [16, 160])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_are_multiplied_as_many_are(shape, width, dtype, bias):
    layer = Linear(48, width, bias=bias).to(dtype)
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected = F.linear(x.double(), layer.weight.double(), None if not bias else layer.bias.double())
    with torch.no_grad():
        got = layer(x)
    assert got.shape == expected.shape
    assert got.dtype == dtype
    assert_close(got.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    assert layer(x.requires_grad_()).requires_grad
