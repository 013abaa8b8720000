"""What each aten operation does to degrees of homogeneity.

A rule is a function of the run and the call that returns the degree of the result (or a sequence of
them; None stands for degree zero), after asking for the equations that this takes. An operation
that is in none of these tables must have inputs of degree zero. To add one, add a row.
"""

from __future__ import annotations

from collections.abc import Mapping

from sphereopt.detect.propagate import Rule

from . import contractions, elementwise, movement, normalizations, reductions

RULES: Mapping[str, Rule] = {
    **movement.RULES,
    **elementwise.RULES,
    **reductions.RULES,
    **contractions.RULES,
    **normalizations.RULES,
}

#: Operations that only move entries.
MOVING = frozenset(movement.RULES)

__all__ = ["MOVING", "RULES"]
