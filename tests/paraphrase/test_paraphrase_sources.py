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
        self.rounds, self.requests, self.closed = list(rounds), [], 0

    def paraphrase(self, request, deadline):
        self.requests.append(request)
        try:
            for answer in self.rounds.pop(0) if self.rounds else []:
                if isinstance(answer, BaseException):
                    raise answer
                yield Answer((answer,), "script") if isinstance(answer, str) else answer
        finally:
            self.closed += 1


def test_the_driver_asks_for_what_is_missing():
    source = Scripted(["a yes no", "bad"], ["A yes  no", "b yes no"], ["c yes no", "d yes no"])
    made = gather(POOL, source, 3)
    assert made.prompts[1:] == ("a yes no", "b yes no", "c yes no") and source.closed == 3
    assert [r.wanted for r in source.requests] == [3, 2, 1]
    assert source.requests[2].known == made.prompts[1:3] and source.requests[0].labels == ("yes", "no")
    assert len(made.rejected) == len(made.merged) == 1 and made.remarks == ()


def test_wanted_is_what_is_added():
    pool = POOL.extended(["given yes no"])
    made = gather(pool, Scripted(["a yes no", "b yes no", "c yes no"]), 2)
    assert made.prompts == (*pool.prompts, "a yes no", "b yes no")
    many = Answer(tuple(f"{i} yes no" for i in range(9)), "script")
    assert len(gather(POOL, Scripted([many]), 4).prompts) == 5


def test_each_answer_is_saved_as_it_arrives(tmp_path):
    store, seen = tmp_path / "p.json", []

    class Watching(Scripted):
        def paraphrase(self, request, deadline):
            for answer in super().paraphrase(request, deadline):
                yield answer
                seen.append(len(PromptPool.read(store).prompts))

    with pytest.raises(RuntimeError, match="boom"):
        gather(POOL, Watching(["a yes no", "b yes no", RuntimeError("boom")]), 5, store=store)
    assert seen == [2, 3]
    # Saved, so not asked for again; what the pool has gained in between comes first.
    source = Scripted(["c yes no", "d yes no", "e yes no"])
    made = gather(POOL.extended(["new yes no"]), source, 5, store=store)
    assert made.prompts[1:] == tuple(f"{name} yes no" for name in ("new", "a", "b", "c", "d", "e"))
    assert source.requests[0].wanted == 3 and PromptPool.read(store) == made
    source = Scripted()
    assert gather(POOL.extended(["new yes no"]), source, 5, store=store) == made and source.requests == []


def test_a_store_of_something_else_is_refused(tmp_path):
    store = tmp_path / "p.json"
    for other, word in (
        (PromptPool.build("u", "Say yes or no"), "task 't', got 'u'"),
        (PromptPool.build("t", "Say yes or No"), "original prompt 'Say yes or no', got 'Say yes or No'"),
    ):
        other.save(store)
        before = store.read_bytes()
        with pytest.raises(DataError, match=word):
            gather(POOL, Scripted(["a yes no"]), 1, store=store)
        assert store.read_bytes() == before
    store.write_text('{"schema": "sapo_pro')
    with pytest.raises(DataError, match="not valid JSON"):
        gather(POOL, Scripted(["a yes no"]), 1, store=store)
    source = Scripted(["a yes no"])
    with pytest.raises(DataError, match="a folder that can be written to"):
        gather(POOL, source, 1, store=tmp_path / "none" / "p.json")
    assert source.requests == []


def test_prompts_of_the_store_pass_the_rules_of_now(tmp_path):
    PromptPool.build("t", "Say yes or no", ["a", "b yes no", "b  yes no"]).save(tmp_path / "p.json")
    made = gather(POOL, Scripted(["c yes no"]), 2, store=tmp_path / "p.json")
    assert made.prompts[1:] == ("b yes no", "c yes no") and "'yes'" in made.rejected[0].reason
    assert [m.into for m in made.merged] == [1]


