"""Doctests say ``sphereopt`` and ``torch`` without importing them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sphereopt


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, sphereopt=sphereopt, so=sphereopt)
