"""Where the packages are, which setup.cfg cannot say of two roots and of data outside of both."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

TRAINING = Path(__file__).resolve().parent / "training"
# Data that stays at the top of the repository and is installed inside the package.
DATA = {"llm2clip.hub_configs": "hub_configs"}


class EditableWheel(editable_wheel):
    """An editable installation that also puts `training/` on the path.

    The finder of setuptools is asked last: in a folder that holds a checkout called `llm2clip`, Python would take that
    folder for a package without `__init__.py`.
    """

    def run(self) -> None:
        super().run()
        (wheel,) = Path(self.dist_dir).glob("llm2clip-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        record = next(name for name in files if name.endswith(".dist-info/RECORD"))
        name, line = "__llm2clip_training__.pth", f"{TRAINING}\n".encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(line).digest()).rstrip(b"=").decode()
        files[record] += f"{name},sha256={digest},{len(line)}\n".encode()
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, content in {name: line, **files}.items():
                archive.writestr(entry, content)


setup(
    packages=[*sorted(find_packages("training")), *find_packages(include=["modeling_llm2clip"]), *DATA],
    package_dir={"llm2clip": "training/llm2clip", "modeling_llm2clip": "modeling_llm2clip", **DATA},
    cmdclass={"editable_wheel": EditableWheel},
)
