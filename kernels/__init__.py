"""Floor 3: one file per op: reference, refusal, emitters, launch, cases."""
