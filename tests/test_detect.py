"""find_spheres on models of all kinds: what it leaves alone and what it says."""

import json
import random

import numpy as np
import pytest
import torch
from detection_zoo import (
    BN,
    BN1,
    LN,
    Net,
    UpcastRMS,
    conv,
    conv_norm,
    head,
    image,
    lin_norm,
    rows,
    seq,
)
from torch import nn
from torch.nn import functional as F

from sphereopt.detect import SphereReport, find_spheres


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_eval_model_is_analysed_as_a_training_model():
    model, x = conv_norm(BN(6), nn.ReLU()), image()
    trained = find_spheres(model, x)
    assert find_spheres(model.eval(), x) == trained
    assert not any(m.training for m in model.modules())


def fingerprint(model):
    return [
        [(n, id(p), p.dtype, p.requires_grad, p.tolist()) for n, p in model.named_parameters()],
        [(n, id(b), b.dtype, b.tolist()) for n, b in model.named_buffers()],
        [(n, m.training, getattr(m, "eps", None)) for n, m in model.named_modules()],
        [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        (torch.get_default_dtype(), torch.is_grad_enabled()),
    ]


def test_model_and_generators_are_untouched():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand(()) * random.random() * np.random.rand()  # noqa: NPY002

    model = seq(conv(), BN(6), nn.ReLU(), nn.Dropout(0.5), Noisy(), head(6))
    x = image()
    model(x).sum().backward()
    model[0].weight.grad = None
    model[1].weight.requires_grad_(False)
    model[3].eval()
    copied, before = x.clone(), fingerprint(model)
    with torch.no_grad():
        report = find_spheres(model, x)
    assert fingerprint(model) == before
    assert torch.equal(x, copied)
    assert report.spheres == {"0.weight": "row"}


def test_in_place_forward_and_inference_mode():
    def forward(s, x):
        return s.f(x.mul_(2)).relu_()

    model = Net(forward, f=lin_norm(BN1(6)))
    x = rows()
    before = x.clone()
    with torch.inference_mode():
        assert find_spheres(model, x).spheres == {"f.0.weight": "row"}
    assert torch.equal(x, before)


def test_frozen_parameters_are_found_too():
    model = conv_norm(BN(6), nn.ReLU()).requires_grad_(False)
    assert find_spheres(model, image()).spheres == {"0.weight": "row"}


def test_deterministic_in_the_seed():
    model, x = conv_norm(nn.GroupNorm(2, 8), nn.ReLU(), n=8), image()
    first = find_spheres(model, x, seed=1)
    torch.manual_seed(99)  # the state of the outside generators does not matter
    assert find_spheres(model, x, seed=1) == first
    other = find_spheres(model, x, seed=2)
    assert other != first
    assert other.spheres == first.spheres


def test_real_eps_grows_as_weights_shrink():
    torch.manual_seed(1)
    x, w = torch.randn(64, 8), torch.randn(6, 8) / 8**0.5
    measured = []
    for scale in (1.0, 0.1, 0.01, 0.001):
        model = lin_norm(BN1(6), nn.ReLU())
        model[0].weight.data.copy_(scale * w)
        finding = find_spheres(model, x)["0.weight"]
        assert finding.sphere == "row"
        measured.append(finding.evidence.at_real_eps)
        # The normalized output goes with the norm as |w|**(eps/(var+eps)). c divides that radial
        # part by sum |w*grad|, which is larger than the radial part of a plain linear layer.
        var = (x @ (scale * w).T).var(0, unbiased=False)
        predicted = float((1e-5 / (var + 1e-5)).max())
        assert predicted / 50 < measured[-1] < predicted
    assert measured == sorted(measured)
    assert measured[0] < 1e-4
    assert measured[-1] > 0.1


def test_real_eps_is_none_behind_a_zero_gain():
    model = conv_norm(BN(6), nn.ReLU())
    nn.init.zeros_(model[1].weight)
    finding = find_spheres(model, image())["0.weight"]
    assert finding.sphere == "row"
    assert finding.evidence.at_real_eps is None


def test_report_text_and_json():
    model = seq(nn.Linear(8, 6, bias=False), BN1(6), nn.ReLU(), nn.Linear(6, 5))
    model[0].weight.data.mul_(1e-3)
    model[1].unused = nn.Linear(3, 3)
    report = find_spheres(model, rows(), output=lambda out: out[:, :2])
    text = str(report)
    lines = text.splitlines()
    assert "row" in lines[1]
    assert " ! " in lines[1]
    assert "6x8" in lines[1]
    assert text.isascii()
    assert repr(report) == "SphereReport(1 of 7 parameters on proved spheres)"
    assert list(report) == [n for n, _ in model.named_parameters()]
    again = SphereReport.from_json(report.to_json())
    assert again == SphereReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert again.aliases == report.aliases
    assert again["0.weight"].shape == (6, 8)


def test_tied_aliases():
    c = conv(4, 4, padding=1)
    model = seq(c, BN(4), nn.ReLU(), c, BN(4), head(4))
    report = find_spheres(model, image(4))
    assert report["3.weight"] is report["0.weight"]
    assert "3.weight" in report
    assert len(report) == len(list(model.parameters()))
    assert "nothing" not in report
    with pytest.raises(KeyError):
        report["nothing"]


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning"
)  # torch's own, on importing dynamo
@pytest.mark.parametrize("wrap", ["compile", "orig_mod", "data_parallel"])
def test_wrappers(wrap):
    model, x = conv_norm(BN(6), nn.ReLU()), image()
    if wrap == "compile":  # both ways; compiled code itself never runs in detection
        model[0] = torch.compile(model[0])
        model.compile()
        wrapped, prefix, name = torch.compile(model), "_orig_mod.", "0._orig_mod.weight"
    elif wrap == "orig_mod":
        wrapped, prefix, name = Net(None, _orig_mod=model), "_orig_mod.", "0.weight"
    else:
        wrapped, prefix, name = nn.DataParallel(model), "module.", "0.weight"
    report = find_spheres(wrapped, x)
    assert report.spheres == {name: "row"}
    assert report[prefix + name] is report[name]
    assert list(report) == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(dtype):
    model = seq(nn.Linear(8, 6, bias=False), UpcastRMS(6), nn.GELU(), nn.Linear(6, 2)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        report = find_spheres(model, rows().to(dtype))
    assert report.spheres == {"0.weight": "tensor"}
    assert report["0.weight"].evidence.euler < 1e-12


class Labelled(nn.Module):
    """Keyword inputs, dict output, a hidden state that is not part of the function."""

    def __init__(self):
        super().__init__()
        self.c, self.bn, self.h = conv(), BN(6), head(6)

    def forward(self, *, batch, labels=None, tapped=False):
        hidden = self.c(batch["pixels"])
        logits = self.h(F.relu(self.bn(hidden)))
        out = {"hidden_states": (hidden,), "logits": logits}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits, labels)
            out["logits"] = hidden.mean((2, 3))
        return out["hidden_states"] if tapped else out


