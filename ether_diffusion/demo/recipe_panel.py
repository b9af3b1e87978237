"""What fits a card: the command that trains a model on it, the memory by part, and why."""

from __future__ import annotations

import gradio as gr

from ether_diffusion.demo.markup import problem, status
from ether_diffusion.demo.panels import Update
from ether_diffusion.errors import InputError
from ether_diffusion.training.full_size import MODELS
from ether_diffusion.training.memory import format_bytes
from ether_diffusion.training.recipe import recipe

CARD, IMAGES = 8, 5


class RecipePanel:
    """Built where it is made: an accordion that asks for a model and a card."""

    def __init__(self) -> None:
        with gr.Accordion("A larger model on my own card", elem_id="recipe"):
            with gr.Row():
                self.model = gr.Dropdown(list(MODELS), value=next(iter(MODELS)), label="Model", min_width=120)
                self.vram = gr.Number(label="I have, in GB", value=CARD, minimum=1, min_width=120)
                self.images = gr.Number(label="Images", value=IMAGES, precision=0, minimum=1, min_width=120)
            self.ask = gr.Button("How do I train it?", size="sm", elem_id="ask-recipe")
            self.status = gr.HTML(visible=False, elem_id="recipe-status")
            self.command = gr.Code(language="shell", label="Command", visible=False, elem_id="recipe-command")
            self.why = gr.Dataframe(
                headers=["", ""], visible=False, wrap=True, interactive=False, label="Memory, and why"
            )
        outputs = [self.status, self.command, self.why]
        self.ask.click(
            self.answer,
            [self.model, self.vram, self.images],
            outputs,
            api_name="recipe",
            show_progress="hidden",
        )

    def answer(self, model: str, vram: float | None, images: int | None) -> Update:
        try:
            found = recipe(model=model, vram=float(vram or 0), images=int(images or 0))
        except InputError as error:
            hidden = gr.update(visible=False)
            text = str(error).replace("--vram", "Memory").replace("--images", "Images")
            return {self.status: gr.update(value=problem(text), visible=True), self.command: hidden, self.why: hidden}
        rows = [[part, format_bytes(size)] for part, size in {**found.parts, **found.moments}.items()]
        rows += [list(each) for each in found.reasons.items()]
        told = status("Estimated from the model's configuration.")
        return {
            self.status: gr.update(value=told, visible=True),
            self.command: gr.update(value=found.command, visible=True),
            self.why: gr.update(value=rows, visible=True),
        }
