"""Why a row misses its goal, and what was tried: shown below the table while it does."""

SHORTFALLS: dict[str, str] = {
    "R1": "on L/14 timm itself takes only 2 to 13% more than the matrix products alone (on a loaded machine), so that "
    "0.95 of its training time is about their own. Beside them our tower has the norms, SiLU, the sums of the biases "
    "and one pass of rotary positions left. Tried: rotary positions as a complex product (under a third of their "
    "former time, forward and backward), no copy of the attention's output, half of timm's fresh memory.",
    "R7": "at 5k x 25k one matrix product alone is 0.035 of CLIP_benchmark's time. Both directions come out of one "
    "product now, and everything beside it (counting, gathering, checks) is an eighth of the time.",
    "R11": "torch's matrix product (MKL) alone is 1.1 x faiss' whole search (OpenBLAS) on this AMD processor, and "
    "choosing adds to that. Tried: tiles of 256 to 1,000 queries x 256 to 32,768 candidates, both orders of the "
    "product, a transposed copy, numpy's product. oneDNN's is 10 % faster, but torch has it for float32 in a private "
    "function only.",
}
