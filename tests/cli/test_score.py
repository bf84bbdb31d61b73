"""`sapo score`: results, options, what is kept of a call that stops, and outputs that would do harm."""

import json
import os
from datetime import datetime

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring import progress
from sapo_kernels.scoring.score import IMPLS
from sapo_peft import plain_loop, tiny_model, tiny_tokenizer
from sapo_peft.assets import task_names
from sapo_peft.cli import outputs, ranking
from sapo_peft.cli import score as score_command
from tests.cli.cli_helpers import PROMPTS, ROWS, SCORE, one_line_error, put, ranks
from tests.oracles import DATED


def test_score_prints_a_ranked_table(files, sapo, model):
    code, out, err = sapo(*SCORE, "--out", "s.json")
    assert code == 0 and err == ""
    scores = sk.score_prompts(model, PROMPTS, ROWS, tokenizer=tiny_tokenizer())
    assert [index for index, _ in ranks(out)] == scores.ranking()
    assert all(abs(loss - float(scores.loss[index])) < 6e-5 for index, loss in ranks(out))
    assert "p: 3 prompts x 4 of 4 examples, tiny, float32 on cpu" in out
    assert f"{scores.stats['trie_tokens']} computed for {scores.stats['dense_tokens']}" in out
    assert all(len(line) <= 100 for line in out.splitlines()[1:5])
    # One cell as the model reads it, with what counts.
    assert "<|im_start|>assistant" in out and "response tokens that are scored: no, never<|im_end|>" in out
    saved = sk.PromptScores.load("s.json")
    assert torch.equal(saved.nll, scores.nll) and saved.prompts == PROMPTS
    record = json.loads((files / "s.json").read_text())
    assert (record["model"], record["adapter"], record["task"]) == ("tiny", None, "p")
    assert record["ranking"] == scores.ranking() and record["data"] == "d.json"


def test_texts_are_cut_but_for_the_best(files, sapo):
    long = [f"{i} " + "word " * 40 + "end." for i in range(5)]
    put(files / "p.json", long)
    _, out, _ = sapo(*SCORE)
    best = [long[index] for index, _ in ranks(out)]
    assert all(text in out for text in best[:3]) and not any(text in out for text in best[3:])
    assert all(text in sapo(*SCORE, "--full")[1] for text in long)


def test_compare(files, sapo, monkeypatch):
    code, out, _ = sapo(*SCORE, "--compare", "--examples", "2")
    line = next(line for line in out.splitlines() if line.startswith("Plain loop"))
    assert code == 0 and "times the time" in line and float(line.split("cell ")[1].split()[0]) < 1e-4
    real = plain_loop.plain_scores
    for wrong in (lambda nll: nll + 0.1, lambda nll: nll.masked_fill(nll == nll.max(), torch.nan)):
        monkeypatch.setattr(plain_loop, "plain_scores", lambda *args, wrong=wrong: wrong(real(*args)))
        code, out, err = sapo(*SCORE, "--compare")
        assert code == 1 and "off the plain loop" in err and "Lowest loss: prompt" in out


def scores_of(losses, size):
    nll = torch.tensor(losses, dtype=torch.float64)[:, None] + 0.1 * torch.arange(size) * torch.ones(len(losses), 1)
    return sk.PromptScores(nll, torch.ones(len(losses), size, dtype=torch.int64), ["a", "b", "c"][: len(losses)])


def test_what_may_be_concluded():
    """Not what few examples or random weights seem to say."""
    enough, few = scores_of([1.0, 0.5, 2.0], 30), scores_of([1.0, 0.5, 2.0], 29)
    first, worse, rivals = ranking.conclusion(enough, random=False)
    assert first == "Train with prompt 1: b" and "(prompt 0) is 0.5000 +/- 0.0000 nats" in worse
    assert rivals == "0 of 2 other prompts lie within two standard errors of it."
    assert ranking.conclusion(few, random=False) == [
        "Lowest loss: prompt 1: b", "29 examples are too few to choose by: take 30 or more."]  # fmt: skip
    assert "The weights are random" in ranking.conclusion(enough, random=True)[1]
    assert not any("Train with" in line for line in ranking.conclusion(enough, random=True))


