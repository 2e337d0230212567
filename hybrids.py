"""Make hybrid images: decoded latent points, labelled with the percentages of their classes.

    python hybrids.py                                  # 20,000 hybrids -> runs/glyphs/hybrids.pt
    python hybrids.py --strategy prior --count 5000    # points from N(0, I): the idea at its purest
    python hybrids.py --export png                     # PNG files and labels.csv, for other tools

Reads:  vae.pt latent.pt and their data set.
Writes: hybrids.pt hybrids.json hybrids.png.
"""
from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Letters: N codes, M points, D latent size, K classes.  x (M,C,H,W) in [0,1]; q (M,K).

STRATEGIES = ("between", "boundary", "same", "around", "prior")
LABELS = ("product", "density", "weight", "argmax", "sampled")


class Points(NamedTuple):
    """M latent points; those made of codes are z = t mu_i + (1-t) mu_j (+ noise for `around`)."""
    z: torch.Tensor                     # (M,D)
    i: torch.Tensor | None = None       # (M,) rows of the codes; None for points from the prior
    j: torch.Tensor | None = None
    t: torch.Tensor | None = None       # (M,) in [0,1]


def sample(strategy, count, mu, logvar, y, posterior, generator) -> Points:
    """Draw `count` points from codes mu, logvar (N,D) with labels y (N,).

    prior     z ~ N(0, I)
    around    z ~ q(z|x_i), a code and its own width
    between   on the line between two codes of different classes, t uniform
    same      on the line between two codes of one class
    boundary  between, thinned so that max q is spread evenly over [1/2, 1]
    """
    device = mu.device
    if strategy == "prior":
        return Points(torch.randn(count, mu.shape[1], device=device, generator=generator))
    if strategy == "boundary":
        points = sample("between", 8 * count, mu, logvar, y, posterior, generator)
        top = posterior(points.z).amax(1)
        bins = ((top - 0.5) * 20).long().clamp(max=9)                   # ten bins over [1/2, 1]
        weight = (1 / bins.clamp(min=0).bincount(minlength=10).clamp(min=1))[bins] * (bins >= 0)
        if not weight.any():                                            # no point is that certain
            weight = torch.ones_like(top)
        keep = torch.multinomial(weight, count, replacement=True, generator=generator)
        return Points(*(v[keep] for v in points))
    i = torch.randint(len(mu), (count,), device=device, generator=generator)
    if strategy == "around":
        noise = torch.randn(count, mu.shape[1], device=device, generator=generator)
        return Points(mu[i] + noise * (logvar[i] / 2).exp(), i, i, torch.ones(count, device=device))
    j = partners(y, i, strategy == "same", generator)
    t = torch.rand(count, device=device, generator=generator)
    return Points(torch.lerp(mu[j], mu[i], t[:, None]), i, j, t)


def partners(y, i, same, generator):
    """For each row i a random row j of the same class, or of another one (of any, if K = 1)."""
    order, counts = y.argsort(stable=True), y.bincount()
    first = counts.cumsum(0) - counts
    size, others = counts[y[i]], len(y) - counts[y[i]]
    draw = torch.rand(len(i), device=y.device, generator=generator)
    if same or not others.any():
        return order[first[y[i]] + (draw * size).long().clamp(max=size - 1)]
    skip = first[y[i]] + size + (draw * others).long().clamp(max=others - 1)
    return order[skip % len(y)]                         # the block of class y_i is stepped over


def label(rule, points, y, posterior, generator=None, epsilon=0.1):
    """Class probabilities q (M,K) of points, by the named rule.

    density  q(c) = p(c|z), the latent posterior
    weight   q = t [c=y_i] + (1-t) [c=y_j], as mixup does (Zhang et al. 2018)
    product  a logarithmic opinion pool of the two (Genest and Zidek 1986):
             q(c) ~ [(1-e)(t [c=y_i] + (1-t) [c=y_j]) + e pi_c] (p(z|c) + b)^(1/T),
             e = 4 epsilon t (1-t), so that both ends are exactly one-hot
    argmax, sampled   hard labels from the density: the controls
    """
    if rule == "product" and points.i is not None or rule == "weight":
        if points.i is None:
            raise ValueError("points from the prior have no mixing weights; label them by density")
        classes, t = len(posterior.prior), points.t[:, None]
        q = t * F.one_hot(y[points.i], classes) + (1 - t) * F.one_hot(y[points.j], classes)
        if rule == "weight":
            return q
        e = 4 * epsilon * t * (1 - t)
        prior = (1 - e) * q + e * posterior.prior
        return (prior.log() + posterior.evidence(points.z)).softmax(1)
    q = posterior(points.z)
    if rule == "argmax":
        return F.one_hot(q.argmax(1), q.shape[1]).float()
    if rule == "sampled":
        drawn = torch.multinomial(q, 1, generator=generator)[:, 0]
        return F.one_hot(drawn, q.shape[1]).float()
    return q


def render(points, decode, mu, images, residual=True, batch=1000):
    """Images x (M,C,H,W) in [0,1] of points: decode(z), plus what the decoder lost of its sources.

    The residual hybrid is decode(z) + sum_k w_k (x_k - decode(mu_k)), clipped; at w = 1 it gives
    back x_k, so no sharpness is lost. `images` are the codes' uint8 sources, in the order of mu.
    """
    if not residual or points.i is None:
        return torch.cat([decode(z) for z in points.z.split(batch)])
    lost = torch.cat([x.float() / 255 - decode(m)
                      for x, m in zip(images.split(batch), mu.split(batch))])
    out = []
    for z, i, j, t in zip(*(v.split(batch) for v in points)):
        w = t[:, None, None, None]
        out.append((decode(z) + w * lost[i] + (1 - w) * lost[j]).clamp(0, 1))
    return torch.cat(out)
