"""The coefficients of a solver, one row per evaluation; numpy only.

Every solver here combines the same few arrays linearly, whatever its stages and steps.
The compiled loop keeps

    x    where the network is evaluated next,
    s    a saved state: the start of a step of several stages, or a corrected state,
    m_k  the prediction of k evaluations ago (m_0 is the latest), as x0 or as epsilon,
    z    new standard normal noise.

An x0_transform limits each m_0. A table that is `unlimited` has in m_1 the same
prediction before that.

A row of the table means: evaluate at time t, then

    x <- x_x x + x_s s + sum_k x_m[k] m_k + x_z z
    s <- s_x x + s_s s + sum_k s_m[k] m_k            (both from the values before).

So a solver is a function that computes its coefficients from the points of a grid, in
float64. Steps, grid, schedule, order and prediction are data for the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scaling_ldm.diffusion.samplers.time_grid import GridPoint

HISTORY = 4  # the most evaluations that a solver may combine


Coefficients = Sequence[float] | np.ndarray


class Row(NamedTuple):
    """One evaluation, and the update after it."""

    at: GridPoint  # where the network is evaluated
    to: GridPoint  # where x is after the update
    x_x: float
    x_s: float
    x_m: tuple[float, ...]  # newest first
    x_z: float
    s_x: float
    s_s: float
    s_m: tuple[float, ...]
    ends_step: bool  # whether a step ends here, with x at a point of the grid
    log_variance: tuple[float, float] | None  # bounds, if the network predicts it


@dataclasses.dataclass(kw_only=True)
class SolverTable:
    """Rows in order, and what they use.

    Attributes:
      form: "x0" or "epsilon", what m_k is.
      history: how many of the m_k are kept; at most HISTORY.
      saves: whether s is used.
      stochastic: whether z is used.
      unlimited: whether m_1 is the latest prediction without the x0_transform.
      learned_variance: whether the network predicts the size of z, in a second half of
        its channels.
    """

    form: str = "x0"
    history: int = 1
    saves: bool = False
    stochastic: bool = False
    unlimited: bool = False
    learned_variance: bool = False
    rows: list[Row] = dataclasses.field(default_factory=list)

    def add(
        self,
        at: GridPoint,
        to: GridPoint,
        *,
        x: float = 0.0,
        s: float = 0.0,
        m: Coefficients = (),
        z: float = 0.0,
        save: bool | tuple[float, float, Coefficients] = False,
        ends_step: bool = True,
        log_variance: tuple[float, float] | None = None,
    ) -> None:
        """Adds one evaluation at `at`, after which x is at `to`.

        Args:
          x, s, m, z: the coefficients of the new x; m newest first.
          save: True puts the evaluated x into s; a tuple gives the coefficients of the
            new s; False leaves s as it is.
          ends_step: False for the stages inside a step.
          log_variance: for a learned variance, the two log variances between which the
            network chooses. The noise then has the chosen standard deviation times z,
            so z is 1, or 0 for no noise.

        Raises:
          ValueError: the row uses more than the table says.
        """
        if save is True:
            save = (1.0, 0.0, ())
        elif save is False:
            save = (0.0, 1.0, ())
        if max(len(m), len(save[2])) > self.history:
            raise ValueError(f"{len(m)} predictions, but {self.history} are kept")
        if (s and not self.saves) or (z and not self.stochastic):
            raise ValueError("a row uses what its table says is not used")
        self.rows.append(
            Row(
                at=at,
                to=to,
                x_x=x,
                x_s=s,
                x_m=tuple(m),
                x_z=z,
                s_x=save[0],
                s_s=save[1],
                s_m=tuple(save[2]),
                ends_step=ends_step,
                log_variance=log_variance,
            )
        )

    @property
    def step_ends(self) -> np.ndarray:
        """The number of rows done at the end of each step, int [steps]."""
        return 1 + np.flatnonzero([row.ends_step for row in self.rows])
