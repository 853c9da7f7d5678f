"""How a recurrence runs: one operation that torch sees, and the targets that carry it out."""
