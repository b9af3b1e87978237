"""Train every part of the miniature from nothing, on images drawn here.

    python tools/train_miniature.py --work_dir work --output_dir ether_diffusion/miniature/weights

Stages: images, vae, decoder (the autoencoder's once more, on latents with noise), clip, unet (with its text
encoder), export. Each writes checkpoints to `--work_dir` and goes on from the last one when the command is given
again. Batches and noise are derived from the seed and the step: a run that was stopped ends as if it had not been.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import miniature_models as models
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from miniature_export import write_pipeline
from miniature_training import Images, Stage, log
from safetensors.torch import load_file
from torch import Tensor, nn

STAGES = ("images", "vae", "decoder", "clip", "unet", "export")


def start(module: nn.Module, args: argparse.Namespace, name: str) -> nn.Module:
    """On the device; with the weights of a part of `--init_dir` where that is given."""
    if args.init_dir is not None:
        (file,) = (args.init_dir / name).glob("*.safetensors")
        module.load_state_dict({key: tensor.float() for key, tensor in load_file(file).items()})
    return module.to(args.device)


def channels_last(module: nn.Module, device: torch.device) -> nn.Module:
    return module.to(device, memory_format=torch.channels_last)


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """Differences of neighbours weigh as much as the pixels: the world is flat colours and sharp edges."""
    edges = sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3))
    return (x - y).abs().mean() + edges + 0.5 * F.mse_loss(y, x)


def train_vae(args: argparse.Namespace, images: Images) -> AutoencoderKL:
    vae = channels_last(start(models.build_vae(), args, "vae"), args.device)

    def loss_of(indices: Tensor, generator: torch.Generator) -> Tensor:
        # One crop of 32×32, a quarter of the work.
        top, left = (4 * torch.randint(9, (2,), generator=generator)).tolist()
        x = images.batch(indices)[:, :, top : top + 32, left : left + 32]
        x = x.to(args.device, memory_format=torch.channels_last)
        with torch.autocast(args.device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        return reconstruction_loss(x, y) + 1e-4 * posterior.kl().mean() / 1024

    Stage("vae", args, vae, args.vae_steps, 2e-3, 32).run(len(images.captions), loss_of)
    return vae


def train_clip(args: argparse.Namespace, images: Images, tokens: Tensor, tokenizer) -> nn.Module:
    clip = start(models.build_clip(tokenizer), args, "clip")

    def loss_of(indices: Tensor, generator: torch.Generator) -> Tensor:
        with torch.autocast(args.device.type, torch.bfloat16):
            ids = tokens[indices]
            ids = ids[:, : int((ids != tokenizer.eos_token_id).sum(1).max()) + 1]  # nothing attends to what follows
            out = clip(input_ids=ids.to(args.device), pixel_values=images.batch(indices).to(args.device))
        logits = out.logits_per_image.float()
        # Images that share a caption are not told apart.
        same = (tokens[indices][:, None] == tokens[indices][None]).all(-1).float().to(args.device)
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    Stage("clip", args, clip, args.clip_steps, 1e-3, 128).run(len(images.captions), loss_of)
    return clip


@torch.no_grad()
def encode(args: argparse.Namespace, vae: AutoencoderKL, images: Images) -> Tensor:
    """Latent means of all images, scaled to unit variance: sets the autoencoder's scaling factor."""
    path = args.work_dir / "latents.pt"
    if not path.exists():
        log("encoding the images")
        parts = []
        for indices in torch.arange(len(images.captions)).split(256):
            x = images.batch(indices).to(args.device, memory_format=torch.channels_last)
            with torch.autocast(args.device.type, torch.bfloat16):
                parts.append(vae.encode(x).latent_dist.mean.half().cpu().contiguous())
        torch.save(torch.cat(parts), path)
    latents = torch.load(path, weights_only=True)
    vae.register_to_config(scaling_factor=round(1 / latents[:4096].float().std().item(), 4))
    return latents


