"""`python -m hpcfl`."""
from hpcfl.cli import main

main()
