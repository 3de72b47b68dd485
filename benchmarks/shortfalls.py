"""Why a row misses its goal, and what was tried: shown below the table while it does."""

SHORTFALLS: dict[str, str] = {
    "R7": "at 5k x 25k one matrix product alone is 0.035 of CLIP_benchmark's time. Both directions come out of one "
    "product now, and everything beside it (counting, gathering, checks) is an eighth of the time.",
    "R11": "torch's matrix product (MKL) alone is 1.1 x faiss' whole search (OpenBLAS) on this AMD processor, and "
    "choosing adds to that. Tried: tiles of 256 to 1,000 queries x 256 to 32,768 candidates, both orders of the "
    "product, a transposed copy, numpy's product. oneDNN's is 10 % faster, but torch has it for float32 in a private "
    "function only.",
}
