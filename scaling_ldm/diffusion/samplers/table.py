"""A sampler as a table: what one compiled loop does with each evaluation; numpy only.

Every solver here, of one stage or several, of one step or several, combines the same
few arrays linearly. The loop keeps

    x    where the network is evaluated next,
    s    a saved state: the start of a step of several stages, a corrected state,
    m_k  what the network said k evaluations ago (m_0 just now), as x0 or as epsilon,
    z    fresh standard normal noise,

and a row of the table says: evaluate at time t, then

    x <- x_x x + x_s s + sum_k x_m[k] m_k + x_z z
    s <- s_x x + s_s s + sum_k s_m[k] m_k            (both from the values before).

So a solver is the function that writes its coefficients from the points of a grid, in
float64, and steps, grid, schedule, order and prediction kind are data to the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scaling_ldm.diffusion.samplers.grids import GridPoint

HISTORY = 4  # most evaluations that a solver may combine


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
    ends_step: bool  # x is then the state at a point of the grid
    log_variance: tuple[float, float] | None  # bounds, where the network chooses x_z


@dataclasses.dataclass(kw_only=True)
class SolverTable:
    """Rows in order, and what they need.

    Attributes:
      form: "x0" or "epsilon", what m_k is.
      history: how many of the m_k are kept; at most HISTORY.
      saves: whether s is used.
      stochastic: whether z is used.
      learned_variance: whether the network gives z's size, in a second half of its
        channels.
    """

    form: str = "x0"
    history: int = 1
    saves: bool = False
    stochastic: bool = False
    learned_variance: bool = False
    rows: list[Row] = dataclasses.field(default_factory=list)

    def add(
        self,
        at: GridPoint,
        to: GridPoint,
        *,
        x: float = 0.0,
        s: float = 0.0,
        m: Sequence[float] = (),
        z: float = 0.0,
        save: bool | tuple[float, float, Sequence[float]] = False,
        ends_step: bool = True,
        log_variance: tuple[float, float] | None = None,
    ) -> None:
        """One evaluation at `at`, after which x is at `to`.

        Args:
          x, s, m, z: the coefficients of the new x; m newest first.
          save: True keeps x as it was evaluated in s; a tuple gives the coefficients of
            the new s; False leaves s alone.
          ends_step: False for the stages inside a step.
          log_variance: log variances between which a network that learned them chooses;
            then z is 1 or 0.
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
        """How many rows are done at the end of each step, int [steps]."""
        return 1 + np.flatnonzero([row.ends_step for row in self.rows])
