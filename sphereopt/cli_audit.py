"""``sphereopt audit``: find the spheres of any model that can be imported, and print the report."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphereopt import audit
from sphereopt.detect import find_spheres
from sphereopt.detect.table import listed

__all__ = ["add_command"]

_DESCRIPTION = """\
Import a model, run it on random inputs, and print which of its weights are scale-invariant: on
which spheres, with what evidence, and why not.

TARGET is MODULE:NAME. MODULE is imported, with the current directory on the path as `python -m`
has it; nothing else is. NAME is a torch.nn.Module, or a callable that returns one.

A SPEC is SHAPE[:DTYPE[:VOCAB]]:
  2x3x224x224         float32 numbers from a normal distribution
  4x8:bfloat16        the same in another dtype: float32, float64, bfloat16, float16
  2x16:int64:50257    whole numbers from 0 to 50256: int64, int32, int16, int8, uint8 need a VOCAB
  2x16:bool           random True and False
  scalar              a tensor without dimensions
Give a batch of several examples: normalization layers see what they see in training."""

_EPILOG = """\
examples:
  sphereopt audit my.models:resnet --input 8x3x64x64
  sphereopt audit my.models:resnet --factory-kwargs '{"num_classes": 10}' --input 8x3x64x64
  sphereopt audit my.gpt:model --input 2x64:int64:50257 --checkpoint gpt.safetensors
  sphereopt audit my.gpt:model --kwargs '{"input_ids": "2x64:int64:50257", "use_cache": false}'
  sphereopt audit my.models:resnet --input 8x3x64x64 --json > report.json

exit codes:
  0  every trainable parameter is classified
  2  an argument cannot be used
  3  the model cannot be analysed, or a trainable parameter could not be measured (status "none"
     without evidence); inert parameters count as classified"""


def add_command(commands: Any) -> None:
    """Add ``sphereopt audit`` to the sub-commands of a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_command(parser.add_subparsers())
        >>> parser.parse_args(["audit", "my.models:resnet"]).target
        'my.models:resnet'
    """
    parser = commands.add_parser(
        "audit",
        help="show which weights of your model are scale-invariant",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("target", metavar="TARGET", help="the model, MODULE:NAME")
    add(
        "--input",
        metavar="SPEC",
        type=_one_line(audit.parse_input),
        action="append",
        default=[],
        help="a positional input; give it once per input",
    )
    kwargs = (
        "keyword inputs, a JSON object; strings of the form of a SPEC are tensors, everything else "
        'is passed as it is; put "=" before a string to pass the rest of it as a string'
    )
    add("--kwargs", metavar="JSON", type=_one_line(audit.parse_keywords), default={}, help=kwargs)
    add(
        "--factory-kwargs",
        metavar="JSON",
        type=_one_line(audit.json_object),
        help="keyword arguments of the callable, a JSON object",
    )
    add(
        "--checkpoint",
        metavar="FILE",
        help="weights to load: .safetensors, or what torch.save wrote of a state_dict, also under "
        '"state_dict" or "model"',
    )
    add(
        "--seed",
        metavar="N",
        type=_one_line(_seed),
        default=0,
        help="of initial weights, inputs and probes, 0 or more (default: %(default)s)",
    )
    add("--json", action="store_true", help="print the report as JSON, only")
    parser.set_defaults(run=_run, parser=parser, interrupted="interrupted")


def _one_line(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse show the message of a ``ValueError``."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise ValueError(f"{text!r} is not a seed; use a whole number, 0 to 2**63 - 1")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    """Build the model, load it, analyse it, print the report."""
    with _current_directory_on_path():
        # What the user's code prints must not end up in the JSON.
        with redirect_stdout(sys.stderr):
            model = _model(args)
            inputs, kwargs = _inputs(args)
            try:
                report = find_spheres(model, inputs, kwargs, seed=args.seed)
            except Exception as error:
                print(f"{args.parser.prog}: error: {audit.in_one_line(error)}", file=sys.stderr)
                return 3
        print(report.to_json() if args.json else report)
    unknown = audit.unclassified(model, report)
    if not unknown:
        return 0
    why = f"{listed(unknown, 4)} ({report[unknown[0]].reason})"
    print(f"{args.parser.prog}: error: not measured: {why}", file=sys.stderr)
    return 3


@contextmanager
def _current_directory_on_path() -> Iterator[None]:
    """Import from where the user stands, as ``python -m`` does; the script would not."""
    here, before = str(Path.cwd()), list(sys.path)
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _model(args: argparse.Namespace) -> nn.Module:
    """Return the model that was asked for, with its weights, or leave."""
    try:
        model = audit.import_model(args.target, args.factory_kwargs, args.seed)
    except ValueError as error:
        args.parser.error(f"TARGET {args.target!r}: {error}")
    if args.checkpoint is not None:
        try:
            audit.load_checkpoint(model, args.checkpoint)
        except ValueError as error:
            args.parser.error(f"--checkpoint {args.checkpoint!r}: {error}")
    return model


def _inputs(args: argparse.Namespace) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return positional and keyword inputs, or leave."""
    generator = torch.Generator().manual_seed(args.seed)

    def filled(option: str, value: Any) -> Any:
        if not isinstance(value, audit.InputSpec):
            return value
        try:
            return audit.random_input(value, generator)
        except (RuntimeError, TypeError, MemoryError) as error:
            shape = "x".join(map(str, value.shape))
            args.parser.error(
                f"{option}: a tensor of {shape} cannot be made ({audit.in_one_line(error, 150)})"
            )

    inputs = tuple(filled("--input", spec) for spec in args.input)
    return inputs, {name: filled("--kwargs", value) for name, value in args.kwargs.items()}
