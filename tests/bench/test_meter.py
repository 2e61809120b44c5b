"""Both meters, and the benchmark of a loss as a GPU runs it."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from vlmfast.bench import loss, meter, providers, report
from vlmfast.bench.loss import LossBench
from vlmfast.bench.providers import BenchError

MIB = 2**20
QUICK = LossBench(device="cuda", batch="24", dim=16, providers="vlmfast,eager-one", rounds=2, seconds=0.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(loss, "TUNING_SECONDS", 0.0)


def run(**changes):
    return loss.run(dataclasses.replace(QUICK, **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    with pytest.raises(BenchError, match="sees no GPU"):
        run()


def test_a_pass_on_a_gpu_is_timed_by_events_and_leaves_fresh_gradients(fake_cuda):
    leaf = torch.ones(3, requires_grad=True)
    gauge = meter.Cuda()
    for _ in range(2):
        forward, full = gauge.timed_pass(lambda: (2 * leaf).sum(), [leaf])
        assert 0 < forward < full < 10
        assert leaf.grad.tolist() == [2.0, 2.0, 2.0]
    assert 0 < gauge.timed(lambda: None) < 10
    assert 0 < meter.Cpu().timed(lambda: None) < 10


def test_the_ceilings_are_what_was_computed_and_moved(fake_cuda, monkeypatch):
    gauge = meter.Cuda()
    monkeypatch.setattr(gauge, "timed", lambda call: call() and 2.0)  # every call takes two seconds
    ceilings = gauge.ceilings(512)
    assert ceilings["product"]() == meter.PRODUCTS * 2 * 32**3 / 2 / 1e9
    assert ceilings["copy"]() == meter.COPIES * 2 * 4096 / 2 / 1e9


def test_a_run_on_a_gpu_has_its_name_ceilings_and_the_allocators_peak(fake_cuda):
    result = run()
    assert result.machine["gpu"]["name"] == "GPU of the test"
    assert result.machine["gpu"]["compute_capability"] == "9.0"
    assert "triton" in result.versions
    assert "inf_cl" in result.versions
    assert "bfloat16 matrix product" in result.peak_of
    assert result.peak_gflops["24"].median > 0
    assert result.copy_gb_per_s["24"].median > 0
    for row in result.rows:
        assert row.reason is None
        assert row.extra_bytes == 30 * MIB - 2 * 24 * 16 * 4
        assert row.process_bytes == 130 * MIB - MIB  # without the harness's own
        assert row.forward_gflops == pytest.approx(2 * 24**2 * 16 / row.forward_ms.median / 1e6)
        assert row.loss_error < 1e-5
        assert row.peak_share == row.gflops / result.peak_gflops["24"].median


def test_the_table_of_a_gpu_counts_in_tera(fake_cuda, capsys):
    report.show(run())
    printed = capsys.readouterr().out
    for words in ("GPU of the test", "TFLOP/s", "TB/s", "forward TFLOP/s", "PyTorch's allocator"):
        assert words in printed
    assert "GFLOP/s" not in printed
    assert "thread" not in printed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), AssertionError("not on CUDA")])
def test_who_fails_says_why_and_the_memory_is_given_back(fake_cuda, monkeypatch, error):
    def fails(image, text, scale, bias):
        raise error

    monkeypatch.setitem(providers.EAGER_TWO, "clip", {"fails": fails})
    bad, good = run(providers="eager-two,vlmfast").rows
    assert bad.reason == f"{type(error).__name__}: {error}"
    assert bad.full_ms is None
    assert good.full_ms
    assert fake_cuda.emptied == 1


def test_who_fails_late_says_why(fake_cuda, monkeypatch):
    passes = []

    def tires(image, text, scale, bias):
        passes.append(1)
        if len(passes) > 4:  # warm-up, memory, errors, warm-up
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return image.sum()

    monkeypatch.setitem(providers.EAGER_TWO, "clip", {"tires": tires})
    bad, good = run(providers="eager-two,vlmfast").rows
    assert "out of memory" in bad.reason
    assert (bad.full_ms, good.rounds) == (None, 2)
    assert len(passes) == 5


def test_a_broken_gpu_ends_the_run(fake_cuda, monkeypatch):
    def breaks(image, text, scale, bias):
        fake_cuda.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(providers.EAGER_TWO, "clip", {"breaks": breaks})
    with pytest.raises(meter.DeviceLostError, match="illegal memory access"):
        run(providers="eager-two,vlmfast")


def test_when_the_time_is_spent_the_rest_is_left_out(fake_cuda):
    asked = iter([False, True, True])
    first, *rest = loss.run(
        dataclasses.replace(QUICK, providers="vlmfast,eager-one,eager-two"), spent=asked.__next__
    ).rows
    assert first.full_ms
    assert [row.reason for row in rest] == 2 * ["left out: the time for this was spent"]
    (row,) = loss.run(dataclasses.replace(QUICK, providers="vlmfast"), spent=lambda: True).rows
    assert row.reason.startswith("left out")


def test_what_does_not_fit_the_gpu_is_not_started(fake_cuda):
    fake_cuda.free = 3 * 4 * 24**2 - 1
    rows = {row.provider: row for row in run().rows}
    assert "[B, B] arrays need" in rows["eager-one"].reason
    assert rows["vlmfast"].reason is None


def test_a_gradient_that_a_provider_does_not_give_is_said(fake_cuda, monkeypatch):
    def without_scale(image, text, scale, bias):
        return providers.EAGER_ONE["clip"]["log_softmax"](image, text, scale.detach(), bias)

    monkeypatch.setitem(providers.EAGER_TWO, "clip", {"": without_scale})
    result = run(providers="eager-two")
    assert result.rows[0].gradient_errors["scale"] is None
    assert result.rows[0].gradient_error < 1e-5
    assert "eager-two gives no gradient of scale" in report.notes(result, 24)


def test_an_option_that_our_loss_does_not_take_is_said():
    with pytest.raises(BenchError, match="speed: clip_loss takes no such argument"):
        providers.check_options("clip", {"speed": 2})
    providers.check_options("clip", {"label_smoothing": 0.1})


def test_options_reach_our_loss_and_the_result(fake_cuda):
    result = run(providers="vlmfast", precision="ieee", max_workspace=2**20)
    assert result.rows[0].loss_error < 1e-6
    assert (result.config["precision"], result.config["max_workspace"]) == ("ieee", 2**20)
    assert "precision" in run(providers="vlmfast", precision="fp7").rows[0].reason


class Scaled:
    """memeff's module, as far as it is called."""

    def __init__(self, temperature, normalized_inputs, stable):
        assert normalized_inputs
        assert not stable
        self.temperature = temperature

    def __call__(self, image, text):
        return providers.EAGER_ONE["clip"]["log_softmax"](image, text, torch.tensor(1 / self.temperature), None)


