"""The adapters of a sequence: LoRAInc, O-LoRA and one LoRA trained on, through PEFT's public interface only."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sapo_kernels.files import DataError, excerpt, read_json, write_json
from sapo_kernels.manifest import write_manifest

from ..trainer.checkpoints import ADAPTER
from ..trainer.records import SAPO, write_beside_adapter
from .config import SequenceConfig
from .folder import Run, read_run, task_folder

logger = logging.getLogger("sapo_peft")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Adapters:
    """The LoRA adapters of a sequence on one base model; nothing is put onto the model before the first `add`.

    Attributes:
        model: the base model, a `PeftModel` around it after the first `add`.
        names: adapters in the order in which they were learned.
    """

    def __init__(self, base: Any, config: SequenceConfig):
        if hasattr(base, "peft_config"):
            raise ValueError(
                "model: expected one without adapters, got one that has some; merge them or unload them first"
            )
        self.base, self.model, self.config = base, base, config
        self.names: list[str] = []
        _check_modules(base, config.target_modules)
        self._flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
        self._training = base.training
        self._recomputes = _recomputes(base)
        # The trainer sets tokens to the tokenizer's, and switches the cache off.
        self._kept = [
            (config, name, getattr(config, name))
            for config in (base.config.get_text_config(), getattr(base, "generation_config", None))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
            if hasattr(config, name)
        ]

    @property
    def order(self) -> list[str]:
        """All adapters, the newest first: trainers and optimizers look at the first active one."""
        return self.names[::-1][:1] + self.names[:-1]

    def add(self, index: int, seed: int) -> None:
        """Make the trainable adapter of the `index`-th task (from 1), or keep the one there is, and activate all.

        `seed` alone decides its initial weights.
        """
        if self.config.method != "seq-lora" or not self.names:
            name = f"task{index:04d}"
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                if self.names:
                    self.model.add_adapter(name, self._lora())
                else:
                    from peft import get_peft_model

                    try:
                        self.model = get_peft_model(self.base, self._lora(), adapter_name=name)
                    except BaseException:
                        _unwrap(self.base)
                        raise
            self.names.append(name)
            if self.config.method == "o-lora":
                orthogonality(self.model, name, [])  # now, not when the second task is reached
        # All adapters active, the newest one trainable, everything else frozen.
        self.model.base_model.set_adapter(self.order, inference_mode=True)
        self.model.set_requires_grad(self.names[-1], True)

    def load(self, index: int, folder: str | os.PathLike) -> None:
        """The adapter that `save` wrote after the `index`-th task, in place of a new one.

        Raises:
            DataError: a tensor is missing, unexpected, of another shape or not finite.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        self.add(index, 0)
        file = Path(folder) / WEIGHTS
        try:
            stored = load_file(file)
        except Exception as error:
            raise DataError(f"{file}: expected the weights of an adapter, got {type(error).__name__}") from error
        present = get_peft_model_state_dict(self.model, adapter_name=self.names[-1], save_embedding_layers=False)
        expected, got = ({name: list(tensor.shape) for name, tensor in one.items()} for one in (present, stored))
        for name in sorted({*expected, *got}):
            if expected.get(name) != got.get(name):
                raise DataError(f"{file}: {name}: expected shape {expected.get(name)}, got {got.get(name)}")
            if not bool(stored[name].isfinite().all()):
                raise DataError(f"{file}: {name}: expected finite numbers, got NaN or infinity")
        set_peft_model_state_dict(self.model, stored, adapter_name=self.names[-1])

    def save(self, folder: str | os.PathLike, prompts: dict[str, Any]) -> None:
        """The newest adapter with its prompts and a manifest, in PEFT's layout, directly in `folder`."""
        folder, name = Path(folder), self.names[-1]
        self.model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        # PEFT puts an adapter with a name of its own one level deeper, where its loader does not look by itself.
        for file in list((folder / name).iterdir()):
            os.replace(file, folder / file.name)
        (folder / name).rmdir()
        # PEFT writes the modules as a set, in another order in every process.
        options = read_json(folder / CONFIG)
        if isinstance(options["target_modules"], list):
            options["target_modules"].sort()
        write_json(folder / CONFIG, options)
        # safetensors writes for the owner alone, whatever the umask says.
        os.chmod(folder / WEIGHTS, stat.S_IMODE(os.stat(folder / CONFIG).st_mode))
        note, earlier = "", len(self.names) - 1
        if earlier:
            prompts = {**prompts, "earlier": earlier}
            note = (f"The adapters of the {earlier} tasks before it are active beside it and are not in this folder: "
                    "`sapo export RUN --out DIR` makes one adapter of them all.")  # fmt: skip
        write_beside_adapter(folder, prompts, chooser(self.config.policy), note)
        write_manifest(folder, ADAPTER)

    def penalty(self) -> torch.Tensor | None:
        """``lambda_1 * orthogonality`` of the newest adapter, or None where there is nothing to be orthogonal to."""
        if self.config.method != "o-lora" or len(self.names) < 2 or self.config.lambda_1 == 0:
            return None
        return self.config.lambda_1 * orthogonality(self.model, self.names[-1], self.names[:-1])

    def settle(self) -> None:
        """Undo what a trainer that recomputes activations leaves on the base model, or the next one adds to it."""
        if self._recomputes or not _recomputes(self.base):
            return
        # A hook on the embeddings; the trainer of the next task would add another and lose hold of this one.
        if getattr(self.base, "_require_grads_hook", None) is not None:
            self.base.disable_input_require_grads()
        disable = getattr(self.base, "activation_checkpointing_disable", None)
        (disable or self.base.gradient_checkpointing_disable)()

    def remove(self) -> None:
        """Take the adapters off; the base model is as it was."""
        self.settle()
        if self.names:
            self.model.unload()
            self.names, self.model = [], self.base
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for config, name, value in self._kept:
            setattr(config, name, value)
        self.base.train(self._training)

    def _lora(self) -> Any:
        from peft import LoraConfig

        config = self.config
        modules = config.target_modules
        return LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, task_type="CAUSAL_LM",
            target_modules=modules if isinstance(modules, str) else list(modules),
        )  # fmt: skip


