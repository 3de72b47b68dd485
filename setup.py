"""Where the packages are, and how two builds become equal byte by byte; everything else stands in setup.cfg."""

import gzip
import os
import tarfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

# Data that stays at the top of the repository and is installed inside the package.
DATA = {"llm2clip.hub_configs": "hub_configs", "llm2clip.example_data": "examples/data"}
# The time of every file in an archive: 1980, the first year that a zip file can state. `make dist` gives the commit's.
EPOCH = int(os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800"))
MODE = 0o644


class Wheel(bdist_wheel):
    """A wheel without the permissions that the umask of a checkout gave its files."""

    def write_wheelfile(self, *arguments, **options):
        super().write_wheelfile(*arguments, **options)
        for path in Path(self.bdist_dir).rglob("*"):
            if path.is_file():
                path.chmod(MODE)


class SourceArchive(sdist):
    """A source archive without the times, owners and permissions of a checkout, and in the order of names."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        target = f"{base_name}.tar.gz"
        with (
            open(target, "wb") as file,
            gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=EPOCH) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in sorted(path for path in Path(base_dir).rglob("*") if path.is_file()):
                archive.add(path, path.as_posix(), filter=_plain)
        return target


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime, member.mode = EPOCH, MODE
    return member


setup(
    packages=[*sorted(find_packages("training")), *find_packages(include=["modeling_llm2clip"]), *DATA],
    package_dir={"llm2clip": "training/llm2clip", "modeling_llm2clip": "modeling_llm2clip", **DATA},
    cmdclass={"bdist_wheel": Wheel, "sdist": SourceArchive},
)
