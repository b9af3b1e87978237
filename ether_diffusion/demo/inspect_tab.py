"""The tab that looks inside an adapter, and gives it out in other formats."""

from __future__ import annotations

import shutil
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ether_diffusion.analysis.report import METHODS, describe
from ether_diffusion.demo.charts import bar_chart
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.words import problem, status
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError, printable

FORMATS = [("ETHER", "ether"), ("LoRA for diffusers", "diffusers-lora"), ("LoRA for kohya, ComfyUI, A1111", "kohya")]
MOST_BARS = 200


def inspect_tab(worker: Worker, results: Results) -> gr.Dropdown:
    """Build the tab; its list of adapters."""
    names = [each.name for each in worker.library.adapters() if not each.problem]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            chosen = gr.Dropdown(names, value=names[0] if names else None, label="Adapter")
            look = gr.Button("Inspect", variant="primary", elem_id="inspect")
            form = gr.Radio(FORMATS, value="ether", label="Format")
            take = gr.Button("Prepare the file", elem_id="export")
            taken = gr.File(label="Download", interactive=False)
            uploaded = gr.File(label="Or inspect a file of your own (.safetensors)", elem_id="adapter-file")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(status("Choose an adapter, or upload a file."), elem_id="inspect-status")
            report = gr.HTML(elem_id="report")

    def inspect(name: str | None) -> tuple[str, str]:
        try:
            adapter = worker.library.get(str(name))
            return status(f"{adapter.name}: {worker.fit(adapter)}."), _report(describe(adapter.path))
        except (ValueError, OSError) as error:
            return problem(str(error)), ""

    def check(path: str | None) -> tuple[str, str]:
        if path is None:
            return status("Choose an adapter, or upload a file."), ""
        try:
            return status(f"{Path(path).name}: {worker.check_file(Path(path))}."), _report(describe(path))
        except (ValueError, OSError) as error:
            return problem(str(error).replace(str(path), Path(path).name)), ""

    def export(name: str | None, to: str, request: gr.Request) -> tuple[str, str | None]:
        try:
            adapter, folder = worker.library.get(str(name)), results.folder(str(request.session_hash))
            if to == "ether":
                path = Path(shutil.copy(adapter.path, folder / f"{adapter.name}.safetensors"))
            else:
                path = worker.export(adapter.name, to, folder)
            return status(f"{path.name}: {path.stat().st_size:,} bytes."), str(path)
        except (InputError, ValueError, OSError) as error:
            return problem(str(error)), None

    look.click(inspect, chosen, [said, report], api_name="inspect", show_progress="hidden")
    uploaded.change(check, uploaded, [said, report], api_name="check_file", show_progress="hidden")
    take.click(export, [chosen, form], [said, taken], api_name="export", show_progress="hidden")
    return chosen


def _report(facts: dict[str, Any]) -> str:
    """What `ether-diffusion inspect` says: a table of facts, a chart of angles, a table of layers."""
    rows = {
        "Prompt": facts["prompt"] or "–",
        "Base model": facts["base_model"] or "–",
        "Parameters": f"{facts['parameters']:,}",
        "File": f"{facts['file_bytes']:,} bytes",
        "Written by": ", ".join(f"{name} {number}" for name, number in (facts["versions"] or {}).items()) or "–",
    }
    for each in facts["components"]:
        rows[each["component"] or "component"] = (
            f"{METHODS[each['method']]}, sides {each['sides']}, {each['num_blocks']} blocks, {each['layers']} layers"
        )
    table = "".join(
        f"<tr><th scope='row'>{_safe(name)}</th><td>{_safe(value)}</td></tr>" for name, value in rows.items()
    )
    layers = facts["layers"]
    turned = [(_bar(row), row["angle"]["mean"]) for row in layers if row["angle"]]
    moved = [(_bar(row), row["distance"]) for row in layers]
    chart = (
        bar_chart(turned[:MOST_BARS], "Degrees turned since the start, by layer and side", unit="°", top=90.0)
        if turned
        else bar_chart(moved[:MOST_BARS], "Distance from the identity (ETHER does not tell its angle)")
    )
    cells = "".join(
        f"<tr><td>{_safe(_place(row))}</td><td>{row['side']}</td><td>{row['width']}</td>"
        f"<td>{'–' if row['angle'] is None else format(row['angle']['mean'], '.1f') + '°'}</td>"
        f"<td>{row['distance']:.3f}</td></tr>"
        for row in layers
    )
    heads = "".join(f"<th scope='col'>{each}</th>" for each in ("Layer", "Side", "Width", "Angle", "Distance"))
    return (
        f"<div class='ether-scroll'><table>{table}</table></div>{chart}<details><summary>All layers</summary><div "
        f"class='ether-scroll'><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div></details>"
    )


def _bar(row: dict[str, Any]) -> str:
    """A short name for a side of a layer: what most names have in common is left out."""
    return f"{row['path']} {row['side']}".replace(".transformer_blocks", "").replace(".attentions", "")


def _place(row: dict[str, Any]) -> str:
    return f"{row['component']}.{row['path']}" if row["component"] else row["path"]


def _safe(text: str) -> str:
    return escape(printable(str(text))[:300])
