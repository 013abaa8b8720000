"""Train a small GPT on text, with AdamW, Muon, and optimizers that hold weights on spheres.

    python train_gpt.py --lr 0.01                       # the standard library's own source
    python train_gpt.py --optimizer AdamW --lr 0.01 --data input.txt --steps 1000
Full size, for a GPU (25 million weights): --device cuda --amp --compile --depth 8 --width 512
--heads 8 --context 512 --batch-size 64 --steps 5000 --warmup 250 --data books.txt.gz
To copy into a project of yours: ``make_optimizer``, where one line is swapped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sysconfig
import time
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import sphereopt as so
from sphereopt.optim import literature

ADAM = {"betas": (0.9, 0.95)}
#: Class, weight decay if none is asked for, and options.
OPTIMIZERS: dict[str, tuple[Any, float, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, 0.0, {"momentum": 0.9}),
    "SphereSGD": (so.SphereSGD, 0.0, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, 0.1, ADAM),
    "SphereAdam": (so.SphereAdam, 0.1, ADAM),
    "SphereLion": (so.SphereLion, 0.1, {}),
    "AdamH": (literature.AdamH, 0.1, ADAM),
    # Without spheres SphereMuon is torch.optim.Muon, bit for bit, with AdamW for the rest.
    "Muon": (so.SphereMuon, 0.1, ADAM | {"adjust_lr_fn": "match_rms_adamw"}),
    "SphereMuon": (so.SphereMuon, 0.1, ADAM),
    "MuonH": (literature.MuonH, 0.1, ADAM),
}
#: Beside an lr in radians; 1e-2 for the others. Where no lr is given both are the optimizer's own.
ORDINARY_LR = {"SphereSGD": None, "SphereLion": 1e-3}
ZERO = ("seed", "warmup", "clip", "lr", "ordinary_lr", "weight_decay")  # may be 0
FILES = ("run.jsonl", "checkpoint.pt", "report.html", "result.json", "loss.svg")
CHECK_EVERY = 20  # steps between looks at the loss: each makes the host wait for the device


class RunError(RuntimeError):
    """A run that cannot start, or whose loss is no number any more."""


def knob(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Config:
    data: str = knob("stdlib", "a text file (.gz too), a folder of them, or Python's own source")
    level: str = knob("byte", "what a token is", choices=("byte", "char"))
    max_symbols: int = knob(2_000_000, "read no more bytes or characters than this")
    device: str = knob("cpu", "where to train")
    seed: int = knob(0, "of initial weights and batches")
    steps: int = knob(300, "training steps")
    optimizer: str = knob("SphereAdam", "which one", choices=tuple(OPTIMIZERS))
    lr: float | None = knob(None, "peak rate (None: the optimizer's own)")
    ordinary_lr: float | None = knob(None, "of what is on no sphere, beside --lr in radians")
    weight_decay: float | None = knob(None, "of what is on no sphere of fixed radius")
    radius: str = knob("fixed", "hold norms, or copy AdamW and SGD", choices=("fixed", "free"))
    constrain: bool = knob(False, "also hold the blocks' other matrices on spheres, by choice")
    schedule: str = knob("cosine", "of the rate", choices=("cosine", "wsd"))
    warmup: int = knob(30, "steps of linear warm-up")
    clip: float = knob(1.0, "largest norm of the gradient (0: no clipping)")
    depth: int = knob(2, "transformer blocks")
    width: int = knob(64, "entries of a token's vector")
    heads: int = knob(4, "attention heads")
    context: int = knob(64, "tokens of a training sequence")
    batch_size: int = knob(16, "sequences per step")
    qk_norm: bool = knob(True, "normalize queries and keys")
    sandwich_norm: bool = knob(False, "normalize also what a branch returns")
    tied: bool = knob(False, "one matrix for embedding and head")
    norm_eps: float = knob(1e-6, "eps of all norms")
    amp: bool = knob(False, "bfloat16 autocast")
    compile: bool = knob(False, "torch.compile the model")
    every: int = knob(10, "log norms and angles every this many steps")
    checkpoint_every: int = knob(100, "save every this many steps")
    valid_windows: int = knob(64, "sequences to validate on")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, allowed = getattr(self, entry.name), entry.metadata.get("choices")
            option = "--" + entry.name.replace("_", "-")
            if allowed and value not in allowed:
                raise RunError(f"{option} {value!r}: choose from {', '.join(allowed)}")
            least = 0 if entry.name in ZERO else 1e-38
            if type(value) in (int, float) and not least <= value < 1e38:
                raise RunError(f"{option} {value}: must be between {least} and 1e38")
        if self.width % (2 * self.heads):
            raise RunError(f"--width {self.width}: choose a multiple of {2 * self.heads}")
        able = self.optimizer in ("SphereAdam", "SphereSGD") and not self.constrain
        if self.radius == "free" and not able:
            raise RunError("--radius free: needs SphereAdam or SphereSGD, and no --constrain")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError):
            raise RunError(f"--device {self.device}: torch cannot use it here; use cpu") from None


def read(file: Path, level: str) -> Any:
    """Return a file's bytes, or the code points of its characters."""
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if level == "char":
            return np.frombuffer(raw.decode("utf-8").encode("utf-32-le"), dtype="<u4")
        return np.frombuffer(raw, dtype=np.uint8)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RunError(f"--data: {file.name} cannot be read ({error})") from None


