from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import nn


class CNN(nn.Module):
    """A small image classifier: convolution blocks that halve the side and double the width.

    x (B,C,H,W) in [0,1] -> logits (B,K). `pool` and `mean` are part of the weights, so that a saved
    model needs no other description of its input.
    """

    def __init__(self, channels: int, classes: int, width: int = 32, blocks: int = 3):
        super().__init__()
        self.config = dict(channels=channels, classes=classes, width=width, blocks=blocks)
        layers, inputs = [], channels
        for i in range(blocks):
            outputs = width * 2 ** i
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                       nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            inputs = outputs
        self.features = nn.Sequential(*layers[:-1])       # the last block keeps its resolution
        self.head = nn.Linear(inputs, classes)

    def forward(self, x):
        return self.head(self.features(x - 0.5).mean((2, 3)))


def fit(model, next_batch, *, steps, lr=3e-3, weight_decay=0.05, rounds=10, amp=False,
        generator=None, state=None):
    """Train on batches `next_batch(generator) -> x (B,C,H,W), q (B,K)`; yield one dict a round.

    The loss is the cross-entropy against the probabilities q, so hard and soft labels share it.
    row["state"] resumes a run exactly: pass it back as `state`, with the same other arguments.
    """
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    first = 0
    if state:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        first = state["step"]
    model.train()
    ends = {math.ceil(steps * (i + 1) / rounds) for i in range(rounds)}
    total, seen, since, start = torch.zeros((), device=device), 0, first, time.perf_counter()
    for step in range(first, steps):
        for group in optimiser.param_groups:              # linear warm-up, then linear to zero
            group["lr"] = lr * min((step + 1) / (0.15 * steps + 1), (steps - step) / (0.85 * steps))
        x, q = next_batch(generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), q)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += loss.detach()
        seen += len(x)
        if step + 1 in ends:
            mean, seconds = total.item() / (step + 1 - since), time.perf_counter() - start
            yield {"step": step + 1, "loss": mean, "images_per_second": seen / seconds,
                   "state": {"step": step + 1, "model": model.state_dict(),
                             "optimiser": optimiser.state_dict(),
                             "generator": generator.get_state()}}
            model.train()
            total, seen, since, start = torch.zeros_like(total), 0, step + 1, time.perf_counter()


@torch.no_grad()
def predict(model, images, amp=False, batch=1000):
    """Class probabilities float32 (N,K) of uint8 images (N,C,H,W)."""
    model.eval()
    out = []
    for chunk in images.split(batch):
        x = (chunk.float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            out.append(model(x).float())
    return torch.cat(out)


def uniform(shape, low, high, x, generator):
    return torch.rand(shape, device=x.device, generator=generator) * (high - low) + low


def affine(x, q, generator, degrees=15.0, scale=0.15, shift=0.1, shear=0.15):
    """Rotate, scale, shear and shift, each image its own way. Shapes (B,C,H,W), (B,K) kept."""
    n = len(x)
    draw = lambda size: uniform((n,), -size, size, x, generator)
    angle, k = draw(math.radians(degrees)), draw(shear)
    sx, sy = draw(scale).exp(), draw(scale).exp()
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([torch.stack([cos * sx, (k * cos - sin) * sy, draw(2 * shift)], 1),
                        torch.stack([sin * sx, (k * sin + cos) * sy, draw(2 * shift)], 1)], 1)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False), q


def flip_crop(x, q, generator, pad=4):
    """Mirror half of the images and shift each by up to `pad` pixels, edges filled with zeros."""
    n, c, h, w = x.shape
    flip = torch.rand(n, device=x.device, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    dy, dx = torch.randint(0, 2 * pad + 1, (2, n), device=x.device, generator=generator)
    rows = (dy[:, None] + torch.arange(h, device=x.device))[:, None, :, None]
    cols = (dx[:, None] + torch.arange(w, device=x.device))[:, None, None, :]
    batch = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[None, :, None, None]
    return F.pad(x, (pad,) * 4, mode="reflect")[batch, channel, rows, cols], q
