"""Install the package as users do, into a clean environment outside the checkout, and test what is installed there.

    python -m tests.native.installed

1. ``pip wheel . --no-deps`` with and without native modules, from a copy of the tracked files.
2. A clean virtual environment with the wheel *without* native modules: the tests of what they would do.
3. The same environment with the wheel that has them, outside the checkout: tests of what an installation can lose (the
   modules, files beside the code, entry points, imports).

Exits with 1 and says which part failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.native import NATIVE_TESTS, ROOT, run

# Not the packages themselves: what is imported must be what was installed. Tests compile some of csrc/ for themselves.
COPIED = ("tests", "tools", "benchmarks", "csrc", "examples", "docs", "README.md", "pyproject.toml")
# What an installation can lose: commands, examples, data and a model that ship, pages made of templates, both packages.
INSTALLED_TESTS = (
    "native/test_native.py", "system/test_imports.py", "system/test_examples.py", "data/test_bundled_data.py",
    "cli/test_main.py", "cli/test_demo.py", "report/test_report.py",
)  # fmt: skip
# As in the Makefile.
PYTEST = ("-m", "pytest", "-n", os.environ.get("WORKERS", "2"), "--dist", "loadfile")


def tracked_copy(folder: Path) -> Path:
    """The files that git would commit from this checkout: no build folder, no compiled module."""
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def wheel(source: Path, out: Path, native: str) -> Path:
    """Build the wheel and check what is in it."""
    out.mkdir()
    run(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", ".", "--no-deps",
        "--no-build-isolation", "-w", out, cwd=source, SAPO_BUILD_NATIVE=native,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    names = zipfile.ZipFile(built).namelist()
    modules = sorted(name for name in names if name.endswith(".so"))
    print(f"{built.name}: {built.stat().st_size / 1e6:.2f} MB, {len(names)} files, native: {modules}", flush=True)
    expected = 0 if native == "off" else 2 + bool(shutil.which("nvcc"))
    if len(modules) != expected or any(name.startswith(("csrc/", "tests/", "benchmarks/", "tools/")) for name in names):
        raise RuntimeError(f"{built.name}: expected {expected} native modules and the two packages only, got {names}")
    if (native == "off") != built.name.endswith("py3-none-any.whl"):
        raise RuntimeError(f"{built.name}: expected the tag of its contents")
    return built


def check_native(python: Path, folder: Path, loaded: bool) -> None:
    """The native modules must be in use there, or not, as said."""
    code = "import json; from sapo_kernels import native; print(json.dumps(native.status()))"
    status = json.loads(run(python, "-c", code, cwd=folder).splitlines()[-1])
    for module in ("_C", "_planner"):
        if (status[module] == "loaded") != loaded:
            raise RuntimeError(f"{module}: expected it {'loaded' if loaded else 'absent'}, got {status[module]!r}")


def main() -> None:
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="sapo-installed-") as scratch:
        folder = Path(scratch)
        source = tracked_copy(folder / "source")
        native = wheel(source, folder / "native", "on")
        # In the same folder: what the first build left there must not get into the second wheel.
        plain = wheel(source, folder / "plain", "off")
        outside = folder / "outside"
        outside.mkdir()
        for name in COPIED:
            (shutil.copytree if (source / name).is_dir() else shutil.copy2)(source / name, outside / name)
        python = folder / "venv" / "bin" / "python"
        run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        pip = ["-m", "pip", "--disable-pip-version-check", "install", "-q", "-c"]
        install = (python, *pip, ROOT / ".ci/constraints.txt")
        # torch first and by its pin, as in the Makefile.
        run(*install, "torch", "numpy", cwd=folder, minutes=15)
        run(*install, f"{plain}[train,dev]", cwd=folder, minutes=15)
        print("without native modules", flush=True)
        run(python, *PYTEST, *(f"tests/{name}" for name in NATIVE_TESTS), "tests/native/test_native.py", cwd=outside,
            minutes=15, shown=True)  # fmt: skip
        check_native(python, outside, loaded=False)
        run(*install, "--force-reinstall", "--no-deps", native, cwd=folder)
        check_native(python, outside, loaded=True)
        run(python, *PYTEST, *(f"tests/{name}" for name in INSTALLED_TESTS), cwd=outside, minutes=15, shown=True)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        sys.exit(f"tests.native.installed: {error}")
