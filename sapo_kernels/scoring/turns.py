"""Rows as examples: which columns are their texts, conversations, and which turn the instruction is in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..files import excerpt

# Columns of input and target: a pair where both are there, else those of a conversation, else exactly one of each list.
PAIRS = (("input", "target"), ("sentence", "label"), ("input", "output"))
# The second is ShareGPT's, with turns of "from" and "value".
MESSAGES = ("messages", "conversations")
# TRL's: two texts, or two lists of messages.
COMPLETION = ("prompt", "completion")
INPUTS = ("input", "sentence", "text", "question", "prompt")
TARGETS = ("target", "label", "output", "answer", "answerKey", "completion", "response")
# What a table's reader puts together with the input.
PARTS = ("instruction", "choices", "options")
COLUMNS = frozenset(("history", *MESSAGES, *INPUTS, *TARGETS, *PARTS))
_SHAREGPT = {"human": "user", "gpt": "assistant"}
# Where the instruction stands: in front of the last user turn's text, or in the system turn.
INSTRUCTION_ROLES = ("user", "system")
_ROLES = ("system", "developer", "user", "assistant")
Turn = dict[str, str]


def columns_of(names: Iterable[str], chosen: tuple[str | None, str | None] = (None, None)) -> tuple[str, str]:
    """The columns of input and target among `names`, for tables and rows in memory alike; twice that of messages.

    chosen: the columns that the caller names. Several candidates are an error, never a guess.

    Raises: ValueError naming what was expected and the columns there are.
    """
    names, free = list(names), chosen == (None, None)
    for pair in PAIRS if free else ():
        if set(pair) <= set(names):
            return pair
    for talk in MESSAGES:
        if talk in names and (free or chosen == (talk, None)):
            return talk, talk
    if free and set(COMPLETION) <= set(names):
        return COMPLETION
    result = []
    for what, column, known in zip(("input", "target"), chosen, (INPUTS, TARGETS), strict=True):
        found = [name for name in ([column] if column else known) if name in names and (column or name not in chosen)]
        if not found and what == "input" and not column and "instruction" in names:
            found = ["instruction"]
        if len(found) != 1:
            expected = excerpt(column) if column else f"(exactly one of {', '.join(known)})"
            got = ", ".join(map(excerpt, names[:20])) or "none"
            raise ValueError(f"expected the {what} column {expected}, got the columns {got}")
        result += found
    if result[0] == result[1]:
        raise ValueError(f"expected two different columns, got {excerpt(result[0])} for both")
    return result[0], result[1]


def example_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as {"input", "target"}, unchecked, and the "history" that it has.

    Of messages the input is the last user turn, the target the assistant's after it, the history the turns before.

    Raises: ValueError naming the column or message, what was expected and what was got.
    """
    text, answer = columns_of(row)
    if text in MESSAGES:
        messages = row[text]
    elif (text, answer) == COMPLETION and _is_list(row[text]) and _is_list(row[answer]):
        messages = [*row[text], *row[answer]]
    else:
        parts = [name for name in PARTS if row.get(name) is not None and name != text]
        if parts:
            raise ValueError(
                f"expected one text in {text!r}, got {parts[0]!r} beside it; sapo_peft.read_examples joins them"
            )
        return {"input": row[text], "target": row[answer], **{n: row[n] for n in ("history",) if n in row}}
    if not _is_list(messages):
        raise ValueError(f"{text}: expected a list, got {type(messages).__name__}")
    turns = [_turn(message, f"message {number}") for number, message in enumerate(messages)]
    roles = [turn["role"] for turn in turns]
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError(f"messages: expected a user's and then the assistant's turn at the end, got {roles[-5:]}")
    return {"input": turns[-2]["content"], "target": turns[-1]["content"], "history": turns[:-2]}


def turns_of(history: Sequence[Turn], role: str, prompt: str, last: str) -> list[Turn]:
    """The turns in front of the answer: `last` is the user's, and with role "system" `prompt` ends the system turn."""
    if role == "user":
        return [*history, {"role": "user", "content": last}]
    first, rest = ({}, history) if not history or history[0]["role"] == "user" else (history[0], history[1:])
    text = f"{first['content']}\n\n{prompt}" if first.get("content") else prompt
    return [{"role": first.get("role", "system"), "content": text}, *rest, {"role": "user", "content": last}]


def check_history(history: Any) -> list[Turn]:
    """The turns before the last user's, each with a role and a text."""
    if not _is_list(history):
        raise ValueError(f"history: expected a list of messages, got {type(history).__name__}")
    turns = [_turn(message, f"history: message {number}") for number, message in enumerate(history)]
    if any(turn["role"] in ("system", "developer") for turn in turns[1:]):
        raise ValueError("history: expected a system turn in the first place only, got a later one")
    return turns


def check_role(role: Any) -> None:
    """Raise ValueError if `role` is no place for an instruction."""
    if role not in INSTRUCTION_ROLES:
        raise ValueError(f"instruction_role: expected one of {INSTRUCTION_ROLES}, got {role!r}")


def _turn(message: Any, place: str) -> Turn:
    if isinstance(message, Mapping) and message.get("role") is None and "from" in message:
        message = {"role": _SHAREGPT.get(str(message["from"]), message["from"]), "content": message.get("value")}
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        got = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise ValueError(f"{place}: expected an object with a role and a content, got {got}")
    role, content = message["role"], message["content"]
    if role not in _ROLES or message.get("tool_calls"):
        raise ValueError(f"{place}: expected one of the roles {_ROLES} without tools, got {role!r}")
    if _is_list(content) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place}: expected a text, got {type(content).__name__}")
    return {"role": role, "content": content}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
