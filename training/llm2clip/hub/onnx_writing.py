"""A graph as ONNX files of one or more precisions, each compared with torch before it is kept."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llm2clip.hub.onnx_graphs import Graph

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "float16", "int8"]
# Allowed difference of an entry of a unit vector from torch in float32.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
# The least mean cosine of int8 with torch.
LEAST_COSINE = 0.9
# Weights above this size are stored in a second file: protobuf limits a file, with its graph, to 2 GiB.
LARGEST_FILE = 2**31 - 2**26


def write_graph(graph: Graph, files: Mapping[Dtype, Path], metadata: Mapping[str, str]) -> dict[str, str]:
    """Write a graph in some precisions, and compare each with torch in float32.

    Args:
        graph: The graph, in float32.
        files: The file of each precision; int8 is made of float32, which stands before it.
        metadata: What is stored with it.

    Returns:
        `difference`, the largest of an entry, and of int8 `int8_cosine`, the mean cosine, over random inputs whose
        number and length differ from those of the trace.

    Raises:
        ValueError: A graph differs by more than its precision explains.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        traced, others = graph.example(2), [graph.example(batch) for batch in (1, 5)]
    with torch.inference_mode():
        expected = torch.cat([graph(*inputs) for inputs in others])
    measured: dict[str, str] = {}
    for dtype, path in files.items():
        logger.info("%s: %s", path.name, "quantising" if dtype == "int8" else "tracing")
        with _quiet():
            if dtype == "int8":
                _quantise(files["float32"], path)
            else:
                _trace(graph if dtype == "float32" else copy.deepcopy(graph).half(), traced, path, metadata)
        rows = graph_rows(path, ([value.numpy() for value in inputs] for inputs in others))
        if dtype == "int8":
            cosine = F.cosine_similarity(rows, expected).mean().item()
            said, limit, is_close = f"has a cosine of {cosine:.4f} with torch", LEAST_COSINE, cosine >= LEAST_COSINE
            measured["int8_cosine"] = f"{cosine:.4f}"
        else:
            difference = (rows - expected).abs().max().item()
            said, limit = f"differs from torch by {difference:.1e}", TOLERANCE[dtype]
            is_close = difference <= limit  # not `>`, which is false for NaN
            measured["difference"] = f"{difference:.1e}"
        if not is_close:
            raise ValueError(f"{path.name} {said}; the limit for {dtype} is {limit}.")
        logger.info("%s: %.0f MB, %s", path.name, _size(path) / 1e6, said)
    return measured


def graph_rows(path: Path, inputs: Iterable[Iterable[np.ndarray]]) -> Tensor:
    """Run a graph on some inputs, one after the other, and join what it makes of them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    rows = [session.run(None, dict(zip(names, values, strict=True)))[0] for values in inputs]
    return torch.from_numpy(np.concatenate(rows))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the libraries say about their own steps; the result is compared with torch."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _trace(graph: Graph, inputs: tuple[Tensor, ...], path: Path, metadata: Mapping[str, str]) -> None:
    with torch.inference_mode():
        program: Any = torch.onnx.export(
            graph,
            inputs,
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=[graph.output],
            dynamic_shapes=tuple(graph.inputs.values()),
            verbose=False,
        )
    program.model.metadata_props.update(metadata)
    size = sum(parameter.numel() * parameter.element_size() for parameter in graph.parameters())
    program.save(str(path), external_data=size > LARGEST_FILE)


def _quantise(source: Path, path: Path) -> None:
    """Write the graph of a file with linear layers, and tables of embeddings, of 8 bits."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        path,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        per_channel=True,
        reduce_range=True,  # to 7 bits: sums of two products overflow 16 bits on processors without VNNI
        weight_type=QuantType.QInt8,
        use_external_data_format=_size(source) > LARGEST_FILE,
    )
