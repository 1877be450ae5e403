"""Diffusion: noise schedules, predictions, objectives and samplers.

`noise` gives signal and noise at a time. `prediction` converts what networks predict.
`objectives` are losses and likelihoods, `samplers` draw samples. Every function takes
any network as a callable. May import: config, records, flops, models.
"""
