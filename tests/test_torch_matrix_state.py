"""torch's optimizer matrix: state dicts, hooks and copies.

The names are those of PyTorch's ``test/test_optim.py``; ``torch_matrix.py`` says what runs where.
"""
# ruff: noqa: PT009 - torch's TestCase compares tensors

import io
from copy import deepcopy

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_matrix import optims
from torch_matrix_inputs import TestCase, all_inputs, instantiate, parametrize

LAYERS = ["0.weight", "0.bias", "1.weight", "1.bias"]


def walk(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def pair(device, dtype, named=False):
    """Return a weight and a bias, with names if asked to."""
    weight = nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))
    params = [weight, nn.Parameter(torch.randn(2, device=device, dtype=dtype))]
    return params, [(f"name{i}", p) for i, p in enumerate(params)] if named else params


def conv_net(device, dtype):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2)).to(device, dtype)


def without_names(state_dict):
    groups = [
        {key: x for key, x in group.items() if key != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def primed(optim_info, kwargs, device, dtype):
    """Return an optimizer that has made three steps of two matrices."""
    params = [nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
    optimizer = optim_info.make(params, **kwargs)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def public(x):
    return {key for key in x.__dict__ if not key.startswith("_")}


def buffers(state):
    return [key for key, x in state.items() if torch.is_tensor(x) and x.ndim == 2]


class TestState(TestCase):
    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims("test_state_dict_deterministic")
    def test_state_dict_deterministic(
        self, device, dtype, optim_info, is_named_optim0, is_named_optim1
    ):
        x = torch.randn(3, device=device, dtype=dtype)
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            params, listed = pair(device, dtype, is_named_optim0)
            optimizer = optim_info.make(listed, **given.kwargs)

            def loss(params=params):
                return (params[0].mv(x) + params[1]).pow(2).sum()

            walk(optimizer, loss, 5)
            twins, listed = pair(device, dtype, is_named_optim1)
            other = optim_info.make(listed, **given.kwargs)
            for p, q in zip(params, twins, strict=True):  # after it was built: some change weights
                q.data.copy_(p.data)
            saved = deepcopy(optimizer.state_dict())
            other.load_state_dict(deepcopy(saved))  # torch shares it
            for _ in range(5):
                walk(optimizer, loss, 1)
                walk(other, lambda: loss(twins), 1)  # noqa: B023
                self.assertEqual(params, twins)
            mine, theirs = (without_names(o.state_dict()) for o in (optimizer, other))
            self.assertEqual(mine, theirs)
            if saved["state"]:
                self.assertNotEqual(mine["state"], saved["state"])
            # Repeated parameters have one number in a state dict (pytorch#36831).
            other.param_groups.extend(other.param_groups)
            last = without_names(other.state_dict())["param_groups"][-1]
            self.assertEqual(mine["param_groups"][-1], last)

    @optims("test_can_load_older_state_dict")
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        x = torch.rand(1, 4, 16, 16, device=device, dtype=dtype)
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            net = conv_net(device, dtype)
            optimizer = optim_info.make(net.parameters(), **given.kwargs)
            walk(optimizer, lambda net=net: net(x).pow(3).sum(), 3)
            old = deepcopy(optimizer.state_dict())
            for group in old["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    group.pop(flag, None)
            optimizer.load_state_dict(old)
            walk(optimizer, lambda net=net: net(x).pow(3).sum(), 1)
            self.assertEqual(
                optimizer.param_groups[0].get("maximize"), given.kwargs.get("maximize", False)
            )

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims("test_can_load_from_to_named_state_dict")
    def test_can_load_from_to_named_state_dict(
        self, device, dtype, optim_info, is_named_optim0, is_named_optim1
    ):
        x = torch.rand(1, 4, 16, 16, device=device, dtype=dtype)
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            net = conv_net(device, dtype)
            made = [
                optim_info.make(
                    net.named_parameters() if named else net.parameters(), **given.kwargs
                )
                for named in (is_named_optim0, is_named_optim1)
            ]
            walk(made[0], lambda net=net: net(x).pow(3).sum(), 3)
            made[1].load_state_dict(deepcopy(made[0].state_dict()))
            walk(made[1], lambda net=net: net(x).pow(3).sum(), 1)
            if is_named_optim0 or is_named_optim1:
                groups = made[1].state_dict()["param_groups"]
                self.assertEqual(
                    sorted(n for g in groups for n in g["param_names"]), sorted(LAYERS)
                )

    @parametrize("is_named_optim", [True, False])
    @optims("test_save_load_equality_with_weights_only")
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named_optim):
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            params, listed = pair(device, dtype, is_named_optim)
            optimizer = optim_info.make(listed, **given.kwargs)
            walk(optimizer, lambda p=params: (p[0].sum(1) + p[1]).pow(2).sum(), 3)
            saved, file = optimizer.state_dict(), io.BytesIO()
            torch.save(saved, file)
            for weights_only in (False, True):
                file.seek(0)
                self.assertEqual(torch.load(file, weights_only=weights_only), saved)

    @optims("test_load_nontensor_step")
    def test_load_nontensor_step(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            optimizer = primed(optim_info, given.kwargs, device, dtype)
            old = deepcopy(optimizer.state_dict())
            for state in old["state"].values():
                if torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].item()
            steps = [state.get("step") for state in old["state"].values()]
            optimizer.load_state_dict(old)
            optimizer.step()
            for state, step in zip(optimizer.state.values(), steps, strict=True):
                if step is not None:
                    self.assertEqual(state["step"], torch.tensor(step + 1))

    @staticmethod
    def mark(optimizer):
        optimizer.state["test"] = 1

    @staticmethod
    def tell(optimizer, state_dict):
        state_dict["ran_state_dict_pre_hook"] = state_dict["state"].pop("test", 0) == 1
        return state_dict

    @optims("test_state_dict_pre_hook")
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype):
            optimizer = optim_info.make(pair(device, dtype)[1], **given.kwargs)
            optimizer.register_state_dict_pre_hook(type(self).mark)
            self.assertEqual(optimizer.state_dict()["state"]["test"], 1)

    @optims("test_state_dict_post_hook")
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype):
            optimizer = optim_info.make(pair(device, dtype)[1], **given.kwargs)
            optimizer.register_state_dict_post_hook(type(self).tell)
            self.assertFalse(optimizer.state_dict()["ran_state_dict_pre_hook"])

    @optims("test_state_dict_pre_post_hook")
    def test_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype):
            optimizer = optim_info.make(pair(device, dtype)[1], **given.kwargs)
            optimizer.register_state_dict_pre_hook(type(self).mark)
            optimizer.register_state_dict_post_hook(type(self).tell)
            saved = optimizer.state_dict()
            self.assertNotIn("test", saved["state"])
            self.assertTrue(saved["ran_state_dict_pre_hook"])

    @optims("test_load_state_dict_pre_hook_and_prepend")
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        def in_place(optimizer, state_dict):
            state_dict["param_groups"][0]["lr"] = 0.002

        def anew(optimizer, state_dict):
            changed = deepcopy(state_dict)
            changed["param_groups"][0]["lr"] = 0.003
            return changed

        for given in all_inputs(optim_info, device, dtype):
            optimizer = optim_info.make(pair(device, dtype)[1], **given.kwargs)
            saved = optimizer.state_dict()
            optimizer.register_load_state_dict_pre_hook(in_place)
            optimizer.load_state_dict(saved)
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)
            optimizer.register_load_state_dict_pre_hook(anew, prepend=True)
            optimizer.load_state_dict(saved)
            # It came first, so that the other one has the last word.
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)

    @optims("test_load_state_dict_post_hook")
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype):
            optimizer = optim_info.make(pair(device, dtype)[1], **given.kwargs)
            seen = []
            optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append(o))
            optimizer.load_state_dict(optimizer.state_dict())
            self.assertEqual(len(seen), 1)
            self.assertIs(seen[0], optimizer)

    @optims("test_load_state_dict_pre_post_hook")
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        """What a hook makes of the state is what is loaded, and what a later hook sees."""
        seen = []

        def scale(optimizer, state_dict):
            changed = deepcopy(state_dict)
            for key in buffers(changed["state"][0]):
                changed["state"][0][key].mul_(2)
            return changed

        def look(optimizer):
            p = optimizer.param_groups[0]["params"][0]
            seen.append(deepcopy(optimizer.state[p]))
            for key in buffers(optimizer.state[p]):
                optimizer.state[p][key] = torch.zeros_like(optimizer.state[p][key])

        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            optimizer = primed(optim_info, given.kwargs, device, dtype)
            saved = deepcopy(optimizer.state_dict())
            if not saved["state"]:
                continue
            optimizer.register_load_state_dict_pre_hook(scale)
            optimizer.register_load_state_dict_post_hook(look)
            optimizer.load_state_dict(saved)
            state = optimizer.state[optimizer.param_groups[0]["params"][0]]
            for key in buffers(state):
                self.assertEqual(seen[-1][key], 2 * saved["state"][0][key])
                self.assertEqual(state[key], torch.zeros_like(state[key]))

    @optims("test_step_post_hook")
    def test_step_post_hook(self, device, dtype, optim_info):
        self.check_hook(optim_info, device, dtype, "register_step_post_hook")

    @optims("test_step_pre_hook")
    def test_step_pre_hook(self, device, dtype, optim_info):
        self.check_hook(optim_info, device, dtype, "register_step_pre_hook")

    def check_hook(self, optim_info, device, dtype, register):
        for given in all_inputs(optim_info, device, dtype):
            params, calls = [torch.ones(2, device=device, dtype=dtype)], []
            optimizer = optim_info.make(params, **given.kwargs)
            handle = getattr(optimizer, register)(lambda *args, calls=calls: calls.append(args))
            optimizer.step()
            optimizer.step()
            self.assertEqual(len(calls), 2)
            handle.remove()
            optimizer.step()
            self.assertEqual(len(calls), 2)

    @optims("test_step_all_hooks")
    def test_step_all_hooks(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype):
            params, calls = [torch.ones(2, device=device, dtype=dtype)], []
            optimizer, other = optim_info.make(params, **given.kwargs), SGD(params)

            def note(name, calls=calls):
                return lambda *args: calls.append(name)

            handles = [
                register_optimizer_step_pre_hook(note("global pre")),
                register_optimizer_step_post_hook(note("global post")),
            ]
            for x in (optimizer, other):
                handles.append(x.register_step_pre_hook(note("pre")))
                handles.append(x.register_step_post_hook(note("post")))
            for x in (optimizer, other, optimizer):
                x.step()
            self.assertEqual(calls, ["global pre", "pre", "post", "global post"] * 3)
            for handle in handles:
                handle.remove()
            optimizer.step()
            other.step()
            self.assertEqual(len(calls), 12)

    @optims("test_deepcopy_copies_all_public_attrs")
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            optimizer = primed(optim_info, given.kwargs, device, dtype)
            self.assertEqual(public(optimizer), public(deepcopy(optimizer)))

    @optims("test_non_empty_state")
    def test_non_empty_state(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            model = nn.Linear(5, 5).to(device, dtype)
            optimizer = optim_info.make(model.parameters(), **given.kwargs)
            model(torch.rand(2, 5, device=device, dtype=dtype)).sum().backward()
            optimizer.step()
            for state in optimizer.state.values():
                self.assertGreater(len(state), 0)


instantiate(TestState, globals())
