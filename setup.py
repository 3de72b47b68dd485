"""Where the packages are, which setup.cfg cannot say of two roots and of data outside of both."""

from setuptools import find_packages, setup

# Data that stays at the top of the repository and is installed inside the package.
DATA = {"llm2clip.hub_configs": "hub_configs", "llm2clip.example_data": "examples/data"}

setup(
    packages=[*sorted(find_packages("training")), *find_packages(include=["modeling_llm2clip"]), *DATA],
    package_dir={"llm2clip": "training/llm2clip", "modeling_llm2clip": "modeling_llm2clip", **DATA},
)
