"""Fine-tuning of a causal language model from a folder: what travels, what is verified, what is refused."""

import json

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch

from atoll.data.pretrained import inspected
from atoll.errors import AtollError, Corrupt, TaskFailed, Unavailable
from atoll.inner.learner import make_learner
from atoll.inner.made import make_examples, make_model
from atoll.inner.mesh import Mesh
from atoll.inner.task import load_task
from atoll.outer.metrics import merge_totals, totals
from atoll.spec.order import TaskName
from atoll.spec.task import Rows
from atoll.tasks import CausalLM
from tests.unit.folders import NEEDED, TEXT, save

pytestmark = NEEDED
BLOCK = 16
SHORT = {"block": BLOCK, "new": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def files(folder):
    return inspected("tiny", folder)


@pytest.fixture(scope="module")
def task(files):
    return CausalLM(files, lora={"rank": 2}, **SHORT)


def rows(*texts, asked=False):
    return Rows(pa.table({"text": pa.array(texts, pa.string())}), asked=asked)


def batch(task, seed=0):
    made = make_examples(task, rows(TEXT, TEXT[40:]), seed)
    return {name: torch.as_tensor(array) for name, array in made.items()}


# --- what travels


def test_only_the_adapter_is_of_the_models_state_and_it_begins_as_the_model_of_the_folder(task, files):
    learner = make_learner(task, 0, Mesh())
    names = [spec.name for spec in learner.signature]
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    whole = make_learner(CausalLM(files, full=True, **SHORT), 0, Mesh())
    size, least = (sum(spec.size for spec in one.signature) for one in (whole, learner))
    stored = safetensors.torch.load(files.read("model.safetensors"))
    assert size == sum(tensor.numel() for tensor in stored.values())
    assert least < size / 4
    examples = make_examples(task, rows(TEXT), 0)
    found, known = learner.evaluate(examples)["loss"], whole.evaluate(examples)["loss"]
    assert found.total == pytest.approx(known.total, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_trains_the_adapter_and_leaves_the_frozen_tensors_as_they_are(tmp_path, kind):
    task = CausalLM(inspected("tiny", save(tmp_path / kind, kind)), **SHORT)
    model = make_model(task, 0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(2):  # the first moves what an adapter adds from zero, the second all of it
        optimiser.zero_grad()
        task.loss(model, batch(task)).backward()
        optimiser.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(model.state_dict())


def test_neither_a_checkpoint_nor_what_stays_at_rest_holds_the_frozen_tensors(task):
    from atoll.inner.checkpoint import state_of
    from atoll.inner.vector import at_rest

    model = make_model(task, 0)
    kept = state_of(model, None, {})
    assert {name.removeprefix("model.") for name in kept} >= set(model.state_dict())
    assert not any("base_layer" in name or "embed" in name for name in (*kept, *at_rest(model)))


def test_dropout_is_drawn_by_the_seed_of_the_step(files):
    from atoll.inner import chance

    task = CausalLM(files, lora={"dropout": 0.5}, **SHORT)
    model = make_model(task, 0).train()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    made, losses = batch(task), []
    for step in (3, 3, 4):
        chance.seed_step(0, step, 0)
        losses.append(task.loss(model, made).item())
    assert losses[0] == losses[1] != losses[2]


def test_the_options_of_the_adapter_are_followed(files):
    task = CausalLM(files, lora={"rank": 3, "alpha": 6, "targets": ["q_proj"]}, **SHORT)
    state = make_model(task, 0).state_dict()
    assert {tuple(value.shape) for name, value in state.items() if ".lora_A." in name} == {(3, 32)}
    assert all(".q_proj." in name for name in state)


# --- text to tokens and back


def test_texts_are_joined_with_their_ends_and_cut_into_blocks(task):
    made = task.examples(rows("ab", None, "", "c" * 20))["tokens"]
    assert made.shape == (2, BLOCK)
    flat = made.reshape(-1).tolist()
    assert flat[2] == flat[23] == 256
    assert set(flat[24:]) == {-1}
    assert len({*flat[3:23]}) == 1


def test_a_token_alone_in_the_last_block_is_left_out(task):
    assert len(task.examples(rows("c" * BLOCK))["tokens"]) == 1


def test_the_loss_is_that_of_transformers_and_blanks_do_not_count(task):
    model = make_model(task, 0).eval()
    whole = torch.as_tensor(task.examples(rows("a" * 9 + "b" * 6))["tokens"])
    assert (whole >= 0).all()
    known = model(input_ids=whole.long(), labels=whole.long()).loss
    assert task.loss(model, {"tokens": whole}).item() == pytest.approx(known.item(), rel=1e-6)
    longer = torch.nn.functional.pad(whole, (0, 5), value=-1)
    assert task.loss(model, {"tokens": longer}).item() == pytest.approx(known.item(), rel=1e-6)


def test_metrics_are_the_loss_a_token_and_the_perplexity_over_all_sites(task):
    learner = make_learner(task, 0, Mesh())
    sites = [learner.evaluate(make_examples(task, rows(text), 0)) for text in (TEXT, "other words")]
    merged = merge_totals([totals(site) for site in sites])
    summed, count = (sum(getattr(site["loss"], name) for site in sites) for name in ("total", "count"))
    assert count == sum(len(text) + 1 - -(-(len(text) + 1) // BLOCK) for text in (TEXT, "other words"))
    assert merged["loss"] == pytest.approx(summed / count)
    assert merged["perplexity"] == pytest.approx(np.exp(summed / count))


def test_it_is_asked_a_prompt_a_row_and_completes_each_as_it_would_alone(task):
    learner = make_learner(task, 0, Mesh())
    texts = ["the quick", "", "x" * 100, "pack my box"]
    examples = make_examples(task, rows(*texts, asked=True), 0)
    assert examples["tokens"].shape == (4, BLOCK)
    told = learner.predict(examples)["completion"].tolist()
    assert [learner.predict(make_examples(task, rows(text, asked=True), 0))["completion"][0] for text in texts] == told
    assert all(isinstance(text, str) for text in told)
    assert any(told)


# --- what is verified and refused


def test_what_changed_after_it_was_listed_is_not_loaded(tmp_path):
    task = CausalLM(inspected("tiny", save(tmp_path)), **SHORT)
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Corrupt, match=r"pretrained: model\.safetensors has changed since the folder was listed"):
        task.model()
    weights.unlink()
    with pytest.raises(Unavailable, match=r"model\.safetensors cannot be read"):
        task.model()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "vit"}, "config.json says model_type 'vit', of which transformers"),
        ({"model_type": "nothing"}, "config.json says model_type 'nothing', of which transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "config.json says quantization_config"),
        ({"num_hidden_layers": 3}, "tensors are not there as config.json wants them: model.layers.2."),
        ({"hidden_size": 64}, "tensors are not there as config.json wants them: lm_head.weight"),
    ],
)
def test_a_folder_whose_files_do_not_belong_together_is_told(tmp_path, change, words):
    config = json.loads((save(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(TaskFailed) as caught:
        CausalLM(inspected("wrong", tmp_path), **SHORT).model()
    assert words in str(caught.value)


def test_code_that_config_json_names_is_not_run(tmp_path):
    config = json.loads((save(tmp_path) / "config.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    more = {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **more, "_attn_implementation": "someone/kernels"}))
    assert type(CausalLM(inspected("evil", tmp_path), **SHORT).model()).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"lora": {"rang": 4}}, "task.params.lora: rang: unknown field; did you mean 'rank'"),
        ({"lora": {"dropout": 1}}, "task.params.lora: dropout"),
        ({"lora": {"targets": ["qq"]}}, "lora.targets: ['qq'] fits no layer; there is down_proj, gate_proj"),
        ({"lora": {}, "full": True}, "lora and full: true exclude each other"),
        ({"block": 61}, "block 61 and new 4 are more than the 64 places that the model knows; set block to 60"),
        ({"block": 1}, "task.params: block"),
        ({"column": "txt"}, "task.params.column: the dataset has no 'txt'; did you mean 'text'"),
    ],
)
def test_wrong_options_are_told(files, params, words):
    def all_of_it():
        task = CausalLM(files, **{**SHORT, **params})
        task.examples(rows(TEXT))
        task.model()

    with pytest.raises(AtollError) as caught:
        all_of_it()
    assert words in str(caught.value)


def test_of_a_mixture_experts_are_adapted_too_but_none_is_dropped(tmp_path):
    files = inspected("mixture", save(tmp_path, "mixtral"))
    state = make_model(CausalLM(files, lora={"rank": 2}, **SHORT), 0).state_dict()
    assert any(".experts." in name and ".lora_A." in name for name in state)
    with pytest.raises(TaskFailed, match=r"dropout: 0\.1: the targets take in experts, .*; set it to 0, or targets"):
        CausalLM(files, lora={"dropout": 0.1}, **SHORT).model()
    attention = {"dropout": 0.1, "targets": ["q_proj"]}
    assert all(".q_proj." in name for name in make_model(CausalLM(files, lora=attention, **SHORT), 0).state_dict())


def test_texts_that_are_all_empty_are_told(task):
    with pytest.raises(TaskFailed, match="'text' holds no text"):
        task.examples(rows("", None))


def test_the_class_is_named_in_a_file_beside_the_job_and_needs_a_folder(tmp_path, files):
    (tmp_path / "task.py").write_text("from atoll.tasks import CausalLM\n")
    name = TaskName(file="task.py", name="CausalLM", params=SHORT)
    named = name.model_copy(update={"pretrained": files.digest})
    assert isinstance(load_task(tmp_path, named, "train", "evaluate", "predict", pretrained=files), CausalLM)
    with pytest.raises(TaskFailed, match=r"task\.pretrained: CausalLM needs a folder's digest"):
        load_task(tmp_path, name)
    (tmp_path / "task.py").write_text("class CausalLM: pass\n")
    plain = named.model_copy(update={"params": {}})
    with pytest.raises(TaskFailed, match=r"task\.pretrained: CausalLM has no such argument"):
        load_task(tmp_path, plain, pretrained=files)
