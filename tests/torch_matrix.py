"""torch's own optimizer matrix, run on the optimizers of this package.

A column is an optimizer on ordinary parameters, on spheres of fixed radius, or on spheres of free
radius; a row is a test of PyTorch's ``test/test_optim.py``, under its name there. What does not
apply has its reason here, and the tests, and the page ``docs/torch_matrix.md``, follow from that:

    python tests/torch_matrix.py --write docs/torch_matrix.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch_matrix_inputs as given
from torch.optim.lr_scheduler import StepLR
from torch_matrix_inputs import Info, Options, common_optimizers

import sphereopt as so
from sphereopt.optim import literature

__all__ = ["INFOS", "TESTS", "Test", "optims", "page", "reason", "served"]

_ALL = {
    "supported_impls": ("foreach", "fused", "differentiable"),
    "supports_fused_on": ("cpu", "cuda"),
}
_SMOOTH = {"supported_impls": ("foreach", "differentiable")}
_STACKED = {"supported_impls": ("foreach",)}
_REAL = {"supported_impls": ("foreach",), "supports_complex": False}
_ALONE = {"supported_impls": (), "supports_complex": False}
_SPARSE = {"lr": 2e-4, "maximize": False, "momentum": 0, "nesterov": False, "weight_decay": 0}
_SCHEDULES = [lambda opt: StepLR(opt, gamma=0.99999, step_size=300)]


def _literature(
    name: str, inputs: Sequence[Options], budget: float, required: Options | None = None
) -> Info:
    cls = getattr(literature, name)
    return Info(name, cls, inputs, "literature", (budget, None), required, **_ALONE)


def _per_sphere(inputs: Sequence[Options]) -> list[Options]:
    return [{"second_moment": "sphere", **x} for x in inputs]


_LR, _LR_AND_DECAY = {"lr": 1e-3}, {"lr": 1e-3, "weight_decay": 0.1}

# Budgets: what was measured, rounded up by less than the tenth of a copy that one more temporary
# of one parameter takes (numbers per sphere are the small change). It is measured with ten
# parameters, and after torch.compile ran: callers then hold on to what they pass.
INFOS = [
    Info(
        "SphereSGD",
        so.SphereSGD,
        common_optimizers.optim_inputs_func_sgd,
        "ordinary",
        (0.25, 1.05),
        supports_sparse=True,
        metadata_for_sparse=(_SPARSE, _SCHEDULES),
        **_ALL,
    ),
    Info("SphereSGD_fixed", so.SphereSGD, given.SGD_FIXED, "fixed", (3.15, 6.15), **_SMOOTH),
    Info("SphereSGD_free", so.SphereSGD, given.SGD_FREE, "free", (2.2, 5.1), **_SMOOTH),
    Info(
        "SphereAdam",
        so.SphereAdam,
        common_optimizers.optim_inputs_func_adamw,
        "ordinary",
        (0.45, 1.05),
        **_ALL,
    ),
    Info("SphereAdam_fixed", so.SphereAdam, given.ADAM_FIXED, "fixed", (4.15, 8.15), **_SMOOTH),
    Info("SphereAdam_free", so.SphereAdam, given.ADAM_FREE, "free", (2.1, 7.05), **_SMOOTH),
    Info(
        "SphereAdam_per_sphere_fixed",
        so.SphereAdam,
        _per_sphere(given.ADAM_FIXED),
        "fixed",
        (4.15, 7.15),
        **_SMOOTH,
    ),
    Info(
        "SphereAdam_per_sphere_free",
        so.SphereAdam,
        _per_sphere(given.ADAM_FREE),
        "free",
        (2.1, 5.1),
        **_SMOOTH,
    ),
    Info("SphereLion", so.SphereLion, given.LION, "ordinary", (0.45, 0.45), **_STACKED),
    Info(
        "SphereLion_fixed",
        so.SphereLion,
        given.on_spheres(given.LION),
        "fixed",
        (2.15, 6.05),
        **_STACKED,
    ),
    Info(
        "SphereLion_free",
        so.SphereLion,
        given.on_spheres(given.LION),
        "free",
        (2.05, 5.05),
        **_STACKED,
    ),
    Info(
        "SphereMuon",
        so.SphereMuon,
        common_optimizers.optim_inputs_func_muon,
        "ordinary",
        (0.35, 0.35),
        **_REAL,
    ),
    Info(
        "SphereMuon_fixed",
        so.SphereMuon,
        given.on_spheres(given.MUON),
        "fixed",
        (3.2, 3.2),
        **_REAL,
    ),
    Info(
        "SphereMuon_free", so.SphereMuon, given.on_spheres(given.MUON), "free", (3.2, 3.2), **_REAL
    ),
    _literature("AdamP", given.ADAMP, 0.95),
    _literature("SGDP", given.SGDP, 0.75, _LR),
    _literature("AdamH", given.HYPERBALL, 0.55),
    _literature("MuonH", given.HYPERBALL, 0.65),
    _literature("RotationalAdamW", given.ROTATIONAL, 0.75, _LR_AND_DECAY),
    _literature("RotationalSGD", given.ROTATIONAL, 0.65, _LR_AND_DECAY),
    _literature("RotationalLion", given.ROTATIONAL, 0.65, _LR_AND_DECAY),
    _literature("AdamS", given.SPHERICAL, 0.55),
    _literature("AdamSRT", given.SPHERICAL, 0.75),
    _literature("SGDG", given.GEODESIC, 0.65, _LR),
    _literature("AdamG", given.GEODESIC, 0.85, _LR),
]


@dataclass(frozen=True)
class Test:
    """A row: a test of torch, how its input had to be adapted, and why it does not apply."""

    name: str
    #: How the input, never the check, differs from torch's.
    adapted: str = ""
    #: The reason why it does not apply to a column; empty where it does.
    why_not: Callable[[Info], str] = lambda info: ""

    __test__ = False  # pytest: not a test class


def _without(impl: str) -> Callable[[Info], str]:
    def why_not(info: Info) -> str:
        if impl in info.supported_impls:
            return ""
        if info.kind == "literature":
            return f"no `{impl}` option: one plain update per parameter"
        if impl == "fused" and info.kind in ("fixed", "free"):
            return "`fused` acts on ordinary groups: see the column without spheres"
        if impl == "fused":
            return f"torch has no fused kernel of {info.optim_cls.__name__.removeprefix('Sphere')}"
        return "`differentiable=True` is refused: the direction has no useful derivative"

    return why_not


def _complex(info: Info) -> str:
    if info.supports_complex:
        return ""
    if info.kind == "literature":
        return "defined for real numbers: complex parameters raise TypeError"
    return "AdamW steps complex weights, Muon their real views: no matrices of the same kind"


def _sparse(info: Info) -> str:
    if info.supports_sparse:
        return ""
    if info.name == "SphereAdam":
        return "sparse gradients raise, as in torch.optim.AdamW"
    return "sparse gradients raise: a norm, a sign or a matrix needs all entries"


def _compiled(info: Info) -> str:
    if info.name in ("SphereSGD", "SphereAdam", "AdamH"):
        return ""
    if info.kind == "literature":
        return "compiling takes seconds: one of the literature stands for all, which share `step`"
    return "compiled in `tests/test_optim_compile.py`, more closely"


def _always(reason: str) -> Callable[[Info], str]:
    return lambda info: reason


_NEEDS_CUDA = "needs CUDA"
_ON_SPHERES = "matrices are on spheres, vectors are ordinary"

TESTS = [
    Test("test_optim_infos_do_not_specify_global_cliquey_kwargs"),
    Test("test_errors", "the messages are ours"),
    Test(
        "test_forloop_goes_right_direction",
        f"{_ON_SPHERES}, and the matrix alone must help, too; inputs have both signs",
    ),
    Test(
        "test_forloop_goes_right_direction_multi_dim",
        "not in torch: conv filters, channels_last, float64",
    ),
    Test("test_param_group_with_lrscheduler_goes_right_direction", _ON_SPHERES),
    Test("test_param_groups_lr", f"{_ON_SPHERES}, and the matrix alone must help, too"),
    Test("test_param_groups_weight_decay", f"{_ON_SPHERES}; fixed radii have no decay"),
    Test("test_tensor_lr", "steps are made, and a parameter without dimensions is among them"),
    Test("test_step_is_noop_when_params_have_no_grad", "that nothing changed is checked"),
    Test(
        "test_step_is_noop_for_zero_grads",
        "weights start where SGDG and AdamG put them; pulls of their own (decay, omega) left out",
    ),
    Test(
        "test_empty_grad",
        "matrices without rows, without columns, an empty vector; gradients must stay as they are",
    ),
    Test("test_complex", _ON_SPHERES, _complex),
    Test(
        "test_complex_2d",
        "on spheres real and imaginary part are one joint sphere, as the complex vector is",
        _complex,
    ),
    Test("test_rosenbrock_sparse", "60 steps with a smaller lr", _sparse),
    Test("test_optimizer_can_be_printed"),
    Test("test_foreach_matches_forloop", "more layers of one width", _without("foreach")),
    Test("test_fused_matches_forloop", "", _without("fused")),
    Test("test_fused_error_on_params_on_meta", "", _without("fused")),
    Test("test_mixed_device_dtype", "four dtypes on one device", _without("foreach")),
    Test("test_set_default_dtype_works_with_foreach", "on any device", _without("foreach")),
    Test("test_peak_memory_foreach", "on the CPU, with a budget per column, for every form"),
    Test("test_grad_scaling_autocast_fused_optimizers", "every form, on any device"),
    Test(
        "test_differentiable",
        "one step from a state that is given; its norms of spheres are constants of the run",
        _without("differentiable"),
    ),
    Test("test_correctness", "backend `eager`", _compiled),
    Test("test_state_dict_deterministic"),
    Test("test_can_load_older_state_dict"),
    Test("test_can_load_from_to_named_state_dict", "names are in two groups on spheres"),
    Test("test_save_load_equality_with_weights_only"),
    Test("test_load_nontensor_step"),
    Test("test_state_dict_pre_hook"),
    Test("test_state_dict_post_hook"),
    Test("test_state_dict_pre_post_hook"),
    Test("test_load_state_dict_pre_hook_and_prepend"),
    Test("test_load_state_dict_post_hook"),
    Test("test_load_state_dict_pre_post_hook", "the hooks also change the state"),
    Test("test_step_pre_hook"),
    Test("test_step_post_hook"),
    Test("test_step_all_hooks"),
    Test("test_deepcopy_copies_all_public_attrs"),
    Test("test_non_empty_state"),
    Test("test_forloop_goes_right_direction_multigpu", "", _always("needs two GPUs")),
    Test("test_foreach_large_tensor", "", _always("needs a GPU of 72 GB")),
    Test("test_fused_large_tensor", "", _always("needs 64 GB of memory")),
    Test("test_fused_does_not_step_if_foundinf", "", _always(_NEEDS_CUDA)),
    Test("test_fused_cpu_matches_cuda", "", _always(_NEEDS_CUDA)),
    Test("test_cpu_load_state_dict", "", _always(_NEEDS_CUDA)),
    Test("test_state_dict_with_cuda_params", "", _always(_NEEDS_CUDA)),
    Test("test_defaults_changed_to_foreach", "", _always(_NEEDS_CUDA)),
    Test("test_second_order_optims_return_consistent_types", "", _always("L-BFGS only")),
]


def reason(test: str, info: Info) -> str:
    """Return why a test does not apply to a column, or an empty string."""
    return next(row for row in TESTS if row.name == test).why_not(info)


def served(test: str) -> list[Info]:
    """Return the columns that a test applies to."""
    return [info for info in INFOS if not reason(test, info)]


def optims(test: str, **more: object) -> object:
    """Return torch's decorator that runs a test on the columns it applies to."""
    return common_optimizers.optims(served(test), **more)


