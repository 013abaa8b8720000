r"""constrain: any torch optimizer, held on spheres.

Around every step of the optimizer, by torch's own step hooks: the gradients it sees are made
tangent, what it made of the weights is scaled back to their norms, its momentum follows.

=============  ====================================================================
``transport``  what happens to the momentum of a sphere that has moved from w to w'
=============  ====================================================================
``none``       nothing, as in torch: it is an ambient vector
``project``    made tangent at w'
``rescale``    made tangent at w', at the length it had
``parallel``   carried along the geodesic; the weights of a step are copied for it
=============  ====================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sphereopt.geometry import TRANSPORTS
from sphereopt.optim._held import Bunch, Held, Specs, bunches, by_groups, find, pulled
from sphereopt.optim._warn import warn_user
from sphereopt.optim.base import SphereOptimizer

__all__ = ["FIRST_MOMENTS", "Constraint", "constrain"]

#: State keys of tangent vectors: they are transported.
FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
#: State key of the second set of weights of schedule-free optimizers: scaled as the weights are.
POINT = "z"
#: Key of the radii in the optimizer's ``state_dict()``.
KEY = "constrain"

State = dict[str, Any]


def constrain(
    optimizer: Optimizer,
    spheres: Specs | None = None,
    *,
    project: bool = True,
    transport: str = "none",
) -> Constraint:
    r"""Hold an optimizer's weights on spheres, and return the handle that ends it.

    .. math:: w' = r\,\frac{\tilde w}{|\tilde w|}, \qquad
              \tilde w = \text{the optimizer's own step from } w \text{ with } P_w g

    Args:
        optimizer: Any ``torch.optim`` optimizer but ours, which do this themselves.
        spheres: Name to spec, ``{"conv1.weight": "row"}``, where a tuple of names is one joint
            sphere; or a report of ``find_spheres``, of which the proved spheres are taken; or
            None: what the keys ``sphere`` and ``joint`` of the groups say, see ``param_groups``.
        project: Show the optimizer the tangent part :math:`P_w g` of the gradients, which for an
            exactly scale-invariant loss they are by themselves. ``p.grad`` is given back as it was.
        transport: How ``momentum_buffer`` and ``exp_avg`` follow, see the module.

    Returns:
        A context manager with ``radius``, ``remove()``, ``state_dict()``, ``load_state_dict()``.

    Raises:
        ValueError: If there is no sphere, a name or a shape does not fit, a sphere has weight
            decay, or the optimizer is constrained already.
        TypeError: If it is one of ours or runs no step hooks, or a parameter is sharded.

    Notes:
        A step is ``move="renorm"`` of our optimizers. Spheres that the step left at the norm they
        had (lr 0, no gradient, a step that the GradScaler skipped) stay bitwise as they are, their
        momentum too. With a closure, gradients are projected each time it has run. A decay of
        :math:`\lambda` is refused because all it does on a sphere is to multiply lr by
        :math:`1/(1-lr\,\lambda)`. ``optimizer.state_dict()`` has the radii under ``"constrain"``,
        and loading brings them back; a checkpoint without leaves them. Groups that are added later
        are held from their first step if they have a ``sphere`` and ``spheres`` is None. Hooks do
        not survive deepcopy and pickle, so a constrained optimizer refuses both. Hooks run in the
        order they were registered: attach a tracker after this.

        A quantized momentum cannot be transported, and one of another name stays as it is. The
        second weights of schedule-free are scaled with the first, which leaves all directions
        alone; after ``optimizer.eval()`` the weights are an average, off the sphere.

    References:
        Riemannian approach to batch normalization, Cho and Lee, 2017 (transport).
        Optimization Algorithms on Matrix Manifolds, Absil, Mahony and Sepulchre, 2008, chapter 4.

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> before = layer.weight.norm(dim=1)
        >>> optimizer = torch.optim.RMSprop(layer.named_parameters(), lr=0.1)
        >>> with constrain(optimizer, {"weight": "row"}):
        ...     layer(torch.ones(1, 3)).square().sum().backward()
        ...     optimizer.step()
        >>> torch.allclose(layer.weight.norm(dim=1), before)
        True
    """
    return Constraint(optimizer, spheres, project=project, transport=transport)


class Constraint:
    """The handle of :func:`constrain`, which see for the arguments.

    Attributes:
        radius: Name, or names of joint members joined by " + ", to the norms that are kept: shape
            ``(k,)``, float64 where the device has it, measured when the sphere was first held.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> handle = constrain(torch.optim.SGD([("w", w)], lr=0.1), {"w": "tensor"})
        >>> handle.radius
        {'w': tensor([5.], dtype=torch.float64)}
        >>> handle.remove()
    """

    def __init__(
        self, optimizer: Optimizer, specs: Specs | None = None, *, project: bool, transport: str
    ) -> None:
        _check_optimizer(optimizer)
        if transport not in TRANSPORTS:
            allowed = ", ".join(map(repr, TRANSPORTS))
            raise ValueError(f"transport={transport!r} is none of {allowed}")
        self.radius: dict[str, Tensor] = {}
        self._optimizer, self._project, self._transport = optimizer, project, transport
        self._held: list[Held] = []
        self._groups = len(optimizer.param_groups) if specs is None else None
        self._moving: list[Bunch] = []
        self._borrowed: list[tuple[Tensor, Tensor, Tensor]] = []
        self._loading: State | None = None
        self._hold(find(optimizer, specs))
        if not self._held:
            raise ValueError("no parameter is on a sphere; build the groups with param_groups")
        optimizer.defaults = _Guard(optimizer.defaults)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._check_loaded),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]

    def __enter__(self) -> Constraint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Let the optimizer go; twice is as good as once."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._give_back()
        if type(self._optimizer.defaults) is _Guard:
            self._optimizer.defaults = dict(self._optimizer.defaults)

    def state_dict(self) -> State:
        """Return specs and radii by name: plain values and tensors, copied."""
        return {
            "sphere": {held.name: held.sphere for held in self._held},
            "radius": {name: radius.clone() for name, radius in self.radius.items()},
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Take over the radii of a checkpoint; ``optimizer.load_state_dict`` does it by itself.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: If it was made for other spheres. Nothing has been changed then.
        """
        self._check_saved(state_dict)
        for name, radius in self.radius.items():
            radius.copy_(state_dict["radius"][name])

    def _check_saved(self, state_dict: State) -> None:
        saved, held = state_dict["sphere"], {x.name: x.sphere for x in self._held}
        for name in [*held, *(name for name in saved if name not in held)]:
            if saved.get(name) != held.get(name):
                raise ValueError(
                    f"parameter {name!r} is held with sphere={held.get(name)!r} here and with "
                    f"sphere={saved.get(name)!r} in the checkpoint; constrain the same spheres"
                )
        for name, radius in self.radius.items():
            if state_dict["radius"][name].shape != radius.shape:
                raise ValueError(
                    f"parameter {name!r} has {len(radius)} spheres here and "
                    f"{len(state_dict['radius'][name])} in the checkpoint"
                )

    def _hold(self, found: list[Held]) -> None:
        """Take up spheres, with the norms they have now."""
        self._check_decay(found)
        for held in found:
            radius = held.norm()
            zero = int((radius == 0).sum())
            if zero:
                warn_user(
                    f"parameter {held.name!r} of shape {tuple(held.params[0].shape)} has {zero} of "
                    f"{radius.numel()} spheres of norm zero: they have no direction and will not "
                    "move; initialize them or leave them out of the spheres"
                )
            self.radius[held.name] = radius
        self._held += found

    def _check_decay(self, found: Iterable[Held]) -> None:
        for held in found:
            for index in held.groups:
                decay = self._optimizer.param_groups[index].get("weight_decay", 0.0)
                # A number on a device stays unread: it would stop the host in every step.
                unread = isinstance(decay, Tensor) and decay.device.type != "cpu"
                if not unread and decay != 0:
                    raise ValueError(
                        f"weight_decay={decay!r} on parameter {held.name!r} of shape "
                        f"{tuple(held.params[0].shape)}, which is held on spheres, would only "
                        "multiply its lr by 1/(1 - lr*weight_decay): give it a group of its own "
                        "(sphereopt.param_groups) with weight_decay=0, and raise lr there"
                    )

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._give_back()  # a step that raised has not
        if self._groups is not None and len(optimizer.param_groups) > self._groups:
            self._hold(by_groups(optimizer, self._groups))
            self._groups = len(optimizer.param_groups)
        self._check_decay(self._held)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        # A closure may yet bring gradients, and takes the ones that are there along.
        held = self._held if closure is not None else pulled(self._held)
        moving = bunches(held, keep=self._transport == "parallel")
        if self._project and closure is None:
            self._lend(moving)
        self._moving = moving
        if not self._project or closure is None:
            return None
        around = self._around(closure)
        if len(args) > 1:
            return (args[0], around, *args[2:]), kwargs
        return args, {**kwargs, "closure": around}

    def _around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return the closure with its gradients projected after every call."""

        def projected(*args: Any, **kwargs: Any) -> Any:
            self._give_back()
            loss = closure(*args, **kwargs)
            with torch.no_grad():
                self._lend(bunches(pulled(self._held)))
            return loss

        return projected

    def _lend(self, moving: list[Bunch]) -> None:
        """Put tangent gradients in the place of the user's own, which are kept aside."""
        for p, tangent in [pair for bunch in moving for pair in bunch.tangent_grads()]:
            if p.grad is not None:
                self._borrowed.append((p, p.grad, tangent))
                p.grad = tangent

    def _give_back(self) -> None:
        for p, theirs, ours in self._borrowed:
            if p.grad is ours:
                p.grad = theirs
        self._borrowed.clear()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._give_back()
        moving, self._moving = self._moving, []
        for bunch in moving:
            radius = torch.cat([self.radius[held.name] for held in bunch.held])
            factor, still = bunch.retract(radius)
            if "train_mode" in optimizer.param_groups[0]:
                bunch.scale(optimizer.state, POINT, factor)
            for key in FIRST_MOMENTS if self._transport != "none" else ():
                bunch.carry(optimizer.state, key, self._transport, still)

    def _save(self, optimizer: Optimizer, state_dict: State) -> None:
        state_dict[KEY] = self.state_dict()

    def _check_loaded(self, optimizer: Optimizer, state_dict: State) -> None:
        self._loading = state_dict.get(KEY)
        if self._loading is not None:
            self._check_saved(self._loading)

    def _load(self, optimizer: Optimizer) -> None:
        loading, self._loading = self._loading, None
        if loading is not None:
            self.load_state_dict(loading)


class _Guard(dict[str, Any]):
    """The defaults of a constrained optimizer: what is copied with it, and says no.

    torch leaves hooks behind when an optimizer is deep-copied or pickled. The copy would train on
    without its spheres, and nobody would know.
    """

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce_ex__(0)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a constrained optimizer cannot be copied or pickled, because step hooks are not: "
            "call remove() on its constraint, copy it, and call constrain() on the original and "
            "on the copy, which takes the radii by load_state_dict(); for checkpoints, save "
            "optimizer.state_dict()"
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, SphereOptimizer):
        raise TypeError(f"{name} holds its spheres itself; give it the groups, without constrain")
    # Wrappers that pass step() on to an optimizer inside them run none of their own hooks.
    if not (isinstance(optimizer, Optimizer) and getattr(type(optimizer).step, "hooked", False)):
        raise TypeError(
            f"{name} does not run the step hooks of torch.optim.Optimizer; if it wraps an "
            "optimizer, constrain that one"
        )
    if type(optimizer.defaults) is _Guard:
        raise ValueError(
            f"this {name} is constrained already; name all spheres in one call, or call remove() "
            "on the first constraint"
        )
