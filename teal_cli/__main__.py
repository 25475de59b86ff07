"""`python -m teal_cli`."""

from teal_cli.cli import main

if __name__ == "__main__":
    main()
