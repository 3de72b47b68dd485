"""Caption retrieval accuracy (CRA) of a text encoder, from embeddings, for the evaluate library."""

# evaluate parses these lines to find the required packages; it understands one import per line.
import datasets
import evaluate
import torch

from llm2clip.evaluation import caption_retrieval_metrics

DESCRIPTION = """Caption retrieval accuracy (CRA) of LLM2CLIP, arXiv 2411.04997: the share of queries
whose nearest candidate caption, by cosine similarity, is the other caption of the same image. Ties count by their
expected value."""

INPUTS = """
Args:
    predictions: Embeddings of the queries: one caption of each image.
    references: Embeddings of the candidates: another caption of each image, in the same order.
    ks: Values of k for recall@k; (1, 5, 10) by default.
Returns:
    `caption_retrieval_accuracy` (0 to 1), `recall@K`, `mean_rank` and `median_rank` (from 1), `num_queries`.
Examples:
    >>> metric = evaluate.load(metric_path("caption_retrieval_accuracy"))
    >>> metric.compute(predictions=first_captions, references=second_captions)
"""
CITATION = """@article{huang2024llm2clip,
  title={LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation},
  author={Huang, Weiquan and Wu, Aoqi and Yang, Yifan and Luo, Xufang and Yang, Yuqing and Hu, Liang and Dai, Qi and
    Dai, Xiyang and Chen, Dongdong and Luo, Chong and Qiu, Lili},
  journal={arXiv preprint arXiv:2411.04997},
  year={2024}
}"""
EMBEDDING = datasets.Sequence(datasets.Value("float32"))


class CaptionRetrievalAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": EMBEDDING, "references": EMBEDDING}),
        )

    def _compute(self, predictions, references, ks=(1, 5, 10)):
        metrics = caption_retrieval_metrics(torch.tensor(predictions), torch.tensor(references), ks=sorted({1, *ks}))
        # Rows are pairs: there are as many targets as queries.
        del metrics["num_targets"]
        accuracy = metrics["recall@1"] if 1 in ks else metrics.pop("recall@1")
        return {"caption_retrieval_accuracy": accuracy, **metrics}
