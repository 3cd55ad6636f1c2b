"""``python -m metaopt`` is the command line."""

from metaopt.cli import main

if __name__ == "__main__":
    main()
