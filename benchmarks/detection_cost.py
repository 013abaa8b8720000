"""Time and memory of ``find_spheres`` as a ratio to one forward and backward pass of the model.

    python benchmarks/detection_cost.py [--models resnet50,gpt2,qwen3] [--rounds 3]

Needs transformers, for its models only: random weights, nothing is downloaded. The pass is what a
training step does in float32, without the optimizer: clear the gradients, run the model in training
mode, cross-entropy, backward. Time: a round is pass, find_spheres, pass; the median over rounds of
find_spheres over the mean of its two passes. Memory: the largest resident set of a process that
builds the model and does nothing but the one or the other.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Only the children import torch: a child's largest resident set is never reported below what its
# parent held when it started it.

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
TARGET = {"time": 15, "memory": 3}
VOCABULARY = 50257


def resnet50():
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    return model, {"pixel_values": torch.randn(4, 3, 224, 224)}


def gpt2():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = torch.randint(VOCABULARY, (2, 128))
    return GPT2LMHeadModel(GPT2Config()), {"input_ids": ids, "use_cache": False}


def qwen3():
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
    )
    ids = torch.randint(VOCABULARY, (2, 128))
    return Qwen3ForCausalLM(config), {"input_ids": ids, "use_cache": False}


MODELS = {
    "resnet50": (resnet50, "ResNet-50, 4 images of 224x224"),
    "gpt2": (gpt2, "GPT-2 small, 2 texts of 128 tokens"),
    "qwen3": (qwen3, "Qwen3-like (QK-norm, untied head), 2 texts of 128 tokens"),
}


# In a child process.


def one_pass(model, inputs) -> None:
    import torch

    model.zero_grad(set_to_none=True)
    logits = model(**inputs).logits.flatten(0, -2)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    torch.nn.functional.cross_entropy(logits, labels).backward()


def find(model, inputs):
    from sphereopt import find_spheres

    model.zero_grad(set_to_none=True)  # both start without gradients
    return find_spheres(model, kwargs=inputs)


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def child(what: str, name: str, rounds: int) -> dict:
    """Do one thing in this process and say what it took."""
    import torch
    import transformers

    import sphereopt as so

    torch.manual_seed(0)
    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = {
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sphereopt": so.__version__,
        },
    }
    if what != "imports":
        model, inputs = MODELS[name][0]()
        model.train()
        found["parameters"] = sum(p.numel() for p in model.parameters())
    if what == "pass":
        for _ in range(2):
            one_pass(model, inputs)
    elif what == "find":
        report = find(model, inputs)
        found["report"] = repr(report)
        found["spheres"] = len(report.spheres)
    elif what == "time":
        one_pass(model, inputs)  # warm-up
        found["rounds"] = [
            [seconds(step, model, inputs) for step in (one_pass, find, one_pass)]
            for _ in range(rounds)
        ]
    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return found


# In the parent.


def ask(what: str, name: str, rounds: int = 1, threads: int | None = 1) -> dict:
    """Start a process that does one thing, and return what it says."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-W", "ignore", __file__, "--child", what, name, str(rounds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured_time(name: str, rounds: int, threads: int | None) -> dict:
    answer = ask("time", name, rounds, threads)
    ratios = [found / ((before + after) / 2) for before, found, after in answer["rounds"]]
    return {
        "threads": answer["threads"],
        "pass_s": statistics.median((b + a) / 2 for b, _, a in answer["rounds"]),
        "find_s": statistics.median(found for _, found, _ in answer["rounds"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def measured_memory(name: str) -> dict:
    kinds = ("imports", "model", "pass", "find")
    answers = {kind: ask(kind, name) for kind in kinds}
    peak = {kind: answers[kind]["peak_mb"] for kind in kinds}
    base = peak["imports"]
    return {
        "peak_mb": peak,
        "ratio": peak["find"] / peak["pass"],
        "ratio_without_imports": (peak["find"] - base) / (peak["pass"] - base),
        "parameters": answers["find"]["parameters"],
        "report": answers["find"]["report"],
    }


def processor() -> str:
    """Return the processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(name: str, rounds: int) -> dict:
    print(f"\n{MODELS[name][1]}", flush=True)
    memory = measured_memory(name)
    peak = memory["peak_mb"]
    print(
        f"  {memory['parameters'] / 1e6:.1f}M parameters; {memory['report']}\n"
        f"  peak memory: pass {peak['pass']:.0f} MB, find_spheres {peak['find']:.0f} MB: "
        f"{memory['ratio']:.2f} x (without the {peak['imports']:.0f} MB of the imports: "
        f"{memory['ratio_without_imports']:.2f} x)",
        flush=True,
    )
    times = []
    for threads in (1, None):
        found = measured_time(name, rounds, threads)
        if threads is None and found["threads"] == 1:
            continue
        times.append(found)
        print(
            f"  {found['threads']} thread(s): pass {found['pass_s']:.2f} s, "
            f"find_spheres {found['find_s']:.2f} s: {found['ratio']:.1f} x "
            f"({min(found['ratios']):.1f} to {max(found['ratios']):.1f})",
            flush=True,
        )
    return {"workload": MODELS[name][1], "memory": memory, "time": times}


def page(results: dict, about: dict, command: str) -> str:
    """Return the results as Markdown."""
    rows = [
        "| model | parameters | threads | pass | `find_spheres` | time | peak of the pass | "
        "peak of `find_spheres` | memory | without imports |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in results.values():
        memory = found["memory"]
        peak = memory["peak_mb"]
        # Memory was measured with one thread.
        tail = [
            f"{peak['pass']:.0f} MB",
            f"{peak['find']:.0f} MB",
            f"{memory['ratio']:.2f} x",
            f"{memory['ratio_without_imports']:.2f} x",
        ]
        for i, timed in enumerate(found["time"]):
            head = [found["workload"], f"{memory['parameters'] / 1e6:.1f}M"] if i == 0 else ["", ""]
            cells = [
                *head,
                str(timed["threads"]),
                f"{timed['pass_s']:.2f} s",
                f"{timed['find_s']:.2f} s",
                f"{timed['ratio']:.1f} x",
                *(tail if i == 0 else [""] * len(tail)),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return PAGE.format(
        command=command,
        rows="\n".join(rows),
        rounds=about["rounds"],
        target=TARGET,
        machine=f"{about['processor']}, {about['cores']} cores; {versions}; {about['date']}",
    )


PAGE = """\
# What `find_spheres` costs

    {command}

One call of `find_spheres` against one forward and backward pass of the same model in float32, as in
a training step without the optimizer. Time: median of {rounds} interleaved rounds. Memory: the
largest resident set of a process that builds the model and does only this, with one thread; the
model is included in both, and in the last column the interpreter with its imports is left out.
Targets: {target[time]} x the time, {target[memory]} x the memory.

{rows}

{machine}.
Models from transformers with random weights. Raw numbers:
[detection_cost.json](detection_cost.json).
"""


def write(folder: Path, results: dict, about: dict) -> None:
    """Write the numbers and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"about": about, "targets": TARGET, "results": results}
    (folder / "detection_cost.json").write_text(json.dumps(numbers, indent=1) + "\n")
    models = ",".join(results)
    command = f"python benchmarks/detection_cost.py --models {models} --rounds {about['rounds']}"
    (folder / "detection_cost.md").write_text(page(results, about, command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet50,gpt2,qwen3", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the .json and the .md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], args.child[1], int(args.child[2]))))
        return
    names = args.models.split(",")
    if not set(names) <= set(MODELS):
        parser.error(f"--models {args.models!r}: choose from {', '.join(MODELS)}")
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "rounds": args.rounds,
        "versions": ask("imports", names[0])["versions"],
    }
    results, failed = {}, []
    for name in names:
        try:
            results[name] = measure(name, args.rounds)
        except subprocess.CalledProcessError:  # the child has said why
            failed.append(name)
    if not results:
        sys.exit("nothing was measured")
    write(args.out, results, about)
    within = all(
        found["memory"]["ratio"] <= TARGET["memory"]
        and all(timed["ratio"] <= TARGET["time"] for timed in found["time"])
        for found in results.values()
    )
    targets = f"{TARGET['time']} x the time, {TARGET['memory']} x the memory"
    print(f"\n{'Within' if within else 'NOT within'} the targets: {targets}.")
    if failed:
        sys.exit(f"failed, and not in the files: {', '.join(failed)}")


if __name__ == "__main__":
    main()
