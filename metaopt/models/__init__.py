"""See the house map in CONTRIBUTING.md."""
