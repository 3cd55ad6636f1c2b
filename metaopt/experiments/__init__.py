"""The papers' experiments: one module each, with its settings and its ``run``."""
