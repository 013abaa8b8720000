"""``propagation`` on models of many kinds, and what it leaves behind: nothing."""

import copy
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sphereopt.diagnostics import propagation


def by_name(found):
    return {row.label: row for row in found.layers}


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Residual(8), Residual(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def test_a_module_that_runs_twice_in_place_has_two_rows_with_the_gradients_of_both():
    model, x = resnet(), torch.randn(6, 3, 8, 8)
    rows = by_name(propagation(model, x))
    assert {"1.relu", "1.relu[2]"} <= rows.keys()
    # The same net without in-place operations: hooks on the values as they were.
    plain = copy.deepcopy(model)
    for block in (plain[1], plain[2]):
        block.relu.inplace = False
    for label, row in by_name(propagation(plain, x)).items():
        assert row == rows[label], label


def test_an_in_place_activation_does_not_change_what_was_seen_before_it():
    layers = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)
    x = torch.randn(8, 4)
    row = by_name(propagation(nn.Sequential(*layers), x, loss=lambda out: out.square().sum()))["0"]
    pre = layers[0](x)
    loss = layers[2](pre.relu()).square().sum()
    (grad,) = torch.autograd.grad(loss, pre)
    assert row.grad_norm == pytest.approx(grad.norm().item(), rel=1e-6)
    assert row.variance == pytest.approx(pre.var(0, correction=0).mean().item(), rel=1e-5)


def test_a_model_that_begins_in_place_leaves_the_batch_alone():
    x = torch.randn(8, 4)
    before = x.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).requires_grad_(False)
    found = propagation(model, x)
    assert torch.equal(x, before)
    assert found.layers[0].grad_norm > 0


def test_gpt2_with_keyword_inputs_and_a_dict_as_output():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(50, (4, 12))
    for inputs in ({"input_ids": tokens}, {"input_ids": tokens, "labels": tokens}):
        rows = by_name(propagation(model, kwargs=inputs))
        assert rows["transformer.h.0.attn.c_attn"].kind == "Conv1D"
        assert rows["transformer.h.1.mlp.act"].role == "activation"
        assert rows["transformer.wte"].role == "embedding"
        assert rows["transformer.wpe"].similarity is None
        measured = [row for row in rows.values() if row.grad_norm]
        assert len(measured) == len(rows)
    found = propagation(model, kwargs={"input_ids": tokens, "labels": tokens})
    assert found.notes == ()  # the model's own loss


def test_recurrent_layers_and_attention_return_tuples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 8, batch_first=True)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            h, _ = self.rnn(x)
            h, _ = self.mix(h, h, h)
            return {"prediction": (self.out(h), h)}

    rows = by_name(propagation(Net(), torch.randn(6, 7, 5)))
    assert list(rows) == ["rnn", "mix", "out"]
    assert all(row.shape[:2] == (6, 7) and row.grad_norm > 0 for row in rows.values())
    assert {row.role for row in rows.values()} == {"weights"}


def test_sequence_first_networks_name_their_batch_dim():
    model, x = nn.GRU(5, 8), torch.randn(7, 6, 5)
    (row,) = propagation(model, x, batch_dim=1).layers
    same = nn.GRU(5, 8, batch_first=True)
    same.load_state_dict(model.state_dict())
    (other,) = propagation(same, x.transpose(0, 1)).layers
    assert row.similarity == pytest.approx(other.similarity, rel=1e-5)
    assert row.stable_rank == pytest.approx(other.stable_rank, rel=1e-5)


def test_embeddings_need_no_gradient_at_the_input_and_frozen_models_get_one():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    rows = by_name(propagation(model, torch.randint(9, (5, 6))))
    assert rows["0"].grad_norm > 0
    frozen = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).requires_grad_(False)
    assert all(row.grad_norm > 0 for row in propagation(frozen, torch.randn(5, 4)).layers)
    found = propagation(model.requires_grad_(False), torch.randint(9, (5, 6)))
    assert all(row.grad_norm is None for row in found.layers)
    assert "no gradients" in found.notes[-1]


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x):
        def inside(x):
            return self.norm(self.first(x))

        if self.reentrant is None:
            return self.last(inside(x))
        return self.last(checkpoint(inside, x, use_reentrant=self.reentrant))


def test_checkpointed_layers_are_seen_once_and_with_their_gradient():
    model, x = Checkpointed(None), torch.randn(8, 4)
    plain = propagation(model, x)
    model.reentrant = False
    assert propagation(model, x).layers == plain.layers


def test_reentrant_checkpoints_have_no_gradients_and_say_so():
    model, x = Checkpointed(True), torch.randn(8, 4, requires_grad=True)
    model.requires_grad_(False)  # the input then requires a gradient, and the checkpoint a backward
    found = propagation(model, x)
    assert "use_reentrant=True" in found.notes[-1]
    assert [row.name for row in found.layers] == ["first", "norm", "last"]
    assert found.layers[0].variance > 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_looked_into(wrap):
    model, x = resnet(), torch.randn(6, 3, 8, 8)
    assert propagation(wrap(model), x).layers == propagation(model, x).layers


def test_compiled_parts_run_as_written():
    model, x = resnet(), torch.randn(6, 3, 8, 8)
    plain = propagation(model, x)
    model[1].compile(backend="eager")
    with torch.no_grad():
        model(x)
    found = propagation(model, x)
    assert [row.label for row in found.layers] == [row.label for row in plain.layers]


