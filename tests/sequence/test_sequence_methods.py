"""LoRAInc, O-LoRA, one LoRA trained on: what is frozen, what the penalty is, what merging gives."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sapo_kernels import ResponseCache, score_prompts
from sapo_kernels.files import DataError, read_json
from sapo_peft.sequence import load_adapters, orthogonality
from sapo_peft.sequence.config import derived_seed
from sapo_peft.sequence.methods import WEIGHTS, Adapters
from sapo_peft.sequence.training import train_task
from tests.sequence.sequence_helpers import adapter_bytes, model_and_tokenizer, run_small, small_config, small_tasks


def trained(method: str, count: int = 3, seed: int = 0, **options):
    """(adapters after `count` tasks, tokenizer, config), with what each adapter was when its task was done."""
    model, tokenizer = model_and_tokenizer(seed)
    config = small_config(method=method, policy="original", **options)
    adapters, kept = Adapters(model, config), []
    for index, task in enumerate(small_tasks(count), 1):
        adapters.add(index, derived_seed(config.seed, index, "init"))
        train_task(adapters, tokenizer, task, index, config)
        kept.append(weights(adapters, adapters.names[-1]))
    return adapters, tokenizer, kept


def weights(adapters: Adapters, name: str) -> dict[str, torch.Tensor]:
    found = get_peft_model_state_dict(adapters.model, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.clone() for key, tensor in found.items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", ["lora-inc", "o-lora"])
def test_earlier_adapters_and_the_base_keep_their_bytes(method):
    adapters, _, kept = trained(method)
    assert adapters.names == ["task0001", "task0002", "task0003"]
    assert adapters.model.active_adapters == ["task0003", "task0001", "task0002"]
    trainable = [name for name, parameter in adapters.model.named_parameters() if parameter.requires_grad]
    assert trainable and all("task0003" in name for name in trainable)
    for name, before in zip(adapters.names, kept, strict=True):
        assert same(weights(adapters, name), before)
        # Each of them has learned something: B begins as zeros.
        assert any(bool(tensor.any()) for key, tensor in before.items() if "lora_B" in key)
    fresh, _ = model_and_tokenizer()
    base = adapters.model.unload().state_dict()
    assert same(base, fresh.state_dict())


def test_one_lora_is_trained_on():
    adapters, _, kept = trained("seq-lora")
    assert adapters.names == ["task0001"]
    assert not same(kept[0], kept[1]) and not same(kept[1], kept[2])


def naive_overlap(adapters: Adapters, new: str, old: list[str]) -> torch.Tensor:
    """From the saved form of the adapters, without PEFT's modules."""
    total = torch.zeros((), dtype=torch.float64)
    newest = weights(adapters, new)
    for other in old:
        for key, tensor in weights(adapters, other).items():
            if "lora_A" in key:
                for row in tensor.double():
                    for column in newest[key].double():
                        total += abs(row @ column)
    return total


def test_penalty_equals_a_direct_computation_and_reaches_only_the_new_a():
    adapters, _, _ = trained("o-lora", lambda_1=0.25)
    adapters.model.zero_grad(set_to_none=True)
    expected = naive_overlap(adapters, "task0003", ["task0001", "task0002"])
    found = orthogonality(adapters.model, "task0003", ["task0001", "task0002"])
    assert abs(float(found.detach()) - float(expected)) <= 1e-5 * float(expected) and float(expected) > 0
    penalty = adapters.penalty()
    assert abs(float(penalty.detach()) - 0.25 * float(expected)) <= 1e-5 * float(expected)
    penalty.backward()
    reached = {name for name, parameter in adapters.model.named_parameters() if parameter.grad is not None}
    wanted = {name for name, _ in adapters.model.named_parameters() if "lora_A.task0003" in name}
    assert reached == wanted and len(wanted) == 4
    # d|x| / dx is the sign: the gradient of A_new is the sum over old of sign(A_old A_new^T)^T A_old.
    for layer in adapters.model.modules():
        if hasattr(layer, "lora_A") and "task0003" in layer.lora_A:
            new = layer.lora_A["task0003"].weight
            direct = sum(
                torch.sign(layer.lora_A[old].weight @ new.T).T @ layer.lora_A[old].weight
                for old in ("task0001", "task0002")
            )
            assert torch.allclose(new.grad, 0.25 * direct, atol=1e-6)


