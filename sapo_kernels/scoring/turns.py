"""Conversations: rows of ``messages``, and which turn the instruction is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Two texts that make an example; beside them ``messages`` are not looked at.
PAIRS = (("input", "target"), ("sentence", "label"))
# Where the instruction stands: in front of the last user turn's text, or in the system turn.
INSTRUCTION_ROLES = ("user", "system")
_ROLES = ("system", "developer", "user", "assistant")
Turn = dict[str, str]


def example_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row of ``messages``, or of two lists of messages ``prompt`` and ``completion`` (TRL), as an example.

    Returns {"input": the last user turn, "target": the assistant's turn after it, "history": the turns before}, or None
    for a row of another kind.

    Raises: ValueError naming the message, what was expected and what was got.
    """
    if any(set(pair) <= set(row) for pair in PAIRS):
        return None
    if "messages" in row:
        messages = row["messages"]
    elif _is_list(row.get("prompt")) and _is_list(row.get("completion")):
        messages = [*row["prompt"], *row["completion"]]
    else:
        return None
    if not _is_list(messages):
        raise ValueError(f"messages: expected a list, got {type(messages).__name__}")
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
