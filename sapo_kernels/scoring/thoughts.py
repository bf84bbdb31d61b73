"""How models mark their thoughts: where one begins, where it ends, and what closes one."""

from __future__ import annotations

import re

# <think>, [THINK], <|START_THINKING|>, <seed:think>, the channels of gpt-oss (also where a server has dropped their
# special tokens), ...
_WORD = r"\s?[\w:.-]{0,20}?(?:think|thought|reason|reflect|analy[sz]|scratchpad|monologue)"
_THOUGHT = rf"{_WORD}\w{{0,12}}\s?\|?"
THOUGHT_END = re.compile(
    rf"<\|?(?:/\|?|end_){_THOUGHT}>|<\|?{_WORD}\w{{0,12}}_end\s?\|?>|\[/{_THOUGHT}\]|\u25c1/think\u25b7"
    r"|\[begin final response\]|<channel\|>|<\|channel\|>\s{0,9}final\b[^<]{0,99}<\|message\|>|assistantfinal",
    re.IGNORECASE,
)
THOUGHT_START = re.compile(
    rf"<\|?{_THOUGHT}>|\[think(?:ing)?\]|\u25c1think\u25b7|<\|channel>"
    r"|<\|channel\|>\s{0,9}(?:analysis|commentary)\b|\A(?-i:analysis(?=[A-Z]))",
    re.IGNORECASE,
)
# Of a mark that switches thinking off.
_OFF = re.compile(r"no_?think|no_?reason", re.IGNORECASE)
# What begins a thought, and what ends one of that spelling.
_CLOSINGS = (
    (r"<\|channel>", "<channel|>"),
    (r"(<\|?)begin_(.+)", r"\1end_\2"),
    (r"(<\|?)BEGIN_(.+)", r"\1END_\2"),
    (r"(<\|?)start_(.+)", r"\1end_\2"),
    (r"(<\|?)START_(.+)", r"\1END_\2"),
    (r"(<\|?.+)_start(\|?>)", r"\1_end\2"),
    (r"([<\[\u25c1])([^|]+)", r"\1/\2"),
)


def open_thought(text: str) -> re.Match | None:
    """The mark of a thought that `text` begins and does not end, or None."""
    ends = list(THOUGHT_END.finditer(text))
    last, taken = max((end.end() for end in ends), default=0), {end.start() for end in ends}
    starts = [one for one in THOUGHT_START.finditer(text) if one.start() not in taken and not _OFF.search(one[0])]
    return starts[-1] if starts and starts[-1].start() >= last else None


def closing_of(mark: str) -> str | None:
    """What ends a thought that begins with `mark`; None for a spelling of which that is not known."""
    return next((re.sub(start, end, mark) for start, end in _CLOSINGS if re.fullmatch(start, mark)), None)
