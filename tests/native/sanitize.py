"""Build the native modules with AddressSanitizer and UndefinedBehaviorSanitizer and run their tests on them.

    python -m tests.native.sanitize

Everything happens in a temporary copy of the package and the tests; the checkout is only read. First, a planted read
beyond a tensor has to be reported, so that silence means something. Leaks are not looked for: Python and torch keep
memory until the end of the process, and that would drown ours. Exits with 1, and the report, if anything was found.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

import build_native  # noqa: E402

from tests.native import NATIVE_TESTS, run  # noqa: E402

REPORT = re.compile(
    r"ERROR: AddressSanitizer|runtime error:|SUMMARY: (Address|UndefinedBehavior)Sanitizer|DEADLYSIGNAL"
)
# A library that reads one element beyond what it is given: what a fault in csrc would look like, in the same process.
OVERREAD = 'extern "C" double read(const double* values, long at) { return values[at]; }'
OVERREAD_RUN = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.read.restype = ctypes.c_double
library.read.argtypes = [ctypes.c_void_p, ctypes.c_long]
values = torch.zeros(5, dtype=torch.float64)
assert library.read(values.data_ptr(), 4) == 0
print("awake", flush=True)
library.read(values.data_ptr(), 5)
"""
# Other processes, tracing of Python, and sizes that take minutes here and show nothing that small ones do not.
LEFT_OUT = "not opcheck and not compiles_without and not deep_tries and not less_than and not under_compile"


def runtime(name: str) -> str | None:
    """The compiler's own copy of a runtime library; None if it has none of its own."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return str(Path(found).resolve()) if os.path.isabs(found) else None


def environment() -> dict[str, str]:
    # libstdc++ first among the others: else ASan does not find the real __cxa_throw, because Python is no C++ program.
    libraries = [runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    return {
        "LD_PRELOAD": " ".join(path for path in libraries if path),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:strict_string_checks=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",  # Python's own pools would hide what is beyond an object
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def sanitized(*command, cwd: Path) -> str:
    """What this Python prints with the sanitizers in it; `RuntimeError` if it fails."""
    return run(sys.executable, *command, cwd=cwd, minutes=20, **environment())


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sapo_sanitize_") as name:
        folder = Path(name).resolve()
        (folder / "planted.cpp").write_text(OVERREAD)
        flags = ["-g", "-fsanitize=address,undefined", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, folder / "planted.cpp", "-o", folder / "planted.so"], check=True)
        try:
            text = sanitized("-c", OVERREAD_RUN, folder / "planted.so", cwd=folder)
        except RuntimeError as error:
            text = str(error)
        if "awake" not in text or "heap-buffer-overflow" not in text:
            sys.exit(f"the sanitizers are asleep: a read beyond a tensor was not reported:\n{text[-3000:]}")

        for part in ("sapo_kernels", "tests", "benchmarks", "python"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        built = build_native.build(folder / "build", build_native.Options(sanitize=True))
        for path in built.values():
            build_native.install(path, folder / "sapo_kernels" / path.name)
        code = "from sapo_kernels import native; print(native.__file__, native.status())"
        text = sanitized("-c", code, cwd=folder)
        if str(folder) not in text or not all(f"'{module}': 'loaded'" in text for module in built):
            sys.exit(f"the sanitized modules are not the ones in use:\n{text[-3000:]}")

        tests = [f"tests/{test}" for test in NATIVE_TESTS]
        pytest = ("-m", "pytest", "-p", "no:cacheprovider", "--no-header", "-k", LEFT_OUT, "--durations=5")
        text = sanitized(*pytest, *tests, cwd=folder)
        if REPORT.search(text):
            sys.exit(f"FOUND something:\n{text[-15_000:]}")
    print(f"{text.splitlines()[-1]}; nothing found in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
