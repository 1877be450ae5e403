"""Diffusion: noise schedules, predictions, losses and samplers.

`noise` gives signal and noise at a time. `prediction` converts what networks predict.
`losses` has those of training and likelihoods, `samplers` draw samples. Every function
takes any network as a callable. May import: config, records, flops, models.
"""
