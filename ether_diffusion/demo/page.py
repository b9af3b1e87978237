"""The page: its tabs, and how they learn of new adapters."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from ether_diffusion.base_models import miniature_name
from ether_diffusion.demo.board import Board
from ether_diffusion.demo.control_tab import ControlTab
from ether_diffusion.demo.generate_tab import GenerateTab
from ether_diffusion.demo.inspect_tab import InspectTab
from ether_diffusion.demo.panels import Update
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.train_tab import OPEN_GENERATE, TrainTab
from ether_diffusion.demo.training import Trainer
from ether_diffusion.demo.worker import Worker

CACHE_SECONDS = 24 * 3600
TABS = ("Generate", "Train", "Inspect and export", "Control")
ADDRESS = "() => [new URLSearchParams(location.search).get('job') || '']"
"""Of the job that a link asks for."""


def build_page(worker: Worker, trainer: Trainer, results: Results, board: Board) -> gr.Blocks:
    """The page of a worker; `server.launch` serves it."""
    cache = (600, CACHE_SECONDS)
    with gr.Blocks(title="ETHER diffusion", analytics_enabled=False, delete_cache=cache, fill_width=True) as page:
        with gr.Row(elem_classes="ether-head"):
            gr.Markdown(f"# ETHER diffusion\nBase model: {_describe_base(worker)}")
            toggle = gr.Button("Light / dark", size="sm", min_width=110, scale=0, elem_id="theme")
        toggle.click(None, js="() => window.etherToggleTheme()", api_name=False)
        asked, used_name = gr.Textbox(visible=False), gr.State("")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(TABS[0], render_children=True):
                generate = GenerateTab(board, worker, results)
            with gr.Tab(TABS[1], render_children=True):
                train = TrainTab(board, trainer, results)
            with gr.Tab(TABS[2], render_children=True):
                inspect = InspectTab(worker, results)
            with gr.Tab(TABS[3], render_children=True):
                control = ControlTab(board, worker, results)

        quiet = {"api_name": False, "show_progress": "hidden"}

        def refresh(text: str) -> Update:
            return {
                **generate.picker.refresh(text),
                inspect.adapter: gr.update(choices=inspect.names()),
                control.adapter: gr.update(choices=worker.usable(control=True)),
            }

        lists = [*generate.picker.refreshed, inspect.adapter, control.adapter]
        page.load(refresh, generate.picker.search, lists, api_name="refresh", show_progress="hidden")
        for event in (train.trained, *inspect.changed):
            event.then(refresh, generate.picker.search, lists, **quiet)
        used = train.use.click(train.used, train.name_trained, [used_name, generate.prompt], **quiet)
        used.then(generate.picker.fill, used_name, generate.picker.names, **quiet).then(
            None, None, None, js=OPEN_GENERATE, api_name=False
        )
        page.load(generate.history.refresh, None, generate.history.shown, **quiet)
        for panel in (generate.panel, train.panel, control.panel):
            page.load(panel.resume, asked, panel.resumed, js=ADDRESS, concurrency_limit=None, **quiet)
            panel.address.change(None, panel.address, None, js="(job) => window.etherAddress(job)", **quiet)
    return page


def _describe_base(worker: Worker) -> str:
    if shipped := miniature_name(worker.base):
        return f"the {shipped}, a toy that comes with the package and generates 64×64 pixels."
    return f"`{Path(worker.base).name}`, {worker.side} pixels a side."
