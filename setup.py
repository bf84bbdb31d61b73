"""Two import packages in one distribution, sapo_kernels (this folder) and sapo_peft (python/), and the native modules.

SAPO_BUILD_NATIVE=on|off, SAPO_BUILD_CUDA=auto|on|off and SAPO_CUDA_ARCHS decide what csrc/build_native.py compiles.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build_native as native  # noqa: E402


class BuildNative(build_ext):
    """setuptools' command with `csrc/build_native.py` as the compiler and whole files only at their places."""

    def build_extensions(self):
        names = [ext.name.rpartition(".")[2] for ext in self.extensions]
        built = native.build(Path(self.build_temp) / "native", wanted=names)
        for ext, name in zip(self.extensions, names):  # noqa: B905 (names are made of extensions)
            native.install(built[name], Path(self.get_ext_fullpath(ext.name)))

    def get_ext_filename(self, fullname):
        package, _, name = fullname.rpartition(".")
        return os.path.join(*package.split("."), native.file_name(name)) if package else native.file_name(name)

    def copy_extensions_to_source(self):
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            native.install(built, ROOT / self.get_ext_filename(ext.name))


class CopyPackages(build_py):
    """setuptools' command, which also removes modules of an earlier build that are not wanted now.

    They would be packed, or loaded from an editable installation, as if they had been asked for.
    """

    def run(self):
        super().run()
        wanted = {native.file_name(ext.name.rpartition(".")[2]) for ext in self.distribution.ext_modules or []}
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        for pattern in ("_C*.so", "_planner*.so"):
            for path in (folder / "sapo_kernels").glob(pattern):
                if path.name not in wanted:
                    path.unlink()


def extensions():
    wanted = os.environ.get("SAPO_BUILD_NATIVE") or ("on" if sys.platform == "linux" else "off")
    if wanted not in ("on", "off"):
        sys.exit(f"SAPO_BUILD_NATIVE: expected on or off, got {wanted!r}")
    if wanted == "off":
        return []
    try:
        return [Extension(f"sapo_kernels.{name}", sources=[]) for name in native.modules(native.Options())]
    except native.BuildError as error:
        sys.exit(f"sapo-kernels: {error}")


setup(
    packages=[*find_packages(include=["sapo_kernels*"]), *find_packages("python")],
    package_dir={"sapo_peft": "python/sapo_peft"},
    package_data={"sapo_kernels": ["py.typed"], "sapo_peft": ["py.typed", "assets/**/*", "report/templates/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "build_py": CopyPackages},
    zip_safe=False,
)
