"""The generated sections of a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from llm2clip.hub.cards.facts import CURVES, EXAMPLE, JOINT_TASK, RECALL, TEXT_TASK, CardFacts, Evaluation
from llm2clip.utils.tables import RECALLS, markdown_table

PAPER = "2411.04997"
CITATION = """```bibtex
@article{huang2024llm2clip,
  title={LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation},
  author={Huang, Weiquan and Wu, Aoqi and Yang, Yifan and Luo, Xufang and Yang, Yuqing and Hu, Liang and Dai, Qi and
          Dai, Xiyang and Chen, Dongdong and Luo, Chong and Qiu, Lili},
  journal={arXiv preprint arXiv:2411.04997},
  year={2024}
}
```"""
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text", "": "query → target"}
# `cached_file` finds the image in a folder as well as in a repo on the Hub.
EXAMPLE_PICTURE = f'cached_file("{{repo}}", "{EXAMPLE}")'
EXAMPLE_IMPORT = "from transformers.utils import cached_file\n"
OWN_PICTURE = '"picture.jpg"  # path of an image'
CAPTIONS = ("a photo of a dog", "a photo of a cat")

JOINT = """```python
from PIL import Image
from transformers import AutoModel, AutoProcessor
{imports}
model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)
picture = {picture}
captions = {captions}
inputs = processor(text=captions, images=Image.open(picture), return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(dim=-1))
```

```python
from transformers import pipeline
{imports}
classify = pipeline("zero-shot-image-classification", model="{repo}", trust_remote_code=True)
picture = {picture}
print(classify(picture, candidate_labels={captions}, hypothesis_template="{{}}"))
```

```python
from PIL import Image
from sentence_transformers import SentenceTransformer
{imports}
model = SentenceTransformer("{repo}", trust_remote_code=True)
picture = {picture}
print(model.similarity(model.encode([Image.open(picture)]), model.encode({captions})))
```"""
VISION = """```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
{imports}
model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("{repo}", backend="pil")
picture = {picture}
output = model(**processor(images=Image.open(picture), return_tensors="pt"))
print(output.pooler_output.shape, output.last_hidden_state.shape)
```

```python
from transformers import pipeline
{imports}
extract = pipeline("image-feature-extraction", model="{repo}", trust_remote_code=True)
picture = {picture}
print(extract(picture, pool=True, return_tensors=True).shape)
```"""
TEXT = """```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True)
embeddings = model.encode({captions}, tokenizer)
print(embeddings.shape)
```

```python
from transformers import pipeline

extract = pipeline("feature-extraction", model="{repo}", trust_remote_code=True)
states = extract({captions}, return_tensors=True)  # one row per token, before pooling
print([state.shape for state in states])
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo}", trust_remote_code=True)
embeddings = model.encode({captions})
print(model.similarity(embeddings, embeddings))
```"""
# Given a Hub id, transformers would look for the code in the repo of the LLM.
ADAPTER = """```python
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoTokenizer

folder = snapshot_download("{repo}")
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
embeddings = model.encode({captions}, tokenizer)
print(embeddings.shape)
```"""


def sections(facts: CardFacts) -> dict[str, str]:
    """Render all sections by name; a section without content is empty."""
    return {
        "about": "\n\n".join([f"# {facts.name}", facts.summary, *(f"**{words}**" for words in facts.shown)]),
        "use": _use(facts),
        "results": _results(facts.evaluations),
        "training": _training(facts),
        "limits": _limits(facts),
        "citation": f"## Citation\n\n{CITATION}",
    }


def _use(facts: CardFacts) -> str:
    snippets = ADAPTER if facts.is_adapter else {JOINT_TASK: JOINT, TEXT_TASK: TEXT}.get(facts.task, VISION)
    filled = snippets.format(
        repo=facts.repo,
        imports=EXAMPLE_IMPORT if facts.has_example else "",
        picture=EXAMPLE_PICTURE.format(repo=facts.repo) if facts.has_example else OWN_PICTURE,
        # A list with double quotes, as formatters write them.
        captions=json.dumps(list(facts.captions or CAPTIONS), ensure_ascii=False),
    )
    picture = f"\n\n![Example image]({EXAMPLE})" if facts.has_example else ""
    return f"## Use\n\n{filled}{picture}"


def _results(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return ""
    recalls = [row for evaluation in evaluations for row in _recall_rows(evaluation)]
    shares = [
        [evaluation.task, evaluation.title, name.replace("_", " "), f"{100 * value:.1f}"]
        for evaluation in evaluations
        for name, value in evaluation.compared.items()
        if not RECALL.search(name)
    ]
    parts = ["## Results"]
    if recalls or not shares:
        heads = ["task", "data", "direction", "R@1", "R@5", "R@10"]
        parts += ["Recall in percent.", markdown_table(heads, recalls, range(3))]
    if shares:
        heads = ["task", "data", "score", "value"]
        parts += ["Accuracy and other shares in percent.", markdown_table(heads, shares, range(3))]
    remarks = [line for evaluation in evaluations if (line := _remarks(evaluation))]
    return "\n\n".join([*parts, *(["\n".join(remarks)] if remarks else [])])


def _recall_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for direction, title in DIRECTIONS.items():
        names = [f"{direction}_{recall}" if direction else recall for recall in RECALLS]
        if all(name in evaluation.metrics for name in names):
            values = [f"{100 * evaluation.metrics[name]:.1f}" for name in names]
            rows.append([evaluation.task, evaluation.title, title, *values])
    return rows


def _remarks(evaluation: Evaluation) -> str:
    """Say how an evaluation was measured, and its ranks and counts, as an item of a list."""
    numbers = [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.1f}"
        for name, value in evaluation.remarks.items()
    ]
    parts = [part for part in (evaluation.protocol, ", ".join(numbers)) if part]
    return f"- {evaluation.task}, {evaluation.title}: {'; '.join(parts)}." if parts else ""


def _training(facts: CardFacts) -> str:
    parts = []
    if facts.merged:
        parts.append(facts.merged)
    elif facts.base_models:
        parts.append("Trained from: " + ", ".join(facts.base_models) + ".")
    if data := [*facts.datasets, *facts.sources]:
        parts.append("Trained on: " + "; ".join(data) + ".")
    if facts.recipe:
        settings = yaml.safe_dump(_plain(facts.recipe), sort_keys=True, allow_unicode=True)
        parts.append(f"Settings that differ from the defaults:\n\n```yaml\n{settings}```")
    if facts.has_curves:
        parts.append(f"![Training curves]({CURVES})")
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _limits(facts: CardFacts) -> str:
    uses = {
        JOINT_TASK: "Image-text retrieval and zero-shot image classification.",
        TEXT_TASK: "Embedding captions, mainly for an LLM2CLIP model whose adapter was trained with this LLM.",
    }.get(facts.task, "Embedding images, and as the vision tower of a multimodal LLM.")
    name = facts.license_name or facts.license
    name = f"[{name}]({facts.license_link})" if facts.license_link else name
    license_text = (
        f"The license of the weights is {name}."
        if name
        else "The license of the weights is not stated; see the licenses of the models that it was trained from."
    )
    if facts.base_licenses:
        license_text += f" It was made from: {', '.join(facts.base_licenses)}."
    caution = (
        "The model has the biases of its training data and of the models that it was trained from. Evaluate it on "
        "your own data before you use it. Do not use it to identify people or to make decisions about them."
    )
    code = "The model code is licensed under Apache-2.0."
    return f"## Intended use and limitations\n\n{uses} {caution}\n\n{license_text} {code}"
