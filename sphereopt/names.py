"""Names of parameters: under wrappers, and misspelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["did_you_mean", "plain"]


def plain(name: str) -> str:
    """Return the name without what DDP and ``torch.compile`` put in front of it.

    Example:
        >>> plain("module._orig_mod.conv1.weight")
        'conv1.weight'
    """
    return name.replace("_orig_mod.", "").removeprefix("module.")


def did_you_mean(name: str, known: Iterable[str], first: Sequence[str] = ()) -> str:
    """Return the end of an error message: what was probably meant, or nothing.

    Args:
        name: What was asked for.
        known: The names there are.
        first: What was meant, if that is known.

    Example:
        >>> did_you_mean("conv.weight", ["conv1.weight", "fc.bias"])
        "; did you mean 'conv1.weight'?"
        >>> did_you_mean("x", ["conv1.weight"])
        ''
    """
    near = first or difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
