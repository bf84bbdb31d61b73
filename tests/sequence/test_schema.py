"""The schema of a run's folder is what a run writes, byte for byte."""

import json

import pytest

from sapo_kernels.files import DataError
from sapo_peft.sequence import schema
from tests.sequence.sequence_helpers import run_small

KINDS = {
    "run": schema.RunRecord, "before": schema.Evaluation, "results": schema.Results, "scores": schema.Scores,
    "metrics": schema.Evaluation, "train": schema.Training, "data": schema.TaskData,
}  # fmt: skip


@pytest.mark.parametrize("policy", ["sapo", "worst"])
def test_a_file_that_is_read_and_written_is_the_same(tmp_path, policy):
    run_small(tmp_path, policy=policy, method="o-lora")
    files = [file for file in sorted(tmp_path.rglob("*.json")) if file.parent.name != "adapter"]
    assert len(files) == 3 + 2 * 4
    for file in files:
        document = schema.read(KINDS[file.stem], file)
        assert json.dumps(document.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n" == file.read_text()


def test_answers_are_kept_where_a_run_has_them(tmp_path):
    one = schema.Answer(input="a", target="b", answer="c")
    found = schema.Evaluation(version=1, row={"loss": [0.5]}, examples=[2], seconds=1.0, answers=[[one]])
    (tmp_path / "metrics.json").write_text(found.model_dump_json())
    assert schema.read(schema.Evaluation, tmp_path / "metrics.json") == found
    assert "answers" not in found.model_copy(update={"answers": None}).model_dump()
    # What is no number is refused when it would be written, and a file that is too large when it is read.
    with pytest.raises(ValueError, match="finite number"):
        schema.Evaluation(version=1, row={"loss": [float("nan")]}, examples=[2], seconds=1.0)
    with open(tmp_path / "metrics.json", "wb") as file:
        file.truncate(schema.MAX_FILE_BYTES + 1)
    with pytest.raises(DataError, match=r"metrics.json: (wanted|expected) at most \d+ bytes"):
        schema.read(schema.Evaluation, tmp_path / "metrics.json")
