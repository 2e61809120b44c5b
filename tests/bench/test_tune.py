"""The search for tiles, under Triton's interpreter where kernels run; times are made up."""

import json
import subprocess
import sys

import pytest
import torch

from vlmfast import cli, clip_loss
from vlmfast.bench import tune
from vlmfast.bench.providers import BenchError
from vlmfast.errors import BackendError
from vlmfast.ops import _configs, _tiles
from vlmfast.ops._configs import CANDIDATES, Case, Config

SMALL, TALL = Config(32, 32, 32, 4, 1), Config(64, 32, 32, 4, 1)
ALL = "softmax sigmoid hinge hardest topk"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there under the interpreter


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMFAST_CACHE", str(tmp_path))
    monkeypatch.delenv("VLMFAST_TUNED", raising=False)
    _configs.tuned.cache_clear()
    yield tmp_path / "tiles-v1.json"
    _configs.tuned.cache_clear()


def search(seconds, ops=("clip",), **options):
    """A search of two tiles where kernels take as long as `seconds` says of a tile, the shipped one a second."""
    settings = {"batch": 40, "device": DEVICE, "rounds": 1, "seconds": 0.0, "candidates": {SMALL: ALL, TALL: ALL}}
    timed = {"timed": lambda trial: seconds.get(trial.config, 1.0)}
    return tune.tune((16,), ("float32",), ops, **{**settings, **timed, **options})


def tiles_in_use():
    """The tiles that a call of clip_loss now computes with."""
    x, y = torch.randn(2, 40, 16, device=DEVICE)
    with tune._recorded() as launches:
        clip_loss(x.requires_grad_(), y, 5.0).backward()
    return {config for config, _, _ in launches}


def test_every_triton_op_is_tuned_and_kept(triton_backend, file):
    said = []
    outcomes = search({SMALL: 0.5, TALL: 0.7}, tuple(tune.CALLS), say=said.append)
    assert [outcome.case.kind for outcome in outcomes] == ALL.split()
    for outcome in outcomes:
        assert outcome.stored, outcome.rows
        assert outcome.best == SMALL
        assert outcome.gain == pytest.approx(0.5)
        assert [row.tile for row in outcome.rows] == [SMALL, TALL]
        assert outcome.rows[1].best_ms.median == 500  # in turns with the best so far, not with the shipped tile
    assert len(said) == 3 * len(outcomes)
    assert {row["kind"] for row in json.loads(file.read_text())["tiles"]} == set(ALL.split())
    assert tiles_in_use() == {SMALL}
    assert "32×32×32, 4 warps, 1 stages" in tune.table(outcomes)


def test_the_later_triton_tile_wins_if_it_is_the_faster(triton_backend, file):
    (outcome,) = search({SMALL: 0.9, TALL: 0.7})
    assert outcome.best == TALL
    assert tiles_in_use() == {TALL}


def test_two_percent_of_a_triton_kernel_are_not_worth_an_entry(triton_backend, file):
    search({SMALL: 0.5})
    (outcome,) = search({SMALL: 0.985})
    assert not outcome.stored
    assert outcome.gain == pytest.approx(0.015)
    assert SMALL not in tiles_in_use()  # what an earlier search had stored has gone


def test_a_triton_tile_that_computes_something_else_never_wins(triton_backend, file, monkeypatch):
    launch = _tiles.launch

    def misses_the_last_rows(kernel, grid, *args, config=None, **constants):
        if config == SMALL and kernel.__name__ == "_gradient_tiles":
            grid = (grid[0] - 1,)
        return launch(kernel, grid, *args, config=config, **constants)

    monkeypatch.setattr(_tiles, "launch", misses_the_last_rows)
    (outcome,) = search({SMALL: 0.1, TALL: 0.7})
    assert outcome.best == TALL
    assert "from the shipped tile's" in outcome.rows[0].outcome
    assert outcome.rows[0].ms is None


