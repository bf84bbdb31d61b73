"""Run folders for the tests of the report, made by a seeded generator through the schema of `sequence`.

Also the command that makes reports to look at: `python -m tests.report.report_runs FOLDER`.
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
from sapo_peft.sequence import schema, sequence_metrics
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


def make_run(
    folder: Path,
    policy: str = "sapo",
    seed: int = 0,
    tasks: list[str] = TASKS,
    done: int | None = None,
    prompts: int = 21,
    scorings: int = 5,
    method: str = "lora-inc",
    order: str = "ni_seq_c1",
    options: dict | None = None,
    answers: bool = False,
) -> Path:
    """Write a run folder and return it. done: tasks that are finished (None: all)."""
    draw = random.Random(f"{policy} {seed} {method} {order}")
    size = len(tasks)
    done = size if done is None else done
    matrices, metrics = {}, {}
    for score, top in (("rougeL", 0.9), ("exact_match", 0.8)):
        level = [draw.uniform(0.02, 0.35) for _ in tasks]
        matrix: list[list[float | None]] = [[round(value, 4) for value in level]]
        for i in range(size):
            level[i] = draw.uniform(0.75, 1) * top + GAIN[policy] / 2
            for j in range(size):
                drift = draw.uniform(-0.12, 0.0) if j < i else draw.uniform(-0.02, 0.04)
                if j != i:
                    level[j] = level[j] + drift + GAIN[policy]
            matrix.append([round(min(0.99, max(0.0, v)), 4) for v in level] if i < done else [None] * size)
        matrices[score], metrics[score] = matrix, {"R": matrix, **sequence_metrics(matrix)}

    def evaluation(number: int) -> dict:
        row = {score: matrix[number] for score, matrix in matrices.items()}
        kept = [[{"input": f"text {m}", "target": "good", "answer": f"answer {number}.{m}"} for m in range(3)]] * size
        found = schema.Evaluation(version=1, row=row, examples=[200] * size, seconds=12.5,
                                  answers=[[schema.Answer(**one) for one in some] for some in kept] if answers else None)  # fmt: skip
        return found.model_dump(mode="json")

    choices, spent = [], []
    for number, task in enumerate(tasks[:done], 1):
        words = ORIGINAL.replace("review", "text").split()
        texts = [ORIGINAL if number == 1 else " ".join(words)]
        texts += [" ".join(words[: draw.randint(5, 20)] + draw.sample(words, 12)) + "." for _ in range(prompts - 1)]
        quality = [draw.uniform(0.6, 1.6) for _ in texts]
        records = []
        for step in range(scorings if policy != "original" else 0):
            loss = [round(q * 0.8**step + draw.uniform(-0.04, 0.04), 6) for q in quality]
            ranked = sorted(range(prompts), key=lambda i: loss[i])
            chosen = {"sapo": ranked[0], "worst": ranked[-1]}.get(policy, (seed + number) % prompts)
            records.append(schema.Scoring(
                step=40 * step, reason="start" if not step else draw.choice(["steps", "epoch", "drift"]), loss=loss,
                tokens=[640 + i for i in range(prompts)], weights=[float(i == chosen) for i in range(prompts)],
                chosen=chosen, seconds=round(draw.uniform(0.5, 2), 3), dense_tokens=60_000, computed_tokens=23_456,
            ))  # fmt: skip
        index = records[-1].chosen if records else 0
        notes = ["2 rows with an empty label are left out", "1 row of test is also in train"] if number == 1 else []
        losses = [(10 * i, round(1.2 * 0.9**i + draw.uniform(0, 0.1) - GAIN[policy], 4)) for i in range(20)]
        files = {
            "scores": schema.Scores(version=1, task=task, prompts=texts, suffix="", chosen=index, scorings=records),
            "train": schema.Training(version=1, losses=losses, seconds=61.5, tokens=91_234, examples=1000),
            "data": schema.TaskData(version=1, rows={"train": 1000, "dev": 100, "test": 200}, notes=notes),
        }
        spot = folder / "tasks" / task_folder(number, task)
        (spot / "adapter").mkdir(parents=True)
        write_json(spot / "metrics.json", evaluation(number))
        for name, document in files.items():
            write_json(spot / f"{name}.json", document.model_dump(mode="json"))
        last = records[-1].loss if records else [None] * prompts
        choices.append(schema.Choice(task=task, index=index, prompt=texts[index], original=texts[0], loss=last[index],
                                     original_loss=last[0], prompts=prompts))  # fmt: skip
        spent += records
    folder.mkdir(parents=True, exist_ok=True)
    scoring = sum(record.seconds for record in spent)
    cost = schema.Cost(
        score_seconds=scoring, train_seconds=61.5 * done, eval_seconds=12.5 * (done + 1), train_tokens=91_234 * done,
        score_dense_tokens=60_000 * len(spent), score_computed_tokens=23_456 * len(spent),
        overhead_fraction=scoring / (61.5 * done) if done else 0.0,
    )  # fmt: skip
    write_json(folder / "before.json", evaluation(0))
    if done:
        results = schema.Results(version=1, tasks=tasks, metrics=metrics, choices=choices, cost=cost)
        write_json(folder / "results.json", results.model_dump(mode="json"))
    record = schema.RunRecord(
        version=1, kind="sequence", status="done" if done == size else "running", method=method, policy=policy,
        order=order, tasks=tasks, seed=seed, model="tiny", started="2026-06-01T10:00:00Z",
        config={"seed": seed, "policy": policy, "epochs": 2, "learning_rate": 1e-4, **(options or {})}, data={},
        versions={"torch": "2.13.0", "peft": "0.19.1"}, finished="2026-06-01T10:06:40Z" if done == size else None,
        warnings=["labels of task195_sentiment140 were cut at 128 tokens"] if policy == "sapo" else [],
    )  # fmt: skip
    write_json(folder / "run.json", record.model_dump(mode="json"))
    return folder


def small(folder, policy="sapo", seed=0, **options):
    return make_run(folder, policy, seed, **{"tasks": TWO, "prompts": 4, "scorings": 3, **options})


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path, *keys, value):
    """Replace one value of a JSON file; `KeyError` as a value takes the key away."""
    content = at = read(path)
    for key in keys[:-1]:
        at = at[key]
    if value is KeyError:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def page(*runs, out=None):
    """(HTML, the text that a reader sees on one line)."""
    html = write_report(runs, out).read_text(encoding="utf-8")
    body = re.sub(r"</?(b|bdi|small|span|ins|del|i|code)( [^<]*?)?>", "", html.split("</head>")[1])
    return html, re.sub("[ \n\xa0]+", " ", unescape(re.sub(r"<[^>]*>", " ", body))).strip()


def section(html, name):
    return re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL)[0]


def main() -> None:
    top = Path(sys.argv[1])
    for policy in POLICIES:
        for seed in range(5):
            make_run(top / "runs" / f"{policy}-{seed}", policy, seed, answers=True)
    print(write_report([top / "runs" / "sapo-0", top / "runs"], top / "one.html"))
    print(write_report([top / "runs"], top / "all.html"))
    make_run(top / "begun", done=2)
    print(write_report(top / "begun"))
    make_run(top / "start", scorings=1)
    print(write_report(top / "start"))


if __name__ == "__main__":
    main()
