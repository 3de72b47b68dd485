"""Why a row misses its goal, and what was tried: shown below the table while it does."""

SHORTFALLS: dict[str, str] = {
    "R1": "in training timm takes 1.05 (L/14) and 1.22 (B/16) of the matrix products alone, ours 1.04 and 1.18, so "
    "that 0.95 of timm is near them. Beside them our tower has the norms, SiLU, the sums of the biases, one "
    "pass of rotary positions and the activations' fresh memory left. Tried: rotary positions as a complex "
    "product (under a third of their former time, forward and backward), no copy of the attention's output, "
    "half of timm's fresh memory.",
    "R2": "reached against llm2vec as it comes. In batches of 8, its fastest, its padding shrinks too, and the matrix "
    "products alone are 0.69 of its time. Batches of 256 to 2,048 tokens, with and without packing, were tried; "
    "with 512 the padding is 2.7 % and 86 % of the time are matrix products.",
    "R3": "the code in the folder packs the captions of a batch for sentence-transformers too, which takes it from "
    "1.8 to 1.2 of our time; against its batches without that the goal is reached.",
    "R5": "reached in memory. The matrix products alone take 0.59 of the plain loss's time, ours takes 6 % more than "
    "they do: one pass over tiles that fit the cache. On a machine where the peer is slower (it took 1.8 times "
    "as long where the goal was set) the ratio is lower.",
    "R6": "a chunk's activations are made twice, which is 1.32 of the direct step's arithmetic; the time is less "
    "since the direct step pays for 3.8 GiB of fresh memory, and how much that is depends on what else the "
    "machine does (0.91 and 0.94 beside another job, 1.22 alone). Larger chunks miss the memory. "
    "Checkpointing computes as much again, in larger matrix products.",
    "R7": "at 5k x 25k one matrix product alone is 0.034 of CLIP_benchmark's time. Both directions come out of one "
    "product now, and what is beside it (counting, gathering, checks) is a fifth of the time.",
    "R11": "torch's matrix product (MKL) alone is 1.06 of faiss' whole search (OpenBLAS) on this AMD processor, and "
    "choosing adds to that. Tried: tiles of 256 to 1,000 queries x 256 to 32,768 candidates, both orders of the "
    "product, a transposed copy, numpy's product. oneDNN's is 10 % faster, but torch has it for float32 in a "
    "private function only.",
}
