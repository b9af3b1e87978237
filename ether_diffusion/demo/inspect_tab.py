"""The tab that looks inside an adapter, gives it out in other formats, and takes in files of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ether_diffusion.analysis.report import describe
from ether_diffusion.demo.library import clean_name
from ether_diffusion.demo.markup import problem, status
from ether_diffusion.demo.panels import Update, connect_download
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.server import owner_of
from ether_diffusion.demo.verdict import by_block, verdict
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError, printable
from ether_diffusion.tuner.config import METHOD_NAMES

FORMATS = [("ETHER", "ether"), ("LoRA for diffusers", "diffusers-lora"), ("LoRA for kohya, ComfyUI, A1111", "kohya")]
LAYER_COLUMNS = ["Layer", "Side", "Width", "Angle", "Distance"]
START = status("Choose an adapter, or upload a file.")


class InspectTab:
    """Built where it is made, within a `gr.Tab`. `changed`: events after which other adapters are on offer."""

    def __init__(self, worker: Worker, results: Results):
        self.worker, self.results = worker, results
        names = self.names()
        with gr.Row(elem_classes="ether-tab"):
            with gr.Column(elem_classes="ether-controls"):
                self.adapter = gr.Dropdown(names, value=None, label="Adapter", elem_id="inspected")
                self.format = gr.Dropdown(FORMATS, value="ether", label="Format", elem_id="export-format")
                self.give_out = gr.Button("Export and download", variant="primary", elem_id="export")
                chosen = [self.adapter, self.format]
                self.status = gr.HTML(START, elem_id="inspect-status", elem_classes="ether-line", render=False)
                self.download = connect_download(self.give_out, self.export, chosen, [self.status], api_name="export")
                with gr.Column(visible=False, elem_id="own-adapter") as self.own:
                    self.new_name = gr.Textbox(label="Name of this adapter of yours", elem_id="new-name")
                    with gr.Row():
                        self.rename = gr.Button("Rename", size="sm", elem_id="rename")
                        self.delete = gr.Button("Delete", size="sm", variant="stop", elem_id="delete")
                with gr.Accordion("A file of your own", open=False, elem_id="own-file"):
                    self.uploaded = gr.File(label="Adapter (.safetensors)", elem_id="adapter-file")
                    self.file_name = gr.Textbox(label="Name", placeholder="my-dog", elem_id="file-name")
                    self.add = gr.Button("Add to the adapters", size="sm", elem_id="add-adapter")
            with gr.Column(elem_classes="ether-results"):
                self.status.render()
                with gr.Column(visible=False, elem_id="report") as self.report:
                    self.chart = gr.BarPlot(
                        x="block", color="side", tooltip="all", height=260, y="value", elem_id="angles"
                    )
                    self.facts = gr.Dataframe(
                        headers=["", "What the file says"],
                        wrap=True,
                        interactive=False,
                        column_widths=["25%", "75%"],
                        elem_id="facts",
                    )
                    with gr.Accordion("All layers", open=False):
                        self.layers = gr.Dataframe(headers=LAYER_COLUMNS, interactive=False, show_label=False)
        self._connect()

    def _connect(self) -> None:
        shown = [self.status, self.report, self.facts, self.chart, self.layers, self.own, self.new_name]
        hidden = {"show_progress": "hidden"}
        self.adapter.change(self.inspect, self.adapter, shown, api_name="inspect", **hidden)
        self.uploaded.change(self.check, self.uploaded, [*shown, self.file_name], api_name="check_file", **hidden)
        lists = [self.adapter, self.status]
        named = [self.adapter, self.new_name]
        self.changed = [
            self.add.click(self.take_in, [self.uploaded, self.file_name], lists, api_name="add_adapter", **hidden),
            self.rename.click(self.rename_own, named, lists, api_name="rename_adapter", **hidden),
            self.delete.click(self.delete_own, self.adapter, lists, api_name="delete_adapter", **hidden),
        ]

    def names(self) -> list[str]:
        return self.worker.library.names()

    def inspect(self, name: str | None, request: gr.Request) -> Update:
        if not name:
            return self._hide(START)
        try:
            adapter = self.worker.library.get(str(name))
            is_own = self.worker.library.belongs_to(adapter.name, owner_of(request))
            return {
                **self._show(f"{adapter.name} {self.worker.fit(adapter)}.", describe(adapter.path)),
                self.own: gr.update(visible=is_own),
                self.new_name: adapter.name,
            }
        except (ValueError, OSError) as error:
            return self._hide(problem(str(error)))

    def check(self, path: str | None) -> Update:
        """What a file of the user's own says."""
        if path is None:
            return self._hide(START)
        name = Path(path).name
        try:
            return {
                **self._show(f"{name} {self.worker.check_file(Path(path))}.", describe(path)),
                self.own: gr.update(visible=False),
                self.file_name: Path(path).stem,
            }
        except (ValueError, OSError) as error:
            return self._hide(problem(str(error).replace(str(path), name)))

    def export(self, name: str | None, to: str, request: gr.Request) -> Update:
        try:
            if not name:
                raise InputError("Export: choose an adapter first")
            adapter = self.worker.library.get(str(name))
            folder = self.results.folder(owner_of(request))
            if to == "ether":
                path = Path(shutil.copyfile(adapter.path, folder / f"{adapter.name}.safetensors"))
            else:
                path = self.worker.export(adapter.name, to, folder)
        except (ValueError, OSError) as error:
            return {self.status: problem(str(error)), self.download: None}
        told = f"{path.name}: {path.stat().st_size:,} bytes."
        return {self.status: status(told), self.download: str(path)}

    def take_in(self, path: str | None, name: str | None, request: gr.Request) -> Update:
        """Put an uploaded file among the adapters; it belongs to who sent it."""
        try:
            if path is None:
                raise InputError("Add: upload a file first")
            fit = self.worker.check_file(Path(path))
            if not fit.startswith("fits"):
                raise InputError(f"{Path(path).name} {fit}")
            taken = self.worker.library.add(clean_name(name or ""), Path(path), owner_of(request))
            self.worker.library.get(taken)
        except (ValueError, OSError) as error:
            return {self.status: problem(str(error).replace(str(path), Path(str(path)).name))}
        return self._listed(taken, f"{taken} is among the adapters now.")

    def rename_own(self, name: str | None, new: str | None, request: gr.Request) -> Update:
        try:
            renamed = self.worker.library.rename(str(name), new or "", owner_of(request))
        except (ValueError, OSError) as error:
            return {self.status: problem(str(error))}
        return self._listed(renamed, f"{name} is called {renamed} now.")

    def delete_own(self, name: str | None, request: gr.Request) -> Update:
        try:
            self.worker.library.delete(str(name), owner_of(request))
        except (ValueError, OSError) as error:
            return {self.status: problem(str(error))}
        return self._listed(None, f"{name} is deleted.")

    def _listed(self, chosen: str | None, told: str) -> Update:
        return {self.adapter: gr.update(choices=self.names(), value=chosen), self.status: status(told)}

    def _hide(self, message: str) -> Update:
        hidden = gr.update(visible=False)
        return {self.status: message, self.report: hidden, self.own: hidden}

    def _show(self, fit: str, report: dict[str, Any]) -> Update:
        return {
            self.status: status(f"{verdict(report)} {fit}"),
            self.report: gr.update(visible=True),
            self.facts: _facts(report),
            self.chart: _chart(report["layers"]),
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
        rows.append((each["component"] or "component", f"{text}, {each['parameters']:,} parameters"))
    for each in report["weights"]:
        rows.append((each["component"], f"{each['tensors']} weights, {each['parameters']:,} parameters"))
    return [[_shortened(name), _shortened(value)] for name, value in rows]


def _chart(layers: list[dict[str, Any]]) -> gr.BarPlot:
    """How far every block has turned; the layers in it are folded into one bar a side."""
    title, bars = by_block(layers)
    frame = pd.DataFrame(bars, columns=["block", "side", "value"])
    return gr.BarPlot(frame, y_title=title, x_title="Block", y_lim=[0, 90] if title.startswith("Degrees") else None)


def _row(layer: dict[str, Any]) -> list[Any]:
    place = f"{layer['component']}.{layer['path']}" if layer["component"] else layer["path"]
    angle = "–" if layer["angle"] is None else f"{layer['angle']['mean']:.1f}°"
    return [_shortened(place), layer["side"], layer["width"], angle, f"{layer['distance']:.3f}"]


def _shortened(text: str) -> str:
    return printable(str(text))[:300]
