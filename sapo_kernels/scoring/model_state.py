"""What holds around one scoring job and is undone after it, also after an exception or Ctrl-C."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable

import torch
from torch import nn

from .model_support import quantises_at_once

BUSY = "this model is being scored by another thread; it cannot be used until that ends"


class Unrecoverable(RuntimeError):
    """An error that another way to score would not mend."""


_lock = threading.Lock()
_claimed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_eager = {"threads": 0, "stance": None}


@contextlib.contextmanager
def claimed(inner: nn.Module):
    """This thread alone scores the model for the block: two would switch its attention and read each other's rows."""
    with _lock:
        if inner in _claimed:
            raise Unrecoverable(BUSY)
        _claimed.add(inner)
    try:
        yield
    finally:
        with _lock:
            _claimed.discard(inner)


@contextlib.contextmanager
def only_this_thread(inner: nn.Module):
    """A forward of another thread raises during the block, instead of computing in another mode than it expects."""
    thread = threading.get_ident()

    def guard(module, args):
        if threading.get_ident() != thread:
            raise Unrecoverable(BUSY)

    handle = inner.register_forward_pre_hook(guard, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def compilation_off():
    """A compiled model would compile once more for the trie's shapes.

    The switch is the process's own, so the first thread turns it and the last one turns it back.
    """
    with _lock:
        if not _eager["threads"]:
            _eager["stance"] = torch.compiler.set_stance("force_eager")
        _eager["threads"] += 1
    try:
        yield
    finally:
        with _lock:
            _eager["threads"] -= 1
            if not _eager["threads"]:
                _eager["stance"].__exit__(None, None, None)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module):
    """Evaluation mode for the block; every module's own mode comes back.

    Module by module: ``model.train(was)`` would put frozen or deliberately evaluating submodules into training.
    """
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def scoring_mode(model: nn.Module):
    """Evaluation mode and no gradients for the block."""
    with evaluation_mode(model), torch.no_grad():
        yield


@contextlib.contextmanager
def forwards_undone(inner: nn.Module):
    """What forwards leave in a model is as it is now: yields a function that puts it back, and does so after the block.

    Rotary tables of type "dynamic" grow with the longest sequence the model has seen, observers of a quantisation go on
    observing: a score must neither depend on what was scored before it nor change what the model computes afterwards.
    """
    grows = lambda module: any(name.endswith("max_seq_len_cached") for name in vars(module))
    with state_kept([m for m in inner.modules() if grows(m) or quantises_at_once(m)]) as put_back:
        yield put_back


@contextlib.contextmanager
def state_kept(modules: Iterable[nn.Module], most: float = float("inf")):
    """The same for whatever the modules keep in public attributes, and in buffers of at most `most` elements."""
    kept = []
    for module in modules:
        values = {
            name: (value, dict(value) if type(value) is dict else None)
            for name, value in vars(module).items()
            if not name.startswith("_")
        }
        buffers = {
            name: (buffer, buffer.clone())
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.numel() <= most
        }
        kept.append((module, values, buffers))

    @torch.no_grad()
    def put_back():
        for module, values, buffers in kept:
            # A forward may add some of them.
            for name in [n for n in vars(module) if not n.startswith("_") and n not in values]:
                delattr(module, name)
            for name, (value, items) in values.items():
                vars(module)[name] = value
                if items is not None:
                    value.clear()
                    value.update(items)
            for name, (buffer, value) in buffers.items():
                # A graph that waits for its backward pass may hold it: written to only where it was changed.
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.resize_(value.shape).copy_(value)
                module._buffers[name] = buffer

    try:
        yield put_back
    finally:
        put_back()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
