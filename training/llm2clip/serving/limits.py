"""The limits of the server, which the command has as options too."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llm2clip.command_line.settings import setting

# What counts as one text: so many characters, about 128 tokens.
TEXT_CHARACTERS = 512
# An image takes about as long, and as much memory, as so many texts, for each so many pixels that it has.
IMAGE_WEIGHT, IMAGE_PIXELS = 32, 4_000_000
WEIGHT_RULE = (
    f"a text counts once for each {TEXT_CHARACTERS} characters, an image as {IMAGE_WEIGHT} texts for each "
    f"{IMAGE_PIXELS // 1_000_000} megapixels"
)


@dataclass
class Limits:
    """What a request may take."""

    max_body_mb: float = setting(32.0, "Largest body of a request, in megabytes.")
    max_inputs: int = setting(2048, f"Most texts of a request: {WEIGHT_RULE}.")
    max_characters: int = setting(32768, "Longest text; the model cuts what exceeds its own tokens.")
    max_pixels: int = setting(25_000_000, "Largest image, width x height.")
    max_waiting: int = setting(8192, f"Most texts that wait for the model: {WEIGHT_RULE}.")
    max_connections: int = setting(1024, "Most requests at the same time; those of /health do not count.")
    max_wait_ms: float = setting(
        0.0, "Milliseconds that a batch waits for more requests; the next batch collects while one is computed."
    )
    timeout: float = setting(60.0, "Seconds that a request may take, from when it is read.")
    read_timeout: float = setting(30.0, "Seconds in which a client has to send its request.")
    decode_threads: int = setting(
        4, "Threads that decode images; those of more than an eighth of max_pixels are decoded by one more."
    )

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(Limits)):
            if getattr(self, name) < (0 if name == "max_wait_ms" else 1):
                raise ValueError(f"{name} is {getattr(self, name)}, which is too small.")
        if self.max_waiting < self.max_inputs:
            raise ValueError(
                f"max_waiting ({self.max_waiting}) has to be at least max_inputs ({self.max_inputs}): otherwise the "
                "largest requests are never accepted."
            )
