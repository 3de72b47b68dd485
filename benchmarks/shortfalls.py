"""Why rows miss their goals and what was tried; printed below the table for rows that miss one."""

SHORTFALLS: dict[str, str] = {
    "R1": "in training timm takes 1.13 (L/14) and 1.24 (B/16) of the matrix products alone on this Intel processor, "
    "and ours 1.13 and 1.22: where the products are fast, what is between them weighs more. On an AMD EPYC "
    "timm takes 1.02 and 1.06 of them, so that 0.95 of its time is less than they take, and ours 1.02 and "
    "1.09. Runs differ by what fresh memory costs: with B/16, three of them on the EPYC gave 0.96, 0.97 and "
    "1.02 of timm's time. Tried: rotary positions as a complex product (under a third of their former time, "
    "forward and backward), no copy of the attention's output, half of timm's fresh memory.",
    "R2": "reached against llm2vec as it comes. In batches of 8, its fastest, its padding shrinks too, and the "
    "matrix products alone are 0.6 of its time (0.71 on an AMD EPYC); ours takes 1.3 of them (1.15 there), "
    "most of the rest inside transformers' decoder (attention, norms, rotary positions). Tried: batches of "
    "256 to 2,048 tokens, with and without packing; with 512 the padding is 2.7 %. Keeping freed memory "
    "instead of fetching fresh pages for every layer took 0.86 to 0.82 on the EPYC.",
    "R3": "the code in the folder packs the captions of a batch for sentence-transformers too, which takes it from "
    "1.7 to 1.2 of our time; against its batches without that the goal is reached.",
    "R5": "reached in memory. The matrix products alone take 0.59 of the plain loss's time on an AMD EPYC, ours "
    "takes 1 to 6 % more than they do: one pass over tiles that fit the cache, products in columns of 512. "
    "Tried: tiles of 256 to 1,024 rows, and the other passes in columns too, which gains nothing.",
    "R6": "reached in memory. A chunk's activations are made twice, which is 1.32 of the direct step's arithmetic, "
    "so that 1.2 of its time is in reach only where its 3.8 GiB of fresh memory cost time: not on this Intel "
    "processor, where ours takes 1.06 of that arithmetic; on an AMD EPYC three runs gave 0.80, 0.95 and 1.22. "
    "Checkpointing computes as much again, in larger matrix products; only the last chunk is not computed "
    "twice. Larger chunks miss the memory.",
    "R7": "at 5k x 25k one matrix product alone is 0.038 of CLIP_benchmark's time on an AMD EPYC. Both directions "
    "come out of one product, and what is beside it (counting, gathering, checks) is a tenth of the time. "
    "Tried: tiles of 256 and 512 rows x 512 and 1,024 columns for the product alone and for the counting too.",
    "R8": "reached in the exact modes, and in fast on an AMD EPYC (0.34). Decoding by Pillow alone is 0.31 of "
    "open_clip's time on this Intel processor; ours takes 1.4 of that for decoding and resizing, 1.25 on the "
    "EPYC. Tried: decoding at a reduced size, see the notes.",
    "R11": "torch's matrix product (MKL) alone takes as long as faiss' whole search (OpenBLAS; 0.97 of it here, 1.06 "
    "on an AMD EPYC), and choosing adds a third to that (a tenth there). Tried: tiles of 256 to 1,000 queries "
    "x 256 to 32,768 candidates, products in columns of 512 to 2,048, both orders of the product and of the "
    "choice, groups of 8 to 64 candidates, a transposed copy, numpy's product. oneDNN's is 10 % faster on the "
    "EPYC, but torch has it for float32 in a private function only.",
}
