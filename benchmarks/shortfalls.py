"""Why rows miss their goals and what was tried; printed below the table for rows that miss one."""

SHORTFALLS: dict[str, str] = {
    "R1": "in training, timm takes 1.13 (L/14) and 1.24 (B/16) of the time of the matrix products alone on this Intel "
    "processor, and ours takes 1.13 and 1.22: where products are fast, the operations between them weigh more. "
    "On an AMD EPYC, timm takes 1.02 and 1.06, so that 0.95 of its time is less than the products take; ours "
    "takes 1.02 and 1.09. Runs vary with the cost of fresh memory: three runs of B/16 on the EPYC gave 0.96, "
    "0.97 and 1.02 of timm's time. Tried: rotary positions as a complex product (less than a third of their "
    "former time, forward and backward), no copy of the attention output, half of timm's fresh memory.",
    "R2": "reached against llm2vec with its defaults. With batches of 8, its fastest, its padding shrinks too, and "
    "the matrix products alone are 0.6 of its time (0.71 on an AMD EPYC); ours takes 1.3 of them (1.15 there), "
    "most of the rest inside the decoder of transformers (attention, norms, rotary positions). Tried: batches "
    "of 256 to 2,048 tokens, with and without packing; with 512, padding is 2.7%. Keeping freed memory instead "
    "of requesting fresh pages for every layer reduced 0.86 to 0.82 on the EPYC.",
    "R3": "the code in the folder packs the captions of a batch for sentence-transformers too, which reduces its time "
    "from 1.7 to 1.2 of ours; against its batches without packing the goal is reached.",
    "R5": "reached in memory. The matrix products alone take 0.59 of the time of the plain loss on an AMD EPYC, and "
    "ours takes 1 to 6% more than they do: one pass over tiles that fit into the cache, products in columns of "
    "512. Tried: tiles of 256 to 1,024 rows; the other passes in columns too, without a gain.",
    "R6": "reached in memory. The activations of a chunk are computed twice, which is 1.32 of the arithmetic of the "
    "direct step; 1.2 of its time is therefore possible only where its 3.8 GiB of fresh memory cost time. They "
    "do not on this Intel processor, where ours takes 1.06 of that arithmetic; on an AMD EPYC three runs gave "
    "0.80, 0.95 and 1.22. Checkpointing recomputes as much, in larger matrix products; only the last chunk is "
    "not computed twice. Larger chunks miss the goal for memory.",
    "R7": "at 5k x 25k, one matrix product alone is 0.038 of the time of CLIP_benchmark on an AMD EPYC. Both "
    "directions come from one product; the rest (counting, gathering, checks) is a tenth of the time. Tried: "
    "tiles of 256 and 512 rows x 512 and 1,024 columns, for the product alone and with the counting.",
    "R8": "the saved image processor prepares the images, whatever it costs, so that nothing else decides on their "
    "pixels: beside it, ours takes no time. It converts each image to an array and back, 1.24 of the time of "
    "open_clip on an AMD EPYC; our own steps, until November 2026, took 0.96 (fast: 0.53 now, 0.34 then). The crop of "
    "training is ours, and works on the decoded image. Tried for fast: decoding at a reduced size, see the notes.",
    "R11": "the matrix product of torch (MKL) alone takes as long as the whole search of faiss (OpenBLAS): 0.97 of it "
    "here, 1.06 on an AMD EPYC; selecting the best adds a third (a tenth there). Tried: tiles of 256 to 1,000 "
    "queries x 256 to 32,768 candidates, products in columns of 512 to 2,048, both orders of the product and of "
    "the selection, groups of 8 to 64 candidates, a transposed copy, numpy's product. The product of oneDNN is "
    "10% faster on the EPYC, but torch offers it for float32 only through a private function.",
    "R12": "the import of AutoModel alone is 0.66 of the time of sentence-transformers on an AMD EPYC; loading the "
    "model from its folder and both embeddings add 8% to it.",
    "R15": "a seventh of the time and half of the memory that are allowed. Against faiss: ours writes the rows and "
    "their embeddings to the disk, with digests and an index of the conditions' column, and then trains on what it "
    "reads again; faiss keeps vectors alone, in memory.",
}
