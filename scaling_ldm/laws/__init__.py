"""Scaling laws: minima of isoFLOP curves, power laws, the parametric surface.

`fit` is the public module. `points` reads the input, `isoflop_curve` the runs of one
budget. `curve_models` fits parabolas or curves of one shape (`shared_shape`, by
`separable` least squares), `estimators` has every way to a minimum, `curve_noise` draws
the noise of runs, and what budgets share of it is from `shared_noise`. `minima` puts
them together, `estimates` sets all estimators side by side. `law_of_minima` and
`offset_law` fit laws through the minima, `checked_laws` holds them against the largest
budget. `forms` fits a power law and `surface` the loss over N and D. `best_rates` fits
best learning rates, and `rates` the law that they follow. `comparison` holds the laws
of two sets of runs against each other: `compared_minima` finds the minima of both,
`compared_lines` fits the lines, `comparison_summary` says it. `fitted_rows` chooses the
rows of a table. `summary` writes a fit as lines of text, `published` holds the laws of
papers as data, `converted` in one convention. `planning` says what laws mean for one
budget, `advice` what to train, and `narrate` says it in lines. Everything is float64
numpy and scipy. No jax is imported.

May import: records.
"""

from scaling_ldm.laws import fit

__all__ = ["fit"]
