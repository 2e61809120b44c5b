"""A library that is not installed is named, with the extra that brings it."""

import sys

import pytest

from vlmfast.data.digits import scans
from vlmfast.data.images import load_image
from vlmfast.data.tokenize import clean_text, train_tokenizer
from vlmfast.data.webdataset import WebdatasetPairs
from vlmfast.errors import MissingExtraError

USES = [
    ("PIL", "Pillow", "data", lambda: load_image(b"x")),
    ("webdataset.shardlists", "webdataset", "data", lambda: WebdatasetPairs("0.tar")),
    ("tokenizers", "tokenizers", "data", lambda: train_tokenizer([], 300, 16)),
    ("ftfy", "ftfy", "data", lambda: clean_text("é")),
    ("sklearn.datasets", "scikit-learn", "demo", scans.__wrapped__),  # past the cache
]


@pytest.mark.parametrize(("module", "library", "extra", "use"), USES, ids=[use[1] for use in USES])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, module, library, extra, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"^{library} is not installed; run: pip install 'vlmfast\[{extra}\]'"):
        use()
