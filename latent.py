"""Class percentages of any point of the latent space: "20% cat + 80% dog".

    python latent.py                                   # runs/glyphs/vae.pt -> runs/glyphs/latent.pt
    python latent.py -o runs/mnist --image seven.png   # the percentages of an image
    python latent.py -o runs/mnist --point 0.3,-1.2,... # the percentages of a latent point

Reads:  vae.pt and its data set.
Writes: latent.pt latent.json latent.png.
"""
from __future__ import annotations

import argparse
import math

import torch

# Letters: N codes, M points, D latent size, K classes.  mu, logvar (N,D); y (N,); q (M,K).

LOG_2PI = math.log(2 * math.pi)


class Posterior:
    """q(c|z) ~ pi_c (p(z|c) + b)^(1/T): Bayes' rule with a floor b and a temperature T.

    Far from every cluster p(z|c) sinks below b for all classes, and q becomes the class priors
    instead of a false certainty. Subclasses give log p(z|c); all work is in log space.
    """

    def __init__(self, prior, log_floor=-math.inf, temperature=1.0):
        self.prior, self.log_floor, self.temperature = prior, log_floor, temperature

    def __call__(self, z, logvar=None):
        """q (M,K) of points z (M,D); of images, when their encoder's logvar (M,D) is given too."""
        return self.weigh(self.log_density(z, logvar))

    def weigh(self, log_density):
        """q (M,K) from log p(z|c) (M,K)."""
        return (self.prior.log() + self.floored(log_density) / self.temperature).softmax(1)

    def evidence(self, z):
        """log (p(z|c) + b)^(1/T) (M,K): what a point says of the classes, before any prior."""
        return self.floored(self.log_density(z)) / self.temperature

    def floored(self, log_density):
        """log(p + b) (M,K)."""
        return torch.logaddexp(log_density, torch.full_like(log_density, self.log_floor))

    def set_floor(self, log_density, quantile=0.01):
        """b = a low quantile of the codes' leave-one-out density, one for all classes."""
        marginal = (log_density + self.prior.log()).logsumexp(1)
        finite = marginal[marginal.isfinite()]
        self.log_floor = float(finite.quantile(quantile)) if len(finite) else -math.inf