def _cells(infos: Sequence[Info], notes: list[str]) -> list[str]:
    """Return the rows of a table, and add the reasons they refer to."""
    lines = ["| test | " + " | ".join(f"`{info.name}`" for info in infos) + " |"]
    lines.append("|---|" + ":-:|" * len(infos))
    for row in TESTS:
        marks = []
        for info in infos:
            why = row.why_not(info)
            if why and why not in notes:
                notes.append(why)
            marks.append(f"n/a [{notes.index(why) + 1}]" if why else "pass")
        lines.append(f"| `{row.name}` | " + " | ".join(marks) + " |")
    return lines


def page() -> str:
    """Return the page of the documentation that shows the matrix."""
    notes: list[str] = []
    families = [
        ("SphereSGD and SphereAdam", [i for i in INFOS if i.optim_cls in _FIRST]),
        ("SphereLion and SphereMuon", [i for i in INFOS if i.optim_cls in _SECOND]),
        ("Published optimizers", [i for i in INFOS if i.kind == "literature"]),
    ]
    lines = [*_HEAD]
    for title, infos in families:
        lines += [f"## {title}", "", *_cells(infos, notes), ""]
    lines += ["## Why not", "", *[f"{i}. {note}" for i, note in enumerate(notes, 1)], ""]
    lines += ["## What differs from torch's input", ""]
    lines += [f"* `{row.name}`: {row.adapted}" for row in TESTS if row.adapted]
    lines += ["", "## Memory of a step", "", *_MEMORY, "", "| | one by one | `foreach` |"]
    lines += ["|---|--:|--:|"]
    for info in INFOS:
        single, stacked = info.budget
        lines.append(f"| `{info.name}` | {single} | {'' if stacked is None else stacked} |")
    return "\n".join(lines) + "\n"