def test_the_penalty_makes_adapters_more_orthogonal_and_is_apart_from_the_loss():
    plain, _, _ = trained("lora-inc", count=2, max_steps=12)
    pushed, _, _ = trained("o-lora", count=2, max_steps=12, lambda_1=5.0)
    overlap = [float(orthogonality(one.model, "task0002", ["task0001"]).detach()) for one in (plain, pushed)]
    assert overlap[1] < 0.7 * overlap[0]
    assert same(weights(plain, "task0001"), weights(pushed, "task0001"))
    # No weight, no difference: the same bytes.
    none, _, _ = trained("o-lora", count=2, max_steps=12, lambda_1=0.0)
    assert same(weights(plain, "task0002"), weights(none, "task0002"))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_has_the_penalty_once_however_many_batches_it_has(accumulation, monkeypatch):
    """The gradient of one step is that of loss + penalty, taken directly from the summed objective."""
    model, tokenizer = model_and_tokenizer()
    config = small_config(
        method="o-lora", policy="original", lora_dropout=0.0, max_steps=1, logging_steps=1, max_grad_norm=0.0,
        gradient_accumulation=accumulation, learning_rate=1.0, warmup=0.0,
    )  # fmt: skip
    seen = {}

    def record(optimizer, *args, **kwargs):
        for group in optimizer.param_groups:
            seen.update({id(parameter): parameter.grad.clone() for parameter in group["params"]})

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    adapters = Adapters(model, config)
    first, second = small_tasks(2)
    adapters.add(1, 1)
    adapters.add(2, 2)
    found = train_task(adapters, tokenizer, second, 2, config)
    by_name = {name: seen[id(p)] for name, p in adapters.model.named_parameters() if id(p) in seen}
    assert len(found.train.losses) == len(found.train.penalties) == 1
    assert abs(found.train.penalties[0][1] - float(adapters.penalty())) < 1e-4

    adapters.model.zero_grad(set_to_none=True)
    adapters.model.train()
    objective = _mean_loss(adapters.model, tokenizer, second, found, accumulation) + adapters.penalty()
    objective.backward()
    for name, parameter in adapters.model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, by_name[name], atol=1e-5), name


