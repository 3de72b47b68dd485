"""Why a row misses its goal, and what was tried: shown below the table while it does."""

SHORTFALLS: dict[str, str] = {
    "R2": "reached against llm2vec as it comes. In batches of 8 its padding shrinks too, and the limit is near: the matrix "
    "products alone took 0.68 of its time, ours 0.81. Batches of 256 to 2,048 tokens, with and without packing, were "
    "tried; with 512 the padding is 2.7 % and 86 % of the time are matrix products.",
    "R3": "the code in the folder packs the captions of a batch for sentence-transformers too, which took it from 1.78 "
    "to 1.17 of our time; the matrix products alone take about 0.7 of its packed time. Against its batches without "
    "that the goal is reached.",
}
