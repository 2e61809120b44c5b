"""`vlmfast train --task`: a vision-language model from conversations about images, or from where a run stopped.

A run's folder, logs/NAME:
    flags.json        the command's flags
    tokenizer/        trained on the conversations, or the language model's own; and how a conversation is written
    metrics.jsonl     one line every --log-every-n-steps
    checkpoints/      see vlmfast/train/checkpoint.py
    model/            at the end: what vlmfast caption, vqa and chat take as --model; a LLaVA's is Hugging Face's

Under torchrun every rank runs this file; rank 0 alone prints and writes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vlmfast.data.batch import Batches, batches, steps_per_epoch
from vlmfast.data.dialogue import DialogueBatch, Dialogues, pack, stop_ids
from vlmfast.data.lm_tokenizer import FILES, LmTokenizer, load_lm_tokenizer
from vlmfast.data.skips import UnreadableError
from vlmfast.data.templates import TEMPLATES
from vlmfast.errors import DataError
from vlmfast.eval.caption import caption_match
from vlmfast.eval.predictions import Prediction
from vlmfast.eval.vqa import exact_match
from vlmfast.models.decoder import Decoder
from vlmfast.models.llava import Llava
from vlmfast.models.patch_lm import PatchLm
from vlmfast.models.vlm import Vlm
from vlmfast.models.weights.decoder import save_decoder
from vlmfast.models.weights.vlm import save_vlm
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
from vlmfast.recipes.sources import pick_device, tell_skipped
from vlmfast.recipes.vlm_data import (
    Changed,
    Items,
    Pixels,
    VlmDataFlags,
    blank,
    open_conversations,
    task_weights,
    train_vocabulary,
    without_images,
)
from vlmfast.recipes.vlm_models import Foundation, Task, VlmModelFlags, open_foundation, text_only
from vlmfast.recipes.vlm_predict import CONVERSATION_FILE, MODEL_FOLDER, Talker, VlmFlags, predict
from vlmfast.train import adamw, fit, latest_checkpoint, load_weights
from vlmfast.train.checkpoint import replace_text
from vlmfast.train.loop import Evaluator
from vlmfast.train.step import SummedLoss
from vlmfast.train.world import World, start

TOKENIZER_FOLDER = "tokenizer"
TRIED = 8  # conversations, before a run begins
PARTS = {
    "tower": "vision_tower",
    "projector": "multi_modal_projector",
    "lm": "decoder",
}  # of a LLaVA: flag's word, module
TRAINED = {1: "projector", 2: "projector,lm"}  # by the stages of LLaVA
DATA = ("dataset_type", "train_data", "vlm_task", "questions_per_image", "families", "cooc", "granularity", "world")
RATES = {"patch-lm": 1e-3, "lm": 1e-3, "llava 1": 1e-3, "llava 2": 2e-5}  # LLaVA's are those of LLaVA 1.5
TEMPLATE_OF = {"patch-lm": "bare", "lm": "bare", "llava 1": "plain", "llava 2": "v1"}


@dataclass(kw_only=True)
class Config(VlmDataFlags, VlmModelFlags, RunFlags):
    """Trains a vision-language model and leaves it, tokenizer and metrics in logs/NAME.

    For example:
        vlmfast train --task patch-lm --train-data L1 --vlm-task caption,vqa --name eyes --steps 2000
        vlmfast train --task patch-lm --train-data L1 --vlm-task vqa --blind --name blind --steps 2000
        vlmfast train --task lm --train-data L1 --name words --steps 500
        vlmfast train --task llava --stage 1 --vision-tower logs/clip --language-model logs/words --name one
        vlmfast train --task llava --stage 2 --init-from logs/one --vlm-task vqa --name two
        vlmfast train --task llava --init-from two --dataset-type llava --train-data mix.json --image-folder images
        torchrun --nproc-per-node 8 -m -- vlmfast.cli train --task llava --stage 2 --init-from one --fsdp
    """

    task: Task
    """patch-lm: a decoder that reads patches; llava: a CLIP's tower, a projector and a language model; lm: a language
    model on the conversations without their images, for llava to begin with."""
    stage: Literal[1, 2] = 2
    """llava: 1 trains the projector alone, on captions in template plain, 2 projector and language model, in v1."""
    train_data: str = ""
    """A level of scenes (default: L1), or a file of LLaVA's format, .json or .jsonl."""
    val_data: str = ""
    """The same for evaluation; scenes have their own."""
    vlm_task: str = ""
    """scenes: what is asked, with weights if they differ: caption=1,vqa=3. Default: caption in template plain, which
    has no questions, else caption,vqa."""
    train_num_samples: int | None = None
    """scenes: how many conversations make an epoch (default: 100 000)."""
    val_num_samples: int = 200
    """scenes: how many questions of each task are asked to evaluate, one an image."""
    blind: bool = False
    """Gray pixels in place of every image: the control that shows what can be learnt without looking."""
    tokenizer: str = ""
    """A folder with tokenizer.json. Default: the language model's, or one trained on the conversations."""
    vocab_size: int = 512
    """Of a tokenizer trained here, at most."""
    template: str = ""
    """How a conversation is written: plain, v0, v1, bare (v1 without its first sentence), llama_2, mistral, mpt or
    chatml. Default: bare; llava: plain in stage 1, v1 in stage 2."""
    model_max_length: int | None = None
    """Tokens of a conversation, at most; later rounds are left out. Default: the model's context."""
    train_parts: str = ""
    """llava: which of tower,projector,lm are trained. Default: as the stage says."""
    batch_size: int = 64
    """Conversations a step, of each rank; they are packed one behind the other, without padding."""
    lr: float | None = None
    """Highest learning rate. Default: 1e-3; llava stage 2: 2e-5."""
    projector_lr: float | None = None
    """llava: of the projector, where it differs."""
    tower_lr: float | None = None
    """llava: of the tower, where it is trained and differs."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.95
    """AdamW."""
    eps: float = 1e-8
    """AdamW."""
    wd: float = 0.0
    """Weight decay; gains, biases and positions take none."""
    epochs: int = 1
    """Passes over the data."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    model: Vlm
    tokenizer: LmTokenizer
    template: str
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
    use = "vlmfast train --task llava --language-model" if config.task == "lm" else "vlmfast chat --model"
    print_last(config, done.folder, done.last, f"use it with {use} {done.folder}")


