"""``sphereopt report``: from a run's log to one page that shows it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sphereopt.cli_values import needs_report

__all__ = ["add_command"]

_DESCRIPTION = """\
Read a log that track() wrote and write one HTML page: what stands out, norms and angles beside what
theory expects, effective learning rates, and a table of the layers. The page needs no network."""

_EPILOG = """\
examples:
  sphereopt report run.jsonl
  sphereopt report run.jsonl -o reports/run.html

exit codes:
  0  the page was written
  2  the log cannot be read, or the page not written"""


def add_command(commands: Any) -> None:
    """Add ``sphereopt report`` to the sub-commands of a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_command(parser.add_subparsers())
        >>> parser.parse_args(["report", "run.jsonl"]).log
        'run.jsonl'
    """
    parser = commands.add_parser(
        "report",
        help="write a page on a run from its log",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("log", metavar="LOG", help="JSONL file that track() wrote")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the page (default: beside the log, as .html)"
    )
    parser.set_defaults(run=_run, parser=parser, interrupted="interrupted; no page was written")


def _run(args: argparse.Namespace) -> int:
    """Read, write, and say what stands out."""
    needs_report(args.parser)
    from sphereopt import report
    from sphereopt.report.findings import verdict

    path = Path(args.log).with_suffix(".html") if args.output is None else Path(args.output)
    if path == Path(args.log):
        args.parser.error(f"-o {args.output!r}: is the log itself; choose another file")
    try:
        history = report.as_history(args.log)
        page = report.write(history, path)
    except ValueError as error:
        args.parser.error(str(error))
    except OSError as error:
        option = f"-o {str(path)!r}"
        args.parser.error(f"{option}: cannot be written ({error.strerror}); choose another file")
    found = report.findings(history)
    print(verdict(history, found))
    for finding in found[:3]:
        print(f"- {finding.sentence}")
    print(f"The page with the charts: {page}")
    return 0
