"""The page: its tabs, and how they learn of new adapters."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from ether_diffusion.base_models import miniature_name
from ether_diffusion.demo.control_tab import ControlTab
from ether_diffusion.demo.generate_tab import GenerateTab
from ether_diffusion.demo.inspect_tab import InspectTab
from ether_diffusion.demo.panels import Update
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.train_tab import TrainTab
from ether_diffusion.demo.training import Trainer
from ether_diffusion.demo.worker import Worker

CACHE_SECONDS = 24 * 3600
TOGGLE_DARK = "() => { document.body.classList.toggle('dark') }"


def build_page(worker: Worker, trainer: Trainer, results: Results) -> gr.Blocks:
    """The page of a worker; `server.launch` serves it."""
    with gr.Blocks(title="ETHER diffusion", analytics_enabled=False, delete_cache=(600, CACHE_SECONDS)) as page:
        with gr.Row():
            gr.Markdown(f"# ETHER diffusion\nBase model: {_describe_base(worker)}")
            toggle = gr.Button("Light / dark", size="sm", min_width=110, scale=0)
        toggle.click(None, js=TOGGLE_DARK, api_name=False)
        with gr.Tab("Generate"):
            generate = GenerateTab(worker, results)
        with gr.Tab("Train"):
            train = TrainTab(trainer, results)
        with gr.Tab("Inspect and export"):
            inspect = InspectTab(worker, results)
        with gr.Tab("Control"):
            control = ControlTab(worker, results)

        def refresh() -> Update:
            return {
                generate.adapters: gr.update(choices=worker.usable()),
                generate.listing: generate.list_adapters(),
                inspect.adapter: gr.update(choices=inspect.names()),
                control.adapter: gr.update(choices=worker.usable(control=True)),
            }

        lists = [generate.adapters, generate.listing, inspect.adapter, control.adapter]
        page.load(refresh, None, lists, api_name="refresh", show_progress="hidden")
        train.trained.then(refresh, None, lists, api_name=False, show_progress="hidden")

        def leave(request: gr.Request) -> None:
            results.forget(str(request.session_hash))

        page.unload(leave)
    return page


def _describe_base(worker: Worker) -> str:
    if shipped := miniature_name(worker.base):
        return f"the {shipped}, a toy that comes with the package and generates 64×64 pixels."
    return f"`{Path(worker.base).name}`, {worker.side} pixels a side."
