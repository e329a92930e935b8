"""GPTQ as pure functions on tensors."""

from __future__ import annotations

from qmerge.gptq.factor import Factor, factor
from qmerge.gptq.grid import Grid, GridSpec
from qmerge.gptq.hessian import Hessian, output_squares
from qmerge.gptq.solver import Solution, solve
from qmerge.gptq.target import Drift, aim
from qmerge.gptq.update import Update, expressible, solve_update

__all__ = [
    "Drift",
    "Factor",
    "Grid",
    "GridSpec",
    "Hessian",
    "Solution",
    "Update",
    "aim",
    "expressible",
    "factor",
    "output_squares",
    "solve",
    "solve_update",
]
