"""Models of other libraries: read as our layers, and our layers written as theirs."""
