"""The training toolbox of LLM2CLIP."""
