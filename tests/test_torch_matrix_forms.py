"""torch's optimizer matrix: foreach, fused, mixed dtypes, memory, GradScaler, autograd, compiled.

The names are those of PyTorch's ``test/test_optim.py``; ``torch_matrix.py`` says what runs where.
"""
# ruff: noqa: PT009, PT027 - torch's TestCase compares tensors

import gc
import warnings
from copy import deepcopy

import torch
from torch import nn
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile
from torch_matrix import optims
from torch_matrix_inputs import TensorTracker, TestCase, all_inputs, instantiate, parametrize


def layers(device, dtype):
    """Return a net with three layers of one width, which are stacked, and one that is not."""
    torch.manual_seed(1)
    widths = [(2, 3), (3, 3), (3, 3), (3, 3), (3, 1)]
    return nn.Sequential(*[m for n, k in widths for m in (nn.Linear(n, k), nn.Sigmoid())]).to(
        device, dtype
    )


def peak_bytes(optimizer):
    """Return the most memory that a step holds beside what was there before, and what it keeps."""
    gc.disable()  # what others left behind must not be subtracted
    try:
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as seen:
            optimizer.step()
    finally:
        gc.enable()
    held = highest = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest, held


class TestForms(TestCase):
    def compare_between(self, x, models, optimizers, step_dtype=None, **tolerance):
        """Step two optimizers side by side, from the same point each time."""
        for i in range(7):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                if i in (3, 5):  # a layer that is frozen for two steps is younger afterwards
                    model[2].requires_grad_(i == 5)
                if i != 2:  # a step without any gradient
                    model(x).sum().backward()
                optimizer.step()
            seen = TensorTracker(tolerance)
            for p, q in zip(*[model.parameters() for model in models], strict=True):
                mine, theirs = (o.state[r] for o, r in zip(optimizers, (p, q), strict=True))
                self.assertEqual(mine.keys(), theirs.keys())
                seen.add(p)
                seen.pop_check_set(q, self)
                for key in mine:
                    if step_dtype is not None and key == "step":
                        self.assertEqual([mine[key].dtype, theirs[key].dtype], [step_dtype] * 2)
                    if mine[key] is not None:
                        seen.add(mine[key])
                        seen.pop_check_set(theirs[key], self)

    def check_form(self, device, dtype, optim_info, flag, step_dtype=None, **tolerance):
        """Check that a form gives what stepping one parameter after the other gives."""
        x = torch.arange(1, 7, device=device).to(dtype).reshape(3, 2) / 10
        for given in optim_info.optim_inputs_func(device=device, dtype=dtype):
            models, optimizers = [], []
            for value in (False, True):
                models.append(layers(device, dtype))
                single = torch.zeros((), device=device, dtype=dtype, requires_grad=True)
                single.grad = torch.ones_like(single)
                params = [*models[-1].parameters(), single]
                kwargs = {**deepcopy(given.kwargs), flag: value}
                optimizers.append(optim_info.make(params, **kwargs))
            self.compare_between(x, models, optimizers, step_dtype, **tolerance)

    @optims("test_foreach_matches_forloop", dtypes=[torch.float64])
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        self.check_form(device, dtype, optim_info, "foreach")

    @optims(
        "test_fused_matches_forloop",
        dtypes=[torch.float32, torch.float64, torch.bfloat16, torch.float16],
    )
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        # The kernels keep float32 inside where the loop rounds every operation.
        narrow = {"rtol": 0.02, "atol": 1e-4} if dtype in (torch.bfloat16, torch.float16) else {}
        self.check_form(device, dtype, optim_info, "fused", **narrow)

    @optims("test_fused_error_on_params_on_meta")
    def test_fused_error_on_params_on_meta(self, device, dtype, optim_info):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1)).to(dtype)
        optimizer = optim_info.make(model.parameters(), fused=True)
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        with self.assertRaisesRegex(RuntimeError, "`fused=True` requires all the params to be"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.to_empty(device=device)
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        optimizer.step()

    @parametrize("impl", ["foreach", "fused"])
    @optims("test_mixed_device_dtype")
    def test_mixed_device_dtype(self, device, dtype, optim_info, impl):
        if impl not in optim_info.supported_impls:
            return
        dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        start = [torch.rand(2, 3, device=device, dtype=d) for d in dtypes for _ in range(4)]
        grads = [torch.rand_like(x) for x in start]
        for given in optim_info.optim_inputs_func(device=device):
            runs = []
            for value in (False, True):
                params = [x.clone().requires_grad_() for x in start]
                integers = torch.randint(1024, (3,), device=device)
                kwargs = {**deepcopy(given.kwargs), impl: value}
                optimizer = optim_info.make([*params, integers], **kwargs)
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.clone()
                with warnings.catch_warnings():  # of steps too small for bfloat16
                    warnings.filterwarnings("ignore", "parameter .* kept")
                    for _ in range(7 if impl == "foreach" else 1):
                        optimizer.step()
                runs.append([(p.detach(), dict(optimizer.state[p])) for p in params])
            for (p, mine), (q, theirs) in zip(*runs, strict=True):
                # Five times what one operation may round.
                rtol, atol = torch.testing._comparison.get_tolerances(p.dtype, rtol=None, atol=None)
                self.assertEqual(p, q, rtol=5 * rtol, atol=5 * atol)
                self.assertEqual(mine, theirs, rtol=5 * rtol, atol=5 * atol)

    @optims("test_set_default_dtype_works_with_foreach", dtypes=[torch.float64])
    def test_set_default_dtype_works_with_foreach(self, device, dtype, optim_info):
        for default in (torch.float64, torch.float16):
            wide = torch.float64 if default == torch.float64 else torch.float32
            try:
                torch.set_default_dtype(default)
                self.check_form(device, dtype, optim_info, "foreach", wide, atol=1e-5, rtol=1e-4)
            finally:
                torch.set_default_dtype(torch.float32)

    @optims("test_peak_memory_foreach")
    def test_peak_memory_foreach(self, device, dtype, optim_info):
        if torch.device(device).type != "cpu":
            self.skipTest("the profiler's CPU allocations are counted")
        for given in optim_info.optim_inputs_func(device=device):
            for value, budget in zip((False, True), optim_info.budget, strict=True):
                if budget is None:
                    continue
                kwargs = dict(given.kwargs)
                if "foreach" in optim_info.supported_impls:
                    kwargs["foreach"] = value and not torch.is_tensor(kwargs.get("lr"))
                params = [torch.rand(16, 256, device=device, dtype=dtype) for _ in range(10)]
                optimizer = optim_info.make(params, **kwargs)
                for p in params:
                    p.grad = torch.rand_like(p)
                optimizer.step()
                highest, kept = peak_bytes(optimizer)
                self.assertEqual(kept, 0)
                self.assertLessEqual(highest, budget * 10 * params[0].nbytes, msg=str(kwargs))

    @optims("test_grad_scaling_autocast_fused_optimizers")
    def test_grad_scaling_autocast_fused_optimizers(self, device, dtype, optim_info):
        x = torch.randn(4, 2, device=device, dtype=dtype)
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            plain, scaled = layers(device, dtype), layers(device, dtype)
            left = optim_info.make(plain.parameters(), **deepcopy(given.kwargs))
            right = optim_info.make(scaled.parameters(), **deepcopy(given.kwargs))
            scaler = torch.amp.GradScaler(device, init_scale=128.0, growth_interval=2)
            for i in range(6):
                left.zero_grad()
                right.zero_grad()
                plain(x).pow(2).sum().backward()
                scaler.scale(scaled(x).pow(2).sum()).backward()
                if i == 3:
                    next(scaled.parameters()).grad.fill_(torch.inf)
                else:
                    left.step()
                scaler.step(right)
                scaler.update()
            # Scales are powers of two: unscaled gradients are the plain ones, bit for bit.
            pairs = zip(plain.parameters(), scaled.parameters(), strict=True)
            for p, q in pairs:
                self.assertEqual(p, q, rtol=0, atol=0)

    @optims("test_differentiable", dtypes=[torch.float64])
    def test_differentiable(self, device, dtype, optim_info):
        def double(*shape):
            return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

        for given in optim_info.optim_inputs_func(device=device):
            kwargs = {**given.kwargs, "differentiable": True}
            if "eps" in optim_info.make([torch.ones(2, 2)]).defaults:
                kwargs["eps"] = 0.1  # smooth where finite differences are taken
            start = [double(2, 3), double(2)]
            params = [p.detach().clone() for p in start]
            before = optim_info.make(params, **kwargs)
            for p in params:
                p.grad = 3 * torch.randn_like(p)  # larger: amsgrad has a kink where moments meet
            before.step()
            saved = before.state_dict()

            def end(w, b, g, h, kwargs=kwargs, saved=saved):
                params = [w.clone(), b.clone()]
                optimizer = optim_info.make(params, **kwargs)
                optimizer.load_state_dict(deepcopy(saved))
                params[0].grad, params[1].grad = g, h
                optimizer.step()
                return tuple(params)

            self.assertTrue(gradcheck(end, [*start, double(2, 3), double(2)]))

    @optims("test_correctness")
    def test_correctness(self, device, dtype, optim_info):
        torch._dynamo.reset()
        given = optim_info.optim_inputs_func(device=device)[-1]
        x = torch.randn(4, 2, device=device, dtype=dtype)
        nets = [layers(device, dtype)[:2] for _ in range(2)]
        made = [optim_info.make(net.parameters(), **deepcopy(given.kwargs)) for net in nets]
        steps = [made[0].step, torch.compile(made[1].step, backend="eager")]
        with warnings.catch_warnings():  # of how sphere specs are parsed
            warnings.filterwarnings("ignore", "Dynamo detected a call to a .functools.lru_cache")
            for _ in range(4):
                for net, optimizer, step in zip(nets, made, steps, strict=True):
                    optimizer.zero_grad()
                    net(x).pow(2).sum().backward()
                    step()
        for p, q in zip(*[net.parameters() for net in nets], strict=True):
            self.assertEqual(p, q)
        torch._dynamo.reset()


instantiate(TestForms, globals())
