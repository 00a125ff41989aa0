"""Say where the two import packages lie and what each needs; the rest of the distribution is in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

# What soda_kernels needs; Triton only at the first launch on a GPU.
DEPENDENCIES = [
    "torch>=2.11",
    "numpy>=1.26",
    "triton>=3.6; sys_platform == 'linux'",
]

# torchvision is never among the dependencies: no package listed here may bring it.
EXTRAS = {
    # What soda_engine needs.
    "engine": [
        "datasets>=3.0",
        "huggingface_hub>=0.25",
        "kornia>=0.9",
        "matplotlib>=3.8",
        "pillow>=10.0",
        "pyarrow>=15.0",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        "threadpoolctl>=3.1",
        "torchmetrics>=1.4",
        "tqdm>=4.66",
        "tyro>=0.9",
    ],
    # The engine's own probes, PSNR and SSIM are enough today; torch-fidelity (FID) is left out, since it needs
    # torchvision.
    "eval": ["soda-engine[engine]"],
    "bench": ["matplotlib>=3.8", "nvtx>=0.2.10", "pytest>=8.2", "pytest-benchmark>=4.0"],
    "test": [
        "hypothesis>=6.100",
        "mypy>=1.11",
        "packaging>=24.0",
        "pytest>=8.2",
        "pytest-benchmark>=4.0",
        "ruff>=0.6",
        "scipy>=1.11",
        "setuptools>=77",
        "types-tqdm",
    ],
    "all": ["soda-engine[engine,eval,bench,test]"],
}

if __name__ == "__main__":
    setup(
        package_dir={"soda_kernels": "kernels/soda_kernels", "soda_engine": "engine/soda_engine"},
        packages=find_packages("kernels") + find_packages("engine"),
        install_requires=DEPENDENCIES,
        extras_require=EXTRAS,
        # The native CPU library, built by CMake, belongs here: ext_modules and its build_ext.
    )
