"""Tests: oracle maths, properties, every command line, every mistake, the make chain.

    python -m pytest -q test_all.py

The maths is held against torch.distributions, closed forms and brute force, never against itself.
"""
import contextlib
import csv
import doctest
import functools
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import distributions as dist

import cnn
import common
import compare
import hybrids
import latent
import vae

HERE = Path(__file__).resolve().parent
REAL_DATA = HERE.parent / "shared" / "data"         # tests that need it skip where it is absent
SCRIPTS = {"vae": vae, "latent": latent, "hybrids": hybrids, "cnn": cnn, "compare": compare}
STEPS = list(SCRIPTS)[:4]                   # of the chain, those that leave a .pt
ANIMALS = ["cat", "dog", "eel"]
VARIABLES = "DATASET DATA OUT SIZES SEEDS STEPS DEVICE PYTHON PIP_ARGS".split()
# What `make test` itself was told must not reach the processes that the tests start.
ENV = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "PYTHONPATH", "MFLAGS")
       and not k.startswith("MAKE")} | {"OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
# Only processors repeat a result exactly: a GPU is for one test, and for `make bench`.
SEEN = ENV.copy()
if __name__ != "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ENV["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)    # in the background it was ignored
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow; make test-slow runs it")
approx, close = pytest.approx, torch.testing.assert_close


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def codes(n, dim, classes=3, seed=0):
    """Codes mu, logvar (n,dim) about one centre a class, and labels y (n,) in unequal numbers."""
    g = seeded(seed)
    y = (torch.rand(n, generator=g) ** 2 * classes).long()
    y[:classes] = torch.arange(classes)
    mu = torch.randn(n, dim, generator=g) + 2 * torch.randn(classes, dim, generator=g)[y]
    return mu, torch.rand(n, dim, generator=g) * 2 - 3, y


def easy(n, side=16, channels=1, classes=3, seed=0):
    """Noise, and a bright bar whose height is the class: uint8 (n,C,H,W), labels (n,)."""
    x = torch.rand(n, channels, side, side, generator=seeded(seed)) * 80
    y = torch.arange(n) % classes
    for c in range(classes):
        x[y == c, :, c * side // classes:(c + 1) * side // classes] += 150
    return x.byte(), y


def npz(path, n=200, **changes):
    """A tiny data set file; `changes` replace its arrays, None removes one."""
    arrays = {"classes": np.array(ANIMALS)}
    for part, size in (("train", n), ("test", 60)):
        x, y = easy(size, seed=size)
        arrays |= {f"x_{part}": x[:, 0].numpy(), f"y_{part}": y.numpy()}
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def run(script, *words):
    """A script's main, in this process -> its exit code."""
    return SCRIPTS[script].main([str(w) for w in (*words, "--threads", 1, "--quiet")])


def shell(*words, cwd=HERE, **env):
    return subprocess.run([str(w) for w in words], cwd=cwd, env=ENV | env, text=True,
                          capture_output=True)


def dataset(spec, out, *words):
    args = vae.parse_args(["--dataset", str(spec), "-o", str(out), "--quiet", *map(str, words)])
    return common.load_dataset(args, torch.device("cpu"))


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def unfinished(folder):
    return [f for f in folder.rglob("*") if ".tmp" in f.name or ".last" in f.name]


# ---- oracle maths: the class percentages ------------------------------------------------------

def brute(mu, logvar, y, z, bandwidth, own=0.0, without=-1):
    """log p(z|c) (K,) of one point, in float64, straight from the definition."""
    mu, rest, out = mu.double(), len(y) - len(y.unique()), []
    within = sum((mu[y == c] - mu[y == c].mean(0)).square().sum(0) for c in y.unique())
    spread = (within + mu.var(0, unbiased=False)) / (rest + 1)
    for c in y.unique():
        h2 = bandwidth ** 2 * spread * int((y == c).sum()) ** (-2 / (mu.shape[1] + 4))
        keep = (y == c) & (torch.arange(len(y)) != without)
        parts = dist.Normal(mu[keep], (logvar[keep].double().exp() + h2 + own).sqrt())
        mixed = dist.MixtureSameFamily(dist.Categorical(torch.ones(int(keep.sum()))),
                                       dist.Independent(parts, 1))
        out.append(mixed.log_prob(z.double()))
    return torch.stack(out)


@pytest.mark.parametrize("dim", [1, 2, 16, 64])
@pytest.mark.parametrize("bandwidth", [0.0, 0.7])
def test_aggregate_is_a_mixture_and_obeys_bayes(dim, bandwidth):
    mu, logvar, y = codes(60, dim)
    z, own, _ = codes(20, dim, seed=1)
    posterior = latent.Aggregate.fit(mu, logvar, y, 3, bandwidth)
    true = functools.partial(brute, mu, logvar, y, bandwidth=bandwidth)
    loose = dict(atol=2e-3, rtol=1e-4, check_dtype=False)
    points = torch.stack([true(z=a) for a in z])
    close(posterior.log_density(z), points, **loose)
    close(posterior.log_density(z, own),
          torch.stack([true(z=a, own=b.double().exp()) for a, b in zip(z, own)]), **loose)
    left_out, order = posterior.leave_one_out()[0], y.argsort(stable=True)
    close(left_out, torch.stack([true(z=mu[i], without=i) for i in order]), **loose)
    posterior.log_floor, posterior.temperature = -3.0 * dim, 2.5
    q = y.bincount() / len(y) * (points.exp() + math.exp(-3.0 * dim)) ** (1 / 2.5)
    close(posterior(z), q / q.sum(1, keepdim=True), atol=1e-3, rtol=0, check_dtype=False)


@pytest.mark.parametrize("dim", [1, 2, 64])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_gaussian_is_a_multivariate_normal(dim, shrinkage):
    mu, logvar, y = codes(300, dim)
    posterior = latent.Gaussian.fit(mu, logvar, y, 3, shrinkage, ridge=0.01)
    counts, s = y.bincount(), shrinkage
    scatter = [sum(torch.outer(m, m) + v.exp().diag() for m, v in
                   zip((mu[y == c] - mu[y == c].mean(0)).double(), logvar[y == c].double()))
               for c in range(3)]
    for c, z in itertools.product(range(3), codes(3, dim, seed=1)[0]):
        mixed = ((1 - s) * scatter[c] + s * sum(scatter)) / ((1 - s) * counts[c] + s * len(y))
        covariance = 0.99 * mixed + (0.01 * mixed.trace() / dim + 1e-6) * torch.eye(dim)
        true = dist.MultivariateNormal(mu[y == c].double().mean(0), covariance).log_prob(z.double())
        found = posterior.log_density(z[None])[0, c]
        close(found, true, atol=2e-3, rtol=1e-4, check_dtype=False)


@pytest.mark.parametrize("kind", [latent.Aggregate, latent.Gaussian])
def test_the_integral_over_an_image_is_its_monte_carlo_mean(kind):
    posterior = kind.fit(*codes(50, 2), 3)
    z, logvar = torch.tensor([[0.3, -0.5], [1.5, 1.0]]), torch.tensor([[-1.0, 0.2], [-2.0, -0.5]])
    draws = z + torch.randn(40_000, 2, 2, generator=seeded()) * (logvar / 2).exp()
    mean = posterior.log_density(draws.flatten(0, 1)).exp().view(-1, 2, 3).mean(0)
    close(posterior.log_density(z, logvar).exp(), mean, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("dim, temperature", [(1, 1.0), (5, 1.0), (1, 3.0)])
def test_two_gaussians_of_one_image_each(dim, temperature):
    a, logvar = torch.full((dim,), 0.8), torch.full((2, dim), -0.5)
    posterior = latent.Aggregate.fit(torch.stack([-a, a]), logvar, torch.arange(2), 2, 0.0)
    posterior.log_floor, posterior.temperature = -math.inf, temperature
    z = torch.randn(20, dim, generator=seeded())
    close(posterior(z)[:, 1], torch.sigmoid(2 * (z @ a) / math.exp(-0.5) / temperature))


@pytest.mark.parametrize("kind", [latent.Aggregate, latent.Gaussian])
@pytest.mark.parametrize("dim", [1, 2, 16, 64])
@pytest.mark.parametrize("deviations", [10, 100, 1e4])
def test_far_away_the_priors_are_left(kind, dim, deviations):
    mu, logvar, y = codes(300, dim)
    posterior = kind.fit(mu, logvar, y, 3)
    far = mu.mean(0) + torch.randn(8, dim, generator=seeded()).sign() * deviations * mu.std(0)
    close(posterior(far), (y.bincount() / len(y)).expand(8, 3), atol=1e-4, rtol=0)


def test_bounded_memory_changes_nothing():
    half = 2 ** 22                          # so many codes that two points are taken at a time
    mu, variance = torch.randn(2 * half, 1, generator=seeded()), torch.full((2 * half, 1), 0.1)
    posterior = latent.Aggregate(mu, variance, [half, half], torch.tensor([0.5, 0.5]))
    z = torch.tensor([[-1.0], [0.0], [3.0]])
    for logvar in (None, torch.zeros(3, 1)):
        singly = [posterior.log_density(z[[i]], None if logvar is None else logvar[[i]])
                  for i in range(3)]
        close(posterior.log_density(z, logvar), torch.cat(singly))


def test_scores_and_reliability_by_hand():
    q = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.9, 0.1]])
    y = torch.tensor([0, 1, 0, 0])
    # Gaps by confidence: -0.4 +0.7 | -0.2 -0.1; two bins that miss by 0.3 each, of 4 images.
    assert latent.scores(q, y, bins=2) == approx(
        dict(accuracy=0.75, balanced_accuracy=5 / 6, brier=0.35, ece=0.15,
             nll=-sum(map(math.log, (0.8, 0.6, 0.3, 0.9))) / 4), abs=1e-6)
    q = torch.tensor([[0.3, 0.7]] * 100 + [[0.5, 0.5]] * 10 + [[0.01, 0.99]] * 50)
    y = torch.cat([torch.zeros(25), torch.ones(135)]).long()
    # 20 pairs at 1/2 are too few for a row, and 0.01 and 0.99 too certain.
    assert [tuple(row.values()) for row in latent.reliability(q, y)] == [
        approx((0.3, 0.25, 100)), approx((0.7, 0.75, 100))]
    assert latent.words([0.2, 0.001, 0.799], ANIMALS) == "20% cat + 80% eel"


def test_ece_does_not_depend_on_the_order_of_images():
    right = torch.arange(90) % 3 == 0                       # one confidence, rightly stated
    for order in (torch.arange(90), right.float().argsort()):
        assert latent.ece(torch.full((90,), 1 / 3), right[order].float()) == approx(0, abs=1e-6)


def test_best_temperature_is_the_true_one_and_sets_nothing():
    log_density = 4 * torch.randn(20_000, 3, generator=seeded())
    posterior = latent.Posterior(torch.tensor([0.5, 0.3, 0.2]), temperature=4.0)
    y = torch.multinomial(posterior.weigh(log_density), 1, generator=seeded())[:, 0]
    posterior.temperature = 7.0
    assert 3.5 < latent.best_temperature(posterior, log_density, y)[0] < 4.5
    assert posterior.temperature == 7.0


def test_the_floor_is_a_low_quantile_of_the_codes_own_densities():
    mu, logvar, y = codes(300, 4)
    posterior = latent.Aggregate.fit(mu, logvar, y, 3)
    own = (posterior.leave_one_out()[0] + posterior.prior.log()).logsumexp(1)
    assert posterior.log_floor == approx(own.quantile(0.001).item())
    assert latent.teach(mu, logvar, y, 3).log_floor == approx(own.quantile(0.01).item())


def test_calibrate_finds_the_smallest_held_out_nll():
    mu, logvar, y = codes(500, 4)
    fit = functools.partial(latent.Aggregate.fit, mu[:300], logvar[:300], y[:300], 3)
    posterior, best = latent.calibrate(fit, (0.1, 1.0, 20.0), mu[300:], logvar[300:], y[300:])
    nll = lambda p: latent.scores(p(mu[300:], logvar[300:]), y[300:])["nll"]
    assert best != 20 and nll(posterior) <= min(nll(fit(h)) for h in (0.1, 1.0, 20.0)) + 1e-6


