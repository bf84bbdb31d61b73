"""score_prompts against every peer on one task, against the published loop and the best plain one on all tasks."""

from __future__ import annotations

import functools

import pytest

from .end_to_end import make_case, task_name
from .peers import PEERS
from .workload import build_cache, load_tasks, load_tokenizer, qwen3_shaped

EVERYONE = [name for name, peer in PEERS.items() if not peer.gpu and name != "padded_loop"]
FIRST = "task141"
# Tokens of all sequences of a task, which decide how many examples are taken of it.
TOKENS = 6000


@functools.cache
def model_of(vocabulary: int, hidden: int, layers: int):
    return qwen3_shaped(vocabulary, hidden, layers)


def tasks_of(data) -> list:
    return load_tasks(data)


def first_task(data):
    """task141 where it is, else the first of the folder."""
    tasks = tasks_of(data)
    return next((task for task in tasks if task_name(task) == FIRST), tasks[0])


def cpu_only(recorder):
    if recorder.device != "cpu":
        pytest.skip("models for a CPU; python -m benchmarks.gpu_suite measures those for a GPU")


@pytest.mark.timeout(1200)
def test_every_peer_on_one_task(recorder, benchmark):
    cpu_only(recorder)
    tokenizer = load_tokenizer(recorder.data / "gpt2tokenizer")
    task = first_task(recorder.data)
    examples, shape = (2, (2816, 128, 2)) if recorder.toy else (int(10 * min(recorder.scale, 2)), (50257, 512, 8))
    cache = build_cache(task, tokenizer, examples)
    case = make_case("end_to_end", task_name(task), model_of(*shape), cache, EVERYONE, rounds=2)
    recorder.run(benchmark, case)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(10))
def test_all_tasks(number, recorder, benchmark):
    cpu_only(recorder)
    tasks = tasks_of(recorder.data)
    if number >= len(tasks) or (recorder.toy and number > 0):
        pytest.skip("no such task in this folder")
    tokenizer = load_tokenizer(recorder.data / "gpt2tokenizer")
    examples, shape = (1, (2816, 128, 2)) if recorder.toy else (2, (50257, 256, 4))
    cache = build_cache(tasks[number], tokenizer, examples)
    affordable = int(TOKENS * recorder.scale * examples / cache.offsets[-1])
    if not recorder.toy and affordable > examples:
        cache = build_cache(tasks[number], tokenizer, min(affordable, 32))
    sizes = {"trainer_loop": (), "tuned_plain": (8, 32), "prefix_cache": (32,)}
    model = model_of(*shape)
    case = make_case("tasks", task_name(tasks[number]), model, cache, list(sizes), rounds=2, sizes=sizes)
    recorder.run(benchmark, case)
