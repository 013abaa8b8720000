"""What ``sphereopt audit`` is told: a model to import, its inputs, a checkpoint."""

from __future__ import annotations

import importlib
import json
import operator
import os
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphereopt.detect import SphereReport
from sphereopt.detect.table import listed

__all__ = [
    "InputSpec",
    "import_model",
    "in_one_line",
    "json_object",
    "load_checkpoint",
    "parse_input",
    "parse_keywords",
    "random_input",
    "unclassified",
]

_FLOATS = ("float32", "float64", "bfloat16", "float16")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
_SHAPE = r"(?P<shape>scalar|\d+(?:x\d+)*)"
_FORM = re.compile(_SHAPE + r"(?::(?P<dtype>[^:]*)(?::(?P<vocabulary>[^:]*))?)?", re.ASCII)
_TARGET = re.compile(r"\w[\w.]*:\w[\w.]*")
#: Names of a mapping under which a checkpoint keeps the weights.
_WRAPPERS = ("state_dict", "model")
#: Code whose line numbers do not help the user.
_INSIDE = (
    *(f"{Path(str(module.__file__)).parent}{os.sep}" for module in (torch, importlib)),
    f"{Path(__file__).parent}{os.sep}",
    "<frozen",
)


@dataclass(frozen=True)
class InputSpec:
    """What a random input looks like.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        vocabulary: Integers are drawn from 0 up to this, exclusive; ``None`` for other dtypes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    vocabulary: int | None = None


def parse_input(text: str) -> InputSpec:
    """Return the meaning of ``SHAPE[:DTYPE[:VOCAB]]``.

    Args:
        text: For example ``"2x3x224x224"``, ``"2x16:int64:50257"``, ``"scalar:float64"``.

    Returns:
        Shape, dtype and vocabulary size.

    Raises:
        ValueError: If the text has another form, an unknown dtype, or no vocabulary size where one
            is needed.

    Example:
        >>> parse_input("2x16:int64:50257")
        InputSpec(shape=(2, 16), dtype=torch.int64, vocabulary=50257)
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise ValueError(
            f"{text!r} is not SHAPE[:DTYPE[:VOCAB]]; use one like 2x3x224x224, 2x16:int64:50257 or "
            "scalar:float64"
        )
    sizes = [] if form["shape"] == "scalar" else form["shape"].split("x")
    if any(int(size) == 0 for size in sizes):
        raise ValueError(f"{text!r}: every size must be 1 or more")
    dtype = "float32" if form["dtype"] is None else form["dtype"]
    if dtype not in (*_FLOATS, *_INTEGERS, "bool"):
        raise ValueError(
            f"{text!r}: unknown dtype {dtype!r}; use one of {', '.join(_FLOATS + _INTEGERS)}, bool"
        )
    vocabulary = _vocabulary(text, dtype, form["vocabulary"])
    return InputSpec(tuple(map(int, sizes)), getattr(torch, dtype), vocabulary)


def _vocabulary(text: str, dtype: str, size: str | None) -> int | None:
    if dtype not in _INTEGERS:
        if size is not None:
            raise ValueError(f"{text!r}: only integers have a vocabulary; drop ':{size}'")
        return None
    if size is None:
        raise ValueError(
            f"{text!r}: {dtype} needs the vocabulary size, SHAPE:{dtype}:VOCAB; values are drawn "
            "from 0 to VOCAB - 1"
        )
    # Values up to the dtype's largest; torch draws below an int64, so that one loses its last.
    largest = min(torch.iinfo(getattr(torch, dtype)).max + 1, 2**63 - 1)
    if not (size.isascii() and size.isdecimal() and 1 <= int(size) <= largest):
        raise ValueError(f"{text!r}: the vocabulary size of {dtype} must be 1 to {largest}")
    return int(size)


def parse_keywords(text: str) -> dict[str, Any]:
    """Return keyword inputs from a JSON object, strings of the form of an input made such.

    Args:
        text: For example ``'{"input_ids": "2x16:int64:100", "use_cache": false, "mode": "=2x2"}'``.

    Returns:
        Name -> :class:`InputSpec`, or the value as it is; ``"=..."`` is the string after ``=``.

    Raises:
        ValueError: If the text is not a JSON object, or a string begins like an input and is none.

    Example:
        >>> parse_keywords('{"use_cache": false, "mode": "=2x2"}')
        {'use_cache': False, 'mode': '2x2'}
    """
    return {name: _keyword(name, value) for name, value in json_object(text).items()}


