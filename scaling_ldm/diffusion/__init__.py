"""Diffusion: noise schedules, predictions, losses and samplers.

`noise` gives signal and noise at a time. `prediction` converts what networks predict.
`losses` holds training losses and likelihoods, `samplers` draws samples. Every function
takes any network as a callable. May import: flops, models.
"""
