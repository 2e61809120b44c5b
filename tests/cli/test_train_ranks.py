"""`vlmfast train` on two ranks, beside one process that takes both ranks' pairs."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from vlmfast import cli
from vlmfast.train import read_metrics

RUNS = {  # flags of two ranks | of the process beside them, if they differ by more than the batch
    "ddp": (["--positives", "pair"], None),
    "siglip": (["--siglip", "--loss-dist-impl", "shift"], ["--siglip"]),
    "accum": (["--positives", "pair", "--accum-freq", "2", "--batch-size", "8"], ["--positives", "pair"]),
    "fsdp": (["--fsdp", "--fsdp-checkpoint", "sharded", "--grad-checkpointing", "--ema", "0.9"], []),
    "compiled": (["--fsdp", "--micro-batch-size", "5", "--torchcompile", "--torchcompile-backend", "eager"], []),
}
COMMON = ["--steps", "3", "--warmup", "2", "--log-every-n-steps", "1", "--val-frequency", "0", "--device", "cpu"]
LOSSES = ("train/contrastive_loss", "train/grad_norm", "train/logit_scale")


def on_ranks(*lines):
    """What two ranks said that ran the command lines."""
    script = Path(__file__).with_name("train_on_ranks.py")
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, str(script), json.dumps(lines)], capture_output=True, text=True, env=environment)


def told(folder):
    return [record for record in read_metrics(folder / "metrics.jsonl") if "train/lr" in record]


@pytest.mark.slow
def test_two_ranks_train_as_one_process_with_both_their_pairs(tmp_path, capsys):
    tarfile.open(tmp_path / "one.tar", "w").close()
    where = ["--logs", str(tmp_path), *COMMON, "--batch-size", "16"]
    wrong = ["--dataset-type", "webdataset", "--train-data", str(tmp_path / "one.tar"), "--train-num-samples", "99"]
    wrong += ["--tokenizer", str(tmp_path / "ddp/tokenizer.json"), "--name", "wrong"]
    ranks = on_ranks(*[[*where, *flags, "--name", name] for name, (flags, _) in RUNS.items()], [*where, *wrong])
    assert ranks.returncode != 0
    assert ranks.stderr.count("2 ranks need at least 2 shards, and the data set has 1") == 1
    assert not (tmp_path / "wrong").exists()
    for name, (flags, alone) in RUNS.items():
        words = ["--logs", str(tmp_path / "alone"), *COMMON, "--batch-size", "32", "--name", name]
        assert cli.main(["train", *words, *(flags if alone is None else alone)]) == 0
        for ours, exact in zip(told(tmp_path / name), told(tmp_path / "alone" / name), strict=True):
            for key in LOSSES:
                assert ours[key] == pytest.approx(exact[key], rel=2e-5), f"{name}: {key}"
    capsys.readouterr()
    flags = ["--pretrained", str(tmp_path / "fsdp"), "--split", "val", "--json"]
    assert cli.main(["eval", *flags, "--ema"]) == cli.main(["eval", *flags]) == 0

    words = ["--logs", str(tmp_path), *COMMON, "--batch-size", "32", "--name", "fsdp", "--resume", "latest"]
    words += ["--steps", "4", "--ema", "0.9"]
    capsys.readouterr()
    assert cli.main(["train", *words]) == 1
    assert "written at world_size 2, this run has world_size 1" in capsys.readouterr().err
    assert cli.main(["train", *words, "--elastic"]) == 0
    assert [record["step"] for record in told(tmp_path / "fsdp")] == [1, 2, 3, 4]
