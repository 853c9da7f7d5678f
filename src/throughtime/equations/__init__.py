"""The blackboard: cells as equations, and their derivatives. Needs neither torch nor NumPy."""