def train(config: Config, world: World | None = None) -> Run:
    """The run that the flags describe, finished.

    Args:
        config: the flags.
        world: the ranks that train together, each of which calls this; None for this process alone.
    Raises:
        DataError: data, model, tokenizer or checkpoint are missing, not whole, or do not fit each other; a conversation
            that cannot be trained on, by name.
        BackendError: --fsdp without torchrun.
    """
    world = world or World(device=pick_device(config.device))
    kind = f"llava {config.stage}" if config.task == "llava" else config.task
    template, lr = config.template or TEMPLATE_OF[kind], RATES[kind] if config.lr is None else config.lr
    if template not in TEMPLATES:
        raise DataError(f"--template must be one of {', '.join(TEMPLATES)}; got {template!r}")
    config = replace(config, vlm_task=config.vlm_task or ("caption" if template == "plain" else "caption,vqa"))
    if TEMPLATES[template].marks_only and config.dataset_type == "scenes" and config.vlm_task != "caption":
        raise DataError(
            f"--template {template} leaves questions out, so {config.vlm_task} would be answers to nothing; give "
            "it --vlm-task caption"
        )
    if config.families and config.dataset_type == "llava":
        raise DataError("--families is for --dataset-type scenes")
    if config.families and "vqa" not in task_weights(config.vlm_task):
        raise DataError(f"--families is for --vlm-task vqa; got {config.vlm_task}")
    step_size, micro_batch_size = step_sizes(config, config.batch_size)
    parts = _parts(config)
    folder = world.first(lambda: run_folder(config, kind.replace(" ", "-")))
    foundation = open_foundation(config.task, config, config.seed)
    pixels = foundation.pixels(config.image_aspect_ratio)
    if pixels is None and config.dataset_type == "llava":
        pixels = Pixels((64, 64), (0.5, 0.5, 0.5), config.image_aspect_ratio or "square")
    dataset = _open(config, config.train_data, "train", config.vlm_task, config.train_num_samples, pixels)
    tokenizer = world.first(lambda: _tokenizer(config, foundation, folder, dataset, template))
    if pixels is None:
        side = dataset[0].image.shape[-1]
        pixels = Pixels((side, side), (0.5, 0.5, 0.5), config.image_aspect_ratio or "square")
    vlm = foundation.build(config, tokenizer, pixels, config.seed)
    if isinstance(vlm, Llava):
        vlm.freeze(
            **{name: word not in parts for name, word in zip(("tower", "projector", "decoder"), PARTS, strict=True)}
        )
    longest = min(config.model_max_length or math.inf, vlm.decoder.config.context_length)
    dialogues = partial(Dialogues, template=template, tokenizer=tokenizer, image_tokens=vlm.image_tokens)
    samples, all_ranks = dialogues(dataset, max_tokens=int(longest)), step_size * world.world_size
    per_epoch = steps_per_epoch(len(samples), all_ranks)
    if per_epoch == 0:
        raise DataError(
            f"--batch-size {config.batch_size}: a step takes {all_ranks} conversations; there are {len(samples)}"
        )
    steps = config.steps or config.epochs * per_epoch
    schedule = schedule_of(config, lr, steps)
    stream = partial(_stream, config, samples, step_size, world)
    _try_some(samples)
    held_out = _evaluators(config, pixels, tokenizer, template, dialogues, int(longest), world)
    model = placed(vlm.to(world.device), config, world)
    last = fit(
        model,
        TEXT_LOSS,
        stream,
        adamw(
            model,
            lr=lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.wd,
            lr_scales=_scales(config, lr),
        ),
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
            "model": _described(vlm),
            "trains": sorted(parts),
            "template": template,
            "batch_size": all_ranks,
            "data": {name: getattr(config, name) for name in DATA},
            "blind": config.blind,
        },
        world=world,
        sharded_checkpoints=config.fsdp_checkpoint == "sharded",
        elastic=config.elastic,
        on_start=partial(_write, folder, config, tokenizer, template),
        tensorboard=config.report_to == "tensorboard",
    )
    tell_skipped(samples, world.words)
    if world.main:
        _write_model(folder, vlm, config, stop_ids(template, tokenizer))
    world.wait()
    return Run(folder, vlm, tokenizer, template, last)


