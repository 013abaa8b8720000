"""torch's optimizer matrix: what a step does to parameters.

The names are those of PyTorch's ``test/test_optim.py``; ``torch_matrix.py`` says what runs where.
"""
# ruff: noqa: PT009 - torch's TestCase compares tensors

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch_matrix import optims
from torch_matrix_inputs import TensorTracker, TestCase, all_inputs, instantiate, parametrize


def linear(device, dtype, contiguous=True):
    """Return a weight, a bias and an input; strided views of larger tensors if not contiguous."""
    more = () if contiguous else (2,)
    weight, bias = torch.randn(10, 5, *more), torch.randn(10, *more)
    if not contiguous:
        weight, bias = weight[..., 0], bias[..., 0]
    weight, bias = weight.to(device, dtype), bias.to(device, dtype)
    # Signs of both kinds: RotationalLion takes the mean out of the signs of a row.
    x = torch.randn(5, device=device, dtype=dtype)
    x[0] = -x[1]
    return nn.Parameter(weight), nn.Parameter(bias), x


def loss_of(weight, bias, x):
    return (weight.mv(x) + bias).pow(2).sum()


def walk(optimizer, loss, steps=20, schedulers=()):
    """Make steps with a closure, and the schedulers' after each."""

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        value = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(*([value.item()] if isinstance(scheduler, ReduceLROnPlateau) else []))


def rosenbrock(point):
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def one_coordinate(p, i, sparse):
    """Return the gradient of that at p, of its i-th entry only."""
    point = p.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(rosenbrock(point), point)
    if not sparse:
        return grad * torch.eye(2, device=p.device, dtype=p.dtype)[i]
    where = torch.tensor([[i, i]], device=p.device)
    return torch.sparse_coo_tensor(where, torch.stack([grad[i] / 4, 3 * grad[i] / 4]), (2,))


def as_real(p):
    return torch.view_as_real(p.detach()) if p.is_complex() else p.detach()


