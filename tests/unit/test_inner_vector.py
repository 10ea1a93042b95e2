"""A module as a flat vector: state_dict order, tied weights once, integers left alone."""

import numpy as np
import pytest
import torch
from torch import nn

from atoll.errors import Corrupt, TaskFailed
from atoll.inner.vector import (
    at_rest,
    load_vector,
    put_back,
    read_vector,
    save_vector,
    signature_of,
    write_vector,
)
from atoll.spec.model import TensorSpec


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        self.coarse = nn.Parameter(torch.ones((), dtype=torch.bfloat16))


def test_the_signature_is_the_floating_tensors_in_order_with_tied_ones_once():
    assert signature_of(Tied()) == (
        TensorSpec(name="coarse", shape=()),
        TensorSpec(name="embed.weight", shape=(3, 2)),
        TensorSpec(name="norm.weight", shape=(2,)),
        TensorSpec(name="norm.bias", shape=(2,)),
        TensorSpec(name="norm.running_mean", shape=(2,)),
        TensorSpec(name="norm.running_var", shape=(2,)),
    )


def test_what_is_written_is_read_back_and_the_counter_stays():
    module = Tied()
    module.norm.num_batches_tracked += 7
    signature = signature_of(module)
    vector = np.arange(15, dtype=np.float32)
    vector.flags.writeable = False
    write_vector(module, signature, vector)
    np.testing.assert_array_equal(read_vector(module, signature), vector)
    assert module.norm.num_batches_tracked == 7
    assert module.head.weight is module.embed.weight
    assert module.head.weight[2, 1] == 6
    assert module.embed.weight.requires_grad


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LazyBatchNorm1d])
def test_a_running_variance_that_rounding_left_below_zero_is_taken_for_zero(norm):
    module = nn.Sequential(nn.Linear(2, 2), norm(2) if norm is nn.BatchNorm1d else norm()).eval()
    module(torch.ones(1, 2))
    vector = read_vector(module, signature_of(module))
    vector[-2:] = -0.25, 0.5
    write_vector(module, signature_of(module), vector)
    assert module[1].running_var.tolist() == [0.0, 0.5]
    assert module(torch.ones(3, 2)).isfinite().all()


def test_reading_copies():
    module = nn.Linear(1, 1)
    vector = read_vector(module, signature_of(module))
    vector += 1
    assert not np.array_equal(vector, read_vector(module, signature_of(module)))


@pytest.mark.parametrize("vector", [np.zeros(14, np.float32), np.zeros(15, np.float64), np.zeros((3, 5), np.float32)])
def test_a_vector_of_another_size_or_kind_is_refused(vector):
    module = Tied()
    with pytest.raises(TaskFailed, match="15 float32 numbers"):
        write_vector(module, signature_of(module), vector)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(2, 2), r"tensor weight \[2, 2\] where the weights have weight \[1, 2\]"),
        (nn.Linear(2, 1, bias=False), "1 tensors"),
    ],
)
def test_another_modules_signature_is_refused(other, words):
    with pytest.raises(TaskFailed, match=words):
        read_vector(other, signature_of(nn.Linear(2, 1)))


def test_what_never_travels_is_put_back_to_how_it_was():
    module = Tied()
    module.register_buffer("cache", torch.ones(2), persistent=False)
    rest = at_rest(module)
    assert rest.keys() == {"norm.num_batches_tracked", "cache"}
    module.norm.num_batches_tracked += 7
    module.cache *= 3
    module.coarse.data += 1
    put_back(module, rest)
    assert (int(module.norm.num_batches_tracked), module.cache.tolist(), module.coarse.item()) == (0, [1, 1], 2)


def test_a_file_holds_the_vector_and_no_other_length(tmp_path):
    module = nn.Linear(2, 1)
    signature = signature_of(module)
    save_vector(read_vector(module, signature), tmp_path / "weights.f32")
    assert (tmp_path / "weights.f32").stat().st_size == 12
    np.testing.assert_array_equal(load_vector(tmp_path / "weights.f32", signature), read_vector(module, signature))
    with pytest.raises(Corrupt, match="3 numbers where the signature has 2"):
        load_vector(tmp_path / "weights.f32", signature_of(nn.Linear(1, 1)))
