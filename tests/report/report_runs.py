"""Run folders for the tests of the report, made by a seeded generator.

Also the command that makes reports to look at: `python -m tests.report.report_runs FOLDER`.
"""

from __future__ import annotations

import json
import random
import re
import sys
from html import unescape
from pathlib import Path

from sapo_kernels.manifest import write_manifest
from sapo_peft.report import write_report
from sapo_peft.sequence import folder, schema
from sapo_peft.sequence.results import results_of

TASKS = ["task1310_amazonreview_rating_classification", "task195_sentiment140", "sort_numbers", "task360_spolin"]
TWO = ["sort_numbers", "task195_sentiment140"]
# How far a policy ends from the others, so that comparisons have something to find.
GAIN = {"sapo": 0.05, "original": 0.0, "random": -0.01, "worst": -0.08, "sample": 0.02}
ORIGINAL = (
    "In this task, you're given a review from Amazon. Your task is to generate a rating for the product on a scale of "
    "1-5 based on the review. The rating means 1: extremely poor, 2: poor, 3: neutral, 4: good, 5: extremely good."
)


def make_run(path: Path, policy="sapo", seed=0, tasks=TASKS, done=None, prompts=21, scorings=5, method="lora-inc",
             order="ni_seq_c1", options=None, measures=("rougeL", "exact_match"), gain=None) -> Path:  # fmt: skip
    """Write a run folder and return it. done: tasks that are finished (None: all). gain: in place of the policy's."""
    draw = random.Random(f"{policy} {seed} {method} {order}")
    size = len(tasks)
    done = size if done is None else done
    gain = GAIN[policy] if gain is None else gain

    def cell(i: int, j: int) -> float:
        """After i tasks, of a task that is learnt, just learnt, or to come."""
        level = 0.7 + gain if j < i - 1 else 0.85 + gain if j == i - 1 else 0.2 + gain * i
        return round(min(0.99, max(0.0, level + draw.uniform(-0.06, 0.06))), 4)

    matrices = {
        measure: [[cell(i, j) if i <= done else None for j in range(size)] for i in range(size + 1)]
        for measure in measures
    }

    def evaluation(number: int) -> schema.Evaluation:
        row = {measure: found[number] for measure, found in matrices.items()}
        answers = [[schema.KeptAnswer(input=f"text {j}.{m}", target="good", answer=f"answer {number}.{m}")
                    for m in range(3)] for j in range(1, size + 1)]  # fmt: skip
        return schema.Evaluation(row=row, examples=[200] * size, seconds=12.5, answers=answers)

    def task(number: int) -> schema.FinishedTask:
        words = ORIGINAL.split()
        texts = [" ".join(words[: draw.randint(5, 20)] + draw.sample(words, 12)) + "." for _ in range(prompts)]
        texts[0] = ORIGINAL
        quality = [draw.uniform(0.6, 1.6) for _ in texts]
        records = []
        for step in range(scorings if policy != "original" else 0):
            loss = [round(q * 0.8**step + draw.uniform(-0.04, 0.04), 6) for q in quality]
            extremes = {"sapo": loss.index(min(loss)), "worst": loss.index(max(loss))}
            chosen = extremes.get(policy, (seed + number) % prompts)
            records.append(schema.ScoringRecord(
                step=40 * step, reason="drift" if step else "start", loss=loss, tokens=[640] * prompts, chosen=chosen,
                weights=[float(i == chosen) for i in range(prompts)], seconds=draw.uniform(0.5, 2),
                dense_tokens=60_000, computed_tokens=23_456,
            ))  # fmt: skip
        losses = [(10 * i, round(1.2 * 0.9**i + draw.uniform(0, 0.1) - gain, 4)) for i in range(20)]
        return schema.FinishedTask(
            schema.Scores(task=tasks[number - 1], prompts=texts, suffix="", scorings=records,
                          chosen=records[-1].chosen if records else 0),
            evaluation(number),
            schema.Training(losses=losses, seconds=61.5, tokens=91_234, examples=1000),
            schema.TaskData(rows={"train": 1000, "test": 200}, notes=["1 row left out"]),
        )  # fmt: skip

    record = schema.RunRecord(
        method=method, policy=policy, order=order, tasks=tasks, seed=seed, model="tiny", data={},
        started="2026-06-01T10:00:00Z", versions={"torch": "2.13.0"}, warnings=["labels were cut at 128 tokens"],
        config={"seed": seed, "policy": policy, "epochs": 2, "learning_rate": 1e-4, **(options or {})},
        **({"status": "done", "finished": "2026-06-01T10:06:40Z"} if done == size else {}),
    )  # fmt: skip
    with folder.run_folder(path) as opened:
        before, finished = evaluation(0), []
        for number, name in enumerate(tasks[:done], 1):
            finished.append(task(number))
            with opened.staging(number, name) as staging:
                folder.write_documents(staging, finished[-1])
                opened.write({}, staging)
        results = {"results": results_of(tasks, before, finished)} if done else {}
        opened.write({"run": record, "before": before, **results})
    return path


def small(path, policy="sapo", seed=0, **options):
    return make_run(path, policy, seed, **{"tasks": TWO, "prompts": 4, "scorings": 3, **options})


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path, *keys, value):
    """Replace one value of a JSON file."""
    content = at = read(path)
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def sealed(run: Path) -> Path:
    """Manifests of the files as they are now."""
    for task in (run / "tasks").iterdir():
        write_manifest(task, folder.TASK)
    write_manifest(run, folder.RUN, skip=folder._foreign)
    return run


def page(*runs, out=None):
    """(HTML, the text that a reader sees on one line)."""
    html = write_report(runs, out).read_text(encoding="utf-8")
    body = re.sub(r"</?(b|bdi|small|span|ins|del|code)( [^<]*?)?>", "", html.split("</head>")[1])
    return html, re.sub("[ \n\xa0]+", " ", unescape(re.sub(r"<[^>]*>", " ", body))).strip()


if __name__ == "__main__":
    top = Path(sys.argv[1])
    for one in GAIN:
        for number in range(5):
            make_run(top / "runs" / f"{one}-{number}", one, number)
    print(write_report([top / "runs" / "sapo-0", top / "runs"], top / "one.html"))
    print(write_report(make_run(top / "begun", tasks=[f"task{i:03d}_of_many" for i in range(15)], done=9)))
    print(write_report(make_run(top / "start", scorings=1)))