def test_labels_are_spread_along_the_clusters_and_not_across():
    g, turns = seeded(), torch.linspace(0, math.pi, 200)
    moon = torch.stack([turns.cos(), turns.sin()], 1)
    mu = torch.cat([moon, torch.tensor([1.0, 0.4]) - moon])
    mu += 0.05 * torch.randn(400, 2, generator=g)
    y = torch.arange(2).repeat_interleave(200)
    order = torch.cat([torch.tensor([0, 100, 200, 300]), torch.randperm(400, generator=g)])
    found = latent.spread_labels(mu[order], y[order[:4]], 2)
    assert found.dtype == torch.long and (found == y[order]).float().mean() > 0.98
    own = torch.cdist(mu[order], mu[order[:4]]).argmin(1)       # the nearest label would not do
    assert (y[order[:4]][own] == y[order]).float().mean() < 0.9


def test_label_spreading_solves_its_equation():
    mu, _, y = codes(30, 3)
    d = torch.cdist(mu, mu)
    near = d.argsort(1)[:, 1:5]
    w = torch.zeros(30, 30).scatter_(1, near, (-(d.gather(1, near) / d.gather(1, near)[:, -1:])
                                               .square()).exp())
    w = w + w.T
    s = w / (w.sum(0)[:, None] * w.sum(0)).sqrt()
    f = torch.linalg.solve(torch.eye(30) - 0.9 * s, F.one_hot(y, 3).float() *
                           (torch.arange(30) < 20)[:, None])
    found = latent.spread_labels(mu, y[:20], 3, neighbours=4, alpha=0.9)
    assert torch.equal(found, torch.cat([y[:20], f.argmax(1)[20:]]))


def test_labels_that_do_not_predict_each_other_are_not_spread():
    mu, y = torch.randn(300, 4, generator=seeded()), torch.arange(60) % 6
    assert torch.equal(latent.spread_labels(mu, y, 6), F.pad(y, (0, 240), value=-1))
    noise = [latent.spread_labels(torch.randn(200, 4, generator=seeded(s)), torch.arange(40) % 2, 2)
             for s in range(10)]
    assert sum(bool((found[40:] >= 0).any()) for found in noise) <= 1   # half right is no skill
    centre = 9 * torch.randn(12, 4, generator=seeded()).repeat(20, 1)
    noise = 0.1 * torch.randn(240, 4, generator=seeded(1))
    alone = latent.spread_labels(centre + noise, torch.arange(16) % 12, 12)
    assert torch.equal(alone, torch.arange(240) % 12)           # eight classes of one label each
    assert latent.spread_labels(mu[:3], y[:1], 6).tolist() == [0, -1, -1]   # nothing to judge by


def test_no_label_reaches_an_island():
    mu = torch.randn(90, 2, generator=seeded()) * 0.1
    mu[30:60] += 5
    mu[60:] += 50
    order = torch.cat([torch.tensor([0, 1, 31, 32]), torch.arange(90)])
    found = latent.spread_labels(mu[order], torch.tensor([0, 0, 1, 1]), 2)
    assert found[4:].tolist() == [0] * 30 + [1] * 30 + [-1] * 30


# ---- oracle maths: images and labels ----------------------------------------------------------

def test_elbo_terms():
    g = seeded()
    logits, x = torch.randn(5, 3, 4, 4, generator=g), torch.rand(5, 3, 4, 4, generator=g).round()
    mu, logvar = torch.randn(2, 5, 7, generator=g)
    likely = dist.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3)).mean()
    away = dist.kl_divergence(dist.Normal(mu, (logvar / 2).exp()), dist.Normal(0, 1)).sum(1).mean()
    close(vae.elbo_terms(logits, x, mu, logvar), (-likely, away))


def world(strategy="between", count=200, classes=3):
    """Codes, labels and a posterior with floor and temperature 2; points drawn among them."""
    mu, logvar, y = codes(90, 2, classes)
    posterior = latent.Aggregate.fit(mu, logvar, y, classes)
    posterior.temperature = 2.0
    points = hybrids.sample(strategy, count, mu, logvar, y, posterior, seeded())
    return mu, logvar, y, posterior, points


@pytest.mark.parametrize("strategy", hybrids.STRATEGIES)
def test_points_lie_where_they_should(strategy):
    mu, logvar, y, posterior, p = world(strategy, 4000)
    assert p.z.shape == (4000, 2) and torch.equal(p.z, world(strategy, 4000)[-1].z)
    if strategy in ("prior", "around"):
        white = p.z if p.i is None else (p.z - mu[p.i]) / (logvar[p.i] / 2).exp()
        assert white.mean(0).abs().max() < 0.06 and (white.var(0) - 1).abs().max() < 0.1
    else:
        close(p.z, p.t[:, None] * mu[p.i] + (1 - p.t[:, None]) * mu[p.j])
        alike = {"same": 1, "between": 0.3, "boundary": 0}[strategy]
        assert (y[p.i] == y[p.j]).float().mean() == approx(alike, abs=0.03 * (0 < alike < 1))
        assert 0 <= p.t.min() and p.t.max() <= 1
    if strategy in ("between", "same"):                     # Beta(4, 4): a variance of 1/36
        assert abs(p.t.mean() - 0.5) < 0.01 and abs(36 * p.t.var() - 1) < 0.1


def test_boundary_spreads_the_top_percentage_evenly():
    mu, logvar, y, posterior, _ = world("prior", classes=5)      # of many points below 1/2
    posterior.temperature = 0.3
    top = posterior(hybrids.sample("boundary", 5000, mu, logvar, y, posterior, seeded()).z).amax(1)
    assert top.min() >= 0.5 and (top.histc(10, 0.5, 1) - 500).abs().max() < 150


def test_hybrid_mixer_without_a_decoder_is_mixup():
    y = torch.arange(300) // 100                                        # sorted, as a batch may be
    x = (y.float() / 2)[:, None, None, None].expand(300, 1, 4, 4)       # grey says the class
    weights = torch.randn(2, 16, generator=seeded())
    for decode, decoded in ((lambda z: z.new_zeros(len(z), 1, 4, 4), 0),
                            (lambda z: (z @ weights).sigmoid().view(-1, 1, 4, 4), 105)):
        mixer = hybrids.HybridMixer(lambda x: (x.flatten(1)[:, :2], None), decode, world()[3],
                                    rule="weight", generator=seeded())
        made, q = mixer(x, y)
        plain = (q @ torch.tensor([0, 0.5, 1]))[:, None, None, None].expand_as(made)
        moved = (made - plain).abs().amax((1, 2, 3)) > 1e-4     # codes of one class are the same
        assert moved.sum() == approx(decoded, abs=20)           # 0.7 of the half that is decoded
        assert not decoded or (moved.view(3, 100).sum(1) > 20).all()    # all over the batch
        assert (q.gather(1, y[:, None]) > 0).all()              # each row is of its own image
        assert ((q > 0).sum(1) == 1).float().mean() == approx(0.3, abs=0.08)
    colour = hybrids.HybridMixer(lambda x: (x[:, 0].flatten(1)[:, :2], None), lambda z: z.new_zeros(
        len(z), 3, 16, 16), world()[3], rule="weight", generator=seeded())
    made, q = colour((y / 2)[:, None, None, None].expand(-1, 3, 16, 16), y)     # cut, not mixed
    assert set(made.unique().tolist()) == {0, 0.5, 1} and (made == made[:, :1]).all()
    close(made.mean((1, 2, 3)), q @ torch.tensor([0, 0.5, 1]), atol=0.08, rtol=0)
    colour.cut = False
    made, q = colour((y / 2)[:, None, None, None].expand(-1, 3, 16, 16), y)
    close(made, (q @ torch.tensor([0, 0.5, 1]))[:, None, None, None].expand_as(made))


@pytest.mark.parametrize("same_class", [True, False])
def test_partners(same_class):
    y, i = torch.tensor([2, 0, 1, 1, 0, 1, 2]), torch.arange(7).repeat(500)
    j = hybrids.partners(y, i, float(same_class), seeded())
    assert set(zip(i.tolist(), j.tolist())) == {                        # these, and no other
        (a, b) for a in range(7) for b in range(7) if (y[a] == y[b]) == same_class}


def test_labels():
    mu, logvar, y, posterior, p = world()
    q = {rule: hybrids.label(rule, p, y, posterior, seeded()) for rule in hybrids.LABELS}
    evidence = (posterior.log_density(p.z).exp() + math.exp(posterior.log_floor)).sqrt()   # T is 2
    for k, t in enumerate(p.t.tolist()):
        weight, e = torch.zeros(3), 0.4 * t * (1 - t)
        weight[y[p.i[k]]] += t
        weight[y[p.j[k]]] += 1 - t
        product = ((1 - e) * weight + e * posterior.prior) * evidence[k]
        close(q["weight"][k], weight)
        close(q["product"][k], product / product.sum(), atol=1e-5, rtol=1e-3)
    assert torch.equal(q["density"], posterior(p.z))
    assert torch.equal(q["argmax"], F.one_hot(q["density"].argmax(1), 3).float())
    assert set(q["sampled"].flatten().tolist()) == {0, 1} and (q["sampled"].sum(1) == 1).all()
    for t, end in ((0.0, p.j), (1.0, p.i)):                  # exactly one-hot, not nearly
        there = p._replace(t=torch.full((200,), t), z=mu[end])
        found = hybrids.label("product", there, y, posterior)
        assert torch.equal(found, F.one_hot(y[end], 3).float())
    with pytest.raises(ValueError):
        hybrids.label("weight", hybrids.Points(p.z), y, posterior)
    close(hybrids.entropy(torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])),
          torch.tensor([0, math.log(4), math.log(2)]))


def test_residual_hybrids_give_back_their_sources():
    mu, *_, p = world()
    images, weights = easy(90)[0], torch.randn(2, 256, generator=seeded())
    decode = lambda z: (z @ weights).sigmoid().view(-1, 1, 16, 16)
    for t, end in ((0.0, p.j), (1.0, p.i)):
        ends = p._replace(t=torch.full((200,), t), z=mu[end])
        x = hybrids.render(ends, decode, mu, images, batch=7)
        assert torch.equal(x, images[end])
    w, lost = p.t[:, None, None, None], images / 255 - decode(mu)
    direct = (decode(p.z) + w * lost[p.i] + (1 - w) * lost[p.j]).clamp(0, 1)
    close(hybrids.render(p, decode, mu, images / 255, batch=7), direct)
    made = hybrids.render(p, decode, mu, images, batch=7)
    assert made.dtype == torch.uint8 and (made - 255 * direct).abs().max() < 0.7
    close(hybrids.render(p, decode, mu, images / 255, residual=False), decode(p.z))
    plain = w * images[p.i] / 255 + (1 - w) * images[p.j] / 255         # the last ones, as pixels
    close(hybrids.render(p, decode, mu, images / 255, pixels=0.25, batch=7),
          torch.cat([direct[:150], plain[150:]]))
    close(hybrids.render(p, decode, mu, images / 255, pixels=1.0), plain)


def test_rectangles_have_their_area_and_lie_inside_the_image():
    t = torch.linspace(0, 1, 41).repeat(50)
    w = hybrids.rectangles(t, 60, 40, seeded())
    assert w.shape == (2050, 1, 60, 40) and set(w.unique().tolist()) == {0, 1}
    inside = w == 0
    assert torch.equal(inside, inside.any(3, keepdim=True) & inside.any(2, keepdim=True))
    found = w.mean((1, 2, 3))
    assert (found - t).abs().max() < 0.05 and abs((found - t).mean()) < 0.002
    assert (found[t == 0] == 0).all() and (found[t == 1] == 1).all()
    assert len(w[t == 0.5].flatten(1).unique(dim=0)) > 40


