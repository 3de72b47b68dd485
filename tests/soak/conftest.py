"""Small inputs of the stages."""

from tests.llm2clip.conftest import inputs

__all__ = ["inputs"]