def load_text(c: Config) -> tuple[Tensor, Tensor, int]:
    """Return training tokens, validation tokens (the last tenth; of whole files) and vocabulary."""
    path = Path(sysconfig.get_paths()["stdlib"] if c.data == "stdlib" else c.data)
    pattern = "*.py" if c.data == "stdlib" else "*"
    files = [path] if path.is_file() else sorted(p for p in path.glob(pattern) if p.is_file())
    if not files:
        raise RunError(f"--data {c.data!r}: there is no such file, or no file in the folder")
    texts = [read(file, c.level) for file in files]
    known, tokens = np.unique(np.concatenate(texts), return_inverse=True)
    ends = np.cumsum([len(text) for text in texts])[:-1]
    split = max((int(n) for n in ends if n <= 0.9 * len(tokens)), default=len(tokens) * 9 // 10)
    train, valid = tokens[:split][: c.max_symbols], tokens[split:][: c.max_symbols]
    if min(len(train), len(valid)) <= c.context:
        raise RunError(f"--data {c.data!r}: {len(tokens)} tokens are few for --context {c.context}")
    return torch.tensor(train).to(c.device), torch.tensor(valid).to(c.device), len(known)


def batch(tokens: Tensor, config: Config, step: int) -> Tensor:
    """Return random windows, ``(batch_size, context + 1)``; they depend on seed and step only."""
    # Of a seed torch's generator reads 32 bits, the low ones.
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) % 2**32)
    high = len(tokens) - config.context
    starts = torch.randint(high, (config.batch_size, 1), generator=generator).to(tokens.device)
    return tokens[starts + torch.arange(config.context + 1, device=tokens.device)]


