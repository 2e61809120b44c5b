"""The benchmark of a training step, with a model that is ours on both sides or differs where a test says so."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlmfast import cli
from vlmfast.bench import document, memory, meter, model
from vlmfast.bench.memory import Peak
from vlmfast.bench.model import ModelBench
from vlmfast.bench.providers import BenchError
from vlmfast.bench.report import legend, notes
from vlmfast.errors import DataError
from vlmfast.losses import ClipLoss, SigLipLoss
from vlmfast.models import build_clip, load_config

MIB = 2**20
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config's path; memory is not measured in other processes, and ceilings are quick."""
    monkeypatch.setattr(meter, "MICROKERNEL_SECONDS", 1e-4)
    monkeypatch.setattr(memory, "peak_in_child", lambda setup, **_: Peak(5 * MIB, 300 * MIB))
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


class Theirs(nn.Module):
    """open_clip's interface around our model: float images, a tuple from forward."""

    def __init__(self, path, scale=1.0):
        super().__init__()
        self.ours, self.scale = build_clip(path, seed=7), scale

    def load_state_dict(self, state):
        return self.ours.load_state_dict(state)

    @property
    def logit_scale(self):
        return self.ours.logit_scale

    @property
    def logit_bias(self):
        return self.ours.logit_bias

    def encode_image(self, image, normalize=False):
        assert image.dtype == torch.float32
        return self.scale * self.ours.encode_image(image, normalize)

    def encode_text(self, text, normalize=False):
        return self.ours.encode_text(text, normalize)

    def forward(self, image, text):
        features = self.encode_image(image, True), self.encode_text(text, True)
        return *features, *(s for s in (self.logit_scale.exp(), self.logit_bias) if s is not None)


@pytest.fixture
def open_clip(monkeypatch):
    """A stand-in for the package; its `scale` stretches image features."""
    fake = SimpleNamespace(ClipLoss=ClipLoss, SigLipLoss=SigLipLoss, scale=1.0, path=None)
    fake.add_model_config = lambda path: setattr(fake, "path", path)
    fake.create_model = lambda name: Theirs(fake.path, fake.scale)
    monkeypatch.setattr(model, "open_clip_module", lambda name: fake)
    return fake


def run(path, **changes):
    quick = ModelBench(str(path), batch=5, caption_length="8", rounds=2)
    return model.run(dataclasses.replace(quick, **changes))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_every_provider_takes_the_same_step(tiny, open_clip, fake_cuda, device, precision):
    report = run(tiny, device=device, precision=precision)
    ours, theirs = report.rows
    for row in (ours, theirs):
        assert row.reason is None
        assert row.rounds == 2
        assert list(row.parts_ms) == list(model.PARTS)
        assert row.features_apart < 1e-5
        own = row.cpu_ms if device == "cpu" else row.full_ms
        assert row.samples_per_s == pytest.approx(5e3 / own.median)
        assert row.images_per_s == pytest.approx(5e3 / row.parts_ms["image tower"].median)
        assert row.extra_bytes > 0
        assert (row.cpu_ms is not None) == (device == "cpu")
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5 if precision == "fp32" else 2e-2)
    assert theirs.full_ratio == theirs.full_ms.median / ours.full_ms.median


@pytest.mark.filterwarnings("ignore")  # of other people's imports
def test_open_clip_itself_takes_the_same_step(tiny):
    ours, theirs = run(tiny).rows
    if "pip install" in (theirs.reason or ""):
        pytest.skip(theirs.reason)
    assert theirs.reason is None
    assert theirs.features_apart < 1e-5
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5)


def test_models_with_a_bias_train_on_their_own_loss(tiny, open_clip):
    tiny.write_text(json.dumps(TINY | {"init_logit_bias": -10.0}))
    ours, theirs = run(tiny).rows
    assert theirs.reason is None
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5)
    assert ours.loss > 3  # near 10 for one pair of each row, and nothing for the others


