"""One file per target; each offers `refusal`, `forward` and `backward` (see engine/recurrence.py)."""
