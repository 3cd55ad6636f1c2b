"""``python -m benchmarks``: :mod:`benchmarks.side_by_side` (a module of its own, which the processes that weigh can import)."""

from benchmarks.side_by_side import main

if __name__ == "__main__":
    main()
