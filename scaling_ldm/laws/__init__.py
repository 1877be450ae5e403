"""Scaling laws: minima of isoFLOP curves, power laws, the parametric surface.

`fit` is the public module. `points` reads the input, `minima` fits a parabola per
budget, with noise that budgets share from `shared_noise`. `law_of_minima` and
`offset_law` fit laws through the minima, `checked_laws` holds them against the largest
budget. `forms` fits a power law and `surface` the loss over N and D. `best_rates` fits
best learning rates, and `rates` the law that they follow. `comparison` holds the laws
of two sets of runs against each other: `compared_minima` finds the minima of both,
`compared_lines` fits the lines, `comparison_summary` says it. `fitted_rows` chooses the
rows of a table. `summary` writes a fit as lines of text, `published` holds the laws of
papers as data. Everything is float64 numpy and scipy. No jax is imported.

May import: records.
"""

from scaling_ldm.laws import fit

__all__ = ["fit"]
