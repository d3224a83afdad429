"""An independent check of a finished run: it shares no arithmetic with the bounds that made the records.

The model is read as dense matrices (`reading`) and activations as their own formulas (`functions`); what is cheap to
prove is proved anew (`proof`), what is not is computed anew (`reference`) or attacked (`search`), and what a record
says without a proof is looked up again (`claims`). `verify` puts the verdicts together.
"""
