"""Runs: what makes a run folder of a configuration, and what a finished one can do."""