_FIRST, _SECOND = (so.SphereSGD, so.SphereAdam), (so.SphereLion, so.SphereMuon)
_HEAD = [
    "# torch's optimizer tests",
    "",
    "PyTorch tests its optimizers by a matrix: every test of `test/test_optim.py` runs on every",
    "optimizer, with several options each. These are the same tests, by the same names, rewritten",
    "for the optimizers here and run with `torch.testing._internal`'s own machinery. A column is",
    "an optimizer on ordinary parameters; with the suffix `_fixed` or `_free` on spheres of that",
    'radius (rows and whole tensors); with `_per_sphere` for `second_moment="sphere"`.',
    "",
    "This page is written by `python tests/torch_matrix.py --write docs/torch_matrix.md`, from the",
    "table that says which tests run; a test fails where it is not what that would write today.",
    "",
]
_MEMORY = [
    "The most that a step may hold at once beside parameters, gradients and state, in copies",
    "of the parameters: ten matrices of 16 x 256. Small tensors on spheres are stacked for",
    "speed, which copies weights, gradients and buffers; large ones, and those of groups with",
    "`foreach=False`, are not.",
]


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file to write the page to")
    path = parser.parse_args().write
    print(page()) if path is None else path.write_text(page())


if __name__ == "__main__":
    main()
