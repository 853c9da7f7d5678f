"""One file per target; each offers `refusal`, `forward`, `backward`, `workspace_shapes` (see engine/recurrence.py)."""