def test_colour_is_cut_and_grey_is_mixed():
    mu, *_, p = world()
    grey, weights, state = easy(90)[0] / 255, torch.randn(2, 768, generator=seeded()), \
        torch.get_rng_state()
    colour = torch.cat([grey, grey.flip(2), 1 - grey], 1)
    decode = lambda z: (z @ weights).sigmoid().view(-1, 3, 16, 16)
    make = lambda points=p, **how: hybrids.render(points, decode, mu, colour, generator=seeded(7),
                                                  **how)
    w, lost = hybrids.rectangles(p.t, 16, 16, seeded(7)), colour - decode(mu)
    close(make(), (decode(p.z) + w * lost[p.i] + (1 - w) * lost[p.j]).clamp(0, 1))
    plain = make(pixels=1.0)
    assert ((plain == colour[p.i]) | (plain == colour[p.j])).all()
    assert not torch.equal(plain, colour[p.i]) and not torch.equal(plain, colour[p.j])
    for t, end in ((0.0, p.j), (1.0, p.i)):
        close(make(p._replace(t=torch.full((200,), t), z=mu[end])), colour[end])
    t = p.t[:, None, None, None]
    close(make(pixels=1.0, cut=False), t * colour[p.i] + (1 - t) * colour[p.j])
    single = lambda z: decode(z)[:, :1]
    mixed, cut = (hybrids.render(p, single, mu, grey, pixels=1.0, cut=cut, generator=seeded(7))
                  for cut in (None, True))
    close(mixed, t * grey[p.i] + (1 - t) * grey[p.j])
    assert ((cut == grey[p.i]) | (cut == grey[p.j])).all() and not torch.equal(cut, mixed)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("transform, nothing", [
    (cnn.affine, dict(degrees=0, scale=0, shift=0, shear=0)), (cnn.flip_crop, dict(pad=0)),
    (functools.partial(cnn.mixup, alpha=1.0), None), (cnn.cutmix, None)],
    ids=["affine", "flip_crop", "mixup", "cutmix"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentations(transform, nothing, channels):
    n, before, mixes = 64, torch.get_rng_state(), nothing is None
    one = torch.rand(channels, 16, 20, generator=seeded()).expand(n, -1, -1, -1)
    q, values = torch.eye(n), torch.linspace(0, 1, n)
    x = values[:, None, None, None].expand_as(one) if mixes else one
    out, q_out = transform(x, q, seeded(3))
    assert all(map(torch.equal, (out, q_out), transform(x, q, seeded(3))))
    assert torch.equal(before, torch.get_rng_state())
    assert out.shape == x.shape and out.min() >= 0 and out.max() < 1 + 1e-5
    close(q_out.sum(1), torch.ones(n))
    assert len(out.flatten(1).unique(dim=0)) > n / 2         # each image has parameters of its own
    if mixes:                               # one-hot labels of single images say what was mixed in
        assert len(q_out.amax(1).unique()) > n / 2
        return close(out.mean((1, 2, 3)), q_out @ values)
    kept, kept_q = transform(one, q, seeded(), **nothing)
    flipped = transform is cnn.flip_crop and (kept != one).flatten(1).any(1)
    kept = torch.where(torch.as_tensor(flipped).view(-1, 1, 1, 1), kept.flip(3), kept)
    close(kept, one.clone(), atol=1e-5, rtol=0)
    assert torch.equal(kept_q, q)


def test_mixup_halves_images_unless_told_otherwise():
    values, q = torch.linspace(0, 1, 64), torch.eye(64)
    x, mixed = cnn.mixup(values[:, None, None, None].expand(64, 1, 16, 16), q, seeded())
    assert set(mixed.unique().tolist()) <= {0, 0.5, 1} and (mixed.sum(1) == 1).all()
    close(x.mean((1, 2, 3)), mixed @ values)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0, 200.0])
def test_beta(alpha):
    draws, true = cnn.beta(torch.empty(200_000), alpha, seeded()), dist.Beta(alpha, alpha)
    assert abs(draws.mean() - true.mean) < 0.005 and abs(draws.var() / true.variance - 1) < 0.02


def test_batches_hold_the_stated_share_of_hybrids():
    real = torch.zeros(9, 1, 16, 16).byte(), torch.eye(9)
    made = torch.full((5, 1, 16, 16), 255).byte(), torch.eye(9)[:5]
    for share, done, wanted in (((0, 0), 0, 0), ((0.25, 0.25), 0.7, 10), ((1, 1), 0.9, 40),
                                ((1, 0), 0, 40), ((1, 0), 0.99, 0), ((0.5, 1), 0.1, 20),
                                ((1, 0), 0.5, 40), ((1, 0), 0.5625, 30), ((1, 0), 0.75, 0),
                                ((0.5, 1), 0.625, 30)):
        x, q = cnn.batches(real, 40, made, share=share)(seeded(), done)
        assert x.shape == (40, 1, 16, 16) and q.shape == (40, 9)
        assert (x.amax((1, 2, 3)) == 1).sum() == wanted and x.amin() in (0, 1)
        mixed = cnn.batches(real, 40, mix=lambda x, q, g: (x + 1, q), share=share)(seeded(), done)
        assert (mixed[0].amax((1, 2, 3)) == 1).sum() == wanted


# ---- oracle maths: the statistics -------------------------------------------------------------

