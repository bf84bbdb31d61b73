"""Compile the native modules with ninja; `setup.py` calls this, and so does whoever wants another build of them.

    python csrc/build_native.py DIR     # SAPO_BUILD_CUDA and SAPO_CUDA_ARCHS say what, as in setup.py

``_C`` (CPU) and ``_C_cuda`` use LibTorch's stable ABI only: one binary for every torch from 2.10 on and every
Python. They are no Python modules; `sapo_kernels/native.py` loads them. ``_planner`` is a pybind11 module without
torch. nvcc is called directly because torch's own extension builder refuses to build CUDA code with a CPU torch.

Objects are kept in a build folder, so a second build compiles what changed. A linked module appears under its own name
only when it is whole, and the build folder's lock belongs to the process: nothing is left of a build that was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
PACKAGE = SOURCES.parent / "sapo_kernels"
# The stable ABI that the code may use (2.10), whatever torch compiles it.
TORCH_TARGET = "0x020a000000000000"
# sm_80 code runs on 8.x, sm_90 code on 9.x; later ones compile the PTX when they load it.
DEFAULT_ARCHS = "80;90+PTX"


class BuildError(RuntimeError):
    """What could not be built, why, and what to do about it."""


@dataclass
class Options:
    """What to build and how.

    cuda: "auto" builds ``_C_cuda`` where nvcc is, "on" fails without it. archs: compute capabilities, "+PTX" on the
    last one for those to come. sanitize: AddressSanitizer and UndefinedBehaviorSanitizer, for tests.
    """

    cuda: str = field(default_factory=lambda: os.environ.get("SAPO_BUILD_CUDA", "auto"))
    archs: str = field(default_factory=lambda: os.environ.get("SAPO_CUDA_ARCHS", "") or DEFAULT_ARCHS)
    sanitize: bool = False

    def __post_init__(self):
        if self.cuda not in ("auto", "on", "off"):
            raise BuildError(f"SAPO_BUILD_CUDA: expected auto, on or off, got {self.cuda!r}")
        if not re.fullmatch(r"\d{2,3}[af]?(;\d{2,3}[af]?)*(\+PTX)?", self.archs):
            raise BuildError(f"SAPO_CUDA_ARCHS: expected numbers like {DEFAULT_ARCHS!r}, got {self.archs!r}")
        if self.cuda == "on" and nvcc() is None:
            raise BuildError("SAPO_BUILD_CUDA=on: expected nvcc on the PATH or in CUDA_HOME/bin, got none")

    @property
    def builds_cuda(self) -> bool:
        return self.cuda != "off" and nvcc() is not None and not self.sanitize


def abi() -> int:
    """The interface number in the file names, from `sapo_kernels/native.py` (read, not imported: no torch needed)."""
    return int(re.search(r"^ABI = (\d+)$", (PACKAGE / "native.py").read_text(), re.MULTILINE)[1])


def file_name(module: str) -> str:
    """The file that `module` (``_C``, ``_C_cuda`` or ``_planner``) is built into."""
    if module == "_planner":
        return module + sysconfig.get_config_var("EXT_SUFFIX")
    return f"{module}.abi{abi()}.so"


def nvcc() -> str | None:
    """The CUDA compiler: CUDA_HOME's, else the one on the PATH."""
    home = os.environ.get("CUDA_HOME", "")
    return (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")


def modules(options: Options) -> list[str]:
    """The modules that `options` ask for."""
    return ["_C", "_planner", *(["_C_cuda"] if options.builds_cuda else [])]


def gencode(archs: str) -> list[str]:
    """nvcc's flags for ``"80;90+PTX"``: machine code for each, and PTX for the last one."""
    names = archs.removesuffix("+PTX").split(";")
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    if archs.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}")
    return flags


