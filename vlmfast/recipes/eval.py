"""`vlmfast eval`: zero-shot classification and retrieval of a trained run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfast.data import digits
from vlmfast.data.batch import batches
from vlmfast.data.scenes import Scenes
from vlmfast.data.tokenize import Tokenizer, load_tokenizer
from vlmfast.errors import DataError
from vlmfast.eval.embed import embed_images, embed_texts, evaluating
from vlmfast.eval.retrieval import retrieval_metrics
from vlmfast.eval.zero_shot import zero_shot_accuracy, zero_shot_classifier
from vlmfast.models import Clip, build_clip, load_config
from vlmfast.recipes.sources import DataFlags, Split, image_side, open_pairs, pick_device, tell_skipped
from vlmfast.train import evaluate, latest_checkpoint, load_weights
from vlmfast.train.loop import Evaluator

BATCH = 256  # images embedded at a time
MODEL_FILE, TOKENIZER_FILE = "open_clip_config.json", "tokenizer.json"  # in a run's folder, beside checkpoints/


@dataclass(kw_only=True)
class Config(DataFlags):
    """Scores a run of `vlmfast train`: zero-shot accuracy where the data has classes, and retrieval both ways.

    For example:
        vlmfast eval --pretrained logs/digits
        vlmfast eval --pretrained logs/digits --split val --json
        vlmfast eval --pretrained logs/pairs --dataset-type csv --val-data held_out.tsv
    """

    pretrained: Path
    """A run's folder, or one of its checkpoints."""
    val_data: str = ""
    """Folder, CSV file, tars, or the scenes' level; digits need none."""
    val_num_samples: int | None = None
    """How many scenes (default: 5 000)."""
    split: Split = "test"
    """Digits and scenes: train, val or test; captions of test digits come from templates never seen in training."""
    batch_size: int = BATCH
    """Images at a time."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> None:
    """Prints the scores.

    Args:
        config: the flags.
    Raises:
        DataError: the run or the data is missing or not whole.
    """
    model, tokenizer, checkpoint = load_run(config.pretrained)
    model = model.to(pick_device(config.device))
    dataset = open_pairs(config, config.val_data, config.split, image_side(model.config), config.val_num_samples)
    scores = evaluate(model, evaluators(tokenizer, dataset, config.batch_size))
    tell_skipped(dataset)
    if config.json:
        data = config.val_data or f"{config.dataset_type}/{config.split}"
        print(json.dumps({"dataset": data, "pretrained": str(checkpoint), "metrics": scores}))
        return
    print(checkpoint)
    for name, value in scores.items():
        print(f"{name:<40} {value:.4f}")


def load_run(path: Path) -> tuple[Clip, Tokenizer, Path]:
    """The model with its weights, its tokenizer, and the checkpoint that they came from.

    Args:
        path: a run's folder (its latest checkpoint is taken), or a checkpoint in one.
    Raises:
        DataError: there is no whole checkpoint, model config or tokenizer.
    """
    checkpoint = path if path.name.startswith("step_") else latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise DataError(f"{path}: holds no checkpoint; give a run's folder, such as logs/NAME, or a checkpoint in it")
    folder = checkpoint.parent.parent
    model = build_clip(load_config(folder / MODEL_FILE), seed=0)
    load_weights(checkpoint, model)
    return model, load_tokenizer(folder / TOKENIZER_FILE, model.config.text_cfg.context_length), checkpoint


def evaluators(tokenizer: Tokenizer, dataset: Any, batch_size: int = BATCH) -> dict[str, Evaluator]:
    """What there is to score on the data set: "retrieval", and "zero_shot" where it has classes.

    Args:
        tokenizer: the model's.
        dataset: what `open_pairs` returned.
        batch_size: images at a time.
    """
    if isinstance(dataset, digits.Digits):
        how: dict[str, Any] = {"tokenizer": tokenizer, "scans": dataset}
        return {"zero_shot": partial(digit_accuracy, **how), "retrieval": partial(digit_retrieval, **how)}
    return {"retrieval": partial(pair_retrieval, tokenizer=tokenizer, dataset=dataset, batch_size=batch_size)}


def digit_prompts(scans: digits.Digits) -> dict[str, list[str]]:
    """Each digit's word -> its captions: every template of the data set, with the word and with the figure.

    Args:
        scans: the data set.
    """
    names = zip(digits.CLASS_NAMES, digits.CLASS_DIGITS, strict=True)
    return {
        word: [template.format(n) for template in scans.templates for n in (word, figure)] for word, figure in names
    }


def digit_accuracy(model: Clip, tokenizer: Tokenizer, scans: digits.Digits) -> dict[str, float]:
    """Zero-shot accuracy on the scans, under CLIP_benchmark's names.

    Args:
        model: runs in evaluation mode, without gradients.
        tokenizer: the model's.
        scans: the data set; its templates make the prompts.
    """
    prompts = digit_prompts(scans)
    classifier = zero_shot_classifier(model, tokenizer, list(prompts), prompts)
    return zero_shot_accuracy(model, classifier, zip(scans.images.split(BATCH), scans.labels.split(BATCH), strict=True))


def digit_retrieval(model: Clip, tokenizer: Tokenizer, scans: digits.Digits) -> dict[str, float]:
    """Retrieval between every scan and every caption; those of one digit belong together.

    Args:
        model: runs in evaluation mode, without gradients.
        tokenizer: the model's.
        scans: the data set; its templates make the captions.
    """
    prompts = list(digit_prompts(scans).values())
    texts = embed_texts(model, tokenizer, [text for group in prompts for text in group])
    text_ids = torch.arange(len(prompts)).repeat_interleave(len(prompts[0]))
    images = embed_images(model, scans.images.split(BATCH))
    return retrieval_metrics(images, texts, image_ids=scans.labels, text_ids=text_ids)


def pair_retrieval(model: Clip, tokenizer: Tokenizer, dataset: Any, batch_size: int) -> dict[str, float]:
    """Retrieval over the whole data set; samples with one id belong together.

    One id is one image with several captions, which then counts once; among scenes it is one caption of several images.

    Args:
        model: runs in evaluation mode, without gradients.
        tokenizer: the model's.
        dataset: what `open_pairs` returned.
        batch_size: captions at a time.
    Raises:
        DataError: not one pair can be read.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    image_ids: list[int] = []
    text_ids: list[int] = []
    seen: set[int] = set()
    with evaluating(model) as device:
        for batch in batches(dataset, tokenizer, batch_size, seed=0, shuffle=False, epochs=1):
            ids = [] if batch.ids is None else batch.ids.tolist()
            texts.append(model.encode_text(batch.text.to(device)).float())
            text_ids += ids
            rows = list(range(len(ids)))
            if not isinstance(dataset, Scenes):
                first = {id: row for row, id in reversed(list(enumerate(ids)))}
                rows = sorted(row for id, row in first.items() if id not in seen)
            if rows:
                images.append(model.encode_image(batch.image[rows].to(device)).float())
                image_ids += [ids[row] for row in rows]
                seen |= set(ids)
    if not texts:
        raise DataError(f"not one pair could be read; skipped: {dict(dataset.skipped)}")
    return retrieval_metrics(
        torch.cat(images), torch.cat(texts), image_ids=torch.tensor(image_ids), text_ids=torch.tensor(text_ids)
    )
