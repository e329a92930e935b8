"""`python -m qmerge`: the command line."""

from qmerge.cli import main

if __name__ == "__main__":
    main()
