"""Scores of one answer: ROUGE-L, exact match strict and normalised."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any
from unicodedata import normalize


@functools.cache
def _patterns() -> dict[str, Any]:
    """Unicode's own classes, which Python's `re` does not know; the package comes with rouge-score."""
    import regex

    # Scripts that are written without spaces: a letter with its marks is what comes nearest to a word.
    unspaced = "".join(rf"\p{{scx={name}}}" for name in ("Han", "Hira", "Kana", "Thai", "Laoo", "Mymr", "Khmr"))
    letter = rf"[[{unspaced}]&&[\p{{L}}\p{{N}}]]"
    texts = {
        # Joiners stand inside the words of Persian and of Indian scripts.
        "words": rf"{letter}\p{{M}}*|(?:(?!{letter})[\p{{L}}\p{{N}}\p{{M}}\u200c\u200d])+",
        # SQuAD's, but for what makes another number: a sign, a decimal point.
        "punctuation": r"(?![-+]\d)(?!(?<=\d)[.,]\d)[\p{P}$+<=>^`|~]",
        "articles": r"\b(?:a|an|the)\b",
    }
    return {name: regex.compile(text, regex.V1) for name, text in texts.items()}


class _AnyScript:
    """A tokenizer for `rouge_score`, whose own knows nothing but a-z and 0-9."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        text = normalize("NFC", text.lower())
        return _patterns()["words"].findall(text) or [character for character in text if not character.isspace()]


@functools.cache
def _scorer(any_script: bool):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_AnyScript() if any_script else None)


def check_scorer() -> None:
    """Find out before hours of training that rouge-score is missing.

    Raises: `ImportError` naming the package.
    """
    try:
        _scorer(False)
    except ModuleNotFoundError as error:
        raise ImportError(f"ROUGE-L: expected rouge-score, got: {error}; pip install rouge-score") from error


def rouge_l(answer: str, target: str) -> float:
    """ROUGE-L F1 of one answer, 0 to 1, by the package rouge-score without stemming; both texts in NFC.

    Where the target has letters or digits beyond ASCII, or none at all, words are those of Unicode with their combining
    marks (Chinese, Japanese, Thai and their like character by character, signs alone sign by sign): rouge-score's own
    would be none or pieces.
    """
    answer, target = normalize("NFC", answer), normalize("NFC", target)
    words = [character for character in target if character.isalnum()]
    any_script = not words or any(ord(character) > 127 for character in words)
    return float(_scorer(any_script).score(target, answer)["rougeL"].fmeasure)


def exact_match(answer: str, target: str) -> float:
    """1.0 if the texts are equal in NFC, white space at the ends aside and any run of it counting as one; else 0.0."""
    return float(normalize("NFC", answer).split() == normalize("NFC", target).split())


def normalised_match(answer: str, target: str) -> float:
    """`exact_match` as it is usual for answers: case, width, punctuation and English articles make no difference.

    Source: Rajpurkar et al. 2016 (SQuAD), in Unicode: NFKC, case folding. A sign or a point in a number stays, and a
    text of nothing but punctuation is compared as it is.
    """
    found = []
    for text in (answer, target):
        text = normalize("NFKC", normalize("NFKC", text).casefold())
        bare = _patterns()["articles"].sub(" ", _patterns()["punctuation"].sub("", text)).split()
        found.append(bare or text.split())
    return float(found[0] == found[1])


SCORES: dict[str, Callable[[str, str], float]] = {
    "rougeL": rouge_l,
    "exact_match": exact_match,
    "normalised_match": normalised_match,
}


def best(score: Callable[[str, str], float], answer: str, references: Iterable[str]) -> float:
    """The score of an answer against the reference that it is nearest to."""
    return max(score(answer, reference) for reference in references)
