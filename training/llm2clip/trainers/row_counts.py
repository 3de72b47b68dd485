"""The numbers of rows of a stream's files, where no sidecar states them."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.utils import gather_object

from llm2clip.data.opened_table import SourceError
from llm2clip.data.shard_rows import can_count, count_rows
from llm2clip.utils.progress import ProgressBar


def count_stream(
    name: str, files: Sequence[str], rank: int, world_size: int, limit: int | None = None
) -> list[int] | None:
    """Count the rows of the files of a stream, a share of them in every process; None if that would read them whole.

    Args:
        name: Path of the source, for messages.
        files: Path or URL of each file.
        limit: Count the first rows alone: the files after them have none.

    Raises:
        SourceError: A file is damaged; in every process.
    """
    if not files or not all(map(can_count, files)):
        return None
    if limit is not None:
        found_rows: list[int] = []
        for file in files:
            left = limit - sum(found_rows)
            found_rows.append(min(left, count_rows(file)) if left else 0)
        return found_rows
    share, counts, fault = files[rank::world_size], [], None
    with ProgressBar(f"Rows of {name}", len(share), "file", rank == 0) as bar:
        for file in share:
            try:
                counts.append(count_rows(file))
            except SourceError as error:  # the other processes must not wait
                fault = str(error)
                break
            bar.update()
    found = gather_object([(counts, fault)])
    for _, message in found:
        if message is not None:
            raise SourceError(message)
    return [found[number % world_size][0][number // world_size] for number in range(len(files))]
