"""Procedural scenes with captions: worlds whose truth is known, in four levels of difficulty (docs/data.md)."""

from vlmfast.data.scenes.captions import GRANULARITIES, caption, caption_id, claims, references, swapped
from vlmfast.data.scenes.files import export, export_task
from vlmfast.data.scenes.latents import LEVELS, SPLITS, Object, Scene
from vlmfast.data.scenes.samples import Scenes, dataset, preview, stream

__all__ = [
    "GRANULARITIES",
    "LEVELS",
    "SPLITS",
    "Object",
    "Scene",
    "Scenes",
    "caption",
    "caption_id",
    "claims",
    "dataset",
    "export",
    "export_task",
    "preview",
    "references",
    "stream",
    "swapped",
]
