"""What a prompt of a pool must be: rules on one text, and when two texts are the same prompt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from sapo_kernels.files import excerpt

MAX_CHARACTERS = 16_384
# Tab and line ends are layout. All other controls, unpaired surrogates and code points without a meaning have
# no place in an instruction; those below change what a person sees but not what the model reads, or the reverse.
_LAYOUT = "\t\n\r"
_DECEIVING = re.compile("[\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]")
_NOT_SPACED = ("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")


def normalised(text: str) -> str:
    """The form in which two prompts are compared: NFKC, case folded, nothing invisible, single spaces."""
    if text.isascii():
        return " ".join(text.lower().split())
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())


def character_fault(text: str) -> str | None:
    """Why the characters of `text` cannot stand in a prompt, naming the first bad one; None if they can."""
    if text.isascii() and text.isprintable():
        return None
    for index, character in enumerate(text):
        category = unicodedata.category(character)
        if category == "Cs":
            return f"a lone surrogate at character {index}"
        if character == "\0":
            return f"a NUL character at character {index}"
        if category == "Cc" and character not in _LAYOUT:
            return f"the control character U+{ord(character):04X} at character {index}"
        if _DECEIVING.match(character) or ord(character) & 0xFFFE == 0xFFFE:
            return f"the invisible or reversing character U+{ord(character):04X} at character {index}"
    return None


def storable(text: str, limit: int) -> str:
    """`text` as it can be written to a file: at most about `limit` characters, what UTF-8 or JSON lack escaped."""
    if len(text) > limit:
        text = text[:limit] + "..."
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def occurs(word: str, text: str) -> bool:
    """Whether `word` stands in `text` exactly so (case too) and as a whole word.

    In scripts that put no spaces between words (Chinese, Japanese, Thai, ...) any occurrence counts: there is
    no boundary to be seen.
    """
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        before = start > 0 and _joined(text[start - 1], word[0])
        after = end < len(text) and _joined(word[-1], text[end])
        if not before and not after:
            return True
        start = text.find(word, start + 1)
    return False


def _joined(left: str, right: str) -> bool:
    return _in_word(left) and _in_word(right)


def _in_word(character: str) -> bool:
    if character == "_" or unicodedata.category(character) in ("Mn", "Mc"):
        return True
    if not character.isalnum() or unicodedata.east_asian_width(character) in "WFH":
        return False
    return not unicodedata.name(character, "").startswith(_NOT_SPACED)


def fault(
    text: str,
    *,
    required: Sequence[str] = (),
    markers: Sequence[str] = (),
    specials: Sequence[str] = (),
    max_characters: int = MAX_CHARACTERS,
) -> str | None:
    """Why `text` cannot be a prompt of a pool ("expected ..., got ..."), or None.

    required: label names to be there as whole words. markers: texts to be there as they are. specials: special
    tokens of the tokenizer, none of which may occur.
    """
    # The length first: the other rules look at every character.
    if len(text) > max_characters:
        return f"expected at most {max_characters} characters, got {len(text)}"
    if problem := character_fault(text):
        return f"expected plain text, got {problem}"
    if not normalised(text):
        return "expected text, got an empty prompt"
    for special in specials:
        if special in text:
            return f"expected plain text, got the tokenizer's special token {excerpt(special)} in it"
    for label in required:
        if not occurs(label, text):
            return f"expected the label {excerpt(label)} as the original has it, got a prompt without it"
    for marker in markers:
        if marker not in text:
            return f"expected the marker {excerpt(marker)}, got a prompt without it"
    return None
