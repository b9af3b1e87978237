"""The paper's other half: language models of `transformers`, through `get_peft_model` and `add_adapter`."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config, DebertaV2Model, LlamaConfig
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
