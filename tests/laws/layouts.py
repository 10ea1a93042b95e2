"""Ranks that stay, and take the same four steps under one layout after another."""

import math
import multiprocessing
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from atoll.inner.alike import digest
from atoll.inner.flops import demand
from atoll.inner.gradients import clip
from atoll.inner.made import make_model
from atoll.inner.mesh import Mesh, join, laid_out
from atoll.inner.optimiser import make
from atoll.inner.parallelize import parallelize
from atoll.inner.steps import Start, training_steps
from atoll.spec.compute import Compute
from atoll.spec.job import Optimiser
from atoll.spec.plan import Layout
from atoll.tasks.gpt import GPT, Shape

STEPS = 4
LENGTH = 16
_DENSE = Shape(vocabulary=64, width=32, layers=4, heads=4, length=LENGTH)


_ALONE, _PLAIN = Layout(), Compute()


@dataclass(frozen=True)
class Case:
    """What is computed; the data and the seed are always the same."""

    layout: Layout = _ALONE
    compute: Compute = _PLAIN
    model: str = "dense"
    batch: int = 8
    shares: tuple[int, ...] = ()  # of the batch; none: alike
    odd: str = ""  # what one rank makes otherwise: weights, examples, order, loss

    def alone(self):
        return replace(self, layout=Layout(), compute=Compute(clip=self.compute.clip), shares=())


class Any(nn.Module):
    """A model with no plan: blocks of two kinds, a tied matrix, a list that is not of blocks, an unused parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 24)
        self.layers = nn.ModuleList(
            [nn.GRU(24, 24, batch_first=True), nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))]
        )
        self.parts = nn.ModuleList([nn.ModuleList([nn.Linear(24, 7)]), nn.ModuleList([nn.Linear(7, 24)])])
        self.head = nn.Linear(24, 64)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.layers[0](x)[0]
        x = x + self.layers[1](x) * self.scale
        for inner in self.parts:
            for layer in inner:
                x = layer(x).tanh()
        return self.head(x)


def _causal(kind, config="", **more):
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, **more}
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, config or f"{kind}Config")(**sizes))


def _adapted(model, **options):
    """Put adapters beside all linear layers, of which none is zero: each has a gradient from the first step on."""
    from atoll.tasks.pretrained import Lora, adapt

    adapt(model, Lora(rank=3, **options))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def _leaning(model):
    """Have the routers choose the last expert for all tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter[-1] = 100
    return model


def _squared(model):
    """Let a layer's experts do with their shares what none of transformers' does."""
    experts = model.model.layers[1].mlp.experts
    plain = experts.forward
    experts.forward = lambda x, chosen, share: plain(x, chosen, share * share)
    return model


