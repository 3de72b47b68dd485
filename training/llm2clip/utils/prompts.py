"""The prompts of the original code."""

from __future__ import annotations


def original_prompt(model_type: str, name_or_path: str, pooling: str = "mean") -> tuple[str, str]:
    """The prompt around a caption in the original code, which depends on the name of the LLM.

    Args:
        model_type: `model_type` in the config of the LLM.
        name_or_path: `_name_or_path` in the config of the LLM.
        pooling: With `eos_token` the original appends an end-of-sequence token.

    Returns:
        `(prompt_prefix, prompt_suffix)` for [`LLM2CLIPTextConfig`].
    """
    prefix = suffix = ""
    if model_type == "llama" and "Llama-3" in name_or_path and "Instruct" in name_or_path:
        return "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
    if name_or_path in ("mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Llama-2-7b-chat-hf"):
        prefix, suffix = "[INST] ", " [/INST]"
    elif name_or_path == "google/gemma-2-9b-it":
        prefix, suffix = "<bos><start_of_turn>user\n", "<end_of_turn>"
    elif name_or_path in ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-7B-Instruct"):
        prefix, suffix = "<|im_start|>user\n", "<|im_end|>"
    elif name_or_path == "microsoft/Phi-3.5-mini-instruct":
        prefix, suffix = "<|user|>\n", "<|end|>\n"
    if pooling == "eos_token":
        ends = {"gemma": "<eos>", "qwen2": "<|endoftext|>", "phi3": "<|endoftext|>"}
        end = "<|end_of_text|>" if name_or_path == "meta-llama/Meta-Llama-3-8B" else ends.get(model_type, " </s>")
        suffix = suffix.rstrip() + end
    return prefix, suffix