def test_a_step_moves_every_weight(tiny):
    config = ModelBench(str(tiny))
    of = model.trained("vlmfast", config, build_clip(tiny, seed=0), torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in of.model.named_parameters()}
    of.optimizer.param_groups[0]["lr"] = 0.1
    image, text = model.random_batch(of.model.config, torch.tensor([9, 20, 3]), seed=0)
    for part in model.step_parts(of, image, text, torch.device("cpu"), "fp32").values():
        part()
    still = [name for name, p in of.model.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    assert of.value.isfinite()


def test_with_other_features_nothing_is_timed(tiny, open_clip):
    open_clip.scale = 1.001
    ours, theirs = run(tiny).rows
    assert ours.full_ms is not None
    assert theirs.full_ms is None
    assert "features differ from ours by 1.0e-03" in theirs.reason


def test_a_compiled_rival_has_its_towers_as_one_part(tiny, open_clip, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)
    _, theirs = run(tiny, providers="vlmfast,open_clip-compile").rows
    assert list(theirs.parts_ms) == ["data", "towers", "loss", "backward", "optimizer"]
    assert theirs.images_per_s is None


def test_without_open_clip_ours_runs_alone(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    ours, theirs = run(tiny).rows
    assert ours.full_ms is not None
    assert "pip install open_clip_torch" in theirs.reason


def test_when_the_time_is_spent_nothing_starts(tiny):
    result = model.run(ModelBench(str(tiny)), spent=lambda: True)
    assert {row.reason for row in result.rows} == {"left out: the time for this was spent"}


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"), [("15", 5, 25, 15), ("77", 77, 77, 77), ("70", 63, 77, 70), ("3", 3, 3, 3)]
)
def test_lengths_are_spread_around_their_mean(text, low, high, mean):
    lengths = model.caption_lengths(text, 4096, 77, seed=0)
    assert (int(lengths.min()), int(lengths.max())) == (low, high)
    assert float(lengths.double().mean()) == pytest.approx(mean, abs=0.5)


def test_real_lengths_have_a_long_tail():
    lengths = model.caption_lengths("real", 4096, 77, seed=0).double()
    assert float(lengths.mean()) == pytest.approx(15, abs=0.5)
    assert lengths.median() < lengths.mean()
    assert lengths.max() > 50


@pytest.mark.parametrize("eos_id", [None, 7])
def test_captions_end_where_they_are_said_to(eos_id):
    config = load_config("ViT-B-32")
    changes = {} if eos_id is None else {"pool_type": "eos", "eos_id": eos_id}
    config = dataclasses.replace(config, text_cfg=dataclasses.replace(config.text_cfg, **changes))
    lengths = torch.tensor([3, 15, 77])
    image, text = model.random_batch(config, lengths, seed=0)
    assert (image.shape, image.dtype) == ((3, 3, 224, 224), torch.uint8)
    end = 49407 if eos_id is None else eos_id
    assert ((text == end).int().argmax(1) == lengths - 1).all()
    assert (text == end).sum() == 3
    for row, length in zip(text, lengths, strict=True):
        assert (row[:length] > 0).all()
        assert not row[length:].any()


def test_the_flops_are_those_of_open_clips_profile():
    # Its docs/model_profile.csv has 14.78 GFLOP forward for a sample of ViT-B-32 at full length.
    config = load_config("ViT-B-32")
    full = model.least_gflops(config, torch.tensor([77])) / 3
    assert full == pytest.approx(14.78, rel=0.01)
    assert model.least_gflops(config, torch.tensor([15])) < 0.75 * 3 * full
    assert model.least_gflops(load_config("RN50"), torch.tensor([77])) is None


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"providers": "vlmfast,openclip"}, BenchError, "unknown provider 'openclip'"),
        ({"caption_length": "2"}, BenchError, "a mean from 3 to 20, or real; got '2'"),
        ({"caption_length": "long"}, BenchError, "got 'long'"),
        ({"batch": 0}, BenchError, "batch must be at least 1"),
        ({"model": "ViT-B-33"}, DataError, "ViT-B-33"),
    ],
)
def test_refusals(tiny, changes, error, match):
    with pytest.raises(error, match=match):
        run(tiny, **changes)


def test_memory_is_measured_in_a_fresh_process(tiny, monkeypatch):
    step = model.one_step("vlmfast", {"model": str(tiny), "batch": 3, "caption_length": "9"})
    assert memory.peak_of(step).process_bytes > MIB
    step()


def test_the_command_its_file_and_its_table(tiny, open_clip, tmp_path, capsys):
    path = tmp_path / "step.json"
    words = ["bench", "model", "--model", str(tiny), "--batch", "4", "--caption-length", "8", "--rounds", "1"]
    assert cli.main([*words, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "processor's ms" in printed
    assert "vlmfast, ms: data" in printed
    (report,) = document.load(path)
    assert "of real tokens" in legend(report)
    assert notes(report, 4).count("image tower") == 2
    table = document.tables(path)
    assert f"`vlmfast bench model --model {tiny} --threads 1 --batch 4 --caption-length 8 --rounds 1`" in table
    assert "| tiny, fp32, B = 4, captions of" in table
    assert "| open_clip | " in table


def test_other_lengths_are_other_tables(tiny, open_clip, tmp_path):
    reports = [dataclasses.asdict(run(tiny, caption_length=length)) for length in ("8", "20")]
    path = Path(tmp_path / "both.json")
    path.write_text(json.dumps({"reports": reports, "command": "both"}))
    assert len(document.load(path)) == 2
    assert document.tables(path).count("captions of") == 2