def test_a_triton_tile_that_spills_or_does_not_compile_never_wins(triton_backend, file, monkeypatch):
    launch = _tiles.launch

    class Compiled:
        n_regs, n_spills = 255, 12

    def too_large(kernel, grid, *args, config=None, **constants):
        if config == SMALL:
            raise RuntimeError("out of resource: shared memory\nand more")
        launch(kernel, grid, *args, config=config, **constants)
        return Compiled if config == TALL else None

    monkeypatch.setattr(_tiles, "launch", too_large)
    (outcome,) = search({SMALL: 0.1, TALL: 0.1})
    assert [row.outcome for row in outcome.rows] == [
        "cannot run: out of resource: shared memory",
        "spills 12 registers",
    ]
    assert outcome.rows[1].registers == 255
    assert outcome.best == outcome.shipped
    assert not outcome.stored


def test_a_triton_search_on_the_real_clock_writes_what_it_measured(triton_backend, file, tmp_path):
    (outcome,) = search({}, timed=None, candidates={SMALL: "softmax", TALL: "sigmoid"}, store=False)
    assert not file.exists()
    assert [row.tile for row in outcome.rows] == [SMALL]
    assert outcome.rows[0].ms.median > 0
    tune.write_json([outcome], tmp_path / "tune.json")
    written = json.loads((tmp_path / "tune.json").read_text())
    assert written["outcomes"][0]["case"] == outcome.case._asdict()
    assert (outcome.case.kind, outcome.case.depth) == ("softmax", 64)
    assert {"machine", "versions", "commit", "date"} <= written.keys()


def trial(*results, operands="bfloat16"):
    return tune.Trial(SMALL, Case("softmax", operands, "pointers", 64), results, [], None, 0)


def test_results_may_differ_by_rounding_and_no_more():
    loss, gradient, indices = torch.tensor(3.0), torch.ones(100), torch.arange(10_000)
    shipped = trial(loss, gradient, indices)
    other = indices.clone()
    other[:5] += 1
    assert tune.apart(trial(loss * (1 + 5e-6), gradient * (1 + 1e-3), other), shipped) == ""
    assert "result 0 is 2.0e-05" in tune.apart(trial(loss * (1 + 2e-5), gradient, indices), shipped)
    assert "result 1" in tune.apart(trial(loss, gradient * (1 + 3e-3), indices), shipped)
    assert "result 1" in tune.apart(trial(loss, gradient * float("nan"), indices), shipped)
    other[:50] += 1
    assert "result 2" in tune.apart(trial(loss, gradient, other), shipped)
    exact = [trial(loss, gradient * factor, operands="ieee") for factor in (1 + 1e-3, 1)]
    assert "result 1" in tune.apart(*exact)


def test_no_gpu_is_a_sentence_and_status_1(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 1
    assert capsys.readouterr().err.startswith("vlmfast tune: needs a GPU: torch ")


def test_a_dry_run_lists_the_candidates(capsys, monkeypatch):
    assert cli.main(["tune", "--dry-run", "--target", "sm_90"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CANDIDATES["sm_90"])
    assert any("sm_90  128×128×64, 8 warps, 3 stages" in line and "softmax" in line for line in lines)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(tune.listing(None).splitlines()) == sum(map(len, CANDIDATES.values()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dry_run": True, "target": "sm_70"}, "target: unknown 'sm_70'; choose of sm_80, sm_90, sm_100, gfx942"),
        ({"dim": "512,wide"}, "dim: expected widths"),
        ({"dtype": "int8"}, "dtype: unknown 'int8'"),
        ({"ops": "clip,clop"}, "ops: unknown 'clop'"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
    ],
)
def test_what_does_not_exist_is_refused_in_words(monkeypatch, flags, message):
    monkeypatch.setattr(tune, "_need_gpu", lambda: None)
    with pytest.raises(BenchError, match=message):
        tune.main(tune.Tune(**flags))


def test_the_search_needs_no_tyro(monkeypatch):
    code = "import sys; sys.modules['tyro'] = None; from vlmfast.bench.tune import Tune, main; main(Tune(dry_run=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gfx942" in done.stdout


def test_a_gpu_that_is_too_old_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None: None)
    monkeypatch.setattr(_tiles, "unsupported", lambda x, y: "its kernels need compute capability 8.0 or later")
    with pytest.raises(BackendError, match=r"needs a GPU: its kernels need compute capability 8\.0"):
        tune.main(tune.Tune())
