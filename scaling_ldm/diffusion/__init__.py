"""Diffusion: noise, what is predicted, what is minimised, and how one samples.

Every function takes any network as a callable. May import: config, records, flops,
models.
"""
