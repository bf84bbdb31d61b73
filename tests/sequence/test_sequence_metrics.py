"""ROUGE-L and exact match of one answer; AP, BWT and FWT of a matrix computed by hand."""

from __future__ import annotations

import sys
from unicodedata import normalize

import pytest

from sapo_peft.sequence import sequence_metrics
from sapo_peft.sequence.metrics import SCORES, _AnyScript, _scorer, best, exact_match, normalised_match, rouge_l
from tests.sequence.sequence_helpers import run_small

# Row 0 before training, row i after task i.
MATRIX = [
    [0.1, 0.2, 0.0, 0.3],
    [0.8, 0.3, 0.1, 0.3],
    [0.6, 0.9, 0.1, 0.5],
    [0.7, 0.5, 0.7, 0.4],
    [0.4, 0.7, 0.6, 0.9],
]


def test_a_matrix_of_four_tasks_computed_by_hand():
    found = sequence_metrics(MATRIX)
    # (0.4 + 0.7 + 0.6 + 0.9) / 4
    assert found["AP"] == pytest.approx(0.65, abs=1e-12)
    # i=2: -0.2; i=3: (-0.1 - 0.4) / 2; i=4: (-0.4 - 0.2 - 0.1) / 3; their mean.
    assert found["BWT"] == pytest.approx(-41 / 180, abs=1e-12)
    assert found["BWT_last"] == pytest.approx(-0.7 / 3, abs=1e-12)
    # i=1: (0.1 + 0.1 + 0.0) / 3; i=2: (0.1 + 0.2) / 2; i=3: 0.1; their mean.
    assert found["FWT"] == pytest.approx(19 / 180, abs=1e-12)


def test_what_is_not_measured_is_none_and_what_does_not_need_it_is_there():
    found = sequence_metrics([[None] * 4, *MATRIX[1:]])
    assert found["FWT"] is None and found["BWT"] == sequence_metrics(MATRIX)["BWT"] and found["AP"] is not None
    # Each task when it was learned, and all at the end.
    diagonal = [[None] * 4, *([MATRIX[i][j] if j == i - 1 else None for j in range(4)] for i in (1, 2, 3)), MATRIX[4]]
    found = sequence_metrics(diagonal)
    assert found["BWT"] is None and found["BWT_last"] == pytest.approx(-0.7 / 3) and found["AP"] == pytest.approx(0.65)
    # A run that has done two of four tasks.
    assert sequence_metrics(MATRIX[:3]) == {"AP": None, "BWT": None, "BWT_last": None, "FWT": None}
    assert sequence_metrics([[0.1], [0.4]]) == {"AP": 0.4, "BWT": None, "BWT_last": None, "FWT": None}


@pytest.mark.parametrize("answer, target, score", [
    ("yes", "yes", 1.0),
    ("Yes.", "yes", 1.0),
    ("no", "yes", 0.0),
    ("", "yes", 0.0),
    # Longest common subsequence "the lay on mat" is 4 of 5 and of 6 words: 2 * 4 / 11.
    ("the dog lay on mat", "the cat lay on the mat", 8 / 11),
    # What rouge-score's own words would lose: scripts without spaces, letters beyond ASCII, signs.
    ("支持", "反对", 0.0),
    ("支持了", "支持", 0.8),
    ("größer", "größe", 0.0),
    ("das ist größer", "größer", 0.5),
    ("+", "+", 1.0),
    ("-", "+", 0.0),
])  # fmt: skip
def test_rouge_l(answer, target, score):
    assert rouge_l(answer, target) == pytest.approx(score, abs=1e-12)


def test_rouge_l_is_the_packages_own_for_ascii():
    from rouge_score.rouge_scorer import RougeScorer

    plain = RougeScorer(["rougeL"])
    for answer, target in (("a B-c d", "b c e d"), ("running fast", "run fast"), ("x 5 7", "5, 6, 7"), ("é y", "y")):
        assert rouge_l(answer, target) == plain.score(target, answer)["rougeL"].fmeasure


# Two words each; the second word without its last mark is another word.
SCRIPTS = {
    "Latin": "un café",
    "Vietnamese": "tiếng Việt",
    "Greek": "καλή ώρα",
    "Cyrillic": "синий чай",
    "Hebrew": "שָׁלוֹם עוֹלָ",
    "Arabic": "كِتَاب بَيْتُ",
    "Devanagari": "हिन्दी भाषा",
    "Bengali": "বাংলা ভাষা",
    "Tamil": "தமிழ் மொழி",
    "Telugu": "తెలుగు భాష్",
    "Hangul": "한국 말씀",
}


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_words_of_every_script_keep_their_marks(text):
    """NFC and NFD are one text; a word is one word, and another one without its last mark."""
    for answer in (normalize("NFC", text), normalize("NFD", text)):
        for target in (normalize("NFC", text), normalize("NFD", text)):
            assert all(score(answer, target) == 1.0 for score in SCORES.values())
    first, second = text.split()
    assert rouge_l(first, text) == pytest.approx(2 / 3)
    shorter = normalize("NFD", second)[:-1]
    assert rouge_l(f"{first} {shorter}", text) == 0.5 and exact_match(f"{first} {shorter}", text) == 0.0


@pytest.mark.parametrize("text, words", [("がぎグゲ", 4), ("ภาษาไทย", 7), ("ខ្មែរ", 3), ("支持反对", 4), ("မြန်မာ", 3)])
def test_scripts_without_spaces_are_letters_with_their_marks(text, words):
    for form in ("NFC", "NFD"):
        assert len(_AnyScript.tokenize(normalize(form, text))) == words
    assert rouge_l(normalize("NFD", text) * 2, text) == pytest.approx(2 / 3)


def test_exact_match_looks_past_white_space_only():
    assert exact_match(" a  b\n", "a b") == 1.0
    assert exact_match("A b", "a b") == 0.0 and exact_match("ab", "a b") == 0.0 and exact_match("", "a") == 0.0


@pytest.mark.parametrize("answer, target, same", [
    ("The Cat.", "cat", True), ("Ｆｕｌｌ　ｗｉｄｔｈ", "full width", True), ("STRASSE", "straße", True),
    ("don't", "dont", True), ("yes, it is", "Yes; it is!", True), ("5.", "5", True), ("«oui»", "oui", True),
    ("-5", "5", False), ("1.5", "15", False), ("+", "-", False), ("the", "a", False), ("then", "n", False),
    ("well known", "well-known", False), ("", "yes", False), ("न", "ना", False),
])  # fmt: skip
def test_normalised_exact_match(answer, target, same):
    assert normalised_match(answer, target) == normalised_match(target, answer) == float(same)


def test_the_best_reference_counts():
    assert best(exact_match, "b", ["a", "b"]) == 1.0 and best(exact_match, "c", ["a", "b"]) == 0.0
    assert best(rouge_l, "a b", ["a", "a b c"]) == pytest.approx(0.8)


def test_a_missing_package_is_named_before_anything_is_done(monkeypatch, tmp_path):
    _scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="expected rouge-score"):
        run_small(tmp_path / "run")
    assert not (tmp_path / "run").exists()
