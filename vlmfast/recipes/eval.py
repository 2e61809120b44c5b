"""`vlmfast eval`: zero-shot classification and retrieval of any checkpoint, in CLIP_benchmark's form."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vlmfast.data import digits
from vlmfast.data.batch import Batch, batches
from vlmfast.data.benchmark import Benchmark, is_benchmark, read_benchmark
from vlmfast.data.images import fit_image
from vlmfast.data.scenes import Scenes
from vlmfast.data.webdataset import WebdatasetPairs
from vlmfast.errors import DataError, missing_extra
from vlmfast.eval.embed import TwoTowers, embed_images, embed_texts, evaluating
from vlmfast.eval.retrieval import retrieval_metrics
from vlmfast.eval.zero_shot import zero_shot_accuracy, zero_shot_classifier
from vlmfast.recipes.pretrained import ModelFlags, Pretrained, open_pretrained
from vlmfast.recipes.progress import counted
from vlmfast.recipes.sources import DataFlags, Split, open_pairs, tell_skipped
from vlmfast.train import evaluate
from vlmfast.train.checkpoint import replace_text
from vlmfast.train.loop import Evaluator

BATCH = 256  # images embedded at a time
KS = (1, 5, 10)  # of the recalls
TASKS = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}  # CLIP_benchmark's names
NAME = "{dataset}_{pretrained}_{model}_{language}_{task}.json"  # CLIP_benchmark's
ORDER: dict[str, Any] = {"seed": 0, "shuffle": False, "epochs": 1}  # once through, in the data set's own order
FIELDS = {"dataset", "pretrained", "pretrained_full_path", "model", "language", "task"}

Tokenizer: TypeAlias = Callable[[list[str]], Tensor]
Watch: TypeAlias = Callable[[Iterable[Batch]], Iterable[Batch]]  # sees the batches pass


@dataclass(kw_only=True)
class Config(DataFlags, ModelFlags):
    """Scores a model: zero-shot accuracy where the data has classes, and retrieval both ways where it has captions.

    For example:
        vlmfast eval --pretrained logs/digits
        vlmfast eval --pretrained logs/digits --split val --json
        vlmfast eval --pretrained clip-vit-b32 --dataset-type csv --val-data held_out.tsv --output results
        vlmfast eval --pretrained clip-vit-b32 --dataset-type webdataset --val-data wds_cifar10 --output results
    """

    val_data: str = ""
    """Folder, CSV file, tars, or the scenes' level; digits need none. For webdataset also a folder as CLIP_benchmark
    writes it, with test/nshards.txt, classnames.txt and zeroshot_classification_templates.txt."""
    val_num_samples: int | None = None
    """How many scenes (default: 5 000)."""
    split: Split = "test"
    """Of digits, scenes and CLIP_benchmark's folders; captions of test digits come from templates never seen in
    training."""
    output: Path | None = None
    """Folder for CLIP_benchmark's result files, one a task; or a name with {dataset}, {pretrained}, {model}, {language}
    and {task} in it, ending in .json."""
    dataset: str = ""
    """What the results call the data (default: what kind it is, or its path)."""
    language: str = "en"
    """What the results call the language of the captions."""
    json: bool = False
    """Print one JSON object: all scores, and the content of the result files."""


def run(config: Config) -> None:
    """Prints the scores and writes the result files.

    Args:
        config: the flags.
    Raises:
        DataError: the model or the data is missing or not whole, or two result files would have one name.
    """
    if config.output is not None:
        check_template(config.output)
    pretrained = open_pretrained(config)
    dataset = open_data(config, pretrained)
    tokenizer = pretrained.tokenizer(config.long_captions)
    how = evaluators(tokenizer, dataset, config.batch_size, watch=_watch(dataset), workers=config.workers)
    files = {name: _file(config, pretrained, name) for name in how} if config.output else {}
    if len(set(files.values())) < len(files):
        raise DataError(
            f"--output {config.output}: {len(files)} tasks would be written to one file; put {{task}} in it"
        )
    scores = evaluate(pretrained.model, how)
    tell_skipped(dataset.pairs if isinstance(dataset, BenchmarkData) else dataset)
    results = {name: _result(config, pretrained, name, scores) for name in how}
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(results[name]) + "\n")
    if config.json:
        whole = {"dataset": _dataset(config), "pretrained": pretrained.source, "model": pretrained.name}
        print(json.dumps({**whole, "metrics": scores, "results": list(results.values())}))
        return
    print(f"{pretrained.source} ({pretrained.name})")
    for name, value in scores.items():
        print(f"{name:<40} {value:.4f}")
    for path in files.values():
        print(path)


def open_data(config: Config, pretrained: Pretrained) -> Any:
    """The data set, its images prepared for the model.

    Args:
        config: the flags.
        pretrained: the model.
    Raises:
        DataError: a path is needed and missing, or what it names cannot be read.
    """
    side, fit, interpolation = pretrained.image_size, pretrained.fit, pretrained.interpolation
    if config.dataset_type == "digits":
        return _enlarged(digits.digits(config.split), side)
    how: dict[str, Any] = {"fit": fit, "interpolation": interpolation}
    if _is_benchmark(config):
        data = read_benchmark(config.val_data, config.split)
        key = "cls" if data.kind == "classification" else "txt"
        return BenchmarkData(data, WebdatasetPairs(data.tars, image_size=side, caption_key=key, **how))
    if config.dataset_type == "webdataset" and config.val_data and Path(config.val_data).is_dir():
        raise DataError(
            f"{config.val_data}: is a folder without {config.split}/nshards.txt, as CLIP_benchmark writes it; to read "
            "its tars as pairs, name them: --val-data 'FOLDER/{00000..00009}.tar'"
        )
    return open_pairs(config, config.val_data, config.split, side, config.val_num_samples, **how)


@dataclass(frozen=True)
class BenchmarkData:
    """A data set of CLIP_benchmark's, and the reader of its tars."""

    benchmark: Benchmark
    pairs: WebdatasetPairs


