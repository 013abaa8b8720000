"""From the report to training: what is proved, put on spheres, trains as torch does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sphereopt as so

EPS = 1e-30  # so that the invariance is exact


class Layer(nn.Module):
    """Pre-norm, with a fused QKV projection, LayerNorm on queries and keys, biases, two heads."""

    def __init__(self, d=8):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d, eps=EPS), nn.LayerNorm(d, eps=EPS)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.qn, self.kn = nn.LayerNorm(d // 2, eps=EPS), nn.LayerNorm(d // 2, eps=EPS)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.qn(q), self.kn(k), v)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Transformer(nn.Module):
    def __init__(self, d=8, vocabulary=11, length=6):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.layers = nn.ModuleList(Layer(d) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(d, eps=EPS), nn.Linear(d, vocabulary)

    def forward(self, i):
        x = self.tokens(i) + self.places(torch.arange(i.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def trained(model, optimizer, steps=60):
    gen = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        i = torch.randint(0, 11, (4, 7), generator=gen)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(i[:, :-1]).flatten(0, 1), i[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("norm_gains", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_on_proved_spheres_is_that_of_torch(name, norm_gains):
    torch.manual_seed(0)
    model = Transformer().double()
    report = so.find_spheres(model, torch.randint(0, 11, (4, 6)))
    heads = [m for m, spec in report.spheres.items() if spec == "block:4@0:16"]
    assert heads == [(f"layers.{i}.qkv.weight", f"layers.{i}.qkv.bias") for i in (0, 1)]
    stream = next(m for m in report.spheres if "tokens.weight" in m)
    writers = ["tokens.weight", "places.weight"]
    writers += [
        f"layers.{i}.{n}.{p}" for i in (0, 1) for n in ("o", "down") for p in ("weight", "bias")
    ]
    assert sorted(stream) == sorted(writers)
    twin = copy.deepcopy(model)
    plain, ours = (
        so.param_groups(m, report, norm_gains=norm_gains, decay_norms_and_biases=True)
        for m in (model, twin)
    )
    if name == "sgd":
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
        theirs = torch.optim.SGD(plain, **options)
        sphere = so.SphereSGD(ours, **options, radius="free")
    else:
        options = {"lr": 3e-3, "weight_decay": 1e-1, "eps": 1e-30}
        theirs = torch.optim.AdamW(plain, **options)
        sphere = so.SphereAdam(ours, **options, radius="free")
    # Rounding of 1e-16 is amplified by training; the losses move by 0.3 meanwhile.
    torch.testing.assert_close(trained(twin, sphere), trained(model, theirs), rtol=0, atol=1e-8)
    norms = [m.tokens.weight.detach().norm().item() for m in (model, twin)]
    assert abs(norms[0] / norms[1] - 1) > 1e-3  # though one of them has kept its norm
