"""`vlmfast eval caption`: BLEU, ROUGE-L, CIDEr-D and exact match of captions, anyone's model's."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfast.eval.caption import bleu, caption_match, cider_d, rouge_l, tokenize_caption
from vlmfast.recipes.scoring import ScoringFlags, by_group, open_scored, tell

POSITIONAL = True  # the predictions are named without a flag


@dataclass(kw_only=True)
class Config(ScoringFlags):
    """Scores captions: BLEU-1 to 4, ROUGE-L and CIDEr-D as pycocoevalcap does, and exact match; each group's too.

    For example:
        vlmfast eval caption predictions.jsonl
        vlmfast eval caption captions_val2014_results.json --references captions_val2014.json --output scores.json
    """


def run(config: Config) -> None:
    """Prints the scores, and writes them.

    Args:
        config: the flags.
    Raises:
        DataError: a file cannot be read, or predictions and references do not fit each other.
    """
    scored = open_scored(config)
    candidates = [tokenize_caption(each.prediction) for each in scored]
    references = [[tokenize_caption(text) for text in each.references] for each in scored]
    each = {
        "ROUGE_L": rouge_l(candidates, references).tolist(),
        "CIDEr": cider_d(candidates, references).tolist(),
        "exact_match": caption_match(candidates, references).astype(float).tolist(),
    }
    metrics = {f"Bleu_{n}": score for n, score in enumerate(bleu(candidates, references), 1)}
    metrics |= {name: sum(values) / len(scored) for name, values in each.items()}
    results = {"items": len(scored), "metrics": metrics, **by_group(each, [item.group for item in scored])}
    tell(config, results)
