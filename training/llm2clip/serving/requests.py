"""What a request may be: its limits, its texts and images, and the errors that say what is wrong with it."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from starlette.responses import JSONResponse
from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.serving.limits import IMAGE_PIXELS, IMAGE_WEIGHT, TEXT_CHARACTERS, WEIGHT_RULE, Limits
from modeling_llm2clip.image_decoding_llm2clip import decoding_errors, open_image

# Sides of an image: resizing its shorter side makes a narrower one larger than memory.
MAX_ASPECT = 200
TOKEN_IDS = (
    "token ids are those of one tokenizer, and this is another model's; send texts (in LangChain: "
    "OpenAIEmbeddings(check_embedding_ctx_length=False))"
)
NO_DOWNLOADS = "URLs are not fetched; send the image itself: data:image/jpeg;base64,..."


class ApiError(Exception):
    """An answer that is no success, in the form of OpenAI's errors.

    Args:
        status: HTTP status.
        message: What was given, what was expected, what to do; nothing that another client sent.
        code: The kind of error, for programs.
        param: The field of the request that is wrong.
        headers: Headers of the answer, such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def response(self) -> JSONResponse:
        """Build the answer: `{"error": {"message", "type", "param", "code"}}`."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


class EncodedImage(NamedTuple):
    """An image of a request that is not decoded yet: its name in errors, its file, and its number of pixels."""

    name: str
    content: bytes
    pixels: int

    @property
    def weight(self) -> int:
        """How much of the limits it uses, in texts."""
        return IMAGE_WEIGHT * math.ceil(self.pixels / IMAGE_PIXELS)


@dataclass
class Inputs:
    """The texts and images of a request.

    Attributes:
        texts: The texts.
        images: The images, in base64.
        text_rows, image_rows: Their numbers among all inputs of the request.
        names: The names of all inputs in errors.
    """

    texts: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    text_rows: list[int] = field(default_factory=list)
    image_rows: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts) + len(self.images)

    @property
    def text_weight(self) -> int:
        """How much of the limits the texts use."""
        return sum(math.ceil(len(text) / TEXT_CHARACTERS) for text in self.texts)

    def open_images(self, max_pixels: int) -> list[EncodedImage]:
        """Read the heads of the images.

        Raises:
            ApiError: One is not base64, or too narrow.
            DamagedImageError: One is no image, or too large.
        """
        names = (self.names[row] for row in self.image_rows)
        return [_open(content, name, max_pixels) for content, name in zip(self.images, names, strict=True)]


def parse_inputs(value: Any, limits: Limits, param: str = "input") -> Inputs:
    """Read the `input` of OpenAI's embeddings, also with images as vLLM and jina have them.

    Args:
        value: A text; `{"text": ...}`, `{"image": ...}`, or a part of a chat message, of the type `text` or
            `image_url`; or a list of these. An image is a `data:` URL, or base64.

    Raises:
        ApiError: It is something else, or exceeds a limit.
    """
    items = value if isinstance(value, list) else [value]
    if not items:
        _refuse("is empty; send at least one text or image", param)
    if len(items) > limits.max_inputs:
        _refuse(f"has {len(items)} items, but at most {limits.max_inputs} are allowed", param, "too_many_inputs")
    inputs = Inputs()
    for row, item in enumerate(items):
        name = f"{param}[{row}]" if isinstance(value, list) else param
        inputs.names.append(name)
        kind, content = _parse_item(item, name)
        if kind == "image":
            inputs.images.append(_base64_of(content, name))
            inputs.image_rows.append(row)
            continue
        if len(content) > limits.max_characters:
            most = limits.max_characters
            _refuse(f"has {len(content)} characters, but at most {most} are allowed", name, "too_long")
        if not content.strip():
            _refuse("is empty; leave it out", name)
        try:
            content.encode()
        except UnicodeEncodeError:  # JSON can say half a character
            _refuse("is not valid Unicode", name)
        inputs.texts.append(content)
        inputs.text_rows.append(row)
    require_weight(inputs.text_weight + IMAGE_WEIGHT * len(inputs.images), limits, param)
    return inputs


def require_weight(weight: int, limits: Limits, param: str) -> None:
    """Raise ApiError if the inputs of a request are too much."""
    if weight > limits.max_inputs:
        most = f"but at most {limits.max_inputs} are allowed: {WEIGHT_RULE}"
        _refuse(f"counts as {weight} texts, {most}", param, "too_many_inputs")


def parse_messages(messages: Any, limits: Limits) -> Inputs:
    """Read the `messages` of vLLM's embeddings: one message, with one text or one image.

    Raises:
        ApiError: It is something else, such as a text and an image together: they have two embeddings, not one.
    """
    content = messages[0].get("content") if _is_list_of_one(messages) and isinstance(messages[0], dict) else None
    if not isinstance(content, str) and not _is_list_of_one(content):
        _refuse("has to be one message whose content is one text or one image; send several as a list", "messages")
    return parse_inputs(content, limits, "messages[0].content")


def prepare_image(encoder: Encoder, image: EncodedImage, max_pixels: int) -> dict[str, Tensor]:
    """Decode an image, and prepare it for the model.

    Raises:
        DamagedImageError: It cannot be decoded.
    """
    return encoder.prepare(encoder.decode(image.content, image.name, max_pixels), image.name)


def _open(content: str, name: str, max_pixels: int) -> EncodedImage:
    try:
        encoded = base64.b64decode(content, validate=True)
    except ValueError:
        _refuse("is not base64", name, "invalid_image")
    with decoding_errors(encoded, name):
        width, height = open_image(encoded, max_pixels).size
    if max(width, height) > MAX_ASPECT * min(width, height):
        _refuse(f"is too narrow: {width} x {height} pixels", name, "invalid_image")
    return EncodedImage(name, encoded, width * height)


def _is_list_of_one(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1


def _parse_item(item: Any, name: str) -> tuple[str, str]:
    if isinstance(item, str):
        if item.startswith("data:image/"):
            _refuse('is an image; send it as {"image": "data:..."}', name)
        return "text", item
    if isinstance(item, (int, list)) and not isinstance(item, bool):
        _refuse(f"has to be a text or an image: {TOKEN_IDS}", name, "token_ids")
    if isinstance(item, dict):
        parts = {key: value for key, value in item.items() if key != "type"}
        kind, content = next(iter(parts.items())) if len(parts) == 1 else (None, None)
        if kind == "image_url" and isinstance(content, dict):
            content = content.get("url")
        if item.get("type") in (None, kind) and kind in ("text", "image", "image_url") and isinstance(content, str):
            return ("text" if kind == "text" else "image"), content
    _refuse('has to be a text, {"text": ...}, {"image": "data:..."} or a part of a chat message', name)


def _base64_of(content: str, name: str) -> str:
    if content.startswith("data:"):
        head, comma, encoded = content.partition(",")
        if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
            _refuse("has to be data:image/...;base64,...", name, "invalid_image")
        return encoded
    if "://" in content[:32]:
        _refuse(NO_DOWNLOADS, name, "invalid_image")
    return content


def _refuse(message: str, param: str, code: str = "invalid_value") -> NoReturn:
    raise ApiError(400, f"{param} {message}." if message != NO_DOWNLOADS else f"{param}: {message}", code, param)
