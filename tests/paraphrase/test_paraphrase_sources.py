"""The driver, files and a model on this machine."""

import copy
import json
import os
import time

import pytest
import torch

from sapo_kernels.files import DataError
from sapo_peft.data.prompt_pool import PoolPrompt, PromptPool
from sapo_peft.paraphrase import (
    Answer,
    Deadline,
    FileSource,
    LocalModelSource,
    Request,
    SourceError,
    TooFewPrompts,
    gather,
)
from sapo_peft.tiny_random import tiny_model, tiny_tokenizer
from tests.cli.cli_helpers import put
from tests.paraphrase.bad_server import tagged

POOL = PromptPool.build("t", "Say yes or no", labels=["yes", "no"])


class Scripted:
    """A source that plays back rounds of answers; an exception in place of an answer is raised."""

    name, finite = "script", False

    def __init__(self, *rounds):
        self.rounds, self.requests = list(rounds), []

    def paraphrase(self, request, deadline):
        self.requests.append(request)
        for answer in self.rounds.pop(0) if self.rounds else []:
            if isinstance(answer, BaseException):
                raise answer
            yield Answer((answer,), "script") if isinstance(answer, str) else answer


def test_the_driver_asks_for_what_is_missing():
    source = Scripted(["a yes no", "bad"], ["A yes  no", "b yes no"], ["c yes no", "d yes no"])
    made = gather(POOL.extended(["given yes no"]), source, 3)
    assert made.prompts[1:] == ("given yes no", "a yes no", "b yes no", "c yes no")
    assert [r.wanted for r in source.requests] == [3, 2, 1]
    assert source.requests[2].known == made.prompts[1:4] and source.requests[0].labels == ("yes", "no")
    assert len(made.rejected) == 2
    many = Answer(tuple(f"{i} yes no" for i in range(9)), "script")
    assert len(gather(POOL, Scripted([many]), 4).prompts) == 5


@pytest.mark.parametrize("stop", [RuntimeError("boom"), KeyboardInterrupt("boom")])
def test_each_answer_is_saved_as_it_arrives(tmp_path, stop):
    store = tmp_path / "p.json"
    with pytest.raises(type(stop), match="boom"):
        gather(POOL, Scripted(["a yes no", "b yes no", stop]), 5, store=store)
    assert len(PromptPool.read(store).prompts) == 3
    # Saved, so not asked for again; what the pool has gained in between comes first, rules of now hold.
    source = Scripted(["c yes no", "d yes no", "e yes no"])
    pool = PromptPool.build("t", "Say yes or no", ["new yes no"], labels=["yes", "no"], markers=["yes"])
    made = gather(pool, source, 5, store=store)
    assert made.prompts[1:] == tuple(f"{name} yes no" for name in ("new", "a", "b", "c", "d", "e"))
    assert source.requests[0].wanted == 3 and PromptPool.read(store) == made
    source = Scripted()
    assert gather(pool, source, 5, store=store) == made and source.requests == []
    assert gather(pool, source, 2, store=store).prompts == made.prompts[:4], "fewer are wanted than the store has"


def test_a_store_of_something_else_is_refused_before_anything_is_asked(tmp_path):
    source = Scripted(["a yes no"])
    PromptPool.build("u", "Say yes or no").save(tmp_path / "u.json")
    PromptPool.build("t", "Say yes or No").save(tmp_path / "no.json")
    put(tmp_path / "cut.json", '{"schema": "sapo_pro')
    put(tmp_path / "other.json", ["Say yes or no"])
    for name, word in (
        ("u.json", "task 't', got 'u'"),
        ("no.json", "original prompt 'Say yes or no', got 'Say yes or No'"),
        ("cut.json", "not valid JSON"),
        ("other.json", "expected a saved pool"),
        ("none/p.json", "a folder that can be written to"),
    ):
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
        with pytest.raises(DataError, match=word):
            gather(POOL, source, 1, store=tmp_path / name)
        assert source.requests == [] and before == {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert PromptPool.read(tmp_path / "u.json") != gather(POOL, source, 1, store=tmp_path / "u.json", overwrite=True)
    assert PromptPool.read(tmp_path / "u.json").prompts == ("Say yes or no", "a yes no")


def test_too_few(caplog):
    def script():
        return Scripted(["a yes no", Answer((), "script", "why not")], [SourceError("it is gone")])

    gather(POOL, script(), 4, minimum=1)
    assert "script: 1 of the 4 paraphrases arrived: it is gone; 1 answer: why not" in caplog.text
    with pytest.raises(TooFewPrompts, match="at least 2 paraphrases, got 1; 1 of the 4 .* it is gone"):
        gather(POOL, script(), 4, minimum=2)
    assert gather(POOL, Scripted(), 4).prompts == POOL.prompts and "3 times in a row" in caplog.text


def test_the_deadline_ends_it(caplog):
    class Slow(Scripted):
        def paraphrase(self, request, deadline):
            time.sleep(0.04)
            yield Answer((f"{time.monotonic()} yes no",), "slow")

    made = gather(POOL, Slow(), 20, deadline_seconds=0.1)
    assert len(made.prompts) == 4 and "the deadline of 0.1 s was reached" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"wanted": 0},
        {"minimum": -1},
        {"wanted": 1, "minimum": 2},
        {"wanted": 10_000},
        {"deadline_seconds": 0},
        {"deadline_seconds": float("nan")},
    ],
)
def test_bad_arguments_of_the_driver(options):
    with pytest.raises(ValueError, match="^(wanted|wanted, minimum|deadline_seconds): "):
        gather(POOL, Scripted(), **options)