def test_too_few(tmp_path):
    def script():
        return Scripted(["a yes no", Answer((), "script", "why not")], [SourceError("it is gone")])

    made = gather(POOL, script(), 4, minimum=1)
    assert made.remarks == made.notes()[-1:] == ("",) or made.notes() == [
        "1 of the 4 paraphrases asked for are there: it is gone; 1 answer: why not"
    ]
    with pytest.raises(TooFewPrompts, match="at least 2 paraphrases, got 1; 1 of the 4 .* it is gone"):
        gather(POOL, script(), 4, minimum=2)
    made = gather(POOL, Scripted(), 4)
    assert made.prompts == POOL.prompts and "3 times in a row" in made.notes()[0]


def test_the_deadline_ends_it():
    now = [0.0]

    class Slow(Scripted):
        def paraphrase(self, request, deadline):
            now[0] += 4.0
            yield Answer((f"{now[0]} yes no",), "slow")

    made = gather(POOL, Slow(), 20, deadline_seconds=10, clock=lambda: now[0])
    assert len(made.prompts) == 4 and "the deadline of 10 s was reached" in made.notes()[0]
    deadline = Deadline(5, lambda: now[0])
    assert deadline.left == 5 and not deadline.over
    now[0] += 7
    assert deadline.left == 0 and deadline.over


@pytest.mark.parametrize("options", [{"wanted": 0}, {"wanted": True}, {"minimum": -1}, {"wanted": 1, "minimum": 2}])
def test_bad_arguments_of_the_driver(options):
    with pytest.raises(ValueError, match="wanted|minimum"):
        gather(POOL, Scripted(), **options)
    with pytest.raises(ValueError, match="at most 10000 prompts, got 1 and 10000 more"):
        gather(POOL, Scripted(), 10_000)
    for seconds in (0, -1, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="deadline_seconds"):
            gather(POOL, Scripted(), deadline_seconds=seconds)


# ---- files


def test_files(tmp_path):
    texts = ["a yes no", "Say yes or no", "no", "A yes no", "{b} yes no"]
    PromptPool.build("t", "Say yes or no", [PoolPrompt("a yes no", "endpoint:m"), "{b} yes no"]).save(
        tmp_path / "s.json"
    )
    for path, source in (
        (put(tmp_path / "f.txt", "\n".join(texts)), "file:f.txt"),
        (put(tmp_path / "f.json", texts), "file:f.json"),
        (put(tmp_path / "g.json", {"prompts": texts, "suffix": "x"}), "file:g.json"),
        (put(tmp_path / "paraphrases.json", {"t": texts}), "file:paraphrases.json"),
        (tmp_path / "s.json", "endpoint:m"),
    ):
        made = gather(POOL, FileSource(path), 20)
        assert made.prompts[1:] == ("a yes no", "{b} yes no") and made.provenance[1] == source
        assert "file:" in made.notes()[-1] and "holds no more" in made.notes()[-1]
        assert [r.text for r in made.rejected] == ([] if path.name == "s.json" else ["no"])
        assert [m.text for m in made.merged] == ([] if path.name == "s.json" else ["A yes no"])
    assert gather(POOL, FileSource(tmp_path / "f.txt"), 1).prompts[1:] == ("a yes no",)
    odd = os.fsdecode(b"a\n\x1b\xff\xe4\xbd\xa0.txt")
    made = gather(POOL, FileSource(put(tmp_path / odd, "a yes no")), 1, store=tmp_path / "out.json")
    assert (
        made.provenance[1] == "file:a\\n\\x1b\\udcff\u4f60.txt" == PromptPool.read(tmp_path / "out.json").provenance[1]
    )
    assert PromptPool.read(tmp_path / odd).task == "a\\n\\x1b\\udcff\u4f60"
    with pytest.raises(DataError, match="unknown|wanted"):
        FileSource(put(tmp_path / "h.json", {"schema": "sapo_prompt_pool", "version": 9}))
    with pytest.raises(OSError, match="none"):
        FileSource(tmp_path / "none.txt")


# ---- a model on this machine


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_model()


