"""`vlmfast train` killed by kill -9 at random steps, one process or one of two ranks, ends as one that was not.

One process is started again by hand, as a user would; ranks by torchrun, which kills the others when one of them dies.
VLMFAST_KILLS=10 kills ten times instead of twice, and in every combination of data and ranks.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.torch import load_file
from standin import CLOCK

from vlmfast.train import latest_checkpoint, read_metrics

KILLS = int(os.environ.get("VLMFAST_KILLS", "2"))
CASES = [("tars", 2)] if KILLS == 2 else [(data, ranks) for data in ("digits", "tars") for ranks in (0, 2)]
STEPS = 20 + 4 * KILLS
LONGEST_S = 300


def command(ranks: int, restarts: int, words: list[str]) -> list[str]:
    """vlmfast train, by torchrun if there are ranks."""
    launch = [sys.executable, "-m"]
    if ranks:
        how = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.05"]
        launch += ["torch.distributed.run", *how, "-m", "--"]
    return [*launch, "vlmfast.cli", "train", *words]


def start(line: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(line, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def at(out: Path) -> int:
    """The step of the newest line of the run's metrics."""
    path = out / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return int(records[-1]["step"]) if records else 0


def worker(parent: int, rank: int) -> int | None:
    """The process of that rank, where torchrun (`parent`) has one at the moment."""
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    return int(child)
            except OSError:  # it died meanwhile
                continue
    return None


def wait_for(out: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Returns once the run has written the line of that step."""
    began = time.monotonic()
    while at(out) < step:
        assert process.poll() is None, f"the run ended before step {step}"
        assert time.monotonic() - began < LONGEST_S, f"no step {step} after {LONGEST_S} s"
        time.sleep(0.002)


def killed(out: Path, words: list[str], ranks: int) -> list[int]:
    """The newest step at each kill; the run is finished then."""
    chance, log = random.Random(str(out)), out.with_suffix(".log")
    process, seen = start(command(ranks, KILLS, words), log), []
    for target in sorted(chance.sample(range(1, STEPS - 8), KILLS)):
        wait_for(out, target, process)
        time.sleep(chance.uniform(0, 0.05))
        victim, rank = process.pid if not ranks else None, chance.randrange(max(ranks, 1))
        while victim is None:  # torchrun starts the ranks anew
            assert process.poll() is None, log.read_text()[-3000:]
            victim = worker(process.pid, rank)
        seen.append(at(out))
        os.kill(victim, signal.SIGKILL)
        if not ranks:
            assert process.wait() == -signal.SIGKILL
            process = start(command(ranks, KILLS, words), log)
        while ranks and worker(process.pid, rank) == victim:
            time.sleep(0.01)
    assert process.wait(LONGEST_S) == 0, log.read_text()[-3000:]
    return seen


def write_tars(folder: Path) -> str:
    """Four tars of noise with captions, and what names them."""
    noise = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(15):
                image = io.BytesIO()
                PIL.Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)).save(image, "PNG")
                for ending, content in (("png", image.getvalue()), ("txt", f"noise {shard} of {i}".encode())):
                    member = tarfile.TarInfo(f"{shard}-{i}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{0..3}.tar")


def flags(data: str, folder: Path) -> list[str]:
    """A run of some tens of steps with a checkpoint every few, on that data."""
    words = [
        f"--logs={folder}",
        "--resume=latest",
        "--device=cpu",
        f"--steps={STEPS}",
        "--warmup=2",
        "--val-frequency=0",
    ]
    words += ["--log-every-n-steps=1", "--batch-size=16"]
    if data == "digits":
        return [*words, "--save-frequency=0.05"]
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1}
    (folder / "small.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    words += ["--dataset-type=webdataset", f"--train-data={write_tars(folder)}", "--train-num-samples=60"]
    return [*words, f"--model={folder / 'small.json'}", "--workers=2", "--shuffle-buffer=10", "--batch-size=8"]


def differences(one: Path, other: Path) -> list[str]:
    """What two runs' folders do not have in common to the bit: lines but for the clock's values, weights, optimizer.

    Where the data stands is told from the last resume on, so that it is not compared: the lines show the samples.
    """
    clock = {f"train/{name}" for name in CLOCK}
    lines = [
        [
            {key: value for key, value in line.items() if key not in clock}
            for line in read_metrics(run / "metrics.jsonl")
        ]
        for run in (one, other)
    ]
    wrong = [] if lines[0] == lines[1] else ["metrics.jsonl"]
    a, b = (latest_checkpoint(run / "checkpoints") for run in (one, other))
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        if ours.keys() != theirs.keys() or not all(ours[key].equal(theirs[key]) for key in ours):
            wrong.append(name)
    ours, theirs = (json.loads((path / "state.json").read_text()) | {"data": None} for path in (a, b))
    return wrong + ([] if ours == theirs else ["state.json"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
@pytest.mark.parametrize(("data", "ranks"), CASES)
def test_a_killed_rank_changes_no_bit(tmp_path, data, ranks):
    words = flags(data, tmp_path)
    log = tmp_path / "straight.log"
    process = start(command(ranks, 0, [*words, "--name=straight"]), log)
    assert process.wait(LONGEST_S) == 0, log.read_text()[-3000:]
    seen = killed(tmp_path / "killed", [*words, "--name=killed"], ranks)
    print(f"{data}, {ranks or 'no'} ranks: killed at steps {seen} of {STEPS}")
    assert differences(tmp_path / "straight", tmp_path / "killed") == []
    assert (tmp_path / "killed.log").read_text().count("resumed at step") >= 1
    assert [line["step"] for line in read_metrics(tmp_path / "killed/metrics.jsonl")][:STEPS] == list(
        range(1, STEPS + 1)
    )
