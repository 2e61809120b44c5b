"""`vlmfast demo`: CLIP learns real scans through the fused loss, beside the reference loss, and the loss is timed."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlmfast import _ext
from vlmfast.backend import select, use_backend
from vlmfast.bench import loss as loss_bench
from vlmfast.bench.timing import threads
from vlmfast.data import digits
from vlmfast.errors import DataError
from vlmfast.eval.embed import embed_images, embed_texts
from vlmfast.eval.zero_shot import zero_shot_classifier
from vlmfast.ops.similarity import similarity_topk
from vlmfast.ops.softmax_loss import IMPLS
from vlmfast.recipes import train
from vlmfast.recipes.demo_report import Query, Results, Trained, html, show, summary
from vlmfast.recipes.eval import BATCH, digit_prompts, evaluators
from vlmfast.recipes.pretrained import load_run
from vlmfast.recipes.run_flags import FLAGS_FILE
from vlmfast.train import evaluate, read_metrics

LOSS = "train/contrastive_loss"
SHOWN = 10  # images that are shown for a query


@dataclass(kw_only=True)
class Config:
    """Trains CLIP on handwritten digits through the fused loss and through the reference, and times the loss.

    For example:
        vlmfast demo
        vlmfast demo --out demo --steps 500 --bench-batch 1024,4096

    It leaves report.html (open it in a browser), summary.json, and both runs, ready for vlmfast eval --pretrained.
    """

    out: Path = Path("demo")
    """Folder for all of it; an earlier demo's files there are replaced."""
    steps: int = 500
    """Steps of each of the two runs."""
    batch_size: int = 128
    """Pairs a step."""
    seed: int = 0
    """Of weights, order and random changes of images, the same in both runs."""
    threads: int = 1
    """Threads of PyTorch and of our kernels; the model is too small for more to help much."""
    bench_batch: str = "1024,4096"
    """Batch sizes at which the loss is timed."""
    bench_dim: int = 512
    """Width of the embeddings there."""
    bench_seconds: float = 2.0
    """Time for the rounds of each batch size, at least."""


def run(config: Config) -> int:
    """Trains twice, evaluates, times, and writes the report; 1 if the fused loss strays from the reference.

    Args:
        config: the flags.
    Raises:
        MissingExtraError: a library of the extra `demo` is missing.
        DataError: the folder holds something that is not an earlier demo's.
    """
    started = time.perf_counter()
    config.out.mkdir(parents=True, exist_ok=True)
    with threads(config.threads):
        fused = _train(config, "fused")
        reference = _train(config, "reference")
    print(f"benchmark: clip_loss, B = {config.bench_batch}")
    bench = loss_bench.run(
        loss_bench.LossBench(
            threads=config.threads,
            batch=config.bench_batch,
            dim=config.bench_dim,
            providers="vlmfast,eager-one,eager-two,linear-cross-entropy",
            rounds=3,
            seconds=config.bench_seconds,
        )
    )
    scans = digits.digits("test")
    predicted, queries = _look(config.out / "fused", scans)
    results = Results(
        fused=fused,
        reference=reference,
        backend=_backend(),
        extension_reason=_ext.reason,
        images=scans.images,
        labels=scans.labels,
        predicted=predicted,
        queries=queries,
        bench=bench,
        seconds=time.perf_counter() - started,
    )
    (config.out / "summary.json").write_text(json.dumps(summary(results), indent=1) + "\n", encoding="utf-8")
    (config.out / "report.html").write_text(html(results), encoding="utf-8")
    show(results)
    print(f"\n{config.out / 'report.html'} shows it; {config.out / 'summary.json'} has the numbers")
    return 0 if results.agree else 1


def digits_clip(folder: Path, steps: int = 500, batch_size: int = 128, seed: int = 0) -> train.Config:
    """A CLIP on handwritten digits with several positives a row: 3 layers of 64 to see, 2 to read.

    The command is `vlmfast demo`.

    Args:
        folder: of the run.
        steps: length of the run.
        batch_size: pairs a step.
        seed: of weights, order and random changes of images.
    """
    return train.Config(
        dataset_type="digits",
        model="digits",
        logs=folder.parent,
        name=folder.name,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        lr=1.5e-3,
        beta2=0.95,
        wd=0.05,
        warmup=steps // 5,
        positives="out",
        device="cpu",
        save_frequency=0,
        val_frequency=0,
        log_every_n_steps=1,
    )


def _train(config: Config, which: Literal["fused", "reference"]) -> Trained:
    """One of the two runs, and its scores on scans and with captions that it never saw."""
    folder = config.out / which
    if folder.exists():
        if not (folder / FLAGS_FILE).exists():
            raise DataError(f"{folder} is not a run of the demo; name another folder by --out")
        shutil.rmtree(folder)
    print(f"training: {config.steps} steps through the {which} loss")
    began = time.perf_counter()
    with use_backend("reference") if which == "reference" else nullcontext():
        done = train.train(digits_clip(folder, config.steps, config.batch_size, config.seed))
    seconds = time.perf_counter() - began
    records = read_metrics(folder / "metrics.jsonl")
    losses = [record[LOSS] for record in records if LOSS in record]
    scores = evaluate(done.model, evaluators(done.tokenizer, digits.digits("test")))
    return Trained(losses, scores, seconds)


def _backend() -> str:
    """The backend that a fused loss runs on here."""
    sample = torch.empty(2, 2)
    return select("clip_loss", IMPLS, sample.device, sample, sample)


def _look(folder: Path, scans: digits.Digits) -> tuple[Tensor, list[Query]]:
    """What the trained model says: the digit of every scan [N], and the nearest scans to a caption of each digit."""
    model, tokenizer, _ = load_run(folder)
    prompts = digit_prompts(scans)
    images = embed_images(model, scans.images.split(BATCH))
    classes = zero_shot_classifier(model, tokenizer, list(prompts), prompts)
    _, predicted = similarity_topk(images, classes, 1)
    # Each digit in another template, by its word.
    texts = [group[(2 * digit) % len(group)] for digit, group in enumerate(prompts.values())]
    _, found = similarity_topk(embed_texts(model, tokenizer, texts), images, SHOWN)
    return predicted[:, 0], [Query(text, digit, found[digit].tolist()) for digit, text in enumerate(texts)]
