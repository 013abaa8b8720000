"""``sphereopt calc``: what learning rate and weight decay do to a norm and an angle."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sphereopt.cli_values import real
from sphereopt.theory import OPTIMIZERS, SCHEDULES, SPHERE_OPTIMIZERS, Answer, OutOfRangeError
from sphereopt.theory import answer as asked
from sphereopt.theory.as_json import as_json
from sphereopt.theory.as_text import sections
from sphereopt.theory.words import Section

__all__ = ["add_command"]

_DESCRIPTION = """\
Print what an optimizer's settings do to a scale-invariant block of weights: the angle per step and
the norm at which weight decay and growth balance, and, with --steps and --init-std, whether a run
gets there, when, and what the angle is on the way. Nothing is trained."""

_EPILOG = """\
examples:
  sphereopt calc adamw --lr 3e-4 --weight-decay 0.1 --betas 0.9 0.95
  sphereopt calc adamw --lr 3e-4 --weight-decay 0.1 --betas 0.9 0.95 --steps 100000 \\
      --warmup 2000 --schedule cosine --final 0.1 --init-std 0.02 --plot run.png
  sphereopt calc adamw --lr 3e-4 --weight-decay 0.1 --convert lion
  sphereopt calc sgd --lr 0.1 --weight-decay 5e-4 --momentum 0.9 --batch-size 4x
  sphereopt calc adamw --lr 3e-4 --weight-decay 0.1 --steps 100000 4x

exit codes:
  0  answered
  2  an option cannot be used"""

_INSTALL = 'pip install "sphereopt[report]"'
#: Options of schedules beside --warmup.
_PLANS = {
    "constant": (),
    "linear": ("final",),
    "cosine": ("final",),
    "wsd": ("final", "decay_fraction"),
    "step": ("milestones", "gamma"),
}
#: Arguments that are spelled otherwise on the command line.
_SPELLED = {"rms0": "init_std", "norm0": "init_norm", "target": "convert", "kind": "schedule"}
_HYPER = ("momentum", "dampening", "nesterov", "betas", "eps", "shape", "adjust_lr_fn")
_ARGUMENTS = re.compile(
    r"\b(norm0|rms0|weight_decay|grad_norm|dim|steps|adjust_lr_fn)\b(?=[=,;:. )]|$)(=?)"
)


def add_command(commands: Any) -> None:
    """Add ``sphereopt calc`` to the sub-commands of a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_command(parser.add_subparsers())
        >>> parser.parse_args(["calc", "adamw", "--lr", "0.1", "--weight-decay", "0.1"]).lr
        0.1
    """
    parser = commands.add_parser(
        "calc",
        help="predict norms and angles from learning rate and weight decay",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("optimizer", metavar="OPTIMIZER", help=", ".join(OPTIMIZERS))
    _add_settings(parser)
    _add_run(parser)
    _add_questions(parser)
    parser.set_defaults(run=_run, parser=parser, interrupted="interrupted")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the optimizer, as given to torch.optim").add_argument
    number: dict[str, Any] = {"type": real, "metavar": "X"}
    add("--lr", required=True, help="learning rate, of a run the largest", **number)
    add("--weight-decay", required=True, help="weight decay", **number)
    add("--momentum", help="of sgd, sgdw, signum, muon", **number)
    add("--dampening", help="of sgd, sgdw", **number)
    nesterov = argparse.BooleanOptionalAction
    add("--nesterov", action=nesterov, default=None, help="of sgd, sgdw, muon")
    add("--betas", nargs=2, help="of adam, adamw, lion", type=real, metavar=("B1", "B2"))
    add("--eps", help="of adam, adamw; counts if --dim and --grad-norm are given", **number)
    add("--shape", nargs=2, help="of the matrix, for muon", type=_whole, metavar=("R", "C"))
    add("--adjust-lr-fn", metavar="NAME", help="of muon: original or match_rms_adamw")
    add("--dtype", metavar="DTYPE", help="of the weights (default: float32)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the block and the run").add_argument
    number: dict[str, Any] = {"type": real, "metavar": "X"}
    add("--dim", type=_whole, metavar="N", help="weights in the block")
    add("--grad-norm", help="norm of the block's gradient times norm of the block", **number)
    add("--init-std", help="root mean square weight at the start", **number)
    add("--init-norm", help="norm of the block at the start, instead", **number)
    add(
        "--steps",
        nargs="+",
        action="extend",
        type=_steps,
        metavar="N",
        help="steps of the run; a factor like 4x asks what to change for a run so much longer; "
        "both can be given: 100000 4x",
    )
    kinds = ", ".join(SCHEDULES)
    add("--schedule", metavar="NAME", help=f"of the learning rate: {kinds} (default: constant)")
    add("--warmup", type=_whole, metavar="N", help="steps of linear warm-up (default: 0)")
    add(
        "--final", help="of linear, cosine, wsd: end, as a share of the peak (default: 0)", **number
    )
    add("--decay-fraction", help="of wsd: share of the run that decays (default: 0.2)", **number)
    add("--milestones", nargs="+", type=real, metavar="X", help="of step: shares of the run")
    add("--gamma", help="of step: factor at each milestone (default: 0.1)", **number)


def _add_questions(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("questions and output").add_argument
    names = ", ".join([*SPHERE_OPTIMIZERS, *OPTIMIZERS])
    add(
        "--convert",
        metavar="TO",
        help=f"settings of another optimizer with the same memory and norm: {names}; options that "
        "only the other has are given to it",
    )
    add(
        "--batch-size", type=_factor, metavar="4x", help="what to change for a batch so much larger"
    )
    add("--json", action="store_true", help="print the answer as JSON, only")
    add("--plot", metavar="FILE", help="draw norm and angle of the run: .png, .svg or .pdf")


def _whole(text: str) -> int:
    try:
        value = float(text)
        if value != int(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    return int(value)


def _factor(text: str) -> float:
    if not text.endswith("x"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor; use one like 4x or 0.5x")
    value = real(text[:-1])
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; use one like 4x or 0.5x")
    return value


def _steps(text: str) -> tuple[str, float]:
    return ("factor", _factor(text)) if text.endswith("x") else ("steps", _whole(text))


def _run(args: argparse.Namespace) -> int:
    """Check everything, compute, draw, print."""
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        args.parser.error(f"--plot {args.plot!r}: needs matplotlib; run: {_INSTALL}")
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            found = _asked(args)
        found = replace(found, missing=tuple(map(_worded, found.missing)))
        text = json.dumps(as_json(found), allow_nan=False)
    except OutOfRangeError as error:
        args.parser.error(_in_options(error))
    except (ArithmeticError, ValueError):
        args.parser.error(
            f"--lr {args.lr} --weight-decay {args.weight_decay}: with the other options these lead "
            "to numbers that floating point cannot hold; use values nearer to practice"
        )
    if args.plot is not None:
        _plot(args, found)
    if args.json:
        print(text)
    else:
        _print(sections(found))
    return 0


def _asked(args: argparse.Namespace) -> Answer:
    own, other = _hyper(args)
    steps, factor = _two_kinds(args)
    return asked(
        args.optimizer,
        lr=args.lr,
        weight_decay=args.weight_decay,
        plan=_plan(args, steps),
        dim=args.dim,
        grad_norm=args.grad_norm,
        norm0=args.init_norm,
        rms0=args.init_std,
        dtype=args.dtype or "float32",
        convert=args.convert,
        target_hyper=other or None,
        batch_factor=args.batch_size,
        steps_factor=factor,
        **own,
    )


def _hyper(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the optimizer, and those that only the one to convert to has."""
    given = {name: getattr(args, name) for name in _HYPER if getattr(args, name) is not None}
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    base = SPHERE_OPTIMIZERS.get(args.convert, args.convert)
    if args.optimizer not in OPTIMIZERS or base not in OPTIMIZERS:
        return given, {}
    own, other = OPTIMIZERS[args.optimizer][0], OPTIMIZERS[base][0]
    passed_on = {name: x for name, x in given.items() if name not in own and name in other}
    return {name: x for name, x in given.items() if name not in passed_on}, passed_on