def in_one_direction(q, k, labels=None, scale=None, head_dim=256):
    assert q.shape[1] % head_dim == 0
    return torch.nn.functional.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")


def of_log_scale(image, text, log_temperature, bias, chunk_size=0):
    return providers.EAGER_ONE["siglip"]["softplus"](image, text, log_temperature.exp(), bias)


@pytest.mark.parametrize(
    ("name", "loss_name", "path", "functions"),
    [
        ("inf-cl", "clip", "inf_cl.flash", {"cal_flash_loss": in_one_direction}),
        ("memeff", "clip", "memeff", {"MemoryEfficientCLIPLoss": Scaled}),
        (
            "siglip-kernel",
            "siglip",
            "siglip_kernel",
            {"fused_siglip_loss": of_log_scale, "fused_chunked_bf16_siglip_loss": of_log_scale},
        ),
    ],
)
def test_peers_are_called_for_the_loss_that_we_compute(monkeypatch, fake_cuda, name, loss_name, path, functions):
    module = ModuleType(path)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, path.split(".")[0], module)
    monkeypatch.setitem(sys.modules, path, module)
    (row,) = run(providers=name, loss=loss_name).rows
    assert row.reason is None
    assert row.loss_error < 1e-5
    assert row.gradient_error < 1e-5
    wrong = "siglip" if loss_name == "clip" else "clip"
    assert run(providers=name, loss=wrong).rows[0].reason == f"{name} has the {loss_name} loss alone"


def test_a_peer_that_cannot_be_imported_is_a_reason(monkeypatch, tmp_path, fake_cuda):
    (tmp_path / "siglip_kernel.py").write_text("raise AssertionError('Torch not compiled with CUDA enabled')")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(providers="siglip-kernel", loss="siglip").rows[0].reason == (
        "siglip_kernel cannot be imported: AssertionError: Torch not compiled with CUDA enabled"
    )
    monkeypatch.setitem(sys.modules, "memeff", None)
    assert "pip install --no-deps memeff" in run(providers="memeff").rows[0].reason