def evaluators(
    tokenizer: Tokenizer, dataset: Any, batch_size: int = BATCH, *, watch: Watch = iter, workers: int = 0
) -> dict[str, Evaluator]:
    """What there is to score on the data set: "retrieval", and "zero_shot" where it has classes.

    Args:
        tokenizer: the model's.
        dataset: what `open_data` or `open_pairs` returned.
        batch_size: images at a time.
        watch: what the batches go through, to show how far they are.
        workers: threads that read images ahead.
    """
    if isinstance(dataset, digits.Digits):
        how: dict[str, Any] = {"tokenizer": tokenizer, "scans": dataset}
        return {"zero_shot": partial(digit_accuracy, **how), "retrieval": partial(digit_retrieval, **how)}
    how = {"tokenizer": tokenizer, "batch_size": batch_size, "watch": watch, "workers": workers}
    if isinstance(dataset, BenchmarkData):
        if dataset.benchmark.kind == "classification":
            return {"zero_shot": partial(benchmark_accuracy, data=dataset, **how)}
        return {"retrieval": partial(benchmark_retrieval, data=dataset, **how)}
    return {"retrieval": partial(pair_retrieval, dataset=dataset, **how)}


def digit_prompts(scans: digits.Digits) -> dict[str, list[str]]:
    """Each digit's word -> its captions: every template of the data set, with the word and with the figure.

    Args:
        scans: the data set.
    """
    names = zip(digits.CLASS_NAMES, digits.CLASS_DIGITS, strict=True)
    return {
        word: [template.format(n) for template in scans.templates for n in (word, figure)] for word, figure in names
    }


