"""Laws of ranks that hold whole models: torch's own bits, and nothing left on a model that parts from the others."""

import multiprocessing
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from atoll.inner.mesh import LINKS, Mesh, broken, join, leave
from atoll.inner.parallelize import parallelize
from atoll.spec.compute import Compute

STEPS = 4


class Net(nn.Module):
    """Two outputs of which a loss may leave one out, a parameter that nobody uses, a frozen one and buffers."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(300, 256), nn.ModuleList(nn.Linear(256, 256) for _ in range(16))
        self.norm, self.drop, self.head = nn.BatchNorm1d(256), nn.Dropout(0.1), nn.Linear(256, 3)
        self.unused, self.frozen = nn.Linear(7, 7), nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        h = self.embed(x)
        for layer in self.layers:
            h = h + torch.relu(layer(h))
        h = self.drop(self.norm(h))
        return {"hidden": h, "answer": [self.head(h)], "rows": len(x)}


def made():
    torch.manual_seed(5)
    return Net()


def train(model, share, spread=None, pieces=1, steps=STEPS):
    """Take steps on a rank's share, of which every other one leaves out an output; return all parameters."""
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        torch.manual_seed(100 * step + share)
        adamw.zero_grad(set_to_none=True)
        for piece, x in enumerate(torch.randint(0, 300, (16,)).chunk(pieces), 1):
            if spread is not None:
                spread.hold_back(last=piece == pieces)
            out = model(x)
            assert out["rows"] == len(x)
            loss = out["answer"][0].square().mean()
            (loss if step % 2 else loss + out["hidden"].abs().mean()).backward()
        adamw.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def left_on(model):
    """Return what hangs on a model that was built without it."""
    hooks = [model._forward_hooks, model._forward_pre_hooks]
    hooks += [parameter._post_accumulate_grad_hooks or {} for parameter in model.parameters()]
    return sum(map(len, hooks)), [name for name, p in model.named_parameters() if p.grad is not None]


def bits(mesh, folder):
    """Copies, and a model that was broken off among others first, against torch's own class."""
    theirs = made()
    expected = train(DistributedDataParallel(theirs, find_unused_parameters=True), mesh.rank)
    ours = parallelize(made(), mesh)
    found = train(ours.model, mesh.rank, ours)
    assert type(ours.model) is Net
    assert ours.model.unused.weight.grad is None
    assert torch.equal(found, expected)
    ours.model.load_state_dict(made().state_dict())
    again = ours.among(mesh)
    assert torch.equal(train(again.model, mesh.rank, again), expected)


def in_pieces(mesh, folder):
    """Gradients that are summed once for all pieces of a batch are torch's, too."""
    theirs = made()
    both = DistributedDataParallel(theirs, find_unused_parameters=True)
    adamw = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        torch.manual_seed(100 * step + mesh.rank)
        adamw.zero_grad(set_to_none=True)
        first, last = torch.randint(0, 300, (16,)).chunk(2)
        for x, sums in ((first, False), (last, True)):
            both.require_backward_grad_sync = sums
            out = both(x)
            loss = out["answer"][0].square().mean()
            (loss if step % 2 else loss + out["hidden"].abs().mean()).backward()
        adamw.step()
    expected = torch.cat([parameter.detach().reshape(-1) for parameter in theirs.parameters()])
    ours = parallelize(made(), mesh)
    assert torch.equal(train(ours.model, mesh.rank, ours, pieces=2, steps=2), expected)


def broken_off(mesh, folder):
    """A model whose group breaks in the middle of a backward pass goes on alone, and among the next ones."""
    ours = parallelize(made(), mesh)
    model = ours.model
    train(model, mesh.rank, ours, steps=1)
    hurt = model.layers[8].weight.register_post_accumulate_grad_hook(lambda _: LINKS.sever())
    with pytest.raises((ConnectionError, RuntimeError)) as caught:
        train(model, mesh.rank, ours)
    assert broken(caught.value)
    hurt.remove()
    leave()
    alone = ours.among(Mesh())
    assert left_on(model) == (0, [])
    model.load_state_dict(made().state_dict())
    new = parallelize(made(), Mesh())
    assert torch.equal(train(model, 0, alone), train(new.model, 0, new))
    met = join(mesh.rank, mesh.ranks, folder / "second")
    model.load_state_dict(made().state_dict())
    ours, new = alone.among(met), parallelize(made(), met)
    assert torch.equal(train(model, met.rank, ours), train(new.model, met.rank, new))


def _serve(law, rank, ranks, folder):
    torch.set_num_threads(1)
    law(join(rank, ranks, folder / "first"), folder)


@pytest.mark.parametrize(("law", "ranks"), [(bits, 2), (bits, 3), (in_pieces, 2), (broken_off, 2), (broken_off, 3)])
def test_copies_have_the_bits_of_torchs_own_class_and_part_without_a_trace(tmp_path, law, ranks):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=_serve, args=(law, rank, ranks, tmp_path)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks, law.__doc__


def test_a_model_alone_is_left_as_it_was_built():
    spread = parallelize(made(), Mesh(), Compute())
    assert left_on(spread.model) == (0, [])
    assert spread.among(Mesh()).model is spread.model


def test_what_compiles_and_what_shards_is_not_imported_for_copies(tmp_path):
    code = f"""
import sys
from pathlib import Path
import torch
from atoll.inner.copies import Copies
from atoll.inner.mesh import join
from atoll.inner.optimiser import make
from atoll.runtime import worker
from atoll.spec.job import Optimiser
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)
model = torch.nn.Linear(3, 1)
Copies(model)
adamw = make(Optimiser(kind="adamw", rate=0.1), model)
for _ in range(2):
    adamw.zero_grad(set_to_none=True)
    model(torch.ones(2, 3)).sum().backward()
    adamw.step()
print([name for name in ("torch._dynamo", "torch.distributed.tensor", "pandas") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert said.stdout == "[]\n", said.stderr
