"""From files and arrays to batches: reading, splitting, scaling, numbering."""
