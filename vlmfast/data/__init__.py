"""Image-text data: readers, images, tokenizer, and the stream of batches that training and evaluation share."""

from vlmfast.data.batch import Batch, Sample, batches, collate
from vlmfast.data.conversation import Conversation, LlavaJson, Turn, VlmSample
from vlmfast.data.dialogue import Dialogue, DialogueBatch, Dialogues, pack, prompt_ids, stop_ids, supervise
from vlmfast.data.lm_tokenizer import LmTokenizer, load_lm_tokenizer, train_lm_tokenizer

__all__ = [
    "Batch",
    "Conversation",
    "Dialogue",
    "DialogueBatch",
    "Dialogues",
    "LlavaJson",
    "LmTokenizer",
    "Sample",
    "Turn",
    "VlmSample",
    "batches",
    "collate",
    "load_lm_tokenizer",
    "pack",
    "prompt_ids",
    "stop_ids",
    "supervise",
    "train_lm_tokenizer",
]
