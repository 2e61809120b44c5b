"""open_clip_train as it is and with vlmfast's losses, on one command line: losses, seconds and memory of the steps.

    vlmfast data export --out scenes --level L0 --size 10000 --image-size 32 --shard-size 5000
    python benchmarks/train/open_clip_parity.py --rounds 1 \\
        --train-data 'scenes/{00000..00001}.tar' --train-num-samples 12288 --batch-size 4096 --epochs 1 --workers 0 \\
        --model tiny --precision fp32 --device cpu

Every run is a process of its own, and the two take turns. All flags but --rounds and --model-config (the folder of a
model's JSON file) are open_clip_train's. The model "tiny", below, is known to it: next to no activations, so that what
the loss holds is seen. The samples come in one order: the shuffle buffer, which is seeded by the clock, gets a seed.
"""

import argparse
import importlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch.nn.modules.module import register_module_forward_hook

from vlmfast.bench import memory
from vlmfast.bench.providers import open_clip_module
from vlmfast.integrations import open_clip as integration

RUNS = ("open_clip", "vlmfast")
LOSSES = ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss")
TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 64, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def train(run, config, flags):
    """One run's losses, the time of each, and the peak of its process."""
    open_clip, main = open_clip_module("open_clip"), importlib.import_module("open_clip_train.main")
    webdataset = importlib.import_module("webdataset")
    shuffle = webdataset.filters.shuffle
    webdataset.shuffle = lambda *args, **sizes: shuffle(*args, **sizes, rng=random.Random(0))
    open_clip.add_model_config(config)
    losses, times = [], []

    def note(module, _, output):
        if type(module).__name__ in LOSSES:
            losses.append(sum(output.values()).item())
            times.append(time.perf_counter())

    register_module_forward_hook(note)
    with tempfile.TemporaryDirectory() as logs:
        start = main.main if run == "open_clip" else integration.main
        peak = memory.peak_of(lambda: start([*flags, "--logs", logs]))
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {"losses": losses, "seconds": seconds, "peak_bytes": peak.process_bytes}


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage="%(prog)s [--rounds N] [--model-config DIR] <open_clip's>"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model-config", type=Path)
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    own, flags = parser.parse_known_args()
    if own.one:
        own.out.write_text(json.dumps(train(own.one, own.model_config, flags)))
        return

    results = {run: [] for run in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny.json").write_text(json.dumps(TINY))
        out = Path(folder) / "out"
        for _ in range(own.rounds):
            for run in RUNS:
                mine = ["--one", run, "--out", str(out), "--model-config", str(own.model_config or folder)]
                subprocess.run([sys.executable, __file__, *mine, *flags], check=True)
                results[run].append(json.loads(out.read_text()))
    print(
        f"{'':10} {'calls':>6} {'first loss':>11} {'last loss':>11} {'seconds a step':>15} {'peak of the process':>20}"
    )
    for run, rounds in results.items():
        losses, peak = rounds[0]["losses"], min(result["peak_bytes"] for result in rounds)
        seconds = statistics.median(second for result in rounds for second in result["seconds"])
        print(f"{run:10} {len(losses):6} {losses[0]:11.6f} {losses[-1]:11.6f} {seconds:15.3f} {peak / 1e6:17.0f} MB")
    theirs, ours = (results[run][0]["losses"] for run in RUNS)
    worst = max(abs(mine / other - 1) for mine, other in zip(ours, theirs, strict=True))
    print(f"largest relative difference between two losses of the same step: {worst:.1e}")


if __name__ == "__main__":
    main()