def test_keyword_inputs_and_dict_output():
    model, batch = Labelled(), {"pixels": image()}
    expected = {"c.weight": "row"}
    assert find_spheres(model, kwargs={"batch": batch}).spheres == expected
    labels = torch.tensor([0, 1, 0, 1])
    assert find_spheres(model, kwargs={"batch": batch, "labels": labels}).spheres == expected
    both = {"batch": batch, "tapped": True}
    assert find_spheres(model, kwargs=both).spheres == {}
    report = find_spheres(model, kwargs={"batch": batch}, output=lambda out: out["hidden_states"])
    assert report.spheres == {}


def test_dataclass_output():
    import dataclasses

    @dataclasses.dataclass
    class Out:
        logits: torch.Tensor
        hidden: torch.Tensor

    def forward(s, x):
        y = s.c(x)
        return Out(s.h(F.relu(s.bn(y))), y)

    model = Net(forward, c=conv(), bn=BN(6), h=head(6))
    assert find_spheres(model, image()).spheres == {"c.weight": "row"}


def test_loss_is_part_of_the_function():
    model, x = nn.Linear(8, 5, bias=False), rows()
    labels = torch.arange(8) % 5
    assert find_spheres(model, x).spheres == {}
    report = find_spheres(model, x, loss=lambda out: F.cross_entropy(F.normalize(out), labels))
    assert report.spheres == {"weight": "tensor"}
    loss = Net(lambda s, out: s.ce(out, labels % 2), ce=nn.CrossEntropyLoss(torch.rand(2)))
    report = find_spheres(lin_norm(BN1(6), nn.ReLU()), x, loss=loss)
    assert report.spheres == {"0.weight": "row"}
    assert loss.ce.weight.dtype == torch.float32


