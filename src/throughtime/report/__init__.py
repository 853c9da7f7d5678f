"""What is shown: words, pictures and pages, from numbers that were measured elsewhere."""
