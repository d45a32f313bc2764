"""The demo's section on coin SVGD: the numbers of its table, and a warning about its particles."""

from types import SimpleNamespace

import numpy as np
import pytest

from probinfer import data
from probinfer.app.demo.particles import ParticleComparison, coin_section, coin_table, conclusion

RNG = np.random.default_rng(0)
CHAINS = RNG.normal(size=(2, 500, 3)) * [1.0, 2.0, 0.5] + [0.0, 1.0, -1.0]


def posterior(draws, info):
    num = draws.shape[0] * draws.shape[1]
    return SimpleNamespace(draws=draws, info=info, flat_log_weights=lambda: np.full(num, -np.log(num)))


def comparison(shift, factor):
    """Particles that are the draws of the chains, shifted by standard deviations and scaled."""
    flat = CHAINS.reshape(-1, 3)
    mean, sd = flat.mean(0), flat.std(0)
    draws = (mean + factor * (flat - mean) + shift * sd)[None]
    info = SimpleNamespace(
        num_particles=1000,
        num_gradients=2000,
        virial=-(factor**2) * np.ones(3),
        virials=np.linspace(-0.1, -1, 8),
        direction_norms=np.geomspace(1, 0.1, 8),
    )
    chains = SimpleNamespace(num_warmup_gradients=np.array(100), num_leapfrogs=np.array([[300], [600]]))
    return ParticleComparison(
        coin=posterior(draws, info),
        nuts=posterior(CHAINS, chains),
        seconds=(1.0, 2.0),
        paths=RNG.normal(size=(5, 4, 2)),
        pair=(0, 2),
        remarks=("the cloud is too narrow",),
    )


@pytest.mark.parametrize(("shift", "factor"), [(0.0, 1.0), (0.3, 0.8)])
def test_numbers(shift, factor):
    particles, chains = coin_table(comparison(shift, factor)).rows
    assert particles[1:3] == ("1000", "2000")
    assert chains[1:3] == ("1000", "1000")
    assert float(particles[3]) == pytest.approx(-(factor**2), abs=5e-4)
    assert float(particles[4]) == pytest.approx(shift, abs=5e-4)
    assert float(particles[5]) == pytest.approx(factor, abs=5e-4)
    text = conclusion(comparison(shift, factor))
    assert f"by {shift:.2f} standard deviations" in text
    assert f"are {factor:.2f} times those of NUTS, with 2 times the gradients" in text


def test_section():
    narrow = comparison(0.0, 0.8)
    section = coin_section(data.breast_cancer().take(np.arange(7)), narrow, coin_table(narrow))
    text = str(section)
    assert "3 coefficients is fitted to 7 of them" in text
    assert "too narrow" in text
    assert [picture.title for picture in section.blocks[-1].pictures] == [
        "Paths of the particles",
        "Convergence",
        "Agreement of particles and chains",
    ]