def test_float16_under_autocast_keeps_the_statistics_wide():
    model, x = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = propagation(model, x)
        seen = model[0](x)
    unit = nn.functional.normalize(seen.double(), dim=1)
    rank = 8 / torch.linalg.matrix_norm(unit @ unit.T, 2).item()
    assert found.layers[0].stable_rank == pytest.approx(rank, rel=1e-5)


class Tricky(nn.Module):
    """Everything that a forward can leave behind, and an error on request."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3))
        self.old = nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))
        self.norm, self.drop, self.frozen = nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4)
        self.frozen.eval()
        self.register_buffer("ids", torch.arange(3)[:, None].expand(3, 5))
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.fail = 0, False

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + 1
        random.random()
        np.random.rand()  # noqa: NPY002  some models use the legacy generator
        x = self.frozen(self.drop(self.norm(self.old(self.conv(x)))))
        if self.fail:
            raise ArithmeticError("in the middle")
        return x.mean((2, 3))


def everything(model):
    legacy = np.random.get_state()  # noqa: NPY002
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "buffers": {k: id(b) for k, b in model.named_buffers()},
        "grads": [(id(p.grad), p.grad.clone()) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "plain": (model.calls, id(model.old.weight)),
        "rng": (torch.get_rng_state(), random.getstate(), legacy[1].copy(), legacy[2]),
    }  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_behind(training, fail):
    model, x = Tricky(), torch.randn(4, 2, 6, 6)
    model(x).sum().backward()
    model.train(training)
    model.frozen.eval()
    model.fail = fail
    before = everything(model)
    if fail:
        with pytest.raises(ArithmeticError):
            propagation(model, x)
    else:
        assert len(propagation(model, x).layers) == 4
    after = everything(model)
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0, equal_nan=True)
    for key in ("buffers", "modes", "hooks", "plain"):
        assert after[key] == before[key], key
    for now, then in zip(after["grads"], before["grads"], strict=True):
        assert now[0] == then[0]
        assert torch.equal(now[1], then[1])
    assert torch.equal(after["rng"][0], before["rng"][0])
    assert after["rng"][1] == before["rng"][1]
    assert (after["rng"][2] == before["rng"][2]).all()
    assert after["rng"][3] == before["rng"][3]


def test_training_goes_on_as_if_it_had_not_been_measured():
    runs = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(50):
            x = torch.randn(16, 4)
            loss = model(x).square().mean()
            if measured:  # between forward and backward, where it is most in the way
                propagation(model, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        runs.append(model.state_dict())
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


class Count(torch.autograd.Function):
    """The identity; counts the gradients that are alive when one more arrives."""

    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        Count.alive.add(grad)
        Count.most = max(Count.most, len(Count.alive))
        return grad


@pytest.mark.parametrize("depth", [4, 16])
def test_gradients_pass_and_are_not_kept(depth):
    class Step(nn.Linear):
        def forward(self, x):
            return super().forward(Count.apply(x))

    Count.most = 0
    found = propagation(nn.Sequential(*[Step(4, 4) for _ in range(depth)]), torch.randn(3, 4))
    assert all(row.grad_norm > 0 for row in found.layers)
    # One that arrives and one on its way; without the limit it would be all of them.
    assert 1 <= Count.most <= 2


@pytest.mark.parametrize("depth", [4, 16])
def test_no_activation_outlives_the_call(depth):
    kept = []

    class Step(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            kept.append(weakref.ref(x))
            return x

    found = propagation(nn.Sequential(*[Step(4, 4) for _ in range(depth)]), torch.randn(3, 4))
    gc.collect()
    assert len(kept) == depth
    assert all(ref() is None for ref in kept)
    assert len(found.layers) == depth


def test_patterns_and_functions_choose_layers():
    model, x = resnet(), torch.randn(6, 3, 8, 8)
    assert list(by_name(propagation(model, x, layers="*.conv?"))) == [
        "1.conv1", "1.conv2", "2.conv1", "2.conv2",
    ]  # fmt: skip
    pools = propagation(model, x, layers=lambda name, m: isinstance(m, nn.AdaptiveAvgPool2d))
    assert [row.kind for row in pools.layers] == ["AdaptiveAvgPool2d"]
    with pytest.raises(ValueError, match=r"no module's name matches '1\.con'; did you mean"):
        propagation(model, x, layers=["1.con"])


def test_what_surrounds_the_whole_is_no_layer_unless_it_is_the_only_one():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.fc = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x + self.token)

    assert [row.name for row in propagation(Token(), torch.randn(5, 4)).layers] == ["fc"]
    (row,) = propagation(nn.Linear(4, 3), torch.randn(5, 4)).layers
    assert (row.name, row.label) == ("", "Linear")


def test_bad_arguments_are_named():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    with pytest.raises(TypeError, match=r"args is a list; .*args=\(x,\)"):
        propagation(model, [x])
    with pytest.raises(ValueError, match=r"loss returned \(6, 3\)"):
        propagation(model, x, loss=lambda out: out)
    with pytest.raises(ValueError, match="no input tensor"):
        propagation(model)
    with pytest.raises(ValueError, match="nothing to observe in Flatten"):
        propagation(nn.Flatten(), x)
    with pytest.raises(ValueError, match="parameter 'weight' is uninitialized"):
        propagation(nn.LazyLinear(3), x)
    with pytest.raises(TypeError, match="model is a function"):
        propagation(lambda x: x, x)
