"""The package as a whole: what it exports, what it loads, how it is written."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sphereopt as so

ROOT = Path(__file__).parent.parent


def test_the_public_names_are_these():
    assert sorted(so.__all__) == [
        "SphereAdam",
        "SphereLion",
        "SphereMuon",
        "SphereOptimizer",
        "SphereSGD",
        "Tracker",
        "constrain",
        "diagnostics",
        "find_spheres",
        "geometry",
        "manifold",
        "monitor",
        "moves",
        "nn",
        "optim",
        "param_groups",
        "report",
        "theory",
        "track",
    ]
    assert all(hasattr(so, name) for name in so.__all__)


def test_import_loads_nothing_optional():
    code = (
        "import sys, sphereopt; "
        "print([m for m in ('matplotlib', 'sklearn', 'rich', 'jinja2', 'pandas', 'geoopt') "
        "if m in sys.modules])"
    )
    bare = "import sys, torch; " + code.split("; ", 1)[1].replace("sphereopt", "torch")
    found = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, bare)
    ]
    assert found[0] == found[1]


MODULES = [
    importlib.import_module(m.name)
    for m in pkgutil.walk_packages(so.__path__, "sphereopt.")
    if not m.name.endswith("__main__")
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_public_name_says_what_it_is(module):
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), name


@pytest.mark.parametrize("path", sorted(ROOT.glob("sphereopt/**/*.py")), ids=lambda p: p.name)
def test_files_stay_under_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_the_base_class_stays_small():
    assert len(inspect.getsource(so.SphereOptimizer).splitlines()) < 250


def test_torch_is_what_the_constraints_say():
    pin = (ROOT / "constraints.txt").read_text().split("torch==")[1].split()[0]
    assert torch.__version__.split("+")[0] == pin
