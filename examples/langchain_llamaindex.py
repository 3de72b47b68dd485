"""Captions and pictures in LangChain and LlamaIndex, through SentenceTransformer.

python examples/langchain_llamaindex.py --query "a train on a single rail"

For captions, the classes of both libraries take the folder or Hub id as it is:
    langchain_huggingface.HuggingFaceEmbeddings(model_name=model, model_kwargs={"trust_remote_code": True})
    llama_index.embeddings.huggingface.HuggingFaceEmbedding(model_name=model, trust_remote_code=True)
The class below embeds pictures too. LangChain's stores take it in their place; a LlamaIndex index takes its rows, as
TextNode(text="photo.jpg", embedding=row), beside HuggingFaceEmbedding for the queries.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import load_dataset
from sentence_transformers import SentenceTransformer


class Embeddings:  # of captions (str) or PIL images, with the method names of LangChain and, last, of LlamaIndex
    def __init__(self, model: str) -> None:
        self.model = SentenceTransformer(model, trust_remote_code=True)

    def embed_documents(self, documents: list[Any]) -> list[list[float]]:
        return self.model.encode(documents, normalize_embeddings=True).tolist()

    def embed_query(self, query: Any) -> list[float]:
        return self.embed_documents([query])[0]

    embed_image = embed_documents
    get_text_embedding_batch = get_image_embedding_batch = embed_documents
    get_text_embedding = get_query_embedding = get_image_embedding = embed_query


def nearest(query: list[float], rows: list[list[float]], top: int = 3) -> list[tuple[float, int]]:
    scores = [sum(a * b for a, b in zip(query, row, strict=True)) for row in rows]
    return sorted(((score, row) for row, score in enumerate(scores)), reverse=True)[:top]


def main() -> None:
    parser = argparse.ArgumentParser(description="LangChain- and LlamaIndex-style search for pictures.")
    parser.add_argument("--model", default="runs/quickstart/llm2clip", help="Hub id or folder (%(default)s)")
    parser.add_argument("--query", default="a train on a single rail", help="what to look for (%(default)s)")
    arguments = parser.parse_args()
    if not Path(arguments.model).is_dir() and arguments.model.count("/") != 1:
        parser.error(f"no model in {arguments.model}: run `make quickstart`, or give --model a folder or Hub id")
    embeddings = Embeddings(arguments.model)
    data = load_dataset(str(Path(__file__).parent / "data" / "concepts"), split="test")
    shelf, other = data.select(range(0, len(data), 3)), data[214]
    pictures = embeddings.embed_image(shelf["image"][:])
    for title, query in ((arguments.query, arguments.query), (f"[a drawing of: {other['caption']}]", other["image"])):
        print(title)
        for score, row in nearest(embeddings.embed_query(query), pictures):
            print(f"  {score:.3f}  {shelf['caption'][row]}")


if __name__ == "__main__":
    main()