def digit_accuracy(model: TwoTowers, tokenizer: Tokenizer, scans: digits.Digits) -> dict[str, float]:
    """Zero-shot accuracy on the scans, under CLIP_benchmark's names.

    Args:
        model: runs in evaluation mode, without gradients.
        tokenizer: the model's.
        scans: the data set; its templates make the prompts.
    """
    prompts = digit_prompts(scans)
    classifier = zero_shot_classifier(model, tokenizer, list(prompts), prompts)
    return zero_shot_accuracy(model, classifier, zip(scans.images.split(BATCH), scans.labels.split(BATCH), strict=True))


def digit_retrieval(model: TwoTowers, tokenizer: Tokenizer, scans: digits.Digits) -> dict[str, float]:
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


def pair_retrieval(
    model: TwoTowers, tokenizer: Tokenizer, dataset: Any, batch_size: int, *, watch: Watch = iter, workers: int = 0
) -> dict[str, float]:
    """Retrieval over the whole data set; samples with one id belong together.

    One id is one image with several captions, which then counts once; among scenes it is one caption of several images.

    Args:
        model: runs in evaluation mode, without gradients.
        tokenizer: the model's.
        dataset: what `open_pairs` returned.
        batch_size: captions at a time.
        watch: what the batches go through.
        workers: threads that read images ahead.
    Raises:
        DataError: not one pair can be read.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    image_ids: list[int] = []
    text_ids: list[int] = []
    seen: set[int] = set()
    with evaluating(model) as device:
        for batch in watch(batches(dataset, tokenizer, batch_size, **ORDER, workers=workers)):
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


def benchmark_accuracy(
    model: TwoTowers,
    tokenizer: Tokenizer,
    data: BenchmarkData,
    batch_size: int,
    *,
    watch: Watch = iter,
    workers: int = 0,
) -> dict[str, float]:
    """Zero-shot accuracy on a data set of CLIP_benchmark's, under its names.

    Args:
        model: runs in evaluation mode, without gradients.
        tokenizer: the model's.
        data: a classification.
        batch_size: images at a time.
        watch: what the batches go through.
        workers: threads that read images ahead.
    Raises:
        DataError: a label is no class's number, or not one image can be read.
    """
    prompts = {str(label): texts for label, texts in enumerate(data.benchmark.prompts)}
    classifier = zero_shot_classifier(model, tokenizer, list(prompts), prompts, batch_size=batch_size)
    labelled = (
        (image, torch.tensor([_label(text) for text in texts]))
        for image, texts in _read(data, batch_size, watch, workers)
    )
    return zero_shot_accuracy(model, classifier, labelled)


def benchmark_retrieval(
    model: TwoTowers,
    tokenizer: Tokenizer,
    data: BenchmarkData,
    batch_size: int,
    *,
    watch: Watch = iter,
    workers: int = 0,
) -> dict[str, float]:
    """Retrieval on a data set of CLIP_benchmark's, whose images have several captions each.

    Args:
        model: runs in evaluation mode, without gradients.
        tokenizer: the model's.
        data: a retrieval.
        batch_size: images at a time.
        watch: what the batches go through.
        workers: threads that read images ahead.
    Raises:
        DataError: not one image can be read.
    """
    captions: list[list[str]] = []  # of each image

    def images() -> Iterator[Tensor]:
        for image, texts in _read(data, batch_size, watch, workers):
            captions.extend(text.splitlines() for text in texts)
            yield image

    image = embed_images(model, images())
    text = embed_texts(model, tokenizer, [line for lines in captions for line in lines], batch_size)
    ids = torch.arange(len(captions))
    owners = ids.repeat_interleave(torch.tensor([len(lines) for lines in captions]))
    return retrieval_metrics(image, text, image_ids=ids, text_ids=owners, ks=KS)


def _is_benchmark(config: Config) -> bool:
    return config.dataset_type == "webdataset" and is_benchmark(config.val_data, config.split)


class _Words:
    """Stands where `batches` wants a tokenizer: gives texts numbers, and keeps them until their batch is there."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}
        self._numbers = itertools.count()

    def __call__(self, texts: list[str]) -> Tensor:
        numbers = list(itertools.islice(self._numbers, len(texts)))
        self._texts.update(zip(numbers, texts, strict=True))
        return torch.tensor(numbers)[:, None]

    def of(self, batch: Batch) -> list[str]:
        """The texts of the batch's rows, which are given once."""
        return [self._texts.pop(number) for number in batch.text[:, 0].tolist()]


