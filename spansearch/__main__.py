"""``python -m spansearch``: the command line."""

from spansearch.cli.main import main

if __name__ == "__main__":
    main()
