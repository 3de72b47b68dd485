"""Fetching the files of benchmarks from the Hub into its cache, once for all runs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import cached_assets_path, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError, HubFiles
from llm2clip.files.locks import lock_beside

# The folder of the published sets, unless one is given.
DATA = "data"
# Sets that are larger are fetched only if that is asked for, in MB.
LARGE = 2000

logger = logging.getLogger(__name__)


def require_files(benchmarks: Iterable[Benchmark], data: Path, download: bool = False) -> None:
    """Refuse benchmarks whose files are neither below a folder nor on the Hub, before any is fetched.

    Args:
        download: Sets of more than 2 GB are fetched too.

    Raises:
        BenchmarkError: The message names them and says what to do; or there is no such folder.
    """
    members = [member for benchmark in benchmarks for member in benchmark.members if member.find(data) is None]
    missing = [member for member in members if member.hub is None]
    if members and not data.is_dir() and str(data) != DATA:
        raise BenchmarkError(f"--data {data} is no folder.")
    if missing:
        names = " ".join(dict.fromkeys(member.name for member in missing))
        raise BenchmarkError(
            f"{' '.join(dict.fromkeys(member.lacking(data) for member in missing))} "
            f"`llm2clip evaluate --list --benchmark {names}` shows what is needed."
        )
    large = [member for member in members if member.hub is not None and member.hub.megabytes > LARGE]
    if not download and (asked := [member for member in large if cached(member) is None]):
        raise BenchmarkError(
            f"{'; '.join(_described(member) for member in asked)}: --download fetches what is larger than "
            f"{LARGE // 1000} GB, or get it yourself into {data}: {'; '.join(map(_command, asked))}"
        )


def obtain(benchmark: Benchmark, data: Path) -> Path:
    """Return the folder of the files of a benchmark: below `data` if they are there, or else in the cache of the Hub.

    Raises:
        BenchmarkError: They cannot be fetched; the message says why, and what to do.
    """
    folder, hub = benchmark.find(data), benchmark.hub
    if folder is not None:
        return folder
    if hub is None:  # a mean, each of whose sets is fetched when it is read
        return data
    logger.info("%s", _described(benchmark))
    folder = _fetched(benchmark, hub)
    if hub.unpack:
        folder = unpack(hub.repo, hub.revision, hub.files, folder)
    if lost := benchmark.lacks(folder):
        raise BenchmarkError(f"{hub.repo} at {hub.revision} lacks {', '.join(lost)}, of {benchmark.title}.")
    return folder


def cached(benchmark: Benchmark) -> Path | None:
    """Return the folder of the fetched files of a benchmark, without asking the Hub; None if they are not all here."""
    hub = benchmark.hub
    if hub is None:
        return None
    try:
        folder = _snapshot(hub, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return folder if hub.unpack or not benchmark.lacks(folder) else None


def _snapshot(hub: HubFiles, local_files_only: bool = False) -> Path:
    return Path(
        snapshot_download(
            hub.repo,
            repo_type="dataset",
            revision=hub.revision,
            allow_patterns=[*hub.files],
            local_files_only=local_files_only,
        )
    )


def _fetched(benchmark: Benchmark, hub: HubFiles) -> Path:
    page = f"{constants.ENDPOINT}/datasets/{hub.repo}"
    try:
        return _snapshot(hub)
    except GatedRepoError as error:
        raise BenchmarkError(
            f"{benchmark.title} is gated: accept its terms on {page}, then `hf auth login` with a token of yours."
        ) from error
    except RevisionNotFoundError as error:
        raise BenchmarkError(f"{page} has no commit {hub.revision} any more: {_otherwise(benchmark)}") from error
    except RepositoryNotFoundError as error:
        raise BenchmarkError(f"there is no {page}, or it is not for you ({error}): {_otherwise(benchmark)}") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise BenchmarkError(
            f"the files of {benchmark.name} are not here, and the Hub cannot be reached (offline, or no connection). "
            f"Needed are {', '.join(hub.files)} of {page}, about {_size(hub)}. Where there is a network: "
            f"{_command(benchmark)}"
        ) from error
    except HfHubHTTPError as error:
        raise BenchmarkError(f"fetching {benchmark.name} from {page} failed: {error}") from error


def unpack(repo: str, revision: str, patterns: Iterable[str], snapshot: Path) -> Path:
    """Unpack the archives of a snapshot into a folder of their own; one that was cut off is unpacked again."""
    name = f"datasets--{repo.replace('/', '--')}"
    folder = cached_assets_path("llm2clip", name, revision, assets_dir=constants.HF_ASSETS_CACHE)
    for archive in (path for pattern in patterns for path in snapshot.glob(pattern)):
        done = folder / f"{archive.name}.unpacked"
        with lock_beside(done):
            if not done.exists():
                logger.info("Unpacking %s", archive.name)
                shutil.unpack_archive(archive, folder, filter=None if archive.suffix == ".zip" else "data")
                done.touch()
    return folder


def on_hub(hub: HubFiles) -> str:
    """Say where files are on the Hub, and how large they are."""
    return f"{hub.repo} at {hub.revision[:7]}, about {_size(hub)}{', gated' if hub.gated else ''}"


def _described(benchmark: Benchmark) -> str:
    assert benchmark.hub is not None
    return f"{benchmark.name} from the Hub: {on_hub(benchmark.hub)}. License: {benchmark.license}"


def _size(hub: HubFiles) -> str:
    return f"{hub.megabytes:,} MB" if hub.megabytes < 1000 else f"{hub.megabytes / 1000:.1f} GB"


def _command(benchmark: Benchmark) -> str:
    """Return the command that gets the files into the folder where they are looked for, for another machine."""
    hub = benchmark.hub
    assert hub is not None
    patterns = " ".join(f"'{pattern}'" for pattern in hub.files)
    unpack = ", and unpack them there" if hub.unpack else ""
    return (
        f"`hf download {hub.repo} --repo-type dataset --revision {hub.revision} --include {patterns} "
        f"--local-dir DATA/{benchmark.folder}`{unpack}, with DATA for --data."
    )


def _otherwise(benchmark: Benchmark) -> str:
    return f"get the set elsewhere ({benchmark.source.rstrip('.')}), into the folder {benchmark.folder} below --data."
