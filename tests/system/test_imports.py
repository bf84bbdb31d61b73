"""What may import what, what may not be called at all, and that torch and numpy are enough."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sapo_kernels
import sapo_peft

# The packages that are imported here: the checkout's, or those that were installed from a wheel.
ROOT = Path(sapo_kernels.__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "sapo_kernels").rglob("*.py"))
SOURCES = KERNELS + sorted(Path(sapo_peft.__file__).resolve().parent.rglob("*.py"))
BACKEND_NAMES = {"reference", "sdpa", "torch", "triton"}


def fresh_python(code: str) -> str:
    """What `code` prints in a new process without this suite's environment; an error there fails the test."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_and_numpy_are_enough():
    """Import, plan and compute with everything optional blocked, as on a machine that does not have it."""
    code = """
import sys
BLOCKED = {"transformers", "triton", "peft", "tqdm", "tokenizers", "accelerate", "safetensors", "jinja2"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import sapo_kernels as sk
public = [getattr(sk, name) for name in sk.__all__]
assert len(public) >= 8 and not BLOCKED & {name.partition(".")[0] for name in sys.modules}, sys.modules.keys()
import torch
trie = sk.plan_trie([1, 2, 3, 1, 2, 4], [0, 3, 6], [1, 1])
q = torch.ones(2, 1, 16)
# A missing package is not found; it does not raise.
Blocker.find_spec = lambda self, name, path=None, target=None: None
sys.modules.update(dict.fromkeys(BLOCKED))
print(sk.tree_attention(q, q, q, trie).sum().item(), len(trie))
print(sk.linear_logprob(q[:, 0], q[:1, 0], torch.tensor([0, 0]))[0].tolist())
print(sk.ResponseCache.from_token_ids([[[1, 2]]], [[3]]))
"""
    assert fresh_python(code).splitlines() == [
        "32.0 2",
        "[0.0, 0.0]",
        "ResponseCache(1 prompts x 1 examples, 3 tokens)",
    ]


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import in a file, also inside functions."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def test_imports_go_one_way_and_backends_do_not_import_each_other():
    wrong, backends = [], 0
    for path in KERNELS:
        others = {"sapo_peft", "python", "benchmarks", "tests", "peft"}
        op = path.parent.name
        own = f"sapo_kernels.{op}.{path.stem}"
        backend = op in ("tree_attention", "linear_logprob", "accumulate", "reweight") and path.stem in BACKEND_NAMES
        backends += backend
        for line, name in imported(path):
            another = name.startswith("sapo_kernels.") and BACKEND_NAMES & set(name.split("."))
            if name.partition(".")[0] in others or (backend and another and not name.startswith(own)):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert backends >= 10 and not wrong, wrong


BANNED_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def faults(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, what) of every construct that could run or unpack what somebody else wrote."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [(node.lineno, f"import {n}") for n in names if n.partition(".")[0] in BANNED_IMPORTS]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "compile", "builtins.eval", "builtins.exec", "os.system", "os.popen"):
            found.append((node.lineno, called))
        if called in ("torch.load", "torch.package", "numpy.load", "np.load"):
            found.append((node.lineno, called))
        for keyword in node.keywords:
            on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and on:
                found.append((node.lineno, f"{called}({keyword.arg}=...)"))
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "format_map"):
            on = node.func.value
            if not (isinstance(on, ast.Constant) and isinstance(on.value, str)):
                found.append((node.lineno, f"{called}() on text that is not a literal"))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_dangerous_is_called(path):
    found = faults(ast.parse(path.read_text(encoding="utf-8")))
    if path.parent.name == "bundled":
        # The generators of the bundled data fill lists of templates that stand in the same file.
        found = [(line, what) for line, what in found if not what.endswith("not a literal")]
    assert not found, [f"{path.name}:{line}: {what}" for line, what in found]


FOUND = [
    "import pickle", "from dill import loads", "def f():\n    import pickle as p", "torch.load(p, weights_only=True)",
    "eval(text)", "exec(text)", "os.system(text)", "subprocess.run(text, shell=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=given)", "np.load(path, allow_pickle=True)",
    "open(path).read().format(prompt)", "template.format_map(values)",
]  # fmt: skip
PASSED = ["model.eval()", "'{}'.format(1)", "re.compile(x)", "f(trust_remote_code=False)", "safetensors.torch.load(b)"]


@pytest.mark.parametrize("code", FOUND + PASSED)
def test_the_scan_sees_what_it_looks_for_and_leaves_the_rest_alone(code):
    assert bool(faults(ast.parse(code))) == (code in FOUND)
