"""``sphereopt doctor``: what works here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sphereopt.doctor import Check, examine

__all__ = ["add_command"]

_MARKS = {"ok": "ok", "absent": "-", "failed": "FAILED"}

_EPILOG = """\
exit codes:
  0  training on spheres works here
  1  it does not"""


def add_command(commands: Any) -> None:
    """Add ``sphereopt doctor`` to the sub-commands of a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_command(parser.add_subparsers())
        >>> parser.parse_args(["doctor", "--json"]).json
        True
    """
    parser = commands.add_parser(
        "doctor",
        help="say what works here: versions, devices, extras, arithmetic",
        description="Say what works on this machine: versions, devices, kinds of step, extras, "
        "and whether the arithmetic is right. Each is tried on a toy; nothing is trained.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--full", action="store_true", help="also try torch.compile (a minute)")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON, only")
    parser.set_defaults(run=_run, parser=parser, interrupted="interrupted")


def _run(args: argparse.Namespace) -> int:
    checks = examine(full=args.full)
    works = not any(check.fatal for check in checks)
    if args.json:
        print(json.dumps({"works": works, "checks": [asdict(check) for check in checks]}))
    else:
        print(_table(checks))
        print()
        print(_verdict(checks))
    return 0 if works else 1


def _table(checks: Sequence[Check]) -> str:
    """Return the checks in aligned columns, section by section."""
    wide = max(len(check.name) for check in checks)
    lines: list[str] = []
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ["", section] if lines else [section]
        lines.append(f"  {check.name:<{wide}}  {_MARKS[check.status]:<6}  {check.text}")
    return "\n".join(lines)


def _verdict(checks: Sequence[Check]) -> str:
    fatal = [check.name for check in checks if check.fatal]
    if fatal:
        return f"Training on spheres does not work here: {', '.join(fatal)} failed."
    failed = [check.name for check in checks if check.status == "failed"]
    rest = f" What failed: {', '.join(failed)}." if failed else ""
    return f"Training on spheres works here.{rest}"
