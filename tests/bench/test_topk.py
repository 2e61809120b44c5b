"""The benchmark of exact search."""

import dataclasses
import json

import pytest
import torch

from vlmfast.bench import memory, meter, topk
from vlmfast.bench.memory import Peak
from vlmfast.bench.providers import BenchError
from vlmfast.bench.topk import TopkBench

MIB = 2**20
QUICK = TopkBench(queries=24, items=96, dim=16, k=3, rounds=2, seconds=0.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(topk, "TUNING_SECONDS", 0.0)
    monkeypatch.setattr(meter, "MICROKERNEL_SECONDS", 1e-4)
    monkeypatch.setattr(memory, "peak_in_child", lambda setup, **_: Peak(5 * MIB, 300 * MIB))


def run(**changes):
    return topk.run(dataclasses.replace(QUICK, **changes))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_everyone_finds_the_true_items(device, fake_cuda):
    ours, theirs = run(device=device).rows
    for row in (ours, theirs):
        assert row.recall == 1
        assert row.loss_error < 1e-6
        assert row.rounds == 2
        assert row.gflops == pytest.approx(2 * 24 * 96 * 16 / row.full_ms.median / 1e6)
        assert row.extra_bytes > 0
    assert theirs.full_ratio == theirs.full_ms.median / ours.full_ms.median


def test_recall_and_values_tell_a_wrong_answer(monkeypatch):
    def wrong(queries, items):
        values, indices = torch.mm(queries, items.T).topk(3, dim=1)
        indices[:, 2] = -1
        return 1.5 * values, indices

    monkeypatch.setattr(topk, "forms", lambda provider, k: {"": wrong})
    row = run().rows[0]
    assert row.recall == pytest.approx(2 / 3)
    assert row.loss_error == pytest.approx(0.5, rel=1e-5)


def test_what_does_not_fit_is_not_tried(fake_cuda):
    fake_cuda.free = 4 * 24 * 96 - 1
    assert "do not fit" in run(device="cuda").rows[1].reason
    assert run(device="cuda", queries=8).rows[1].full_ms


def test_who_fails_says_why(monkeypatch):
    def broken(queries, items):
        raise ValueError("k is too large for this kernel")

    monkeypatch.setattr(topk, "forms", lambda provider, k: {"": broken})
    assert [row.reason for row in run().rows] == 2 * ["ValueError: k is too large for this kernel"]


def test_a_search_is_ready_to_run_in_another_process():
    call = topk.one_search("mm-topk", "whole", dataclasses.asdict(QUICK))
    values, indices = call()
    assert values.shape == indices.shape == (24, 3)


def test_a_wrong_number_is_refused():
    with pytest.raises(BenchError, match="k must be at least 1; got 0"):
        run(k=0)


def test_the_json_and_the_table(tmp_path, capsys):
    topk.main(dataclasses.replace(QUICK, json=tmp_path / "new" / "topk.json"))
    read = json.loads((tmp_path / "new" / "topk.json").read_text())
    assert read["kernel"] == "similarity_topk"
    assert [row["provider"] for row in read["rows"]] == ["vlmfast", "mm-topk"]
    printed = capsys.readouterr().out
    for words in ("24 queries, k=3, D=16, float32", "N = 96", "recall", "value err", "mm-topk"):
        assert words in printed
    assert "grad err" not in printed
