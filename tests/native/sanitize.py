"""Build the native modules with AddressSanitizer and UndefinedBehaviorSanitizer, run their tests and the fuzzer.

    python -m tests.native.sanitize                # about three minutes
    python -m tests.native.sanitize --seconds 600  # a longer fuzz

Everything happens in a temporary copy of the package and the tests; the checkout is only read. First, planted faults (a
read beyond the heap, also beyond a tensor inside torch, a read of freed memory, a signed overflow) have to be reported,
so that silence means something. Leaks are not looked for: Python and torch keep memory until the end of the process,
and that would drown ours. The exit code is 1, with the report, if anything was found.
"""

from __future__ import annotations

import argparse
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

from tests.native import NATIVE_TESTS  # noqa: E402

FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
REPORT = re.compile(
    r"ERROR: AddressSanitizer|runtime error:|SUMMARY: (Address|UndefinedBehavior)Sanitizer|DEADLYSIGNAL"
)
# name: (source, a pattern of the report)
PLANTED = {
    "a read beyond the heap": (
        "int main(int n, char**) { long* a = new long[4](); volatile long v = a[3 + n]; delete[] a; return v & 0; }",
        "heap-buffer-overflow|insufficient space",
    ),
    "a read of freed memory": (
        "int main(int n, char**) { long* a = new long[4](); delete[] a; volatile long v = a[n]; return v & 0; }",
        "heap-use-after-free",
    ),
    "a signed overflow": (
        "int main(int n, char**) { int a = 2147483647; a += n; volatile int v = a; return v & 0; }",
        "signed integer overflow",
    ),
}
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
# Wall-clock promises, other processes, and sizes that take minutes here and show nothing that small ones do not.
LEFT_OUT = (
    "not without_the_module and not opcheck and not compiles_without and not deep_tries and not two_long_sequences "
    "and not other_threads_run and not less_than and not under_compile"
)


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
        **os.environ,
        "LD_PRELOAD": " ".join(path for path in libraries if path),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:strict_string_checks=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "SAPO_TESTS_QUICK": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",  # Python's own pools would hide what is beyond an object
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(command: list, **options) -> tuple[int, str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    done = subprocess.run(list(map(str, command)), **pipes, **options)
    return done.returncode, done.stdout


def prove_awake(folder: Path) -> None:
    """Planted faults are reported; raises SystemExit if one is not."""
    for name, (source, wanted) in PLANTED.items():
        (folder / "planted.cpp").write_text(source)
        code, text = run(["g++", *FLAGS, "-Wno-all", folder / "planted.cpp", "-o", folder / "planted"])
        if code:
            sys.exit(f"the planted fault does not compile:\n{text}")
        code, text = run([folder / "planted"], env={k: v for k, v in environment().items() if k != "LD_PRELOAD"})
        if code == 0 or not re.search(wanted, text):
            sys.exit(f"the sanitizers are asleep: {name} was not reported ({code}):\n{text[-3000:]}")
        print(f"planted, reported: {name}")
    (folder / "planted.cpp").write_text(OVERREAD)
    run(["g++", *FLAGS, "-shared", "-fPIC", folder / "planted.cpp", "-o", folder / "planted.so"])
    code, text = run([sys.executable, "-c", OVERREAD_RUN, folder / "planted.so"], env=environment())
    if code == 0 or "awake" not in text or "heap-buffer-overflow" not in text:
        sys.exit(
            f"the sanitizers are asleep in Python: a read beyond a tensor was not reported ({code}):\n{text[-3000:]}"
        )
    print("planted, reported: a read beyond a tensor inside torch")


def copy_with_sanitized_modules(folder: Path) -> list[str]:
    """The package, its tests and sanitized modules in `folder`; the modules' names."""
    wanted = ["_C", *(["_planner"] if (ROOT / "csrc" / "bindings.cpp").exists() else [])]
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.part")
    for name in ("sapo_kernels", "tests", "benchmarks", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    built = build_native.build(folder / "build", build_native.Options(sanitize=True), wanted)
    for path in built.values():
        build_native.install(path, folder / "sapo_kernels" / path.name)
    return wanted


def check_who_is_tested(folder: Path, modules: list[str]) -> None:
    code = "from sapo_kernels import native; print(native.__file__, native.status())"
    code, text = run([sys.executable, "-c", code], cwd=folder, env=environment())
    loaded = all(f"'{name}': 'loaded'" in text for name in modules)
    if code or str(folder) not in text or not loaded:
        sys.exit(f"the sanitized modules are not the ones in use:\n{text[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of fuzzing")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="sapo_sanitize_") as name:
        folder = Path(name).resolve()
        prove_awake(folder)
        modules = copy_with_sanitized_modules(folder)
        check_who_is_tested(folder, modules)
        print(f"built with sanitizers: {', '.join(modules)}, {time.monotonic() - started:.0f} s", flush=True)
        tests = [f"tests/{test}" for test in NATIVE_TESTS if (folder / "tests" / test).exists()]
        steps = {
            "tests": ["-m", "pytest", "-p", "no:cacheprovider", "--no-header", "-k", LEFT_OUT, "--durations=5", *tests],
            "fuzzer": ["-W", "ignore", "-m", "tests.native.fuzz_native"]
            + ["--seconds", args.seconds, "--seed", args.seed],
        }
        for step, command in steps.items():
            code, text = run([sys.executable, *command], cwd=folder, env=environment(), timeout=1200 + args.seconds)
            if code or REPORT.search(text):
                failed.append(step)
                print(f"{step}: exit code {code}\n{text[-15_000:]}")
            else:
                kept = [line for line in text.splitlines() if "passed" in line or "fuzzed" in line]
                print("\n".join(f"{step}: {line}" for line in kept), flush=True)
    took = time.monotonic() - started
    if failed:
        sys.exit(f"FOUND something in: {', '.join(failed)} ({took:.0f} s)")
    print(f"nothing found in {took:.0f} s")


if __name__ == "__main__":
    main()
