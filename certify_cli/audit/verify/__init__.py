"""An independent check of a finished run, which shares no arithmetic with the bounds that made the records.

The model is read as dense matrices (`reading`) and its activations as torch's own functions (`functions`). Radii are
proved where that is cheap (`proof`, on `prover` and `remainders`), recomputed for a share (`reference`), and attacked
(`search`); statements that need no proof are checked against the model and the data (`claims`, `replay`). `verify` puts
the outcomes together.

Why it is built so: a fault in the bounds must not be able to confirm itself. The room therefore imports nothing of
bounds/ or certificates/, derives the theorems in their simplest form, and prefers slow and short code. Its proofs may
reach less far than the bounds. A method that has no proof rule here is recomputed and attacked, never contradicted for
that.
"""
