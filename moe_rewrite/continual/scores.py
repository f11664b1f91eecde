"""Scores of generated answers, as in TRACE (arXiv 2310.06762, table 1). All are in 0 .. 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import mean

from ..errors import require_package
from .tasks import Item

Score = Callable[[str, Item], float]


def exact_match(said: str, item: Item) -> float:
    """1 if the text equals the answer, ignoring case and outer white space."""
    return float(said.strip().lower() == item["answer"].strip().lower())


def first_letter(said: str, item: Item) -> float:
    """1 if the text starts with the same choice (letter) as the answer."""
    return float(said.strip()[:1].upper() == item["answer"].strip()[:1].upper())


def rouge_l(said: str, item: Item) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3)."""
    require_package("rouge_score", "continual", "this task's score")
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(item["answer"], said)["rougeL"].fmeasure)


def edit_similarity(said: str, item: Item) -> float:
    """1 - insertions and deletions / total length."""
    require_package("rapidfuzz", "continual", "this task's score")
    from rapidfuzz.fuzz import ratio

    return ratio(said, item["answer"]) / 100


def simplification(said: str, item: Item) -> float:
    """SARI of a simplified paragraph, with the end of the prompt as its source."""
    source = item["prompt"].rpartition("Paragraph:")[2].strip() or item["prompt"]
    return sari(source, said, [item["answer"]])


def sari(source: str, said: str, references: Sequence[str], longest: int = 4) -> float:
    """SARI: the mean over n = 1 .. 4 of the F1 of added and of kept n-grams and the precision of
    deleted ones (Xu et al. 2016, section 4.1). Words are lower case, split at white space."""
    texts = [t.lower().split() for t in (source, said, *references)]
    scores = []
    for n in range(1, longest + 1):
        s, o, *refs = (Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in texts)
        count = len(refs)
        s, o = (Counter({g: c * count for g, c in x.items()}) for x in (s, o))
        r = sum(refs, Counter())
        kept, keep = s & o, s & r
        good_kept = kept & r
        deleted, delete = s - o, s - r
        good_deleted = deleted & delete
        added, add = set(o) - set(s), set(r) - set(s)
        keep_p = _share(sum(good_kept[g] / kept[g] for g in good_kept), len(kept))
        keep_r = _share(sum(good_kept[g] / keep[g] for g in good_kept), len(keep))
        delete_p = _share(sum(good_deleted[g] / deleted[g] for g in good_deleted), len(deleted))
        add_p, add_r = _share(len(added & add), len(added)), _share(len(added & add), len(add))
        scores.append(mean((_f1(keep_p, keep_r), delete_p, _f1(add_p, add_r))))
    return mean(scores)


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 1.0  # nothing to find, nothing missed


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


TRACE_SCORES: dict[str, Score] = {
    "C-STANCE": first_letter, "FOMC": first_letter, "ScienceQA": first_letter,
    "NumGLUE-cm": exact_match, "NumGLUE-ds": exact_match, "MeetingBank": rouge_l,
    "Py150": edit_similarity, "20Minuten": simplification,
}  # fmt: skip


def task_score(task: str, said: Sequence[str], items: Sequence[Item]) -> float:
    """Mean score of the answers to a task's items; exact match for tasks that are not TRACE's."""
    score = TRACE_SCORES.get(task, exact_match)
    return mean(score(text, item) for text, item in zip(said, items, strict=True))
