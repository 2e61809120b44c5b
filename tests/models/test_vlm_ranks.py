"""Training on ranks of which one has no image: DDP and FSDP2 give the gradients of one process, and nobody waits."""

import pytest
import torch

from vlmfast.models.decoder import DecoderConfig
from vlmfast.models.llava import LlavaConfig, build_llava
from vlmfast.models.patch_lm import PatchLmConfig, build_patch_lm
from vlmfast.models.vit import VisionConfig

IMAGE, P, W = 39, 4, 2
TEXT = DecoderConfig.llama(vocab_size=40, width=32, layers=2, heads=4, kv_heads=2, context_length=64)
TOWER = VisionConfig(image_size=16, patch_size=8, width=32, layers=3, head_width=16)
SEQUENCES = ((1, 6), (0, 5), (2, 9), (0, 12))  # images and words of each; those of rank 1 have no image
KINDS = ("patch-lm", "stage 1", "tower")


def build(kind):
    if kind == "patch-lm":
        return build_patch_lm(PatchLmConfig(TEXT, IMAGE, image_size=16, stem="conv", prefix_lm=True), seed=0)
    model = build_llava(LlavaConfig(TOWER, TEXT, IMAGE), seed=0)
    model.freeze(tower=kind != "tower", decoder=kind == "stage 1")
    return model


def loss(model, sequences):
    """The sum over a batch in which the last three words of each sequence are supervised."""
    ids = [torch.tensor([IMAGE] * (P * images) + list(range(words))) for images, words in sequences]
    labels = [torch.cat([torch.full_like(x[:-3], -100), x[-3:]]) for x in ids]
    pictures = torch.tensor([9 * words + i for images, words in sequences for i in range(images)]).view(-1, 1, 1, 1)
    image = (pictures + torch.arange(256).view(1, 1, 16, 16)).expand(-1, 3, -1, -1).to(torch.uint8)
    ends = torch.tensor([0, *map(len, ids)]).cumsum(0, dtype=torch.int32)
    prefix = torch.tensor([len(x) - 3 for x in ids])
    return model(torch.cat(ids), image, torch.cat(labels), ends, prefix=prefix, reduction="sum")


def on_a_rank(rank, folder):
    """What each process runs: two pieces, each of one sequence."""
    import torch.distributed as dist

    from vlmfast.train.world import World, replicate, shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=W)
    world = World(rank=rank, world_size=W, device=torch.device("cpu"), group=dist.group.WORLD)
    found = {}
    for kind in KINDS:
        for way in (replicate, shard):
            model = build(kind)
            ranks = way(model, world)
            for sequence in SEQUENCES[rank::W]:
                loss(ranks, [sequence]).backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            found[kind, way.__name__] = {
                name: W * (grad.full_tensor() if way is shard else grad) for name, grad in gradients.items()
            }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_a_rank, (str(folder),), nprocs=W)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(W)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replicate", "shard"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_images_takes_part(ranks, kind, way):
    model = build(kind)
    loss(model, SEQUENCES).backward()
    exact = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for rank in ranks:
        assert rank[kind, way].keys() == exact.keys()
        for name, grad in exact.items():
            # Sums of some 60 tokens' gradients, in another order.
            assert (rank[kind, way][name] - grad).norm() <= 64 * torch.finfo(torch.float32).eps * grad.norm(), name
