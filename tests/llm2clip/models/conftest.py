"""Fixtures of other folders."""

from __future__ import annotations

from tests.modeling_llm2clip.flash import flash

__all__ = ["flash"]
