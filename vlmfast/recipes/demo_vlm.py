"""`vlmfast demo-vlm`: a small vision-language model learns to caption and to answer on two cores, from nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vlmfast.bench import machine
from vlmfast.bench.timing import threads
from vlmfast.errors import DataError
from vlmfast.eval.predictions import Prediction, write_predictions
from vlmfast.recipes import train_vlm
from vlmfast.recipes.progress import counted
from vlmfast.recipes.run_flags import FLAGS_FILE
from vlmfast.recipes.vlm_data import Control, Items, open_conversations
from vlmfast.recipes.vlm_predict import Talker, VlmFlags, open_talker, predict
from vlmfast.recipes.vlm_report import CONTROLS, SHOWN, Asked, Results, html, show, summary
from vlmfast.train import read_metrics
from vlmfast.train.world import start

RUN = "run"  # the run's folder in --out
BATCH = 64  # conversations a step


@dataclass(kw_only=True)
class Config:
    """Trains a small vision-language model on captions of scenes and questions about them, and shows what it says.

    For example:
        vlmfast demo-vlm
        vlmfast demo-vlm --out demo-vlm --steps 500 --n 200

    It leaves report.html (open it in a browser), summary.json, the predictions for vlmfast eval, and the run, ready for
    vlmfast chat --model demo-vlm/run.
    """

    out: Path = Path("demo-vlm")
    """Folder for all of it; an earlier demo's run there is replaced."""
    steps: int = 1200
    """Steps of training."""
    n: int = 500
    """Held-out scenes that are captioned, and as many that are asked about."""
    seed: int = 0
    """Of weights and order."""
    cores: int = 2
    """Processes that train together, and threads of the one that asks then."""


def run(config: Config) -> None:
    """Trains, asks, and writes the report.

    Args:
        config: the flags.
    Raises:
        MissingExtraError: a library of the extra `demo` is missing.
        DataError: the folder holds something that is not an earlier demo's; a step has fewer conversations than cores.
    """
    if not 1 <= config.cores <= BATCH:
        raise DataError(f"--cores must be 1 .. {BATCH}, the conversations of a step; got {config.cores}")
    started = time.perf_counter()
    folder = config.out / RUN
    if folder.exists():
        if not (folder / FLAGS_FILE).exists():
            raise DataError(f"{folder} is not a run of the demo; name another folder by --out")
        shutil.rmtree(folder)
    config.out.mkdir(parents=True, exist_ok=True)
    print(f"training: {config.steps} steps")
    recipe = replace(scenes_patch_lm(folder, config.steps, config.seed), val_num_samples=min(config.n, 100))
    began = time.perf_counter()
    _train(recipe, config.cores)
    training_s = time.perf_counter() - began
    with threads(config.cores):
        talker = open_talker(VlmFlags(model=folder, device="cpu"))
        asked = {task: _ask(config, recipe, talker, task) for task in ("caption", "vqa")}
    results = Results(
        metrics=read_metrics(folder / "metrics.jsonl"),
        captions=asked["caption"],
        answers=asked["vqa"],
        parameters=sum(p.numel() for p in talker.model.parameters()),
        training_s=training_s,
        seconds=time.perf_counter() - started,
        machine=machine.machine(),
        versions=machine.versions(),
        date=machine.now(),
    )
    (config.out / "summary.json").write_text(json.dumps(summary(results), indent=1) + "\n", encoding="utf-8")
    (config.out / "report.html").write_text(html(results), encoding="utf-8")
    print(show(results))
    print(f"\n{config.out / 'report.html'} shows it; talk to it with vlmfast chat --model {folder}")


def scenes_patch_lm(folder: Path, steps: int = 1200, seed: int = 0) -> train_vlm.Config:
    """A decoder of four layers that reads 64 patches of a scene with one or two objects, and captions or answers.

    The command is `vlmfast demo-vlm`.

    Args:
        folder: of the run.
        steps: length of the run.
        seed: of weights and order.
    """
    return train_vlm.Config(
        task="patch-lm",
        train_data="L1",
        vlm_task="caption=4,vqa=1",
        families="query-colour,query-shape,query-size",
        questions_per_image=4,
        train_num_samples=BATCH * steps,
        val_num_samples=100,
        logs=folder.parent,
        name=folder.name,
        width=128,
        layers=4,
        heads=4,
        patch_size=8,
        stem="conv",
        prefix_lm=True,
        context_length=256,
        vocab_size=512,
        steps=steps,
        batch_size=BATCH,
        lr=2e-3,
        wd=0.1,
        warmup=min(100, steps // 4),
        grad_clip_norm=1.0,
        precision=_precision(),
        seed=seed,
        device="cpu",
        save_frequency=0,
        val_frequency=0.1,
        log_every_n_steps=max(1, steps // 200),
    )


def _train(recipe: train_vlm.Config, cores: int) -> None:
    """Trains in a process for each core: of a model this small, one with as many threads has half the speed."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # its own search needs a host name that can be resolved
    here = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=cores,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    elastic_launch(here, _on_a_core)(replace(recipe, batch_size=recipe.batch_size // cores))


def _on_a_core(recipe: train_vlm.Config) -> None:
    with threads(1), start("cpu") as world:
        train_vlm.train(recipe, world)


def _precision() -> Literal["fp32", "amp_bf16"]:
    """amp_bf16 where the processor multiplies bfloat16 itself, and so faster."""
    return "amp_bf16" if {"avx512_bf16", "amx_bf16"} & set(machine.machine()["instruction_sets"]) else "fp32"


def _ask(config: Config, recipe: train_vlm.Config, talker: Talker, task: str) -> Asked:
    """What the model says of held-out scenes, with each control."""
    alone = replace(recipe, questions_per_image=1)  # earlier answers would give later ones away
    items = Items(open_conversations(alone, recipe.train_data, task, "test", config.n, talker.pixels), config.n)
    flags, found = VlmFlags(max_new_tokens=48), dict[Control, list[Prediction]]()
    for control in CONTROLS:
        batches = predict(talker, items, flags, control=control, rank=task == "vqa")
        found[control] = [
            each for part in counted(batches, f"{task}, {CONTROLS[control]}", len(items)) for each in part
        ]
        write_predictions(config.out / f"{task}-{control}.jsonl", found[control])
    return Asked(found, [item.image[0] for item in items.read(range(min(SHOWN, len(items))))])
