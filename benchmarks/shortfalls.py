"""Why a row misses its goal, and what was tried: shown below the table while it does."""

SHORTFALLS: dict[str, str] = {
    "R2": "reached against llm2vec as it comes. In batches of 8, which few users will choose, its padding shrinks too, and "
    "its own limit is near: the matrix products alone took 0.68 of its time and ours 0.81. Batches of 256 to 2,048 "
    "tokens, with and without packing, were tried; 512 is the best, with 2.7 % padding, and 86 % of its time are matrix "
    "products.",
    "R3": "the code in the folder packs the captions of a batch for sentence-transformers too, which took it from 1.77 to "
    "1.18 of our time; the matrix products alone take 0.71 of the packed time. Against its batches without that the "
    "goal is reached.",
}
