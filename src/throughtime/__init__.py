"""Recurrent networks, written as equations, trained through time, seen through time."""
