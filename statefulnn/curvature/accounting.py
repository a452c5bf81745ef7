"""What differentially private training has spent: (ε, δ), by Google's dp-accounting."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from statefulnn.core.errors import explain
from statefulnn.core.extras import import_extra
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._models import check_choice

_ACCOUNTANTS = ("pld", "rdp")


@shortened
def privacy_spent(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    *,
    accountant: str = "pld",
) -> float:
    """Return the ε of a run of DP-SGD.

    It holds for batches into which each example comes with one probability, independently (Poisson
    sampling), for data sets that differ by one example, and only if the run publishes nothing else that
    depends on the data.

    Args:
        noise_multiplier: that of `dp_gradients`.
        sample_rate: the probability with which an example is in a batch.
        steps: how many updates there are.
        delta: δ, well below one over the number of examples.
        accountant: "pld" for privacy loss distributions, which are tight up to a numerical error that is
            added, or "rdp" for Rényi divergences, which are quicker and give a larger ε.

    Returns:
        ε; infinity without noise.

    Raises:
        ValueError: for numbers out of range.
        ImportError: if dp-accounting is not installed (extra ``privacy``).

    Source: github.com/google/differential-privacy, ``python/dp_accounting``; Mironov, Talwar, Zhang 2019,
    https://arxiv.org/abs/1908.10530; Koskela, Jälkö, Honkela 2020, https://arxiv.org/abs/1906.03049.

    Example: ``nn.curvature.privacy_spent(1.1, 256 / 60_000, 10_000, 1e-5)`` is about 2.
    """
    function = "privacy_spent"
    _check_run(sample_rate, steps, delta, accountant, function)
    if not noise_multiplier >= 0:
        raise _out_of_range(function, "noise_multiplier", noise_multiplier, "0 or more", "1.1")
    library = _library(function)
    event = _event(library, noise_multiplier, sample_rate, steps)
    return float(_accountant(accountant, function).compose(event).get_epsilon(delta))


@shortened
def noise_multiplier_for(
    epsilon: float, delta: float, sample_rate: float, steps: int, *, accountant: str = "pld"
) -> float:
    """Return the smallest noise multiplier with which a run of DP-SGD spends at most ε.

    Args:
        epsilon: ε, positive.
        delta: δ.
        sample_rate: the probability with which an example is in a batch.
        steps: how many updates there are.
        accountant: "pld" or "rdp", as for `privacy_spent`.

    Raises:
        ValueError: for numbers out of range.
        ImportError: if dp-accounting is not installed (extra ``privacy``).

    Source: as for `privacy_spent`.

    Example: ``nn.curvature.noise_multiplier_for(2.0, 1e-5, 256 / 60_000, 10_000)`` is about 1.1.
    """
    function = "noise_multiplier_for"
    _check_run(sample_rate, steps, delta, accountant, function)
    if not epsilon > 0:
        raise _out_of_range(function, "epsilon", epsilon, "positive", "8.0")
    library = _library(function)
    found = library.calibrate_dp_mechanism(
        lambda: _accountant(accountant, function),
        lambda noise: _event(library, noise, sample_rate, steps),
        epsilon,
        delta,
        library.LowerEndpointAndGuess(0.0, 1.0),
        tol=1e-4,
    )
    return float(found)


def _library(function: str) -> Any:
    return import_extra("dp_accounting", "dp-accounting", f"called {function}", "computes ε")


def _accountant(name: str, function: str) -> Any:
    part = import_extra(
        f"dp_accounting.{name}", "dp-accounting", f"called {function}", "computes ε"
    )
    return part.PLDAccountant() if name == "pld" else part.RdpAccountant()


def _event(library: ModuleType, noise_multiplier: float, sample_rate: float, steps: int) -> Any:
    step = library.GaussianDpEvent(noise_multiplier)
    if sample_rate < 1:
        step = library.PoissonSampledDpEvent(sample_rate, step)
    return library.SelfComposedDpEvent(step, steps)


def _check_run(
    sample_rate: float, steps: int, delta: float, accountant: str, function: str
) -> None:
    check_choice(accountant, _ACCOUNTANTS, "accountant", function)
    if not 0 < sample_rate <= 1:
        wanted = "above 0 and at most 1"
        raise _out_of_range(function, "sample_rate", sample_rate, wanted, "256 / 60_000")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise _out_of_range(function, "steps", steps, "a whole number of at least 1", "10_000")
    if not 0 < delta < 1:
        raise _out_of_range(function, "delta", delta, "between 0 and 1", "1e-5")


def _out_of_range(function: str, name: str, value: object, wanted: str, example: str) -> ValueError:
    return ValueError(
        explain(f"{function} was given {name}={value!r}", f"it is {wanted}", f"{name}={example}")
    )
