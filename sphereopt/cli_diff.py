"""``sphereopt diff``: what changed between two runs."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphereopt.cli_values import needs_report, real

if TYPE_CHECKING:
    from sphereopt.report.diff.difference import Diff

__all__ = ["add_command"]

_DESCRIPTION = """\
Read two logs that track() wrote and say what changed from the first to the second: settings,
parameters, norms and angles layer by layer, metrics, and why, where the calculator supports it."""

_EPILOG = """\
examples:
  sphereopt diff a.jsonl b.jsonl
  sphereopt diff a.jsonl b.jsonl --tolerance 0.02 --all
  sphereopt diff a.jsonl b.jsonl -o diff.html --json diff.json

exit codes:
  0  nothing differs beyond tolerance
  1  something does
  2  a log cannot be read, or a file not written"""


def add_command(commands: Any) -> None:
    """Add ``sphereopt diff`` to the sub-commands of a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_command(parser.add_subparsers())
        >>> parser.parse_args(["diff", "a.jsonl", "b.jsonl"]).tolerance
        0.1
    """
    parser = commands.add_parser(
        "diff",
        help="say what changed between two runs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", help="JSONL file of the run to compare with")
    parser.add_argument("b", metavar="B", help="JSONL file of the other run; ratios are B/A")
    parser.add_argument(
        "--tolerance",
        type=real,
        default=0.1,
        metavar="X",
        help="share by which numbers may differ and pass as the same (default: 0.1)",
    )
    parser.add_argument("--all", action="store_true", help="show all layers, not the first ten")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the difference as JSON; without FILE print it, only",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write a page with charts")
    parser.set_defaults(run=_run, parser=parser, interrupted="interrupted; nothing was written")


def _run(args: argparse.Namespace) -> int:
    """Read, compare, write, print."""
    _check(args)
    from sphereopt.report.diff.difference import diff
    from sphereopt.report.diff.text import as_text

    try:
        found = diff(args.a, args.b, tolerance=args.tolerance)
    except ValueError as error:
        args.parser.error(str(error))
    text = json.dumps(found.as_json(), allow_nan=False)
    if args.output is not None:
        _write(args, "-o", args.output, _page(found))
    if args.json not in (None, "-"):
        _write(args, "--json", args.json, text + "\n")
    print(text if args.json == "-" else as_text(found, every=args.all))
    if args.output is not None and args.json != "-":
        print(f"\nThe page with the charts: {args.output}")
    return 1 if found.differs else 0


def _check(args: argparse.Namespace) -> None:
    """Leave if an option cannot be used, before anything is read or written."""
    if not 0 < args.tolerance < math.inf:
        args.parser.error(f"--tolerance {args.tolerance}: must be positive, such as 0.1 for 10 %")
    logs = {Path(args.a).resolve(), Path(args.b).resolve()}
    files = [(name, x) for name, x in (("-o", args.output), ("--json", args.json)) if x is not None]
    for name, file in files:
        if file != "-" and Path(file).resolve() in logs:
            args.parser.error(f"{name} {file!r}: is one of the logs; choose another file")
    if len(files) == 2 and Path(files[0][1]).resolve() == Path(files[1][1]).resolve():
        args.parser.error(f"--json {args.json!r}: is the page as well; choose another file")
    if args.output is not None:
        needs_report(args.parser)


def _page(found: Diff) -> str:
    from sphereopt.report.diff.page import render_diff

    return render_diff(found)


def _write(args: argparse.Namespace, option: str, file: str, text: str) -> None:
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        args.parser.error(f"{option} {file!r}: cannot be written ({reason}); choose another file")