def _mean_loss(model, tokenizer, task, found, accumulation):
    """Mean over response tokens of the rows that the one step saw: those whose loss is what was reported."""
    cache = ResponseCache.build(tokenizer, [task.pool.prompts[0]], task.train, suffix=task.pool.suffix)
    sums, counts = [], []
    for context, response in zip(cache.contexts[0], cache.responses[0], strict=True):
        ids = torch.tensor([context + response])
        logits = model(input_ids=ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        sums.append(-logits.gather(1, torch.tensor(response)[:, None]).sum())
        counts.append(len(response))
    for rows in itertools.combinations(range(len(counts)), 2 * accumulation):
        mean = sum(sums[m] for m in rows) / sum(counts[m] for m in rows)
        if abs(float(mean) - found.train.losses[0][1]) < 1e-6:
            return mean
    raise AssertionError("no set of rows has the loss that was reported")


def test_merging_all_adapters_gives_the_logits_of_running_them_together():
    adapters, tokenizer, _ = trained("lora-inc")
    model = adapters.model.eval()
    ids = tokenizer("red xx7 and white, then some more text", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        together = model(input_ids=ids).logits
        alone = copy.deepcopy(model)
        alone.base_model.set_adapter(["task0003"], inference_mode=True)
        assert float((alone(input_ids=ids).logits - together).abs().max()) > 1e-2
        merged = model.merge_and_unload(adapter_names=adapters.order)
        assert float((merged(input_ids=ids).logits - together).abs().max()) <= 1e-4


def test_all_linear_layers_get_every_tasks_adapter(tmp_path):
    adapters, _, kept = trained("lora-inc", count=2, target_modules="all-linear", max_steps=1)
    assert kept[0].keys() == kept[1].keys() and {key.split(".")[-3] for key in kept[1]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # fmt: skip
    # The same bytes from every process: PEFT has a set of names.
    adapters.save(tmp_path, {"tasks": {}})
    names = read_json(tmp_path / "adapter_config.json")["target_modules"]
    assert names == sorted(names) and len(names) == 14


@pytest.mark.parametrize("method", ["lora-inc", "seq-lora"])
def test_a_finished_run_is_loaded_onto_a_base_model(tmp_path, method, caplog):
    result = run_small(tmp_path, method=method)
    base, tokenizer = model_and_tokenizer()
    loaded = load_adapters(base, tmp_path)
    assert len(loaded.active_adapters) == (2 if method == "lora-inc" else 1) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    # The loss of the last evaluation, by this model.
    task = small_tasks(2)[0]
    scores = score_prompts(loaded, [task.pool.prompts[result.choices[0]["index"]]], task.test, tokenizer=tokenizer,
                           suffix=task.pool.suffix)  # fmt: skip
    assert float(scores.loss[0]) == result.matrix("loss")[2][0]
    assert "base model" not in caplog.text
    load_adapters(model_and_tokenizer(seed=1)[0], tmp_path)
    assert "the base model is not the one that the run began with" in caplog.text


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, monkeypatch):
    """What the manifest would find first: of another adapter they are found without it."""
    monkeypatch.setattr("sapo_peft.sequence.folder.check_manifest", lambda *args, **options: None)
    run_small(tmp_path, max_steps=1, generate=False)
    file = next(tmp_path.glob("tasks/02*/adapter/*.safetensors"))
    tensors = load_file(file)
    key = sorted(tensors)[0]
    others = {name: tensor for name, tensor in tensors.items() if name != key}
    for changed, words in (
        ({**others, key: tensors[key][:1].clone()}, rf"{key}: expected shape \[4, 48\], got \[1, 48\]"),
        (others, rf"{key}: expected shape \[4, 48\], got None"),
        ({**tensors, "more": tensors[key].clone()}, r"more: expected shape None, got \[4, 48\]"),
        ({**others, key: tensors[key].log()}, f"{key}: expected finite numbers"),
        (None, "expected the weights of an adapter"),
    ):
        save_file(changed, file) if changed else file.write_bytes(file.read_bytes()[:100])
        model, _ = model_and_tokenizer()
        with pytest.raises(DataError, match=words):
            load_adapters(model, tmp_path)
        assert not hasattr(model, "peft_config") and not any("lora" in name for name, _ in model.named_modules())


def test_a_model_that_is_handed_over_is_left_as_it_was(tmp_path):
    model, tokenizer = model_and_tokenizer()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    configs = model.config.to_dict(), model.generation_config.to_dict()
    first = run_small(None, model=(model, tokenizer), count=1)
    assert not hasattr(model, "peft_config")
    assert (model.config.to_dict(), model.generation_config.to_dict()) == configs
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (tensor, flag) in before.items():
        assert torch.equal(after[name], tensor) and after[name].requires_grad == flag
    # Hence the next run finds the same.
    assert run_small(None, model=(model, tokenizer), count=1).metrics == first.metrics
    adapters = Adapters(model, small_config())
    adapters.add(1, 0)
    with pytest.raises(ValueError, match="without adapters"):
        run_small(None, model=(adapters.model, tokenizer), count=1)


def test_policies_are_paired(tmp_path):
    """Other prompts, the same initial adapters and order of examples: with one prompt all policies are the same run."""
    tasks = small_tasks(1, prompts=1)
    runs = {}
    for policy in ("original", "sapo", "worst", "sample"):
        folder = tmp_path / policy
        run_small(folder, tasks=tasks, policy=policy, generate=False, max_steps=2)
        runs[policy] = adapter_bytes(folder)
    assert len({str(found) for found in runs.values()}) == 1, runs


def test_recomputed_activations_give_the_same_adapter(tmp_path):
    for name, options in (("plain", {}), ("again", {"gradient_checkpointing": True})):
        pair = model_and_tokenizer()
        run_small(
            tmp_path / name, model=pair, policy="original", lora_dropout=0.0, generate=False, max_steps=2, **options
        )
        # The trainer of each task switches recomputation on and puts a hook on the embeddings.
        assert not any(getattr(module, "gradient_checkpointing", False) for module in pair[0].modules())
        assert not any(module._forward_hooks for module in pair[0].modules())
    one, other = (load_file(tmp_path / name / "tasks/01-colours1/adapter" / WEIGHTS) for name in ("plain", "again"))
    assert one.keys() == other.keys() and any(bool(one[key].any()) for key in one if "lora_B" in key)
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
