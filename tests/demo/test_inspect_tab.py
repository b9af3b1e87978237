"""Looking inside an adapter, giving it out, and files of one's own."""

import shutil
import stat
from pathlib import Path

import gradio_client
import pytest
from helpers.demo import ask

from ether_diffusion.analysis.report import describe
from ether_diffusion.commands.demo import SHIPPED
from ether_diffusion.demo.verdict import by_block, verdict

TOY = SHIPPED / "toy-1" / "pytorch_ether_weights.safetensors"


def layer(angle: float | None, path: str = "down_blocks.0.attentions.0.to_k", side: str = "input") -> dict:
    turned = None if angle is None else {"mean": angle, "max": angle}
    return {"component": "unet", "path": path, "side": side, "angle": turned, "distance": 2.0}


@pytest.mark.parametrize(
    ("angles", "words"),
    [
        ([3, 12], "Moved slightly: 3° to 12°"),
        ([22, 58], "Moved moderately: 22° to 58°; other prompts are safe at strength 1."),
        ([10, 80], "Moved far: 10° to 80°"),
        ([None], "Plain ETHER"),
        ([], "Holds no reflections"),
    ],
)
def test_the_verdict_says_how_far_it_moved(angles, words):
    assert verdict({"layers": [layer(angle) for angle in angles]}).startswith(words)


def test_layers_are_folded_into_their_blocks():
    paths = ["down_blocks.0.a.to_k", "down_blocks.0.b.to_k", "mid_block.a", "transformer_blocks.12.attn.to_q"]
    layers = [layer(angle, path) for angle, path in zip((10, 20, 30, 40), paths, strict=True)]
    title, bars = by_block([*layers, layer(60, paths[0], "output")])
    assert title == "Degrees turned"
    assert bars == [
        ("unet down 0", "input", 15), ("unet middle", "input", 30), ("unet 12", "input", 40),
        ("unet down 0", "output", 60),
    ]  # fmt: skip
    assert by_block([layer(None)])[0] == "Distance from the identity"


def test_a_report_comes_on_choosing_and_counts_a_control_encoder(client):
    said, *report = client.predict("toy-1", api_name="/inspect")
    assert "Moved moderately: " in said and "fits" in said
    said, *report = client.predict("scene-map", api_name="/inspect")
    weights = describe(SHIPPED / "scene-map")["weights"]
    assert "control_encoder" in str(report) and f"{weights[0]['parameters']:,} parameters" in str(report)


@pytest.mark.parametrize("to", ["diffusers-lora", "kohya"])
def test_a_control_adapter_is_not_written_without_its_encoder(client, to):
    said, file = client.predict("scene-map", to, api_name="/export")
    assert "scene-map: holds a control encoder, which a LoRA has no place for" in said and file is None
    said, file = client.predict("scene-map", "ether", api_name="/export")
    assert describe(file)["weights"]


def test_a_file_that_was_given_out_is_readable_by_all(server, client):
    client.predict("toy-1", "diffusers-lora", api_name="/export")
    for path in server.results.root.glob("*/*/toy-1*.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


def test_a_file_of_ones_own_is_used_renamed_and_deleted_by_its_owner_alone(server, client, tmp_path):
    shutil.copy(TOY, tmp_path / "mine.safetensors")
    sent = gradio_client.handle_file(tmp_path / "mine.safetensors")
    chosen, said = client.predict(sent, "mi juguete", api_name="/add_adapter")
    assert chosen["value"] == "mi juguete" and "is among the adapters now" in said
    client.predict("", api_name="/refresh")
    assert "Done" in ask(client, ("mi juguete", 1.0)).result()[0]
    stranger = gradio_client.Client(server.local_url, verbose=False, analytics_enabled=False)
    stranger.predict("", api_name="/refresh")
    _, said = stranger.predict("mi juguete", api_name="/delete_adapter")
    assert "is not yours to change" in said
    chosen, said = client.predict("mi juguete", "otro", api_name="/rename_adapter")
    assert chosen["value"] == "otro"
    with pytest.raises(Exception, match="there is no adapter"):  # this page still has the old list
        ask(client, ("mi juguete", 1.0)).result()
    client.predict("", api_name="/refresh")
    assert "Done" in ask(client, ("otro", 1.0)).result()[0]
    _, said = client.predict("otro", api_name="/delete_adapter")
    assert "is deleted" in said and "otro" not in server.worker.library.names()
    _, said = client.predict("toy-1", api_name="/delete_adapter")
    assert "is not yours to change" in said and "toy-1" in server.worker.library.names()


def test_a_file_that_does_not_fit_is_not_taken_in(server, client, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04pickle")
    sent = gradio_client.handle_file(tmp_path / "bad.safetensors")
    before = server.worker.library.names()
    _, said = client.predict(sent, "bad", api_name="/add_adapter")
    assert "holds a pickle" in said and str(tmp_path) not in said
    _, said = client.predict(gradio_client.handle_file(TOY), "a/b", api_name="/add_adapter")
    assert "which has /" in said
    assert server.worker.library.names() == before and Path(TOY).is_file()
