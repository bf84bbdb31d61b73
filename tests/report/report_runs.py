"""Run folders for the tests of the report, made by a seeded generator that follows the layout of `sapo sequence`.

Also the command that makes one report to look at: `python -m tests.report.report_runs FOLDER`.
"""

from __future__ import annotations

import json
import random
import re
import sys
from html import unescape
from pathlib import Path

from sapo_kernels.files import write_json
from sapo_peft.report import write_report
from sapo_peft.sequence import sequence_metrics
from sapo_peft.sequence.folder import task_folder

TASKS = ["task1310_amazonreview_rating_classification", "task195_sentiment140", "sort_numbers", "task360_spolin"]
TWO = ["sort_numbers", "task195_sentiment140"]
POLICIES = ("sapo", "original", "random", "worst", "sample")
# How far a policy ends from the others, so that comparisons have something to find.
GAIN = {"sapo": 0.05, "original": 0.0, "random": -0.01, "worst": -0.08, "sample": 0.02}
ORIGINAL = (
    "In this task, you're given a review from Amazon. Your task is to generate a rating for the product on a scale of "
    "1-5 based on the review. The rating means 1: extremely poor, 2: poor, 3: neutral, 4: good, 5: extremely good."
)
WORDS = [
    "read",
    "classify",
    "decide",
    "answer",
    "label",
    "text",
    "review",
    "carefully",
    "choose",
    "output",
    "rating",
    "below",
    "given",
    "only",
    "word",
]


