"""Audit the compiled modules of this checkout: what they need of torch, how they load, and what nvcc makes of the CUDA
kernels; no GPU.

    python -m tests.native.native_audit

Exits with 1 and the reasons if a module needs a torch symbol that `tests/native/stable_symbols.txt` does not list or
any C++ symbol of torch, c10 or at; does not name libtorch_cpu among its needed libraries; names the folder it was built
in; does not load here; or if a CUDA kernel spills registers or uses a stack on sm_80 or sm_90.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

import build_native  # noqa: E402

from tests.native import run  # noqa: E402

ALLOWED = Path(__file__).with_name("stable_symbols.txt")
ARCHS = ("80", "90")


def needed_symbols(library: Path) -> list[str]:
    """Undefined symbols of a library, without those of libc, libstdc++ and libgcc (which carry a version)."""
    names = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", str(library)).splitlines()]
    return sorted(name for name in names if "@" not in name)


def audit(library: Path) -> list[str]:
    """Complaints about one stable-ABI library."""
    allowed = {line for line in ALLOWED.read_text().splitlines() if line and not line.startswith("#")}
    complaints = []
    torch_symbols = []
    for name in needed_symbols(library):
        plain = run("c++filt", name).strip()
        if re.search(r"\b(c10|at|torch|caffe2)::", plain):
            complaints.append(f"needs the C++ symbol {plain}")
        elif re.match(r"(aoti_)?torch_|c10_|at_", name):
            torch_symbols.append(name)
            if name not in allowed:
                complaints.append(f"needs {name}, which {ALLOWED.name} does not list")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", str(library)))
    if "libtorch_cpu.so" not in needed:
        complaints.append(f"does not name libtorch_cpu.so among its needed libraries {needed}")
    if str(ROOT).encode() in library.read_bytes():
        complaints.append("names the folder it was built in")
    if not torch_symbols:
        complaints.append("needs nothing of torch: this cannot be the library that was meant")
    print(f"{library.name}: {len(torch_symbols)} stable-ABI symbols, no C++ ones; needs {', '.join(needed)}")
    return [f"{library.name}: {complaint}" for complaint in complaints]


def cuda_kernels(folder: Path) -> list[str]:
    """Print registers, stack and spills of every CUDA kernel; complaints about stack and spills."""
    complaints, rows = [], 0
    for source in sorted((build_native.SOURCES / "cuda").glob("*.cu")):
        for arch in ARCHS:
            text = run(
                build_native.nvcc(), f'-DSAPO_CUDA_ARCHS="{arch}"',
                "-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin",
                "-o", str(folder / "kernel.cubin"), str(source),
            )  # fmt: skip
            for block in text.split("Compiling entry function '")[1:]:
                name = re.search(r"\w+_kernel(<\w+>)?", run("c++filt", block.partition("'")[0]))[0]
                found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
                used = f"{re.search(r'Used [0-9]+ registers', block)[0]}, {found[0]}"
                print(f"{name} on sm_{arch}: {used}")
                if any(map(int, found.groups())):
                    complaints.append(f"{name} on sm_{arch}: {used}")
                rows += 1
    return complaints if rows else ["no CUDA kernel was found in the compiler's output"]


def main() -> None:
    names = ["_C", "_C_cuda"] if build_native.nvcc() else ["_C"]
    complaints = []
    for name in names:
        library = build_native.PACKAGE / build_native.file_name(name)
        complaints += audit(library)
        run(sys.executable, "-c", f"import torch; torch.ops.load_library({str(library)!r})")
    if "_C_cuda" in names:
        with tempfile.TemporaryDirectory() as scratch:
            complaints += cuda_kernels(Path(scratch))
    if complaints:
        sys.exit("\n".join(complaints))
    print(f"native audit of {', '.join(names)}: nothing to complain about")


if __name__ == "__main__":
    main()