class Aggregate(Posterior):
    """p(z|c) = mean over codes i of class c of N(z; mu_i, diag(sigma_i^2 + h_c^2)).

    The class-conditional aggregate posterior (Makhzani et al. 2015), widened by a bandwidth
    h_cd = a s_d n_c^(-1/(D+4)) (Scott 1992), s_d the pooled within-class deviation: the encoder's
    own width alone is badly overconfident on codes it has not seen.
    """

    def __init__(self, mu, variance, counts, prior, log_floor=-math.inf, temperature=1.0):
        super().__init__(prior, log_floor, temperature)
        self.mu, self.variance, self.counts = mu, variance, counts     # sorted by class

    @classmethod
    def fit(cls, mu, logvar, y, classes, bandwidth=1.0):
        """From codes mu, logvar (N,D) and labels y (N,) in 0..classes-1."""
        order = y.argsort(stable=True)
        mu, logvar, y = mu[order], logvar[order], y[order]
        counts = y.bincount(minlength=classes)
        scale = counts.clamp(min=1).double().pow(-1 / (mu.shape[1] + 4)).to(mu)
        h = bandwidth * within_class_variance(mu, y, classes).sqrt() * scale[:, None]    # (K,D)
        return cls(mu, logvar.exp() + h[y] ** 2, counts.tolist(), counts / len(y))

    def state(self):
        return {k: getattr(self, k) for k in
                ("mu", "variance", "counts", "prior", "log_floor", "temperature")}

    def log_density(self, z, logvar=None, own=None):
        """log p(z|c) (M,K). `own` (M,): the code that each point is, left out of its class's mean.

        Memory is bounded: at most 2^24 (point, code) pairs are held at once.
        """
        step = max(1, 2 ** 24 // len(self.mu))
        parts = [self._log_density(z[i:i + step], None if logvar is None else logvar[i:i + step],
                                   None if own is None else own[i:i + step])
                 for i in range(0, len(z), step)]
        return torch.cat(parts)

    def _log_density(self, z, logvar, own):
        columns, start = [], 0
        for count in self.counts:
            mu, variance = self.mu[start:start + count], self.variance[start:start + count]
            terms = log_normal(z, mu, variance) if logvar is None else \
                log_normal_images(z, logvar.exp(), mu, variance)
            size = torch.full((len(z),), float(count), device=z.device)
            if own is not None:
                rows = ((own >= start) & (own < start + count)).nonzero()[:, 0]
                terms[rows, own[rows] - start] = -math.inf
                size[rows] -= 1
            columns.append(terms.logsumexp(1) - size.clamp(min=1).log() if count else
                           torch.full((len(z),), -math.inf, device=z.device))
            start += count
        return torch.stack(columns, 1)

    def leave_one_out(self, limit=2000):
        """log p(z_i|c) (M,K) and labels (M,) of at most `limit` of the codes, each without itself."""
        own = torch.linspace(0, len(self.mu) - 1, min(limit, len(self.mu))).long().to(self.mu.device)
        y = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        return self.log_density(self.mu[own], own=own), y.to(own.device)[own]


class Gaussian(Posterior):
    """p(z|c) = N(z; m_c, S_c), covariances shrunk towards the pooled one (Friedman 1989)."""

    def __init__(self, mean, covariance, prior, log_floor=-math.inf, temperature=1.0):
        super().__init__(prior, log_floor, temperature)
        self.mean, self.covariance = mean, covariance

    @classmethod
    def fit(cls, mu, logvar, y, classes, shrinkage=0.1, ridge=0.01):
        """From codes mu, logvar (N,D) and labels y (N,): moments of the aggregate posterior."""
        counts, dim = y.bincount(minlength=classes), mu.shape[1]
        one_hot = torch.nn.functional.one_hot(y, classes).to(mu)
        mean = one_hot.T @ mu / counts.clamp(min=1)[:, None]
        centred = mu - mean[y]
        scatter = torch.stack([centred[y == c].T @ centred[y == c] + logvar[y == c].exp().sum(0).diag()
                               for c in range(classes)])
        mixed = (1 - shrinkage) * scatter + shrinkage * scatter.sum(0)
        mixed /= ((1 - shrinkage) * counts + shrinkage * len(y)).clamp(min=1e-6)[:, None, None]
        trace = mixed.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        eye = torch.eye(dim, device=mu.device)
        return cls(mean, (1 - ridge) * mixed + (ridge * trace + 1e-6) * eye, counts / len(y))

    def state(self):
        return {k: getattr(self, k) for k in
                ("mean", "covariance", "prior", "log_floor", "temperature")}

    def log_density(self, z, logvar=None):
        """log p(z|c) (M,K)."""
        columns = []
        for mean, covariance in zip(self.mean, self.covariance):
            if logvar is not None:                        # integrate over each image's own width
                covariance = covariance + logvar.exp().diag_embed()
            root = torch.linalg.cholesky(covariance)
            white = torch.linalg.solve_triangular(
                root, (z - mean).unsqueeze(2) if logvar is not None else (z - mean).T, upper=False)
            square = white.square().sum(-2).flatten()
            log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            columns.append(-0.5 * (square + log_det + z.shape[1] * LOG_2PI))
        return torch.stack(columns, 1)


def within_class_variance(mu, y, classes):
    """Pooled within-class variance (D,), with one pseudo-observation of the total variance."""
    one_hot = torch.nn.functional.one_hot(y, classes).to(mu)
    mean = one_hot.T @ mu / one_hot.sum(0).clamp(min=1)[:, None]
    total = (mu - mu.mean(0)).square().mean(0)
    seen = len(y) - len(y.unique())
    return ((mu - mean[y]).square().sum(0) + total) / (seen + 1)


def log_normal(z, mu, variance):
    """log N(z_m; mu_i, diag(variance_i)) (M,N) by three matrix products."""
    centre = mu.mean(0) if len(mu) else 0                 # smaller numbers cancel less
    z, mu, precision = z - centre, mu - centre, 1 / variance
    square = (z * z) @ precision.T - 2 * z @ (mu * precision).T + (mu * mu * precision).sum(1)
    return -0.5 * (square.clamp_(min=0) + variance.log().sum(1) + z.shape[1] * LOG_2PI)


def log_normal_images(z, own, mu, variance):
    """log of the integral of N(z; mu_i, variance_i) over N(z; z_m, diag(own_m)), (M,N).

    Gaussians convolve: the variances add. One dimension at a time keeps the memory at (M,N).
    """
    total = torch.zeros(len(z), len(mu), device=z.device)
    for d in range(z.shape[1]):
        spread = own[:, d, None] + variance[None, :, d]
        total += (z[:, d, None] - mu[None, :, d]).square() / spread + spread.log()
    return -0.5 * (total + z.shape[1] * LOG_2PI)
