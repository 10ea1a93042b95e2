"""Tensors that stay at their site: chosen by name, left out of what is exchanged, kept and given back bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn

from atoll.errors import Corrupt, TaskFailed
from atoll.inner.learner import ModuleLearner
from atoll.inner.mesh import Mesh
from atoll.inner.personal import chosen, put_personal, shared, shared_part, write_personal
from atoll.inner.vector import named, read_vector, signature_of, write_vector
from atoll.spec.model import elements


def net():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1).bfloat16())


SIGNATURE = signature_of(net())
BATCH_NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")


class Task:
    def model(self):
        return net()


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("2.*",), {"2.weight", "2.bias"}),
        (("1.*",), set(BATCH_NORM)),
        (("*.running_*", "?.bias"), {"1.running_mean", "1.running_var", "0.bias", "1.bias", "2.bias"}),
        (("[12].weight",), {"1.weight", "2.weight"}),
        ((), set()),
    ],
)
def test_patterns_choose_by_the_whole_name(patterns, names):
    assert chosen(SIGNATURE, patterns) == names
    rest = shared(SIGNATURE, names)
    assert [spec.name for spec in rest] == [spec.name for spec in SIGNATURE if spec.name not in names]
    vector = np.arange(elements(SIGNATURE), dtype=np.float32)
    assert len(shared_part(vector, SIGNATURE, names)) == elements(rest)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("2.weigth",), "sync.keep_local: no tensor's name fits '2.weigth'; did you mean '2.weight'?"),
        (("2.*", "head*"), "sync.keep_local: no tensor's name fits 'head*'; there is 0.bias, 0.weight, 1.bias"),
        (("2",), "no tensor's name fits '2'"),
        (("*",), "sync.keep_local: every tensor fits *; leave something to be exchanged"),
        (("0.*", "1.*", "2.*"), "every tensor fits 0.*, 1.*, 2.*"),
    ],
)
def test_patterns_that_leave_nothing_to_stay_or_nothing_to_exchange_are_refused(patterns, words):
    with pytest.raises(TaskFailed) as caught:
        chosen(SIGNATURE, patterns)
    assert words in str(caught.value)


def test_what_stays_is_neither_read_nor_written():
    model, names = net(), frozenset(BATCH_NORM)
    rest = shared(SIGNATURE, names)
    before = {name: tensor.clone() for name, tensor in named(model, names).items()}
    vector = read_vector(model, rest, names)
    write_vector(model, rest, vector + 1, names)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named(model, names).items())
    np.testing.assert_allclose(read_vector(model, rest, names), vector + 1, rtol=1e-2)
    with pytest.raises(TaskFailed, match=r"1\.weight"):
        read_vector(model, rest)


def test_what_was_kept_comes_back_bit_for_bit_in_its_own_precision(tmp_path):
    model, other, names = net(), net(), frozenset({"2.weight", "1.running_mean"})
    write_personal(tmp_path / "local", named(model, names))
    put_personal(named(other, names), tmp_path / "local")
    assert torch.equal(other[2].weight, model[2].weight)
    assert other[2].weight.dtype == torch.bfloat16
    assert not torch.equal(other[2].bias, model[2].bias)


def test_what_is_of_another_model_or_torn_is_not_taken(tmp_path):
    model, path = net(), tmp_path / "local"
    write_personal(path, named(model, {"2.weight"}))
    with pytest.raises(Corrupt, match="not those that stay of this model"):
        put_personal(named(model, {"2.weight", "2.bias"}), path)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(Corrupt, match=r"not the ones written|cannot be read"):
        put_personal(named(model, {"2.weight"}), path)


def test_values_that_no_round_can_begin_from_are_told(tmp_path):
    model = net()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(TaskFailed, match=r"tensor 2.weight, which stays at its site, is not finite"):
        write_personal(tmp_path / "local", named(model, {"2.weight"}))
    assert not (tmp_path / "local").exists()


def test_a_site_without_any_yet_begins_with_the_seeds_values_whatever_the_module_held(tmp_path):
    learner = ModuleLearner(Task(), 7, Mesh())
    first = learner.vector()
    learner.write(SIGNATURE, first + 1)
    rest = shared(SIGNATURE, chosen(SIGNATURE, ("2.*",)))
    given = np.zeros(elements(rest), np.float32)
    learner.write(rest, given, ("2.*",))
    np.testing.assert_array_equal(learner.vector(), np.concatenate([given, first[len(given) :]]))
