"""The command line: reads options, calls the library, prints what it returns."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sphereopt import cli_audit, cli_calc, cli_diff, cli_doctor, cli_report
from sphereopt.cli_values import real

if TYPE_CHECKING:
    from sphereopt.train import Config, Dataset, Results
    from sphereopt.train.loop import Progress

__all__ = ["main"]

_INSTALL = 'pip install "sphereopt[examples,report]"'
_FILES = ("sgd.jsonl", "free.jsonl", "fixed.jsonl", "results.json", "report.html")
_WIDE = 150


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit code: 0, 1 for a run that failed, two runs that differ or a machine where training
        does not work, 3 for a model that could not be analysed in full, 130 for a command that was
        interrupted.

    Raises:
        SystemExit: With code 2 and one line on stderr if an option cannot be used.
    """
    parser = _Parser(
        prog="sphereopt",
        description="Train networks on the spheres where their scale-invariant weights live.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    cli_audit.add_command(commands)
    cli_calc.add_command(commands)
    cli_report.add_command(commands)
    cli_diff.add_command(commands)
    cli_doctor.add_command(commands)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(f"unknown arguments {' '.join(unknown)}; see {args.parser.prog} --help")
    try:
        code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        print(f"{args.parser.prog}: {args.interrupted}", file=sys.stderr)
        return 130


def _add_train(commands: Any) -> None:
    """Add ``sphereopt train``; option names and defaults are those of ``train.Config``."""
    parser = commands.add_parser(
        "train",
        help="train a small network plainly and on its spheres, and compare",
        description="Train a small convolutional network three times on the same batches: (a) with "
        'torch.optim.SGD, (b) with SphereSGD(radius="free"), which must follow (a), and (c) on '
        "spheres of fixed radius, turning by the angle that theory gives for (a).",
        allow_abbrev=False,
    )
    data = 'images: "digits", a folder of MNIST-like idx files, or an .npz (default: digits)'
    parser.add_argument("--data", metavar="DATA", help=data)
    for option, kind, text in (
        ("--steps", _whole, "training steps of each arm (default: 2000)"),
        ("--seed", _whole, "of initial weights and batches (default: 0)"),
        ("--batch-size", _whole, "images per step (default: 32)"),
        ("--lr", real, "peak learning rate of SGD (default: 0.1)"),
        ("--weight-decay", real, "weight decay of SGD (default: 0.01)"),
        ("--norm-eps", real, "eps of the BatchNorm layers (default: 1e-12)"),
        ("--threads", _whole, "threads torch may use (default: 1)"),
    ):
        parser.add_argument(option, type=kind, metavar="N" if kind is _whole else "X", help=text)
    parser.add_argument("--dtype", metavar="DTYPE", help="float64 (default) or float32")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="runs/train",
        help="folder for the JSONL files, results.json and report.html (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON, only")
    parser.set_defaults(
        run=_train, parser=parser, interrupted="interrupted; what was logged is kept"
    )


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number; use 1, 2, 3 ..."
        ) from None


def _train(args: argparse.Namespace) -> int:
    """Check everything, train, write the files, print the table."""
    _require_extras(args)
    from sphereopt.train import DivergedError, train

    config, data = _checked(args)
    out = _clean_folder(args)
    try:
        with _progress(config, silent=args.json) as progress:
            results = train(config, out, data=data, progress=progress)
    except DivergedError as error:
        print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(results.to_dict(), allow_nan=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")

    from sphereopt.report import comparison

    page = comparison.write(out)
    if args.json:
        print(text)
    else:
        _print_table(results, page)
    return 0


def _require_extras(args: argparse.Namespace) -> None:
    needed = {"matplotlib": "matplotlib", "jinja2": "jinja2"}
    if not args.json:
        needed["rich"] = "rich"
    if args.data in (None, "digits"):
        needed["sklearn"] = "scikit-learn"
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        args.parser.error(f"{', '.join(missing)} not installed; run: {_INSTALL}")


def _checked(args: argparse.Namespace) -> tuple[Config, Dataset]:
    """Return options and data, or leave with the option, the value and the remedy."""
    from sphereopt.train import Config, OptionError, load
    from sphereopt.train.loop import check_batch_size

    names = {field.name for field in fields(Config)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    try:
        config = Config(**given)
        data = load(config.data)
        check_batch_size(config, data)
    except OptionError as error:
        option = "--" + error.option.replace("_", "-")
        args.parser.error(f"{option} {error.value!r}: {error.remedy}")
    return config, data


def _clean_folder(args: argparse.Namespace) -> Path:
    """Return the output folder, made and without what an earlier run left, or leave."""
    from sphereopt.train import OptionError, fresh_folder

    try:
        out = fresh_folder(Path(args.out), _FILES)
    except OptionError as error:
        args.parser.error(f"--out {args.out!r}: {error.remedy}")
    return out


@contextmanager
def _progress(config: Config, *, silent: bool) -> Iterator[Progress | None]:
    """Show a bar on stderr if that is a terminal."""
    if silent or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from sphereopt.train.arms import ARMS, Arm

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {
            arm.name: bar.add_task(f"({arm.letter}) {arm.name}", total=config.steps, loss=0.0)
            for arm in ARMS
        }

        def advance(arm: Arm, step: int, loss: float) -> None:
            bar.update(tasks[arm.name], completed=step, loss=loss)

        yield advance


def _print_table(results: Results, page: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from sphereopt.report.comparison.summary import HEADER, arm_rows

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    # The names of the optimizers are long: in a narrow terminal they go beneath.
    shown = [i for i in range(len(HEADER)) if i != 1 or console.width >= _WIDE]
    title = f"{results.data['name']}, {results.config.steps} steps"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i in shown:
        table.add_column(
            HEADER[i],
            justify="left" if i < 2 else "right",
            no_wrap=HEADER[i].startswith("norm"),
        )
    for row in arm_rows(results.to_dict()):
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    if 1 not in shown:
        for arm in results.arms.values():
            console.print(f"({arm.letter}) {arm.optimizer}")
    print(f"The page with the figures: {page}")
