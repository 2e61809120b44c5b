"""`vlmfast train` on damaged tars: the run finishes, and tells what it left out."""

import json
import re

import pytest
from crawl import damaged_shards

from vlmfast import cli


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_on_damaged_tars_finishes_and_tells_the_counts(tmp_path, capsys, workers):
    url, good, reasons = damaged_shards(tmp_path / "tars")
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 320, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "model.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    (tmp_path / "tars" / "__len__").write_text(str(len(good)))
    words = ["train", "--dataset-type", "webdataset", "--train-data", url, "--model", str(tmp_path / "model.json")]
    words += ["--epochs", "2", "--batch-size", "64", "--warmup", "2", "--workers", workers, "--device", "cpu"]
    assert cli.main([*words, "--logs", str(tmp_path), "--name", "run", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["step"] == 2 * (len(good) // 64)
    (line,) = [line for line in printed.err.splitlines() if line.startswith("skipped ")]
    assert line.startswith(f"skipped {sum(reasons.values())}: ")
    assert {reason: int(count) for count, reason in re.findall(r"(\d+) ([a-z ]+), such as", line)} == reasons
