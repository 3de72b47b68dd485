"""The images of `tests.damaged`, under the name that other tests know."""

from tests.damaged.images import BadImage, write

__all__ = ["BadImage", "write"]
