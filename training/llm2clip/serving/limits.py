"""The limits of the server, which the command has as options too."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llm2clip.command_line.settings import setting

# Texts and images of a request; OpenAI has the same.
MAX_INPUTS = 2048
# Characters of a text. Models read less, but a tokenizer reads all of it, while others wait.
MAX_CHARACTERS = 32_768


@dataclass
class Limits:
    """What a request may take, and all of them together."""

    max_body_mb: float = setting(32.0, "Largest body of a request, in megabytes.")
    max_request_tokens: int = setting(262_144, "Most tokens of a request's texts, before the model cuts them.")
    max_request_pixels: int = setting(256_000_000, "Most pixels of a request's images, decoded.")
    max_pixels: int = setting(25_000_000, "Largest image, width x height.")
    max_waiting: int = setting(
        4, "What all requests may have together, in largest requests: of megabytes, of tokens and of pixels."
    )
    max_connections: int = setting(1024, "Most requests at the same time; those of /health do not count.")
    timeout: float = setting(60.0, "Seconds that a request may take, from its head to its answer.")

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(Limits)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, which is too small.")
        if self.max_pixels > self.max_request_pixels:
            raise ValueError(
                f"max_pixels ({self.max_pixels:,}) exceeds max_request_pixels ({self.max_request_pixels:,}): the "
                "largest images would never be accepted."
            )
