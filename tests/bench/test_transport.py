"""benchmarks/train/bench_transport.py: its paper against the document, its own laws, and the losses as they run."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks/train"))
import bench_transport as bench  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks/train"))


def test_the_document_has_the_paper_s_table():
    assert bench.table(bench.parsed(["--table"])) in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_the_document_has_the_measured_table():
    results = ROOT / "benchmarks/results"
    document = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    names = re.findall(r"\]\(\.\./benchmarks/results/([^)]+transport[^)]*\.json)\)", document)
    assert len(names) == 2
    for name in names:
        assert bench.shown(json.loads((results / name).read_text(encoding="utf-8"))["rows"]) in document


@pytest.mark.parametrize("loss", bench.LOSSES)
@pytest.mark.parametrize("transport", bench.TRANSPORTS)
def test_a_link_without_limits_costs_nothing(loss, transport):
    job = bench.on_paper(loss, 16, 2**18, 512, 1e14)
    assert bench.cost(job, transport, float("inf"), 0.0).now == pytest.approx(job.computed)


def test_a_ring_hides_behind_large_blocks_and_gathering_does_not():
    """What remains of the ring is one message: the last gradient on its way home."""
    job = bench.on_paper("softmax", 16, 2**20, 512, 5e14)
    waits = {each: bench.cost(job, each, 5e10, 0.0).now - job.computed for each in bench.TRANSPORTS}
    assert waits["ring"] == pytest.approx((job.sums + job.lses) / 5e10)
    assert waits["gather"] > 10 * waits["ring"]


@pytest.mark.parametrize("loss", bench.LOSSES)
def test_what_is_held(loss):
    """Gathering holds what all ranks have, the ring as much for any number of ranks."""
    jobs = [bench.Job(loss, W, 8192, 512, 2, 0.0, 0.0) for W in (4, 64)]
    gathered, ringed = ([bench.held(job, transport) for job in jobs] for transport in bench.TRANSPORTS)
    assert gathered[1] == 16 * gathered[0]
    assert ringed[1] == ringed[0] < gathered[0]


@pytest.mark.slow
def test_the_losses_send_what_the_paper_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks/train")  # for the processes that are started
    options = ["--processes", "3", "--rows", "16", "--dim", "8", "--dtype", "bfloat16", "--megabytes", "1000"]
    rows = bench.measure(bench.parsed([*options, "--milliseconds", "0", "--rounds", "1"]))
    assert len(rows) == 4
    for row in rows:
        assert row["counted_sent_bytes"] == row["predicted_sent_bytes"], row