def build(folder: Path, options: Options | None = None, wanted: list[str] | None = None) -> dict[str, Path]:
    """Build `wanted` modules (default: all that `options` ask for) in `folder`; returns where each stands."""
    options = options or Options()
    wanted = modules(options) if wanted is None else wanted
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        (folder / "build.ninja").write_text(_ninja_file(options, wanted))
        done = subprocess.run(
            [_ninja(), "-C", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[lock],
        )
    if done.returncode:
        raise BuildError(
            f"the native modules {', '.join(wanted)} could not be compiled; SAPO_BUILD_NATIVE=off installs without "
            f"them (same results, slower), SAPO_BUILD_CUDA=off without the CUDA one.\n{done.stdout[-8000:]}"
        )
    return {name: folder / file_name(name) for name in wanted}


def install(source: Path, target: Path) -> None:
    """Copy a built module to its place; a reader of `target` sees the old file or the new one, never a part."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(source, "rb") as reader, open(part, "wb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())
        shutil.copymode(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path):
    """One build in `folder` at a time, after that of another process; yields the lock's descriptor.

    The kernel drops the lock with the last process that has it, however that ends: compilers that outlive a killed
    builder still hold it.
    """
    import fcntl

    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def _ninja() -> str:
    # The one beside this Python first: pip puts it there, and the environment may not be activated.
    found = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    if found is None:
        raise BuildError("expected ninja on the PATH (pip install ninja), got none")
    return found


def _ninja_file(options: Options, wanted: list[str]) -> str:
    cxx = os.environ.get("CXX", "g++")
    # No fused multiply-add: what overflows or cancels does so as in plain torch. __FILE__ must not name this machine.
    common = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    common += [f"-DSAPO_ABI={abi()}", f"-ffile-prefix-map={SOURCES}=csrc"]
    if options.sanitize:
        checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        common += ["-O1", "-g", *checks]
    else:
        common += ["-O3", "-g0"]
    rules = [
        f"cxx = {cxx}",
        f"common = {shlex.join(common)}",
        "rule compile\n  command = $cxx $common $flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $linker -shared -o $out.part $in $libraries && mv -f $out.part $out",
    ]
    linker = "$cxx" + (" -fsanitize=address,undefined" if options.sanitize else "")
    lines: list[str] = []

    def target(module: str, sources: list[str], flags: list[str], libraries: list[str], link: str = linker) -> None:
        objects = []
        for source in sources:
            objects.append(f"{module}/{source.replace('/', '_')}.o")
            rule = "nvcc" if source.endswith(".cu") else "compile"
            lines.append(f"build {objects[-1]}: {rule} {_escaped(SOURCES / source)}\n  flags = {shlex.join(flags)}")
        lines.append(
            f"build {file_name(module)}: link {' '.join(objects)}\n"
            f"  linker = {link}\n  libraries = {shlex.join(libraries)}"
        )

    if "_planner" in wanted:
        import pybind11

        include = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        target("_planner", ["bindings.cpp", "passes.cpp", "trie.cpp"], include, [])
    if {"_C", "_C_cuda"} & set(wanted):
        stable, torch_libraries = _torch()
    if "_C" in wanted:
        target("_C", ["ops.cpp", "accumulate.cpp", "reweight.cpp"], stable, torch_libraries)
    if "_C_cuda" in wanted:
        compiler = nvcc()
        device = [
            f'-DSAPO_CUDA_ARCHS="{options.archs}"',
            "-std=c++17",
            "-O3",
            "--fmad=false",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *gencode(options.archs),
        ]
        rules.append(f"nvcc = {shlex.quote(compiler)}")
        rules.append(
            f"rule nvcc\n  command = $nvcc {shlex.join(device)} -MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc"
        )
        sources = ["cuda/ops.cpp", "cuda/device.cu", "cuda/accumulate.cu", "cuda/reweight.cu"]
        link = f"{shlex.quote(compiler)} -cudart=static -nodlink"
        # Nothing to link on the device; that step would only write this command into the module. nvcc hands flags on
        # to the linker behind -Xlinker.
        libraries = [flag.replace("-Wl,", "-Xlinker=") for flag in torch_libraries]
        target("_C_cuda", sources, stable, [*libraries, "-ldl"], link)
    return "\n".join([*rules, *lines, ""])


def _torch() -> tuple[list[str], list[str]]:
    """(compiler flags, linker flags) for LibTorch's stable ABI.

    The libraries are named although nothing of theirs is missing at link time: torch loads them privately, and without
    the entry in the object's own list of needed libraries its symbols would not be found. A source file that the lists
    above leave out is an error here, and not first where the module is loaded.
    """
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise BuildError(f"expected torch to compile against, got {error}; install it first") from None
    flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(f"-isystem{path}" for path in include_paths())]
    flags += [f"-ffile-prefix-map={path}=torch" for path in include_paths()]
    libraries = [*(f"-L{path}" for path in library_paths()), "-Wl,-z,defs,--no-as-needed", "-ltorch_cpu", "-lc10"]
    if torch.version.hip:
        raise BuildError("the native modules have no ROCm kernels: set SAPO_BUILD_NATIVE=off")
    return flags, libraries


def _escaped(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for objects and modules")
    try:
        for path in build(parser.parse_args().folder).values():
            print(path)
    except BuildError as error:
        sys.exit(f"csrc/build_native.py: {error}")


if __name__ == "__main__":
    main()
