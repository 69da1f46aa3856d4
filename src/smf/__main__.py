"""`python -m smf`: the same as the command `smf`."""

from .cli import main

if __name__ == "__main__":
    main()