def test_l2_term_of_the_loss_is_seen_and_leaves_no_gradient():
    model, x = lin_norm(BN1(6), nn.ReLU()), rows()

    def loss(out):
        return out.square().mean() + 1e-2 * sum(p.square().sum() for p in model.parameters())

    assert find_spheres(model, x, loss=lambda out: out.square().mean()).spheres == {
        "0.weight": "row"
    }
    assert find_spheres(model, x, loss=loss).spheres == {}
    assert all(p.grad is None for p in model.parameters())


def test_unused_and_unseen_parts():
    model = seq(nn.Embedding(9, 8), LN(8), nn.Linear(8, 3))
    model[1].unused = nn.Linear(3, 3)
    report = find_spheres(model, torch.arange(12).reshape(3, 4) % 6)
    assert report.spheres == {"0.weight": "row"}
    assert "(3 of 9 rows not looked up: like the rest)" in report["0.weight"].reason
    assert report["1.unused.weight"].status == "inert"
    assert report["1.unused.weight"].evidence is None
    biased = find_spheres(lin_norm(BN1(6), bias=True), rows())
    assert biased["0.bias"].status == "inert"


def test_rows_that_the_example_does_not_reach_are_not_certified():
    """A table of experts: nothing says that the others run like those that were chosen."""

    def forward(s, x):
        y = torch.stack([x @ s.experts[i] for i in (0, 2)])
        return s.h(s.n(y)).sum(0)

    model = Net(forward, experts=nn.Parameter(torch.randn(4, 8, 6)), n=LN(6), h=nn.Linear(6, 2))
    report = find_spheres(model, rows())
    assert report.spheres == {}
    assert "2 of 4 rows or blocks were never exercised" in report["experts"].reason
    model.function = lambda s, x: s.h(s.n(torch.stack([x @ e for e in s.experts]))).sum(0)
    assert find_spheres(model, rows()).spheres == {"experts": "row"}


def test_a_bag_of_rows_is_one_sphere():
    model = seq(nn.EmbeddingBag(9, 8, mode="mean"), LN(8), nn.Linear(8, 3))
    found = find_spheres(model, torch.arange(12).reshape(3, 4) % 6)["0.weight"]
    assert (found.sphere, found.status) == ("tensor", "proved")


def test_gains_are_found():
    def forward(s, x):
        return s.h(s.n(s.gain * x))

    model = Net(forward, gain=nn.Parameter(torch.ones(8)), n=LN(8), h=nn.Linear(8, 2))
    model.scale = nn.Parameter(torch.tensor(1.0))
    report = find_spheres(model, rows())
    assert report.spheres == {"gain": "tensor"}
    assert report["h.bias"].status == "none"
    assert report["scale"].status == "inert"
    assert report["scale"].shape == ()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_and_sparse_gradients(reentrant):
    from torch.utils.checkpoint import checkpoint

    def forward(s, i):
        return s.h(checkpoint(lambda x: torch.tanh(s.n(s.f(x))), s.e(i), use_reentrant=reentrant))

    parts = {"e": nn.Embedding(6, 8, sparse=True), "f": nn.Linear(8, 6, bias=False)}
    model = Net(forward, **parts, n=UpcastRMS(6), h=nn.Linear(6, 2))
    report = find_spheres(model, torch.arange(12).reshape(3, 4) % 6)
    assert report.spheres == {"e.weight": "row", "f.weight": "tensor"}


def test_unregistered_tensors_and_created_constants_follow_to_float64():
    def forward(s, x):
        return s.h(s.n(s.f(x) * s.scale * torch.full((6,), 2.0)) @ torch.eye(6))

    model = Net(forward, f=nn.Linear(8, 6, bias=False), n=LN(6), h=nn.Linear(6, 2))
    model.scale = torch.rand(())
    report = find_spheres(model, rows())
    assert report.spheres == {"f.weight": "tensor"}
    assert model.scale.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
def test_weights_computed_by_hooks_are_copied():
    model = seq(nn.utils.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2))
    model(rows())  # leaves a computed weight behind, which deepcopy refuses
    assert find_spheres(model, rows()).spheres == {"0.weight_v": "row"}


def test_parameters_that_are_not_floating_point():
    model = lin_norm(BN1(6))
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    report = find_spheres(model, rows())
    assert report.spheres == {"0.weight": "row"}
    assert "not a floating-point parameter" in report["codes"].reason


def test_findings_are_frozen():
    finding = find_spheres(lin_norm(BN1(6)), rows())["0.weight"]
    with pytest.raises(AttributeError):
        finding.sphere = None
    assert finding.members == ("0.weight",)
