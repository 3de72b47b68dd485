"""Instructions of known text pair data sets, by name."""

from __future__ import annotations

from typing import Literal, get_args

InstructionTable = Literal["e5"]

# The data sets of E5-mistral (Wang et al. 2024, arXiv:2401.00368, appendix), under the file names of echo-data.
E5 = {
    "allnli_split1": "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "allnli_split2": "Retrieve semantically similar text",
    "dureader": "Given a Chinese search query, retrieve web passages that answer the question",
    "eli5_question_answer": "Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",
    "fever": "Given a claim, retrieve documents that support or refute the claim",
    "hotpot_qa": "Given a multi-hop question, retrieve documents that can help answer the question",
    "miracl": "Given a question, retrieve Wikipedia passages that answer the question",
    "mrtydi": "Given a question, retrieve Wikipedia passages that answer the question",
    "msmarco_document": "Given a web search query, retrieve relevant documents that answer the query",
    "msmarco_passage": "Given a web search query, retrieve relevant passages that answer the query",
    "nq": "Given a question, retrieve Wikipedia passages that answer the question",
    "quora_duplicates_split1": (
        "Given a question, retrieve questions that are semantically equivalent to the given question"
    ),
    "quora_duplicates_split2": "Find questions that have the same meaning as the input question",
    "squad": "Retrieve Wikipedia passages that answer the question",
    "t2ranking": "Given a Chinese search query, retrieve web passages that answer the question",
    "trivia_qa": "Retrieve Wikipedia passages that answer the question",
}


def instruction_from(table: InstructionTable, name: str) -> str:
    """Return the instruction of a data set, which ends in `; ` as in the original.

    Raises:
        ValueError: There is no such table, or it does not have the data set.
    """
    if table not in get_args(InstructionTable):
        raise ValueError(f"instruction_table must be one of {', '.join(get_args(InstructionTable))}, not {table!r}.")
    if name not in E5:
        raise ValueError(
            f"the instruction table {table} has no data set {name!r}; set `label` to one of {', '.join(E5)}, or set "
            "`instruction`."
        )
    return f"{E5[name]}; "
