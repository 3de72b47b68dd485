"""Why a row misses its goal, and what was tried: shown below the table while it does."""

SHORTFALLS: dict[str, str] = {
    "R1": "on L/14 timm itself takes only 2 to 13% more than the matrix products alone (on a loaded machine), so that "
    "0.95 of its training time is about their own. Beside them our tower has the norms, SiLU, the sums of the biases "
    "and one pass of rotary positions left. Tried: rotary positions as a complex product (under a third of their "
    "former time, forward and backward), no copy of the attention's output, half of timm's fresh memory.",
}
