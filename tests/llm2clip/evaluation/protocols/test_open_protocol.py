"""A benchmark names its protocol by an id: benchmarks and protocols know the data, and not each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.evaluation.benchmarks import PROBES, all_benchmarks, choose_benchmarks
from llm2clip.evaluation.protocols import PROTOCOLS, open_protocol


def test_every_benchmark_has_a_protocol_that_takes_its_options() -> None:
    benchmarks = [*all_benchmarks().values(), *choose_benchmarks([f"cifar10-probe-{name}" for name in PROBES], Path())]
    for benchmark in benchmarks:
        protocol = open_protocol(benchmark.protocol, benchmark.options)
        assert vars(protocol).items() >= dict(benchmark.options).items(), benchmark.name
    assert {benchmark.protocol for benchmark in benchmarks} == set(PROTOCOLS)


def test_an_unknown_protocol_names_the_nearest_and_an_own_one_is_taken_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"there is no protocol 'retrival'.*retrieval"):
        open_protocol("retrival", {})
    own = open_protocol("retrieval", {})
    assert open_protocol(own, {"what": "ever"}) is own
