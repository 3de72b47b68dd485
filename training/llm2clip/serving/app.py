"""The endpoints: OpenAI's embeddings for texts and images, search, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Literal

import numpy as np
import orjson
import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from llm2clip.data import SampleError
from llm2clip.encoders import Encoder
from llm2clip.models.places import model_name
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.where import WhereError
from llm2clip.serving.decoding import Decoders
from llm2clip.serving.guard import Guard
from llm2clip.serving.limits import Limits
from llm2clip.serving.metrics import Metrics
from llm2clip.serving.requests import ApiError, EncodedImage, Inputs, parse_inputs, parse_messages
from llm2clip.serving.turns import Work
from llm2clip.serving.worker import BatchWorker, Size
from modeling_llm2clip.modeling_llm2clip_utils import shorten

MAX_RESULTS = 1000


class EmbeddingsRequest(BaseModel):
    """The body of `POST /v1/embeddings`: `input`, or the `messages` of vLLM."""

    model_config = ConfigDict(extra="forbid")

    input: Any = Field(None, description='A text, {"image": "data:image/...;base64,..."}, or a list of these.')
    messages: Any = Field(None, description="A chat message with one text or one image, in a list; or a list of such.")
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        None, ge=1, strict=True, description="Length of the embeddings: they are cut and normalised."
    )
    user: str | None = Field(None, description="Ignored.")


class SearchRequest(BaseModel):
    """The body of `POST /search`."""

    model_config = ConfigDict(extra="forbid")

    query: Any = Field(description='A text or {"image": "data:image/...;base64,..."}.')
    k: int = Field(10, ge=1, le=MAX_RESULTS, strict=True)
    where: str | None = Field(None, max_length=10_000, description="A condition on the columns of the index.")
    model: str | None = None


class Endpoints:
    """What the endpoints do.

    Args:
        encoder, index, name, limits: See [`create_app`].
    """

    def __init__(self, encoder: Encoder, index: SearchIndex | None, name: str, limits: Limits) -> None:
        self.encoder, self.index, self.name, self.limits = encoder, index, name, limits
        self.metrics = Metrics()
        self.worker = BatchWorker(encoder, limits, self.metrics)
        self.created = int(time.time())
        self.decoders = Decoders(encoder, limits)
        self._searcher = ThreadPoolExecutor(1, "llm2clip-search")

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Run the threads as long as the application."""
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)
            self.decoders.shutdown()
            self._searcher.shutdown(wait=False, cancel_futures=True)

    async def embed(self, inputs: Inputs, param: str) -> tuple[np.ndarray, int]:
        """Embed the inputs of a request: unit rows `(inputs, width)`, in their order, and their tokens."""
        for kind, given in (("text", inputs.texts), ("image", inputs.images)):
            if given and kind not in self.worker.kinds:
                raise ApiError(400, f"{self.name} does not embed {kind}s.", "unsupported_input", param)
        images = await self.decoders.open(inputs, param)
        tokens = await self.worker.count_tokens(inputs.texts, param)
        works: list[Work] = []
        with self.worker.room(Size(len(inputs), tokens, sum(image.pixels for image in images))):
            try:
                if inputs.texts:
                    names = [inputs.names[row] for row in inputs.text_rows]
                    works.append(self.worker.submit("text", inputs.texts, names))
                await self._submit_images(images, works)
                for work in works:
                    await work.future
            finally:  # of what a client that has gone no longer waits for
                for work in works:
                    work.future.cancel()
        rows = np.empty((len(inputs), self.encoder.width), np.float32)
        rows[inputs.text_rows + inputs.image_rows] = np.concatenate([work.rows for work in works])
        return rows, sum(work.tokens for work in works)

    async def _submit_images(self, images: list[EncodedImage], works: list[Work]) -> None:
        """Let a part of the images wait for the model while the next one is decoded, and no more."""
        for part in self.decoders.parts(images):
            prepared = await self.decoders.prepare(part)
            if works:
                await works[-1].future
            works.append(self.worker.submit("image", prepared, [image.name for image in part]))

    def check_model(self, name: str | None) -> None:
        """Raise ApiError if a request names another model."""
        if name not in (None, self.name):
            raise ApiError(404, f"There is no such model here; there is {self.name!r}.", "model_not_found", "model")

    async def embeddings(self, request: EmbeddingsRequest) -> Response:
        """Answer `POST /v1/embeddings`."""
        self.check_model(request.model)
        if (request.input is None) == (request.messages is None):
            raise ApiError(400, "Exactly one of input and messages has to be given.", "invalid_value", "input")
        width = self.encoder.width
        if request.dimensions is not None and request.dimensions > width:
            message = f"dimensions is {request.dimensions}, but embeddings of {self.name} have {width}."
            raise ApiError(400, message, "invalid_value", "dimensions")
        param = "input" if request.messages is None else "messages"
        inputs = parse_inputs(request.input) if request.messages is None else parse_messages(request.messages)
        rows, tokens = await self.embed(inputs, param)
        if request.dimensions is not None:
            rows = shorten(torch.from_numpy(rows), request.dimensions).numpy()
        shown: list[Any] = list(rows)
        if request.encoding_format == "base64":
            shown = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows]
        data = [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(shown)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def search(self, request: SearchRequest) -> Response:
        """Answer `POST /search`."""
        self.check_model(request.model)
        if self.index is None:
            raise ApiError(404, "The server was started without --index.", "no_index")
        if isinstance(request.query, list):
            raise ApiError(400, "query has to be one text or one image.", "invalid_value", "query")
        rows, _ = await self.embed(parse_inputs(request.query, "query"), "query")
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._searcher, self._find, rows, request.k, request.where)
        return _json({"model": self.name, "results": results})

    def _find(self, rows: np.ndarray, k: int, where: str | None) -> list[dict[str, Any]]:
        assert self.index is not None
        try:
            (near,) = self.index.search(rows, k, where)
        except WhereError as error:  # others, such as of an index that was moved, may show its path
            raise ApiError(400, str(error), "invalid_value", "where") from None
        # Where the files are is nobody's business.
        entries = [{**vars(result), "path": None} for result in near]
        return [
            {"rank": rank, **{name: value for name, value in entry.items() if value is not None}}
            for rank, entry in enumerate(entries, 1)
        ]

    async def models(self) -> dict[str, Any]:
        """Answer `GET /v1/models`."""
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, model: str) -> dict[str, Any]:
        """Answer `GET /v1/models/MODEL`."""
        self.check_model(model)
        entry = {"id": self.name, "object": "model", "created": self.created, "owned_by": "llm2clip"}
        return {**entry, "dimensions": self.encoder.width, "inputs": self.worker.kinds}

    async def health(self) -> dict[str, str]:
        """Answer `GET /health`."""
        if not self.worker.is_healthy:
            raise ApiError(503, "The model fails; see the log of the server.", "unhealthy")
        return {"status": "ok"}

    async def metrics_text(self) -> Response:
        """Answer `GET /metrics`."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


def create_app(
    encoder: Encoder,
    index: SearchIndex | None = None,
    *,
    name: str | None = None,
    token: str | None = None,
    limits: Limits | None = None,
    hosts: Collection[str] | None = None,
) -> ASGIApp:
    """Build the server of `llm2clip serve` as an ASGI application, for uvicorn and others that run its lifespan.

    Args:
        encoder: The model, as [`load_encoder`] opens it. One thread calls it.
        index: An open index of this model, for `/search`.
        name: The model's name for clients; by default its name on the Hub, or that of its folder.
        token: What clients have to send as `Authorization: Bearer TOKEN`.
        limits: Of size, number and time.
        hosts: Names that requests may have as their `Host`; any by default.

    Raises:
        NonFiniteError: The model's embeddings are NaN or infinite.
        ValueError: The model embeds neither texts nor images.

    Example:

    ```python
    from fastapi.testclient import TestClient
    from llm2clip import create_app, load_encoder

    with TestClient(create_app(load_encoder("runs/quickstart/llm2clip"))) as client:
        answer = client.post("/v1/embeddings", json={"input": ["a red squirrel"]}).json()
    ```
    """
    limits = limits or Limits()
    endpoints = Endpoints(encoder, index, name or model_name(encoder.name), limits)
    # The pages of documentation load scripts of other servers.
    app = FastAPI(title="llm2clip", docs_url=None, redoc_url=None, lifespan=endpoints.lifespan)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.post("/v1/embeddings")(endpoints.embeddings)
    app.post("/search")(endpoints.search)
    app.get("/v1/models")(endpoints.models)
    app.get("/v1/models/{model:path}")(endpoints.model)
    app.get("/health")(endpoints.health)
    app.get("/metrics")(endpoints.metrics_text)
    return Guard(app, limits, endpoints.metrics, token, hosts)


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _invalid_request(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason, place = first["ctx"]["error"].lower(), first["loc"][-1]
        return ApiError(400, f"The body is not JSON: {reason}, at character {place}.", "invalid_value")
    param = ".".join(str(part) for part in first["loc"] if part != "body")
    return ApiError(400, f"{param or 'The body'}: {first['msg']}.", "invalid_value", param or None)


def _handler(translated: Callable[[Any], ApiError]) -> Callable[[Request, Exception], Response]:
    return lambda request, error: translated(error).response()


HANDLERS = {
    ApiError: _handler(lambda error: error),
    SampleError: _handler(lambda error: ApiError(400, str(error), "invalid_image", error.key)),
    RequestValidationError: _handler(_invalid_request),
    HTTPException: _handler(lambda error: ApiError(error.status_code, f"{error.detail}.", headers=error.headers)),
    # Raised again by starlette; the guard logs it.
    Exception: _handler(lambda error: ApiError(500, "The server failed.", "internal_error")),
}
