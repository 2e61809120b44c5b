"""Zero-shot classification: the class whose prompts, embedded and averaged, lie nearest to the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.errors import DataError
from vlmfast.eval.embed import Tokenizer, TwoTowers, embed_images, embed_texts
from vlmfast.eval.metrics import mean_per_class_recall, topk_accuracy
from vlmfast.ops.similarity import similarity_topk

Template = str | Callable[[str], str]


def zero_shot_classifier(
    model: TwoTowers,
    tokenizer: Tokenizer,
    classnames: Sequence[str],
    templates: Sequence[Template] | Mapping[str, Sequence[str]],
    *,
    batch_size: int = 256,
) -> Tensor:
    """One unit vector a class: the mean direction of the class's prompts.

    Equals, for each class:
        normalize(normalize(model.encode_text(tokenizer(prompts))).mean(0))

    Args:
        model: its `encode_text` takes [B, T] int64; it runs in evaluation mode, without gradients.
        tokenizer: maps B texts to int64 [B, T].
        classnames: C names; an underscore is read as a space.
        templates: one list for all classes, of strings with "{}" or "{c}" where the name goes or of functions from name
            to prompt; or, for each class name as given, its own prompts in full.
        batch_size: prompts at a time.

    Returns:
        [C, D] float32 of unit rows, on the model's device.

    Raises:
        DataError: there is no class or no template, a template has no place for the name, or a class has no prompts.

    Source: Radford et al. 2021, section 3.1.4; CLIP_benchmark `zero_shot_classifier`, which returns the transpose.
    """
    prompts = [_prompts(name, templates) for name in classnames]
    if not prompts:
        raise DataError("zero_shot_classifier: needs at least one class name")
    texts = F.normalize(embed_texts(model, tokenizer, [text for group in prompts for text in group], batch_size), dim=1)
    means = [group.mean(0) for group in texts.split([len(group) for group in prompts])]
    return F.normalize(torch.stack(means), dim=1)


def zero_shot_accuracy(
    model: TwoTowers, classifier: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """How often the nearest class is the right one, under CLIP_benchmark's names.

    Classes at exactly the same distance come in the order of their numbers: a model to which all classes are the same
    reaches chance, not more.

    Args:
        model: its `encode_image` takes [B, 3, H, W]; it runs in evaluation mode, without gradients.
        classifier: [C, D] from `zero_shot_classifier`.
        batches: pairs of images [B, 3, H, W] and labels [B] int64 in [0, C).

    Returns:
        "acc1", "acc5" (the right class is among the first five; only where C >= 5) and "mean_per_class_recall", each in
        [0, 1].

    Raises:
        DataError: there is no image, or a label is not in [0, C).
    """
    labels: list[Tensor] = []

    def images() -> Iterable[Tensor]:
        for image, label in batches:
            labels.append(label)
            yield image

    features = embed_images(model, images())
    truth = torch.cat(labels).to(features.device)
    low, high = (int(value) for value in truth.aminmax())
    if low < 0 or high >= len(classifier):
        raise DataError(
            f"zero_shot_accuracy: labels must be in [0, {len(classifier)}), one for each row of classifier; "
            f"got {low if low < 0 else high}"
        )
    _, ranked = similarity_topk(features, classifier, min(5, len(classifier)))
    scores = {"acc1": topk_accuracy(ranked, truth)}
    if len(classifier) >= 5:
        scores["acc5"] = topk_accuracy(ranked, truth, 5)
    return {**scores, "mean_per_class_recall": mean_per_class_recall(ranked[:, 0], truth)}


def _prompts(name: str, templates: Sequence[Template] | Mapping[str, Sequence[str]]) -> list[str]:
    """The prompts of one class, at least one."""
    if isinstance(templates, Mapping):
        prompts = list(templates.get(name, ()))
    else:
        spoken = name.replace("_", " ")
        prompts = [template(spoken) if callable(template) else _fill(template, spoken) for template in templates]
    if not prompts:
        raise DataError(f"zero_shot_classifier: templates give no prompt for class {name!r}")
    return prompts


def _fill(template: str, name: str) -> str:
    if "{}" not in template and "{c}" not in template:
        raise DataError(f"zero_shot_classifier: template {template!r} has no place for the name; write {{}} or {{c}}")
    return template.replace("{}", name).replace("{c}", name)
