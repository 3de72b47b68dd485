"""Print the lowest versions that setup.cfg allows, as constraints for pip: `python tests/compatibility/lowest.py`.

It runs before anything is installed, on the standard library alone.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"
# A name, extras that a constraint must not have, and the lower bound, in which pip reads 3 as 3.0 and 3.0.0.
BOUND = re.compile(r"(?P<name>[\w.-]+)(?:\[[^]]*\])?[^;]*?>=(?P<version>[\w.]+)")


def lowest(setup: Path = SETUP) -> dict[str, str]:
    """Return the lowest version of each library, by its name.

    Raises:
        ValueError: Two extras have different bounds for one library.
    """
    parsed = configparser.ConfigParser()
    parsed.read(setup, encoding="utf-8")
    lines = [parsed["options"]["install_requires"], *parsed["options.extras_require"].values()]
    versions: dict[str, str] = {}
    for requirement in "\n".join(lines).splitlines():
        if (found := BOUND.match(requirement)) is None:
            continue
        name, version = found["name"].lower(), found["version"]
        if versions.setdefault(name, version) != version:
            raise ValueError(f"{setup} has two lower bounds for {name}: {versions[name]} and {version}.")
    return versions


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in sorted(lowest().items())))
