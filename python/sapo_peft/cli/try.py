"""`sapo try`: the answer of a model with an adapter to an input, under the prompt that the adapter was trained with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..terminal import log_on_stderr, plain, say_notes

HELP = "answer with an adapter and its prompt"
MOST_SOURCE, MOST_ANSWER = 1536, 128
EPILOG = """\
The answer alone goes to the standard output; what the model reads is shown on stderr. It is decoded greedily, as
`sapo sequence` evaluates.
"""


def options(add: Callable) -> None:
    """Declare the options of `sapo try`."""
    add("adapter", metavar="ADAPTER", help="folder with an adapter and sapo_prompts.json")
    add("--input", metavar="TEXT", help="the input (default: the standard input)")
    add("--task", metavar="NAME", help="task whose prompt is used, where the adapter has several")
    add("--model", metavar="DIR_OR_ID", help="base model (default: the one that the adapter names)")
    add("--tokenizer", metavar="DIR_OR_ID", help="tokenizer, if it is not beside the base model")
    add("--max-source", type=int, default=MOST_SOURCE, metavar="N", help="longest context in tokens (%(default)s)")
    add("--max-new-tokens", type=int, default=MOST_ANSWER, metavar="N", help="longest answer (%(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--quiet", action="store_true", help="the answer only")


def run(args: argparse.Namespace) -> int:
    """Read, check, load, answer; the input is read before the model is loaded."""
    for option in ("max_source", "max_new_tokens"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')}: expected at least 1, got {getattr(args, option)}")
    base = args.model or _base(args.adapter)
    prompt, earlier = _prompt(args.adapter, args.task)
    text = _input(args.input)

    import sapo_kernels as sk
    from sapo_kernels.scoring.render import Renderer

    from ..loading import load, spare_threads
    from ..sequence.evaluate import answer_of, closing, end_tokens, greedy, padding_token

    spare_threads(base)
    with log_on_stderr("sapo_kernels", args.quiet), log_on_stderr("sapo_peft", args.quiet):
        model, tokenizer = load(base, args.adapter, args.dtype, args.device, args.tokenizer)
        cache = sk.ResponseCache.build(
            tokenizer, [prompt.prompt], [{"input": text, "target": "x"}], template=prompt.template,
            suffix=prompt.suffix, text_word=prompt.text_word, max_source=args.max_source,
            instruction_role=prompt.instruction_role,
        )  # fmt: skip
        if earlier:
            say_notes([f"in training {earlier} adapters of earlier tasks were active too; they are not in this folder, "
                       "sapo export makes one adapter of all"], args.quiet)  # fmt: skip
        if cache.stats["truncated_inputs"]:
            say_notes([f"the input is cut: the context has over {args.max_source} tokens"], args.quiet)
        context = cache.contexts[0][0]
        if not args.quiet:
            print(f"What the model reads:\n{_lines(tokenizer.decode(context))}", file=sys.stderr)
        role = prompt.instruction_role
        renderer = Renderer(tokenizer, prompt.template, prompt.suffix, prompt.text_word, instruction_role=role)
        stops, closings = closing(renderer, prompt.prompt, {"input": text}, end_tokens(model, tokenizer))
        pad = padding_token(tokenizer)
        ((_, (ids,)),) = greedy(model, [context], args.max_new_tokens, stops, pad, 1)
    print(_lines(answer_of(tokenizer, ids, closings).strip(), ""))
    return 0


def _base(adapter: str) -> str:
    """The base model that an adapter names."""
    from sapo_kernels.files import DataError, excerpt, read_json

    folder = Path(adapter)
    if not (folder / "adapter_config.json").exists():
        run = " (sapo export makes one adapter of a run)" if (folder / "run.json").exists() else ""
        raise DataError(f"{adapter}: expected a folder with adapter_config.json, got none{run}")
    options = read_json(folder / "adapter_config.json")
    base = options.get("base_model_name_or_path") if isinstance(options, dict) else None
    if not isinstance(base, str) or not base:
        raise DataError(f"{adapter}: expected the name of its base model in adapter_config.json, got {excerpt(base)}; "
                        "--model names it")  # fmt: skip
    return base


def _prompt(adapter: str, task: str | None) -> tuple[Any, int]:
    """(the prompt to answer with, how many adapters were active beside this one)."""
    from sapo_kernels.files import DataError, excerpt

    from ..trainer.records import read_prompts_of

    found = read_prompts_of(adapter)
    if (task is None and len(found.tasks) > 1) or (task is not None and task not in found.tasks):
        got = "none" if task is None else excerpt(task)
        some = ", ".join(map(excerpt, list(found.tasks)[:10]))
        raise DataError(f"--task: expected one of the {len(found.tasks)} tasks of {adapter}, got {got} (there: {some})")
    prompt = found.tasks[task if task is not None else next(iter(found.tasks))]
    if prompt.template and not ("{prompt}" in prompt.template and "{input}" in prompt.template):
        got = excerpt(prompt.template)
        raise DataError(f"{adapter}: expected a template that is a text, got one that a function makes: {got}")
    return prompt, found.earlier


def _input(text: str | None) -> str:
    from sapo_kernels.files import MAX_BYTES, DataError, decode

    if text is None:
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DataError(f"standard input: expected at most {MAX_BYTES} bytes, got more")
        text = decode(data, "standard input").removesuffix("\n")
    if not text.strip():
        raise DataError("--input or standard input: expected a text, got an empty one")
    return text


def _lines(text: str, indent: str = "  ") -> str:
    """Each line of it on a line of its own, made safe for a terminal."""
    return "\n".join(indent + plain(line) for line in text.split("\n")) if text else text
