"""open_clip's own training loop with vlmfast's losses in it. Skipped where `open_clip` is not installed."""

import json
import logging
import os
import subprocess
import sys
import warnings

import open_clip_runs
import pytest
from open_clip_runs import LOSSES, RANKED, arguments

from vlmfast.errors import BackendError, MissingExtraError
from vlmfast.integrations import open_clip as integration
from vlmfast.losses import ClipLoss, SigLipLoss


@pytest.fixture
def unpatched(open_clip):
    """open_clip, and its losses by module and name; afterwards it is as it was."""
    modules = (open_clip, open_clip.loss, open_clip.factory)
    before = {(module, name): getattr(module, name) for module in modules for name in LOSSES if hasattr(module, name)}
    yield open_clip, before
    integration.undo()
    assert {(module, name): getattr(module, name) for module, name in before} == before


def test_every_module_gets_ours_and_gives_them_back(unpatched, caplog):
    _, before = unpatched
    caplog.set_level(logging.INFO)
    assert all(loss.__module__ == "open_clip.loss" for loss in before.values())  # importing us changed nothing
    for _ in range(2):
        integration.apply()
        assert {getattr(module, name).__module__.split(".")[0] for module, name in before} == {"vlmfast"}
    integration.undo()
    assert all(getattr(module, name) is loss for (module, name), loss in before.items())
    assert [message.split()[:2] for message in caplog.messages] == [["vlmfast", "replaced"], ["vlmfast", "put"]]


def test_only_what_is_asked_for(unpatched):
    open_clip, before = unpatched
    with integration.apply(clip=False, coca=False, distill=False) as patches:
        assert str(patches) == "open_clip.loss.SigLipLoss, open_clip.factory.SigLipLoss"
        assert open_clip.loss.SigLipLoss is SigLipLoss
        assert open_clip.ClipLoss is before[open_clip, "ClipLoss"]
        integration.apply(siglip=False)  # False leaves what stands
        assert (open_clip.ClipLoss, open_clip.loss.SigLipLoss) == (ClipLoss, SigLipLoss)
    assert (open_clip.ClipLoss, open_clip.loss.SigLipLoss) == (ClipLoss, before[open_clip.loss, "SigLipLoss"])


def test_unknown_versions_are_refused(unpatched, monkeypatch):
    open_clip, _ = unpatched
    for version in ("2.32.0", "5.0.0"):
        monkeypatch.setattr(open_clip, "__version__", version)
        with pytest.raises(BackendError, match=f"open_clip_torch {version} .* nothing was patched; known: 3.3 and 4"):
            integration.apply()


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_losses_that_take_more_are_refused(unpatched, monkeypatch, method):
    open_clip, _ = unpatched

    def changed(self, margin=0.1):
        pass

    monkeypatch.setattr(open_clip.loss.DistillClipLoss, method, changed)
    with pytest.raises(BackendError, match=r"takes \(.*margin\).* so nothing was patched; use the unpatched open_clip"):
        integration.apply()
    assert open_clip.ClipLoss is not ClipLoss
    integration.apply(distill=False)
    assert open_clip.ClipLoss is ClipLoss


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'open_clip_torch\[training\]>=3.3'"):
        integration.apply()


def test_without_what_open_clip_train_needs(unpatched, monkeypatch, capsys):
    open_clip, before = unpatched
    monkeypatch.setitem(sys.modules, "open_clip_train.main", None)
    with pytest.raises(MissingExtraError, match=r"open_clip_train\.main cannot .* 'open_clip_torch\[training\]>=3.3'"):
        integration.main([])
    assert capsys.readouterr().out == ""
    assert open_clip.ClipLoss is before[open_clip, "ClipLoss"]


@pytest.mark.slow
def test_the_command_without_open_clip(tmp_path):
    (tmp_path / "open_clip.py").write_text("raise ModuleNotFoundError(\"No module named 'timm'\")")
    command = [sys.executable, "-m", "vlmfast.integrations.open_clip", "--help"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("vlmfast: open_clip cannot be imported (No module named 'timm'); run: pip install")


@pytest.fixture(scope="module")
def training(open_clip, tmp_path_factory):
    """`open_clip_train.main`, and the folder of what it trains."""
    before = open_clip.factory._MODEL_CONFIG_PATHS[:]
    folder = tmp_path_factory.mktemp("models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another library's
        pytest.importorskip("open_clip_train.main")
        yield open_clip_runs.prepare(folder), folder
    open_clip.factory._MODEL_CONFIG_PATHS[:] = before


def agree(ours, theirs, calls):
    assert len(ours) == len(theirs) == calls
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    assert sum(ours[-1].values()) < 0.95 * sum(ours[0].values())  # there was something to agree on


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize(
    ("calls", "batch", "flags"),
    [
        (200, 16, "--model tiny-clip"),
        (60, 16, "--model tiny-clip --accum-freq 2 --grad-clip-norm 1"),
        (40, 16, "--model tiny-clip --distill-model tiny-clip --distill-pretrained {folder}/tiny-clip.pt"),
        (200, 16, "--model tiny-bias --siglip"),
        (30, 8, "--model tiny-coca --pretrained {folder}/tiny-coca.pt"),
    ],
    ids=["clip", "accum-freq", "distill", "siglip", "coca"],
)
def test_it_trains_as_before(training, shards, tmp_path, capsys, calls, batch, flags):
    main, folder = training
    theirs, ours = open_clip_runs.both_ways(main, tmp_path, arguments(shards, folder, calls, batch, flags))
    assert "vlmfast replaced open_clip.ClipLoss" in capsys.readouterr().out
    agree(ours, theirs, calls)


@pytest.mark.slow
def test_two_ranks_train_as_before(training, shards, tmp_path):
    rank = [open_clip_runs.__file__, str(tmp_path), shards]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *rank]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("vlmfast replaced") == len(RANKED)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for runs in zip(*ranks, strict=True):  # of one command line, on either rank
        theirs, ours = (
            [{name: (one[name] + two[name]) / 2 for name in one} for one, two in zip(*steps, strict=True)]
            for steps in zip(*runs, strict=True)
        )
        agree(ours, theirs, 30)