def test_statistics_by_hand():
    for df, t in ((1, 12.706), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert compare.t_quantile(df) == approx(t, abs=2e-3)
    for differences, p in (([1] * 6, 2 / 64), ([1, -1] * 3, 1), ([3, 1, 1, 1, 1, -1], 12 / 64),
                           ([1] * 16, 2 / 2 ** 16), ([1] * 5, None), ([1] * 17, None)):
        assert compare.sign_flip_p(differences) == p
    assert compare.holm([0.01, 0.04, 0.03]) == approx([0.03, 0.06, 0.06])
    assert compare.holm([0.6, 0.5]) == [1, 1] and compare.holm([]) == []


def test_summary_by_hand():
    rest = dict.fromkeys("nll ece scaled_nll scaled_ece noise blur shift".split(), 0.5)
    rows = [dict(n=n, seed=seed, arm=arm, accuracy=accuracy, **rest) for n, arm, accuracies in (
        (10, "real", [0.5, 0.6]), (10, "mixup", [0.7, 0.7]), (20, "real", [0.5] * 6),
        (20, "mixup", [0.61, 0.59] * 3), (20, "real+hybrid", [0.41, 0.39] * 3),
        (30, "mixup", [0.5]))
        for seed, accuracy in enumerate(accuracies)]
    table = {(e["n"], e["arm"]): e for e in compare.summarise(rows)}
    small, good, bad, alone = (table[key] for key in (
        (10, "mixup"), (20, "mixup"), (20, "real+hybrid"), (30, "mixup")))
    assert [small[k] for k in ("accuracy", "accuracy_half", "gain", "subsets")] == approx(
        [70, 0, 15, 2])
    assert small["gain_half"] == approx(12.706 * 5, rel=1e-3) and small["p"] is None
    assert good["p"] == 2 / 64 and good["p_holm"] == bad["p_holm"] == 4 / 64
    assert alone["accuracy_half"] is None and "gain" not in alone     # nothing to be compared with
    hollow = compare.summarise(rows, pool=39)[3]              # n = 20 of 39
    assert hollow["hollow"] and hollow["gain"] == good["gain"]
    assert hollow["gain_half"] is hollow["accuracy_half"] is hollow["p"] is None
    assert [compare.verdict(e["gain"], e["gain_half"]) for e in (small, good, bad)] == [
        "inconclusive", "better than real", "worse than real"]
    assert compare.verdict(3.0, None) == "inconclusive"


# ---- properties -------------------------------------------------------------------------------

def train(module, path, seed=0, state=None, rows=4):
    """At most `rows` of 4 rounds of 3 steps -> the last row's state, as a file gives it back."""
    x, y = easy(60)
    torch.manual_seed(seed)
    model = vae.VAE(1, 16, 16, 4) if module is vae else cnn.CNN(1, 3, width=4)
    real = cnn.batches((x, F.one_hot(y, 3).float()), 8)
    batches = (lambda g: real(g, 0)[0]) if module is vae else real
    fit = module.fit(model, batches, steps=12, rounds=4, generator=seeded(seed), state=state)
    torch.save(list(itertools.islice(fit, rows))[-1]["state"], path)
    return read(path)


@pytest.mark.parametrize("module", [vae, cnn], ids=["vae", "cnn"])
def test_same_seed_same_weights_and_resume_is_the_straight_run(module, tmp_path):
    go = functools.partial(train, module, tmp_path / "state.pt")
    straight, half = go(), go(rows=2)
    assert straight["step"] == 12 and half["step"] == 6
    assert same(straight["model"], go()["model"])
    assert not same(straight["model"], go(seed=1)["model"])
    assert same(straight["model"], go(seed=1, state=half, rows=2)["model"])


def test_a_loss_that_is_not_finite_is_said():
    batch = torch.full((3, 1, 16, 16), math.nan), torch.eye(3)
    with pytest.raises(FloatingPointError, match="not finite"):
        list(cnn.fit(cnn.CNN(1, 3, width=4), lambda g, done: batch, steps=2, generator=seeded()))


@pytest.mark.parametrize("height, width", [(16, 16), (28, 28), (31, 31), (64, 64), (17, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(height, width, channels):
    images = torch.randint(256, (7, channels, height, width), generator=seeded()).byte()
    model = vae.VAE(channels, height, width, latent_dim=5, hidden=8, units=16)
    mu, logvar = vae.encode_all(model, images, batch=3)
    x = vae.decode_all(model, mu, batch=3)
    assert mu.shape == logvar.shape == (7, 5) and x.shape == images.shape
    assert x.min() >= 0 and x.max() <= 1 and logvar.abs().max() <= 10
    again = vae.VAE(**model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.decode(mu), model.decode(mu))
    assert cnn.predict(cnn.CNN(channels, 4, 4, max(height, width)), images, batch=3).shape == (7, 4)


@functools.cache
def glyphs():
    return common.glyphs()


def uneven():
    x, y = easy(3000, classes=7)
    y[:500] = 6
    return common.Dataset(x, y, x, y, list("abcdefg"), "uneven")


def test_glyphs():
    data, before, again = glyphs(), torch.get_rng_state(), common.glyphs()
    assert torch.equal(before, torch.get_rng_state()) and data.images.dtype == torch.uint8
    for key in ("images", "labels", "test_images", "test_labels"):
        assert torch.equal(getattr(data, key), getattr(again, key))
    assert data.images.shape == (10_000, 1, 28, 28) and data.test_images.shape == (2_000, 1, 28, 28)
    assert data.labels.bincount().tolist() == [1000] * 10
    assert data.test_labels.bincount().tolist() == [200] * 10
    assert torch.equal(common.split(data)[1], data.validation) and len(data.validation) == 1000
    assert len(data.images.flatten(1).unique(dim=0)) == 10_000          # no two alike


@pytest.mark.parametrize("make", [glyphs, uneven], ids=["glyphs", "uneven"])
def test_subsets(make):
    data = make()
    pool, validation = common.split(data)
    assert sorted([*pool.tolist(), *validation.tolist()]) == list(range(len(data.labels)))
    used = []
    for seed in range(10):
        small, large = (common.subset(data, pool, n, seed).tolist() for n in (100, 300))
        assert set(small) < set(large) <= set(pool.tolist())
        for rows in (small, large):
            counts = data.labels[rows].bincount()
            assert counts.max() - counts.min() <= 1 and len(set(rows)) == len(rows)
        used += small
    assert len(set(used)) == 1000                            # disjoint over the seeds
    assert common.subset(data, pool, len(pool), 3).sort()[0].tolist() == pool.tolist()


IMPORTS = """
import os, random, sys, numpy, torch
def state():
    return (str(random.getstate()), str(numpy.random.get_state()), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), list(sys.argv), dict(os.environ),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled())
before = state()
for name in "common vae latent hybrids cnn compare".split():
    __import__(name)
    assert state() == before, name
assert not {"matplotlib", "torchvision", "PIL"} & set(sys.modules)
"""

USES = {"vae": """
model, g = vae.VAE(3, 20, 20, latent_dim=4), torch.Generator().manual_seed(0)
rows = list(vae.fit(model, lambda g: torch.rand(8, 3, 20, 20, generator=g), steps=3, generator=g))
mu, logvar = vae.encode_all(model, torch.zeros(5, 3, 20, 20, dtype=torch.uint8))
assert rows[-1]["step"] == 3 and vae.decode_all(model, mu).shape == (5, 3, 20, 20)
""", "latent": """
mu, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
q = latent.teach(mu, torch.full((4, 1), -2.0), y, 2)(torch.tensor([[0.0]]))[0]
assert latent.words(q, ["cat", "dog"]).count("50%") == 2
""", "hybrids": """
class Posterior:
    prior = torch.tensor([0.5, 0.5])
    def __call__(self, z): return torch.full((len(z), 2), 0.5)
mu, y, g = torch.randn(6, 2), torch.arange(6) % 2, torch.Generator().manual_seed(0)
points = hybrids.sample("between", 10, mu, mu, y, Posterior(), g)
images, decode = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), lambda z: torch.rand(len(z), 1, 8, 8)
assert hybrids.render(points, decode, mu, images).shape == (10, 1, 8, 8)
assert torch.allclose(hybrids.label("product", points, y, Posterior()).sum(1), torch.ones(10))
""", "cnn": """
real, g = (torch.zeros(9, 1, 16, 16, dtype=torch.uint8), torch.eye(9)), torch.Generator()
model = cnn.CNN(1, 9, width=4)
assert list(cnn.fit(model, cnn.batches(real, 4, real, cnn.mixup), steps=3, generator=g))
assert cnn.predict(model, real[0]).shape == (9, 9)
"""}


def test_importing_does_nothing(tmp_path):
    done = shell(sys.executable, "-B", "-c", IMPORTS, cwd=tmp_path, PYTHONPATH=str(HERE))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", USES)
def test_each_file_works_alone(name, tmp_path):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    end = "import sys; assert not {'common', 'matplotlib', 'torchvision'} & set(sys.modules)"
    code = f"import torch, {name}\n{USES[name]}\n{end}"
    done = shell(sys.executable, "-B", "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- command lines ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_in_docstrings(name):
    found = doctest.testmod(SCRIPTS[name])
    assert found.failed == 0 and (found.attempted > 0 or name == "cnn")


def test_seconds_in_words():
    assert [vae.clock(s) for s in (8, 185, 7800)] == ["8 s", "3:05 min", "2:10 h"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_default(name):
    done = shell(sys.executable, HERE / f"{name}.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    for flag, value in vars(SCRIPTS[name].parse_args([])).items():
        if flag != "script":                # where the default is None, words say what it means
            assert f"--{flag.replace('_', '-')}" in done.stdout
            shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            assert value is None or f"(default: {shown})" in done.stdout or \
                f"(default: {value})" in done.stdout or flag == "label", flag


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with what the four steps make of a tiny data set."""
    out = tmp_path_factory.mktemp("chain") / "run"
    data = npz(out.parent / "tiny.npz")
    assert run("vae", "--dataset", data, "-o", out, "--steps", 40, "--latent-dim", 4) == 0
    assert run("latent", "-o", out) == 0
    assert run("hybrids", "-o", out, "--count", 90, "--export", out / "png") == 0
    assert run("cnn", "-o", out, "--steps", 40, "--width", 8) == 0
    return out


@pytest.fixture
def copy(chain, tmp_path):
    """One's own copy of that folder, to spoil."""
    return Path(shutil.copytree(chain, tmp_path / "run"))


@pytest.mark.parametrize("kind, upstream, keys", [
    ("vae", [], "config rows model"), ("hybrids", ["vae", "latent"], "images q z"),
    ("latent", ["vae"], "mu logvar labels calibrated teaching"),
    ("cnn", ["vae", "hybrids"], "config model")])
def test_files(chain, kind, upstream, keys):
    saved, facts = read(chain / f"{kind}.pt"), json.loads((chain / f"{kind}.json").read_text())
    assert facts == {k: saved[k] for k in facts} and set(saved) == {*facts, *keys.split()}
    assert facts["kind"] == kind and facts["format"] == common.FORMAT
    assert facts["made_from"] == {u: common.fingerprint(chain / f"{u}.pt") for u in upstream}
    assert facts["dataset"].items() >= dict(classes=ANIMALS, shape=[1, 16, 16], images=200).items()
    assert facts["versions"]["torch"] == torch.__version__ and facts["settings"]["seed"] == 0
    assert Image.open(chain / f"{kind}.png").width > 600 and not unfinished(chain)


def test_what_the_files_hold(chain):
    v, l, h, c = (read(chain / f"{kind}.pt") for kind in STEPS)
    data = dataset(v["dataset"]["spec"], chain)
    pool, _ = common.split(data)
    assert torch.equal(v["rows"], pool) and torch.equal(l["labels"], data.labels[pool])
    model, network = vae.VAE(**v["config"]), cnn.CNN(**c["config"])
    model.load_state_dict(v["model"])
    network.load_state_dict(c["model"])
    # As far as bfloat16 goes, which the scripts use where the processor has it.
    close(vae.encode_all(model, data.images[pool]), (l["mu"], l["logvar"]), atol=0.05, rtol=0.05)
    for name, kind in (("aggregate", latent.Aggregate), ("gaussian", latent.Gaussian)):
        q = kind(**l["calibrated"][name])(*vae.encode_all(model, data.test_images))
        nll = latent.scores(q, data.test_labels)["nll"]
        assert nll == approx(l["metrics"][name]["nll"], abs=0.05)
    assert h["images"].dtype == torch.uint8 and h["images"].shape == (90, 1, 16, 16)
    assert h["q"].dtype == torch.float32 and h["q"].shape == (90, 3) and h["z"].shape == (90, 4)
    close(h["q"].sum(1), torch.ones(90))
    right = (cnn.predict(network, data.test_images).argmax(1) == data.test_labels).float().mean()
    assert right == approx(c["metrics"]["accuracy"], abs=0.04) and right > 0.9      # bars are easy
    log = [json.loads(line)["step"] for line in (chain / "cnn.log.jsonl").read_text().splitlines()]
    assert log == [row["step"] for row in c["metrics"]["history"]] and log[-1] == 40


def test_export(chain):
    rows, h = list(csv.DictReader((chain / "png/labels.csv").open())), read(chain / "hybrids.pt")
    assert len(rows) == 90 and list(rows[0]) == ["file", *ANIMALS]
    for row, image, q in zip(rows, h["images"], h["q"]):
        stated = [float(row[c]) for c in ANIMALS]
        assert sum(stated) == approx(1, abs=1e-4) and stated == approx(q.tolist(), abs=1e-5)
        assert np.array_equal(np.asarray(Image.open(chain / "png" / row["file"])), image[0].numpy())
        assert ANIMALS[int(q.argmax())] in row["file"].split("/")[0]


def test_export_survives_any_class_name(tmp_path):
    names = ['he said "$x"', "a/$b", "../../c, d"]           # a pair of $ is a formula to some
    data = npz(tmp_path / "tiny.npz", classes=np.array(names))
    assert run("vae", "--dataset", data, "-o", tmp_path, "--steps", 3, "--latent-dim", 2) == 0
    assert run("latent", "-o", tmp_path) == 0
    for count in (40, 20):                                  # the second replaces the first
        assert run("hybrids", "-o", tmp_path, "--count", count, "--export", tmp_path / "x/y/z") == 0
    rows = list(csv.DictReader((tmp_path / "x/y/z/labels.csv").open()))
    assert list(rows[0]) == ["file", *names]
    assert {tmp_path / "x/y/z" / row["file"] for row in rows} == set(tmp_path.glob("x/y/z/*/*.png"))


@pytest.mark.parametrize("words", [
    *(["--strategy", s] for s in hybrids.STRATEGIES[1:]), ["--no-residual"], ["--pixels", "1"],
    ["--cut"], *(["--label", rule] for rule in hybrids.LABELS[1:])], ids=" ".join)
def test_every_kind_of_hybrid(copy, words):
    assert run("hybrids", "-o", copy, "--count", 30, *words) == 0
    h = read(copy / "hybrids.pt")
    assert h["images"].shape == (30, 1, 16, 16) and not unfinished(copy)
    close(h["q"].sum(1), torch.ones(30))
    decoded = {"around", "prior", "--no-residual"} & set(words)         # all of them
    assert h["settings"]["pixels"] == (0 if decoded else 1 if words[0] == "--pixels" else 0.5)
    assert h["settings"]["cut"] == (words == ["--cut"])         # known, not None: they are grey


def test_the_flag_cut(copy):
    made = []
    for words in ([], ["--no-cut"], ["--cut"]):
        assert run("hybrids", "-o", copy, "--count", 30, "--pixels", 1, *words) == 0
        made.append(read(copy / "hybrids.pt")["images"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def percentages(text):
    return {name: float(p) for p, name in re.findall(r"^ *([\d.]+)% +(\w+)$", text, re.M)}


def test_percentages_of_a_picture_and_of_a_point(chain, tmp_path, capsys):
    dog, file = easy(3, seed=9)[0][1, 0].numpy(), tmp_path / "dog.png"
    Image.fromarray(dog).save(file)
    said = []
    for words in (["latent", "--image", file], ["latent", "--point", "0.3,-1.2,0,1"],
                  ["cnn", "--predict", file]):
        assert run(*words, "-o", chain) == 0
        said.append(capsys.readouterr().out)
        assert set(percentages(said[-1])) == set(ANIMALS)
        assert sum(percentages(said[-1]).values()) == approx(100, abs=0.2)
    assert next(iter(percentages(said[-1]))) == "dog" and "inverted" not in said[-1]
    Image.fromarray(255 - dog).convert("RGB").save(file)     # ink on paper, and in colour
    assert run("cnn", "-o", chain, "--predict", file) == 0
    inverted = capsys.readouterr().out
    assert "inverted" in inverted and percentages(inverted) == percentages(said[-1])


def test_photographs_light_and_dark_are_never_inverted(tmp_path):
    x, y = easy(60)
    x[::3] = 255 - x[::3]
    data = common.Dataset(x, y, x, y, ANIMALS, "photographs")
    facts = data.facts(common.flags("vae.py", "").parse_args([]))
    assert facts["light"] == approx(20 / 60, abs=0.02)
    for k in range(6):
        Image.fromarray(x[k, 0].numpy()).save(tmp_path / "one.png")
        assert torch.equal(vae.read_like(tmp_path / "one.png", facts)[0], x[k:k + 1])
    drawn = common.Dataset(*(2 * [x[1::3], y[1::3]]), ANIMALS, "chalk")      # all of them dark
    facts = drawn.facts(common.flags("vae.py", "").parse_args([]))
    Image.fromarray(255 - x[1, 0].numpy()).save(tmp_path / "one.png")
    assert torch.equal(vae.read_like(tmp_path / "one.png", facts)[0], x[1:2])


def test_predict_a_folder(chain, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for k, image in enumerate(easy(6, seed=9)[0]):
        Image.fromarray(image[0].numpy()).save(tmp_path / ("in" if k % 2 else ".") / f'{k} "a".png')
    assert run("cnn", "-o", chain, "--predict", tmp_path) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 6 and list(rows[0]) == ["file", "likeliest", *ANIMALS]
    for row in rows:
        assert Path(row["file"]).exists()
        assert sum(float(row[c]) for c in ANIMALS) == approx(1, abs=1e-3)
        assert row["likeliest"] == ANIMALS[int(Path(row["file"]).name[0]) % 3]


@pytest.mark.parametrize("name, words", [
    ("vae", ["--batch-size", 32]),
    ("cnn", ["--width", 8, "--augment", "--mixup", 1, "--cutmix", 1])])
def test_an_interrupted_run_goes_on(copy, tmp_path, name, words):
    words = [name, *words, "--dataset", copy.parent / "tiny.npz", "--steps", 200, "--resume", "-o"]
    npz(tmp_path / "tiny.npz")
    straight = Path(shutil.copytree(copy, tmp_path / "straight"))
    assert run(*words, straight) == 0
    stem, last = copy / f"{name}.pt", copy / f"{name}.last.pt"
    stem.unlink()
    # In a process of its own: Ctrl-C between two lines of torch.autocast leaves it switched on.
    process = subprocess.Popen([sys.executable, f"{name}.py", *map(str, words[1:]), copy,
                                "--threads", "1"], cwd=HERE, env=ENV, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not last.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=60)[1]
    assert process.returncode == 130 and not stem.exists()
    assert 0 < read(last)["state"]["step"] < 200
    assert run(*words, copy) == 0 and not last.exists()
    a, b = read(straight / stem.name), read(stem)
    assert same(a["model"], b["model"]) and a["metrics"] == b["metrics"]


def test_unfinished_work_that_does_not_fit_is_said(copy, capsys):
    shutil.copy(copy / "vae.pt", copy / "cnn.last.pt")
    assert run("cnn", "-o", copy, "--steps", 3, "--width", 4, "--resume") == 0
    assert "does not fit these settings; starting afresh" in capsys.readouterr().err


# ---- data sets --------------------------------------------------------------------------------

RGB = easy(200, channels=3)[0].numpy()
GREY = RGB[:, :1]


@pytest.mark.parametrize("given, wanted", [
    (GREY[:, 0], GREY), (GREY, GREY), (GREY.transpose(0, 2, 3, 1), GREY), (RGB, RGB),
    (RGB.transpose(0, 2, 3, 1), RGB), (GREY[:, 0] / 255, GREY), (GREY[:, 0].astype("f4"), GREY),
    (RGB.astype("i8"), RGB), (GREY[:, 0] // 128, GREY // 128 * 255)],
    ids="NHW N1HW NHW1 N3HW NHW3 float01 float255 int binary".split())
def test_npz_layouts(tmp_path, given, wanted):
    data = dataset(npz(tmp_path / "a.npz", x_train=given, x_test=given[:60]), tmp_path)
    assert np.array_equal(data.images.numpy(), wanted) and data.images.dtype == torch.uint8
    assert np.array_equal(data.test_images.numpy(), wanted[:60])


@pytest.mark.parametrize("names", [None, list("abc"), list("0123456789")])
def test_npz_labels_and_classes(tmp_path, names):
    y = np.array([3, 7, 9])[np.arange(200) % 3]
    data = dataset(npz(tmp_path / "a.npz", y_train=y, y_test=y[:60],
                       classes=None if names is None else np.array(names)), tmp_path)
    assert data.classes == (["3", "7", "9"] if names != list("abc") else names)
    assert data.labels.tolist() == [k % 3 for k in range(200)]


@pytest.mark.parametrize("side", [8, 80])
def test_sides_outside_16_to_64_are_resized(tmp_path, side):
    x = easy(200, side)[0].numpy()
    data = dataset(npz(tmp_path / "a.npz", x_train=x, x_test=x[:60]), tmp_path, "--image-size", 24)
    assert data.images.shape == (200, 1, 24, 24) and abs(data.images.float().mean() - x.mean()) < 2


def zoo(root, grey=False, per_class=9):
    """Two classes of pictures, each of one colour; of many sizes, modes and formats."""
    for name, level in (("bird", 60), ("fish", 200)):
        (root / name).mkdir(parents=True)
        (root / name / "notes.txt").write_text("not a picture")
        for k in range(per_class):
            size, grade = (20 + 7 * k, 90 - 5 * k), (level, 0, 255 - level)
            (Image.new("L", size, level) if grey and k % 3 == 0 else
             Image.new("LA", size, (level, 255)) if grey and k % 3 == 1 else
             Image.fromarray(np.full(size, level * 257, np.uint16)) if grey else
             Image.new("RGB", size, grade).convert(("RGB", "P", "RGBA")[k % 3])
             ).save(root / name / f"{k}.{'png' if grey or k % 3 else 'jpg'}")
    return root


@pytest.mark.parametrize("grey", [True, False], ids=["grey", "RGB"])
@pytest.mark.parametrize("parts, test", [([""], 4), (["train"], 4), (["train", "test"], 18)])
def test_folders(tmp_path, grey, parts, test):
    for part in parts:
        zoo(tmp_path / "zoo" / part, grey)
    load = lambda: dataset(tmp_path / "zoo", tmp_path, "--image-size", 24)
    data, (stored,) = load(), tmp_path.glob("*.npy")
    assert data.images.shape == (18 * len(parts) - test, 1 if grey else 3, 24, 24)
    assert data.test_labels.bincount().tolist() == [test / 2] * 2
    assert data.classes == ["bird", "fish"]
    for x, y in ((data.images, data.labels), (data.test_images, data.test_labels)):
        level = torch.tensor([60.0, 200.0])[y]               # palettes are coarse
        assert (x[:, 0].float().mean((1, 2)) - level).abs().max() < 12
    before, again = stored.stat().st_mtime_ns, load()
    assert list(tmp_path.glob("*.npy")) == [stored] and stored.stat().st_mtime_ns == before
    assert torch.equal(again.images, data.images) and not unfinished(tmp_path)


def test_scripts_on_a_folder_of_colour_pictures(tmp_path):
    data, out = zoo(tmp_path / "zoo", per_class=16), tmp_path / "run"
    assert run("vae", "--dataset", data, "--image-size", 20, "-o", out, "--steps", 10,
               "--latent-dim", 1, "--images", 12) == 0
    assert run("latent", "-o", out, "--dataset", data) == 0         # at the side of vae.pt
    assert len(read(out / "latent.pt")["mu"]) == 12
    assert run("hybrids", "-o", out, "--count", 40, "--export", out / "png") == 0
    assert run("cnn", "-o", out, "--steps", 10, "--augment", "--images", 20) == 0
    assert read(out / "cnn.pt")["metrics"]["real_images"] == 20
    assert Image.open(next((out / "png").rglob("*.png"))).mode == "RGB"
    assert len(list(out.glob("*.npy"))) == 1


def test_scripts_on_hardly_any_images(tmp_path, capsys, recwarn):
    assert run("vae", "--dataset", npz(tmp_path / "tiny.npz"), "-o", tmp_path, "--steps", 3,
               "--images", 2, "--latent-dim", 2) == 0        # one of the three classes has none
    assert run("latent", "-o", tmp_path) == 0
    for strategy in ("boundary", "prior"):
        assert run("hybrids", "-o", tmp_path, "--count", 5, "--strategy", strategy) == 0
    assert capsys.readouterr().err == ""
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.skipif(not (REAL_DATA / "MNIST").is_dir(), reason="no MNIST in ../shared/data")
def test_mnist(tmp_path):
    data = dataset("mnist", tmp_path, "--data-dir", REAL_DATA)
    assert data.images.shape == (60_000, 1, 28, 28) and len(data.test_images) == 10_000
    assert data.labels[:5].tolist() == [5, 0, 4, 1, 9] and data.classes[7] == "7"
    assert data.labels.bincount()[:2].tolist() == [5923, 6742]


# ---- the grid ---------------------------------------------------------------------------------

GRID = ["compare", "--sizes", 12, 30, "--seeds", 2, "--steps", 8, "--vae-steps", 8, "--width", 4,
        "--latent-dim", 4, "--arms", "real", "real+hybrid"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    assert run(*GRID, "--dataset", npz(out / "tiny.npz"), "-o", out, "--jobs", 1) == 0
    return out


def test_grid(grid):
    facts = json.loads((grid / "compare.json").read_text())
    rows, cells = list(csv.DictReader((grid / "compare.csv").open())), facts["rows"]
    assert len(rows) == len(cells) == len(list((grid / "cells").iterdir())) == 8
    assert {(int(r["n"]), int(r["seed"]), r["arm"]) for r in rows} == set(
        itertools.product((12, 30), (0, 1), ("real", "real+hybrid")))
    assert facts["kind"] == "compare" and facts["failed"] == [] and len(facts["summary"]) == 4
    for row, cell in zip(rows, cells):
        assert float(row["nll"]) == approx(cell["nll"], rel=1e-4) and 0 <= cell["accuracy"] <= 1
    assert Image.open(grid / "compare.png").width > 600 and not unfinished(grid)


def test_grid_goes_on_from_its_cells(grid, tmp_path):
    out = Path(shutil.copytree(grid, tmp_path / "grid"))
    lost, *kept = files = sorted((out / "cells").iterdir())
    before, content = [f.stat().st_mtime_ns for f in kept], lost.read_bytes()
    lost.unlink()
    words = [*GRID, "--dataset", grid / "tiny.npz", "-o", out, "--jobs", 1]
    assert run(*words) == 0 and sorted((out / "cells").iterdir()) == files
    assert lost.read_bytes() == content and [f.stat().st_mtime_ns for f in kept] == before
    assert (out / "compare.csv").read_text() == (grid / "compare.csv").read_text()
    assert run(*words, "--weight-decay", 0.1) == 0           # other settings, other cells
    assert len(list((out / "cells").iterdir())) == 16


def test_two_jobs_make_the_same_cells(grid, tmp_path):
    assert run(*GRID, "--dataset", grid / "tiny.npz", "-o", tmp_path, "--jobs", 2) == 0
    one, two = ({f.name: f.read_text() for f in (folder / "cells").iterdir()}
                for folder in (grid, tmp_path))
    assert one == two


def test_every_arm_and_the_other_regime(copy, capsys):
    words = ["--sizes", 9, "--seeds", 1, "--steps", 3, "--vae-steps", 3, "--vae-data", "all",
             "--score", "validation", "--jobs", 1, "--arms", *compare.ARMS]
    assert run("compare", "-o", copy, *words) == 0
    facts = json.loads((copy / "compare.json").read_text())  # of the data set that vae.pt names
    assert [row["arm"] for row in facts["rows"]] == list(compare.ARMS)
    assert facts["settings"].items() >= dict(vae_data="all", score="validation").items()
    assert capsys.readouterr().out.count("inconclusive") >= len(compare.ARMS) - 1


def test_labels_reach_the_images_that_have_none():
    x, y = easy(300)
    recipe = dict(steps=4, vae_steps=120, latent_dim=2, amp=False)
    model = compare.train_vae(x, 0, recipe)
    few, many = (compare.Source(x[:12], y[:12], 3, 0, recipe, 0, model, others)
                 for others in ((), [x]))
    assert len(few.y) == 12 and len(many.y) == 312 and torch.equal(many.images[12:], x)
    assert (many.y[12:] == y).float().mean() > 0.9
    blurred = compare.Source(x[:12], torch.arange(12) % 5, 5, 0, recipe, 0, model, [x])
    assert len(blurred.y) == 12         # these labels mislead


def test_the_decoder_has_a_say_in_the_first_half_of_a_pool():
    x, y = easy(60)
    source = compare.Source(x, y, 3, 0, dict(steps=4, vae_steps=20, latent_dim=2, amp=False))
    (mixed, q), (decoded, same), (plain, _) = (
        source.pool(compare.Arm("between", pixels=p)) for p in (0.5, 0.0, 1.0))
    assert torch.equal(q, same) and len(mixed) == 256 and not torch.equal(decoded, plain)
    assert torch.equal(mixed, torch.cat([decoded[:128], plain[128:]]))


@pytest.mark.parametrize("channels", [1, 3])
def test_arms_that_are_cut_or_never_cut(channels):
    x, y = easy(60)
    source = compare.Source(x.expand(-1, channels, -1, -1).contiguous(), y, 3, 0,
                            dict(steps=4, vae_steps=20, latent_dim=2, amp=False))
    made = {arm: source.pool(compare.ARMS[arm])[0]
            for arm in ("real+hybrid", "never cut", "always cut", "augment+hybrid")}
    same = "always cut" if channels == 3 else "never cut"
    assert torch.equal(made["real+hybrid"], made[same])
    assert torch.equal(made["augment+hybrid"], made["never cut"])
    assert not torch.equal(made["always cut"], made["never cut"])


def test_mixup_and_cutmix_take_turns(monkeypatch):
    x, y = easy(30)
    calls = []
    for name in ("mixup", "cutmix"):
        monkeypatch.setattr(cnn, name, lambda x, q, g, name=name: (calls.append(name), (x, q))[1])
    recipe = dict(steps=6, width=4, weight_decay=0.05, amp=False)
    compare.train_cnn(compare.ARMS["mixup+cutmix"], x, y, 3, None, 0, recipe)
    assert calls == ["mixup", "cutmix"] * 3


def test_a_failing_arm_is_recorded_and_the_others_go_on(grid, tmp_path):
    same = dict(score="test", steps=8, width=4, vae_steps=8, latent_dim=4, amp=False)
    recipes = {n: dict(same, weight_decay=decay)
               for n, decay in ((12, 0.05), (30, 1e30))}     # the larger one cannot stay finite
    work = functools.partial(compare.run_cells, data=dataset(grid / "tiny.npz", tmp_path),
                             arms=["real", "latent posterior"], recipes=recipes, folder=tmp_path,
                             shared={})
    failed, = compare.run_grid([(30, 0), (12, 0)], work, 1, 1, lambda *progress: None)
    assert "n=30 subset 0: real" in failed and "not finite" in failed and "posterior" not in failed
    assert sorted(f.name.split("-")[0] for f in tmp_path.glob("*.json")) == ["12", "12", "30"]


# ---- a GPU for machines without one -----------------------------------------------------------

@contextlib.contextmanager
def pretend_gpu():
    """A device `gpu` that computes on the processor -> it, and a list of what made it wait.

    As with a real one, tensors and generators of two devices do not mix, and no .pt for other
    machines holds its tensors. A number, a copy, a shape that depends on data: each is a wait.
    The device stays, so this belongs into a process of its own.
    """
    import torch._dynamo                # both are to find the true torch.Generator
    import torch.distributed.tensor
    from torch.overrides import TorchFunctionMode
    from torch.utils import _pytree as tree
    from torch.utils import backend_registration
    from torch.utils._python_dispatch import TorchDispatchMode
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    backend_registration._setup_privateuseone_for_python_backend("gpu", module)
    aten, device, waits, true_generator = torch.ops.aten, torch.device("gpu:0"), [], torch.Generator

    class Gpu(torch.Tensor):
        @staticmethod
        def __new__(cls, true):
            self = torch.Tensor._make_wrapper_subclass(
                cls, true.shape, true.stride(), true.storage_offset(), dtype=true.dtype,
                device=device)
            self.true = true
            return self

        def tolist(self):
            waits.append("tolist")
            return self.true.tolist()

        @classmethod
        def __torch_dispatch__(cls, op, types, args=(), words=None):
            return compute(op, args, words or {})

    def true_of(it):
        return it.true if isinstance(it, Gpu) else torch.device("cpu") \
            if isinstance(it, torch.device) else it

    def compute(op, args, words):
        tensors = [v for v in tree.tree_leaves((args, words)) if isinstance(v, torch.Tensor)]
        ours = {id(v.true): v for v in tensors if isinstance(v, Gpu)}
        mixed = ours and any(v.dim() for v in tensors if not isinstance(v, Gpu))
        takes_rows = op in (aten.index.Tensor, aten.index_put_.default) and isinstance(args[0], Gpu)
        assert op is aten.copy_.default or takes_rows or not mixed, f"two devices in {op}"
        home = isinstance(args[0], Gpu) if op is aten.copy_.default else bool(ours) \
            if words.get("device") is None else torch.device(words["device"]).type == "gpu"
        if mixed or ours and not home or takes_rows and tensors[1].dtype == torch.bool or ours and \
                op in (aten._local_scalar_dense.default, aten.nonzero.default,
                       aten.bincount.default, aten._unique2.default, aten.masked_select.default):
            waits.append(str(op))
        out = op(*tree.tree_map(true_of, args), **tree.tree_map(true_of, words))
        return tree.tree_map_only(torch.Tensor, lambda v: ours[id(v)] if id(v) in ours else Gpu(v),
                                  out) if home else out

    class Compute(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), words=None):
            return compute(op, args, words or {})

    class Generator(true_generator):
        def __new__(cls, device="cpu"):
            self = super().__new__(cls)
            self.place = torch.device(device).type
            return self

    class SameDevice(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), words=None):
            out, g = function(*args, **words or {}), (words or {}).get("generator")
            assert not isinstance(g, Generator) or not isinstance(out, torch.Tensor) or \
                g.place == out.device.type, f"a generator of {g.place} in {function}"
            return out

    def copy_from(source, target, wait=False):
        true_of(target).copy_(true_of(source))
        return target

    def move(it, where):
        return tree.tree_map_only(torch.Tensor, lambda v: v.to(where), it)

    def write(path, content):
        left = any(isinstance(v, Gpu) for v in tree.tree_leaves(content))
        assert not left or path.name.endswith(".last.pt"), f"{path} holds tensors of the GPU"
        true_write(path, move(content, "cpu") if left else content)

    kernels = torch.library.Library("aten", "IMPL")     # what Python's brackets ask for
    kernels.impl("_copy_from", copy_from, "PrivateUse1")
    for name in ("empty_strided", "empty.memory_format"):
        make = getattr(aten, name.split(".")[0])
        kernels.impl(name, lambda *args, make=make, dtype=None, **words:
                     Gpu(make(*args, dtype=dtype)), "PrivateUse1")
    true_read, true_write, true_start = common.read, common.write, common.start
    common.read = lambda path, device="cpu": move(true_read(path), device)
    common.write, common.start = write, lambda args: (true_start(args), (device, False))[1]
    torch.Generator = Generator
    torch.__future__.set_swap_module_params_on_conversion(True)
    with Compute(), SameDevice():
        yield device, waits


def on_the_gpu(folder):
    """Every script runs on the device; a round of training waits once, however many its steps."""
    with pretend_gpu() as (device, waits):
        for refused in (lambda: torch.ones(2, device=device) + torch.ones(2),
                        lambda: torch.rand(2, generator=torch.Generator(device)),
                        lambda: torch.ones(2, device=device).numpy()):
            with pytest.raises((AssertionError, RuntimeError)):
                refused()
        data = npz(Path(folder, "tiny.npz"))
        few = ["--sizes", 12, "--seeds", 1, "--steps", 3, "--vae-steps", 3, "--width", 4, "--arms"]
        for words in (["vae", "--dataset", data, "--steps", 4], ["latent"],
                      *(["hybrids", "--count", 40, "--strategy", s] for s in hybrids.STRATEGIES),
                      ["cnn", "--steps", 4, "--augment", "--mixup", 0.5, "--cutmix", 1],
                      ["compare", *few, *compare.ARMS],
                      ["compare", *few, "real+hybrid", "--vae-data", "all"]):
            assert run(*words, "-o", folder) == 0
        x, y = (v.to(device) for v in easy(60))
        real, g = (x, F.one_hot(y, 3).float()), torch.Generator(device)
        for module, batch, model in (
                (vae, vae.batches(x, 8), vae.VAE(1, 16, 16, 4)),
                (cnn, cnn.batches(real, 8, real, cnn.mixup, transforms=[cnn.augment]),
                 cnn.CNN(1, 3, 4, 16))):
            model, counts = model.to(device), []
            for steps in (2, 12):
                waits.clear()
                list(module.fit(model, batch, steps=steps, rounds=1, generator=g))
                counts.append(len(waits))
            assert counts == [1, 1], (module, waits)
        assert cnn.augment(x.float().repeat(1, 3, 1, 1), None, g)[0].device == device   # in colour
        model = vae.VAE(1, 16, 16, 4).to(device)
        posterior = latent.teach(*vae.encode_all(model, x), y, 3)
        mixer = hybrids.HybridMixer(model.encode, model.decode, posterior, generator=g)
        assert all(v.device == device for v in mixer(x.float() / 255, y))
        assert hybrids.rectangles(torch.rand(5, device=device), 8, 9, g).device == device


@pytest.mark.skipif(not hasattr(torch.utils.backend_registration,
                                "_setup_privateuseone_for_python_backend"),
                    reason="this torch has no devices in Python")
def test_everything_runs_on_a_gpu_and_a_round_waits_once(tmp_path):
    code = f"import test_all; test_all.on_the_gpu({str(tmp_path)!r})"
    done = shell(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_chain_on_a_true_gpu_and_its_files_without(tree, tmp_path, device="cuda"):
    there = f"import torch; torch.ones(1, device='{device}')"
    if subprocess.run([sys.executable, "-c", there], env=SEEN, capture_output=True).returncode:
        pytest.skip("there is no GPU that torch can use")
    out, grid = tmp_path / "run", "COMPARE_FLAGS=--vae-steps 20 --jobs 2"
    words = ["make", "quick", f"PYTHON={sys.executable}", f"OUT={out}", f"DEVICE={device}", grid]
    done = subprocess.run(words, cwd=tree, env=SEEN, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((out / "compare.json").read_text())["rows"]) == 6
    assert run("latent", "-o", out) == run("hybrids", "-o", out) == 0   # on the processor


@pytest.mark.parametrize("device, cards, backend", [
    ("cuda", 2, "nccl"), ("cuda", 1, "gloo"), ("cpu", 2, "gloo")])
def test_ranks_without_a_card_each_talk_through_gloo(monkeypatch, device, cards, backend):
    chosen, make = [], torch.Generator
    monkeypatch.setattr(common, "RANKS", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch, "Generator", lambda device: make())
    monkeypatch.setattr(torch.distributed, "init_process_group", chosen.append)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
    args = vae.parse_args(["--batch-size", "8"])
    assert vae.distribute(None, args, torch.device(device))[1] == 4 and chosen == [backend]


def test_a_gpu_that_torch_has_no_code_for(capsys):
    def command(args):
        raise RuntimeError(f"CUDA error: {args.out}")
    args = vae.parse_args(["-o", "no kernel image is available for execution on the device"])
    assert common.guard(command, args) == 2
    assert "no code for this GPU; use --device cpu" in capsys.readouterr().err
    args.out = "any other"
    with pytest.raises(RuntimeError, match="any other"):
        common.guard(command, args)


# ---- mistakes ---------------------------------------------------------------------------------

class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bad(o, **changes):
    return ["--steps", 3, "--dataset", npz(o / "bad.npz", **changes)]


def rewrite(path, **changes):
    torch.save(read(path) | changes, path)


def folder(o, *classes):
    for name in ("", *classes):
        (o / "folder" / name).mkdir()
    return ["--dataset", o / "folder"]


def torn(root):
    os.truncate(zoo(root) / "bird/0.jpg", 200)
    return ["--dataset", root]


ABSENT = "mps" if torch.cuda.is_available() else "cuda"
NAN = np.where(np.arange(200 * 256) == 777, math.nan, 0.5).reshape(200, 16, 16)
THIRDS, ZEROS = (lambda n: np.arange(n) % 3), (lambda n: np.zeros(n, int))
# name: the script, what spoils a finished folder `o` and gives words, what the line must say.
MISTAKES = {
    "near miss": ("vae", lambda o: ["--dataset", "mnits"], "did you mean mnist"),
    "no near miss": ("vae", lambda o: ["--dataset", "xyzzy"], "glyphs mnist"),
    "no npz": ("vae", lambda o: ["--dataset", "gone.npz"], r"gone\.npz.*savez"),
    "no key": ("vae", lambda o: bad(o, y_test=None), "y_test.*savez"),
    "NaN": ("vae", lambda o: bad(o, x_train=NAN), "NaN"),
    "one class": ("vae", lambda o: bad(o, y_train=ZEROS(200), y_test=ZEROS(60)), "one class"),
    "test labels": ("vae", lambda o: bad(o, y_test=np.arange(60)), "not in training"),
    "one-hot": ("vae", lambda o: bad(o, y_train=np.eye(3)[THIRDS(200)]), "label"),
    "halves": ("vae", lambda o: bad(o, y_train=THIRDS(200) + 0.5, y_test=THIRDS(60)), "label"),
    "NaN label": ("vae", lambda o: bad(o, y_train=np.full(200, math.nan)), "label"),
    "few labels": ("vae", lambda o: bad(o, y_train=THIRDS(9)), "differ in number"),
    "one name": ("vae", lambda o: bad(o, classes=np.array(["a"])), "1 names"),
    "4 names": ("vae", lambda o: bad(o, y_train=THIRDS(200) + 5, y_test=THIRDS(60) + 5,
                                     classes=np.array(list("abcd"))), "4 names"),
    "shape": ("vae", lambda o: bad(o, x_train=np.zeros((200, 9))), "shape"),
    "no images": ("vae", lambda o: bad(o, x_train=np.zeros((0, 16, 16), "u1"), y_train=ZEROS(0)),
                  "no images"),
    "one image a class": ("vae", lambda o: bad(o, x_train=GREY[:3], y_train=THIRDS(3)), "valid"),
    "not an npz": ("vae", lambda o: shutil.copy(o / "vae.json", o / "a.npz") and
                   ["--dataset", o / "a.npz"], "a.npz.*savez"),
    "torn JPEG": ("vae", lambda o: torn(o / "zoo"), r"0\.jpg cannot be read"),
    "empty folder": ("vae", lambda o: folder(o), "subfolder"),
    "empty class": ("vae", lambda o: folder(o, "cat"), "cat"),
    "only test/": ("vae", lambda o: folder(o, "cat", "test", "test/cat"), "no train/"),
    "more than memory": ("vae", lambda o: [*bad(o), "--batch-size", 10 ** 12], "out of memory"),
    "too many": ("vae", lambda o: [*bad(o), "--images", 181], "181 images"),
    "too large a size": ("compare", lambda o: ["--sizes", 9999], "9999 images"),
    "no such device": ("vae", lambda o: ["--device", ABSENT], f"--device {ABSENT}"),
    "out is a file": ("vae", lambda o: ["-o", o / "vae.pt"], "is a file"),
    "out in a file": ("vae", lambda o: ["-o", o / "vae.pt" / "x"], "vae.pt"),
    "truncated": ("latent", lambda o: os.truncate(o / "vae.pt", 500), "damaged.* make "),
    "emptied": ("hybrids", lambda o: os.truncate(o / "latent.pt", 0), "damaged.* python latent.py"),
    "wrong kind": ("latent", lambda o: shutil.copy(o / "cnn.pt", o / "vae.pt") and [], "cnn"),
    "newer format": ("latent", lambda o: rewrite(o / "vae.pt", format=99), "99.* make "),
    "not ours": ("latent", lambda o: torch.save([1], o / "vae.pt"), "damaged"),
    "payload": ("latent", lambda o: torch.save(Payload(o / "harm"), o / "vae.pt"), "damaged"),
    "another vae": ("hybrids", lambda o: rewrite(o / "vae.pt", x=1), "latent.pt was made from an"),
    "older hybrids": ("cnn", lambda o: rewrite(o / "vae.pt", x=1), "hybrids.pt was made from an"),
    "other images": ("latent", lambda o: bad(o, y_train=THIRDS(200)[::-1])[2:],
                     "other images.* make "),
    "short point": ("latent", lambda o: ["--point", "1,2"], "4 finite numbers"),
    "point of words": ("latent", lambda o: ["--point", "1,a,2,3"], "numbers"),
    "point of NaN": ("latent", lambda o: ["--point", "1,nan,2,3"], "finite"),
    "no picture": ("latent", lambda o: ["--image", o / "no.png"], r"no\.png"),
    "no path": ("cnn", lambda o: ["--predict", o / "nothing"], "nothing"),
    "no pictures": ("cnn", lambda o: ["--predict", folder(o)[1]], "no images"),
    "export to a file": ("hybrids", lambda o: ["--count", 9, "--export", o / "vae.pt"], "vae.pt"),
}


def mistake(capsys, script, *words):
    """The one line that a mistake ends in."""
    assert run(script, *words) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}.py: ")
    return line


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(copy, capsys, name):
    script, spoil, pattern = MISTAKES[name]
    line = mistake(capsys, script, "-o", copy, *(spoil(copy) or []))
    assert re.search(pattern, line), line
    assert not (copy / "harm").exists() and not unfinished(copy)


@pytest.mark.parametrize("script, missing", [
    ("latent", "vae"), ("hybrids", "vae"), ("hybrids", "latent"), ("cnn", "vae"),
    ("cnn", "hybrids")])
def test_what_is_missing_comes_with_the_command_that_makes_it(copy, capsys, script, missing):
    (copy / f"{missing}.pt").unlink()
    line = mistake(capsys, script, "-o", copy)
    command = shlex.split(re.search(r"not found; make it with: (.*)$", line)[1])
    if missing == "vae":
        planned = shell(*command, "-n", "PYTHON=python")
        assert planned.returncode == 0 and "python vae.py" in planned.stdout
        assert str(copy) in planned.stdout
    else:                                # make might train another VAE, with other flags
        kept = (copy / "vae.pt").read_bytes()
        assert command[:2] == ["python", f"{missing}.py"] and run(missing, *command[2:]) == 0
        assert (copy / f"{missing}.pt").exists() and (copy / "vae.pt").read_bytes() == kept


@pytest.mark.parametrize("words", [
    "vae --steps 0", "vae --steps 1.5", "vae --lr nan", "vae --lr -1", "vae --beta inf",
    "vae --latent-dim 0", "vae --batch-size -3", "vae --seed -1", "vae --seed 99999999999999999999",
    "vae --image-size 8",
    "vae --device tpu", "vae --threads 0", "vae --nosuch", "latent --codes 1",
    "hybrids --count 0", "hybrids --strategy nowhere",
    "hybrids --strategy prior --label product", "cnn --hybrid-fraction 2",
    "cnn --hybrid-fraction 1 0 0", "cnn --mixup nan",
    "cnn --cutmix -1", "cnn --width 0", "cnn --batch-size 1", "compare --sizes 1",
    "compare --seeds 0", "compare --arms nosuch", "compare --weight-decay inf", "compare --jobs 0"])
def test_flags_out_of_range(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words.split())
    assert re.search(rf"\A{words.split()[0]}\.py: [^\n]+\n\Z", capsys.readouterr().err)


# ---- bad machines -----------------------------------------------------------------------------

STEMS = {"vae": ["--steps", 3, "--latent-dim", 4], "latent": [], "hybrids": ["--count", 90],
         "cnn": ["--steps", 3, "--width", 8], "compare": ["--sizes", 12, "--seeds", 1, "--steps", 3,
                                                         "--vae-steps", 3, "--jobs", 1]}


@pytest.mark.parametrize("most", [0, 500, 20_000])
@pytest.mark.parametrize("script", STEMS)
def test_a_full_disk_leaves_no_half_of_a_file(copy, capsys, script, most):
    """No file may grow beyond `most` bytes: writing fails as it does where no space is left."""
    resource = pytest.importorskip("resource")
    stem = copy / f"{script}.{'json' if script == 'compare' else 'pt'}"
    before = {f: f.read_bytes() for f in copy.glob("*.pt") if f != stem}
    stem.unlink(missing_ok=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        line = mistake(capsys, script, "-o", copy, *STEMS[script])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "large" in line and not stem.exists() and not [*copy.rglob("*.tmp")]
    assert all(f.read_bytes() == content for f, content in before.items())
    assert run(script, "-o", copy, *STEMS[script]) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write here")
def test_a_folder_that_is_read_only(copy, capsys):
    os.chmod(copy, 0o555)
    assert "Permission denied" in mistake(capsys, "hybrids", "-o", copy)
    assert run("latent", "-o", copy, "--point=0,0,0,0") == 0              # reading is free
    os.chmod(copy, 0o755)


def test_two_runs_in_one_folder(copy, capsys):
    fcntl = pytest.importorskip("fcntl")
    with (copy / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another run works in" in mistake(capsys, "vae", "-o", copy)
        assert run("latent", "-o", copy, "--point=0,0,0,0") == 0          # reading is free
    assert run("hybrids", "-o", copy, "--count", 9) == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to look into")
def test_workers_do_not_outlive_their_parent(grid, tmp_path):
    words = [*GRID[1:], "--dataset", grid / "tiny.npz", "-o", tmp_path, "--jobs", 2]
    words += ["--steps", 5000]
    parent = subprocess.Popen([sys.executable, str(HERE / "compare.py"), *map(str, words)], env=ENV,
                              stderr=subprocess.DEVNULL)
    children = lambda: shell("pgrep", "-P", parent.pid, "-f", "spawn_main").stdout.split()
    deadline = time.monotonic() + 60
    while len(workers := children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2 and time.monotonic() < deadline


def test_other_test_images_make_other_cells(grid, tmp_path):
    out = Path(shutil.copytree(grid, tmp_path / "grid"))
    x = easy(60, seed=5)[0][:, 0].numpy()
    words = [*GRID, "--dataset", npz(tmp_path / "tiny.npz", x_test=x), "-o", out, "--jobs", 1]
    assert run(*words) == 0 and len(list((out / "cells").iterdir())) == 16


def test_a_data_set_that_does_not_fit_in_memory_is_refused():
    with pytest.raises(common.Mistake, match=r"photos needs \d+\.\d GiB of memory, and this"):
        common.need_memory(2 ** 62, "photos")
    common.need_memory(1, "a byte")


def test_every_changed_bit_is_found(chain, tmp_path):
    """200 seeded mutations: refused in one line, or without any effect."""
    def contents(v):
        return v.tolist() if isinstance(v, torch.Tensor) else v
    g, refused = np.random.default_rng(0), 0
    args = vae.parse_args(["-o", str(tmp_path), "--dataset", str(tmp_path / "tiny.npz")])
    files = [chain / f"{kind}.pt" for kind in STEPS] + [chain.parent / "tiny.npz"]
    def content(folder, file):
        if file.suffix == ".npz":
            data = dataset(folder / file.name, tmp_path)
            return [contents(v) for v in (data.images, data.labels, data.test_images)]
        args.out = folder
        return str(common.load(args, file.stem))
    torch.set_printoptions(threshold=10 ** 9, precision=10)
    truth = {file: content(file.parent, file) for file in files}
    for k in range(200):
        file = files[k % len(files)]
        damaged = bytearray(file.read_bytes())
        if k % 4 == 3:
            del damaged[g.integers(len(damaged)):]
        else:
            damaged[g.integers(len(damaged))] ^= 1 << g.integers(8)
        (tmp_path / file.name).write_bytes(damaged)
        try:
            assert content(tmp_path, file) == truth[file], (k, file)
        except common.Mistake as line:
            refused += 1
            assert file.name in str(line)
        (tmp_path / file.name).unlink()
    torch.set_printoptions(profile="default")
    assert refused > 150


def test_changed_cells_are_computed_again(grid, tmp_path):
    out, g = Path(shutil.copytree(grid, tmp_path / "grid")), np.random.default_rng(0)
    for file in (out / "cells").iterdir():
        damaged = bytearray(file.read_bytes())
        damaged[g.integers(len(damaged))] ^= 1 << g.integers(7)
        file.write_bytes(damaged)
    assert run(*GRID, "--dataset", grid / "tiny.npz", "-o", out, "--jobs", 1) == 0
    assert (out / "compare.csv").read_text() == (grid / "compare.csv").read_text()


def torchrun(ranks, script, *words, **env):
    """-> the process; its ranks log below nothing, and see one processor thread each."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             f"--nproc-per-node={ranks}", str(script), *map(str, words)],
                            env=ENV | env, cwd=HERE, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def test_ranks_share_the_cells_and_gather_makes_the_result(grid, tmp_path):
    words = [*GRID[1:], "--dataset", grid / "tiny.npz", "-o", tmp_path, "--threads", 1, "--quiet"]
    said, _ = (process := torchrun(2, HERE / "compare.py", *words)).communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("has finished") == 2 and not (tmp_path / "compare.json").exists()
    assert run("compare", *words[:-3], "--gather") == 0
    assert (tmp_path / "compare.csv").read_text() == (grid / "compare.csv").read_text()


@slow
def test_a_dead_rank_costs_its_cells_only(grid, tmp_path, capsys):
    words = [*GRID[1:], "--seeds", 4, "--dataset", grid / "tiny.npz", "-o", tmp_path]
    words += ["--steps", 60]
    process = torchrun(3, HERE / "compare.py", *words, "--threads", 1, "--quiet")
    while process.poll() is None and not list(tmp_path.glob("cells/*.json")):
        time.sleep(0.05)
    ranks = shell("pgrep", "-f", f"compare.py.*{tmp_path}").stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)              # torchrun, the first of them, sees to it
    assert process.wait(timeout=60) != 0
    kept = {f: f.read_bytes() for f in tmp_path.glob("cells/*.json")}
    assert run("compare", *words, "--gather") == 2 and kept
    assert "subsets are incomplete" in capsys.readouterr().err
    assert torchrun(3, HERE / "compare.py", *words, "--threads", 1).wait(timeout=300) == 0
    assert run("compare", *words, "--gather") == 0
    assert all(f.read_bytes() == content for f, content in kept.items())
    assert len(json.loads((tmp_path / "compare.json").read_text())["rows"]) == 16


WATCHED = """
import importlib, os, sys
import torch
name, kind, where = sys.argv[1:4]
module = importlib.import_module(name)
made, plain = [], getattr(module, kind)
setattr(module, kind, type(kind, (plain,), {"__init__": lambda self, *a, **k: (
    plain.__init__(self, *a, **k), made.append(self))[0]}))
code = module.main(sys.argv[4:])
torch.save(made[0].state_dict(), f"{where}/rank{os.environ['RANK']}.pt")
sys.exit(code)
"""


@slow
@pytest.mark.parametrize("name, kind", [("vae", "VAE"), ("cnn", "CNN")])
def test_two_ranks_train_one_model(copy, tmp_path, name, kind):
    (tmp_path / "watched.py").write_text(WATCHED)
    npz(copy.parent / "tiny.npz")
    process = torchrun(2, tmp_path / "watched.py", name, kind, tmp_path, "-o", copy, "--steps", 40,
                       "--dataset", copy.parent / "tiny.npz", "--threads", 1, "--quiet",
                       PYTHONPATH=str(HERE))
    before = read(copy / f"{name}.pt")["metrics"]
    assert process.wait(timeout=200) == 0
    one, two = read(tmp_path / "rank0.pt"), read(tmp_path / "rank1.pt")
    saved = read(copy / f"{name}.pt")
    weights = [key for key in one if "running" not in key and "tracked" not in key]
    assert same({k: one[k] for k in weights}, {k: two[k] for k in weights})
    assert same(one, saved["model"])
    if name == "vae":
        after = saved["metrics"]["test"]["negative_elbo"]
        assert after < 1.1 * before["test"]["negative_elbo"]
    else:
        assert saved["metrics"]["accuracy"] > before["accuracy"] - 0.05


def test_pictures_as_people_have_them(tmp_path):
    level = lambda array: array.reshape(len(array), -1).mean(1).round()
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "ein Löwe 🦁.png")
    assert level(common.read_image(tmp_path / "ein Löwe 🦁.png", 16)).tolist() == [10, 20, 30]
    upright = Image.new("L", (40, 40))
    upright.paste(255, (0, 0, 40, 20))                       # light above, dark below
    exif = Image.Exif()
    exif[0x0112] = 6                                         # stored lying on its side
    upright.rotate(90).save(tmp_path / "turned.jpg", exif=exif)
    read_back = common.read_image(tmp_path / "turned.jpg", 16, grey=True)[0]
    assert read_back[:6].min() > 240 and read_back[-6:].max() < 15
    Image.new("RGB", (8000, 8000), (200, 100, 50)).save(tmp_path / "large.jpg")
    assert np.abs(level(common.read_image(tmp_path / "large.jpg", 32)) - [200, 100, 50]).max() < 3


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("L", (1, 1)).save(tmp_path / "bomb.png")
    bomb = bytearray((tmp_path / "bomb.png").read_bytes())   # its header now says 10^10 pixels
    bomb[16:24] = struct.pack(">II", 10 ** 5, 10 ** 5)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "bomb.png").write_bytes(bomb)
    for name in ("empty", "text", "bomb"):
        with pytest.raises(common.Mistake, match=f"{name}.png cannot be read as an image"):
            common.read_image(tmp_path / f"{name}.png", 32)


def test_a_torchvision_of_another_build(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "pip install" in mistake(capsys, "vae", "--dataset", "mnist", "-o", tmp_path)


def test_no_network(tmp_path, capsys, monkeypatch):
    from torchvision import datasets

    def offline(*words, **more):
        raise RuntimeError("no route to host")
    monkeypatch.setattr(datasets, "KMNIST", offline)
    offline.__name__ = "KMNIST"
    assert run("vae", "--dataset", "kmnist", "-o", tmp_path, "--data-dir", tmp_path) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "downloading it" in said[0]
    assert re.search(r"no route to host.*put its files into .*KMNIST.*--dataset glyphs", said[1])


def test_no_fonts(tmp_path, capsys, monkeypatch):
    import matplotlib
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    assert "DejaVuSans.ttf" in mistake(capsys, "vae", "-o", tmp_path)


def test_a_collapsed_vae_is_said(tmp_path, capsys):
    assert run("vae", "--dataset", npz(tmp_path / "tiny.npz"), "-o", tmp_path, "--steps", 20,
               "--beta", 1000) == 0
    assert "collapsed" in capsys.readouterr().out

# ---- the make chain ---------------------------------------------------------------------------

@pytest.fixture
def tree(tmp_path):
    """The project, as somebody else has it."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for file in [*HERE.glob("*.py"), HERE / "Makefile", HERE / "requirements.txt"]:
        shutil.copy(file, folder)
    return folder


def make(tree, *words):
    done = shell("make", *words, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_says_the_five_commands(tree):
    said = make(tree, "-n", "all", "PYTHON=python", "DATASET=mnist", "SIZES=50 60")
    lines = [line for line in said.splitlines() if line.startswith("python ")]
    assert [line.split()[1] for line in lines] == [f"{name}.py" for name in SCRIPTS]
    assert all("-o runs/mnist" in line for line in lines) and "--sizes 50 60" in lines[-1]
    for word in ("all", "quick", "test", "clean", *VARIABLES):
        assert re.search(rf"\b{word}\b", make(tree, "help", "PYTHON=python")), word


def test_make_quick_and_then_nothing(tree, tmp_path):
    words = ["quick", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}",
             f"DATASET={npz(tmp_path / 'tiny.npz', 500)}"]
    said = make(tree, *words)
    assert all(f" {name}.py " in said for name in SCRIPTS)
    for name, end in [*itertools.product(STEPS, ("pt", "json", "png")), *itertools.product(
            ["compare"], ("json", "csv", "png"))]:
        assert (tmp_path / "out" / f"{name}.{end}").exists()
    assert Image.open(tmp_path / "out/summary.png").width > 1000
    assert ".py" not in make(tree, *words)


def test_the_snippets_of_the_readme_run(copy, tmp_path):
    shutil.copytree(copy, tmp_path / "runs" / "glyphs", dirs_exist_ok=True)
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        done = shell(sys.executable, "-B", "-c", snippet, cwd=tmp_path, PYTHONPATH=str(HERE))
        assert done.returncode == 0, done.stderr


STAND_IN = """#!/bin/sh
# In python's place: notes which script was called, and leaves its stem file.
echo "$1" >> called
stem=${1%.py} end=pt
[ $stem = compare ] && end=json
while [ "$1" != -o ]; do shift; done
touch "$2/$stem.$end"
"""


def test_make_repeats_what_changed_and_no_more(tree):
    (tree / "stand-in").write_text(STAND_IN)
    (tree / "stand-in").chmod(0o755)

    def made(*words):
        (tree / "called").write_text("")
        make(tree, "all", "PYTHON=./stand-in", *words)
        return (tree / "called").read_text().replace(".py", "").split()

    assert made() == list(SCRIPTS) and made() == []
    assert made("STEPS=7") == list(SCRIPTS) and made("STEPS=7") == []
    assert made("STEPS=7", "SIZES=50") == ["compare"]
    for file, wanted in (("latent.py", ["latent", "hybrids", "cnn", "compare"]),
                         ("cnn.py", ["cnn", "compare"]), ("common.py", [])):
        (tree / file).touch()
        assert made("STEPS=7", "SIZES=50") == wanted
    (tree / "runs/glyphs/hybrids.pt").unlink()
    assert made("STEPS=7", "SIZES=50", "-j2") == ["hybrids", "cnn", "compare"]


def test_make_clean_removes_runs_and_nothing_else(tree):
    for folder in ("runs/glyphs/cells", "data/MNIST", "elsewhere"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "file.pt").write_text("x")
    others = lambda: {f for f in tree.rglob("*") if "runs" not in f.relative_to(tree).parts}
    before = others()
    make(tree, "clean", "OUT=elsewhere", "DATA=data")
    assert others() == before and not list(tree.glob("runs/*"))


# ---- killed anywhere --------------------------------------------------------------------------

def findings(out):
    """Everything that a run states: tensors, metrics, the table; not when, nor from which file."""
    found = {kind: {k: v for k, v in read(out / f"{kind}.pt").items() if k != "made_from"}
             for kind in STEPS}
    return str(found) + (out / "compare.csv").read_text()


@slow
def test_make_quick_killed_at_20_random_moments(tree, tmp_path):
    """kill -9 and Ctrl-C in turn, again and again until it is through: the result is the same."""
    torch.set_printoptions(threshold=10 ** 9, precision=10)
    command = ["make", "quick", f"PYTHON={sys.executable}",
               f"DATASET={npz(tmp_path / 'tiny.npz', 500)}"]
    make(tree, *command[1:], f"OUT={tmp_path / 'straight'}")
    wanted, moments, killed = findings(tmp_path / "straight"), np.random.default_rng(0), 0
    while killed < 20:
        out = tmp_path / f"out{killed}"
        while True:
            process = subprocess.Popen([*command, f"OUT={out}"], cwd=tree, env=ENV,
                                       start_new_session=True, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            try:
                assert process.wait(timeout=moments.uniform(0, 12)) == 0
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL if killed % 2 else signal.SIGINT)
                process.wait()
                killed += 1
        assert findings(out).replace(str(out), "") == wanted.replace(str(tmp_path / "straight"), "")
        assert not unfinished(out)
    torch.set_printoptions(profile="default")


@slow
@pytest.mark.skipif(not (REAL_DATA / "MNIST").is_dir(), reason="no MNIST in ../shared/data")
def test_the_mnist_chain_stays_below_2_and_a_half_gigabytes(tree, tmp_path):
    resource = pytest.importorskip("resource")
    make(tree, "all", f"PYTHON={sys.executable}", "DATASET=mnist", f"DATA={REAL_DATA}",
         f"OUT={tmp_path}", "STEPS=20", "SIZES=100 3000", "SEEDS=2", "COMPARE_FLAGS=--vae-steps 20")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2.5 * 2 ** 20       # KiB


# ---- make bench: no test; times, and what they bought ------------------------------------------

def bench_data():
    return str(REAL_DATA) if (REAL_DATA / "MNIST").is_dir() else "data"


def plain_loop(model, loss_of, batch, steps=60):
    """Images a second of the same model in float32, contiguous, fed by a DataLoader."""
    from torchvision import datasets, transforms
    device = next(model.parameters()).device
    loader = torch.utils.data.DataLoader(
        datasets.MNIST(bench_data(), transform=transforms.ToTensor()), batch, shuffle=True)
    optimiser = torch.optim.AdamW(model.parameters())
    for step, (x, y) in enumerate(itertools.islice(loader, 3 + steps)):
        start = time.perf_counter() if step < 4 else start      # the first three load libraries
        optimiser.zero_grad()
        (loss := loss_of(x.to(device), y.to(device))).backward()
        optimiser.step()
    loss.item()                             # a GPU is still at work otherwise
    return steps * batch / (time.perf_counter() - start)


def bench(width=16, cnn_steps=420, cnn_lr=2e-2, cnn_batch=48, vae_steps=1150, vae_lr=5e-3,
          vae_batch=64, momentum=0.7):
    """Train on all of MNIST as long as it takes; print a table and write assets/bench.json."""
    threads, rows = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())), []
    args = vae.parse_args(["--dataset", "mnist", "--data-dir", bench_data(), "-o", "runs/bench",
                           "--threads", str(threads)])
    device, amp = common.start(args)
    data, generator = common.load_dataset(args, device), torch.Generator(device)

    def note(work, quality, images, run, plain=None):
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        rows.append({"work": work, "quality": quality(), "seconds": round(seconds, 2),
                     "images_per_second": round(images / seconds),
                     "to_plain_loop": plain and round(images / seconds / plain, 1)})
        print("{work:46}{quality:>16}{seconds:9.2f} s{images_per_second:10,} images/s".format(
            **rows[-1]), f"  {rows[-1]['to_plain_loop']} times the plain loop" * bool(plain))

    def fit(module, model, batches, steps, lr, **more):
        for _ in module.fit(model, batches, steps=steps, lr=lr, rounds=1, amp=amp,
                            generator=generator.manual_seed(0), **more):
            pass

    torch.manual_seed(0)
    plain, model = cnn.CNN(1, 10, width).to(device), cnn.CNN(1, 10, width).to(
        device, memory_format=torch.channels_last)
    real = data.images, F.one_hot(data.labels, 10).float()
    right = lambda: cnn.predict(model, data.test_images, amp).argmax(1) == data.test_labels
    note(f"CNN of width {width}, {cnn_steps:,} steps of {cnn_batch}",
         lambda: f"{100 * right().float().mean().item():.2f}% on test",
        cnn_batch * cnn_steps, lambda: fit(
            cnn, model, cnn.batches(real, cnn_batch), cnn_steps, cnn_lr),
        plain_loop(plain, lambda x, y: F.cross_entropy(plain(x), y), cnn_batch))
    flat, model = vae.VAE(1, 28, 28).to(device), vae.VAE(1, 28, 28).to(
        device, memory_format=torch.channels_last)
    elbo = lambda: vae.evaluate(model, data.test_images, amp=amp,
                                generator=generator.manual_seed(1))
    note(f"VAE, {vae_steps:,} steps of {vae_batch}",
         lambda: f"{elbo()['negative_elbo']:.1f} nats on test",
        vae_batch * vae_steps, lambda: fit(
            vae, model, vae.batches(data.images, vae_batch), vae_steps, vae_lr, momentum=momentum),
        plain_loop(flat, lambda x, y: sum(vae.elbo_terms((out := flat(x))[0], x, *out[1:])),
                   vae_batch))

    def percentages():
        mu, logvar = vae.encode_all(model, data.images, amp)
        few = latent.subsample(len(mu), 20_000)
        latent.Aggregate.fit(mu[few], logvar[few], data.labels[few], 10)(mu).sum().item()    # waits
    note("60,000 images: codes and percentages", lambda: "", 60_000, percentages)
    common.write(HERE / "assets" / "bench.json", {
        "command": "make bench", "device": device.type, "threads": threads, "bfloat16": amp,
        "machine": platform.machine(), "python": platform.python_version(),
        "torch": str(torch.__version__), "rows": rows})


if __name__ == "__main__":
    bench()
