"""What can be learnt: a file for each task."""