def _two_kinds(args: argparse.Namespace) -> tuple[int | None, float | None]:
    """Return the number of steps and the factor among what was given to --steps."""
    found: dict[str, Any] = {}
    for kind, value in args.steps or ():
        if kind in found:
            what = "number" if kind == "steps" else "factor"
            raise OutOfRangeError("steps", value, f"is the second {what}; give one of each")
        found[kind] = value
    return found.get("steps"), found.get("factor")


def _plan(args: argparse.Namespace, steps: int | None) -> dict[str, Any] | None:
    """Return the run, or leave if its options do not fit."""
    kind = args.schedule or "constant"
    names = {"warmup", *(name for options in _PLANS.values() for name in options)}
    given = {name: getattr(args, name) for name in sorted(names) if getattr(args, name) is not None}
    if steps is None:
        for name, value in ({"schedule": args.schedule} | given).items():
            if value is not None:
                raise OutOfRangeError(name, value, "needs steps, the number of them")
        return None
    if kind in SCHEDULES:
        for name in set(given) - {"warmup", *_PLANS[kind]}:
            own = ", ".join(("warmup", *_PLANS[kind]))
            raise OutOfRangeError(name, given[name], f"is no option of {kind} (it has: {own})")
    if "milestones" in given:
        given["milestones"] = tuple(given["milestones"])
    return {"kind": kind, "steps": steps, **given}


def _in_options(error: OutOfRangeError) -> str:
    """Return the error in the words of the command line."""
    value = error.value
    if error.name == "optimizer":
        return f"OPTIMIZER {value!r}: {error.remedy}"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    shown = _option(error.name) if value is None else f"{_option(error.name)} {value}"
    return f"{shown}: {_worded(error.remedy)}"


def _option(name: str) -> str:
    return "--" + _SPELLED.get(name, name).replace("_", "-")


def _worded(text: str) -> str:
    """Return a text of the library with its arguments spelled as options."""
    return _ARGUMENTS.sub(lambda found: _option(found[1]) + (" " if found[2] else ""), text)


def _plot(args: argparse.Namespace, found: Answer) -> None:
    """Draw the run, or leave."""
    from sphereopt.report.run_plot import plot_run

    if found.run is None:
        missing = "; ".join(found.missing) or "--steps, and --init-std or --init-norm"
        args.parser.error(f"--plot {args.plot!r}: needs a run; give {missing}")
    try:
        plot_run(found, Path(args.plot))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        args.parser.error(f"--plot {args.plot!r}: cannot be written ({reason})")


def _print(found: list[Section]) -> None:
    """Print tables: with rich on a terminal, else as text that is the same everywhere."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print("\n\n".join(map(str, found)))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    for section in found:
        table = Table(
            title=section.title,
            title_justify="left",
            box=SIMPLE_HEAD,
            show_header=bool(section.header),
            pad_edge=False,
        )
        for name in section.header or ("",) * len(section.rows[0]):
            table.add_column(name, justify="right" if section.header else "left")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
