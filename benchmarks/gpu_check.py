"""The tests on a GPU and the benchmarks beside their rivals, each part within its share of the time; see gpu_check.sh.

A part writes <out>/<date>-<part>.json, with GPU, driver, versions and commit inside, and prints a short table last. The
benchmarks of a part run one after the other in a process of their own: if a rival breaks the GPU for that process, the
rest goes on in a new one, and that benchmark once more without other people's kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Of the time, when all parts run.
SHARES = {
    "tests": 0.26,
    "loss": 0.24,
    "topk": 0.06,
    "attention": 0.08,
    "patch": 0.05,
    "model": 0.12,
    "step": 0.10,
    "vlm": 0.05,
    "decode": 0.04,
}
GRACE_S = 40  # on top, for the call that is under way when the time is spent
SHOWN = 25  # failures, with a line each
SMALL = {"batch": 1024, "items": 128, "queries": 128, "dim": 8}  # on a processor sizes are divided by these

# Most wanted first: what the time does not suffice for is left out from the end.
EAGER = "vlmfast,eager-one,eager-two"
COMPILED = EAGER + ",torch-compile,torch-compile-two"
CLIP = COMPILED + ",linear-cross-entropy,open_clip,inf-cl,memeff"
BF16 = {"dtype": "bfloat16", "seconds": 1.0, "exact_up_to": 16384}
LOSSES: list[dict[str, Any]] = [
    *({"loss": "clip", "dim": D, "batch": "65536", "providers": CLIP} | BF16 for D in (512, 768, 1024)),
    {"loss": "siglip", "dim": 768, "batch": "65536", "providers": COMPILED + ",open_clip,siglip-kernel"} | BF16,
    {"loss": "vse-hardest", "dim": 768, "batch": "65536", "providers": EAGER + ",torch-compile"} | BF16,
    {"loss": "clip", "dim": 512, "batch": "1048576", "providers": "vlmfast", "rounds": 1} | BF16 | {"seconds": 0.0},
    {"loss": "clip", "dim": 512, "batch": "8192", "providers": EAGER + ",inf-cl,memeff", "dtype": "float32"},
    *({"loss": "clip", "dim": D, "batch": "4096", "providers": CLIP} | BF16 for D in (512, 768, 1024)),
    *({"loss": "clip", "dim": D, "batch": "16384", "providers": EAGER + ",memeff"} | BF16 for D in (512, 768, 1024)),
    {"loss": "siglip", "dim": 768, "batch": "16384", "providers": EAGER + ",siglip-kernel"} | BF16,
    {"loss": "clip", "dim": 512, "batch": "8192", "providers": "vlmfast", "dtype": "float32", "precision": "tf32"},
]
SEARCHES: list[dict[str, Any]] = [
    {"queries": 8192, "items": 2**20, "dim": 512, "k": k, "dtype": dtype, "seconds": 1.0}
    for k, dtype in ((10, "bfloat16"), (100, "bfloat16"), (10, "float32"))
]
STEP = {"precision": "amp_bf16", "seconds": 1.0, "providers": "vlmfast,open_clip,open_clip-compile"}
STEPS: list[dict[str, Any]] = [
    {"model": "ViT-B-32", "batch": 2048, "caption_length": "real"} | STEP,
    {"model": "ViT-B-32", "batch": 2048, "caption_length": "77"} | STEP,
    {"model": "ViT-B-16", "batch": 512, "caption_length": "77"} | STEP,
    {"model": "ViT-L-14", "batch": 256, "caption_length": "77"} | STEP,
]
QUICK = {
    "loss": [
        {"loss": "clip", "dim": 512, "batch": "4096,16384", "providers": EAGER} | BF16,
        {"loss": "clip", "dim": 512, "batch": "8192", "providers": EAGER, "dtype": "float32"},
        {"loss": "siglip", "dim": 768, "batch": "16384", "providers": EAGER} | BF16,
        {"loss": "vse-hardest", "dim": 768, "batch": "16384", "providers": EAGER} | BF16,
    ],
    "topk": [SEARCHES[0] | {"items": 2**17}],
    "model": [STEPS[0] | {"batch": 256, "providers": "vlmfast,open_clip"}],
}
# Benchmarks that are scripts of their own: what each is called with, and what else on a processor.
SCRIPTS = {
    "attention": (
        ["benchmarks/ops/bench_attention.py", "--what", "dense,op", "--seconds", "0.5"],
        ["--heads", "8", "--rounds", "1", "--seconds", "0"],
    ),
    "patch": (
        ["benchmarks/ops/bench_patch_embedding.py", "--rounds", "5", "--seconds", "1"],
        ["--threads", "1", "--rounds", "1", "--seconds", "0"],
    ),
    "step": (
        ["benchmarks/train/bench_cached_step.py", "--captions", "real", "--rounds", "3"],
        ["--batch", "16", "--pieces", "4", "--large-batch", "32", "--micro-batch", "8"],
    ),
    "vlm": (  # the head of a language model at the size of Llama 3
        ["benchmarks/ops/bench_linear_cross_entropy.py", "--supervised", "0.05,0.15,0.5,1"],
        ["--rows", "64", "--width", "64", "--tokens", "512", "--rounds", "1", "--providers", "vlmfast,eager-picked"],
    ),
    "decode": (["benchmarks/models/bench_decode.py"], ["--rounds", "1"]),
}
TESTS = [["tests/ops", "tests/losses", "-k", "triton or losses"], ["tests/ops", "-k", "not triton"]]


def main(words: list[str] | None = None) -> int:
    """0, or 1 if a test failed or a part has no result."""
    options = parser().parse_args(words)
    folders = [str(ROOT), *peers(options.peers), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:0] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folders))  # of the processes that this one starts
    if options.worker:
        work(*options.worker)
        return 0
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit(f"gpu_check: torch {torch.__version__} sees no GPU; --device cpu tries the same with tiny sizes")
    out: Path = options.out or ROOT / "benchmarks" / "results" / place(options.device)
    out.mkdir(parents=True, exist_ok=True)
    parts = options.part
    whole, start, failed = sum(SHARES[part] for part in parts), time.monotonic() - options.spent, False
    for part in parts:
        # What an earlier part did not use is the later ones' to use.
        share = SHARES[part] / whole
        seconds = (start + 60 * options.minutes - time.monotonic()) * share
        whole -= SHARES[part]
        path = free_name(out, part)
        print(f"gpu_check: {part}, {seconds:.0f} s, {path}", file=sys.stderr)
        facts = {"part": part, "command": command(options, part)} | about(options.device)
        run = run_tests if part == "tests" else run_script if part in SCRIPTS else run_benchmarks
        failed |= run(part, options, time.monotonic() + seconds, facts, path)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """The flags of gpu_check.sh."""
    flags = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").partition("\n")[0])
    flags.add_argument(
        "--part", type=parts_of, default=list(SHARES), help=f"all, or some of {', '.join(SHARES)} with commas between"
    )
    flags.add_argument(
        "--quick", action="store_true", help="smaller and fewer benchmarks, and only the tests of values"
    )
    flags.add_argument(
        "--minutes", type=float, default=8.0, help="for all parts that run; nothing new starts after that"
    )
    flags.add_argument("--out", type=Path, help="for the JSON; by default benchmarks/results/<the GPU>")
    flags.add_argument("--peers", type=Path, help="a folder of rivals' wheels or packages")
    flags.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the same with tiny sizes")
    flags.add_argument("--spent", type=float, default=0.0, help=argparse.SUPPRESS)  # seconds, by gpu_check.sh
    flags.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return flags


def parts_of(text: str) -> list[str]:
    """The parts that a flag names, in the order in which they run."""
    names = list(SHARES) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in SHARES]:
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r}; there are {', '.join(SHARES)}, and all")
    return [part for part in SHARES if part in names]


def peers(folder: Path | None) -> list[str]:
    """What to import rivals from: the folder, and one with its wheels unpacked (Triton reads its kernels' files)."""
    if folder is None:
        return []
    wheels = sorted(folder.glob("*.whl"))
    unpacked = Path(tempfile.mkdtemp(prefix="peers-")) if wheels else folder
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    return list(dict.fromkeys([str(folder.resolve()), str(unpacked.resolve())]))


def place(device: str) -> str:
    """The results' folder: the GPU's name."""
    from vlmfast.bench import machine

    name = machine.gpu()["name"] if device == "cuda" else "cpu"
    return "-".join(name.lower().removeprefix("nvidia ").split())


def free_name(out: Path, part: str) -> Path:
    """A file that does not exist yet: <date>-<part>.json, <date>-<part>-2.json and so on."""
    stem = f"{time.strftime('%Y-%m-%d', time.gmtime())}-{part}"
    names = (out / f"{stem}{'' if i == 1 else f'-{i}'}.json" for i in range(1, 1000))
    return next(path for path in names if not path.exists())


def command(options: argparse.Namespace, part: str) -> str:
    """How to repeat a part."""
    extra = " --quick" * options.quick + " --device cpu" * (options.device == "cpu")
    return f"benchmarks/gpu_check.sh --part {part} --minutes {options.minutes:g}{extra}"


def about(device: str) -> dict[str, Any]:
    """Date, machine, versions and commit."""
    from vlmfast.bench import machine, providers

    packages = (package for package, _, _ in providers.PEERS.values())
    return {
        "date": machine.now(),
        "machine": machine.machine() | ({"gpu": machine.gpu()} if device == "cuda" else {}),
        "versions": machine.versions(*packages),
        "commit": machine.commit(),
    }


# The tests


def run_tests(part: str, options: argparse.Namespace, end: float, facts: dict[str, Any], path: Path) -> bool:
    """Runs pytest and writes the part's file; whether a test failed or the most important run did not end."""
    environment = os.environ | {"VLMFAST_REQUIRE": "cpu,triton" if options.device == "cuda" else "cpu"}
    runs: list[dict[str, Any]] = []
    for words in [["tests/losses"]] if options.quick else TESTS:
        left = end - time.monotonic()
        if left < 20:
            runs.append({"arguments": words, "left_out": "the time was spent"})
        else:
            runs.append(pytest_run(words, environment, left))
        path.write_text(json.dumps(facts | {"runs": runs}, indent=1) + "\n")
    failures = [failure for run in runs for failure in run.get("failures", [])]
    for failure in failures[:SHOWN]:
        print(f"{failure['name']}: {failure['message']}")
    if len(failures) > SHOWN:
        print(f"and {len(failures) - SHOWN} more failures, in {path}")
    print(f"\n{'tests':<52}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for run in runs:
        name = " ".join(run["arguments"])
        if "left_out" in run:
            print(f"{name:<52}left out: {run['left_out']}")
        else:
            print(
                f"{name:<52}{run['passed']:>8}{run['failed']:>8}{run['skipped']:>8}{run['seconds']:>9.0f}  {run['end']}"
            )
    return any(run.get("failed") for run in runs) or runs[0].get("end") != "complete"


def _can_be_interrupted() -> None:
    """A process group of its own that heeds SIGINT, which a shell's job in the background inherits as ignored."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def pytest_run(words: list[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """One run of pytest, interrupted when its time is spent: counts, and the first line of each failure."""
    # Most of the time goes into compiling kernels, which many processes can do at once.
    count = min(8, (os.cpu_count() or 2) // 2)
    spread = ["-n", str(count)] if importlib.util.find_spec("xdist") and count > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        # What other versions of a library warn of is not ours to fail for.
        how = ["-q", "--tb=short", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={result}"]
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *words, *spread, *how],
            cwd=ROOT,
            env=environment,
            preexec_fn=_can_be_interrupted,
        )
        end = "complete"
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            end = "interrupted: the time was spent"
            process.send_signal(signal.SIGINT)  # pytest then sums up what it has
            try:
                process.wait(GRACE_S / 2)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = ElementTree.parse(result).getroot() if result.exists() else ElementTree.Element("none")
    wrong = [(case, bad) for case in found.iter("testcase") for bad in case if bad.tag in ("failure", "error")]
    suites = list(found.iter("testsuite"))  # these count; a test that was interrupted is a testcase all the same
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    if process.returncode not in (0, 1, 2) and end == "complete":
        end = f"pytest ended with status {process.returncode}"
    return {
        "arguments": words,
        "end": end,
        "seconds": round(time.monotonic() - start, 1),
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
        "failures": [
            {
                "name": f"{case.get('classname')}::{case.get('name')}",
                "message": " ".join(str(bad.get("message")).split())[:300],
            }
            for case, bad in wrong
        ],
    }


# The benchmarks


def run_script(part: str, options: argparse.Namespace, end: float, facts: dict[str, Any], path: Path) -> bool:
    """Runs a part that is a script, whose rows are the part's file; whether it ended badly, or not in its time."""
    words, on_cpu = SCRIPTS[part]
    words = [*words, *on_cpu * (options.device == "cpu"), "--device", options.device, "--json", str(path)]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, preexec_fn=os.setpgrp)
    try:
        status = f"status {process.wait(max(end - time.monotonic(), 0) + GRACE_S)}"
    except subprocess.TimeoutExpired:
        status = "no answer in its time"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not path.exists():
        print(f"left out: {part}: the process ended with {status}")
        return True
    path.write_text(json.dumps(json.loads(path.read_text()) | facts, indent=1) + "\n")
    return status != "status 0"


def run_benchmarks(part: str, options: argparse.Namespace, end: float, facts: dict[str, Any], path: Path) -> bool:
    """Runs a part's benchmarks and writes its file; whether there is no result at all."""
    wanted = QUICK[part] if options.quick else {"loss": LOSSES, "topk": SEARCHES, "model": STEPS}[part]
    jobs = [{"device": options.device} | (small(job) if options.device == "cpu" else job) for job in wanted]
    waiting = dict(enumerate(jobs))
    answers: dict[int, Any] = {}
    while waiting:
        done, status = in_another_process(part, waiting, end - time.monotonic())
        answers |= done
        waiting = {i: job for i, job in waiting.items() if i not in done}
        if waiting:
            first = next(iter(waiting))
            without = without_peers(waiting[first])
            reason = f"the process ended with {status}" + " with other people's kernels in it" * (without is not None)
            print(f"gpu_check: {waiting[first]}: {reason}", file=sys.stderr)
            if without is None or end < time.monotonic():
                answers[first] = {"left_out": reason}
                del waiting[first]
            else:
                waiting[first] = without
    reports = [answers[i]["report"] for i in sorted(answers) if "report" in answers[i]]
    left_out = [
        {"config": jobs[i], "reason": answers[i]["left_out"]} for i in sorted(answers) if "report" not in answers[i]
    ]
    path.write_text(json.dumps(facts | {"reports": reports, "left_out": left_out}, indent=1) + "\n")
    if reports:
        from vlmfast.bench import document

        print(document.tables(path))
    for each in left_out:
        config = ", ".join(f"{name}={value}" for name, value in each["config"].items() if name != "providers")
        print(f"left out: {config}: {each['reason']}")
    return not reports


def small(job: dict[str, Any]) -> dict[str, Any]:
    """The same benchmark for a processor, to see that everything works."""
    if "model" in job:
        names = [name for name in job["providers"].split(",") if not name.endswith("-compile")]
        changes = {"model": "CLIP-tiny", "batch": 4, "rounds": 1, "seconds": 0.0, "providers": ",".join(names)}
        return job | changes | {"caption_length": "real" if job["caption_length"] == "real" else "8"}
    sizes = {name: max(16, int(str(job[name]).split(",")[0]) // by) for name, by in SMALL.items() if name in job}
    if "batch" in sizes:
        sizes["batch"] = str(sizes["batch"])  # type: ignore[assignment]
        names = [name for name in job["providers"].split(",") if not name.startswith("torch-compile")]
        sizes["providers"] = ",".join(names)  # type: ignore[assignment]
    return job | sizes | {"rounds": 2, "seconds": 0.0}


def without_peers(job: dict[str, Any]) -> dict[str, Any] | None:
    """The benchmark without other people's kernels, or None if it has none."""
    from vlmfast.bench import providers

    names = job.get("providers", "").split(",")
    others = [name for name in names if name not in providers.PEERS]
    return None if names == others else job | {"providers": ",".join(others)}


def in_another_process(part: str, jobs: dict[int, Any], seconds: float) -> tuple[dict[int, Any], str]:
    """What a new process answered to the jobs, as far as it came, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        order, answer = Path(folder) / "order.json", Path(folder) / "answer.jsonl"
        order.write_text(json.dumps({"part": part, "jobs": list(jobs.items())}))
        answer.touch()
        line = [sys.executable, str(Path(__file__)), "--worker", str(order), str(answer), str(seconds)]
        process = subprocess.Popen(line, cwd=ROOT, preexec_fn=os.setpgrp)
        try:
            status = f"status {process.wait(max(seconds, 0) + GRACE_S)}"
        except subprocess.TimeoutExpired:
            status = "no answer in its time"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        last = answer.with_suffix(".last")
        status += f", last seen at {last.read_text()!r}" if last.exists() else ""
        lines = answer.read_text().splitlines()
    return {each["job"]: each for each in map(json.loads, lines)}, status


def work(order: str, answer: str, seconds: str) -> None:
    """The other process: runs the jobs in turn and writes a line for each that is done."""
    from vlmfast.bench import loss, model, topk

    end, read = time.monotonic() + float(seconds), json.loads(Path(order).read_text())

    def spent() -> bool:
        return time.monotonic() > end

    def say(line: str) -> None:
        Path(answer).with_suffix(".last").write_text(line)
        print(f"{end - time.monotonic():6.0f} s left  {line}", file=sys.stderr)

    for i, job in read["jobs"]:
        if spent():
            result: dict[str, Any] = {"left_out": "the time was spent"}
        elif read["part"] == "loss":
            say(f"{job['loss']} {job['dtype']} D={job['dim']}")
            result = {"report": dataclasses.asdict(loss.run(loss.LossBench(**job), say, spent))}
        elif read["part"] == "model":
            say(f"{job['model']}, captions {job['caption_length']}")
            result = {"report": dataclasses.asdict(model.run(model.ModelBench(**job), say, spent))}
        else:
            say(f"top {job['k']} {job['dtype']}")
            result = {"report": dataclasses.asdict(topk.run(topk.TopkBench(**job), say))}
        with Path(answer).open("a") as file:
            file.write(json.dumps({"job": i} | result) + "\n")


if __name__ == "__main__":
    sys.exit(main())
