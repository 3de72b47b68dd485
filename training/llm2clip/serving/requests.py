"""What a request may be: its texts and images, and the errors that say what is wrong with it."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from starlette.responses import JSONResponse

from llm2clip.serving.limits import MAX_CHARACTERS, MAX_INPUTS
from modeling_llm2clip.image_decoding_llm2clip import decoding_errors
from modeling_llm2clip.image_decoding_llm2clip import open_image as read_head

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


def parse_inputs(value: Any, param: str = "input") -> Inputs:
    """Read the `input` of OpenAI's embeddings, also with images as vLLM and jina have them.

    Args:
        value: A text; `{"text": ...}`, `{"image": ...}`, or a part of a chat message, of the type `text` or
            `image_url`; or a list of these. An image is a `data:` URL, or base64.

    Raises:
        ApiError: It is something else (400), or exceeds a limit (413).
    """
    if not isinstance(value, list):
        return _parse_items([value], [param])
    _check_count(value, param)
    return _parse_items(value, [f"{param}[{row}]" for row in range(len(value))])


def parse_messages(messages: Any) -> Inputs:
    """Read the `messages` of vLLM's embeddings: a conversation, or a list of them as mteb sends it.

    A conversation is one message, with one text or one image: together, they would have two embeddings, not one.

    Raises:
        ApiError: It is something else (400), or exceeds a limit (413).
    """
    if not (isinstance(messages, list) and messages and all(isinstance(one, list) for one in messages)):
        return _parse_items([_content(messages, "messages")], ["messages[0].content"])
    _check_count(messages, "messages")
    names = [f"messages[{row}]" for row in range(len(messages))]
    contents = [_content(one, name) for one, name in zip(messages, names, strict=True)]
    return _parse_items(contents, [f"{name}[0].content" for name in names])


def open_image(content: str, name: str, max_pixels: int) -> EncodedImage:
    """Read the head of an image in base64.

    Raises:
        ApiError: It is not base64, or too narrow (400), or too large (413).
        DamagedImageError: It is no image.
    """
    try:
        encoded = base64.b64decode(content, validate=True)
    except ValueError:
        _refuse("is not base64", name, "invalid_image")
    with decoding_errors(encoded, name):
        width, height = read_head(encoded, sys.maxsize).size
    if max(width, height) > MAX_ASPECT * min(width, height):
        _refuse(f"is too narrow: {width} x {height} pixels", name, "invalid_image")
    if width * height > max_pixels:
        given = f"{width} x {height} = {width * height:,} pixels"
        _refuse(f"has {given}, but at most {max_pixels:,} are allowed (max_pixels)", name, "too_many_pixels", 413)
    return EncodedImage(name, encoded, width * height)


def _check_count(items: list[Any], param: str) -> None:
    if not items:
        _refuse("is empty; send at least one text or image", param)
    if len(items) > MAX_INPUTS:
        _refuse(f"has {len(items):,} items, but at most {MAX_INPUTS:,} are allowed", param, "too_many_inputs", 413)


def _parse_items(items: list[Any], names: list[str]) -> Inputs:
    inputs = Inputs(names=names)
    for row, (item, name) in enumerate(zip(items, names, strict=True)):
        kind, content = _parse_item(item, name)
        if kind == "image":
            inputs.images.append(_base64_of(content, name))
            inputs.image_rows.append(row)
            continue
        if len(content) > MAX_CHARACTERS:
            message = f"has {len(content):,} characters, but at most {MAX_CHARACTERS:,} are allowed"
            _refuse(message, name, "too_long", 413)
        if not content.strip():
            _refuse("is empty; leave it out", name)
        try:
            content.encode()
        except UnicodeEncodeError:  # JSON can say half a character
            _refuse("is not valid Unicode", name)
        inputs.texts.append(content)
        inputs.text_rows.append(row)
    return inputs


def _content(conversation: Any, name: str) -> Any:
    """Return the one text or image of a conversation."""
    if _is_list_of_one(conversation) and isinstance(conversation[0], dict):
        content: Any = conversation[0].get("content")
        if isinstance(content, str):
            return content
        if _is_list_of_one(content):
            return content[0]
    _refuse(
        "has to be one message whose content is one text or one image, or a list of such conversations; a text and an "
        "image have two embeddings",
        name,
    )


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


def _refuse(message: str, param: str, code: str = "invalid_value", status: int = 400) -> NoReturn:
    raise ApiError(status, f"{param} {message}." if message != NO_DOWNLOADS else f"{param}: {message}", code, param)