def chooser(policy: str) -> str:
    """What chose the prompt, for a model card."""
    return SAPO if policy == "sapo" else f"the policy {policy} of `sapo sequence`"


def fingerprint(model: Any) -> str:
    """Of shapes, dtypes and a few values of every weight: another base model is told, cheaply."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        few = parameter.detach().flatten()[:64].to("cpu", torch.float32)
        found.update(few.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _check_modules(base: Any, modules: str | Sequence[str]) -> None:
    """PEFT passes over a name that is nowhere as long as another one is somewhere."""
    for name in () if isinstance(modules, str) else modules:
        if not any(path and (path == name or path.endswith(f".{name}")) for path, _ in base.named_modules()):
            raise ValueError(f"target_modules: expected names of modules of {type(base).__name__}, got {excerpt(name)}")


def _unwrap(base: Any) -> None:
    """Take off what `get_peft_model` had put on before it failed."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in [*base.named_modules()]:
        if isinstance(module, BaseTunerLayer):
            parent, _, last = path.rpartition(".")
            setattr(base.get_submodule(parent), last, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config


def _recomputes(base: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def orthogonality(model: Any, new: str, old: Sequence[str]) -> torch.Tensor:
    """O-LoRA's overlap of an adapter with earlier ones: the sum over layers and `old` of ``|A_old A_new^T|``.

    Equals this naive code::

        sum(((A[i] @ A[new].T).abs().sum()) for each LoRA layer's A for i in old)

    Args:
        model: a `PeftModel` with LoRA adapters on linear layers; A is [r, in_features].
        new: the adapter that gets the gradient. old: earlier adapters; no gradient reaches them.

    Returns:
        A scalar, float32 or the adapters' wider dtype.

    Raises:
        ValueError: a layer with `new` that is no linear layer, or no layer with it.

    Source: Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning", equation 6.
    """
    from peft.tuners.lora import LoraLayer

    total, found = None, False
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if new in layer.lora_embedding_A or (new in layer.lora_A and layer.lora_A[new].weight.ndim != 2):
            raise ValueError(f"{name}: expected LoRA on linear layers only, got {type(layer).__name__}")
        if new not in layer.lora_A:
            continue
        found = True
        a_new = layer.lora_A[new].weight
        for other in old:
            if other in layer.lora_A:
                part = (layer.lora_A[other].weight.detach() @ a_new.T).abs().sum()
                total = part if total is None else total + part
    if not found:
        raise ValueError(f"adapter {new!r}: expected one with LoRA layers, got none")
    return torch.zeros(()) if total is None else total


def read_adapters(run_dir: str | os.PathLike) -> tuple[Run, SequenceConfig, list[Path]]:
    """(a run, its options, the folders of the adapters of the tasks that are done), checked.

    Raises: `DataError`: the folder is of no such run or is damaged, or no task is done.
    """
    if not (Path(run_dir) / "run.json").exists():
        raise DataError(f"{os.fspath(run_dir)}: expected the folder of a run, got one without run.json, or none")
    run = read_run(run_dir)
    try:
        config = SequenceConfig(**run.record.config)
    except (TypeError, ValueError) as error:
        raise DataError(f"{run.path / 'run.json'}: 'config': expected the options of a run, got: {error}") from error
    if not run.tasks:
        raise DataError(f"{run_dir}: expected a run with a finished task, got none")
    names = run.record.tasks[: len(run.tasks)]
    return run, config, [task_folder(run.path, i, name) / "adapter" for i, name in enumerate(names, 1)]


def load_adapters(model: Any, run_dir: str | os.PathLike) -> Any:
    """A `PeftModel` with the adapters of a sequence run on `model`, all active and frozen.

    Args:
        model: the base model that the run began with; the log warns about one whose weights are other ones.
        run_dir: its folder; of a run that is not done the tasks that are.

    Raises:
        DataError: the folder is of no such run or is damaged, no task is done, or an adapter does not fit the model,
            which is then as it was.
    """
    run, config, folders = read_adapters(run_dir)
    adapters = Adapters(model, config)
    if fingerprint(model) != run.record.data.get("base"):
        logger.warning("%s: the base model is not the one that the run began with, or has another dtype", run_dir)
    try:
        for index, folder in [*enumerate(folders, 1)][-1 if config.method == "seq-lora" else 0 :]:
            adapters.load(index, folder)
    except BaseException:
        adapters.remove()
        raise
    adapters.model.base_model.set_adapter(adapters.order, inference_mode=True)
    return adapters.model.eval()
