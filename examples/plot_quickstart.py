"""Ten lines: find the spheres of a network, train on them, watch norms and angles.

    python examples/plot_quickstart.py [picture.svg]

The cells, from one "# %%" to the next, can be run one by one in an editor or pasted into a
notebook. Needs pip install "sphereopt[report]" for the picture, nothing for the rest.
"""

# %% A network and something to learn: is the product of four numbers positive?
import sys

import torch
from torch import nn

import sphereopt as so

torch.manual_seed(0)
x = torch.randn(512, 4)
y = (x.prod(1) > 0).long()
model = nn.Sequential(
    nn.Linear(4, 64, bias=False), nn.LayerNorm(64), nn.ReLU(),
    nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.ReLU(),
    nn.Linear(64, 2),
)  # fmt: skip

# %% Which weights are scale-invariant? Both matrices before a LayerNorm; the last is not.
report = so.find_spheres(model, x)
print(report)

# %% The line that is swapped: matrices on spheres turn 0.01 radians per step, the rest is AdamW.
optimizer = so.SphereAdam(so.param_groups(model, report), lr=0.01)

# %% A plain loop. Rows go into a list here; a path such as "run.jsonl" would make a file.
rows = []
with so.track(optimizer, rows.append) as tracker:
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        tracker.log(loss=loss)
        optimizer.step()

# %% Norms are held, and angles are what was asked for.
for step in (1, 100, 200, 300):
    row = rows[step - 1]
    first = row["parameters"]["0.weight"]
    norm, angle = first["norm"]["mean"], first["angle"]["mean"]
    print(f"step {step:3}  loss {row['metrics']['loss']:.3f}  norm {norm:.6f}  angle {angle:.6f}")

# %% The same as a picture. so.report.write("run.jsonl", "run.html") makes a page of many.
if len(sys.argv) > 1:
    so.report.instruments.norms(rows).savefig(sys.argv[1])