def json_object(text: str) -> dict[str, Any]:
    """Return what a JSON object says.

    Args:
        text: JSON.

    Returns:
        The object as a dict.

    Raises:
        ValueError: If the text is not JSON or not an object.

    Example:
        >>> json_object('{"num_classes": 10}')
        {'num_classes': 10}
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not JSON ({error}); use an object like {{}}") from None
    if not isinstance(value, dict):
        raise ValueError(f'{text!r} is not a JSON object; use one like {{"name": 1}}')
    return value


def _keyword(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.startswith("="):
        return value[1:]
    if _FORM.fullmatch(value) is None:
        return value
    try:
        return parse_input(value)
    except ValueError as error:  # a slip in a spec would silently become a string
        raise ValueError(f"{name!r}: {error} (to pass the string, write {'=' + value!r})") from None


def random_input(spec: InputSpec, generator: torch.Generator) -> Tensor:
    """Return a random tensor: normal, whole numbers below the vocabulary size, or bits.

    Args:
        spec: What it looks like.
        generator: Where the randomness comes from.

    Returns:
        A new tensor on the CPU.

    Example:
        >>> random_input(parse_input("2x3:int64:5"), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    if spec.dtype.is_floating_point:
        # Drawn in float32 and rounded, so that a dtype does not change the numbers.
        draw = torch.float64 if spec.dtype == torch.float64 else torch.float32
        return torch.randn(spec.shape, generator=generator, dtype=draw).to(spec.dtype)
    high = 2 if spec.vocabulary is None else spec.vocabulary
    return torch.randint(high, spec.shape, generator=generator, dtype=torch.int64).to(spec.dtype)


def import_model(target: str, kwargs: Mapping[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """Import a model, its random weights made from a seed.

    Args:
        target: ``"my.models:resnet18"``: a module to import, and the name in it of a torch module
            or of a callable that returns one.
        kwargs: Keyword arguments of the callable.
        seed: Of torch's random numbers, set before the import and again before the call.

    Returns:
        The model.

    Raises:
        ValueError: With one line that says what is wrong with the target.

    Example:
        >>> import_model("torch.nn:Linear", {"in_features": 2, "out_features": 3})
        Linear(in_features=2, out_features=3, bias=True)
    """
    if _TARGET.fullmatch(target) is None:
        raise ValueError("not MODULE:NAME, like my.models:resnet18")
    place, _, name = target.partition(":")
    torch.manual_seed(seed)
    try:
        module = importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise ValueError(f"cannot import {place} ({in_one_line(error)})") from error
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError:
        raise ValueError(f"there is no {name} in {place}") from None
    if isinstance(found, nn.Module):
        if kwargs is not None:
            raise ValueError(f"{name} is a module, not a callable; drop --factory-kwargs")
        return found
    torch.manual_seed(seed)  # again: what the import drew must not matter
    try:
        made = found(**(kwargs or {}))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be called ({in_one_line(error)})") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} returned {type(made).__name__}; it must return a torch.nn.Module")
    return made


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load weights into a model; every one must be there and none too many.

    Args:
        model: Changed in place.
        path: A ``.safetensors`` file, or what ``torch.save`` wrote of a state dict, or of a dict
            with one under ``"state_dict"`` or ``"model"``. No code in it is run.

    Raises:
        ValueError: With one line that says why the file cannot be read or does not fit.

    Example:
        >>> load_checkpoint(nn.Linear(2, 3), "no/such/file.pt")
        Traceback (most recent call last):
        ...
        ValueError: there is no such file
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError("there is no such file")
    state = _read(path)
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"holds {type(state).__name__}; save model.state_dict()")
    try:
        missing, unexpected = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:  # a shape that differs
        raise ValueError(f"does not fit the model ({in_one_line(error)})") from error
    missing = _not_tied(model, missing)
    lists = {"missing": missing, "unexpected": unexpected}
    wrong = [f"{what} {listed(names, 4)}" for what, names in lists.items() if names]
    if wrong:
        raise ValueError(f"does not fit the model: {'; '.join(wrong)}")


def _read(path: Path) -> Any:
    """Return what a file holds."""
    safe = path.suffix == ".safetensors"
    try:
        if safe:
            # By name: it is optional, and no one else needs it.
            return importlib.import_module("safetensors.torch").load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError("safetensors is not installed; run: pip install safetensors") from None
    except Exception as error:
        hint = "" if safe else "; save model.state_dict(), tensors only"
        raise ValueError(f"cannot be read ({in_one_line(error, 120)}){hint}") from error


def _not_tied(model: nn.Module, missing: list[str]) -> list[str]:
    """Return the missing keys that are no other name of a tensor that was loaded."""
    own = model.state_dict(keep_vars=True)
    absent = set(missing)
    loaded = {id(tensor) for name, tensor in own.items() if name not in absent}
    return [name for name in missing if id(own.get(name)) not in loaded]


def in_one_line(error: BaseException, length: int = 400) -> str:
    """Return the type and the message of an error, and where in the user's code it came up.

    Args:
        error: Any exception.
        length: What is longer is cut.

    Returns:
        Text without line breaks.

    Example:
        >>> in_one_line(KeyError("a"))
        "KeyError: 'a'"
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) <= length else text[: length - 4] + " ..."
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_INSIDE)
    ]
    return text + (f", in {frames[-1].filename}, line {frames[-1].lineno}" if frames else "")


def unclassified(model: nn.Module, report: SphereReport) -> list[str]:
    """Return the trainable parameters about which a report knows nothing.

    Args:
        model: The module that was analysed.
        report: What :func:`sphereopt.find_spheres` returned for it.

    Returns:
        The names of the parameters that require a gradient and have status ``"none"`` without
        evidence. Inert parameters, and those measured and found to have a norm that matters, are
        classified.

    Example:
        >>> from sphereopt.detect import Finding
        >>> findings = {"weight": Finding("weight", (2, 2), None, (), "none", None, "never ran")}
        >>> unclassified(nn.Linear(2, 2, bias=False), SphereReport(findings))
        ['weight']
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    names = {report.aliases.get(name, name) for name in trainable}
    return [
        f.name
        for f in report.findings.values()
        if f.name in names and f.status == "none" and f.evidence is None
    ]