def test_files(tmp_path, caplog):
    texts = ["a yes no", "Say yes or no", "no", "A yes no", "{b} yes no"]
    pool = PromptPool.build("t", "Say yes or no", [PoolPrompt("a yes no", "endpoint:m"), "{b} yes no"])
    pool.save(tmp_path / "s.json")
    odd = os.fsdecode(b"a\n\x1b\xff\xe4\xbd\xa0.txt")
    for path, source in (
        (put(tmp_path / "f.txt", "\n".join(texts)), "file:f.txt"),
        (put(tmp_path / "g.json", {"prompts": texts, "suffix": "x"}), "file:g.json"),
        (put(tmp_path / "paraphrases.json", {"t": texts}), "file:paraphrases.json"),
        (put(tmp_path / odd, "\n".join(texts)), "file:a\\n\\x1b\\udcff\u4f60.txt"),
        (tmp_path / "s.json", "endpoint:m"),
    ):
        made = gather(POOL, FileSource(path), 20, store=tmp_path / "out.json", overwrite=True)
        assert made.prompts[1:] == ("a yes no", "{b} yes no") and made.provenance[1] == source
        assert "holds no more" in caplog.text and PromptPool.read(tmp_path / "out.json") == made
        assert len(made.rejected) == 2 * (path.name != "s.json")
    assert gather(POOL, FileSource(tmp_path / "f.txt"), 1).prompts[1:] == ("a yes no",)


# ---- a model on this machine


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_model()


def state(model):
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
    settings = [model.generation_config.to_dict(), model.config.to_dict(), torch.is_grad_enabled()]
    modes = [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()]
    return copy.deepcopy(tensors), json.dumps([settings, modes], default=str)


def same(a, b):
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.model.layers[1].eval()
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    before = state(model)
    source = LocalModelSource(model, tokenizer, max_new_tokens=5, per_call=2)
    answers = list(source.paraphrase(Request("Say yes", 3), Deadline(60)))
    assert len(answers) == 2 and same(state(model), before)

    def broken(*_, **__):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        raise RuntimeError("boom")

    model.generate = broken
    with pytest.raises(RuntimeError, match="boom"):
        list(source.paraphrase(Request("Say yes", 3), Deadline(60)))
    assert same(state(model), before)


def test_seeds_are_recorded_and_repeat(model, tokenizer):
    def texts(seed):
        source = LocalModelSource(model, tokenizer, max_new_tokens=8)
        return [source._generate(source._encode("x"), seed + i, Deadline(60)) for i in range(2)]

    assert texts(7) == texts(7) != texts(8) and texts(7)[1] == texts(8)[0]
    model.config._name_or_path = "/a/b/Qwen3-0.6B"
    source = LocalModelSource(model, tokenizer, max_new_tokens=2, per_call=1, seed=7)
    answers = [*source.paraphrase(Request("a", 2), Deadline(60)), *source.paraphrase(Request("a", 1), Deadline(60))]
    assert [a.source for a in answers] == [f"model:Qwen3-0.6B (seed {seed})" for seed in (7, 8, 9)]


def scripted_model(model, tokenizer, *answers, end=(258,)):
    """Make `generate` of the model answer these texts, in order, and keep what it was given."""
    given, left = [], list(answers)

    def generate(input_ids, **options):
        given.append(tokenizer.decode(input_ids[0]))
        text = left.pop(0) if len(left) > 1 else left[0]
        new = tokenizer(text, add_special_tokens=False)["input_ids"] + list(end)
        return torch.cat([input_ids, torch.tensor([new])], 1)

    model.generate = generate
    return given


def test_answers_of_a_model(model, tokenizer):
    braces, thought = "yes {0.__class__} no", "<|im_start|>" + tagged("draft yes no") + "</think>\n"
    given = scripted_model(
        model, tokenizer, thought + tagged(braces, "maybe"), "Sorry.", tagged("no or yes", "yes! no!")
    )
    made = gather(POOL, LocalModelSource(model, tokenizer, name="m", per_call=2), 3)
    assert made.prompts[1:] == (braces, "no or yes", "yes! no!") and len(made.rejected) == 1
    assert made.provenance[1:] == ("model:m (seed 0)", "model:m (seed 2)", "model:m (seed 2)")
    assert given[0].startswith("<|im_start|>user\n") and given[0].endswith("<|im_start|>assistant\n")
    assert POOL.prompts[0] in given[0] and braces in given[2]


@pytest.mark.parametrize(
    ("text", "end", "texts", "fault"),
    [
        (tagged("yes <|im_start|> no"), (258,), (), "special token"),
        (tagged("yes no") + "\n<paraphrase>yes a", (), ("yes no",), "cut off"),
        # What stands behind the end of the answer is not part of it.
        (tagged("yes no"), (258, 256, 65), ("yes no",), ""),
    ],
)
def test_special_tokens_and_cut_answers_of_a_model(model, tokenizer, text, end, texts, fault):
    scripted_model(model, tokenizer, text, end=end)
    (answer,) = LocalModelSource(model, tokenizer).paraphrase(Request("a", 2), Deadline(60))
    assert answer.texts == texts and fault in (answer.fault or "") and bool(fault) == bool(answer.fault)


def test_generation_stops_at_the_deadline(model, tokenizer, caplog):
    source = LocalModelSource(model, tokenizer, max_new_tokens=7000)
    model.generation_config.eos_token_id = 2815
    started = time.monotonic()
    gather(POOL, source, 20, deadline_seconds=0.5)
    assert time.monotonic() - started < 3 and "the deadline of 0.5 s was reached" in caplog.text


def test_without_a_chat_template(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    given = scripted_model(model, tokenizer, tagged("yes no"))
    (answer,) = LocalModelSource(model, bare).paraphrase(Request("Say yes or no", 1), Deadline(60))
    assert answer.texts == ("yes no",) and given[0].endswith("Answer:\n") and "<|im_start|>" not in given[0]
