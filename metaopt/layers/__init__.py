"""Layers that torch differentiates twice wrongly or slowly: the same numbers, other derivatives."""
