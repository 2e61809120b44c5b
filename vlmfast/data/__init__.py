"""Image-text data: readers, images, tokenizer, and the stream of batches that training and evaluation share."""

from vlmfast.data.batch import Batch, Sample, batches, collate

__all__ = ["Batch", "Sample", "batches", "collate"]
