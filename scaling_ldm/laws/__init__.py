"""Scaling laws: minima of isoFLOP curves, forms, fits, and published laws as data.

`fit` is the public module. float64 numpy and scipy, no jax. May import: records.
"""
