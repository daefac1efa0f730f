"""Packaging of megarl. docs/evidence.md explains the pins ("Versions")."""

from setuptools import find_packages, setup

# Where figures go besides, by the setting `trackers`; mlflow's full package is its server's.
WANDB, MLFLOW = ["wandb>=0.19,<1"], ["mlflow-skinny>=3,<4"]
TOOLS = ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "selenium>=4.20,<5", "setuptools>=77", "uv"]

setup(
    name="megarl",
    version="0.1.0",
    description="Megatron-style reinforcement learning for reasoning models, from a laptop CPU to multi-node clusters",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megarl", "megarl.*", "checkpoints_conv", "checkpoints_conv.*"]),
    package_data={
        "megarl": [
            "py.typed",
            "report/*.html",
            "report/*.css",
            "report/*.js",
            "recipes/*.yaml",
            "config/*.yaml",
            "bench/*.jsonl",
        ]
    },
    # Upper bounds exclude what may break; requirements.lock has the versions that the tests passed with.
    install_requires=[
        # An unpinned torch brings another build and gigabytes of CUDA packages on a CPU machine.
        "torch==2.13.0",
        # The newest that declares Python 3.11. 0.17 has other modules for checkpoints.
        "megatron-core==0.16.1",
        "psutil<8",  # needed by megatron.core.dist_checkpointing.save, which does not declare it
        "transformers>=5.20,<6",
        "huggingface_hub>=1,<3",
        "tokenizers<1",
        "safetensors<1",
        "numpy<3",
        "pyarrow<27",
        "pydantic>=2.8,<3",
        "pyyaml<7",
        "typer>=0.12,<1",
        "rich<16",
        "math-verify==0.9.0",
        "aiohttp<4",
        "jinja2<4",
        "tensorboard<3",
    ],
    extras_require={
        # On a CUDA machine only: without its CUDA part, transformer-engine breaks `import megatron.core`.
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.10,<2.12"],
        # Engines live in environments of their own: these extras name what goes there. SGLang's torch must be ours:
        # the weights travel in one NCCL group, which refuses two versions. 0.5.22 and later need torch 2.14.
        "sglang": ["sglang==0.5.21"],
        "vllm": ["vllm==0.32.0"],
        "wandb": WANDB,
        "mlflow": MLFLOW,
        # gguf reads the real weights that the conversion is tested with.
        "dev": [*WANDB, *MLFLOW, *TOOLS, "gguf"],
    },
    entry_points={
        "console_scripts": ["megarl=megarl.cli:main"],
        # How megarl finds what stands above it: it imports nothing of checkpoints_conv.
        "megarl.commands": ["convert=checkpoints_conv.cli:app"],
        "megarl.benchmarks": ["conversion=checkpoints_conv.bench"],
    },
)