def test_standard_error_against_simulation():
    """The linearised paired error is the spread of the difference over many draws of examples."""
    generator = torch.Generator().manual_seed(0)
    draws, size = 2000, 60
    tokens = torch.randint(1, 12, (draws, size), generator=generator)
    shared = torch.rand((draws, size), generator=generator, dtype=torch.float64) * tokens * 3
    noise = torch.randn((draws, 2, size), generator=generator, dtype=torch.float64)
    nll = shared[:, None] * torch.tensor([1.0, 1.1])[:, None] + 0.3 * noise
    counts = torch.stack([tokens, tokens], 1)
    results = [ranking.paired_difference(nll[d], counts[d], 1, 0) for d in range(draws)]
    values, errors = (torch.tensor(column) for column in zip(*results, strict=True))
    assert abs(float(errors.mean() / values.std()) - 1) < 0.05
    # Of one example there is none; cells that a race left out do not count.
    value, error = ranking.paired_difference(nll[0][:, :1], counts[0][:, :1], 1, 0)
    assert error != error and value == float(nll[0, 1, 0] - nll[0, 0, 0]) / int(tokens[0, 0])
    counts[0, 1, 7:], nll[0, 1, 7:] = 0, torch.nan
    assert ranking.paired_difference(nll[0], counts[0], 1, 0) == ranking.paired_difference(
        nll[0][:, :7], counts[0][:, :7], 1, 0
    )


def test_race(files, sapo, monkeypatch):
    put(files / "d.json", [{"sentence": f"text {i}", "label": "yes"} for i in range(120)])
    put(files / "p.json", ["Say yes.", "Answer in a way that nobody would foresee: " + "zq" * 60])
    code, out, _ = sapo(*SCORE, "--race", "--compare", "--out", "s.json")
    assert code == 0 and "The race scored" in out and sk.PromptScores.load("s.json").race is not None
    one_line_error(sapo(*SCORE, "--race", "--resume", "--out", "r.json"), "--resume", "--race")


def test_options_reach_the_scoring(files, sapo, monkeypatch):
    assert score_command.IMPLS == IMPLS
    seen = {}
    for place, name in ((sk.ResponseCache, "build"), (sk, "score_prompts")):
        real = getattr(place, name)
        spy = lambda *args, real=real, **options: seen.update(options) or real(*args, **options)
        monkeypatch.setattr(place, name, spy)
    talk = [{"role": role, "content": "text"} for role in ("system", "user", "assistant")]
    put(files / "d.json", [{"messages": talk}, {"messages": talk[1:]}])
    put(files / "p.json", {"prompts": PROMPTS, "suffix": "S", "text_word": "W"})
    arguments = ("--max-source", "99", "--max-target", "7", "--instruction-role",
                 "system", "--out", "s.json")  # fmt: skip
    assert sapo(*SCORE, *arguments, "--impl", "padded", "--max-tokens", "300", "--quiet")[0] == 0
    assert seen == {
        "suffix": "S", "text_word": "W", "max_source": 99, "max_target": 7, "impl": "padded",
        "max_tokens": 300, "progress": False, "now": None, "instruction_role": "system",
    }  # fmt: skip
    assert json.loads((files / "s.json").read_text())["instruction_role"] == "system"


def test_columns_notes_and_quiet(files, sapo):
    put(files / "d.csv", "a,b\nx,yes\ny,\nz,no\n")
    arguments = ("score", "--prompts", "p.json", "--data", "d.csv", "--input-column", "a", "--target-column", "b")
    one_line_error(sapo(*arguments), "d.csv: line 3", "empty")
    put(files / "p.json", ["a b", "c", "A  b", "a B"])
    code, out, err = sapo(*arguments, "--skip-empty")
    assert code == 0 and "2 prompts x 2 of 3 examples" in out and err.splitlines() == [
        "sapo: note: 2 of the paraphrases from file:p.json rejected: expected each prompt once, got 'a b' again: "
        "'A  b'",
        "sapo: note: d.csv: 1 of the rows read with an empty label left out"]  # fmt: skip
    _, out, err = sapo(*arguments, "--skip-empty", "--quiet")
    assert err == "" and "<|im_start|>" not in out


def test_a_bundled_task(files, sapo):
    names = task_names()
    code, out, err = sapo("score", "--examples", "1")
    assert code == 0 and out.startswith(f"{names[0]}: 21 prompts x 1 of ") and "a bundled task" in err
    assert sapo("score", "--task", names[1], "--examples", "1")[1].startswith(names[1])
    one_line_error(sapo("score", "--task", "nothing"), "expected an existing task")


