"""Losses that training minimises, and measures on held-out pictures.

`denoise` and `reconstruct` are training losses, of a diffusion model and of an
autoencoder. `validation` is the held-out loss of a run. `vlb` and `ode_likelihood` give
bits per dim; `likelihood` and `ode_solvers` hold what they share. Every function takes
any network as a callable. The modules are the public names.

May import: models, and the rest of diffusion.
"""
