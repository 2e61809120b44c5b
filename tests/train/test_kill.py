"""kill -9 at random moments, again and again: the run that survives is the run that was never killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from standin import lines, train

from vlmfast.train import latest_checkpoint

STEPS, KILLS = 300, 12


def run(out: Path, save_every: int, kill_after_s: float | None = None) -> bool:
    """Train in a process of its own; whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            train(out, STEPS, total=STEPS, save_every=save_every, log_every=1, keep=2, resume="latest", stream=nowhere)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def scenario(out: Path) -> None:
    """One run that nobody kills; one that saves after each step, is killed again and again, and then left in peace."""
    torch.set_num_threads(1)  # a fork keeps no other thread
    train(out / "warm", 1)  # what is imported on first use
    began = time.perf_counter()
    train(out / "timed", 4, save_every=1)
    some_steps_s = time.perf_counter() - began
    run(out / "straight", 0)
    moments, longest, before = random.Random(0), 2 * some_steps_s, None
    for _ in range(KILLS):
        killed = run(out / "killed", 1, moments.uniform(0.0, longest))
        latest = latest_checkpoint(out / "killed/checkpoints")
        print(latest.name if killed and latest else killed)
        if latest == before:  # the machine may be slower by now
            longest *= 1.25
        before = latest
    run(out / "killed", 100)


@pytest.mark.slow
def test_killed_runs_end_as_the_one_that_was_not(tmp_path):
    told = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=True)
    latest = told.stdout.split()
    assert "False" not in latest, "a run came to its end before its kill: take more STEPS"
    assert len(set(latest)) > 3, f"kills should come in the middle of things; after each: {latest}"
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        straight, killed = (tmp_path / run / f"checkpoints/step_{STEPS:06d}" / name for run in ("straight", "killed"))
        assert killed.read_bytes() == straight.read_bytes()
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")
    assert [line["step"] for line in lines(tmp_path / "killed")] == list(range(1, STEPS + 1))
    survivors = {path.name for path in (tmp_path / "killed/checkpoints").iterdir()}
    assert survivors == {"latest", f"step_{STEPS - 100:06d}", f"step_{STEPS:06d}"}, "no leftovers of killed saves"


if __name__ == "__main__":
    scenario(Path(sys.argv[1]))
