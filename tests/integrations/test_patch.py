"""Attributes replaced and put back, on a library that is made up here."""

import gc
import logging
import weakref
from types import MethodType, ModuleType

import pytest
from torch import nn

from vlmfast.errors import BackendError
from vlmfast.integrations._patch import Patches, known_version, takes


class Base:
    def forward(self, x):
        return "theirs", x

    @staticmethod
    def scale(x):
        return "theirs", x


class Model(Base):
    pass


def ours(self, x):
    return "ours", x


@pytest.fixture
def library():
    module = ModuleType("library")
    module.loss, module.mask = "theirs", "theirs"
    return module


@pytest.fixture
def patches():
    patches = Patches("library")
    yield patches
    patches.undo()


def test_modules_classes_and_instances_are_as_they_were_afterwards(library, patches):
    model, other = Model(), Model()
    before = dict(vars(library)), dict(vars(Base)), dict(vars(Model))
    patches.replace([(library, "loss", "ours"), (Base, "scale", staticmethod(lambda x: ("ours", x)))])
    patches.replace([(model, "forward", MethodType(ours, model))])
    assert (library.loss, library.mask) == ("ours", "theirs")
    assert (Base.scale(1), model.scale(1)) == (("ours", 1), ("ours", 1))
    assert (model.forward(2), other.forward(2)) == (("ours", 2), ("theirs", 2))
    patches.replace([(Model, "forward", ours)])  # inherited from Base
    assert other.forward(3) == ("ours", 3)
    assert Base.forward(None, 3) == ("theirs", 3)
    assert str(patches) == "library.loss, Base.scale, Model instance.forward, Model.forward"
    patches.undo()
    assert (dict(vars(library)), dict(vars(Base)), dict(vars(Model))) == before
    assert not vars(model)
    assert str(patches) == ""


def test_twice_is_once(library, patches, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        patches.replace([(library, "loss", "ours")])
    assert caplog.messages == ["vlmfast replaced library.loss"]
    patches.replace([(library, "loss", "ours too")])  # over our own: what was theirs is still known
    assert patches.original(library, "loss") == "theirs"
    patches.undo()
    patches.undo()
    assert library.loss == "theirs"
    assert caplog.messages[-1] == "vlmfast put back library.loss"


def test_all_or_nothing(library, patches):
    with pytest.raises(BackendError, match="library: library has no head to replace; nothing was patched"):
        patches.replace([(library, "loss", "ours"), (library, "head", "ours")])
    assert library.loss == "theirs"


def test_what_somebody_else_replaced_is_left(library, patches, caplog):
    patches.replace([(library, "loss", "ours"), (library, "mask", "ours")])
    library.loss = "a third's"
    patches.undo()
    assert (library.loss, library.mask) == ("a third's", "theirs")
    assert "library.loss is not vlmfast's any more; left as it is" in caplog.messages


def test_an_error_inside_undoes_too(library, patches):
    with pytest.raises(KeyError), patches.replace([(library, "loss", "ours")]):
        raise KeyError
    assert library.loss == "theirs"


def test_a_context_undoes_what_it_newly_replaced(library, patches, caplog):
    caplog.set_level(logging.INFO)
    patches.replace([(library, "loss", "ours")])
    with patches.replace([(library, "loss", "ours"), (library, "mask", "ours")]) as applied:
        assert str(applied) == "library.loss, library.mask"
    assert (library.loss, library.mask) == ("ours", "theirs")
    with patches.replace([(library, "loss", "ours too")]):
        assert library.loss == "ours too"
    assert library.loss == "ours"
    with patches.replace([(library, "loss", "ours too")]):
        patches.replace([(library, "loss", "ours again")])
    assert library.loss == "ours again"  # a later call's, and for undo
    with patches.replace([(library, "mask", "ours")]):
        patches.undo()
        assert (library.loss, library.mask) == ("theirs", "theirs")
        patches.replace([(library, "mask", "ours")])
    assert library.mask == "ours"
    with patches.replace([(library, "loss", "ours")]):
        library.loss = "a third's"
    assert library.loss == "a third's"
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert str(patches) == "library.mask"


def test_contexts_of_a_model(patches):
    model = Model()
    with patches.replace([(model, "forward", MethodType(ours, model))]):
        with patches.replace([(model, "forward", MethodType(lambda self, x: ("ours too", x), model))]):
            assert model.forward(1) == ("ours too", 1)
        assert model.forward(1) == ("ours", 1)
    assert not vars(model)


def test_the_original_is_known(library, patches):
    model = Model()
    assert patches.original(library, "loss") == "theirs"
    assert patches.original(model, "forward")(1) == ("theirs", 1)
    patches.replace([(library, "loss", "ours"), (model, "forward", MethodType(ours, model)), (Model, "scale", ours)])
    assert patches.original(library, "loss") == "theirs"
    assert patches.original(model, "forward")(1) == ("theirs", 1)
    assert patches.original(Model, "scale")(1) == ("theirs", 1)


def test_a_patched_model_is_not_kept_alive(patches):
    model = nn.Linear(1, 1)
    patches.replace([(model, "forward", MethodType(ours, model))])
    assert model(1) == ("ours", 1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_versions():
    known_version("library", "3.3.1", "3.3 and 4", r"3\.3\.|4\.")
    for other in ("3.30.0", "5.0.0"):
        with pytest.raises(
            BackendError, match=rf"library {other} is not known .* nothing was patched; known: 3.3 and 4"
        ):
            known_version("library", other, "3.3 and 4", r"3\.3\.|4\.")


def test_arguments():
    def theirs(image, text, scale=1):
        pass

    takes(lambda image, text, scale=1, group=None: None, theirs, "library 1")
    for replacement in (lambda image, scale: None, lambda text, image, scale: None):
        with pytest.raises(BackendError, match=r"library 1: .*theirs takes \(image, text, scale\), vlmfast's .* takes"):
            takes(replacement, theirs, "library 1")