def _read(data: BenchmarkData, batch_size: int, watch: Watch, workers: int) -> Iterator[tuple[Tensor, list[str]]]:
    """(images [B, 3, H, W], B texts) of the tars, in their order."""
    words = _Words()
    for batch in watch(batches(data.pairs, words, batch_size, **ORDER, workers=workers)):
        yield batch.image, words.of(batch)


def _label(text: str) -> int:
    if not text.isdecimal():
        raise DataError(f"a label (.cls) must be a number from 0; got {text[:40]!r}")
    return int(text)


def _enlarged(scans: digits.Digits, side: int) -> digits.Digits:
    """The digits in side x side pixels, bicubic."""
    if scans.images.shape[-1] == side:
        return scans
    try:
        from PIL.Image import fromarray
    except ImportError:
        raise missing_extra("Pillow", "data") from None
    grey = [fromarray(image[0].numpy()) for image in scans.images]
    images = torch.from_numpy(np.stack([np.asarray(fit_image(image, side, "squash")) for image in grey]))
    scans.images = images[:, None].expand(-1, 3, -1, -1)
    return scans


def _watch(dataset: Any) -> Watch:
    """Tells on standard error how far the batches are."""
    total = len(dataset) if hasattr(dataset, "__len__") else None
    what = "images" if isinstance(dataset, BenchmarkData) else "pairs"
    return lambda stream: counted(stream, what, total)


def check_template(output: Path) -> None:
    """Raises DataError for a result file's name with a field that there is not, or without .json."""
    if output.suffix != ".json":
        return
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(str(output)) if name is not None}
    except ValueError as error:
        raise DataError(f"--output {output}: {error}") from None
    if named - FIELDS:
        raise DataError(
            f"--output {output}: knows {', '.join(sorted(FIELDS))}; got {', '.join(sorted(named - FIELDS))}"
        )


def _file(config: Config, pretrained: Pretrained, name: str) -> Path:
    """Where a task's results go."""
    assert config.output is not None
    template = str(config.output if config.output.suffix == ".json" else config.output / NAME)
    given = config.pretrained.rstrip("/")
    return Path(
        template.format(
            dataset=_dataset(config).removeprefix("wds/").strip("/").replace("/", "_"),
            pretrained=Path(given).name,
            pretrained_full_path=given.replace("/", "_"),
            model=pretrained.name,
            language=config.language,
            task=TASKS[name],
        )
    )


def _dataset(config: Config) -> str:
    if config.dataset:
        return config.dataset
    if _is_benchmark(config):
        return f"wds/{Path(config.val_data).resolve().name}"
    return config.val_data or f"{config.dataset_type}/{config.split}"


def _result(config: Config, pretrained: Pretrained, name: str, scores: dict[str, float]) -> dict[str, Any]:
    """What CLIP_benchmark writes of a task."""
    metrics = {key.removeprefix(f"{name}/"): value for key, value in scores.items() if key.startswith(f"{name}/")}
    if name == "retrieval":
        ways = {"image": "text_to_image", "text": "image_to_text"}  # CLIP_benchmark names what is found
        metrics = {f"{found}_retrieval_recall@{k}": metrics[f"{way}_R@{k}"] for k in KS for found, way in ways.items()}
    return {
        "dataset": _dataset(config),
        "model": pretrained.name,
        "pretrained": config.pretrained,
        "task": TASKS[name],
        "metrics": metrics,
        "language": config.language,
    }
