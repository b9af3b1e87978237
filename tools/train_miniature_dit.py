"""Train the second miniature's transformer from nothing, on images drawn here.

    python tools/train_miniature_dit.py --work_dir work --output_dir ether_diffusion/miniature/weights_dit

Autoencoder and text encoders are those of the first miniature, frozen. Stages: images, latents, prompts (both encoded
once), transformer, export. Each goes on where it was stopped when the command is given again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from miniature_dit_models import LAYERS, PROMPT_LENGTH, T5_LENGTH, WIDTH, assemble
from miniature_export import write_pipeline
from miniature_training import Images, Stage, log
from safetensors.torch import load_file
from torch import Tensor, nn

from ether_diffusion.miniature import FOLDER
from ether_diffusion.miniature.shapes import LABELS
from ether_diffusion.miniature.world import draw_scene


class WeightedAttention:
    """Diffusers' joint attention where the last text token stands for `count` equal ones.

    Without T5, the pipeline gives the transformer rows of zeros after those of the prompt. They begin equal, have no
    positions, and so stay equal: one of them, whose key counts `count` times, gives the same answers.
    """

    def __init__(self, count: int):
        self.bias = math.log(count)

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None):
        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        text = encoder_hidden_states
        query = [heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)]
        key = [heads(attn.to_k(hidden_states), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)]
        value = [heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(text))]
        query, key, value = (torch.cat(each, dim=2) for each in (query, key, value))
        bias = torch.zeros(1, 1, 1, key.shape[2], dtype=query.dtype)
        bias[..., -1] = self.bias
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.device))
        mixed = mixed.transpose(1, 2).flatten(2)
        image, text = mixed.split([hidden_states.shape[1], text.shape[1]], dim=1)
        image = attn.to_out[0](image)
        return image, text if attn.context_pre_only else attn.to_add_out(text)


@torch.no_grad()
def encode_images(args: argparse.Namespace, pipe: StableDiffusion3Pipeline, images: Images) -> Tensor:
    """Latent means of all images, and the autoencoder's shift and scale set to theirs."""
    path = args.work_dir / "latents.pt"
    if not path.exists():
        log("encoding the images")
        parts = []
        for indices in torch.arange(len(images.captions)).split(256):
            parts.append(pipe.vae.encode(images.batch(indices).to(args.device)).latent_dist.mean.half().cpu())
        torch.save(torch.cat(parts), path)
    latents = torch.load(path, weights_only=True)
    some = latents[:4096].float()
    shift, scale = round(some.mean().item(), 4), round(1 / some.std().item(), 4)
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (latents.float() - shift).mul(scale).half()


@torch.no_grad()
def encode_prompts(args: argparse.Namespace, pipe: StableDiffusion3Pipeline, captions: list[str]) -> tuple:
    """What the pipeline tells its transformer of each caption: states, without T5's zeros, and pooled text."""
    states_path, pooled_path = args.work_dir / "states.npy", args.work_dir / "pooled.npy"
    if not pooled_path.exists():
        log("encoding the prompts")
        width = pipe.transformer.config.joint_attention_dim
        states = np.lib.format.open_memmap(states_path, "w+", np.float16, (len(captions), PROMPT_LENGTH, width))
        pooled = []
        for start in range(0, len(captions), 256):
            of_text, _, of_all, _ = pipe.encode_prompt(
                captions[start : start + 256], None, None, do_classifier_free_guidance=False
            )
            states[start : start + 256] = of_text[:, :PROMPT_LENGTH].half().cpu().numpy()
            pooled.append(of_all.half().cpu().numpy())
        states.flush()
        np.save(pooled_path, np.concatenate(pooled))
    return np.load(states_path, mmap_mode="r"), np.load(pooled_path)


def read_maps(args: argparse.Namespace) -> Tensor:
    """The semantic map of every training image at the size of the latents, (n, 16, 16), indices into LABELS."""
    path = args.work_dir / "maps.npy"
    if not path.exists():
        log("drawing the maps")
        scenes = (draw_scene(args.seed, index) for index in range(args.images))
        np.save(path, np.stack([np.asarray(scene.render().labels)[2::4, 2::4] for scene in scenes]))
    return torch.from_numpy(np.load(path))