def state(model):
    return {
        "modes": [module.training for module in model.modules()],
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": [p.grad is None or p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "config": json.dumps(model.generation_config.to_dict(), default=str),
        "own": json.dumps(model.config.to_dict(), default=str),
        "random": torch.get_rng_state(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.model.layers[1].eval()
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    before = copy.deepcopy(state(model))
    source = LocalModelSource(model, tokenizer, max_new_tokens=5, per_call=2)
    answers = list(source.paraphrase(Request("Say yes", 3), Deadline(60)))
    assert len(answers) == 2 and same(state(model), before) and torch.is_grad_enabled()

    def broken(*_, **__):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        raise RuntimeError("boom")

    model.generate = broken
    with pytest.raises(RuntimeError, match="boom"):
        list(source.paraphrase(Request("Say yes", 3), Deadline(60)))
    del model.generate
    assert same(state(model), before) and torch.is_grad_enabled()


def test_seeds_are_recorded_and_repeat(model, tokenizer):
    def texts(seed):
        source = LocalModelSource(model, tokenizer, name="n", max_new_tokens=8, per_call=1, seed=seed)
        ids, deadline = source._encode("x"), Deadline(60)
        return [source._generate(ids, seed + i, deadline)[0] for i in range(2)]

    assert texts(7) == texts(7) != texts(8) and texts(7)[1] == texts(8)[0]
    source = LocalModelSource(model, tokenizer, name="n", max_new_tokens=2, per_call=1, seed=7)
    answers = [*source.paraphrase(Request("a", 2), Deadline(60)), *source.paraphrase(Request("a", 1), Deadline(60))]
    assert [a.source for a in answers] == ["model:n (seed 7)", "model:n (seed 8)", "model:n (seed 9)"]


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
    braces = "yes {0.__class__} no"
    given = scripted_model(model, tokenizer, tagged(braces, "maybe"), "Sorry.", tagged("no or yes", "yes! no!"))
    made = gather(POOL, LocalModelSource(model, tokenizer, name="m", per_call=2), 3)
    assert made.prompts[1:] == (braces, "no or yes", "yes! no!") and len(made.rejected) == 1
    assert made.provenance[1:] == ("model:m (seed 0)", "model:m (seed 2)", "model:m (seed 2)")
    assert given[0].startswith("<|im_start|>user\n") and given[0].endswith("<|im_start|>assistant\n")
    assert POOL.prompts[0] in given[0] and braces in given[2]


def test_special_tokens_and_cut_answers_of_a_model(model, tokenizer):
    scripted_model(model, tokenizer, tagged("yes <|im_start|> no"))
    (answer,) = LocalModelSource(model, tokenizer).paraphrase(Request("a", 1), Deadline(60))
    assert answer.texts == () and "special token" in answer.fault
    scripted_model(model, tokenizer, tagged("yes no") + "\n<paraphrase>yes a", end=())
    (answer,) = LocalModelSource(model, tokenizer).paraphrase(Request("a", 2), Deadline(60))
    assert answer.texts == ("yes no",) and "cut off" in answer.fault
    # What stands behind the end of the answer is not part of it.
    scripted_model(model, tokenizer, tagged("yes no"), end=(258, 256, 65))
    (answer,) = LocalModelSource(model, tokenizer).paraphrase(Request("a", 2), Deadline(60))
    assert answer == Answer(("yes no",), answer.source)
    with pytest.raises(SourceError, match="special token"):
        list(LocalModelSource(model, tokenizer).paraphrase(Request("a<|im_end|>", 1), Deadline(60)))


def test_generation_stops_at_the_deadline(model, tokenizer):
    source = LocalModelSource(model, tokenizer, max_new_tokens=7000)
    model.generation_config.eos_token_id = 2815
    started = time.monotonic()
    made = gather(POOL, source, 20, deadline_seconds=0.5)
    assert time.monotonic() - started < 3 and "the deadline of 0.5 s was reached" in made.notes()[0]


def test_without_a_chat_template(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    given = scripted_model(model, tokenizer, tagged("yes no"))
    (answer,) = LocalModelSource(model, bare).paraphrase(Request("Say yes or no", 1), Deadline(60))
    assert answer.texts == ("yes no",) and given[0].endswith("Answer:\n") and "<|im_start|>" not in given[0]


@pytest.mark.parametrize("options", [{"per_call": 0}, {"max_new_tokens": True}, {"seed": -1}])
def test_bad_arguments_of_the_model_source(model, tokenizer, options):
    with pytest.raises(ValueError, match="expected"):
        LocalModelSource(model, tokenizer, **options)


def test_the_name_comes_from_the_model(model, tokenizer):
    model.config._name_or_path = "/a/b/Qwen3-0.6B"
    assert LocalModelSource(model, tokenizer).name == "model:Qwen3-0.6B"