class TestStep(TestCase):
    def assert_right_direction(self, kwargs, before, after):
        compare = self.assertGreater if kwargs.get("maximize") else self.assertLess
        compare(after.item(), before.item(), msg=kwargs)

    @optims("test_optim_infos_do_not_specify_global_cliquey_kwargs")
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            self.assertFalse({"foreach", "fused", "differentiable"} & given.kwargs.keys())

    @optims("test_errors")
    def test_errors(self, device, dtype, optim_info):
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = case.optimizer_error_input
            warns = issubclass(case.error_type, Warning)
            expect = self.assertWarnsRegex if warns else self.assertRaisesRegex
            with expect(case.error_type, case.error_regex, msg=given.desc):
                optim_info.optim_cls(given.params, **{**optim_info.required, **given.kwargs})

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims("test_forloop_goes_right_direction")
    def test_forloop_goes_right_direction(
        self, device, dtype, optim_info, contiguous, with_lrsched
    ):
        for makers in optim_info.scheduler_inputs if with_lrsched else [[]]:
            for given in optim_info.optim_inputs_func(device=device):
                if "foreach" in optim_info.supported_impls:
                    given.kwargs["foreach"] = False
                weight, bias, x = linear(device, dtype, contiguous)
                optimizer = optim_info.make([weight, bias], **given.kwargs)
                before, first_bias = loss_of(weight, bias, x), bias.detach().clone()
                schedulers = [make(optimizer) for make in makers]
                walk(optimizer, lambda w=weight, b=bias, x=x: loss_of(w, b, x), 20, schedulers)
                self.assert_right_direction(given.kwargs, before, loss_of(weight, bias, x))
                # What is on spheres has its share in that.
                self.assert_right_direction(given.kwargs, before, loss_of(weight, first_bias, x))

    @optims("test_forloop_goes_right_direction_multi_dim", dtypes=[torch.float64])
    def test_forloop_goes_right_direction_multi_dim(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            conv = nn.Conv2d(4, 6, 3, device=device, dtype=dtype)
            conv = conv.to(memory_format=torch.channels_last)
            x = torch.randn(2, 4, 5, 5, device=device, dtype=dtype)
            optimizer = optim_info.make(conv.parameters(), **given.kwargs)
            before = conv(x).pow(2).mean()
            walk(optimizer, lambda conv=conv, x=x: conv(x).pow(2).mean())
            self.assert_right_direction(given.kwargs, before, conv(x).pow(2).mean())

    @optims("test_param_group_with_lrscheduler_goes_right_direction")
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for makers in optim_info.scheduler_inputs:
            weight, bias, x = linear(device, dtype)
            groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
            optimizer = optim_info.make(groups)
            before = loss_of(weight, bias, x)
            walk(
                optimizer,
                lambda w=weight, b=bias, x=x: loss_of(w, b, x),
                schedulers=[make(optimizer) for make in makers],
            )
            self.assertLess(loss_of(weight, bias, x).item(), before.item())

    @optims("test_param_groups_weight_decay")
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            weight, bias, x = linear(device, dtype)
            groups = [
                {"params": [weight], **given.kwargs},
                {"params": [bias], **given.kwargs, "weight_decay": 0.0},
            ]
            optimizer = optim_info.make(groups)
            before = loss_of(weight, bias, x)
            walk(optimizer, lambda w=weight, b=bias, x=x: loss_of(w, b, x))
            self.assert_right_direction(given.kwargs, before, loss_of(weight, bias, x))

    @optims("test_param_groups_lr")
    def test_param_groups_lr(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            if not given.kwargs.get("lr"):
                given.kwargs["lr"] = 1e-3
            weight, bias, x = linear(device, dtype)
            still = [
                nn.Parameter(torch.randn(n, device=device, dtype=dtype)) for n in ((2,), (2, 3))
            ]
            groups = [{"params": [weight, bias], **given.kwargs}, {"params": still}]
            optimizer = optim_info.make(groups, lr=1e-28)
            before, first_bias = loss_of(weight, bias, x), bias.detach().clone()
            first = [p.detach().clone() for p in still]

            def loss(weight=weight, bias=bias, x=x, still=still):
                for p in still:
                    p.grad = torch.rand_like(p)
                return loss_of(weight, bias, x)

            walk(optimizer, loss)
            self.assert_right_direction(given.kwargs, before, loss_of(weight, bias, x))
            self.assert_right_direction(given.kwargs, before, loss_of(weight, first_bias, x))
            self.assertEqual([p.detach() for p in still], first)

    @parametrize("num_dim", [0, 1])
    @optims("test_tensor_lr")
    def test_tensor_lr(self, device, dtype, optim_info, num_dim):
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            weight, bias, x = linear(device, dtype)
            params = [weight, bias, nn.Parameter(torch.randn((), device=device, dtype=dtype))]
            twins = [nn.Parameter(p.detach().clone()) for p in params]
            lr = torch.tensor(1e-3).reshape([1] * num_dim)
            options = {key: value for key, value in given.kwargs.items() if key != "lr"}
            optimizers = [optim_info.make(params, **options, lr=1e-3)]
            try:
                optimizers.append(optim_info.make(twins, **options, lr=lr))
            except ValueError as error:
                self.assertRegex(str(error), "lr as a Tensor is not supported")
                continue
            for optimizer, (w, b, c) in zip(optimizers, (params, twins), strict=True):
                walk(optimizer, lambda w=w, b=b, c=c, x=x: loss_of(w, b + c, x), 5)
            self.assertEqual(params, twins)

    @optims("test_step_is_noop_when_params_have_no_grad")
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype):
            params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
            optimizer = optim_info.make(params, **given.kwargs)
            before = [p.clone() for p in params]
            optimizer.step(lambda: torch.tensor([1.0]))
            self.assertEqual(params, before, rtol=0, atol=0)
            self.assertEqual([p.grad for p in params], [None, None])

    @optims("test_step_is_noop_for_zero_grads")
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype):
            kwargs = given.kwargs
            decays = kwargs.get("weight_decay", 0) != 0 and optim_info.kind != "fixed"
            if decays or kwargs.get("omega", 0) != 0:
                continue
            if optim_info.name == "SphereAdam":  # torch's default decay is not ours, but its input
                kwargs["lr"] = torch.tensor(1e-5) if torch.is_tensor(kwargs.get("lr")) else 1e-5
            w = torch.randn(5, 1, device=device, dtype=dtype, requires_grad=True)
            params = [w.clone() if kwargs.get("differentiable") else w]
            optimizer = optim_info.make(params, **kwargs)
            before = params[0].detach().clone()
            params[0].grad = torch.zeros_like(params[0])
            for _ in range(3):
                optimizer.step(lambda: torch.tensor([1.0]))
            self.assertEqual(params[0].detach(), before)

    @optims("test_empty_grad")
    def test_empty_grad(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable",)):
            shapes = ((0, 3), (3, 0), (0,), (3, 4))
            params = [nn.Parameter(torch.randn(s, device=device, dtype=dtype)) for s in shapes]
            optimizer = optim_info.make(params, **given.kwargs)
            before = params[-1].detach().clone()
            for _ in range(2):
                grads = [torch.randn_like(p) for p in params]
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.clone()
                optimizer.step()
                self.assertEqual([p.grad for p in params], grads, rtol=0, atol=0)
            self.assertNotEqual(params[-1].detach(), before)
            self.assertTrue(params[-1].isfinite().all())

    @optims("test_complex", dtypes=[torch.complex64])
    def test_complex(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable", "fused")):
            wide = {"device": device, "dtype": dtype, "requires_grad": True}
            mixed = [torch.randn(10, 5, **wide), torch.randn(10, **wide)]
            mixed.append(torch.randn(10, 5, device=device, requires_grad=True))
            real = [as_real(p).clone().requires_grad_() for p in mixed]
            # A complex bias is ordinary; its real view has two dimensions, and is told to be.
            ordinary = [{"params": real[::2]}, {"params": real[1:2], "sphere": None}]
            on_spheres = optim_info.kind in ("fixed", "free")
            left = optim_info.make(mixed, **given.kwargs)
            right = optim_info.make(ordinary if on_spheres else real, **given.kwargs)
            for _ in range(3):
                for p, q in zip(mixed, real, strict=True):
                    q.grad = torch.randn_like(q)
                    p.grad = torch.view_as_complex(q.grad) if p.is_complex() else q.grad.clone()
                left.step()
                right.step()
                self.assertEqual([as_real(p) for p in mixed], [q.detach() for q in real])

    @optims("test_complex_2d", dtypes=[torch.complex64])
    def test_complex_2d(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable", "fused")):
            if optim_info.kind in ("fixed", "free"):
                given.kwargs.update(sphere="tensor", joint=True)
            whole = torch.randn(2, device=device, dtype=dtype, requires_grad=True)
            real = whole.real.detach().clone().requires_grad_()
            imag = whole.imag.detach().clone().requires_grad_()
            left = optim_info.make([whole], **given.kwargs)
            right = optim_info.make([real, imag], **given.kwargs)
            for _ in range(3):
                left.zero_grad()
                right.zero_grad()
                seen = TensorTracker()
                loss = rosenbrock(whole).abs()
                loss.backward()
                for x in (whole.real, whole.imag, loss, whole.grad.real, whole.grad.imag):
                    seen.add(x)
                seen.pop_check_set(real, self)
                seen.pop_check_set(imag, self)
                loss = rosenbrock(torch.complex(real, imag)).abs()
                seen.pop_check_set(loss, self)
                loss.backward()
                seen.pop_check_set(real.grad, self)
                seen.pop_check_set(imag.grad, self)
                left.step()
                right.step()
                self.assertEqual(whole.real, real)
                self.assertEqual(whole.imag, imag)
                self.assertTrue(seen.all_popped())

    @parametrize("with_lrsched", [True, False])
    @optims("test_rosenbrock_sparse", dtypes=[torch.float64])
    def test_rosenbrock_sparse(self, device, dtype, optim_info, with_lrsched):
        updates, makers = optim_info.metadata_for_sparse
        for given in all_inputs(optim_info, device, dtype, skip=("differentiable", "fused")):
            kwargs = {**given.kwargs, **updates}
            start = torch.tensor([1.5, 1.5], device=device, dtype=dtype)
            params = [nn.Parameter(start.clone()) for _ in range(2)]
            optimizers = [optim_info.make([p], **kwargs) for p in params]
            schedulers = [m(o) for o in optimizers for m in (makers if with_lrsched else [])]
            for i in range(60):
                for p, sparse in zip(params, (True, False), strict=True):
                    p.grad = one_coordinate(p, i % 2, sparse)
                for x in (*optimizers, *schedulers):
                    x.step()
                # The sparse gradient is uncoalesced: x/4 + (x - x/4) rounds otherwise than x.
                self.assertEqual(*params, atol=5e-6, rtol=5e-6)
            solution = torch.ones_like(start)
            self.assertLess(params[0].dist(solution).item(), start.dist(solution).item())

    @optims("test_optimizer_can_be_printed")
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for given in all_inputs(optim_info, device, dtype):
            params = [nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))]
            shown = repr(optim_info.make(params, **given.kwargs))
            self.assertIn(optim_info.optim_cls.__name__, shown)
            self.assertIn("Parameter Group 0", shown)


instantiate(TestStep, globals())
