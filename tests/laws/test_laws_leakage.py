"""What an update gives away: a hub inverts gradients (Geiping et al., 2020) of `examples/digits` into the very image.

From a plain update of one image it gets the image back; from what it holds of a site under secure sums, which is
the masked update and the sum of all, it does not.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from atoll.outer.secret import Circle, Hidden, Party, concealed, ring_of, unmasking
from atoll.outer.wire import decode, encode, private
from atoll.spec.secret import Terms
from atoll.spec.wire import Transform

CLIP = Transform(kind="clip", value=10.0)
SITES = tuple(f"site-{number}" for number in range(8))
VICTIMS = (5, 11, 16)  # which images
STEPS = 200  # of the attack


@pytest.fixture(scope="module")
def images():
    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32)[:, None], torch.tensor(found.target)


@pytest.fixture(scope="module")
def model():
    path = Path(__file__).parents[2] / "examples" / "digits" / "task.py"
    spec = importlib.util.spec_from_file_location("digits_task", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.Digits().model()


def gradient(model, x, y, graph=False):
    found = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()), create_graph=graph)
    return torch.cat([one.flatten() for one in found])


def update(model, images, numbers):
    """Return what a site exchanges of a step on these images."""
    x, y = images
    return gradient(model, x[numbers], y[numbers]).numpy()


def arrived(vector):
    """Return a plain update as the hub has it."""
    return np.concatenate([decode(chunk, (CLIP,), vector.size) for chunk in encode(vector, (CLIP,))])


def inverted(model, found):
    """Return the image whose gradient points as ``found`` does, as near as some steps of Adam come."""
    found = torch.from_numpy(np.nan_to_num(found.astype(np.float32)))
    label = found[-10:].argmin().reshape(1)  # its bias alone is to grow: the label needs no search
    x = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    for _ in range(STEPS):
        optimiser.zero_grad()
        (1 - torch.cosine_similarity(gradient(model, x, label, graph=True), found, dim=0)).backward()
        optimiser.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach().numpy().ravel()


def likeness(model, found, image):
    return float(np.corrcoef(inverted(model, found), image.numpy().ravel())[0, 1])


def summed(updates):
    """Return what the hub holds of the first site's update under a secure sum, and the mean that it ends with."""
    terms = Terms(run="r", position=1, attempt=0, sites=SITES, bound=CLIP.value, heaviest=1, least=len(SITES))
    keys = {name: Ed25519PrivateKey.generate() for name in SITES}

    def verify(site, signer, said, signature):
        keys[site].public_key().verify(signature, said)

    parties = {name: Party(terms, name, name, keys[name].sign, verify) for name in SITES}
    given = [party.keys() for party in parties.values()]
    circle, dealt = Circle.of(terms, given), {name: party.deal(given) for name, party in parties.items()}
    held = {}
    for name, vector in updates.items():
        masks = parties[name].mask({near: dealt[near].sealed[name] for near in circle.near[name]})
        sent = [concealed(chunk, ring_of(terms), 1, masks) for chunk in encode(vector, (CLIP,))]
        held[name] = np.concatenate([np.frombuffer(chunk.data, np.uint32) for chunk in sent])
    agreed = [party.agree(SITES) for party in parties.values()]
    hidden = Hidden(terms, unmasking(circle, SITES, SITES, [party.unseal(agreed) for party in parties.values()]))
    return ring_of(terms).lowered(held[SITES[0]]), hidden.mean(0, sum(held.values()).astype(np.uint32), len(SITES))


@pytest.mark.parametrize("victim", [VICTIMS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in VICTIMS[1:])])
def test_a_plain_update_of_one_image_gives_it_back_and_a_hidden_one_does_not(model, images, victim):
    image = images[0][victim]
    each = {name: [100 + 7 * at] if at else [victim] for at, name in enumerate(SITES)}
    updates = {name: update(model, images, numbers) for name, numbers in each.items()}
    plain = likeness(model, arrived(updates[SITES[0]]), image)
    assert plain > 0.9
    masked, mean = summed(updates)
    assert np.abs(mean - sum(updates.values()) / len(SITES)).max() < 1e-6
    assert abs(likeness(model, masked, image)) < 0.5
    noised = np.concatenate(list(private(updates[SITES[0]], (CLIP, Transform(kind="noise", value=0.1)))))
    assert likeness(model, noised, image) < 0.8
    # What eight images add up to still looks somewhat like one that is among them: that is for noise to hide.
    assert likeness(model, mean, image) < plain - 0.05
