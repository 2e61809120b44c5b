"""sentence-transformers' ranking losses, computed by vlmfast: the same values and gradients, without the scores."""

import logging
from contextlib import nullcontext
from itertools import combinations

import pytest
import torch
import torch.distributed as dist

from vlmfast.errors import BackendError
from vlmfast.integrations import sentence_transformers as integration
from vlmfast.testing import assert_accurate

st = pytest.importorskip("sentence_transformers", exc_type=ImportError)

OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
JOINT = [("query_to_doc", *others) for n in range(4) for others in combinations(OTHERS, n)]
PARTITIONS = [(directions, "joint") for directions in JOINT] + [
    (directions, "per_direction") for directions in (("query_to_doc",), ("query_to_doc", "doc_to_query"))
]
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


@pytest.fixture(autouse=True)
def _all_put_back():
    from sentence_transformers.sentence_transformer import losses

    kinds = losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss
    before = [dict(vars(kind)) for kind in kinds]
    yield
    integration.undo()
    assert [dict(vars(kind)) for kind in kinds] == before


@pytest.fixture
def small_tiles(monkeypatch):
    """A dozen rows are several tiles, the last ones not full."""
    monkeypatch.setattr(integration, "ROWS", 5)
    monkeypatch.setattr(integration, "COLUMNS", 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of two layers, with dropout, and a vocabulary of 200 words."""
    import transformers

    path = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(200))]
    (path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(path)
    transformers.BertTokenizer(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return str(path)


def build(folder):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    return st.SentenceTransformer(modules=[Transformer(folder, max_seq_length=16), Pooling(32)], device="cpu")


def ranking(cached=False, model=None, **options):
    from sentence_transformers.sentence_transformer import losses

    kind = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
    return kind(torch.nn.Sequential(torch.nn.Identity()) if model is None else model, **options)


def vectors(columns, B=13, D=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(B, D, generator=generator, dtype=dtype) for _ in range(columns)]


def value_and_gradients(loss, embeddings):
    leaves = [x.clone().requires_grad_() for x in embeddings]
    if hasattr(loss, "calculate_loss"):
        value = loss.calculate_loss([list(x.split(4)) for x in leaves], with_backward=True)
        assert not value.requires_grad
    else:
        value = loss.compute_loss_from_embeddings(leaves, None)
        value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


def similarities():
    from sentence_transformers.util import cos_sim, dot_score

    return {"cosine": cos_sim, "dot": dot_score}


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize(("directions", "partition"), PARTITIONS)
def test_every_combination_is_what_it_was(small_tiles, directions, partition, hardness):
    """In float64, plain and cached, with no, one and two negatives to a query, cosine and dot."""
    options = {"directions": directions, "partition_mode": partition, "scale": 12.0}
    if hardness:
        options |= {"hardness_mode": hardness, "hardness_strength": 3.0}
    for columns, similarity, cached in ((2, "cosine", False), (3, "dot", False), (4, "cosine", True)):
        cache = {"mini_batch_size": 4} if cached else {}
        loss = ranking(cached, similarity_fct=similarities()[similarity], **options, **cache)
        expected = value_and_gradients(loss, vectors(columns))
        with integration.apply():
            for ours, theirs in zip(value_and_gradients(loss, vectors(columns)), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", *OTHERS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_floats_are_summed_in_float32(directions, dtype):
    loss, embeddings = ranking(directions=directions), vectors(3, dtype=dtype)
    exact = loss.compute_loss_from_embeddings([x.double() for x in embeddings], None)
    with integration.apply(), torch.autocast("cpu", torch.bfloat16):
        ours = loss.compute_loss_from_embeddings(embeddings, None)
    assert ours.dtype == torch.float32
    assert_accurate(ours, exact, cond=20.0)


@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", *OTHERS)])
def test_a_backward_under_autocast_is_float32_too(directions):
    """The cached loss calls backward itself, inside the trainer's autocast."""
    loss, embeddings = ranking(True, directions=directions), vectors(3, dtype=torch.float32)
    with integration.apply():
        expected = value_and_gradients(loss, embeddings)
        with torch.autocast("cpu", torch.bfloat16):
            ours = value_and_gradients(loss, embeddings)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cached", [False, True])
def test_what_falls_back(cached, monkeypatch):
    """A similarity of the user's, a learned scale, vectors that are no matrix: the original computes."""

    def manhattan(a, b):
        return -torch.cdist(a, b, p=1)

    embeddings = vectors(2)
    expected = value_and_gradients(ranking(cached, similarity_fct=manhattan), embeddings)
    with integration.apply():
        monkeypatch.setattr(integration, "_ranking_loss", None)
        ours = value_and_gradients(ranking(cached, similarity_fct=manhattan), embeddings)
        learned = ranking(cached)
        learned.scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        value_and_gradients(learned, embeddings)
        assert learned.scale.grad is not None
        if not cached:
            with pytest.raises(ValueError, match="at least 2 embeddings"):
                ranking().compute_loss_from_embeddings(embeddings[:1], None)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", *OTHERS)])
def test_autograd_keeps_no_scores(directions):
    loss, kept = ranking(directions=directions), {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with integration.apply(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss.compute_loss_from_embeddings([x.requires_grad_() for x in vectors(2, B=1024, dtype=torch.float32)], None)
    assert sum(kept.values()) < 1024 * 1024 * 4 / 4


def train_step(folder, cached, patched, directions, dropout=True):
    """Loss and gradients of a model, always from one state of the random numbers."""
    model = build(folder).train(dropout)
    loss = ranking(cached, model, directions=directions, **({"mini_batch_size": 4} if cached else {}))
    columns = [[f"w{(7 * row + 31 * column) % 200} w{row}" for row in range(10)] for column in range(3)]
    features = [model.preprocess(column) for column in columns]
    torch.manual_seed(5)
    with integration.apply() if patched else nullcontext():
        value = loss(features, None)
        value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(grad.abs().max() for grad in theirs[1].values())
    for name, grad in ours[1].items():
        torch.testing.assert_close(grad, theirs[1][name], rtol=0, atol=float(1e-4 * largest), msg=name)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", *OTHERS)])
def test_a_step_with_dropout_is_what_it_was(folder, directions, cached):
    """The cached loss embeds twice and must draw the same dropout twice."""
    assert_same_step(*(train_step(folder, cached, patched, directions) for patched in (True, False)))


def test_cached_is_uncached(folder):
    directions = ("query_to_doc", *OTHERS)
    assert_same_step(*(train_step(folder, cached, True, directions, dropout=False) for cached in (True, False)))


def test_one_loss_only():
    patched, other = ranking(), ranking()
    cached = ranking(True)
    with integration.apply(loss=patched):
        assert "compute_loss_from_embeddings" in vars(patched)
        assert "compute_loss_from_embeddings" not in vars(other)
        integration.apply(loss=cached)
        assert "calculate_loss" in vars(cached)
    assert "compute_loss_from_embeddings" not in vars(patched)
    assert "calculate_loss" in vars(cached)
    integration.undo()
    assert "calculate_loss" not in vars(cached)


def test_applied_twice_and_undone_once(caplog):
    kind = type(ranking())
    original = kind.compute_loss_from_embeddings
    with caplog.at_level(logging.INFO):
        integration.apply(cached=False)
        integration.apply(cached=False)
    assert caplog.text.count("MultipleNegativesRankingLoss.compute_loss_from_embeddings") == 1
    assert kind.compute_loss_from_embeddings.__wrapped__ is original
    assert not hasattr(type(ranking(True)).calculate_loss, "__wrapped__")
    integration.undo()
    assert kind.compute_loss_from_embeddings is original


def test_refusals_leave_all_as_it_was(monkeypatch):
    kind = type(ranking())
    original = kind.compute_loss_from_embeddings
    with pytest.raises(BackendError, match="MultipleNegativesRankingLoss or its cached form; got Identity"):
        integration.apply(loss=torch.nn.Identity())
    with monkeypatch.context() as patch:
        patch.setattr("sentence_transformers.__version__", "7.0.0")
        with pytest.raises(BackendError, match=r"sentence-transformers 7\.0\.0 is not known.*6\.x"):
            integration.apply()
    with monkeypatch.context() as patch:
        patch.setattr(kind, "__init__", lambda self, model, margin=0.0: None)
        with pytest.raises(BackendError, match="MultipleNegativesRankingLoss takes margin"):
            integration.apply()
    assert kind.compute_loss_from_embeddings is original


@pytest.mark.filterwarnings("ignore")  # Trainer's own
@pytest.mark.slow
@pytest.mark.parametrize(("cached", "steps"), [(False, 100), (True, 50)])
def test_the_trainer_takes_the_same_course(folder, cached, steps, tmp_path):
    """training_nli_v2.py: triplets in batches of 128 without duplicates, one epoch, a tenth of it to warm up."""
    import datasets
    from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.training_args import (
        BatchSamplers,
        SentenceTransformerTrainingArguments,
    )

    generator = torch.Generator().manual_seed(0)

    def sentence(topic):
        words = torch.randint(200, (2,), generator=generator).tolist()
        return " ".join(f"w{word}" for word in (*words, topic, (topic + 7) % 200))

    topics = torch.randint(200, (steps * 128, 2), generator=generator).tolist()
    triplets = datasets.Dataset.from_dict(
        {
            "anchor": [sentence(topic) for topic, _ in topics],
            "positive": [sentence(topic) for topic, _ in topics],
            "negative": [sentence(other) for _, other in topics],
        }
    )

    def train(name):
        settings = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / name),
            num_train_epochs=1,
            per_device_train_batch_size=128,
            per_device_eval_batch_size=128,
            warmup_steps=0.1,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        model = build(folder)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=settings,
            train_dataset=triplets,
            eval_dataset=triplets.select(range(512)),
            loss=ranking(cached, model, **({"mini_batch_size": 64} if cached else {})),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return torch.tensor(losses), trainer.evaluate()["eval_loss"]

    theirs, their_end = train("theirs")
    with integration.apply():
        ours, our_end = train("ours")
    assert len(ours) == steps
    assert theirs[-5:].mean() < 0.98 * theirs[:5].mean()  # it learns, so that a wrong gradient would show
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    assert our_end == pytest.approx(their_end, rel=0.01)


CASES = [
    {},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"directions": ("query_to_doc", *OTHERS), "hardness_mode": "all_negatives", "hardness_strength": 3.0},
]


def of_one_rank(rank, world_size, folder):
    """Values and gradients of the cases on this rank, theirs and ours."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    results = []
    for case in CASES:
        for cached in (False, True):
            loss = ranking(cached, gather_across_devices=True, **case)
            theirs = value_and_gradients(loss, vectors(3, B=5, seed=rank))
            with integration.apply():
                results.append((theirs, value_and_gradients(loss, vectors(3, B=5, seed=rank))))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gathered_across_devices(tmp_path):
    torch.multiprocessing.spawn(of_one_rank, (2, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        for theirs, ours in torch.load(tmp_path / f"{rank}.pt"):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
