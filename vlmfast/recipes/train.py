"""`vlmfast train`: a CLIP from a data set, or from where an earlier run stopped.

A run's folder, logs/NAME:
    flags.json               the command's flags
    open_clip_config.json    the model, in open_clip's format
    tokenizer.json           trained on the captions, or the one that --tokenizer names
    metrics.jsonl            one line every --log-every-n-steps, keys as open_clip's
    checkpoints/             see vlmfast/train/checkpoint.py

Under torchrun every rank runs this file; rank 0 alone prints and writes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vlmfast.data.batch import Batches, batches, is_stream, steps_per_epoch
from vlmfast.data.tokenize import Tokenizer, load_tokenizer, train_tokenizer
from vlmfast.errors import DataError
from vlmfast.models import Clip, ClipConfig, build_clip, load_config
from vlmfast.recipes.eval import evaluators
from vlmfast.recipes.objective import contrastive
from vlmfast.recipes.pretrained import MODEL_FILE, TOKENIZER_FILE
from vlmfast.recipes.run_flags import (
    RunFlags,
    placed,
    print_last,
    resumed_folder,
    run_folder,
    schedule_of,
    step_sizes,
    write_flags,
)
from vlmfast.recipes.sources import (
    TrainDataFlags,
    captions,
    image_side,
    open_pairs,
    pick_device,
    tell_skipped,
    train_samples,
)
from vlmfast.train import SplitLoss, adamw, fit
from vlmfast.train.checkpoint import replace_text
from vlmfast.train.loop import Evaluator
from vlmfast.train.world import World, start

SIGLIP_SCALE, SIGLIP_BIAS = math.log(10), -10.0  # Zhai et al. 2023, where the sigmoid loss starts


@dataclass(kw_only=True)
class Config(TrainDataFlags, RunFlags):
    """Trains a CLIP and leaves weights, tokenizer and metrics in logs/NAME.

    For example:
        vlmfast train --name digits --epochs 32
        vlmfast train --name digits --epochs 64 --resume latest
        vlmfast train --dataset-type csv --train-data pairs.tsv --val-data held_out.tsv --model CLIP-tiny --epochs 10
        vlmfast train --dataset-type scenes --train-data L0 --name scenes --epochs 2
        vlmfast train --dataset-type webdataset --train-data 'cc3m/{00000..00331}.tar' --train-num-samples 2900000
        torchrun --nproc-per-node 8 -m -- vlmfast.cli train --name big --batch-size 1024 --accum-freq 8

    The flags have open_clip's names, where it has them, and their meaning; the defaults fit one small machine.
    """

    train_data: str = ""
    """Folder, CSV file, tars ("cc3m/{000..331}.tar", several joined by "::"), or level of scenes; digits need none."""
    val_data: str = ""
    """The same for evaluation; digits and scenes have their own."""
    train_num_samples: int | None = None
    """Samples in the tars, which only a whole reading would count; or how many scenes (default: 100 000)."""
    val_num_samples: int = 1000
    """How many scenes are evaluated."""
    model: str = ""
    """A released ViT's name, or a .json in open_clip's format. Default: digits for digits, else CLIP-tiny."""
    tokenizer: str = ""
    """A tokenizer.json, or OpenAI's bpe_simple_vocab_16e6.txt.gz. Default: train one on the captions."""
    batch_size: int = 128
    """Pairs a step, of each rank."""
    lr: float = 1.5e-3
    """Highest learning rate."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.98
    """AdamW."""
    eps: float = 1e-6
    """AdamW."""
    wd: float = 0.2
    """Weight decay; gains, biases, positions and the scale take none."""
    local_loss: bool = False
    """Several ranks: as open_clip's. Without this flag and the next, gradients are those of one process with all
    pairs, as they are with both; open_clip's without both are too small. This one alone gives another objective."""
    gather_with_grad: bool = False
    """Several ranks: as open_clip's; alone it computes the same gradients and the loss of all pairs on each rank."""
    siglip: bool = False
    """SigLIP's pairwise sigmoid loss instead of CLIP's softmax."""
    loss_dist_impl: Literal["bidir", "shift", "reduce", "gather"] | None = None
    """SigLIP on several ranks: how texts travel; all ways have the same gradients."""
    positives: Literal["out", "in", "soft", "pair"] | None = None
    """Softmax: how samples of one id (a digit's class, an image's captions) count for each other. out and soft: by the
    mean of their log-probabilities; in: by the log of their summed probability; pair: not at all, as in CLIP. Default:
    pair for tars and synthetic, where each sample has an id of its own, else out."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    model: Clip
    tokenizer: Tokenizer
    last: dict[str, float]  # the last value of every metric


def run(config: Config) -> None:
    """Trains, and prints where the run lies and its last metrics.

    Args:
        config: the flags.
    Raises:
        DataError: as `train` says.
        BackendError: as `vlmfast.train.world.start` says.
    """
    with start(config.device) as world:
        done = train(config, world)
        if not world.main:
            return
    print_last(config, done.folder, done.last, f"evaluate it with vlmfast eval --pretrained {done.folder}")


def train(config: Config, world: World | None = None) -> Run:
    """The run that the flags describe, finished.

    Args:
        config: the flags.
        world: the ranks that train together, each of which calls this; None for this process alone.
    Raises:
        DataError: data, model, tokenizer or checkpoint are missing, not whole, or do not fit each other.
        BackendError: --fsdp without torchrun.
    """
    world = world or World(device=pick_device(config.device))
    step_size, micro_batch_size = step_sizes(config, config.batch_size)
    if config.local_loss and not config.gather_with_grad and (config.siglip or _positives(config) != "pair"):
        raise DataError("--local-loss without --gather-with-grad is for --positives pair, without --siglip")
    folder = world.first(lambda: run_folder(config, Path(_model_name(config)).stem))
    architecture = load_config(_model_name(config))
    image_size = image_side(architecture)
    dataset = open_pairs(config, config.train_data, "train", image_size, config.train_num_samples)
    tokenizer = world.first(lambda: _tokenizer(config, architecture, folder, dataset))
    architecture = _fitted(config, architecture, tokenizer)
    samples, all_ranks = train_samples(dataset, config.train_num_samples), step_size * world.world_size
    per_epoch = steps_per_epoch(samples, all_ranks)
    if per_epoch == 0:
        raise DataError(
            f"--batch-size {config.batch_size}: a step of {all_ranks} pairs is more than the {samples} training samples"
        )
    steps = config.steps or config.epochs * per_epoch
    schedule = schedule_of(config, config.lr, steps)
    held_out = _evaluators(config, tokenizer, image_size)
    stream = partial(_stream, config, dataset, tokenizer, step_size, world)
    stream(0)  # what is wrong with the data is said before the run begins
    clip = build_clip(architecture, seed=config.seed).to(world.device)
    model = placed(clip, config, world)
    last = fit(
        model,
        _objective(config, world),
        stream,
        adamw(model, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.wd),
        schedule,
        steps=steps,
        out=folder,
        evaluators=held_out,
        log_every=config.log_every_n_steps,
        save_every=math.ceil(config.save_frequency * per_epoch),
        eval_every=math.ceil(config.val_frequency * per_epoch),
        resume=config.resume,
        precision=config.precision,
        grad_clip_norm=config.grad_clip_norm,
        micro_batch_size=micro_batch_size,
        ema=config.ema,
        seed=config.seed,
        run={
            "model": architecture.to_dict(),
            "loss": "siglip" if config.siglip else _positives(config),
            "batch_size": all_ranks,
            "data": [config.dataset_type, config.train_data],
        },
        world=world,
        sharded_checkpoints=config.fsdp_checkpoint == "sharded",
        elastic=config.elastic,
        on_start=partial(_write, folder, config, architecture, tokenizer),
        tensorboard=config.report_to == "tensorboard",
    )
    tell_skipped(dataset, world.words)
    return Run(folder, clip, tokenizer, last)


def _positives(config: Config) -> str:
    return config.positives or ("pair" if config.dataset_type in ("webdataset", "synthetic") else "out")


def _objective(config: Config, world: World) -> SplitLoss:
    """The loss that the flags name; the exact one, unless they say more."""
    exact = not (config.local_loss or config.gather_with_grad)
    return contrastive(
        siglip=config.siglip,
        positives=_positives(config),
        local_loss=config.local_loss or exact,
        gather_with_grad=config.gather_with_grad or exact,
        loss_dist_impl=config.loss_dist_impl,
        rank=world.rank,
        world_size=world.world_size,
        group=world.group,
    )


def _model_name(config: Config) -> str:
    return config.model or ("digits" if config.dataset_type == "digits" else "CLIP-tiny")


def _tokenizer(config: Config, architecture: ClipConfig, folder: Path, dataset: Any) -> Tokenizer:
    """The tokenizer that is named, the one of the run that goes on, or a new one trained on the captions."""
    text = architecture.text_cfg
    resumed = resumed_folder(config, folder)
    path = Path(config.tokenizer) if config.tokenizer else resumed / TOKENIZER_FILE if resumed else None
    if path is not None and (config.tokenizer or path.exists()):
        return load_tokenizer(path, text.context_length)
    return train_tokenizer(captions(dataset), text.vocab_size, text.context_length)


def _fitted(config: Config, architecture: ClipConfig, tokenizer: Tokenizer) -> ClipConfig:
    """The model with the tokenizer's vocabulary, and with the start that the sigmoid loss needs."""
    architecture = architecture.with_text(vocab_size=tokenizer.vocab_size, context_length=tokenizer.context_length)
    if config.siglip and architecture.init_logit_bias is None:
        return replace(architecture, init_logit_scale=SIGLIP_SCALE, init_logit_bias=SIGLIP_BIAS)
    return architecture


def _stream(
    config: Config, dataset: Any, tokenizer: Tokenizer, step_size: int, world: World, start_step: int
) -> Batches:
    return batches(
        dataset,
        tokenizer,
        step_size,
        seed=config.seed,
        start_step=0
        if config.elastic and is_stream(dataset)
        else start_step,  # a stream would read all that lies before
        workers=config.workers,
        rank=world.rank,
        world_size=world.world_size,
    )


def _evaluators(config: Config, tokenizer: Tokenizer, image_size: int) -> dict[str, Evaluator]:
    """Scores on the validation data, where there is any."""
    where = config.val_data or (config.train_data if config.dataset_type == "scenes" else "")
    if config.dataset_type not in ("digits", "scenes") and not where:
        return {}
    return evaluators(tokenizer, open_pairs(config, where, "val", image_size, config.val_num_samples))


def _write(folder: Path, config: Config, architecture: ClipConfig, tokenizer: Tokenizer) -> None:
    """What `vlmfast eval` and a reader need beside the weights."""
    write_flags(config, folder)
    replace_text(folder / MODEL_FILE, json.dumps(architecture.to_dict(), indent=1) + "\n")
    tokenizer.save(folder / TOKENIZER_FILE)