def train_decoder(args: argparse.Namespace, vae: AutoencoderKL, images: Images, latents: Tensor) -> None:
    """The decoder alone, on whole images: latents stay as they are, with the small errors that a UNet makes."""
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True).train()

    def loss_of(indices: Tensor, generator: torch.Generator) -> Tensor:
        z = latents[indices].float()
        level = 0.15 * torch.rand(len(indices), 1, 1, 1, generator=generator) / vae.config.scaling_factor
        z = (z + level * torch.randn(z.shape, generator=generator)).to(args.device, memory_format=torch.channels_last)
        x = images.batch(indices).to(args.device, memory_format=torch.channels_last)
        with torch.autocast(args.device.type, torch.bfloat16):
            y = vae.decode(z).sample.float()
        return reconstruction_loss(x, y)

    Stage("decoder", args, decoder, args.decoder_steps, 1e-3, 16).run(len(latents), loss_of)


def train_unet(args: argparse.Namespace, latents: Tensor, scale: float, tokens: Tensor, tokenizer) -> tuple:
    """Trained together: the text encoder learns what the UNet needs to know of a caption."""
    unet = start(models.build_unet(), args, "unet")
    text = start(models.build_text_encoder(tokenizer), args, "text_encoder")
    both = nn.ModuleDict({"unet": channels_last(unet, args.device), "text": text})
    alphas = models.build_scheduler().alphas_cumprod
    empty = models.tokenize(tokenizer, [""])

    def loss_of(indices: Tensor, generator: torch.Generator) -> Tensor:
        clean = latents[indices].float() * scale
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (len(indices),), generator=generator)
        dropped = torch.rand(len(indices), 1, generator=generator) < 0.1
        ids = torch.where(dropped, empty, tokens[indices]).to(args.device)
        alpha = alphas[t].view(-1, 1, 1, 1)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(args.device, memory_format=torch.channels_last)
        with torch.autocast(args.device.type, torch.bfloat16):
            context = text(ids).last_hidden_state
            predicted = unet(noisy, t.to(args.device), context).sample.float()
        error = (predicted - noise.to(args.device)).square().mean((1, 2, 3))
        snr = alphas[t] / (1 - alphas[t])
        weight = (snr.clamp(max=5) / snr).to(args.device)  # min-SNR-γ, arXiv:2303.09556, γ = 5
        return (weight * error).mean()

    Stage("unet", args, both, args.unet_steps, args.unet_lr, 64).run(len(tokens), loss_of)
    return unet, text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="images and checkpoints")
    parser.add_argument("--output_dir", type=Path, help="where the pipeline goes; needed by the stage 'export'")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="which to run, with what they need"
    )
    parser.add_argument("--init_dir", type=Path, help="a pipeline folder to start from, instead of from nothing")
    parser.add_argument("--images", type=int, default=80_000)
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--decoder_steps", type=int, default=800)
    parser.add_argument("--clip_steps", type=int, default=700)
    parser.add_argument("--unet_steps", type=int, default=9000)
    parser.add_argument("--unet_lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if "export" in args.stages and args.output_dir is None:
        parser.error("the stage 'export' needs --output_dir")
    return args


def main() -> None:
    args = parse_args()
    args.device = torch.device(args.device)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = models.build_tokenizer(args.work_dir / "tokenizer")
    images = Images(args.work_dir, args.images, args.seed)
    tokens = models.tokenize(tokenizer, images.captions)
    done = [stage for stage in STAGES if stage in args.stages]
    clip = vae = None
    if {"clip", "export"} & set(done):
        clip = train_clip(args, images, tokens, tokenizer)
    if {"vae", "decoder", "unet", "export"} & set(done):
        vae = train_vae(args, images)
    if {"decoder", "unet", "export"} & set(done):
        latents = encode(args, vae, images)
    if {"decoder", "export"} & set(done):
        train_decoder(args, vae, images, latents)
    if {"unet", "export"} & set(done):
        unet, text = train_unet(args, latents, vae.config.scaling_factor, tokens, tokenizer)
        if "export" in done:
            write_pipeline(models.assemble(vae, text, tokenizer, unet), args.output_dir, clip=clip)


if __name__ == "__main__":
    main()
