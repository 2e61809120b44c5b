"""How gradients are put together from blocks of G: under Triton's interpreter, in blocks of 256 x 256."""

import pytest
import torch

from vlmfast import clip_loss, use_backend
from vlmfast.ops import _limits, _tiles
from vlmfast.testing import pairs

pytestmark = pytest.mark.skipif(not _tiles.INTERPRET, reason="needs TRITON_INTERPRET=1; run: make test-interpret")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(_limits, "MAX_WORKSPACE", 0)
    with use_backend("triton"):
        yield


def gradients(need_image=True, need_text=True):
    """{"image": its gradient, "text": ..., "scale": ...} of those that are needed."""
    image, text, scale = pairs(600, 40)
    leaves = {"image": image, "text": text, "scale": scale}
    for name, need in (("image", need_image), ("text", need_text), ("scale", True)):
        leaves[name].requires_grad_(need)
    clip_loss(*leaves.values()).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def test_triton_makes_the_sides_one_after_the_other_where_memory_asks_for_it(monkeypatch):
    """600 rows are three bands: each is finished before the next begins."""
    together = gradients()
    monkeypatch.setattr(_tiles, "SUMS", 0)
    held = []
    init = _tiles._Sums.__init__

    def watch(self, p, of, rows, *args):
        init(self, p, of, rows, *args)
        held.append((of, rows, len(self.sums)))

    monkeypatch.setattr(_tiles._Sums, "__init__", watch)
    apart = gradients()
    assert held == [("x", 600, 256), ("y", 0, 0), ("x", 0, 0), ("y", 600, 256)]
    assert all(torch.equal(apart[name], value) for name, value in together.items())


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
def test_triton_gradients_do_not_depend_on_which_others_are_needed(need):
    """A frozen tower's band is never summed; the scale's gradient is a by-product of either side's."""
    some, every = gradients(*need), gradients()
    assert set(some) == {name for name, needed in zip(("image", "text"), need, strict=True) if needed} | {"scale"}
    for name, value in some.items():
        torch.testing.assert_close(value, every[name], rtol=2e-5 if name == "scale" else 0, atol=0)
