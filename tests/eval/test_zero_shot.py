"""The zero-shot classifier against CLIP_benchmark's formula, and its accuracy against argmax."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlmfast.errors import DataError
from vlmfast.eval import embed_images, embed_texts, zero_shot_accuracy, zero_shot_classifier


def tokenizer(texts):
    """Bytes of the text, padded."""
    return torch.tensor([list(text.encode()[:24].ljust(24, b"\0")) for text in texts])


class Towers(nn.Module):
    """Embeddings of very different lengths: an average without normalising first is another one."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.letters = nn.Parameter(torch.randn(256, 24, 10, generator=generator))
        self.pixels = nn.Parameter(torch.randn(12, 10, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def encode_text(self, text):
        self.calls.append(len(text))
        parts = self.letters[text, torch.arange(24)]
        return self.dropout(parts.sum(1) * (text[:, :1] % 7 + 1) ** 2)

    def encode_image(self, image):
        return self.dropout(image.flatten(1).float() @ self.pixels)


NAMES = ["red_fox", "owl", "pike", "stag beetle", "newt", "heron", "toad"]
TEMPLATES = ["a photo of a {}.", "{c}, seen from afar", "the {}", "many {}s"]


def clip_benchmark(model, classnames, templates):
    """CLIP_benchmark's zero_shot_classifier, stated anew: [D, C]."""
    columns = []
    for name in classnames:
        texts = templates[name] if isinstance(templates, dict) else [t.format(name, c=name) for t in templates]
        embeddings = model.encode_text(tokenizer(texts))
        mean = F.normalize(embeddings, dim=-1).mean(dim=0)
        columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_classifier_is_clip_benchmarks(batch_size):
    model = Towers()
    W = zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES, batch_size=batch_size)
    assert model.training
    assert not W.requires_grad
    assert max(model.calls) <= batch_size
    expected = clip_benchmark(model.eval(), [name.replace("_", " ") for name in NAMES], TEMPLATES)
    torch.testing.assert_close(W.T, expected.detach(), rtol=0, atol=1e-6)


def test_normalising_only_once_would_be_seen():
    model = Towers().eval()
    W = zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES)
    texts = [t.format(name, c=name) for name in NAMES for t in TEMPLATES]
    raw = model.encode_text(tokenizer(texts)).view(len(NAMES), len(TEMPLATES), -1)
    assert (W - F.normalize(raw.mean(1), dim=1)).abs().max() > 0.05
    assert (W - F.normalize(raw, dim=2).mean(1)).abs().max() > 0.05
    torch.testing.assert_close(W.norm(dim=1), torch.ones(len(NAMES)))


def test_prompts_of_each_class_and_functions():
    model = Towers().eval()
    own = {name: [f"{name} {i}" for i in range(1 + number % 3)] for number, name in enumerate(NAMES)}
    W = zero_shot_classifier(model, tokenizer, NAMES, own)
    torch.testing.assert_close(W.T, clip_benchmark(model, NAMES, own).detach(), rtol=0, atol=1e-6)
    functions = zero_shot_classifier(model, tokenizer, NAMES, [lambda name: f"a {name}!"])
    torch.testing.assert_close(functions, zero_shot_classifier(model, tokenizer, NAMES, ["a {}!"]))
    before = list(TEMPLATES)
    zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES)
    assert before == TEMPLATES


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (90, 3, 2, 2), generator=generator, dtype=torch.uint8)
    return image, torch.randint(0, 7, (90,), generator=generator)


def test_accuracy_is_that_of_the_logits(backend, images):
    image, label = images
    model = Towers()
    W = zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES)
    scores = zero_shot_accuracy(model, W, zip(image.split(32), label.split(32), strict=True))
    assert model.training
    logits = 100 * F.normalize(model.eval().encode_image(image), dim=1) @ W.T
    top = logits.topk(5, dim=1).indices
    recalls = [(logits.argmax(1)[label == c] == c).double().mean().item() for c in range(7)]
    assert scores == pytest.approx(
        {
            "acc1": (top[:, 0] == label).double().mean().item(),
            "acc5": (top == label[:, None]).any(1).double().mean().item(),
            "mean_per_class_recall": sum(recalls) / 7,
        },
        abs=1e-12,
    )


def test_few_classes_have_no_top_five(backend, images):
    image, label = images
    assert set(zero_shot_accuracy(Towers(), torch.eye(10)[:3], [(image, label % 3)])) == {
        "acc1",
        "mean_per_class_recall",
    }


def test_a_model_that_says_the_same_of_all_is_at_chance(backend, images):
    image, _ = images
    label = torch.arange(90) % 9
    scores = zero_shot_accuracy(Towers(), torch.ones(9, 10), [(image, label)])
    assert scores == pytest.approx({"acc1": 1 / 9, "acc5": 5 / 9, "mean_per_class_recall": 1 / 9}, abs=1e-12)


def test_embeddings_come_in_order_and_without_graph():
    model = Towers().eval()
    image = torch.randint(0, 256, (10, 3, 2, 2), dtype=torch.uint8)
    embeddings = embed_images(model, image.split(4))
    torch.testing.assert_close(embeddings, model.encode_image(image).detach())
    texts = embed_texts(model, tokenizer, NAMES, batch_size=3)
    torch.testing.assert_close(texts, model.encode_text(tokenizer(NAMES)).detach())
    assert not embeddings.requires_grad
    assert embeddings.dtype == torch.float32


def test_refusals(images):
    image, label = images
    model = Towers()
    with pytest.raises(DataError, match="'a photo' has no place for the name"):
        zero_shot_classifier(model, tokenizer, NAMES, ["a photo"])
    with pytest.raises(DataError, match="no prompt for class 'owl'"):
        zero_shot_classifier(model, tokenizer, ["owl"], {"pike": ["a pike"]})
    with pytest.raises(DataError, match="no prompt for class 'red_fox'"):
        zero_shot_classifier(model, tokenizer, NAMES, [])
    with pytest.raises(DataError, match="at least one class name"):
        zero_shot_classifier(model, tokenizer, [], TEMPLATES)
    with pytest.raises(DataError, match=r"labels must be in \[0, 5\).*got 6"):
        zero_shot_accuracy(model, torch.eye(10)[:5], [(image, label)])
    with pytest.raises(DataError, match="embed_images: needs at least one"):
        zero_shot_accuracy(model, torch.eye(10)[:5], [])
