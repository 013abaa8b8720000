"""Other libraries, shown doing what the tests say of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest


@contextmanager
def peer(package: str, seen_in: str) -> Iterator[None]:
    """Hold a package to what we say of it, in the version we saw; skip if a later one differs.

    A peer may mend its bug: what ours does is asserted before, outside this block.
    """
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        if version(package) == seen_in:
            raise
        pytest.skip(f"ours passed; {package} {version(package)} is not {seen_in}: {error}")