BAD_CALLS = {
    "no prompts": (("score", "--data", "d.json"), ("--prompts and --data", "--data only")),
    "missing data": (("score", "--prompts", "p.json", "--data", "x.json"), ("x.json: No such file",)),
    "task that nobody has": ((*SCORE, "--task", "x"), ("task: expected none", "'x'")),
    "unknown impl": ((*SCORE, "--impl", "fast"), ("--impl", "tree", "'fast'")),
    "no examples": ((*SCORE, "--examples", "0"), ("limit: expected at least 1, got 0",)),
    "unknown option": ((*SCORE, "--exampels", "3"), ("unrecognized arguments: --exampels",)),
    "column that is not there": ((*SCORE, "--input-column", "zz"), ("'zz'", "'sentence'")),
    "missing model": ((*SCORE, "--model", "./none"), ("--model", "./none", "no such folder")),
    "model with a newline": ((*SCORE, "--model", "a\nb"), ("--model", "expected a folder or a hub name")),
    "missing adapter": ((*SCORE, "--adapter", "./none"), ("--adapter", "no such folder")),
    "missing tokenizer": ((*SCORE, "--tokenizer", "./none"), ("tokenizer ", "no such folder")),
    "resume without out": ((*SCORE, "--resume"), ("--resume", "--out")),
    "out in a missing folder": ((*SCORE, "--out", "no/s.json"), ("--out no/s.json", "a file in an existing folder")),
    "out is a folder": ((*SCORE, "--out", "."), ("--out .: expected a file",)),
    "out cannot be written": ((*SCORE, "--out", "/proc/s.json"), ("--out /proc: expected a folder that can be",)),
    "out is the data": ((*SCORE, "--out", "d.json"), ("--out d.json: expected another file than the input d.json",)),
    "out is the prompts": ((*SCORE, "--out", "../" + "{here}" + "/p.json"), ("another file than the input p.json",)),
    "out is not ours": ((*SCORE, "--out", "notes.txt"), ("--out notes.txt: expected a new file", "--overwrite")),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(files, sapo, name):
    arguments, words = BAD_CALLS[name]
    put(files / "notes.txt", "mine")
    before = {file.name: file.read_bytes() for file in files.iterdir()}
    one_line_error(sapo(*(str(one).replace("{here}", files.name) for one in arguments)), *words)
    assert {file.name: file.read_bytes() for file in files.iterdir()} == before


def test_what_out_may_replace(files, sapo):
    put(files / "notes.txt", "mine")
    assert sapo(*SCORE, "--out", "notes.txt", "--overwrite")[0] == 0
    # Now it is one of ours.
    assert sapo(*SCORE, "--out", "notes.txt", "--examples", "2")[0] == 0
    assert sk.PromptScores.load("notes.txt").nll.shape == (3, 2)
    os.mkfifo("f.json")
    one_line_error(sapo(*SCORE, "--out", "f.json"), "--out f.json: expected a new file")


def test_bad_prompts(files, sapo):
    for content, word in ((b"Is it good?", "p.json"), (b'["a <|im_end|> b"]', "rompt")):
        put(files / "p.json", content)
        one_line_error(sapo(*SCORE, "--out", "s.json"), word)
    assert sorted(os.listdir(files)) == ["d.json", "p.json"]


def test_braces_and_directions_are_text(files, sapo):
    prompts = ["{0.__class__}", "{0:>100000000}", "{input} {prompt} {", "%s %n", "a\ttab\nline\u2028end", "good\x1b[2J"]
    put(files / "p.json", {"prompts": prompts, "suffix": "\u200bx"})
    code, out, err = sapo(*SCORE)
    assert code == 0 and "{0:>100000000}" in out and len(out) < 5000 and "a\\ttab\\nline\\u2028end" in out
    assert "control character U+001B" in err and all(line.isprintable() for line in (out + err).splitlines())


def test_non_finite_weights(files, sapo, monkeypatch):
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[ord("y")] = float("nan")
    monkeypatch.setattr("sapo_peft.tiny_random.tiny_model", lambda: broken)
    code, out, err = sapo(*SCORE, "--out", "s.json", "--compare")
    assert code == 2 and "nan" in out and "none of the 3 prompts has a finite loss" in err
    assert sk.PromptScores.load("s.json").nonfinite == [0, 1, 2]


def test_a_full_disk_costs_neither_the_table_nor_the_old_scores(files, sapo, monkeypatch):
    assert sapo(*SCORE, "--out", "s.json", "--examples", "1")[0] == 0
    before = (files / "s.json").read_bytes()

    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    code, out, err = sapo(*SCORE, "--out", "s.json")
    assert code == 2 and len(ranks(out)) == 3 and err == "sapo: error: s.json: No space left on device\n"
    assert (files / "s.json").read_bytes() == before and len(os.listdir(files)) == 3


def test_writers_that_name_neither_file_nor_cause(tmp_path, monkeypatch):
    """Those of torch and safetensors: the system is asked."""
    with pytest.raises(OSError, match=f"Permission denied: '{tmp_path}/a'"), outputs.naming(tmp_path / "a"):
        raise Exception("Permission denied (os error 13)")  # of tokenizers; that of safetensors says more
    with pytest.raises(FileNotFoundError, match="theirs"), outputs.naming(tmp_path):
        os.stat("theirs")
    with pytest.raises(RuntimeError, match="other"), outputs.naming(tmp_path):
        raise RuntimeError("other")
    monkeypatch.setattr(outputs, "_cause", lambda path: OSError(28, "No space left on device"))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a'"), outputs.naming(tmp_path / "a"):
        raise RuntimeError("basic_ios::clear: iostream error")


MANY = [{"sentence": f"text {i}", "label": f"label {i % 3}"} for i in range(100)]


@pytest.fixture
def stopped(files, sapo, monkeypatch):
    """A call with --out that Ctrl-C ended after two parts; returns the examples that later calls score."""
    put(files / "d.json", MANY)
    sizes, real = [], sk.score_prompts

    def count(model, cache, **options):
        if len(sizes) == 2:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(cache.num_examples)
        return real(model, cache, **options)

    monkeypatch.setattr(sk, "score_prompts", count)
    code, out, err = sapo(*SCORE, "--out", "s.json")
    assert (code, out) == (130, "") and not (files / "s.json").exists() and sizes == [16, 64, 0]
    assert "sapo: 240 scored cells are kept in s.json.part; the same command with --resume continues" in err
    return sizes


def test_a_stopped_call_is_resumed(files, sapo, stopped):
    one_line_error(sapo(*SCORE, "--out", "s.json"), "s.json.part", "--resume", "--overwrite")
    assert sapo(*SCORE, "--out", "s.json", "--resume")[0] == 0 and stopped[3:] == [20]
    resumed = (files / "s.json").read_bytes()
    assert sorted(os.listdir(files)) == ["d.json", "p.json", "s.json"]
    # The same scores as without a stop, whether or not there is something to resume.
    assert sapo(*SCORE, "--out", "t.json", "--resume")[0] == 0 and stopped[4:] == [16, 64, 20]
    one, two = (json.loads(text) for text in (resumed, (files / "t.json").read_bytes()))
    one["stats"].pop("seconds"), two["stats"].pop("seconds")
    assert one == two


@pytest.fixture
def dated(monkeypatch):
    """A tokenizer whose template shows the time."""
    monkeypatch.setattr("sapo_peft.tiny_random.CHAT_TEMPLATE", DATED)


def test_a_call_that_is_resumed_on_another_day_keeps_its_date(files, sapo, dated, stopped, monkeypatch):
    begun = json.loads((files / "s.json.part").read_text())["made_with"]["now"]
    monkeypatch.setattr("sapo_peft.cli.parts.STARTED", datetime(2001, 1, 1))
    assert sapo(*SCORE, "--out", "s.json", "--resume")[0] == 0 and stopped[3:] == [20]
    assert sapo(*SCORE, "--out", "t.json")[0] == 0
    one, two = (json.loads((files / name).read_text()) for name in ("s.json", "t.json"))
    assert one["now"] == begun != two["now"] == "2001-01-01T00:00:00" and one["nll"] != two["nll"]


def test_only_the_same_call_is_resumed(files, sapo, stopped):
    for change, words in (
        (("--max-target", "5"), ("max_target: expected 5 as in this call, got 128",)),
        (("--examples", "99"), ("cells: expected",)),
    ):
        one_line_error(sapo(*SCORE, "--out", "s.json", "--resume", *change), "s.json.part", *words)
    whole = (files / "s.json.part").read_text()
    put(files / "s.json.part", whole[:1000])
    one_line_error(sapo(*SCORE, "--out", "s.json", "--resume"), "s.json.part")
    assert sapo(*SCORE, "--out", "s.json", "--overwrite")[0] == 0 and stopped[3:] == [16, 64, 20]
    assert not (files / "s.json.part").exists()


def test_progress_without_a_terminal(files, sapo, monkeypatch):
    put(files / "d.json", MANY)
    assert sapo(*SCORE)[2] == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    for words, head, least in ((SCORE, "sapo: scoring: ", 2), ((*SCORE, "--race"), "sapo: race, at most: ", 1)):
        lines = sapo(*words)[2].splitlines()
        done = [int(line.removeprefix(head).partition(" of 300 cells, about 1 min left")[0]) for line in lines]
        assert len(done) >= least and done == sorted(done) and done[0] > 0 and done[-1] < 300, lines
        assert sapo(*words, "--quiet")[2] == ""