_MODELS = {
    "llama": lambda: _causal("Llama", attention_bias=True),
    "tied llama": lambda: _causal("Llama", tie_word_embeddings=True),
    "qwen": lambda: _causal("Qwen3"),
    "gemma": lambda: _causal("Gemma3", "Gemma3TextConfig", sliding_window=6),
    "phi": lambda: _causal("Phi3"),
    "olmo": lambda: _causal("Olmo2"),
    "latent": lambda: _causal("MiniCPM3", num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10),
    "mixtral": lambda: _causal("Mixtral", num_local_experts=4),
    "qwen moe": lambda: _causal("Qwen3Moe", num_experts=4, num_experts_per_tok=3, moe_intermediate_size=24),
    "deepseek": lambda: _causal(
        "DeepseekV2",
        head_dim=4,
        kv_lora_rank=10,
        q_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=8,
        num_key_value_heads=4,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    ),
    "gpt-oss": lambda: _causal("GptOss", num_local_experts=4, num_experts_per_tok=2),
    "lora llama": lambda: _adapted(_causal("Llama")),
    "lora dropped": lambda: _adapted(_causal("Llama", attention_bias=True), dropout=0.3),
    "lora gemma": lambda: _adapted(_causal("Gemma3", "Gemma3TextConfig")),
    "lora phi": lambda: _adapted(_causal("Phi3")),
    "dense qwen moe": lambda: _causal("Qwen3Moe", num_experts=4, mlp_only_layers=[0, 1]),
    "qwen six": lambda: _causal("Qwen3Moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24),
    "one-sided": lambda: _leaning(_causal("GptOss", num_local_experts=4, num_experts_per_tok=1)),
    "squared": lambda: _squared(_causal("Mixtral", num_local_experts=4)),
    # Wide, for where two experts are as good the last bit of a sum chooses between them.
    "lora mixtral": lambda: _adapted(_causal("Mixtral", num_local_experts=4, initializer_range=0.1)),
    "dense": lambda: GPT(_DENSE),
    "sparse": lambda: GPT(replace(_DENSE, experts=4)),
    "three heads": lambda: GPT(replace(_DENSE, width=33, heads=3)),
    "any": Any,
    "own way": Any,
}


def _own_way(model, mesh):
    """Cut what a plan cannot know of: the two matrices of a Sequential."""
    parallelize_module(model.layers[1], mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


class Words:
    """Predicts the next of made-up tokens, which follow a rule with a few exceptions."""

    def __init__(self, model):
        self.model = _MODELS[model]
        if model == "own way":
            self.parallelize = _own_way

    def loss(self, model, batch):
        answer = model(batch["tokens"][:, :-1])
        answer = getattr(answer, "logits", answer)  # what a model of transformers gives
        return torch.nn.functional.cross_entropy(answer.flatten(0, 1).float(), batch["tokens"][:, 1:].flatten())


class Odd(Words):
    """A task that is not a function of the seed alone: rank 1 makes something else."""

    def __init__(self, model, what):
        super().__init__(model)
        self.what, made = what, self.model
        self.model = lambda: _shifted(made()) if what == "weights" else made()

    def loss(self, model, batch):
        return super().loss(model, batch) * (1.5 if self.what == "loss" else 1)


def _shifted(model):
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    return model


def examples(odd, count=20):
    tokens = np.arange(count * LENGTH).reshape(count, LENGTH) % 64
    return {"tokens": tokens[::-1] if odd == "order" else tokens}


def batches(size, share, cut):
    made = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        first = torch.randint(0, 64, (size, 1), generator=made)
        tokens = (first + 5 * torch.arange(LENGTH + 1)) % 64
        tokens = torch.where(torch.rand(tokens.shape, generator=made) < 0.1, 3, tokens)
        yield {"tokens": tokens.split(cut)[share]}


def learn(met, case):
    """Return the losses of four AdamW steps, the norm of the last one's gradient, for AdamW forgives a wrong scale, and
    how many operations that step takes of all ranks."""
    mesh = laid_out(met, case.layout)
    odd = case.odd if mesh.rank == 1 else ""
    task = Odd(case.model, odd) if odd else Words(case.model)
    spread = parallelize(make_model(task, 0), mesh, case.compute, getattr(task, "parallelize", None))
    adamw = make(Optimiser(kind="adamw", rate=0.01), spread.model)
    even = [len(part) for part in np.array_split(range(case.batch), mesh.shares)]
    given = batches(case.batch, mesh.share, list(case.shares) or even)
    if odd == "examples":
        given = ({"tokens": (batch["tokens"] + 1) % 64} for batch in given)
    steps = list(training_steps(task, spread, adamw, given, Start(seed=0, examples=digest(examples(odd)))))
    needed = demand(spread.model).of(steps[-1].load)
    operations = mesh.sum(torch.tensor([needed], dtype=torch.float64)).item()
    return [step.loss for step in steps], clip(mesh, spread.model.parameters(), math.inf), operations


def learn_alone(case):
    return learn(Mesh(), case.alone())


class Ranks:
    """Processes that meet once, as many as there are ranks."""

    def __init__(self, folder: Path, count):
        made = multiprocessing.get_context("forkserver")
        made.set_forkserver_preload(
            ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.pipelining", __name__]
        )
        self._ends, self._processes = [], []
        for rank in range(count):
            ours, theirs = made.Pipe()
            process = made.Process(target=_serve, args=(theirs, folder / "meeting", rank, count), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def learn(self, case, within=60):
        """Return what the ranks have learned, all of them the same, or raise what the first of them says is wrong."""
        for end in self._ends:
            end.send(case)
        said = []
        for end in self._ends:
            assert end.poll(within), f"{case} takes too long"
            said.append(end.recv())
        wrong = [words for words in said if isinstance(words, str)]
        assert not wrong, wrong[0]
        assert all(one == said[0] for one in said)
        return said[0]

    def close(self):
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(5)
            process.kill()


def _serve(end, meeting, rank, count):
    torch.set_num_threads(1)
    met = join(rank, count, meeting)
    while True:
        try:
            case = end.recv()
        except EOFError:
            return
        try:
            said = learn(met, case)
        except Exception:  # noqa: BLE001 - another process is to hear of it
            said = traceback.format_exc()
        end.send(said)
