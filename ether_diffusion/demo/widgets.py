"""What the tabs that generate have in common on the page."""

from __future__ import annotations

import gradio as gr

from ether_diffusion.demo.worker import Worker


def size_sliders(worker: Worker, width: int, height: int) -> list[gr.Slider]:
    """Width and height, within what fits the base."""
    return [
        gr.Slider(worker.side // 2, 2 * worker.side, value=value, step=worker.unit, label=label)
        for label, value in (("Width in pixels", width), ("Height in pixels", height))
    ]


def image_boxes(label: str, elem_id: str) -> tuple[gr.Image, gr.Gallery]:
    """The preview of the image that is being generated, and those that are done."""
    preview = gr.Image(
        label="Preview", height=200, interactive=False, buttons=[], format="png", elem_classes="ether-preview"
    )
    gallery = gr.Gallery(
        label=label,
        columns=2,
        format="png",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_id=elem_id,
    )
    return preview, gallery
