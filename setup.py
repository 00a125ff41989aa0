"""Say where the two import packages lie; everything static about the distribution is in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    package_dir={"soda_kernels": "kernels/soda_kernels", "soda_engine": "engine/soda_engine"},
    packages=find_packages("kernels") + find_packages("engine"),
    # The native CPU library, built by CMake, belongs here: ext_modules and its build_ext.
)