class Segmenter(nn.Module):
    """Names what is at each latent, from what a block in the middle of the transformer has made of the tokens.

    For training alone: what the image shows is learned sooner where a layer is asked for it (REPA, arXiv:2410.06940,
    asks for the features of an image encoder; the world's maps are at hand).
    """

    def __init__(self, transformer: SD3Transformer2DModel, block: int):
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * len(LABELS)))
        transformer.transformer_blocks[block].register_forward_hook(self._keep)

    def _keep(self, _block: nn.Module, _inputs: tuple, outputs: tuple) -> None:
        self._tokens = outputs[1]  # (b, 64, WIDTH)

    def loss(self, maps: Tensor) -> Tensor:
        """Mean cross-entropy of each sample, (b,); maps: (b, 16, 16)."""
        answers = self.head(self._tokens).unflatten(1, (8, 8)).unflatten(-1, (2, 2, -1))  # (b, 8, 8, 2, 2, labels)
        answers = answers.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (b, labels, 16, 16)
        return F.cross_entropy(answers.float(), maps, reduction="none").mean((1, 2))


def train(args: argparse.Namespace, pipe: StableDiffusion3Pipeline, latents: Tensor, states, pooled) -> None:
    """Flow matching with levels of noise from a logistic normal distribution, as SD3 is trained (arXiv:2403.03206)."""
    transformer = pipe.transformer.to(args.device).train()
    maps = read_maps(args)
    both = nn.ModuleDict({"transformer": transformer, "segmenter": Segmenter(transformer, LAYERS // 2 - 1)})
    both.to(args.device)
    stock = transformer.attn_processors
    transformer.set_attn_processor(WeightedAttention(T5_LENGTH))
    with torch.no_grad():
        empty, _, empty_pooled, _ = pipe.encode_prompt("", None, None, do_classifier_free_guidance=False)
    empty = empty[:, :PROMPT_LENGTH]

    def loss_of(indices: Tensor, generator: torch.Generator) -> Tensor:
        x = latents[indices].float()
        noise = torch.randn(x.shape, generator=generator)
        level = torch.randn(len(x), generator=generator).sigmoid()
        dropped = torch.rand(len(x), generator=generator) < 0.1
        told = torch.from_numpy(states[indices.numpy()]).float()
        told = torch.where(dropped[:, None, None], empty, told)
        told = torch.cat([told, torch.zeros_like(told[:, :1])], dim=1)
        summary = torch.where(dropped[:, None], empty_pooled, torch.from_numpy(pooled[indices.numpy()]).float())
        noisy = torch.lerp(x, noise, level.view(-1, 1, 1, 1))
        with torch.autocast(args.device.type, torch.bfloat16):
            velocity = transformer(
                noisy.to(args.device),
                encoder_hidden_states=told.to(args.device),
                pooled_projections=summary.to(args.device),
                timestep=1000 * level.to(args.device),
            ).sample.float()
            named = both["segmenter"].loss(maps[indices].long().to(args.device))
        error = F.mse_loss(velocity, (noise - x).to(args.device))
        return error + args.map_weight * ((1 - level.to(args.device)) * named).mean()

    matrices = [p for name, p in transformer.named_parameters() if p.ndim == 2 and "transformer_blocks" in name]
    Stage("transformer", args, both, args.steps, args.lr, 64, matrices, args.muon_lr).run(len(latents), loss_of)
    transformer.set_attn_processor(stock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="images and checkpoints")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the pipeline goes")
    parser.add_argument("--images", type=int, default=80_000)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--muon_lr", type=float, default=2e-3, help="of the matrices of the blocks")
    parser.add_argument("--map_weight", type=float, default=0.1, help="of the maps' loss beside that of the images")
    parser.add_argument("--init_dir", type=Path, help="a pipeline folder whose transformer to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images = Images(args.work_dir, args.images, args.seed)
    pipe = assemble(FOLDER)
    if args.init_dir is not None:
        begun = load_file(args.init_dir / "transformer" / "diffusion_pytorch_model.safetensors")
        pipe.transformer.load_state_dict({name: value.float() for name, value in begun.items()})
    latents = encode_images(args, pipe, images)
    states, pooled = encode_prompts(args, pipe, images.captions)
    train(args, pipe, latents, states, pooled)
    write_pipeline(pipe, args.output_dir)


if __name__ == "__main__":
    main()
