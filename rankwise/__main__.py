"""`python -m rankwise`: the command line, in the form that torchrun starts."""

from rankwise.cli import main

if __name__ == "__main__":
    main()
