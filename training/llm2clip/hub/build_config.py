"""The settings of `llm2clip build`."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from llm2clip.command_line.settings import refuse, setting
from llm2clip.hub.licenses import license_id
from llm2clip.models.repos import is_hub_id


@dataclass
class BuildConfig:
    """Settings of `llm2clip build`."""

    model: str = setting("", "Model to build from: output folder of a stage, another saved model, or a Hub id.")
    destination: str = setting("", "Folder to write; not used with --config-only.")
    revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    bundle_text_model: bool | None = setting(
        None, "Store the LLM's weights in the folder. Default: only if the LLM is not on the Hub."
    )
    text_model: str | None = setting(
        None, "Hub id of the LLM, if it is or will be published separately; it is then not bundled."
    )
    merge_adapter: bool | None = setting(
        None, "Merge the LoRA adapter of a stage-1 model into its LLM (default), or keep it (false)."
    )
    code_repo: str | None = setting(
        None, "Hub id of a repo with the model code; the folder refers to it and contains no code."
    )
    name: str | None = setting(None, "Title of the card. Default: name of the folder.")
    repo_id: str | None = setting(
        None, "Hub id in the code examples of the card. Default: the folder; push replaces it."
    )
    license: str | None = setting(
        None,
        "License of the weights, by its id on the Hub, such as apache-2.0; it has to keep those of the models that it "
        "was made from. Default: that on the card of the model, else the strictest of those.",
    )
    license_name: str | None = setting(None, "Name of the license, with --license other.")
    license_link: str | None = setting(None, "URL of the license, or its file in the folder, with --license other.")
    base_models: list[str] = setting(
        [], "Hub ids of the models that this one was trained from. Default: those that its card and config name."
    )
    datasets: list[str] = setting([], "Hub ids of the training data.")
    languages: list[str] = setting([], "ISO 639 codes of the caption languages.")
    results: list[str] = setting([], "Results for the card: JSON files of `llm2clip evaluate`.")
    example_image: str | None = setting(None, "Example image for the card.")
    example_captions: list[str] = setting([], "Captions for the card; the first one describes the example image.")
    config_only: bool = setting(False, "Write nothing; only count the parameters of the model's config.")
    overwrite: bool = setting(False, "Replace a destination that an earlier build wrote and that holds nothing else.")

    def __post_init__(self) -> None:
        if self.text_model is not None:
            refuse(self, ["bundle_text_model"], "text_model leaves the LLM out of the folder")
        for name in ("text_model", "code_repo", "repo_id"):
            value = getattr(self, name)
            if value is not None and not is_hub_id(value):
                raise ValueError(f"{name} {value!r} is not a Hub id (OWNER/NAME).")
        if not all(caption.strip() for caption in self.example_captions):
            raise ValueError(f"an example caption is empty: {self.example_captions}.")
        if self.license is not None:
            self.license = license_id(self.license, "--license {}")
        named = (self.license_name, self.license_link)
        if not all(named) if self.license == "other" else any(named):
            raise ValueError("license_name and license_link require license: other, which requires both.")
        for name in ("datasets", "base_models"):
            for value in getattr(self, name):
                try:
                    validate_repo_id(value)
                except HFValidationError as error:
                    raise ValueError(f"{name}: {error}") from error
