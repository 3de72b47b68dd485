"""Embedding shards on Ray: actors hold the encoder; Ray Data gives them shards, and restarts what died."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from llm2clip.encoders.embed_shards import EmbedCounts, EmbedShard, SidecarJob
from llm2clip.store.shards import shard_lock

logger = logging.getLogger(__name__)

# A Ray that is started here stores the results of shards alone, some numbers each.
OBJECT_STORE_BYTES = 200 * 2**20
# A shard whose process dies is tried again at once so often. The death of a node can take longer than that, so that
# what is left is tried in another round; then it is given up, since it may be what kills processes.
RETRIES, ROUNDS = 1, 2
# Ray notices the death of a process before the system has ended it.
ENDING_SECONDS = 5.0


def embed_with_ray(
    jobs: Sequence[SidecarJob],
    make_embedder: Callable[[], EmbedShard],
    address: str | None = None,
    actors: int | None = None,
    gpus_per_actor: float | None = None,
) -> Iterator[EmbedCounts]:
    """Embed shards on a cluster; yield what was done of each, in the order in which they end.

    Each actor writes the sidecars of its shards, which all nodes reach by the same paths. When an actor or its node
    dies, its shard goes to another one.

    Args:
        make_embedder: Called in each actor.
        address: Address of a running cluster, or None: Ray is started on this machine, and ends with the run.
        actors: Largest number of actors; None takes all that the cluster has room for, also on nodes that join later.
        gpus_per_actor: GPUs of an actor; None is 1 on a cluster that has GPUs, otherwise 0.

    Raises:
        ImportError: Ray is not installed.
        ValueError: There is no such cluster, it has no room for an actor, a sidecar cannot be written, or another
            encoder made that of a shard.
    """
    if not jobs:
        return
    # Ray reads it when it starts.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise ImportError(f"engine: ray needs Ray ({error}): pip install 'llm2clip[all]'.") from error
    with _cluster(ray, address, actors):
        missing = dict(enumerate(jobs))
        for _ in range(ROUNDS):
            try:
                for row in _outcomes(ray, missing, make_embedder, actors, gpus_per_actor).iter_rows():
                    number = row.pop("number")
                    if fatal := row.pop("fatal"):
                        raise ValueError(fatal)
                    # A shard whose outcome was lost with a node is looked at again.
                    if missing.pop(number, None) is not None:
                        yield EmbedCounts(**{**row, "failed": list(row["failed"])})
            except RayError as error:
                raise ValueError(f"Ray ended the run: {_last_line(error)}") from error
            if not missing:
                return
            logger.warning("The processes of %d shards died.", len(missing))
        for job in missing.values():
            with suppress(ValueError), shard_lock(job.path, ENDING_SECONDS):  # which removes what they left
                pass
            yield EmbedCounts(1, failed=[f"{job.shard.path}: each process that embedded it died"])


def _outcomes(
    ray: Any,
    jobs: Mapping[int, SidecarJob],
    make_embedder: Callable[[], EmbedShard],
    actors: int | None,
    gpus_per_actor: float | None,
) -> Any:
    """Return the outcomes of shards, given by their numbers, as a data set that is computed while it is read."""
    gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0)) if gpus_per_actor is None else gpus_per_actor
    room = _room(ray, gpus)
    most = min(actors or len(jobs), len(jobs))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # One shard that cannot be done must not end the others.
    context.max_errored_blocks = -1
    # An actor has one shard at a time; by default Ray only adds actors where more wait for each.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    # A block for each shard, so that a shard is what is lost and tried again.
    shards = ray.data.from_items([{"number": number} for number in jobs], override_num_blocks=len(jobs))
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return shards.map_batches(
        _Actor,
        fn_constructor_args=(ray.put(dict(jobs)), make_embedder),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=min(room, most), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=1,
        num_gpus=gpus,
        # Without a limit, Ray goes on restarting actors of rounds that have ended, and these keep their cores.
        max_restarts=RETRIES,
        max_task_retries=RETRIES,
    )


class _Actor:
    """Holds the encoder on a node of the cluster.

    Args:
        jobs: The shards by their numbers, in the object store.
        make_embedder: Opens the encoder.
    """

    def __init__(self, jobs: Any, make_embedder: Callable[[], EmbedShard]) -> None:
        import ray

        self.jobs: dict[int, SidecarJob] = ray.get(jobs)
        self.embed_shard = make_embedder()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        number, fatal = int(batch["number"][0]), ""
        try:
            outcome = self.embed_shard(self.jobs[number])
        except (OSError, ValueError) as error:  # a full disk, or sidecars of another encoder: it ends the run
            outcome, fatal = EmbedCounts(), str(error)
        values = {"number": number, "fatal": fatal, **asdict(outcome)}
        return {name: [value] for name, value in values.items()}


@contextmanager
def _cluster(ray: Any, address: str | None, actors: int | None) -> Iterator[None]:
    """Connect to a cluster, or start one that ends with the block; one that is already connected stays."""
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    try:
        if address is None:
            ray.init(
                "local",
                num_cpus=max(actors or 0, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise ValueError(
            f"Ray cannot be reached at {address or 'this machine'}: {_last_line(error)} `ray start --head` "
            "starts a cluster and prints its address."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _room(ray: Any, gpus: float) -> int:
    """Return how many actors the cluster has room for.

    Raises:
        ValueError: There is none, for which Ray would wait for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get("CPU", 0), node.get("GPU", 0) / gpus if gpus else math.inf)) for node in nodes)
    if not room:
        has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(f"no node of the Ray cluster has room for an actor with 1 CPU and {gpus:g} GPUs: {has}.")
    return room


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
