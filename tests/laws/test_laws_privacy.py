"""The privacy accountants agree with what the literature says, to three digits, and with formulae of our own here."""

import math
from statistics import NormalDist

import pytest

from atoll.errors import Invalid
from atoll.policy.accounting import epsilon, guarantee, multiplier
from atoll.spec.budget import Mechanism

pytest.importorskip("dp_accounting")

BOTH = pytest.mark.parametrize("accountant", ["rdp", "pld"])
DELTA = 1e-5


def sampled(order, sigma, q):
    """Renyi divergence of the sampled Gaussian at a whole order (Mironov et al., 2019, equation 4 and section 3.3)."""
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-q)
        + k * math.log(q)
        + (k * k - k) / (2 * sigma**2)
        for k in range(order + 1)
    ]
    most = max(terms)
    return (most + math.log(math.fsum(math.exp(term - most) for term in terms))) / (order - 1)


def exact_delta(sigma, spent):
    """The analytic Gaussian mechanism (Balle and Wang, 2018, theorem 8) of sensitivity 1."""
    tail = NormalDist().cdf
    return tail(0.5 / sigma - spent * sigma) - math.exp(spent) * tail(-0.5 / sigma - spent * sigma)


@pytest.mark.parametrize(("accountant", "known"), [("rdp", 2.5966), ("pld", 2.3817)])
def test_sixty_epochs_on_sixty_thousand_digits_cost_what_is_known(accountant, known):
    steps = 60 * 60_000 // 256
    found = epsilon(Mechanism(multiplier=1.1, steps=steps, sampling=256 / 60_000), DELTA, accountant)
    assert found == pytest.approx(known, rel=1e-3)


def test_the_moments_accountant_s_case_and_its_better_conversion():
    """Abadi et al. (2016) give 1.26 for 10,000 steps; Canonne et al. (2020) turn the same divergences into less."""
    q, sigma, steps = 0.01, 4.0, 10_000
    rdp = {order: steps * sampled(order, sigma, q) for order in range(2, 64)}
    old = min(value + math.log(1 / DELTA) / (order - 1) for order, value in rdp.items())
    new = min(
        value + math.log1p(-1 / order) - (math.log(DELTA) + math.log(order)) / (order - 1)
        for order, value in rdp.items()
    )
    mechanism = Mechanism(multiplier=sigma, steps=steps, sampling=q)
    assert old == pytest.approx(1.26, rel=5e-3)
    assert epsilon(mechanism, DELTA, "rdp") == pytest.approx(new, rel=2e-3)
    assert epsilon(mechanism, DELTA, "pld") < epsilon(mechanism, DELTA, "rdp") < old


@pytest.mark.parametrize(("sigma", "known"), [(3.7304, 1.0), (1.0, None), (10.0, None), (0.5, None)])
def test_one_gaussian_costs_what_the_analytic_mechanism_says(sigma, known):
    found = epsilon(Mechanism(multiplier=sigma, steps=1), DELTA, "pld")
    assert exact_delta(sigma, found) == pytest.approx(DELTA, rel=5e-3)
    if known is not None:
        assert found == pytest.approx(known, rel=1e-3)


def test_the_divergence_of_a_gaussian_is_turned_into_the_closed_form():
    sigma = 2.0
    orders = [1 + step / 1000 for step in range(10, 60_000)]
    closed = min(
        order / (2 * sigma**2) + math.log1p(-1 / order) - (math.log(DELTA) + math.log(order)) / (order - 1)
        for order in orders
    )
    assert epsilon(Mechanism(multiplier=sigma, steps=1), DELTA, "rdp") == pytest.approx(closed, rel=2e-3)


@BOTH
@pytest.mark.parametrize("steps", [4, 100])
def test_many_gaussians_are_one_with_less_noise(accountant, steps):
    many = epsilon(Mechanism(multiplier=5.0 * math.sqrt(steps), steps=steps), DELTA, accountant)
    assert many == pytest.approx(epsilon(Mechanism(multiplier=5.0, steps=1), DELTA, accountant), rel=1e-3)


@BOTH
def test_more_steps_cost_more_and_more_noise_or_rarer_sampling_less(accountant):
    def cost(**fields):
        return epsilon(
            Mechanism.model_validate({"multiplier": 1.5, "steps": 50, "sampling": 0.1, **fields}), DELTA, accountant
        )

    assert cost(steps=25) < cost() < cost(steps=100)
    assert cost(multiplier=3.0) < cost() < cost(multiplier=1.0)
    assert cost(sampling=0.01) < cost() < cost(sampling=1.0)


@BOTH
@pytest.mark.parametrize(("wanted", "steps", "sampling"), [(1.0, 1, 1.0), (4.0, 200, 0.05)])
def test_the_least_multiplier_for_an_epsilon_meets_it_and_hardly_less_does(accountant, wanted, steps, sampling):
    size = multiplier(wanted, DELTA, steps, sampling, accountant)
    costs = [
        epsilon(Mechanism(multiplier=size * by, steps=steps, sampling=sampling), DELTA, accountant) for by in (1, 0.999)
    ]
    assert costs[0] <= wanted < costs[1]
    assert costs[0] == pytest.approx(wanted, rel=1e-3)


def test_the_analytic_mechanism_s_known_multiplier_is_found():
    assert multiplier(1.0, DELTA, 1, accountant="pld") == pytest.approx(3.7304, rel=1e-3)


def test_a_guarantee_states_all_that_a_card_needs():
    made = guarantee("site", Mechanism(multiplier=2.0, steps=3), DELTA, "rdp")
    assert (made.unit, made.delta, made.accountant, made.mechanism.sampling) == ("site", DELTA, "rdp", 1.0)
    assert made.epsilon == epsilon(made.mechanism, DELTA, "rdp")


def test_what_no_noise_gives_is_refused():
    with pytest.raises(Invalid, match=r"delta: 0.* above 0"):
        epsilon(Mechanism(multiplier=1.0, steps=1), 0.0)
    with pytest.raises(Invalid, match="epsilon: 0: must be above 0"):
        multiplier(0, DELTA, 1)
    with pytest.raises(Invalid, match="epsilon: 1e-07: no noise reaches it in 1000 steps"):
        multiplier(1e-7, 1e-15, 1000, accountant="rdp")
