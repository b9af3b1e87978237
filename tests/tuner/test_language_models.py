"""The paper's other half: language models of `transformers`, through `get_peft_model` and `add_adapter`."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)
from transformers import LlamaForCausalLM as Llama

from ether_diffusion import EtherConfig, EtherLayer

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": (lambda: Llama(LlamaConfig(intermediate_size=48, **SMALL)), {"q_proj", "v_proj"}, "logits"),
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(intermediate_size=48, **SMALL)),
        {"query", "value"},
        "logits",
    ),
    "deberta": (
        lambda: DebertaV2Model(DebertaV2Config(intermediate_size=48, **SMALL)),
        {"query_proj", "value_proj"},
        "last_hidden_state",
    ),
}
IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_a_language_model_trains_saves_loads_and_merges(name, method, tmp_path):
    build, targets, output = MODELS[name]
    torch.manual_seed(0)
    base = build().eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, EtherConfig(method=method, num_blocks=2)).eval()
    assert {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, EtherLayer)} == targets
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, goal = [], torch.randn_like(getattr(model(IDS), output))
    for _ in range(5):
        optimizer.zero_grad()
        loss = (getattr(model(IDS), output) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = type(base).from_pretrained(tmp_path / "base").eval()
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    with torch.no_grad():
        answer = getattr(model(IDS), output)
        torch.testing.assert_close(getattr(loaded(IDS), output), answer)
        torch.testing.assert_close(getattr(model.merge_and_unload()(IDS), output), answer, rtol=1e-4, atol=1e-5)


def test_transformers_own_adapter_methods_work(tmp_path):
    torch.manual_seed(0)
    model = MODELS["llama"][0]().eval()
    base = model(IDS).logits
    model.add_adapter(EtherConfig(init_weights=False), adapter_name="dog")
    adapted = model(IDS).logits
    assert not torch.allclose(adapted, base)
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert model.active_adapters() == ["dog"]
    other = MODELS["llama"][0]().eval()
    other.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "ether" not in k})
    other.load_adapter(str(tmp_path), adapter_name="dog")
    assert torch.equal(other(IDS).logits, adapted)
    other.delete_adapter("dog")
    assert torch.equal(other(IDS).logits, base)


def test_a_new_head_is_trained_and_saved_beside_the_adapter(tmp_path):
    torch.manual_seed(0)
    base = MODELS["bert"][0]().eval()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, EtherConfig(task_type="SEQ_CLS", init_weights=False)).eval()
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "ether_" not in n}
    assert trained == {f"base_model.model.classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(IDS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    fresh = MODELS["bert"][0]().eval()
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_an_adapted_model_writes_text():
    torch.manual_seed(0)
    model = get_peft_model(MODELS["llama"][0]().eval(), EtherConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text = model.generate(input_ids=IDS, **options)
    model.merge_adapter()
    assert text.shape == (2, 10) and torch.equal(model.generate(input_ids=IDS, **options), text)


def test_every_linear_layer_is_adapted_but_the_output_embedding():
    model = get_peft_model(MODELS["llama"][0](), EtherConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, EtherLayer)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = get_peft_model(MODELS["llama"][0](), EtherConfig(method="ether_plus", init_weights=False)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert gradients[0] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_layers_of_another_kind_are_named():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(TypeError, match="attn.c_attn: Conv1D cannot carry ETHER; only Linear and Conv2d can"):
        get_peft_model(model, EtherConfig())
