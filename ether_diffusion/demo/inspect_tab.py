"""The tab that looks inside an adapter, and gives it out in other formats."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ether_diffusion.analysis.report import describe
from ether_diffusion.demo.markup import problem, status
from ether_diffusion.demo.panels import Update
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.server import owner_of
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import printable
from ether_diffusion.tuner.config import METHOD_NAMES

FORMATS = [("ETHER", "ether"), ("LoRA for diffusers", "diffusers-lora"), ("LoRA for kohya, ComfyUI, A1111", "kohya")]
MOST_BARS = 200
LAYER_COLUMNS = ["Layer", "Side", "Width", "Angle", "Distance"]
START = status("Choose an adapter, or upload a file.")


class InspectTab:
    """Built where it is made, within a `gr.Tab`."""

    def __init__(self, worker: Worker, results: Results):
        self.worker, self.results = worker, results
        names = self.names()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.adapter = gr.Dropdown(names, value=next(iter(names), None), label="Adapter")
                self.look = gr.Button("Inspect", variant="primary", elem_id="inspect")
                self.format = gr.Radio(FORMATS, value="ether", label="Format")
                self.prepare = gr.Button("Prepare the file", elem_id="export")
                self.download = gr.File(label="Download", interactive=False)
                self.uploaded = gr.File(label="Or inspect a file of your own (.safetensors)", elem_id="adapter-file")
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(START, elem_id="inspect-status")
                with gr.Column(visible=False, elem_id="report") as self.report:
                    self.facts = gr.Dataframe(
                        headers=["", "What the file says"], wrap=True, column_widths=["25%", "75%"]
                    )
                    self.chart = gr.BarPlot(x="layer", x_axis_labels_visible=False, tooltip="all", height=260)
                    with gr.Accordion("All layers", open=False):
                        self.layers = gr.Dataframe(headers=LAYER_COLUMNS, interactive=False, show_label=False)
        self._connect()

    def _connect(self) -> None:
        outputs = [self.status, self.report, self.facts, self.chart, self.layers]
        hidden = {"show_progress": "hidden"}
        self.look.click(self.inspect, self.adapter, outputs, api_name="inspect", **hidden)
        self.uploaded.change(self.check, self.uploaded, outputs, api_name="check_file", **hidden)
        chosen = [self.adapter, self.format]
        self.prepare.click(self.export, chosen, [self.status, self.download], api_name="export", **hidden)

    def names(self) -> list[str]:
        return self.worker.library.names()

    def inspect(self, name: str | None) -> Update:
        try:
            adapter = self.worker.library.get(str(name))
            return self._show(f"{adapter.name}: {self.worker.fit(adapter)}.", describe(adapter.path))
        except (ValueError, OSError) as error:
            return self._hide(problem(str(error)))

    def check(self, path: str | None) -> Update:
        if path is None:
            return self._hide(START)
        try:
            return self._show(f"{Path(path).name}: {self.worker.check_file(Path(path))}.", describe(path))
        except (ValueError, OSError) as error:
            return self._hide(problem(str(error).replace(str(path), Path(path).name)))

    def export(self, name: str | None, to: str, request: gr.Request) -> Update:
        try:
            adapter = self.worker.library.get(str(name))
            folder = self.results.folder(owner_of(request))
            if to == "ether":
                path = Path(shutil.copy(adapter.path, folder / f"{adapter.name}.safetensors"))
            else:
                path = self.worker.export(adapter.name, to, folder)
            return {self.status: status(f"{path.name}: {path.stat().st_size:,} bytes."), self.download: str(path)}
        except (ValueError, OSError) as error:
            return {self.status: problem(str(error)), self.download: None}

    def _hide(self, message: str) -> Update:
        return {self.status: message, self.report: gr.update(visible=False)}

    def _show(self, fit: str, report: dict[str, Any]) -> Update:
        return {
            self.status: status(fit),
            self.report: gr.update(visible=True),
            self.facts: _facts(report),
            self.chart: _chart(report["layers"][:MOST_BARS]),
            self.layers: [_row(layer) for layer in report["layers"]],
        }


def _facts(report: dict[str, Any]) -> list[list[str]]:
    versions = (report["versions"] or {}).items()
    rows = [
        ("Prompt", report["prompt"] or "–"),
        ("Base model", report["base_model"] or "–"),
        ("Parameters", f"{report['parameters']:,}"),
        ("File", f"{report['file_bytes']:,} bytes"),
        ("Written by", ", ".join(f"{name} {number}" for name, number in versions) or "–"),
    ]
    for each in report["components"]:
        method = METHOD_NAMES[each["method"]]
        text = f"{method}, sides {each['sides']}, {each['num_blocks']} blocks, {each['layers']} layers"
        rows.append((each["component"] or "component", text))
    return [[_shortened(name), _shortened(value)] for name, value in rows]


def _chart(layers: list[dict[str, Any]]) -> gr.BarPlot:
    """How far every side of every layer has turned; plain ETHER does not tell, so its distance is shown."""
    turned = [layer for layer in layers if layer["angle"]]
    if turned:
        heights, title, top = [layer["angle"]["mean"] for layer in turned], "Degrees turned since the start", 90
    else:
        heights, title, top = [layer["distance"] for layer in layers], "Distance from the identity", None
    bars = pd.DataFrame(
        {
            "layer": [_short_name(layer) for layer in turned or layers],
            title: heights,
            "side": [layer["side"] for layer in turned or layers],
        }
    )
    return gr.BarPlot(bars, y=title, y_lim=[0, top], color="side")


def _row(layer: dict[str, Any]) -> list[Any]:
    place = f"{layer['component']}.{layer['path']}" if layer["component"] else layer["path"]
    angle = "–" if layer["angle"] is None else f"{layer['angle']['mean']:.1f}°"
    return [_shortened(place), layer["side"], layer["width"], angle, f"{layer['distance']:.3f}"]


def _short_name(layer: dict[str, Any]) -> str:
    """What most names have in common is left out."""
    name = f"{layer['path']} {layer['side']}".replace(".transformer_blocks", "").replace(".attentions", "")
    return name if len(name) <= 52 else f"…{name[-51:]}"


def _shortened(text: str) -> str:
    return printable(str(text))[:300]
