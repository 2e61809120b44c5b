"""`vlmfast train` on damaged tars, on one rank and on two: the run finishes, and tells what it left out."""

import json
import os
import re
import subprocess
import sys

import pytest
from crawl import damaged_shards

from vlmfast import cli


@pytest.fixture
def run(tmp_path):
    """(flags of two epochs on damaged tars, the good pairs, counts of the others by reason)"""
    url, good, reasons = damaged_shards(tmp_path / "tars")
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 320, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "model.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    (tmp_path / "tars" / "__len__").write_text(str(len(good)))
    words = ["train", "--dataset-type", "webdataset", "--train-data", url, "--model", str(tmp_path / "model.json")]
    words += ["--epochs", "2", "--warmup", "2", "--device", "cpu", "--logs", str(tmp_path), "--name", "run", "--json"]
    return words, good, reasons


def told(lines):
    """Counts by reason, of the one line that tells them."""
    (line,) = [line for line in lines if line.startswith("skipped ")]
    counts = {reason: int(count) for count, reason in re.findall(r"(\d+) ([a-z ]+), such as", line)}
    assert line.startswith(f"skipped {sum(counts.values())}: ")
    return counts


@pytest.mark.slow
def test_a_run_on_damaged_tars_finishes_and_tells_the_counts(run, capsys):
    words, good, reasons = run
    assert cli.main([*words, "--batch-size", "64", "--workers", "2"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["step"] == 2 * (len(good) // 64)
    assert told(printed.err.splitlines()) == reasons


@pytest.mark.slow
def test_two_ranks_on_damaged_tars_finish_and_tell_the_counts_of_both_once(run):
    words, good, reasons = run
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    done = subprocess.run(
        [*launch, "vlmfast.cli", *words, "--batch-size", "32"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 2 * (len(good) // 64)
    assert told(done.stderr.splitlines()) == reasons
