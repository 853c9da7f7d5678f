"""`python -m throughtime.cli`, where the command itself is not on the path."""

from throughtime.cli import main

main()