def make_run(
    folder: Path,
    policy: str = "sapo",
    seed: int = 0,
    tasks: list[str] = TASKS,
    done: int | None = None,
    prompts: int = 21,
    scorings: int = 5,
    soft: bool = False,
    method: str = "lora-inc",
    order: str = "ni_seq_c1",
    options: dict | None = None,
) -> Path:
    """Write a run folder and return it. done: tasks that are finished (None: all). soft: weights are spread."""
    draw = random.Random(f"{policy} {seed} {method} {order}")
    size = len(tasks)
    done = size if done is None else done
    base = {"version": 1}
    kept = {}
    for score, top in (("rougeL", 0.9), ("exact_match", 0.8)):
        level = [draw.uniform(0.02, 0.35) for _ in tasks]
        matrix: list[list[float | None]] = [[round(value, 4) for value in level]]
        for i in range(size):
            level[i] = min(0.99, draw.uniform(0.75, 1) * top + GAIN[policy] / 2)
            for j in range(size):
                drift = draw.uniform(-0.12, 0.0) if j < i else draw.uniform(-0.02, 0.04)
                if j != i:
                    level[j] = min(0.99, max(0.0, level[j] + drift + GAIN[policy]))
            matrix.append([round(value, 4) for value in level] if i < done else [None] * size)
        kept[score] = {"R": matrix, **sequence_metrics(matrix)}
    choices, totals = [], dict.fromkeys(("score", "train", "eval", "dense", "computed", "tokens"), 0.0)
    for number, task in enumerate(tasks[:done], 1):
        texts = [ORIGINAL.replace("review", "text") if number > 1 else ORIGINAL]
        texts += [" ".join(draw.choices(WORDS, k=draw.randint(8, 40))).capitalize() + "." for _ in range(prompts - 1)]
        spot = folder / "tasks" / task_folder(number, task)
        (spot / "adapter").mkdir(parents=True)
        records = []
        quality = [draw.uniform(0.6, 1.6) for _ in texts]
        for step in range(scorings if policy != "original" else 0):
            loss = [round(q * 0.8**step + draw.uniform(-0.04, 0.04), 6) for q in quality]
            ranked = sorted(range(prompts), key=lambda i: loss[i])
            chosen = {"sapo": ranked[0], "worst": ranked[-1]}.get(policy, (seed + number) % prompts)
            powers = [2.0 ** -ranked.index(i) for i in range(prompts)]
            one_hot = [float(i == chosen) for i in range(prompts)]
            share = [p / sum(powers) for p in powers] if soft else one_hot
            records.append({
                "step": 40 * step, "reason": "start" if not step else draw.choice(["steps", "epoch", "drift"]),
                "loss": loss, "tokens": [640 + i for i in range(prompts)], "weights": share, "chosen": chosen,
                "seconds": round(draw.uniform(0.5, 2), 3), "dense_tokens": 60_000, "computed_tokens": 23_456,
            })  # fmt: skip
        write_json(spot / "scores.json", {**base, "task": task, "prompts": texts, "suffix": "", "scorings": records})
        row = {score: value["R"][number] for score, value in kept.items()}
        write_json(spot / "metrics.json", {**base, "row": row, "examples": [200] * size, "seconds": 12.5})
        losses = [[10 * i, round(1.2 * 0.9**i, 4)] for i in range(20)]
        train = {**base, "losses": losses, "seconds": 61.5, "tokens": 91_234, "examples": 1000}
        write_json(spot / "train.json", train)
        notes = ["2 rows with an empty label are left out", "1 row of test is also in train"] if number == 1 else []
        write_json(spot / "data.json", {**base, "rows": {"train": 1000, "dev": 100, "test": 200}, "notes": notes})
        first = records[0] if records else None
        index = first["chosen"] if first else 0
        choices.append({
            "task": task, "index": index, "prompt": texts[index], "original": texts[0],
            "loss": first and first["loss"][index], "original_loss": first and first["loss"][0], "prompts": prompts,
        })  # fmt: skip
        for key, value in zip(
            totals,
            (sum(r["seconds"] for r in records), 61.5, 12.5, 60_000 * len(records), 23_456 * len(records), 91_234),
            strict=True,
        ):
            totals[key] += value
    cost = {
        "score_seconds": totals["score"], "train_seconds": totals["train"], "eval_seconds": totals["eval"],
        "score_dense_tokens": int(totals["dense"]), "score_computed_tokens": int(totals["computed"]),
        "train_tokens": int(totals["tokens"]), "overhead_fraction": totals["score"] / totals["train"] if done else None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    if done:
        write_json(folder / "results.json", {**base, "tasks": tasks, "metrics": kept, "choices": choices, "cost": cost})
    write_json(folder / "run.json", {
        **base, "kind": "sequence", "status": "done" if done == size else "running", "method": method, "policy": policy,
        "order": order, "tasks": tasks, "seed": seed, "model": "tiny", "started": "2026-06-01T10:00:00Z",
        "config": {"seed": seed, "policy": policy, "epochs": 2, "learning_rate": 1e-4, **(options or {})},
        "versions": {"torch": "2.13.0", "peft": "0.19.1"}, "finished": "2026-06-01T10:06:40Z" if done == size else None,
        "warnings": ["labels of task195_sentiment140 were cut at 128 tokens"] if policy == "sapo" else [],
    })  # fmt: skip
    return folder


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def page(*runs, out=None):
    """(HTML, the text that a reader sees on one line)."""
    html = write_report(runs, out).read_text(encoding="utf-8")
    body = html.split("</head>")[1]
    text = re.sub(
        r"<[^>]*>", " ", re.sub(r"</?(b|bdi|wbr|small|span|i|code)[ >][^<]*?>|</?(b|bdi|wbr|small|code|i)>", "", body)
    )
    return html, re.sub("[ \n]+", " ", unescape(text)).strip()


def small(folder, policy="sapo", seed=0, **options):
    return make_run(folder, policy, seed, **{"tasks": TWO, "prompts": 4, "scorings": 3, **options})


def section(html, name):
    return re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL)[0]


def main() -> None:

    top = Path(sys.argv[1])
    for policy in POLICIES:
        for seed in range(5):
            make_run(top / "runs" / f"{policy}-{seed}", policy, seed)
    print(write_report([top / "runs" / "sapo-0", top / "runs"], top / "one.html"))
    print(write_report([top / "runs"], top / "all.html"))
    make_run(top / "soft", soft=True, done=2)
    print(write_report(top / "soft"))
    make_run(top / "start", scorings=1, soft=True)
    print(write_report(top / "start"))


if __name__ == "__main__":
    main()
