"""Two import packages in one distribution: sapo_kernels (this folder) and sapo_peft (python/)."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sapo_kernels*"]), *find_packages("python")],
    package_dir={"sapo_peft": "python/sapo_peft"},
    package_data={"sapo_kernels": ["py.typed"], "sapo_peft": ["py.typed", "bundled/**/*.json"]},
    zip_safe=False,
)