def _try_some(samples: Dialogues) -> None:
    """Raises, before the run begins, if not one of the first conversations can be trained on: template or sizes do."""
    errors = []
    for index in range(min(len(samples), TRIED)):
        try:
            samples[index]
        except UnreadableError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def _loss(model: nn.Module, batch: DialogueBatch, count: Tensor) -> dict[str, Tensor]:
    """The cross-entropy of the supervised tokens, in nats, summed and divided by `count`."""
    loss = model(
        batch.ids,
        batch.image,
        batch.labels,
        batch.cu_seqlens,
        batch.max_seqlen,
        prefix=batch.prefix,
        num_supervised=count,
    )
    return {"text_loss": loss}


TEXT_LOSS = SummedLoss(_loss, lambda batch: batch.num_supervised)


def _parts(config: Config) -> set[str]:
    """Which parts of a LLaVA are trained."""
    if config.task != "llava":
        if config.train_parts or config.projector_lr or config.tower_lr:
            raise DataError("--train-parts, --projector-lr and --tower-lr are for --task llava")
        return {"all"}
    parts = {part.strip() for part in (config.train_parts or TRAINED[config.stage]).split(",")}
    if unknown := parts - set(PARTS):
        raise DataError(f"--train-parts: the parts are {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    for part, rate in (("projector", config.projector_lr), ("tower", config.tower_lr)):
        if rate is not None and part not in parts:
            raise DataError(f"--{part}-lr: the {part} is not trained; trained are {', '.join(sorted(parts))}")
    return parts


def _scales(config: Config, lr: float) -> dict[str, float]:
    """The parts' learning rates over the others'."""
    own = {"projector": config.projector_lr, "tower": config.tower_lr}
    return {PARTS[part]: rate / lr for part, rate in own.items() if rate is not None}


def _open(config: Config, where: str, split: Any, task: str, size: int | None, pixels: Pixels | None) -> Any:
    """The data set, shown as the flags say."""
    dataset = open_conversations(config, where, task, split, size, pixels)
    if config.task == "lm":
        return Changed(dataset, without_images)
    return Changed(dataset, blank) if config.blind else dataset


def _tokenizer(config: Config, foundation: Foundation, folder: Path, dataset: Any, template: str) -> LmTokenizer:
    """The tokenizer that is named, the model's or the resumed run's own, or a new one trained on the conversations."""
    resumed = resumed_folder(config, folder)
    if config.tokenizer:
        return load_lm_tokenizer(config.tokenizer)
    if foundation.tokenizer is not None:
        return foundation.tokenizer
    if resumed and (resumed / TOKENIZER_FOLDER).is_dir():
        return load_lm_tokenizer(resumed / TOKENIZER_FOLDER)
    return train_vocabulary(dataset, template, config.vocab_size)


def _stream(config: Config, samples: Dialogues, step_size: int, world: World, start_step: int) -> Batches:
    return batches(
        samples,
        None,
        step_size,
        seed=config.seed,
        start_step=start_step,
        workers=config.workers,
        rank=world.rank,
        world_size=world.world_size,
        collate=pack,
    )


def _evaluators(
    config: Config,
    pixels: Pixels,
    tokenizer: LmTokenizer,
    template: str,
    dialogues: Any,
    longest: int,
    world: World,
) -> dict[str, Evaluator]:
    """For each task of scenes its loss, and how many of its questions are answered right; for a file the loss."""
    if config.dataset_type == "llava":
        if not config.val_data:
            return {}
        held_out = dialogues(_open(config, config.val_data, "val", "", None, pixels), max_tokens=longest)
        _try_some(held_out)
        if world.main:
            tell_skipped(held_out)
        return {"held_out": partial(_score, config=config, samples=held_out)}
    found: dict[str, Evaluator] = {}
    alone = replace(config, questions_per_image=1)  # earlier answers would give later ones away
    for task in config.vlm_task.split(","):
        name = task.partition("=")[0].strip()
        dataset = _open(alone, config.val_data or config.train_data, "val", name, config.val_num_samples, pixels)
        items = None if config.task == "lm" else Items(dataset, config.val_num_samples)
        found[name] = partial(
            _score,
            config=config,
            samples=dialogues(dataset, max_tokens=longest),
            items=items,
            tokenizer=tokenizer,
            template=template,
        )
    return found


def _score(
    model: nn.Module,
    *,
    config: Config,
    samples: Dialogues,
    items: Items | None = None,
    tokenizer: LmTokenizer | None = None,
    template: str = "",
) -> dict[str, float]:
    """The mean loss of a held-out token, and the accuracy of greedy answers, by family."""
    vlm = cast(Vlm, model)
    device, total, count = next(vlm.parameters()).device, 0.0, 0.0
    for batch in batches(samples, None, config.batch_size, seed=0, shuffle=False, epochs=1, collate=pack):
        own = float(batch.num_supervised)
        total += float(_loss(vlm, batch.to(device), batch.num_supervised.to(device))["text_loss"]) * own
        count += own
    scores = {"loss": total / count}
    if items is not None and tokenizer is not None:
        flags = VlmFlags(max_new_tokens=_longest_answer(items, tokenizer), batch_size=config.batch_size)
        talker = Talker(vlm, tokenizer, template)
        scores |= accuracies([each for part in predict(talker, items, flags) for each in part])
    return scores


def accuracies(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The share of right answers, "accuracy", and that of each group that there is.

    Args:
        predictions: with references.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    for each in predictions:
        for name in ("accuracy", *([each.group] if each.group else [])):
            hits[name].append(is_right(each))
    return {name: sum(rights) / len(rights) for name, rights in hits.items()}


def is_right(prediction: Prediction) -> bool:
    """Whether it is one of its references: of a caption the words count, of an answer the text.

    Args:
        prediction: with references.
    """
    if prediction.task == "caption":
        return bool(caption_match([prediction.prediction], [prediction.references])[0])
    return exact_match(prediction.prediction, prediction.references)


def _longest_answer(items: Items, tokenizer: LmTokenizer) -> int:
    """Tokens of the longest right answer among the first items, and some more."""
    first = items.read(range(min(len(items), 64)))
    return 8 + max(len(tokenizer.encode(text).ids) for item in first for text in item.references)


def _like(vlm: Vlm) -> Vlm:
    """A model of the same config."""
    if isinstance(vlm, Llava):
        return Llava(vlm.config)
    if isinstance(vlm, PatchLm):
        return PatchLm(vlm.config)
    return text_only(Decoder(vlm.decoder.config), vlm.image_token_id)


def _described(vlm: Vlm) -> dict[str, Any]:
    return {"decoder": vlm.decoder.config.to_dict()} if type(vlm) is Vlm else json.loads(json.dumps(vlm.describe()))


def _write(folder: Path, config: Config, tokenizer: LmTokenizer, template: str) -> None:
    """What there is before the first step."""
    write_flags(config, folder)
    tokenizer.save(folder / TOKENIZER_FOLDER)
    replace_text(folder / TOKENIZER_FOLDER / CONVERSATION_FILE, json.dumps({"template": template}) + "\n")


def _write_model(folder: Path, vlm: Vlm, config: Config, eos: tuple[int, ...]) -> None:
    """The last checkpoint's model, by whichever ranks and in whichever form it was written, as others read it."""
    with torch.device("meta"):
        whole = _like(vlm)
    whole.to_empty(device="cpu")
    found = latest_checkpoint(folder / "checkpoints")
    assert found is not None
    load_weights(found, whole, ema=config.ema is not None)
    out, extra = folder / MODEL_FOLDER, folder / TOKENIZER_FOLDER
    files = {name: extra / name for name in (*FILES, CONVERSATION_FILE)}
    shutil.rmtree(out, ignore_errors=True)  # of the run before it was resumed
    if config.task != "lm":
        save_vlm(whole, out, files, eos=eos)
        return
    save_decoder(whole.decoder, out)
    for name, path in files.items():
        shutil.copyfile(path, out / name)