class Block(nn.Module):
    """Attention and a squared-ReLU MLP, each with a norm before it; no norm has gains."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q, self.k, self.v, self.o = (nn.Linear(c.width, c.width, bias=False) for _ in range(4))
        self.up = nn.Linear(c.width, 4 * c.width, bias=False)
        self.down = nn.Linear(4 * c.width, c.width, bias=False)
        half = c.width // c.heads // 2
        turns = torch.arange(c.context)[:, None] * 1e4 ** (-torch.arange(half) / half)
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)

    def norm(self, x: Tensor, wanted: bool = True) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], eps=self.c.norm_eps) if wanted else x

    def rotary(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, a * self.sin + b * self.cos), -1).to(x.dtype)

    def attention(self, x: Tensor) -> Tensor:
        qkv = (f(x).unflatten(-1, (self.c.heads, -1)) for f in (self.q, self.k, self.v))
        q, k, v = (y.transpose(1, 2) for y in qkv)
        q, k = (self.rotary(self.norm(y, self.c.qk_norm)) for y in (q, k))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.attention(self.norm(x)), self.c.sandwich_norm)
        y = self.down(functional.relu(self.up(self.norm(x))).square())
        return x + self.norm(y, self.c.sandwich_norm)


class GPT(nn.Module):
    def __init__(self, c: Config, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, c.width)
        self.blocks = nn.Sequential(*(Block(c) for _ in range(c.depth)))
        self.head = nn.Linear(c.width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            branch = name.endswith(("o.weight", "down.weight"))
            nn.init.normal_(p, std=(p.shape[1] * (2 * c.depth if branch else 1)) ** -0.5)
        if c.sandwich_norm:  # beside branches of size 1
            nn.init.normal_(self.embed.weight)
        if c.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks[-1].norm(self.blocks(self.embed(tokens))))


def make_optimizer(model: GPT, tokens: Tensor, c: Config) -> torch.optim.Optimizer:
    """Find the spheres, group the parameters, and build the optimizer of this name."""
    kind, decay, options = OPTIMIZERS[c.optimizer]
    spheres: Any = {} if c.optimizer == "Muon" else so.find_spheres(model, tokens)
    if c.optimizer in ("AdamH", "SphereMuon", "MuonH"):
        # Joint spheres have the embedding in them, which is no matrix to orthogonalize.
        spheres = {name: spec for name, spec in spheres.spheres.items() if isinstance(name, str)}
    prefix = "blocks." if c.constrain or c.optimizer == "Muon" else "none"
    groups = so.param_groups(model, spheres, constrain=lambda name, _: name.startswith(prefix))
    plain, ordinary_lr = c.optimizer in ("AdamW", "SGD") or c.radius == "free", c.ordinary_lr
    if ordinary_lr is None and c.lr is not None and not plain:
        ordinary_lr = ORDINARY_LR.get(c.optimizer, 1e-2)
    for group in groups:
        held = group["sphere"] is not None
        if c.optimizer in ("Muon", "SphereMuon"):
            group["orthogonalize"] = held
        if not held and ordinary_lr is not None:
            group["lr"] = ordinary_lr
        if c.optimizer == "Muon":  # the same matrices, on no sphere
            group["sphere"] = None
        elif held and not plain:
            group["weight_decay"] = 0.0
    given = {"lr": c.lr, "weight_decay": decay if c.weight_decay is None else c.weight_decay}
    given["radius"] = "free" if c.radius == "free" else None
    options = options | {key: value for key, value in given.items() if value is not None}
    # The swap: torch.optim.AdamW(groups, ...) and so.SphereAdam(groups, ...) take the same groups.
    return kind(groups, **options)


def share_of_peak(step: int, c: Config) -> float:
    """Return the rate over its peak: linear warm-up, then a cosine to 0.1, or WSD."""
    if step < c.warmup:
        return (step + 1) / c.warmup
    if c.schedule == "wsd":  # stable, then linear to 0 over the last fifth
        return min(1.0, (c.steps - step) / (0.2 * c.steps))
    done = (step - c.warmup) / max(1, c.steps - c.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


class Run:  # what a checkpoint holds, and what makes it
    def __init__(self, config: Config) -> None:
        self.config = c = config
        self.train, self.valid, vocabulary = load_text(c)
        torch.manual_seed(c.seed)
        self.model = GPT(c, vocabulary).to(c.device)
        self.optimizer = make_optimizer(self.model, batch(self.train, c, 0)[:2, :-1], c)
        self.schedule = LambdaLR(self.optimizer, lambda step: share_of_peak(step, c))
        self.forward = torch.compile(self.model) if c.compile else self.model
        self.losses, self.step = torch.zeros(c.steps, device=c.device), 0

    def loss(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean cross-entropy in nats per token, and the share of tokens guessed."""
        device = torch.device(self.config.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.amp):
            logits = self.forward(windows[:, :-1]).flatten(0, 1)
        logits, targets = logits.to(self.losses.dtype), windows[:, 1:].flatten()
        right = (logits.argmax(-1) == targets).to(self.losses.dtype)
        return functional.cross_entropy(logits, targets), right.mean()

    def make_step(self, tracker: so.Tracker | None) -> None:
        self.optimizer.zero_grad()
        loss, _ = self.loss(batch(self.train, self.config, self.step))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        if tracker:
            tracker.log(loss=loss)
        self.optimizer.step()
        self.schedule.step()
        self.losses[self.step] = loss.detach()
        self.step += 1

    def check(self) -> None:
        for step in (~self.losses[: self.step].isfinite()).nonzero().flatten().tolist():
            raise RunError(f"the loss is not finite at step {step + 1} (log kept); lower --lr")

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Return loss and accuracy on windows spread evenly over the validation text."""
        c = self.config
        starts = torch.arange(c.valid_windows) * (len(self.valid) - c.context) // c.valid_windows
        windows = self.valid[(starts[:, None] + torch.arange(c.context + 1)).to(c.device)]
        found = [torch.stack(self.loss(part)) * len(part) for part in windows.split(c.batch_size)]
        return tuple((torch.stack(found).sum(0) / c.valid_windows).tolist())

    def save(self, path: Path) -> None:
        self.check()
        content = {"config": asdict(self.config), "losses": self.losses[: self.step]}
        for name in ("model", "optimizer", "schedule"):
            content[name] = getattr(self, name).state_dict()
        torch.save(content, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # a crash while saving leaves the former one

    def load(self, path: Path) -> None:
        if not path.is_file():
            raise RunError(f"--resume: there is no {path}; start without it")
        content = torch.load(path, map_location=self.config.device, weights_only=True)
        then, now = content["config"], asdict(self.config)
        other = {n for n in now if now[n] != then[n]} - {"device", "compile", "checkpoint_every"}
        if other:
            raise RunError(f"--resume: the checkpoint has another {', '.join(sorted(other))}")
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(content[name])
        self.step = len(content["losses"])
        self.losses[: self.step] = content["losses"]


def run(*, out=None, progress: bool = True, resume: bool = False, **knobs: Any) -> dict[str, Any]:
    """Train and validate; knobs are those of Config. Without ``out`` nothing is written."""
    state, start = Run(Config(**knobs)), time.perf_counter()
    c, name, console = state.config, state.config.optimizer, Console(stderr=True)
    with nullcontext() if out is None else open_log(state, Path(out), resume) as log:
        steps = range(state.step + 1, c.steps + 1)
        for step in track(steps, name, console=console, disable=not progress):
            state.make_step(log)
            if step % CHECK_EVERY == 0 or step == c.steps:
                state.check()
            if out is not None and (step % c.checkpoint_every == 0 or step == c.steps):
                state.save(Path(out) / "checkpoint.pt")
    result = summary(state, time.perf_counter() - start)
    if out is not None:
        write(result, Path(out))
    return result


def open_log(state: Run, out: Path, resume: bool) -> AbstractContextManager[Any]:
    """Go on from the checkpoint, or clear the folder; return the tracker, or None in a context."""
    if resume:
        state.load(out / "checkpoint.pt")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in () if resume else FILES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"--out {str(out)!r}: cannot write there ({error.strerror})") from None
    if all(group["sphere"] is None for group in state.optimizer.param_groups):
        return nullcontext()  # there is nothing to track
    options = {"every": state.config.every, "config": asdict(state.config)}
    return so.track(state.optimizer, out / "run.jsonl", start=state.step, **options)


def summary(state: Run, seconds: float) -> dict[str, Any]:
    """Return every knob, and what came of it."""
    weights = dict.fromkeys(("proved", "constrained", "ordinary"), 0)
    for group in state.optimizer.param_groups:
        kind = "ordinary" if group["sphere"] is None else group["kind"]
        weights[kind] += sum(p.numel() for p in group["params"])
    losses, (loss, accuracy) = state.losses.tolist(), state.evaluate()
    if not math.isfinite(loss):
        raise RunError(f"the validation loss is not finite after step {state.step}; lower --lr")
    last = losses[-max(1, len(losses) // 10) :]
    result = {"train_loss": sum(last) / len(last), "valid_loss": loss}
    result |= {"valid_bits": loss / math.log(2), "valid_accuracy": accuracy}
    result |= {"seconds": seconds, "weights": weights, "losses": losses}
    groups, decay = state.optimizer.param_groups, state.optimizer.defaults["weight_decay"]
    result |= {"lr": groups[0]["initial_lr"], "weight_decay": decay}  # spheres come first
    return asdict(state.config) | result


def write(result: dict[str, Any], out: Path) -> None:
    (out / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    axes = Figure(figsize=(6, 3.2), layout="constrained").subplots()
    axes.plot(range(1, result["steps"] + 1), result["losses"], linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=result["optimizer"])
    axes.figure.savefig(out / "loss.svg")
    if (out / "run.jsonl").exists():
        so.report.write(out / "run.jsonl", out / "report.html")


def main() -> None:
    # Without a usage line an error is one line.
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    for entry in fields(Config):
        option, default = "--" + entry.name.replace("_", "-"), entry.default
        kind = float if default is None else type(default)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        text = f"{entry.metadata['help']} (default: {default})"
        parser.add_argument(option, default=default, help=text, **how)
    parser.add_argument("--out", type=Path, default=Path("runs/train_gpt"), help="folder to write")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = vars(parser.parse_args())
    try:
        result = run(**args)
    except RunError as error:
        parser.error(str(error))
    table = Table("what", "value", title=f"{result['optimizer']}; all files: {args['out']}")
    for kind, entries in result["weights"].items():
        table.add_row(f"{kind} weights", f"{entries:,}")
    for key in ("steps", "lr", "train_loss", "valid_loss", "valid_bits", "valid_accuracy"):
        table.add_row(key.replace("_", " "), f"{result[key]:.4g}")
    Console().print(table)


if __name__ == "__main__":
    main()
