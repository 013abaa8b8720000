"""Functional forms of the batch norms of :mod:`sphereopt.nn.batch_norms`."""

from __future__ import annotations

import math
import operator

from torch import Tensor

from sphereopt.nn._divide import divide
from sphereopt.nn._running import need_two_values
from sphereopt.nn._scales import (
    Constants,
    MeanLargest,
    MeanPower,
    gaussian_largest,
    gaussian_power,
    paper_constant,
)

__all__ = ["l1_batch_norm", "linf_batch_norm", "lp_batch_norm", "topk_batch_norm"]


def l1_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Divide each channel by its mean absolute deviation over the batch.

    .. math:: y = \gamma\,\frac{c}{\sqrt{\pi/2}\;\frac1n\sum|c| + \epsilon} + \beta,
        \qquad c = x - \operatorname{mean}(x)

    For Gaussian values the divisor is the standard deviation. No value is squared, so that nothing
    overflows in float16.

    Args:
        x: (N, C, ...).
        running_mean: (C,); moved towards the batch's mean in training, used otherwise.
        running_scale: (C,); likewise, of the divisor, constant and eps included.
        weight: Gain :math:`\gamma`, (C,); None for 1.
        bias: Shift :math:`\beta`, (C,); None for 0.
        training: Use the statistics of this batch.
        momentum: Weight of this batch in the running averages.
        eps: Added to the divisor.

    Returns:
        y, of x's shape, dtype and memory format.

    Raises:
        ValueError: If x has fewer than two dims or is not of floating-point numbers, there are
            fewer than two values per channel in training, or no running averages outside.

    Notes:
        Per-channel numbers are float32 at least. What is averaged is what is divided by, whereas
        ``F.batch_norm`` divides by the biased variance and averages the unbiased one. The backward
        pass keeps x alone; of tied or zero deviations it takes the even subgradient.

    References:
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer, Banner,
        Golan and Soudry, 2018.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
        >>> l1_batch_norm(x, training=True, eps=0.0).T
        tensor([[-1.1968, -0.3989,  0.3989,  1.1968]])
    """
    scale = MeanPower(1.0, math.sqrt(math.pi / 2))
    return divide(x, running_mean, running_scale, weight, bias, training, momentum, eps, scale)


def linf_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    constants: Constants = "paper",
) -> Tensor:
    r"""Divide each channel by its largest absolute deviation over the batch.

    .. math:: y = \gamma\,\frac{c}{C_n\max|c| + \epsilon} + \beta

    Args:
        x: (N, C, ...).
        running_mean: See :func:`l1_batch_norm`.
        running_scale: See :func:`l1_batch_norm`.
        weight: See :func:`l1_batch_norm`.
        bias: See :func:`l1_batch_norm`.
        training: See :func:`l1_batch_norm`.
        momentum: See :func:`l1_batch_norm`.
        eps: See :func:`l1_batch_norm`.
        constants: See :func:`topk_batch_norm`, of which this is k = 1.

    Returns:
        y, of x's shape, dtype and memory format.

    Raises:
        ValueError: See :func:`topk_batch_norm`.

    Example:
        >>> x = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
        >>> linf_batch_norm(x, training=True).std()
        tensor(0.6...)
        >>> linf_batch_norm(x, training=True, constants="gaussian").std()
        tensor(0.9...)
    """
    return topk_batch_norm(
        x, running_mean, running_scale, weight, bias, training, momentum, eps, 1, constants
    )


def topk_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    k: int = 10,
    constants: Constants = "paper",
) -> Tensor:
    r"""Divide each channel by the mean of its k largest absolute deviations over the batch.

    .. math:: y = \gamma\,\frac{c}{C_n\,\frac1k\sum_{j\le k}|c|_{(j)} + \epsilon} + \beta

    Args:
        x: (N, C, ...).
        running_mean: See :func:`l1_batch_norm`.
        running_scale: See :func:`l1_batch_norm`.
        weight: See :func:`l1_batch_norm`.
        bias: See :func:`l1_batch_norm`.
        training: See :func:`l1_batch_norm`.
        momentum: See :func:`l1_batch_norm`.
        eps: See :func:`l1_batch_norm`.
        k: How many deviations to take the mean of, at most n.
        constants: "paper" for :math:`C_n = \frac12(1+\sqrt{\pi\ln4})/\sqrt{2\ln n}`, which does not
            depend on k; "gaussian" for one over the expected mean of the k largest of n
            half-normal numbers, so that for Gaussian values the divisor has the standard deviation
            as its expected value.

    Returns:
        y, of x's shape, dtype and memory format.

    Raises:
        ValueError: If k is not in 1 ... n, or what :func:`l1_batch_norm` raises.

    Notes:
        The paper's constant comes from bounds on the maximum of c, not of :math:`|c|`, so its
        outputs have a standard deviation below 1 for Gaussian values: about 0.7 for k = 1. Values
        tied for the last place share its gradient evenly.

    References:
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer, Banner,
        Golan and Soudry, 2018.

    Example:
        >>> x = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
        >>> topk_batch_norm(x, training=True, k=2, constants="gaussian").T
        tensor([[-1.1880, -0.3960,  0.3960,  1.1880]])
    """
    check_choice(constants)
    constant = math.nan  # outside of training nothing is measured
    if training:
        need_k(x, k, "topk_batch_norm")
        constant = _largest_constant(x.numel() // x.shape[1], k, constants)
    scale = MeanLargest(k, constant)
    return divide(x, running_mean, running_scale, weight, bias, training, momentum, eps, scale)


def lp_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    p: float = 2.0,
    constants: Constants = "paper",
) -> Tensor:
    r"""Divide each channel by the p-th mean of its deviations over the batch.

    .. math:: y = \gamma\,\frac{c}{C\,(\frac1n\sum|c|^p + \epsilon)^{1/p}} + \beta

    Args:
        x: (N, C, ...).
        running_mean: See :func:`l1_batch_norm`.
        running_scale: See :func:`l1_batch_norm`.
        weight: See :func:`l1_batch_norm`.
        bias: See :func:`l1_batch_norm`.
        training: See :func:`l1_batch_norm`.
        momentum: See :func:`l1_batch_norm`.
        eps: Added to the mean of the powers.
        p: Exponent, finite and at least 1.
        constants: "paper" for C = 1, as in the authors' code; "gaussian" for
            :math:`C = (E|z|^p)^{-1/p}` of a standard normal z, which makes the divisor of Gaussian
            values their standard deviation.

    Returns:
        y, of x's shape, dtype and memory format.

    Raises:
        ValueError: If p is below 1 or not finite, or what :func:`l1_batch_norm` raises.

    Notes:
        p = 2 is ``F.batch_norm``, but for what the running average is of; p = 1 with the Gaussian
        constant is :func:`l1_batch_norm`. In half precision the powers are taken in a float32 copy.

    References:
        Norm matters: efficient and accurate normalization schemes in deep networks, Hoffer, Banner,
        Golan and Soudry, 2018.

    Example:
        >>> x = torch.randn(8, 3)
        >>> y = torch.nn.functional.batch_norm(x, None, None, training=True)
        >>> torch.allclose(lp_batch_norm(x, training=True, p=2.0), y, atol=1e-5)
        True
    """
    check_choice(constants)
    check_p(p)
    scale = MeanPower(p, gaussian_power(p) if constants == "gaussian" else 1.0)
    return divide(x, running_mean, running_scale, weight, bias, training, momentum, eps, scale)


def _largest_constant(n: int, k: int, constants: Constants) -> float:
    if constants == "paper":
        return paper_constant(n)
    # Compiled with dynamic shapes n is a symbol, and this makes it a number.
    constant: float = gaussian_largest(operator.index(n), k)
    return constant


def check_choice(constants: str) -> None:
    if constants not in ("paper", "gaussian"):
        raise ValueError(f'constants={constants!r} must be "paper" or "gaussian"')


def check_p(p: float) -> None:
    if p == math.inf:
        raise ValueError("p=inf is another layer: use LInfBatchNorm* or linf_batch_norm")
    if not p >= 1:
        raise ValueError(f"p={p} must be at least 1")


def need_k(x: Tensor, k: int, layer: str) -> None:
    need_two_values(x, layer)
    n = x.numel() // x.shape[1]
    if not 1 <= k <= n:
        raise ValueError(
            f"k={k} must be between 1 and the {n} values per channel that {layer} got in an input "
            f"of shape {tuple(x.shape)}"
        )
