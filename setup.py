"""Where the packages are; everything else stands in setup.cfg."""

from setuptools import find_packages, setup

# Data that stays at the top of the repository and is installed inside the package.
DATA = {"llm2clip.hub_configs": "hub_configs", "llm2clip.example_data": "examples/data"}

setup(
    packages=[*find_packages("training"), *find_packages(include=["modeling_llm2clip"]), *DATA],
    package_dir={"llm2clip": "training/llm2clip", "modeling_llm2clip": "modeling_llm2clip", **DATA},
)
