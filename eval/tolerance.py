"""How far logits may be from the source model's; docs/tolerances.md derives the numbers and records what was measured.

The yardstick is the model's own: the error that its logits get when the source model itself rounds its activations where the
program does (`Step.expected`). Energies are squares of relative errors |m - r| / |r - mean r|.
"""

from __future__ import annotations

# Limits of energy over expected energy. `TYPICAL` is for the geometric mean over the first positions; `ROWS` for that of K, and of V, rows
# of any one layer; `LATE` for that of logits over the late positions, which are few; `WORST` for any single position's logits against
# the larger of its own and the mean expected energy.
TYPICAL = 2.7
ROWS = 3.0
LATE = 5.0
WORST = 50.0
# What fp32 arithmetic in another order may do: the expected error is never taken to be smaller. sqrt(2.7) of it stays below 1e-4.
FP32_ERROR = 6e-5
# A model whose own rounding moves its logits further than this (root mean square) cannot be judged in that dtype.
MAX_EXPECTED = {"bf16": 0.1, "fp16": 0.0125, "fp32": 1e-4}
# Two logits of the source closer than this many expected errors (in standard deviations of its logits) are a near tie.
TIE = 4.0
# As many tokens may differ at near ties as rounding makes differ in all but this share of correct programs (eval/ties.py).
TIE_RARITY = 1e-4
