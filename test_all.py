"""Tests: maths against oracles, what reaches the trainings, every command line and mistake.

    python -m pytest -q test_all.py

In this order: percentages and hybrids; augmentations, deformations, scores, training; data
sets and pictures; the scripts, the comparison, ranks, make, the pages; features. The maths is
held against torch.distributions, closed forms and brute force, never against itself.
"""
import csv
import doctest
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributions as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

import cnn
import common
import compare
import deform
import hybrids
import latent
import vae

HERE = Path(__file__).resolve().parent
SCRIPTS = {"deform": deform, "vae": vae, "latent": latent, "hybrids": hybrids, "cnn": cnn,
           "compare": compare}
STEPS = ["deform", "vae", "latent", "hybrids", "cnn"]   # those of the chain that leave a .pt
ANIMALS = ["cat", "dog", "eel"]
VARIABLES = ("DATASET DATA OUT SIZES SEEDS SEED STEPS IMAGES IMAGE_SIZE LABELS LABELS_FROM "
             "DEVICE PYTHON PIP_ARGS PYTHONPATH MFLAGS").split()
# What `make test` itself was told must not reach the processes that the tests start.
ENV = {key: value for key, value in os.environ.items()
       if key not in VARIABLES and not key.startswith("MAKE")}
# Only processors repeat a result exactly.
ENV |= {"OMP_NUM_THREADS": "1", "COLUMNS": "1000", "CUDA_VISIBLE_DEVICES": ""}
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)        # ignored in the background
OTHER_AMP = "--no-amp" if common.bfloat16_is_fast(torch.device("cpu")) else "--amp"
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow; make test-slow runs it")
approx = pytest.approx
close = torch.testing.assert_close


# ---- what the tests are made of -------------------------------------------------------------

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def codes(n, dim, classes=3, seed=0):
    """Codes mu, logvar (n,dim) about a centre a class; labels y (n,), in unequal numbers."""
    g = seeded(seed)
    y = (torch.rand(n, generator=g) ** 2 * classes).long()
    y[:classes] = torch.arange(classes)
    centres = 2 * torch.randn(classes, dim, generator=g)
    # The noise is drawn after the centres.
    mu = centres[y] + torch.randn(n, dim, generator=g)
    logvar = torch.rand(n, dim, generator=g) * 2 - 3
    return mu, logvar, y


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
        arrays[f"x_{part}"] = x[:, 0].numpy()
        arrays[f"y_{part}"] = y.numpy()
    arrays.update(changes)
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


def with_loose(path, count=90, **changes):
    """A tiny data set file that has images without a label as well."""
    x, _ = easy(count, seed=9)
    return npz(path, x_unlabelled=x[:, 0].numpy(), **changes)


RGB = easy(200, channels=3)[0].numpy()
GREY = RGB[:, :1]


def run(script, *words):
    """A script's main, in this process -> its exit code."""
    return SCRIPTS[script].main([str(word) for word in (*words, "--threads", 1, "--quiet")])


def mistake(capsys, script, *words, says="", remarks=False):
    """The one line that a mistake ends in and what it says; `remarks` may stand above it."""
    assert run(script, *words) == 2
    *above, line = capsys.readouterr().err.splitlines()
    assert remarks or not above
    assert line.startswith(f"{script}.py: ")
    assert re.search(says, line), line
    return line


def shell(*words, cwd=HERE, **env):
    return subprocess.run([str(word) for word in words], cwd=cwd, env={**ENV, **env},
                          text=True, capture_output=True)


def opened(script, *words):
    """-> the run that these words start, and its data set."""
    args = SCRIPTS[script].parse_args([*map(str, words), "--threads", "1", "--quiet"])
    started = common.start(args)
    try:
        return started, common.load_dataset(started)
    finally:
        started.release()


def dataset(spec, out, *words):
    """A data set as the scripts load it."""
    return opened("vae", "--dataset", spec, "-o", out, *words)[1]


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def unfinished(folder):
    return [file for file in folder.rglob("*") if ".tmp" in file.name]


Deformations = deform.Deformations      # whatever takes its place in a test
TRUE_FIT = Deformations.fit


def deformations(strength=0.5, mirror=False, height=16, width=16):
    """Some that move every part of an image, as if they had been learned."""
    directions = 0.1 * noise(56, 3)
    losses = {choice: 0.6 for choice in (*deform.STRENGTHS, deform.MIRRORED)}
    return Deformations(directions, height, width, strength, mirror, losses)


def found(result):
    """In place of Deformations.fit: every set of images says that it moves like this."""
    def fit(images, y, generator):
        return deformations(*result, *images.shape[2:])

    return fit


@pytest.fixture(scope="session", autouse=True)
def still():
    """In this process many images are not asked how they move: it takes longest of all."""
    not_at_all = found((0.0, False))

    def fit(images, y, generator):
        asked = TRUE_FIT if len(images) <= 50 else not_at_all
        return asked(images, y, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deform.Deformations, "fit", fit)
        yield


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A folder with what the five steps make of a tiny data set."""
    out = tmp_path_factory.mktemp("chain") / "run"
    data = npz(out.parent / "tiny.npz")
    assert run("deform", "--dataset", data, "-o", out) == 0
    assert run("vae", "-o", out, "--steps", 40, "--latent-dim", 4) == 0
    assert run("latent", "-o", out) == 0
    assert run("hybrids", "-o", out, "--count", 90, "--export", out / "png") == 0
    assert run("cnn", "-o", out, "--steps", 40, "--width", 8) == 0
    return out


@pytest.fixture
def copy(chain, tmp_path):
    """One's own copy of that folder, to spoil."""
    return Path(shutil.copytree(chain, tmp_path / "run"))


# The flags with which each script is done in seconds.
STEMS = {"deform": [], "vae": ["--steps", 3, "--latent-dim", 4], "latent": [],
         "hybrids": ["--count", 90], "cnn": ["--steps", 3, "--width", 8],
         "compare": ["--sizes", 12, "--seeds", 1, "--steps", 3, "--vae-steps", 3, "--jobs", 1]}
GRID = ["compare", "--sizes", 12, 30, "--seeds", 2, "--steps", 8, "--vae-steps", 8,
        "--width", 4, "--latent-dim", 4, "--arms", "real", "real+hybrid"]


def few_hybrids(patch):
    """So few that a test is soon done, wherever their number is not given."""
    patch.setattr(hybrids, "COUNT", 512)
    patch.setitem(hybrids.make.__kwdefaults__, "count", 512)


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """A folder with a finished comparison."""
    out = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        few_hybrids(patch)
        assert run(*GRID, "--dataset", npz(out / "tiny.npz"), "-o", out, "--jobs", 1) == 0
    return out


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


def noise(*shape, seed=0):
    """Standard normal numbers."""
    return torch.randn(*shape, generator=seeded(seed))


def random_pixels(*shape):
    """Images uint8 of random pixels."""
    return torch.randint(256, shape, generator=seeded()).byte()


def evenly(values, channels=1, height=16, width=16):
    """Images (n,C,H,W) of one grey each."""
    return values[:, None, None, None].expand(-1, channels, height, width)


def brightness(x):
    return x.mean((1, 2, 3))


def uncorrelated(a, b):
    pair = torch.stack([a, b]).float()
    return pair.corrcoef()[0, 1].abs() < 0.06


# ---- the class percentages, against their definition ----------------------------------------

DENSITIES = pytest.mark.parametrize("kind", [latent.Aggregate, latent.Gaussian])
SIZES = torch.tensor([0, 0, 1, 1, 2, 2, 2]).repeat(10)  # labels of classes of unequal numbers


def true_density(mu, logvar, y, z, bandwidth=1.0, own=0.0, without=-1):
    """log p(z|c) (K,) of one point, in float64, straight from the definition."""
    mu, dim, classes = mu.double(), mu.shape[1], y.unique()
    within = sum((mu[y == c] - mu[y == c].mean(0)).square().sum(0) for c in classes)
    total = mu.var(0, unbiased=False)
    deviation = ((within + total) / (len(y) - len(classes) + 1)).sqrt()
    columns = []
    for c in classes:
        h = bandwidth * deviation * int((y == c).sum()) ** (-1 / (dim + 4))
        kept = (y == c) & (torch.arange(len(y)) != without)
        width = (logvar[kept].double().exp() + h ** 2 + own).sqrt()
        normals = dist.Independent(dist.Normal(mu[kept], width), 1)
        columns.append(normals.log_prob(z.double()).logsumexp(0) - math.log(len(width)))
    return torch.stack(columns)


def nearly(found, true):
    """float32 found by cancelling large numbers, and the float64 that it should be."""
    close(found, true, atol=2e-3, rtol=1e-4, check_dtype=False)


@pytest.mark.parametrize("dim, bandwidth, shift, own", [
    *((dim, bandwidth, 0, None) for dim in (1, 2, 16, 64) for bandwidth in (0.0, 0.7)),
    (2, 1.0, 1000, None),               # far from zero it is as exact
    *((dim, 1.0, 0, (-3, -1)) for dim in (1, 2, 7, 8, 9, 64)),
    (24, 1.0, 0, (-10, -10)), (24, 1.0, 0, (10, 10))])  # as far as an encoder goes
def test_the_aggregate_is_a_mixture_of_normals_and_images_add_their_own_variance(
        dim, bandwidth, shift, own):
    mu, logvar, y = codes(60, dim)
    mu = mu + shift
    z = torch.cat([mu[:5], codes(20, dim, seed=1)[0] + shift])
    width = own and torch.empty(25, dim).uniform_(*own, generator=seeded())
    found = latent.Aggregate.fit(mu, logvar, y, 3, bandwidth).log_density(z, width)
    for k in range(25):
        variance = width[k].double().exp() if own else 0.0
        nearly(found[k], true_density(mu, logvar, y, z[k], bandwidth, variance))


@pytest.mark.parametrize("images", [False, True])
def test_a_code_left_out_is_no_part_of_the_density_of_its_class(images):
    mu, logvar, y = codes(60, 2)
    posterior = latent.Aggregate.fit(mu, logvar, y, 3)
    order = y.argsort(stable=True)
    rows = order[latent.subsample(60, 25)]
    found, own_class = posterior.leave_one_out(logvar[order] if images else None, limit=25)
    for log_density, i in zip(found, rows):
        own = logvar[i].double().exp() if images else 0.0
        nearly(log_density, true_density(mu, logvar, y, mu[i], own=own, without=i))
    assert torch.equal(own_class, y[rows])


@pytest.mark.parametrize("kind, told", [
    (latent.Aggregate, {}), (latent.Gaussian, {}), (latent.Gaussian, {"shrinkage": 0.0})])
@pytest.mark.parametrize("images", [False, True])
def test_percentages_obey_the_rule_of_bayes_also_with_a_class_without_codes(
        kind, told, images):
    mu, logvar, y = codes(60, 2)
    z, own, _ = codes(20, 2, seed=1)
    three, posterior = (kind.fit(mu, logvar, y, classes, **told) for classes in (3, 4))
    point = (z, own) if images else (z,)
    floor = three.image_floor if images else three.log_floor
    posterior.temperature = 2.5
    density = three.log_density(*point).exp() + math.exp(floor)
    q = y.bincount() / 60 * density ** (1 / 2.5)
    close(posterior(*point), F.pad(q / q.sum(1, keepdim=True), (0, 1)))
    again = latent.restored(posterior.stored())
    assert type(again) is kind
    assert torch.equal(again(*point), posterior(*point))


@pytest.mark.parametrize("dim", [1, 2, 64])
@pytest.mark.parametrize("told", [{}, {"shrinkage": 0.0}, {"shrinkage": 0.3, "ridge": 0.05},
                                  {"shrinkage": 1.0}])
def test_gaussian_is_a_normal_of_shrunk_covariance(dim, told):
    mu, logvar, y = codes(300, dim)
    points, _, _ = codes(3, dim, seed=1)
    found = latent.Gaussian.fit(mu, logvar, y, 3, **told).log_density(points)
    shrinkage, ridge = {"shrinkage": 0.1, "ridge": 0.01, **told}.values()
    away = [(mu[y == c] - mu[y == c].mean(0)).double() for c in range(3)]
    width = [logvar[y == c].double().exp().sum(0) for c in range(3)]
    scatter = [a.T @ a + w.diag() for a, w in zip(away, width)]
    for c in range(3):
        count = (1 - shrinkage) * len(away[c]) + shrinkage * 300
        mixed = ((1 - shrinkage) * scatter[c] + shrinkage * sum(scatter)) / count
        jitter = ridge * mixed.trace() / dim + 1e-6
        covariance = (1 - ridge) * mixed + jitter * torch.eye(dim)
        normal = dist.MultivariateNormal(mu[y == c].double().mean(0), covariance)
        nearly(found[:, c], normal.log_prob(points.double()))


@DENSITIES
def test_the_integral_over_an_image_is_its_monte_carlo_mean(kind):
    posterior = kind.fit(*codes(50, 2), 3)
    z, logvar = torch.tensor([[[0.3, -0.5], [1.5, 1.0]], [[-1.0, 0.2], [-2.0, -0.5]]])
    draws = z + noise(40_000, 2, 2) * (logvar / 2).exp()
    mean = posterior.log_density(draws.flatten(0, 1)).exp().view(40_000, 2, 3).mean(0)
    close(posterior.log_density(z, logvar).exp(), mean, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("dim, temperature", [(1, 1.0), (5, 1.0), (1, 3.0)])
def test_between_two_normals_the_percentage_is_a_sigmoid(dim, temperature):
    z, a = noise(20, dim), torch.full((1, dim), 0.8)
    half = torch.tensor([0.5, 0.5])
    variance = torch.full((2, dim), 0.6)
    two = latent.Aggregate(torch.cat([-a, a]), variance, [1, 1], half, temperature=temperature)
    log_odds = 2 * (z @ a.T)[:, 0] / 0.6
    close(two(z)[:, 1], torch.sigmoid(log_odds / temperature))


@pytest.mark.parametrize("more", [
    {}, {"logvar": torch.tensor([0.0, -1.0, -2.0, 1.0, -9.0])[:, None]},
    {"without": torch.tensor([3, 5, 2 ** 19 - 9, 8, 2 ** 19 - 1])}])
def test_many_points_have_the_densities_that_each_has_alone(more):
    count = 2 ** 19                     # so many codes that four points are taken at a time
    mu = torch.linspace(-3, 3, count)[:, None]
    mu[-9:, 0] = torch.arange(9.0) - 4  # a second class, so few that each of them counts
    variance = torch.full((count, 1), 0.1)
    posterior = latent.Aggregate(mu, variance, [count - 9, 9], torch.tensor([0.5, 0.5]))
    z = torch.tensor([-1.0, 0.0, 3.0, 2.0, 3.1])[:, None]
    together = posterior.log_density(z, **more)
    for i in range(5):
        own = {name: value[[i]] for name, value in more.items()}
        close(together[[i]], posterior.log_density(z[[i]], **own))


def test_many_images_have_the_gaussian_densities_that_each_has_alone():
    gaussian = latent.Gaussian.fit(*codes(200, 64, 10), 10)
    z, own, _ = codes(300, 64, seed=1)  # 204 of them are taken at a time
    some = [0, 203, 204, 299]
    alone = torch.cat([gaussian.log_density(z[[i]], own[[i]]) for i in some])
    close(gaussian.log_density(z, own)[some], alone, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("fit, quantile", [
    (latent.Aggregate.fit, 0.001), (latent.Gaussian.fit, 0.001), (latent.fit_labeller, 0.01)])
def test_floors_are_low_quantiles_of_the_densities_of_codes_left_out_if_they_can_be(
        fit, quantile):
    mu, logvar, y = codes(300, 4)
    posterior = fit(mu, logvar, y, 3)
    if isinstance(posterior, latent.Gaussian):
        points, images = posterior.log_density(mu), posterior.log_density(mu, logvar)
    else:
        points, _ = posterior.leave_one_out()
        images, _ = posterior.leave_one_out(logvar[y.argsort(stable=True)])
    for floor, density in ((posterior.log_floor, points), (posterior.image_floor, images)):
        marginal = (density + posterior.prior.log()).logsumexp(1)
        assert floor == approx(marginal.quantile(quantile).item())
    if fit == latent.Aggregate.fit:     # a single code has no density without itself
        assert fit(mu[:1], logvar[:1], y[:1] * 0, 1).log_floor == -math.inf
    assert latent.Posterior(posterior.prior, log_floor=-7.0).image_floor == -7.0


@pytest.mark.parametrize("known, told, least, most", [
    (codes(300, 1), {}, 0.1, 0.9),
    ((100 * F.one_hot(SIZES).float(), torch.zeros(70, 3), SIZES), {}, 1, 1),
    ((torch.zeros(70, 3), torch.zeros(70, 3), SIZES), {}, 0, 0)])
def test_a_labeller_is_as_soft_as_its_accuracy_above_guessing(known, told, least, most):
    posterior = latent.fit_labeller(*known, 3, **told)
    close(posterior.variance, latent.Aggregate.fit(*known, 3, **told).variance)
    log_density, own = posterior.leave_one_out()
    density = log_density.exp() + math.exp(posterior.log_floor)
    right = (posterior.prior * density).argmax(1) == own
    guess = posterior.prior.max()
    skill = ((right.float().mean() - guess) / (1 - guess)).item()
    assert least <= skill <= most
    assert posterior.temperature == approx(1 / max(skill, 0.03), rel=1e-4)


def test_words_name_the_likeliest_classes_the_likeliest_last():
    assert latent.words([0.2, 0.001, 0.799], ANIMALS) == "20% cat + 80% eel"
    assert latent.words([0.004, 0.0, 0.996], ANIMALS) == "100% eel"
    assert latent.words([0.006, 0.0, 0.994], ANIMALS) == "1% cat + 99% eel"
    assert latent.words([0.2, 0.3, 0.5], ANIMALS) == "30% dog + 50% eel + others"


def drawn_at(temperature):
    """A posterior whose log-densities are the codes, such codes, labels drawn from it."""
    log_density = 4 * noise(20_000, 3)
    posterior = latent.Posterior(torch.tensor([0.5, 0.3, 0.2]), temperature=temperature)
    posterior.log_density = lambda mu, logvar: mu
    q = posterior.weigh(log_density, -math.inf)
    return posterior, log_density, torch.multinomial(q, 1, generator=seeded())[:, 0]


@pytest.mark.parametrize("true, wanted, error", [
    (0.5, 0.5, 0.13), (4.0, 4.0, 0.13), (20.0, 20.0, 0.13), (0.01, 1 / 4, 0), (1000, 64, 0)])
def test_best_temperature_is_the_true_one_within_its_bounds(true, wanted, error):
    posterior, log_density, y = drawn_at(true)
    temperature, nll = latent.best_temperature(posterior, log_density, None, y)
    assert temperature == approx(wanted, rel=error)
    assert posterior.temperature == true                # it sets nothing
    posterior.temperature = temperature
    q = posterior.weigh(log_density, -math.inf)
    assert nll == approx(F.nll_loss(q.log(), y).item(), rel=1e-4)


def test_a_temperature_is_fitted_above_the_floor_of_images_and_misses_cost_thirty_nats():
    posterior, log_density, y = drawn_at(1.0)
    posterior.image_floor = 50.0        # nothing rises above it: any temperature gives priors
    _, nll = latent.best_temperature(posterior, log_density, None, y)
    assert nll == approx(-posterior.prior.log()[y].mean().item())
    posterior.image_floor = -math.inf
    log_density[:, 1] = -math.inf       # a class without codes
    _, nll = latent.best_temperature(posterior, log_density, None, torch.ones_like(y))
    assert nll == approx(30)


@pytest.mark.parametrize("limit, wanted", [(500, 1.0), (20, 2.0)])
def test_calibrating_chooses_by_the_nll_of_a_few_and_then_fits_to_all(limit, wanted):
    known, held_out = zip(*(part.split([300, 200]) for part in codes(500, 4)))
    some = [part[latent.subsample(200, limit)] for part in held_out]
    tried = {}
    for choice in (0.01, 1.0, 2.0, 20.0):
        posterior = latent.Aggregate.fit(*known, 3, choice)
        _, tried[choice] = latent.best_temperature(posterior, *some)
    assert min(tried, key=tried.get) == wanted
    found = latent.calibrate(latent.Aggregate, tried, known, held_out, 3, limit)
    posterior = latent.Aggregate.fit(*known, 3, wanted)
    close(found[0].variance, posterior.variance)
    temperature, nll = latent.best_temperature(posterior, *held_out)
    assert (found[0].temperature, *found[1:]) == (temperature, wanted, nll)


@DENSITIES
def test_percentages_of_an_image_are_those_of_all_others(kind):
    mu, logvar, y = codes(40, 2)
    y[30:] = -1                         # these have no label to be left out
    found = latent.left_out(kind, 0.5, 3.0, mu, logvar, y, 3, folds=30)
    for i in range(40):
        others = (torch.arange(40) != i) & (y >= 0)
        posterior = kind.fit(mu[others], logvar[others], y[others], 3, 0.5)
        posterior.temperature = 3.0
        close(found[i], posterior(mu[[i]], logvar[[i]])[0])


# ---- labels spread to images without one, and which labels to look at -----------------------

TWELVE = torch.arange(240) % 12         # labels of many classes, few, and of no order
THREE = torch.arange(90) // 30
CLASSES = torch.randint(3, (120,), generator=seeded())
ISLANDS = 0.1 * noise(90, 2) + torch.tensor([0, 5, 50])[THREE][:, None]


def spread_along(mu, y, classes):
    """Labels spread along the graph of codes alone."""
    return latent.spread_labels(latent.neighbour_graph(*latent.nearest(mu, 7)), y, classes)


def hidden(y, shown):
    """Labels (N,), all but those of some rows taken away."""
    given = torch.full_like(y, -1)
    given[shown] = y[shown]
    return given


def test_labels_are_spread_along_clusters_not_across_and_one_given_among_others_stays():
    turns = torch.linspace(0, math.pi, 200)
    moon = torch.stack([turns.cos(), turns.sin()], 1)   # two half circles, one in the other
    mu = torch.cat([moon, torch.tensor([1.0, 0.4]) - moon]) + 0.05 * noise(400, 2)
    y = torch.arange(2).repeat_interleave(200)
    shown = torch.tensor([0, 100, 200, 300])
    found = spread_along(mu, hidden(y, shown), 2)
    assert found.dtype == torch.long
    assert (found == y).float().mean() > 0.98
    nearest = torch.cdist(mu, mu[shown]).argmin(1)
    assert (y[shown][nearest] == y).float().mean() < 0.9        # the nearest would not do
    y = torch.arange(2).repeat_interleave(40)
    given = y.clone()
    given[5] = 1                        # among zeros; one in four has no label
    given[3::4] = -1
    found = spread_along(0.1 * noise(80, 2) + 50 * y[:, None], given, 2)
    assert torch.equal(found, given.where(given >= 0, y))


class Moving:
    """In place of deformations; makes what belongs to the first of two images negative."""

    def __init__(self, strength=0.5):
        self.strength = strength
        self.pairs = []                 # those to be brought into register

    def distances(self, images, near):                  # of images (N,), which are numbers
        return (images[near] - images[:, None]).square() + 1

    def morph(self, first, second):
        self.pairs.append((first, second))
        return lambda first, second, rows, t: (-first, second)

    def __call__(self, x, q, generator):
        return x, q


@pytest.mark.parametrize("share", [None, 0.0, 0.25, 0.75, 1.0])
def test_the_graph_mixes_distances_of_codes_and_of_images(share):
    mu, _, _ = codes(120, 3)
    images = noise(120, seed=5)
    moves = None if share is None else Moving(share)
    share = share or 0.0                # then nothing is asked of images
    square = torch.cdist(mu, mu).square().fill_diagonal_(1e9)
    others = (images - images[:, None]).square() + 1
    others[square > square.topk(50, largest=False).values[:, -1:]] = 1e9        # too far
    for distances in (square, others):
        distances /= distances.topk(7, largest=False).values[:, -1:]
    mixed = (1 - share) * square + share * others
    last = mixed.topk(7, largest=False).values[:, -1:]
    weight = (-mixed / last).exp() * (mixed <= last)
    graph = latent.graph_of(mu, images, moves)
    close(graph.to_dense(), weight + weight.T, atol=1e-6, rtol=0)


def test_each_of_many_codes_has_the_neighbours_that_it_has_alone_never_itself_beside_a_twin():
    mu = noise(5000, 2)                 # 3355 of them are taken at a time
    near, square = latent.nearest(mu, 2)
    for i in (0, 3354, 3355, 4999):
        wanted = (mu - mu[i]).double().square().sum(1).topk(3, largest=False)
        assert near[i].tolist() == wanted.indices[1:].tolist()
        nearly(square[i], wanted.values[1:])
    near, square = latent.nearest(noise(20, 2).repeat(3, 1), 3)
    assert (near != torch.arange(60)[:, None]).all()
    assert (square[:, :2] < 1e-9).all() and (square[:, 2] > 1e-6).all()


def some_labels():
    """A graph of 60 codes in three clusters that overlap, the rows of nine labels, these."""
    mu, _, y = codes(60, 2, seed=3)
    rows = torch.cat([(y == c).nonzero()[:3, 0] for c in range(3)])
    return latent.neighbour_graph(*latent.nearest(mu, 5)), rows, y[rows]


def test_spreading_solves_its_equation_and_if_balanced_gives_each_class_its_share_of_labels():
    graph, rows, labels = some_labels()
    weight = graph.to_dense()
    degree = weight.sum(0)
    system = torch.eye(60) - 0.9 * weight / (degree[:, None] * degree).sqrt()
    given = noise(60, 2).abs()
    solved = torch.linalg.solve(system, 0.1 * given)
    close(latent.propagate(graph, given, alpha=0.9), solved, atol=1e-4, rtol=1e-3)
    rows, labels = rows[:-1], labels[:-1]               # three, three and two
    start = torch.zeros(60, 3)
    start[rows, labels] = 1
    belief = latent.propagate(graph, start)
    assert torch.equal(latent.spread(graph, rows, labels, 3), belief.argmax(1))
    mass = belief / belief.sum(0) * torch.tensor([3.0, 3.0, 2.0])
    assert not torch.equal(mass.argmax(1), belief.argmax(1))
    found = latent.spread(graph, rows, labels, 3, balanced=True)
    assert torch.equal(found, mass.argmax(1))


def test_left_out_labels_are_predicted_by_the_others_and_halves_asked_of_rows_without_one():
    graph, rows, labels = some_labels()
    right = []
    for k in range(9):
        others = torch.arange(9) != k
        start = torch.zeros(60, 3)
        start[rows[others], labels[others]] = 1
        belief = latent.propagate(graph, start)
        share = belief / belief.sum(0)
        right.append(share[rows[k]].argmax() == labels[k])
    every = torch.ones(9, dtype=torch.bool)
    found = latent.left_out_right(graph, rows, labels, every, 3)
    assert 0 < found < 1 and found == approx(torch.stack(right).float().mean().item())
    asked = torch.arange(9) == 8        # only the last one
    assert latent.left_out_right(graph, rows, labels, asked, 3) == float(right[8])
    rows, labels = rows[:7], labels[:7]                 # of the last class there is one
    first, second = (latent.spread(graph, rows[half], labels[half], 3, balanced=True)
                     for half in ([0, 2, 4, 6], [1, 3, 5, 6]))
    other = ~torch.isin(torch.arange(60), rows)
    wanted = (first == second)[other].float().mean().item()
    several = torch.arange(7) < 6
    found = latent.halves_agree(graph, rows, labels, several, 3)
    assert 0 < found < 1 and found == approx(wanted)


@pytest.mark.parametrize("classes, most", [(6, 0), (2, 1)])         # half of two may be right
def test_random_labels_are_seldom_spread(classes, most):
    believed = 0
    y = hidden(torch.arange(200) % classes, torch.randperm(200, generator=seeded())[:40])
    for seed in range(10):
        found = spread_along(noise(200, 4, seed=seed), y, classes)
        assert torch.equal(found[y >= 0], y[y >= 0])
        believed += int(found[y < 0].max() >= 0)
    assert believed <= most
    graph = latent.neighbour_graph(*latent.nearest(noise(200, 4), 7))
    assert latent.spread_labels(graph, y, classes, agreed=True).min() >= 0      # unasked


@pytest.mark.parametrize("agreeing, believed", [(15, True), (14, True), (12, False)])
def test_two_classes_are_spread_if_more_than_two_thirds_agree(agreeing, believed):
    cluster = torch.arange(60) // 3     # twenty clusters of two labels and a code without
    label = torch.where(cluster < agreeing, cluster, torch.arange(60)) % 2
    has_one = torch.arange(60) % 3 < 2
    mu = 100 * F.one_hot(cluster).float() + 0.1 * noise(60, 20)
    graph = latent.neighbour_graph(*latent.nearest(mu, 2))
    rows = has_one.nonzero()[:, 0]
    assert latent.labels_agree(graph, rows, label[rows], 2) == believed


@pytest.mark.parametrize("mu, y, shown, reached", [
    (9 * noise(12, 4)[TWELVE] + 0.1 * noise(240, 4, seed=1), TWELVE, range(16), range(12)),
    (torch.eye(2)[TWELVE % 2], TWELVE % 2, range(8), range(2)),
    (ISLANDS, THREE, [0, 1, 31, 32], [0, 1]),
    (noise(3, 4), torch.tensor([5, 0, 5]), [1], [0])],
    ids=["one label a class", "codes that coincide", "no label reaches an island",
         "a single label is nothing to judge by"])
def test_labels_are_spread_as_far_as_they_can_be(mu, y, shown, reached):
    wanted = y.where(torch.isin(y, torch.tensor(reached)), -1)
    assert torch.equal(spread_along(mu, hidden(y, list(shown)), 12), wanted)


def half_labelled():
    """For `embed`: codes that say nothing of the class, images that do, every third label."""
    mu, logvar = noise(2, 120, 2)
    rows = torch.arange(120)
    given = hidden(CLASSES, rows % 3 == 0)
    return mu, logvar - 3, 7 + rows, given, 3, mu, 10 * CLASSES + 0.1 * noise(120, seed=1)


def test_labels_are_those_given_and_those_spread_along_the_graph_of_codes_and_images():
    mu, logvar, rows, given, *_, images = half_labelled()
    found = latent.embed(*half_labelled(), Moving(1.0))
    features = latent.embed(mu, logvar, rows, given, 3, images[:, None], images[:, None])
    for codes_of in (found, features, found.known()):
        for part, wanted in zip(codes_of, (rows, mu, logvar, CLASSES, given >= 0)):
            assert torch.equal(part, wanted)
    wanted = latent.fit_labeller(mu, logvar, CLASSES, 3)
    assert torch.equal(found.posterior(mu), wanted(mu))
    # Without the images nothing is spread: of the codes, as of a file, a third is known.
    alone = latent.embed(*half_labelled())
    saved = {**alone._asdict(), "labeller": alone.posterior.stored(), "posterior": None}
    known = latent.Codes.restore(saved).known()
    assert torch.equal(known.rows, rows[::3]) and known.given.all()
    for part, whole in zip(known.labelled(), (mu, logvar, CLASSES)):
        assert torch.equal(part, whole[::3])
    wanted = latent.fit_labeller(mu[::3], logvar[::3], CLASSES[::3], 3)
    assert torch.equal(known.posterior(mu), wanted(mu))


def test_discriminants_stand_beside_the_places_and_given_labels_weigh_a_quarter():
    mu, _, y = codes(60, 5)
    given = torch.arange(60) < 3        # one a class; 54 are guessed, three have no label
    labels = y.where(torch.arange(60) < 57, -1)
    found = latent.told_apart(mu, labels, given, 3).double()
    # By hand, each given one six times: 18 of 72.
    x = torch.cat([mu[:3].repeat(6, 1), mu[3:57]]).double()
    own = torch.cat([y[:3].repeat(6), y[3:57]])
    means = torch.stack([x[own == c].mean(0) for c in range(3)])
    within = (x - means[own]).T @ (x - means[own]) / 72
    size = within.trace()
    close(found[:, :5], 2 * mu.double() / size.sqrt(), atol=1e-5, rtol=1e-5)
    # Distances are those of Mahalanobis, along what the means span.
    white = torch.linalg.cholesky((0.9 * within + 0.02 * size * torch.eye(5)).inverse())
    span = (means - means.mean(0)) @ white
    wanted = mu.double() @ white @ torch.linalg.pinv(span) @ span
    seen = found[:, 5:]                 # two directions
    close(torch.cdist(seen, seen), torch.cdist(wanted, wanted), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind, rounds", [("features", 2), ("images", 0), ("none agree", 0)])
def test_among_features_labels_are_spread_again_where_the_classes_lie_apart(monkeypatch, kind,
                                                                           rounds):
    calls = note_calls(monkeypatch, latent, "told_apart")
    spreads = note_calls(monkeypatch, latent, "spread_labels")
    mu, logvar, rows, given, *_, images = half_labelled()
    if kind == "images":
        latent.embed(*half_labelled(), Moving(1.0))
    else:
        x = images[:, None] if kind == "features" else noise(120, 9, seed=7)
        latent.embed(mu, logvar, rows, given, 3, x, x)
    assert len(calls) == rounds == len(spreads) - 1
    assert all(torch.equal(call.given[1], given) for call in spreads)
    assert all(call.told == {"balanced": True, "agreed": True} for call in spreads[1:])
    for call in calls:
        assert all(map(torch.equal, call.given[:3], (x, CLASSES, given >= 0)))


@pytest.mark.parametrize("temperature, told, soft", [
    (1.0, None, False), (1.09, None, False), (1.11, None, True), (1.0, True, True),
    (3.0, False, False)])
def test_pseudo_labels_of_features_alone_are_soft_where_asked_or_where_the_labeller_is(
        temperature, told, soft):
    mu, logvar, rows, given, *_, images = half_labelled()
    features = latent.embed(mu, logvar, rows, given, 3, images[:, None], images[:, None])
    for found in (features, latent.embed(*half_labelled(), Moving(1.0))):
        found.posterior.temperature = temperature
        guessed, q = latent.pseudo_labels(found, told)
        assert torch.equal(guessed, torch.arange(120) % 3 > 0)
        wanted = one_hot(CLASSES[guessed])
        if soft and found is features:
            wanted = (wanted + found.posterior(found.mu[guessed])) / 2
        assert torch.equal(q, wanted)


@pytest.mark.parametrize("q, y, found, claimed", [
    # Of 1 the odds are 9 to one, of 2 and 3 more than twenty to one.
    ([[0.9, 0.1], [0.03, 0.97], [0.011, 0.989], [0.01, 0.99], [0.1, 0.9]], [0, 0, 0, 0, 1],
     [3, 2], [1, 1]),
    # The last class has 35% of its own images on average: half is much.
    ([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.3, 0.3, 0.4], [0.02, 0.48, 0.5], [0.4, 0.3, 0.3]],
     [0, 1, 2, 0, 2], [3], [2]),
    # Of the second class 1 has less than its own image.
    ([[0.9, 0.1], [0.01, 0.99], [0.001, 0.999]], [0, 0, 1], [], [])])
def test_wrong_labels_are_found_where_a_class_is_measured_by_itself(q, y, found, claimed):
    rows, claims = latent.suspects(torch.tensor(q), torch.tensor(y))
    assert (rows.tolist(), claims.tolist()) == (found, claimed)


def test_images_to_label_are_undecided_and_unlike_each_other():
    first = torch.tensor([0.5, 0.51, 0.52, 0.53, 0.54])
    q = torch.stack([first, 1 - first], 1)
    mu = torch.tensor([[0.0, 0], [0.1, 0], [5, 0], [5.1, 0], [0, 9]])
    near = torch.tensor([[0.0, 0.2]])
    assert latent.to_label(q, mu, near, 3).tolist() == [4, 3, 1]        # 2 is near 3
    assert sorted(latent.to_label(q, 0 * mu, mu[:1], 99).tolist()) == [0, 1, 2, 3, 4]
    assert latent.to_label(q[:0], mu[:0], mu, 9).tolist() == []
    # Beside them many that are all but certain: the farthest of the thirty least decided.
    certain = torch.tensor([0.99, 0.01]).expand(200, 2)
    far = torch.tensor([50.0, 50]).expand(200, 2)
    chosen = latent.to_label(torch.cat([q, certain]), torch.cat([mu, far]), near, 3)
    assert 5 <= chosen[0] < 30


# ---- hybrids: where, of what and with which labels they are made; HybridMixer ---------------

BYTES = easy(90)[0]
GREYS = BYTES / 255
COLOURS = torch.cat([GREYS, GREYS.flip(2), 1 - GREYS], 1)


def known_codes(classes=3):
    """Codes (90,2) of three classes and their posterior, of temperature 2."""
    mu, logvar, y = codes(90, 2)
    posterior = latent.Aggregate.fit(mu, logvar, y, classes)
    posterior.temperature = 2.0
    return latent.Codes(torch.arange(90), mu, logvar, y, y >= 0, posterior)


def points_of(count=200, strategy="between", **how):
    known = known_codes()
    return known, hybrids.sample(strategy, count, known, seeded(), **how)


@pytest.mark.parametrize("strategy, decoded", [("between", 0.5), ("around", 1), ("prior", 1),
                                               ("images", 0)])
def test_points_lie_and_are_decoded_as_a_strategy_says_and_none_is_registered_with_itself(
        strategy, decoded):
    known, points = points_of(9000, strategy)
    assert points.decoded.float().mean() == approx(decoded, abs=0.02 * (decoded == 0.5))
    away = points.z
    if strategy != "prior":
        t = points.t[:, None]
        away = points.z - (t * known.mu[points.i] + (1 - t) * known.mu[points.j])
        assert (points.i.bincount(minlength=90) - 100).abs().max() < 45
    if strategy == "around":
        away = away / (known.logvar[points.i] / 2).exp()
    if strategy in ("around", "prior"):                 # N(0, 1)
        assert away.mean(0).abs().max() < 0.05
        assert (away.var(0) - 1).abs().max() < 0.08
    else:
        assert away.abs().max() < 1e-5
    if strategy in ("around", "images"):
        assert torch.equal(points.i, points.j) and (points.t == 1).all()
    if strategy == "between":                           # t has a distribution Beta(4, 4)
        assert 0 <= t.min() and t.max() <= 1
        assert t.mean() == approx(0.5, abs=0.01)
        assert t.var() == approx(1 / 36, rel=0.1)
        for other in (points.t, points.z[:, 0], known.y[points.i], torch.arange(9000)):
            assert uncorrelated(points.decoded, other)
    else:                               # of one image each, which meets no other
        moves = Moving()
        hybrids.make(known, GREYS, decoder(), strategy=strategy, count=9, moves=moves,
                     generator=seeded())
        assert not moves.pairs


@pytest.mark.parametrize("count, told, lines, share", [
    (4500, {}, 4500, 0.3), (4500, {"same": 0}, 4500, 0), (4500, {"same": 1}, 4500, 1),
    (50, {"lines": 90}, 50, 0.3), (60, {"lines": 60}, 60, 0.3), (150, {"lines": 60}, 60, 0.3)])
def test_there_are_so_many_lines_and_so_many_of_them_within_a_class(count, told, lines, share):
    known, points = points_of(count, **told)
    pairs = torch.stack([points.i, points.j], 1)
    assert torch.equal(pairs, pairs[:lines].repeat(3, 1)[:count])
    assert len(pairs.unique(dim=0)) > 0.4 * lines
    assert len(points.t.unique()) > 0.99 * count        # each with a weight of its own
    alike = known.y[points.i[:lines]] == known.y[points.j[:lines]]
    error = 3 * (share * (1 - share) / lines) ** 0.5
    assert alike.float().mean() == approx(share, abs=error)


@pytest.mark.parametrize("same_class", [True, False])
def test_partners_are_all_those_allowed_and_drawn_evenly(same_class):
    y = torch.tensor([2, 0, 1, 1, 0, 1, 2])
    i = torch.arange(7).repeat(2000)
    j = hybrids.partners(y, i, float(same_class), seeded())
    allowed = (y[:, None] == y) == same_class
    often = (7 * i + j).bincount(minlength=49).view(7, 7)
    even = 2000 * allowed / allowed.sum(1, keepdim=True)
    assert (often[~allowed] == 0).all()
    assert (often - even).abs().max() < 120
    # An only class has partners in itself.
    j = hybrids.partners(torch.zeros(5).long(), torch.arange(5), 0, seeded())
    assert j.min() >= 0 and j.max() < 5


@pytest.mark.parametrize("classes", [3, 5])             # of five two have no codes
def test_labels_are_the_weights_the_posterior_or_their_product(classes):
    known = known_codes(classes)
    points = hybrids.sample("between", 200, known, seeded())
    weight = torch.zeros(200, classes)
    for k in range(200):
        weight[k, known.y[points.i[k]]] += points.t[k]
        weight[k, known.y[points.j[k]]] += 1 - points.t[k]
    close(hybrids.label("weight", points, known), weight)
    posterior = known.posterior
    assert torch.equal(hybrids.label("density", points, known), posterior(points.z))
    density = posterior.log_density(points.z).exp() + math.exp(posterior.log_floor)
    evidence = density.sqrt()           # its temperature is 2
    doubt = (0.4 * points.t * (1 - points.t))[:, None]
    product = ((1 - doubt) * weight + doubt * posterior.prior) * evidence
    true = product / product.sum(1, keepdim=True)
    close(hybrids.label("product", points, known), true, atol=1e-5, rtol=1e-3)


def decoder(channels=1):
    """z (n,2) -> images (n,channels,16,16) that depend on every number of z."""
    weights = noise(2, channels * 256)
    return lambda z: (z @ weights).sigmoid().view(-1, channels, 16, 16)


def rendered(points, known, images, **how):
    """`render` with a decoder for these images, in parts that are smaller than all."""
    how = {"generator": seeded(), "batch": 7, **how}
    return hybrids.render(points, known, images, decoder(images.shape[1]), **how)


def by_definition(points, known, images, w, sign=1):
    """x = decode(z) + w r_i + (1-w) r_j, clipped, r = x - decode(mu) of points to be decoded.

    Of the others decode is nothing. `sign`: of what belongs to the first source.
    """
    decode = decoder(images.shape[1])
    lost, whole = (sign * w * r[points.i] + (1 - w) * r[points.j]
                   for r in (images - decode(known.mu), images))
    here = points.decoded[:, None, None, None]
    return (decode(points.z) + lost).where(here, whole).clamp(0, 1)


@pytest.mark.parametrize("images, error", [
    (GREYS, 1e-5), (COLOURS, 1e-5), (BYTES, 0.7 / 255), (GREYS.double(), 1e-5),
    (GREYS.half(), 0.02), (GREYS.bfloat16(), 0.02)])
def test_hybrids_are_decoded_plus_what_their_sources_lost_or_mixed_of_pixels(images, error):
    known, points = points_of()
    w = points.t[:, None, None, None]
    cut = hybrids.rectangles(points.t, 16, 16, seeded())            # weights of 0 and of 1
    state = torch.get_rng_state()
    for how, weight, sign in (({}, w, 1), ({"morph": Moving().morph}, w, -1),
                              ({"cut": True, "batch": 200}, cut, 1)):
        x = rendered(points, known, images, **how)
        assert x.dtype == images.dtype
        true = by_definition(points, known, hybrids.as_float(images).float(), weight, sign)
        close(hybrids.as_float(x).float(), true, atol=error, rtol=0)
    assert torch.equal(state, torch.get_rng_state())    # a cut is of the generator alone


@pytest.mark.parametrize("end", ["i", "j"])
@pytest.mark.parametrize("how", [{}, {"morph": deform.Morph}, {"cut": True}])
def test_at_both_ends_a_hybrid_is_exactly_its_source_and_has_its_label(end, how):
    known, points = points_of(40)
    source = getattr(points, end)
    t = torch.full((40,), float(end == "i"))
    there = points._replace(t=t, z=known.mu[source])
    assert torch.equal(rendered(there, known, BYTES, **how), BYTES[source])
    one_hot = F.one_hot(known.y[source], 3).float()
    assert torch.equal(hybrids.label("product", there, known), one_hot)
    # A posterior that is sure of the last class everywhere is contradicted.
    mistaken = latent.Posterior(torch.full((3,), 1 / 3))
    mistaken.log_density = lambda z: torch.tensor([-math.inf, -math.inf, 0]).expand(len(z), 3)
    misled = known._replace(posterior=mistaken)
    assert torch.equal(hybrids.label("product", there, misled), one_hot)


def test_cut_rectangles_have_their_area_to_whole_pixels_and_lie_anywhere():
    t = torch.linspace(0, 1, 41).repeat(50)
    w = hybrids.rectangles(t, 60, 40, seeded())
    assert w.shape == (2050, 1, 60, 40) and set(w.unique().tolist()) == {0, 1}
    assert (w[t == 0] == 0).all() and (w[t == 1] == 1).all()
    inside = w == 0
    assert torch.equal(inside, inside.any(3, keepdim=True) & inside.any(2, keepdim=True))
    error = brightness(w) - t
    assert error.abs().max() < 0.05
    assert error.mean().abs() < 0.002
    often = (hybrids.rectangles(torch.full((2000,), 0.75), 60, 40, seeded()) == 0).float()
    close(often.mean(0), often.mean(0).flip(1, 2), atol=0.1, rtol=0)


@pytest.mark.parametrize("images, strength, how, cut, registered", [
    (GREYS, 0.5, {}, False, True), (GREYS, 0.5, {"register": False}, False, False),
    (GREYS, 0.5, {"cut": True}, True, False), (GREYS, 0.0, {}, False, False),
    (GREYS, None, {}, False, False), (COLOURS, 0.5, {}, True, False),
    (COLOURS, 0.5, {"cut": False}, False, True)])
def test_colour_is_cut_and_what_moves_registered_on_two_thousand_lines(
        images, strength, how, cut, registered):
    moves = None if strength is None else Moving(strength)
    made = hybrids.make(known_codes(), images, decoder(images.shape[1]), count=2100,
                        moves=moves, generator=seeded(), **how)
    i, j, plain = made.points.i, made.points.j, ~made.points.decoded
    assert torch.equal(i[2000:], i[:100]) == registered
    assert bool(moves and moves.pairs) == registered
    # Cut: every pixel of those that are not decoded is of the one or the other source.
    first, second = (made.x[plain] == images[source[plain]] for source in (i, j))
    assert (first | second).all() == cut
    assert not first.all() and not second.all()


@pytest.mark.parametrize("strategy", ["between", "prior"])
@pytest.mark.parametrize("batch", [7, 1000])
def test_every_hybrid_moves_last_in_its_own_way_and_keeps_its_percentages(strategy, batch):
    known, points = points_of(30, strategy)
    deformed = deformations(0.5, mirror=True)
    how = {"rule": "density", "batch": batch, "generator": seeded()}
    made = hybrids.make_at(points, known, BYTES, decoder(), **how)
    moved = hybrids.make_at(points, known, BYTES, decoder(), moves=deformed, **how)
    generator = seeded()
    wanted = [deformed(x / 255, None, generator)[0] for x in made.x.split(batch)]
    assert torch.equal(moved.x, (255 * torch.cat(wanted)).round().byte())
    assert torch.equal(moved.q, made.q)


def shades(channels=1, dtype=torch.float32):
    """A batch (300,channels,16,16) sorted by class, whose grey says the class: 0, 1/2, 1."""
    y = torch.arange(300) // 100
    return hybrids.as_dtype(evenly(y / 2, channels), dtype), y


def mixer_of(decode=None, **more):
    """Codes are two pixels of each image, and are decoded as black images."""
    decode = decode or (lambda z: z.new_zeros(len(z), 1, 16, 16))
    more = {"rule": "weight", "generator": seeded(), **more}
    return hybrids.HybridMixer(lambda x: (x.flatten(1)[:, :2], None), decode,
                               known_codes().posterior, **more)


def shade_of(q):
    """The grey that percentages stand for, as an image."""
    return evenly(q @ torch.tensor([0, 0.5, 1]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.half])
def test_a_mixer_mixes_each_image_with_another_as_its_percentages_say(dtype):
    x, y = shades(dtype=dtype)
    made, q = mixer_of()(x, y.int())
    assert made.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    close(made.float(), shade_of(q), atol=1e-6 if dtype == torch.float32 else 0.004, rtol=0)
    weight = q.gather(1, y[:, None])
    assert (weight > 0).all()           # each row is of its own image
    assert (weight == 1).float().mean() == approx(0.3, abs=0.08)
    mixed = weight[weight < 1]
    assert mixed.mean() == approx(0.5, abs=0.04)        # Beta(4, 4)
    assert mixed.var() == approx(1 / 36, rel=0.3)


def test_a_mixer_decodes_half_moves_all_labels_by_its_rule_and_refuses_what_is_out_of_range():
    x, y = shades()
    made, q = mixer_of(decoder())(x, y)
    decoded = (made - shade_of(q)).abs().amax((1, 2, 3)) > 1e-4
    # Of the half that is decoded 0.3 are of one class, and so of one code.
    assert decoded.sum() == approx(105, abs=20)
    assert (decoded.view(3, 100).sum(1) > 20).all()
    negative = mixer_of(decoder(), moves=lambda x, q, generator: (1 - x, q))
    moved, moved_q = negative(x, y)
    close(moved, 1 - made)
    assert torch.equal(moved_q, q)
    assert not torch.equal(mixer_of(rule="product")(x, y)[1], q)
    for other in (2 * x - 1, 255 * x):
        with pytest.raises(ValueError, match="mix images in .0, 1., and normalise them after"):
            mixer_of()(other, y)


@pytest.mark.parametrize("channels, told, cut", [(3, {}, True), (3, {"cut": False}, False),
                                                 (1, {}, False), (1, {"cut": True}, True)])
def test_a_mixer_cuts_colour_unless_told_otherwise(channels, told, cut):
    made, q = mixer_of(**told)(*shades(channels))
    assert (made == made[:, :1]).all()
    assert (set(made.unique().tolist()) == {0, 0.5, 1}) == cut
    error = 0.125 if cut else 1e-6      # two sides of a cut are right to one pixel of sixteen
    close(brightness(made), brightness(shade_of(q)), atol=error, rtol=0)


def mixed_by_worker(generator):
    mixer = mixer_of(generator=generator)
    return lambda row: mixer(*shades())[1]


def moved_by_worker(generator):
    moves = deformations()
    x = torch.rand(8, 1, 16, 16, generator=seeded())
    return lambda row: moves(x, None, generator)[0]


@pytest.mark.parametrize("work", [mixed_by_worker, moved_by_worker])
def test_the_workers_of_a_loader_draw_numbers_of_their_own_anew_every_epoch(work):
    runs = []
    for _ in range(2):
        loader = torch.utils.data.DataLoader(
            range(4), num_workers=2, generator=seeded(5), multiprocessing_context="fork",
            collate_fn=work(seeded()))
        runs.append([*loader, *loader])
    for one, other in itertools.combinations(runs[0], 2):
        assert not torch.equal(one, other)
    assert all(map(torch.equal, *runs))


# ---- augmentations and batches --------------------------------------------------------------

def places(count, height, width):
    """Images (count,2,H,W) that show where each of their pixels is: its column, its row."""
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([right, down]).float().expand(count, 2, height, width)


def affine_only(*kept, height=16, width=16, bend=0.0):
    """What affine does to `places` with only these of its parts."""
    off = {name: 0 for name in ("degrees", "scale", "shift", "shear") if name not in kept}
    return cnn.affine(places(2000, height, width), None, seeded(), **off, bend=bend)[0]


@pytest.mark.parametrize("kept, height, width", [
    ("degrees", 17, 17), ("degrees", 17, 41), ("degrees", 41, 17), ("shear", 17, 41),
    ("scale", 17, 17), ("shift", 21, 41)])
def test_affine_turns_shears_stretches_and_shifts_evenly_up_to_its_limits(kept, height, width):
    seen = affine_only(kept, height=height, width=width)
    row, column = height // 2, width // 2
    centre = seen[:, :, row, column]
    a, c = (seen[:, :, row, column + 1] - centre).T     # a step to the right
    b, d = (seen[:, :, row + 1, column] - centre).T
    right, down = (centre - torch.tensor([column, row])).T
    turn = torch.atan2(c, a)
    no, one = torch.zeros(2000), torch.ones(2000)
    # What is drawn, as a part of its limit, and the map that it makes.
    drawn, wanted = {
        "degrees": ([turn.rad2deg() / 15], (turn.cos(), -turn.sin(), turn.sin(), turn.cos())),
        "shear": ([b / 0.15], (one, b, no, one)),
        "scale": ([a.log() / 0.15, d.log() / 0.15], (a, no, no, d)),
        "shift": ([10 * right / width, 10 * down / height], (one, no, no, one))}[kept]
    close((a, b, c, d), wanted, atol=1e-4, rtol=0)
    if kept != "shift":                 # all else keeps the middle
        close((right, down), (no, no), atol=1e-4, rtol=0)
    for values in drawn:
        assert values.abs().max() <= 1.001
        assert values.mean() == approx(0, abs=0.06)
        assert values.std() == approx(1 / math.sqrt(3), rel=0.05)
    assert len(drawn) < 2 or uncorrelated(*drawn)


def test_affine_bends_by_a_deviation_of_so_many_pixels_and_neighbours_alike():
    moved = affine_only(height=17, width=21, bend=1.5)[:, :, 8, 10] - torch.tensor([10, 8])
    assert moved.mean(0).abs().max() < 0.1
    close(moved.std(0), torch.tensor([1.5, 1.5]), atol=0.1, rtol=0)
    assert uncorrelated(*moved.T)
    right = affine_only(height=17, width=33, bend=1.0)[:, 0, 8] - torch.arange(33)
    assert right[:, [16, 17]].T.corrcoef()[0, 1] > 0.95
    assert right[:, [16, 26]].T.corrcoef()[0, 1].abs() < 0.35   # what is far: differently


def test_flip_crop_mirrors_half_shifts_up_to_four_pixels_and_reflects_the_edges():
    seen, _ = cnn.flip_crop(places(4500, 16, 20), None, seeded())
    column, row = seen[:, :, 8, 10].long().T
    mirrored = seen[:, 0, 8, 11] < column
    assert mirrored.float().mean() == approx(0.5, abs=0.03)
    right = torch.where(mirrored, 19 - column, column) - 10
    down = row - 8
    for shift in (right, down, right[mirrored], right[~mirrored]):
        numbers, often = shift.unique(return_counts=True)
        assert numbers.tolist() == list(range(-4, 5))
        assert (often / len(shift) - 1 / 9).abs().max() < 0.03
    assert uncorrelated(right, down)
    columns = (torch.arange(20) + right[:, None]).abs()
    columns = torch.where(columns > 19, 38 - columns, columns)
    columns = torch.where(mirrored[:, None], 19 - columns, columns)
    rows = (torch.arange(16) + down[:, None]).abs()
    rows = torch.where(rows > 15, 30 - rows, rows)
    assert (seen[:, 0] == columns[:, None]).all()
    assert (seen[:, 1] == rows[:, :, None]).all()


MOVES = deformations(0.5, True, 16, 20)
CHANGES = {"affine": cnn.affine, "elastic": cnn.elastic, "flip_crop": cnn.flip_crop,
           "deformations": MOVES, "gently": MOVES.gently}
MIXES = {"mixup": cnn.mixup, "mixup of 1": functools.partial(cnn.mixup, alpha=1.0),
         "cutmix": cnn.cutmix}
AUGMENTATIONS = {**CHANGES, **MIXES}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmentation_draws_from_its_generator_and_keeps_shape_and_range(name, channels):
    x = torch.rand(64, channels, 16, 20, generator=seeded())
    state = torch.get_rng_state()
    out, q = AUGMENTATIONS[name](x, torch.eye(64), seeded(3))
    again = AUGMENTATIONS[name](x, torch.eye(64), seeded(3))
    assert all(map(torch.equal, (out, q), again))
    assert torch.equal(state, torch.get_rng_state())
    assert out.shape == x.shape
    assert out.min() >= 0 and out.max() < 1 + 1e-5
    close(q.sum(1), torch.ones(64))


@pytest.mark.parametrize("name", CHANGES)
def test_each_image_is_changed_in_its_own_way_and_the_border_continued(name):
    image = torch.rand(3, 16, 20, generator=seeded())
    out, q = CHANGES[name](image.expand(64, -1, -1, -1), torch.eye(64), seeded())
    different = 50 if name != "gently" else 25          # half of them are as they were
    assert len(out.flatten(1).unique(dim=0)) > different
    assert torch.equal(q, torch.eye(64))
    white = torch.ones(50, 1, 16, 20)
    close(CHANGES[name](white, None, seeded())[0], white)


@pytest.mark.parametrize("name", MIXES)
def test_mixed_labels_say_how_much_of_each_image_there_is(name):
    grey = torch.linspace(0, 1, 64)
    out, q = MIXES[name](evenly(grey, 3), torch.eye(64), seeded())
    close(brightness(out), q @ grey)
    assert (q.diag() > 0).sum() > 60    # each row is of its own image
    if name == "mixup":                 # of halves, unless told otherwise
        assert set(q.unique().tolist()) <= {0, 0.5, 1}
    else:                               # else each image has a weight of its own
        assert len(q.diag().unique()) > 40


def test_cutmix_pastes_a_rectangle_and_keeps_the_share_that_its_paper_leaves():
    x = evenly(torch.linspace(0, 1, 4000), height=32, width=20)
    out, q = cnn.cutmix(x, torch.eye(4000), seeded())
    pasted = out != x
    rows = pasted.any(3, keepdim=True)
    columns = pasted.any(2, keepdim=True)
    assert torch.equal(pasted, rows & columns)
    assert rows.int().diff(dim=2).abs().sum(2).max() <= 2       # one piece
    assert len(rows.flatten(1).unique(dim=0)) > 200
    # Sides are the roots of uniform numbers u; a border cuts off s^2 / 4 of a side s on
    # average: what is pasted has the mean E[(s - s^2 / 4)^2] = 1/2 - 1/5 + 1/48.
    assert q.diag().mean() == approx(1 - 0.5 + 0.2 - 1 / 48, abs=0.015)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0, 200.0])
def test_beta_has_its_mean_and_its_variance(alpha):
    draws = cnn.random_beta(torch.empty(200_000), alpha, seeded())
    true = dist.Beta(alpha, alpha).variance
    assert draws.mean() == approx(0.5, abs=0.005)
    assert draws.var() == approx(true.item(), rel=0.02)


@pytest.mark.parametrize("channels, found, wanted, numbers", [
    (1, cnn.augment, cnn.affine, (15, 0.15, 0.1, 0.15, 0.0)),
    (3, cnn.augment, cnn.flip_crop, ()), (3, cnn.elastic, cnn.flip_crop, ()),
    (1, cnn.elastic, cnn.affine, (11.25, 0.1125, 0.075, 0.1125, 1.5))])
def test_what_is_done_to_grey_and_to_colour(channels, found, wanted, numbers):
    x = torch.rand(8, channels, 16, 16, generator=seeded())
    first, q = found(x, torch.eye(8), seeded())
    close(first, wanted(x, None, seeded(), *numbers)[0])
    assert torch.equal(q, torch.eye(8))


def some_of_each():
    """Nine real images that are black, five hybrids that are white; labels of their own."""
    q = torch.eye(14)
    black = torch.zeros(9, 1, 16, 16).byte()
    white = torch.full((5, 1, 16, 16), 255).byte()
    return (black, q[:9]), (white, q[9:])


def brighter(x, q, generator):
    """An augmentation that leaves a mark on images and on their percentages."""
    return x + 1, 2 * q


def twice(x, q, generator):
    return 2 * x, 3 * q


# Share at first and in the end, how much of the training is over, hybrids in a batch of 40.
@pytest.mark.parametrize("first, last, done, count", [
    (0, 0, 0, 0), (0.25, 0.25, 0.7, 10), (1, 1, 0.9, 40), (1, 0, 0, 40), (1, 0, 0.5, 40),
    (1, 0, 0.5625, 30), (1, 0, 0.75, 0), (1, 0, 0.99, 0), (0.5, 1, 0.1, 20),
    (0.5, 1, 0.625, 30)])
def test_a_batch_holds_the_stated_share_of_hybrids_or_of_mixed_images(
        first, last, done, count):
    real, made = some_of_each()
    share = (first, last)
    white = [1] * count + [0] * (40 - count)
    x, q = cnn.batches(real, 40, made, share=share)(seeded(), done)
    assert brightness(x).tolist() == white
    assert (q.argmax(1) >= 9).tolist() == white
    x, _ = cnn.batches(real, 40, mix=brighter, share=share)(seeded(), done)
    assert brightness(x).tolist() == white


# Of two hybrids (white) and six real images (black): values and sums of percentages of each.
@pytest.mark.parametrize("with_hybrids, how, hybrid, others", [
    (True, {"mix": brighter}, (2, 2), (0, 1)),                      # hybrids are mixed alone
    (True, {"move": brighter}, (1, 1), (1, 2)),                     # real images are moved
    (False, {"mix": twice, "move": brighter}, (0, 3), (1, 2)),      # none: real ones are mixed
    (True, {"augmentations": [brighter, twice]}, (4, 6), (2, 6)),   # one after the other
    (True, {"mix": twice, "move": brighter, "augmentations": [twice]}, (4, 9), (2, 6))])
def test_hybrids_are_mixed_real_images_moved_and_the_batch_augmented(
        with_hybrids, how, hybrid, others):
    real, made = some_of_each()
    made = made if with_hybrids else None
    x, q = cnn.batches(real, 8, made, share=(0.25, 0.25), **how)(seeded(), 0)
    assert [*zip(brightness(x).tolist(), q.sum(1).tolist())] == [hybrid] * 2 + [others] * 6


# Images with a given label and with a guessed one; those with a given one among 40.
@pytest.mark.parametrize("given, guessed, count", [
    (9, 9, 20), (9, 27, 10), (27, 9, 30), (9, 891, 5), (1, 1000, 5)])
def test_an_eighth_of_real_images_have_a_given_label_or_more_if_there_are_more(
        given, guessed, count):
    black = torch.zeros(1000, 1, 16, 16).byte()
    first, second = torch.eye(2)
    real = black[:given], first.expand(given, 2)
    pseudo = black[:guessed], second.expand(guessed, 2)
    made = some_of_each()[1][0], torch.ones(5, 2)
    both = torch.tensor([count, 40.0 - count])
    how = {"pseudo_labelled": pseudo, "share": (0.5, 0.5)}
    x, q = cnn.batches(real, 80, made, **how)(seeded(), 0)
    assert brightness(x).tolist() == [1] * 40 + [0] * 40
    assert torch.equal(q[40:].sum(0), both)
    _, q = cnn.batches(real, 80, mix=brighter, **how)(seeded(), 0)
    assert torch.equal(q[:40].sum(0), 2 * both)         # mixed are both kinds
    assert torch.equal(q[40:].sum(0), both)


# ---- deformations: how images of a class move, and whether they say so ----------------------

def blobs(count, height=16, width=16, seed=0):
    """Smooth images (count,1,height,width) of four bright spots each, none like another."""
    g = seeded(seed)
    centre = torch.rand(count, 4, 2, 1, 1, generator=g) * 1.2 - 0.6
    radius = torch.rand(count, 4, 1, 1, generator=g) * 0.15 + 0.15
    right, down, *_ = deform.flow_functions(height, width)
    distance = (right - centre[:, :, 0]).square() + (down - centre[:, :, 1]).square()
    return (-distance / (2 * radius ** 2)).exp().amax(1, keepdim=True)


AFFINE = (0, 25)                        # of 28 coefficients the first 3, and the others
BENDING = (3, 0)


def random_part(count, part, size=0.12, seed=0):
    """Coefficients (count,2,28) of random affine maps or of random smooth flows."""
    return F.pad(size * noise(count, 2, 28 - sum(part), seed=seed), part)


def test_a_flow_is_affine_and_of_nodes_and_at_p_is_seen_what_is_there_the_border_continued():
    here = places(3, 12, 20)
    flow = noise(3, 12, 20, 2)
    there = here + flow.permute(0, 3, 1, 2)
    inside = torch.stack([there[:, 0].clamp(0, 19), there[:, 1].clamp(0, 11)], 1)
    close(deform.warp(here, flow), inside, atol=1e-4, rtol=0)
    v = random_part(2, AFFINE)          # an affine map in half sides
    flow = deform.flow_of(v, 12, 20)
    for row, column in itertools.product((0, 5, 11), (0, 7, 19)):
        place = torch.tensor([(column + 0.5) / 10 - 1, (row + 0.5) / 6 - 1, 1])
        close(flow[:, row, column], v[:, :, :3] @ place * torch.tensor([10.0, 6.0]))
    v = random_part(1, BENDING)
    flow = deform.flow_of(v, 17, 21)    # the nodes: every fourth row, every fifth column
    nodes = v[0, :, 3:].unflatten(1, (5, 5)).permute(1, 2, 0)
    close(flow[0, ::4, ::5], nodes * torch.tensor([10.5, 8.5]))


# By how much the difference of the images falls, and what is missed of the flow at most.
@pytest.mark.parametrize("part, height, width, better, most", [
    (AFFINE, 20, 24, 30, 0.1), (BENDING, 20, 24, 2, 0.7),
    (AFFINE, 40, 48, 20, 0.2)])         # in smaller images
def test_registration_finds_a_known_flow(part, height, width, better, most):
    moving = blobs(8, height, width)
    true = deform.flow_of(random_part(8, part), height, width)
    target = deform.warp(moving, true)
    found = deform.flow_of(deform.register(target, moving), height, width)
    after = (deform.warp(moving, found) - target).square().mean((1, 2, 3))
    assert (after < (moving - target).square().mean((1, 2, 3)) / better).all()
    # Where there is something to be seen.
    bright = target.squeeze(1) > 0.5
    miss = (found - true)[bright].norm(dim=1).mean()
    assert miss < most * true[bright].norm(dim=1).mean()


def test_directions_have_the_covariance_of_the_coefficients():
    v = noise(200, 2, 28) * torch.rand(56, generator=seeded()).view(2, 28) + 3
    directions = deform.square_root(v)
    true = v.flatten(1).double().T.cov(correction=0)
    close(directions @ directions.T, true, check_dtype=False, atol=1e-5, rtol=1e-4)
    widths = directions.norm(dim=0)
    assert torch.equal(widths, widths.sort(descending=True).values)
    close(directions.T @ directions, widths.square().diag(), atol=1e-5, rtol=0)
    for pairs in (0, 1):                # those of one pair or none are zero
        assert not deform.square_root(v[:pairs]).any()


def test_pairs_are_of_one_class_and_drawn_evenly_never_of_an_image_with_itself():
    y = torch.tensor([0] * 30 + [1] * 4 + [2])[torch.randperm(35, generator=seeded())]
    i, j = deform.same_class_pairs(y, seeded(), each=6)
    assert torch.equal(y[i], y[j])
    assert (i != j).all()
    assert len(set(zip(i.tolist(), j.tolist()))) == len(i)
    often = i.bincount(minlength=35)
    assert torch.equal(often, torch.tensor([6, 3, 0])[y])       # a small class has fewer
    often = torch.zeros(20)
    for seed in range(300):
        i, j = deform.same_class_pairs(torch.zeros(20).long(), seeded(seed), each=5)
        often += j[i == 0].bincount(minlength=20)
    assert often[0] == 0
    assert often[1:].min() > 50 and often[1:].max() < 110      # 79 on average


@pytest.mark.parametrize("seed", range(3))
def test_the_nll_of_the_kernel_classifier_is_that_of_its_formula(seed):
    x = noise(12, 1, 4, 4, seed=seed)
    asked = noise(7, 1, 4, 4, seed=9 + seed)
    y = torch.arange(12) % 3
    asked_y = torch.arange(7) % 4       # one class is unknown
    square = (asked[:, None] - x).double().square().sum((2, 3, 4)).tolist()
    nearest = sorted(map(min, square))[3]               # their median
    losses = []
    for factor in (0.05, 0.1, 0.2, 0.4, 1, 100):
        total = 0.0
        for row, true in zip(square, asked_y):
            mass = [math.exp(-distance / (2 * factor * nearest)) for distance in row]
            right = sum(weight for weight, c in zip(mass, y) if c == true)
            total -= math.log(0.98 * right / sum(mass) + 0.02 / 4)
        losses.append(total / 7)
    assert deform.kernel_nll(x, y, asked, asked_y) == approx(min(losses), rel=1e-4)


def set_that_moves(count=40, seed=0, size=0.15, objects=4):
    """Some objects, each seen turned, sheared and shifted at random; labels."""
    y = torch.arange(count) % objects
    v = random_part(count, AFFINE, size, seed + 1)
    return deform.warp(blobs(objects, seed=seed)[y], deform.flow_of(v, 16, 16)), y


def set_of(what, seed):
    """Images (40,1,16,16) and labels of a kind."""
    x, y = set_that_moves(seed=seed)
    two = blobs(2, seed=seed)
    if what == "random labels":
        y = y[torch.randperm(40, generator=seeded(seed))]
    if what == "mirrored pairs":        # of ten objects that hardly move
        x, y = set_that_moves(seed=seed, size=0.05, objects=10)
        x = torch.where(torch.rand(40, 1, 1, 1, generator=seeded(seed)) < 0.5, x.flip(3), x)
    if what == "no movement":
        x = blobs(4, seed=seed)[y]
    if what == "mirrored classes":      # two are what the others look like in a mirror
        x = torch.cat([two, two.flip(3)])[y]
    if what in ("no movement", "mirrored classes"):
        x = (x + 0.2 * noise(40, 1, 16, 16, seed=seed)).clamp(0, 1)
    return x, y


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("what, moving, mirror", [
    ("movement", True, None), ("no movement", False, False), ("random labels", False, False),
    ("mirrored pairs", None, True), ("mirrored classes", None, False)])     # None: whatever
def test_images_say_whether_they_move_and_whether_a_mirror_makes_their_like(
        what, moving, mirror, seed):
    moves = TRUE_FIT(*set_of(what, seed), seeded())
    assert moving in (None, moves.strength > 0)
    assert mirror in (None, moves.mirror)
    if moving:
        chosen = moves.losses[deform.Choice(moves.strength)]
        assert chosen < 0.8 * moves.losses[deform.STILL]


# Losses of the strengths 0, 1/4 .. 1; how much less those of mirrored images are.
@pytest.mark.parametrize("nll, gain, strength, mirror", [
    ([1.0, 0.9, 0.8, 0.8, 0.9], [0.0] * 10, 0.5, False),
    ([1.0, 0.996, 0.9955, 0.999, 1.0], [0.0] * 10, 0.0, False),         # below the margin
    ([1.0, 0.996, 0.994, 0.999, 1.0], [0.0] * 10, 0.5, False),
    ([1.0] * 5, [0.004] * 10, 0.0, False),                              # likewise
    ([1.0] * 5, [0.006] * 10, 0.0, True),
    ([1.0] * 5, [0.3, -0.1] * 7, 0.0, False),   # 2 errors: 0.4 / 14 ** 0.5 = 0.107
    ([1.0] * 5, [0.3, -0.1] * 9, 0.0, True)])   # 0.4 / 18 ** 0.5 = 0.094
def test_a_gain_decides_if_it_is_above_the_margin_and_its_error(
        monkeypatch, nll, gain, strength, mirror):
    spread = torch.tensor([0.2, -0.2]).repeat(len(gain) // 2)       # of random halves
    losses = {deform.Choice(k / 4): loss + spread for k, loss in enumerate(nll)}
    losses[deform.MIRRORED] = losses[deform.STILL] - torch.tensor(gain)
    monkeypatch.setattr(deform, "held_out_losses", lambda *what: losses)
    moves = TRUE_FIT(*set_that_moves(8), seeded())
    assert (moves.strength, moves.mirror) == (strength, mirror)
    said = [*nll, nll[0] - sum(gain) / len(gain)]
    assert [*moves.losses.values()] == approx(said, abs=1e-6)


def test_what_images_say_depends_on_the_generator_not_on_dtypes_or_on_unlabelled_images():
    x, y = set_that_moves(24)
    x = (x * 255).round().byte()
    state = torch.get_rng_state()
    first, second = (TRUE_FIT(x, y, seeded()) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.losses == second.losses
    other = TRUE_FIT(x.expand(-1, 3, -1, -1) / 255, (7 * y.int() + 5).tolist(), seeded())
    covariances = [moves.directions @ moves.directions.T for moves in (first, other)]
    close(*covariances, atol=1e-4, rtol=0)
    some = torch.arange(24) % 3 > 0     # those that have a label
    moves = TRUE_FIT(x, y.where(some, -1), seeded())
    assert moves.strength == TRUE_FIT(x[some], y[some], seeded()).strength
    others = random_pixels(24, 1, 16, 16)
    again = TRUE_FIT(others.where(~some[:, None, None, None], x), y.where(some, -1), seeded())
    close(again.directions, moves.directions)


@pytest.mark.parametrize("y", [[], [0], [0, 1], [0, 1, 2, 3]], ids=len)
def test_without_two_images_of_a_class_nothing_moves(y):
    moves = TRUE_FIT(easy(4)[0][:len(y)], torch.tensor(y).long(), seeded())
    assert moves.words() == "no deformations"
    x = torch.rand(5, 1, 16, 16, generator=seeded())
    assert moves(x, None, seeded())[0] is moves.gently(x, None, seeded())[0] is x


NO_INTEGER_EACH = [torch.zeros(3).long(), torch.zeros(5).long(), torch.arange(4)[None],
                   torch.zeros(4), torch.eye(4), torch.eye(4).long()]
NO_CLASS = [torch.tensor([0, 1, 2, -1]), torch.tensor([0, 1, 2, 3])]
@pytest.mark.parametrize("ask, refused, line", [
    (lambda y: latent.fit_labeller(noise(4, 2), noise(4, 2), y, 3), NO_INTEGER_EACH + NO_CLASS,
     "wanted one integer a code, in 0..2"),
    (lambda y: mixer_of()(shades()[0][:4], y), NO_INTEGER_EACH + NO_CLASS,
     "wanted one integer an image, in 0..2"),
    (lambda y: TRUE_FIT(easy(4)[0], y, seeded()), NO_INTEGER_EACH,
     "for 4 images; wanted one integer an image")], ids=["labeller", "mixer", "fit"])
def test_labels_that_are_not_one_integer_each_are_refused(ask, refused, line):
    for y in refused:
        with pytest.raises(ValueError, match=line):
            ask(y)


def test_random_flows_have_normal_weights_and_tangents_are_derivatives_of_warped_images():
    moves = deformations(0.5, height=12, width=20)
    basis = deform.flow_of(0.5 * moves.directions.T.unflatten(1, (2, 28)), 12, 20).flatten(1)
    flows = moves.sample(3000, seeded()).flatten(1)
    weights = torch.linalg.lstsq(basis.T, flows.T).solution
    close(basis.T @ weights, flows.T, atol=1e-3, rtol=0)
    close(weights.cov(), torch.eye(3), atol=0.1, rtol=0)
    close(weights.mean(1), torch.zeros(3), atol=0.06, rtol=0)

    x = deform.blur(torch.rand(2, 1, 16, 16, generator=seeded()), 1.5)
    moves = deformations(1.0)
    found = deform.tangents(x, moves.directions)
    for k in range(3):
        w = 1e-2 * F.one_hot(torch.tensor([k, k]), 3).float()
        forth = deform.warp(x, moves.flow(w))
        back = deform.warp(x, moves.flow(-w))
        change = (forth - back) / 2e-2
        inside = (change - found[:, :, k].view_as(x))[..., 1:-1, 1:-1]
        assert inside.abs().mean() < 0.05 * change.abs().mean()


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("mirror", [False, True])
def test_images_move_by_flows_of_their_own_and_gently_a_part_stays_as_it_was(strength, mirror):
    moves = deformations(strength, mirror)
    x = torch.rand(800, 1, 16, 16, generator=seeded())
    generator = seeded()
    turned = x
    if mirror:                          # half of them, left to right
        chance = torch.rand(800, generator=generator)
        assert (chance < 0.5).float().mean() == approx(0.5, abs=0.06)
        turned = torch.where(chance[:, None, None, None] < 0.5, x.flip(3), x)
    moved = deform.warp(turned, moves.sample(800, generator))
    close(moves(x, None, seeded())[0], moved)
    gently, _ = moves.gently(x, None, seeded())
    still = (gently - turned).abs().amax((1, 2, 3)) < 1e-4
    close(gently, torch.where(still[:, None, None, None], turned, moved), atol=1e-4, rtol=0)
    assert still.float().mean() == approx(1 - strength, abs=0.05)


@pytest.mark.parametrize("strength, mirror, words", [
    (0.0, False, "no deformations"), (0.0, True, "no deformations, mirrored or not"),
    (1.0, True, "deformations of strength 1, mirrored or not")])
def test_deformations_in_words_and_restored_from_their_fields(strength, mirror, words):
    moves = deformations(strength, mirror, 12, 20)
    again = deform.Deformations.restore({"deformations": moves.fields()})
    assert again.words() == moves.words() == words
    assert torch.equal(again.sample(5, seeded()), moves.sample(5, seeded()))


@pytest.mark.parametrize("strength", [0.0, 0.5])        # without one: of blurred pixels
def test_distances_are_the_least_over_deformations(strength):
    """Of |difference - T w|^2 + noise |w|^2, found by least squares."""
    x = deform.blur(torch.rand(4, 1, 24, 24, generator=seeded()), 2)
    near = torch.tensor([[1, 2], [2, 3], [3, 0], [0, 1]])
    moves = deformations(strength, height=24, width=24)
    small = F.avg_pool2d(deform.blur(x, 1), 2)
    pixels = small.flatten(1)
    unexplained = (pixels[near[:, 0]] - pixels).square().mean() / 2 + 1e-6
    slopes = deform.tangents(small, strength * moves.directions)
    found = moves.distances(x, near)
    for i, k in itertools.product(range(4), range(2)):
        tall = torch.cat([slopes[i], unexplained.sqrt() * torch.eye(3)])
        goal = torch.cat([pixels[near[i, k]] - pixels[i], torch.zeros(3)])
        w = torch.linalg.lstsq(tall, goal[:, None]).solution
        least = (goal - (tall @ w)[:, 0]).square().sum()
        assert found[i, k] == approx(float(least), rel=1e-3)


# Of two spots, at 9 and at 14, where each is seen. t = 1 is the first image, 0 the second.
@pytest.mark.parametrize("t, strength, first, second", [
    (0.5, 1.0, 11.5, 11.5), (1.0, 1.0, 9, 9), (0.0, 1.0, 14, 14), (0.5, 0.4, 10, 13),
    (0.3, 0.0, 9, 14)])
def test_a_morph_brings_two_images_as_far_towards_each_other_as_the_strength_says(
        t, strength, first, second):
    right, down = places(1, 16, 24)[0]
    pair = [(-((right - column).square() + (down - 8).square()) / 8).exp()[None, None]
            for column in (9, 14)]
    meet = deformations(strength, height=16, width=24).morph(*pair)
    seen = meet(*pair, torch.tensor([0]), torch.tensor([t]))
    for image, before, place, stays in zip(seen, pair, (first, second), (t == 1, t == 0)):
        assert ((image * right).sum() / image.sum()).item() == approx(place, abs=0.3)
        if stays or strength == 0:      # exactly the image
            close(image, before)


def test_a_morph_registers_every_pair_and_takes_those_asked_for():
    first = blobs(5).expand(-1, 3, -1, -1)
    second = blobs(5, seed=1).expand(-1, 3, -1, -1)
    meet = deform.Morph(first, second, batch=2)
    close(meet.v, deform.register(first[:, :1], second[:, :1]), atol=1e-3, rtol=0)
    rows = torch.tensor([3, 0, 3])
    t = torch.tensor([0.2, 0.5, 0.8])
    seen = meet(first[rows], second[rows], rows, t)
    flow = deform.flow_of(meet.v[rows], 16, 16)
    w = t[:, None, None, None]
    wanted = deform.warp(first[rows], (w - 1) * flow), deform.warp(second[rows], w * flow)
    close(seen, wanted)


# ---- scores, and the training of both networks ----------------------------------------------

def test_scores_are_those_by_hand_and_the_ece_has_15_bins_whatever_the_order_of_images():
    q = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.9, 0.1]])
    y = torch.tensor([0, 1, 0, 0])
    nll = -math.log(0.8 * 0.6 * 0.3 * 0.9) / 4
    # Gaps by confidence: -0.4 +0.7 | -0.2 -0.1; two bins that miss by 0.3 each, of 4 images.
    assert common.scores(q, y, bins=2) == approx(
        {"accuracy": 0.75, "balanced_accuracy": 5 / 6, "nll": nll, "brier": 0.35,
         "ece": 0.15}, abs=1e-6)
    # What was thought impossible costs a finite number of nats.
    scores = common.scores(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert scores["nll"] == approx(math.log(1e12), rel=1e-5)

    confidence = torch.linspace(0.5, 1, 3000)
    right = (noise(3000) < 0).float()
    gaps = (confidence - right).view(15, 200).mean(1)
    ece = gaps.abs().mean().item()
    assert common.ece(confidence, right) == approx(ece, abs=1e-6)
    q = torch.stack([confidence, 1 - confidence], 1)
    assert common.scores(q, (right == 0).long())["ece"] == approx(ece, abs=1e-6)
    third = torch.full((90,), 1 / 3)
    right = (torch.arange(90) % 3 == 0).float()         # one confidence, rightly stated
    for order in (right, right.sort()[0]):
        assert common.ece(third, order) == approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [100, 1600])
def test_the_interval_of_the_ece_is_that_of_a_bootstrap_and_the_same_every_time(count):
    q = torch.tensor([[0.9, 0.1]]).repeat(count, 1)
    y = (torch.arange(count) % 10 >= 7).long()
    low, high = common.ece_interval(q, y, draws=2000)
    # With one confidence the ECE is |0.9 - accuracy|: binomial.
    half = 1.96 * math.sqrt(0.7 * 0.3 / count)
    assert low == approx(0.2 - half, abs=0.15 * half)
    assert high == approx(0.2 + half, abs=0.15 * half)
    again = common.ece_interval(q, y)
    assert again == common.ece_interval(q, y) != common.ece_interval(q, y, seed=1)


def test_reliability_has_ten_bins_without_what_is_too_certain_or_too_rare():
    stated = torch.tensor([0.3] * 100 + [0.5] * 10 + [0.01] * 50)
    q = torch.stack([stated, 1 - stated], 1)
    y = (torch.arange(160) >= 25).long()
    low, high = common.reliability(q, y)
    assert low == approx({"stated": 0.3, "observed": 0.25, "pairs": 100})
    assert high == approx({"stated": 0.7, "observed": 0.75, "pairs": 100})
    q = torch.linspace(0.051, 0.949, 2000)
    rows = common.reliability(torch.stack([q, 1 - q], 1), torch.zeros(2000).long())
    stated = [row["stated"] for row in rows]
    assert stated == approx([0.095 + 0.09 * k for k in range(10)], abs=0.002)


def test_a_step_says_how_long_it_will_take(monkeypatch, capsys):
    monkeypatch.setattr(common.time, "monotonic", itertools.count(0, 61.7).__next__)
    common.Progress(4, "vae")(1, "well")        # one of four rounds of so many seconds is over
    assert capsys.readouterr().err.strip() == "vae 1/4  well  0:03:05 left"


NETWORKS = pytest.mark.parametrize("module", [vae, cnn], ids=["vae", "cnn"])


def tiny_training(module, steps=12, rounds=4, seed=0, **how):
    """A tiny network, its batches of easy images, and its `fit`, not begun."""
    x, y = easy(60)
    torch.manual_seed(seed)
    if module is vae:
        model = vae.VAE(1, 16, 16, latent_dim=4, hidden=8, units=16)
        next_batch = vae.batches(x, 8)
    else:
        model = cnn.CNN(1, 3, width=4)
        next_batch = cnn.batches((x, 0.7 * F.one_hot(y, 3) + 0.1), 8)       # soft labels
    how.setdefault("generator", seeded(seed))
    return model, next_batch, module.fit(model, next_batch, steps=steps, rounds=rounds, **how)


@pytest.mark.parametrize("module, how, highest, kind, betas, decay", [
    (vae, {}, 0.003, torch.optim.Adam, (0.9, 0.99), 0),
    (vae, {"momentum": 0.5, "lr": 0.02}, 0.02, torch.optim.Adam, (0.5, 0.99), 0),
    (cnn, {}, 0.003, torch.optim.AdamW, (0.9, 0.999), 0.05),
    (cnn, {"weight_decay": 0.3, "lr": 0.02}, 0.02, torch.optim.AdamW, (0.9, 0.999), 0.3)])
def test_every_weight_is_trained_at_a_rate_that_rises_over_15_hundredths_and_falls_to_zero(
        module, how, highest, kind, betas, decay):
    taken = []
    hook = register_optimizer_step_pre_hook(
        lambda optimiser, *given: taken.append((optimiser, dict(optimiser.param_groups[0]))))
    model, _, rows = tiny_training(module, steps=40, **how)
    half = list(itertools.islice(rows, 2))[-1]
    list(tiny_training(module, steps=40, state=half["state"], **how)[2])
    hook.remove()
    # The first step counts as one; the last is followed by zero.
    rates = np.interp(range(40), [-1, 5, 6, 40], [0, highest, highest, 0])
    assert [step["lr"] for _, step in taken] == approx(rates)   # in two pieces, too
    optimiser, step = taken[0]
    assert type(optimiser) is kind
    assert (step["betas"], step["weight_decay"]) == (betas, decay)
    assert {*map(id, step["params"])} == {*map(id, model.parameters())}


@NETWORKS
@pytest.mark.parametrize("steps, how, ends", [
    (12, {"rounds": 4}, [3, 6, 9, 12]), (3, {"rounds": 10}, [1, 2, 3]),
    (7, {"rounds": 2}, [4, 7])])
def test_a_row_tells_where_its_round_ends_and_how_fast_it_was(
        module, steps, how, ends, monkeypatch):
    seconds = itertools.count()         # a clock that is looked at twice a round
    monkeypatch.setattr(module.time, "perf_counter", seconds.__next__)
    _, _, rows = tiny_training(module, steps=steps, **how)
    rows = list(rows)
    assert [row["step"] for row in rows] == [row["state"]["step"] for row in rows] == ends
    assert [row["images_per_second"] for row in rows] == list(8 * np.diff([0, *ends]))


@pytest.mark.parametrize("module, how, weights", [
    (cnn, {}, [1]), (vae, {}, [1, 1]), (vae, {"beta": 7}, [1, 7])])
def test_a_row_holds_the_mean_of_its_round_and_the_gradient_is_that_of_the_loss(
        module, how, weights):
    model, next_batch, rows = tiny_training(module, steps=6, rounds=2, lr=0.0, **how)
    generator = seeded()

    def terms():
        if module is vae:
            return model(next_batch(generator), generator)
        x, q = next_batch(generator, 0)
        return [-(q * model(x).log_softmax(1)).sum(1).mean()]

    for row in rows:
        losses = [terms() for _ in range(3)]
        means = [sum(terms).item() / 3 for terms in zip(*losses)]
        names = ["reconstruction", "kl"] if module is vae else ["loss"]
        assert [row[name] for name in names] == approx(means, rel=1e-4)
    loss = sum(weight * term for weight, term in zip(weights, losses[-1]))
    true = torch.autograd.grad(loss, [*model.parameters()])
    close([weight.grad for weight in model.parameters()], [*true], atol=1e-5, rtol=1e-4)


def test_predicting_between_rounds_changes_neither_the_training_nor_the_mode():
    model, _, rows = tiny_training(cnn)
    plain, _, others = tiny_training(cnn)
    x, _ = easy(9)
    for _ in zip(rows, others):
        together = cnn.predict(model, x)
        close(cnn.predict(model, x[:1]), together[:1])          # by the training's statistics
        assert all(layer.training for layer in model.modules())
    assert same(model.state_dict(), plain.state_dict())
    cnn.predict(model.eval(), x)
    assert not any(layer.training for layer in model.modules())


@NETWORKS
def test_a_state_resumes_as_often_as_asked_and_a_loss_not_finite_is_told_with_its_steps(
        module, tmp_path):
    model, _, rows = tiny_training(module)
    random_numbers = torch.get_rng_state()
    rows = list(rows)                   # the state of an earlier row is still its own
    assert torch.equal(random_numbers, torch.get_rng_state())   # a training has a generator
    torch.save(rows[1]["state"], tmp_path / "state.pt")
    for state in (rows[1]["state"], rows[1]["state"], read(tmp_path / "state.pt")):
        again, _, rest = tiny_training(module, state=state, generator=seeded(5), seed=1)
        assert [row["step"] for row in rest] == [9, 12]
        assert same(again.state_dict(), model.state_dict())
    assert same(rows[-1]["state"]["model"], model.state_dict())
    model, _, rows = tiny_training(module)
    assert next(rows)["step"] == 3
    for weight in model.parameters():
        weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite between steps 3 and 6"):
        next(rows)


@pytest.mark.parametrize("n, of_vae, of_cnn", [
    (100, 600, 300), (101, 600, 400), (301, 600, 800), (1000, 600, 800), (1001, 1500, 1600),
    (3001, 1500, 2400), (10_001, 3000, 2400)])
def test_more_images_take_more_steps_and_colour_twice_as_many(n, of_vae, of_cnn):
    images = torch.empty(n, 1, 1, 1)
    assert vae.steps_for(images) == of_vae
    assert cnn.steps_for(images) == cnn.steps_for(images[:9], n) == of_cnn
    assert cnn.steps_for(images.expand(-1, 3, 1, 1)) == 2 * of_cnn
    assert cnn.steps_for(images[:, :, 0, 0]) == min(of_cnn, 800)        # features
    # Others without a label count up to 1,000 images.
    both = min(n + 100, 1000)
    assert cnn.steps_for(images[:100], unlabelled=n) == cnn.steps_for(images, both)


def test_the_cnn_sees_images_of_every_kind_as_it_is_told_each_with_its_own_probabilities(
        monkeypatch):
    grey = evenly(torch.arange(14).byte())
    own = torch.eye(14)
    x, q = cnn.batches((grey[:5], own[:5]), 90, (grey[5:9], own[5:9]), share=(0.5, 0.5),
                       pseudo_labelled=(grey[9:], own[9:]))(seeded(), 0)
    close(255 * brightness(x), q.argmax(1).float())
    assert set(q.argmax(1).tolist()) == set(range(14))          # and all are drawn
    monkeypatch.setattr(cnn, "fit", lambda model, next_batch, **settings: next_batch)
    real, made = some_of_each()
    pseudo = torch.full((4, 1, 16, 16), 51).byte(), torch.eye(14)[:4]
    how = dict(mix=twice, share=(0.5, 0.25), augmentations=[brighter, twice], move=brighter,
               pseudo_labelled=pseudo)
    model, next_batch = cnn.train(*real, made=made, **how)
    assert model.config == {"channels": 1, "classes": 14, "width": 24, "side": 16}
    for done in (0, 0.9):
        found = next_batch(seeded(), done)
        close(found, cnn.batches(real, 64, made, **how)(seeded(), done))


def test_the_elbo_is_a_likelihood_of_draws_and_a_divergence_and_of_many_images_their_mean():
    images = random_pixels(25, 1, 16, 16)
    images[20:] = 255                   # the last part, a smaller one, is unlike the others
    found = vae.evaluate(lambda x, generator: (x.mean(), x.square().mean()), images,
                         generator=seeded(), batch=10)
    x = images / 255
    terms = [x.mean().item(), x.square().mean().item()]
    assert list(found) == ["reconstruction", "kl", "negative_elbo"]
    assert list(found.values()) == approx([*terms, sum(terms)], rel=1e-4)

    model, _, _ = tiny_training(vae)
    model.encoder[-1].bias.data = noise(8)              # widths unlike each other
    x = (noise(9, 1, 16, 16) < 0).float()
    mu, logvar = model.encode(x)
    posterior = dist.Normal(mu, logvar.exp().sqrt())
    z = mu + posterior.scale * noise(9, 4, seed=3)
    likelihood = dist.Bernoulli(logits=model.logits(z)).log_prob(x).sum() / 9
    divergence = dist.kl_divergence(posterior, dist.Normal(0, 1)).sum(1).mean()
    close(model(x, seeded(3)), (-likelihood, divergence))
    close(model.decode(z), model.logits(z).sigmoid())


@pytest.mark.parametrize("height, width", [
    (16, 16), (28, 28), (31, 31), (64, 64), (17, 40), (40, 17)])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_take_images_of_any_shape_in_parts_and_every_pixel_reaches_the_code(
        height, width, channels):
    images = random_pixels(7, channels, height, width)
    x = images / 255
    model = vae.VAE(channels, height, width, latent_dim=5, hidden=8, units=16)
    mu, logvar = vae.encode_all(model, images, batch=3)
    close((mu, logvar), model.encode(x))
    decoded = vae.decode_all(model, mu, batch=3)
    assert decoded.shape == x.shape
    close(decoded, model.decode(mu))
    classifier = cnn.CNN(channels, 4, width=4, side=max(height, width))
    close(cnn.predict(classifier, images, batch=3), classifier.eval()(x))
    sum(part.square().sum() for part in model.encode(x.requires_grad_())).backward()
    assert (x.grad != 0).float().mean() > 0.9
    assert x.grad[..., -1, :].any()     # the last row
    assert x.grad[..., -1].any()        # the last column


@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_layer_normalises_learns_as_if_it_had_and_predicts_by_moments_seen(channels):
    layer = cnn.NormalisedConvolution(channels, 5)
    layer.gain.data = 1 + torch.rand(5, generator=seeded())
    layer.bias.data = torch.rand(5, generator=seeded(1))
    x = torch.rand(6, channels, 12, 14, generator=seeded(2))
    found = layer(x)
    goal = noise(*found.shape, seed=3)
    (found * goal).sum().backward()
    slope = layer.weight.grad

    weight = layer.weight.detach().requires_grad_()
    kernel = weight.view(5, 3, 3, channels).permute(0, 3, 1, 2)
    plain = F.conv2d(x, kernel, padding=1)
    some = plain[:, :, ::2, ::2].transpose(0, 1).flatten(1)     # of every second patch
    scale = layer.gain.detach() / (some.var(1, unbiased=False) + 1e-5).sqrt()
    wanted = (plain - some.mean(1)[:, None, None]) * scale[:, None, None]
    wanted = wanted + layer.bias.detach()[:, None, None]
    (wanted * goal).sum().backward()
    close(found, wanted, atol=1e-4, rtol=1e-4)
    close(slope, weight.grad, atol=1e-3, rtol=1e-3)

    for _ in range(200):
        trained = layer(x)
    layer.eval()
    close(layer(x), trained, atol=1e-4, rtol=1e-4)
    close(layer(x[:2]), trained[:2], atol=1e-4, rtol=1e-4)      # whatever else is in the batch


# Of the networks as files of this format hold them: change one, and FORMAT with it.
@pytest.mark.parametrize("kind, side, config, wanted", [
    (vae.VAE, 28, (28, 28, 2, 4, 8), [0.2441, 0.6114, 0.6945, 0.4509, 0.0897]),
    (vae.VAE, 64, (64, 64, 2, 4, 8), [1.1466, 1.7326, 1.5311, 0.6275, 0.0686]),
    (cnn.CNN, 28, (2, 4, 28), [1.9016, -1.1787]), (cnn.CNN, 64, (2, 4, 64), [2.43, -1.6487])])
def test_a_network_of_this_format_computes_what_it_did(kind, side, config, wanted):
    model = kind(1, *config).eval()
    assert common.FORMAT == 7
    for weight in model.parameters():   # the same on every machine
        wave = torch.arange(weight.numel()).double().mul(0.7).sin()
        weight.data = (wave * weight.numel() ** -0.25).float().view(weight.shape)
    module = vae if kind is vae.VAE else cnn
    again = module.restore({"config": model.config, "model": model.state_dict()})
    assert type(again) is kind
    assert same(again.state_dict(), model.state_dict())
    wave = torch.arange(side ** 2).double().mul(0.3).sin()
    x = (wave / 2 + 0.5).float().view(1, 1, side, side)
    if kind is vae.VAE:
        code = torch.cat(again.encode(x), 1)
        found = [*code[0].tolist(), again.decode(code[:, :2]).std().item()]
    else:
        found = again(x)[0].tolist()
    assert found == approx(wanted, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.half, torch.bfloat16])
def test_images_of_any_kind_of_number_are_read_alike(dtype):
    x, _ = easy(9)
    model, _, _ = tiny_training(vae)
    classifier, _, _ = tiny_training(cnn)
    others = (x / 255).to(dtype)
    for answer in (functools.partial(vae.encode_all, model),
                   functools.partial(cnn.predict, classifier), deform.coarse):
        close(answer(others), answer(x), atol=0.01, rtol=0)
    close(deform.coarse(others.expand(-1, 3, -1, -1)), deform.coarse(x), atol=0.01, rtol=0)


@pytest.mark.parametrize("ask", [
    lambda x: vae.encode_all(tiny_training(vae)[0], x),
    lambda x: vae.batches(x, 30)(seeded()),
    lambda x: cnn.predict(tiny_training(cnn)[0], x),
    lambda x: cnn.batches((x, torch.eye(9)), 30)(seeded(), 0),
    lambda x: TRUE_FIT(x, torch.zeros(9).long(), seeded())],
    ids=["encode", "vae.batches", "predict", "cnn.batches", "fit"])
@pytest.mark.parametrize("spoil", [
    lambda x: x.float(), lambda x: x / 127.5 - 1, lambda x: x / 255 * math.nan,
    lambda x: x.int() + 100, lambda x: x[:, 0]],
    ids=["bytes as floats", "from -1 to 1", "NaN", "above 255", "no channels"])
def test_images_outside_their_range_or_without_channels_are_refused(ask, spoil):
    x = spoil(easy(9)[0])
    line = r"images span .* wanted floats in .0, 1., or uint8"
    if x.dim() == 3:
        line = r"images of shape .*, 16, 16\); wanted .B,C,H,W."
    with pytest.raises(ValueError, match=line):
        ask(x)


# ---- each file by itself --------------------------------------------------------------------

IMPORTS = """
import os, random, sys, numpy, torch
def state():
    return (str(random.getstate()), str(numpy.random.get_state()),
            torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_default_dtype(), list(sys.argv), dict(os.environ),
            torch.are_deterministic_algorithms_enabled())
before = state()
for name in "common deform vae latent hybrids cnn compare".split():
    __import__(name)
    assert state() == before, name
assert not {"matplotlib", "torchvision", "PIL"} & set(sys.modules)
"""


def test_importing_does_nothing(tmp_path):
    done = shell(sys.executable, "-B", "-c", IMPORTS, cwd=tmp_path, PYTHONPATH=str(HERE))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A function: name -> that file, imported where there is no other of ours, nor figures."""
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != HERE]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for ours in ("common", *SCRIPTS):
        monkeypatch.delitem(sys.modules, ours)
    for other in ("matplotlib", "torchvision", "PIL"):
        monkeypatch.setitem(sys.modules, other, None)       # its import would fail

    def alone(name):
        file = Path(shutil.copy(HERE / f"{name}.py", tmp_path))
        imported = re.findall(r"^(?:import|from) (\w+)", file.read_text(), re.MULTILINE)
        assert {"torch"} <= set(imported) <= {"torch", *sys.stdlib_module_names}
        module = importlib.import_module(name)
        assert Path(module.__file__) == file
        file.unlink()                   # the next one is alone, too
        del sys.modules[name]
        return module

    return alone


def test_each_file_works_alone(alone):
    vae = alone("vae")
    x = torch.zeros(5, 3, 20, 20)
    model, rows = vae.train(x.byte(), latent_dim=4, steps=3)
    assert [row["step"] for row in rows] == [1, 2, 3]
    mu, _ = vae.encode_all(model, x)
    assert vae.decode_all(model, mu).shape == x.shape
    assert vae.evaluate(model, x, generator=seeded())["kl"] > 0

    images = torch.rand(8, 3, 20, 20, generator=seeded())
    moves = alone("deform").Deformations.fit(images, torch.arange(8) % 2, seeded())
    moves.strength = 1.0
    moved, _ = moves.gently(images, None, seeded())
    pair = (images, images.flip(0))
    both = moves.morph(*pair)(*pair, torch.arange(8), torch.full((8,), 0.5))
    for found in (moved, *both):
        assert found.shape == images.shape
        assert (found - images).abs().max() > 0.01
    assert (moves.distances(images, torch.arange(8).flip(0)[:, None]) > 0).all()

    latent = alone("latent")
    mu = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    logvar = torch.full((4, 1), -2.0)
    y = torch.tensor([0, 0, 1, 1])
    found = latent.embed(mu, logvar, torch.arange(4), y, 2, mu, torch.zeros(4, 1, 16, 16))
    for posterior in (found.posterior, latent.Gaussian.fit(mu, logvar, y, 2)):
        q = posterior(torch.zeros(1, 1))[0]
        assert latent.words(q, ["cat", "dog"]) == "50% cat + 50% dog"

    def undecided(z):                   # all that hybrids ask of a posterior
        return torch.full((len(z), 2), 0.5)

    undecided.prior = torch.tensor([0.5, 0.5])
    mu = noise(6, 2)
    known = SimpleNamespace(mu=mu, logvar=mu, y=torch.arange(6) % 2, posterior=undecided)
    made = alone("hybrids").make(
        known, random_pixels(6, 1, 16, 16), lambda z: z.new_zeros(len(z), 1, 16, 16),
        count=10, moves=deformations(), generator=seeded())
    assert made.x.shape == (10, 1, 16, 16)
    close(made.q.sum(1), torch.ones(10))

    cnn = alone("cnn")
    real = (random_pixels(9, 1, 16, 16), torch.eye(9))
    model, rows = cnn.train(*real, made=real, pseudo_labelled=real, mix=cnn.mixup, width=4,
                            augmentations=[cnn.augment, cnn.elastic], move=cnn.affine,
                            share=(0.5, 0.5), steps=3, batch_size=8)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert cnn.predict(model, real[0]).shape == (9, 9)


# ---- the embedded digits, the rows that are set aside, and subsets --------------------------

@functools.cache
def digits():
    """The glyphs, drawn while other random numbers are about."""
    torch.manual_seed(99)
    state = torch.get_rng_state()
    data = common.glyphs()
    assert torch.equal(torch.get_rng_state(), state)
    return data


def test_glyphs_are_those_of_the_results_that_stand_in_assets():
    import matplotlib
    data = digits()
    assert data.images.shape == (10_000, 1, 28, 28)
    assert data.labels.bincount().tolist() == [1000] * 10
    assert data.test_labels.bincount().tolist() == [200] * 10
    assert torch.equal(data.validation, torch.arange(9000, 10_000))     # of other fonts
    assert data.images.float().mean().item() == approx(35.887, abs=0.005)
    last = data.test_images[-1].float().view(4, 7, 4, 7).mean((1, 3))
    wanted = [[0.22, 63.73, 83.84, 0.14], [2.92, 151.82, 128.49, 23.96],
              [0.18, 110.49, 174.06, 57.27], [0.18, 45.61, 82.82, 1.20]]
    close(last, torch.tensor(wanted), atol=0.03, rtol=0)
    build = torch.__version__, matplotlib.__version__, torch.backends.cpu.get_cpu_capability()
    if build == ("2.14.1+cu130", "3.11.2", "AVX512"):   # others may round otherwise
        assert common.fingerprint(data.images.numpy().tobytes()) == "ba110d63c7da42c4"
        assert common.fingerprint(data.test_images.numpy().tobytes()) == "f2b70e4f0f7aecb8"


def set_aside_by_hand(labels, names, share, least, last):
    """Of each class, sorted by the SHA-256 of the names, so many rows from one end."""
    rows = []
    for c in set(labels) - {-1, ""}:
        mine = [row for row, label in enumerate(labels) if label == c]
        mine.sort(key=lambda row: common.fingerprint(names[row].encode()))
        count = max(1, round(share * len(mine))) if len(mine) >= least else 0
        rows += mine[len(mine) - count:] if last else mine[:count]
    return sorted(rows)


@pytest.mark.parametrize("share, least, last, first", [
    (0.2, 2, False, [12, 14, 15]),      # on every machine
    (0.1, 10, True, [6, 7, 10])])
def test_of_each_class_a_hash_of_the_names_sets_a_share_aside(share, least, last, first):
    labels = [0] * 40 + [1] * 2 + [2] + [-1] * 9 + [0] * 7 + [3] * 10
    names = [f"train/{k}" for k in range(len(labels))]
    rows = common.set_aside(labels, names, share, least, last)
    assert rows.tolist() == set_aside_by_hand(labels, names, share, least, last)
    assert common.set_aside([0] * 40, names, share, least, last)[:3].tolist() == first
    for count in range(least, 40):      # one more image moves at most one other
        before, after = (set(common.set_aside([0] * n, names, share, least, last).tolist())
                         for n in (count, count + 1))
        assert len((before ^ after) - {count}) <= 1


def record(x, y, classes, name="some"):
    """A data set whose first 60 images are its test images, too."""
    names = [f"train/{k}" for k in range(len(x))] + [f"test/{k}" for k in range(60)]
    return common.assemble(name, torch.cat([x, x[:60]]), np.concatenate([y, y[:60]]),
                           [part.split("/")[0] for part in names], names, classes)


@functools.cache
def uneven():
    """Seven classes of unequal size."""
    x, y = easy(3000, classes=7)
    y[500:1000] = 6
    return record(x, y, list("abcdefg"))


@pytest.mark.parametrize("make_set", [digits, uneven])
def test_pool_and_validation_are_all_training_images_and_subsets_balanced_nested_or_disjoint(
        make_set):
    data = make_set()
    rows = torch.cat([data.pool, data.validation])
    assert torch.equal(rows.sort()[0], torch.arange(len(data.labels)))
    assert torch.equal(data.pool.sort()[0], data.pool)
    assert len(data.names) == len(data.images) + len(data.test_images)
    if data.name != "glyphs":           # a tenth of each class, chosen by name
        wanted = set_aside_by_hand(data.labels.tolist(), data.names, 0.1, 10, True)
        assert data.validation.tolist() == wanted
    used = set()
    for seed in range(10):
        small, large = (common.subset(data, n, seed) for n in (100, 300))
        for rows in (small, large):
            counts = data.labels[rows].bincount()
            assert counts.max() - counts.min() <= 1
            assert len(rows.unique()) == len(rows)
            assert torch.isin(rows, data.pool).all()
        assert torch.isin(small, large).all()
        used.update(small.tolist())
    assert len(used) == 1000            # of ten seeds, no row twice
    every = common.subset(data, len(data.pool), 3)
    assert torch.equal(every.sort()[0], data.pool)


def test_the_pool_has_rows_without_a_label_and_all_or_some_with_one_are_learned_from(capsys):
    x, y = easy(120)
    y[70:100] = -1
    data = record(x, y, ANIMALS)
    assert data.unlabelled().tolist() == list(range(70, 100))
    rows = torch.cat([data.labelled(), data.unlabelled()])
    assert torch.equal(rows.sort()[0], data.pool)
    assert (data.labels[data.validation] >= 0).all()
    facts = json.loads(json.dumps(data.facts()))
    assert (facts["images"], facts["unlabelled"], facts["test_images"]) == (90, 30, 60)
    assert (facts["shape"], facts["classes"]) == ([1, 16, 16], ANIMALS)

    data = record(*easy(600, classes=10), list("0123456789"))
    data.labels[::2] = -1               # all of five classes
    whole = common.training_rows(data, SimpleNamespace(images=None))
    assert torch.equal(whole, data.pool)
    for images in (30, 9999):
        run = SimpleNamespace(images=images, seed=3, bound=False)
        rows = common.training_rows(data, run)
        assert torch.equal(rows, common.subset(data, min(images, 270), 3))
        assert data.labels[rows].bincount().tolist() == [0, len(rows) // 5] * 5
    assert "there are 270 images with a label" in capsys.readouterr().err
    with pytest.raises(common.Mistake, match="there are 270 besides validation images"):
        common.subset(data, 271, 0)


@pytest.mark.parametrize("part", [None, "images", "labels", "test_images", "test_labels",
                                  "pool"])
def test_a_fingerprint_is_that_of_images_labels_and_parts_and_of_nothing_else(part):
    first, second = (record(*easy(90), ANIMALS, name) for name in ("first", "second"))
    second.names = second.names[::-1]
    second.which = {"dataset": "elsewhere"}
    if part:
        tensor = getattr(second, part)
        tensor[7] = 1 - tensor[7]
    assert (first.fingerprint == second.fingerprint) == (part is None)


@pytest.mark.parametrize("n, seed, glyphs, others", [
    (5, 3, [3556, 3520, 5043], [2420, 1333, 1698]),
    (9, 0, [44, 4861, 8187], [259, 2724, 366]),
    (12, 27, [6070, 2561, 7992], [357, 1387, 2907])])
def test_subsets_are_those_of_the_results_that_stand_in_assets(n, seed, glyphs, others):
    assert common.subset(digits(), n, seed)[:3].tolist() == glyphs
    assert common.subset(uneven(), n, seed)[:3].tolist() == others


# ---- arrays, and folders as people have them ------------------------------------------------

def thirds(n):
    return np.arange(n) % 3


@pytest.mark.parametrize("given, wanted", [
    (GREY[:, 0], GREY), (GREY.transpose(0, 2, 3, 1), GREY),
    (RGB, RGB), (RGB.transpose(0, 2, 3, 1), RGB),
    (np.repeat(GREY, 3, 1), GREY), (GREY[:, 0] / 255, GREY),
    (GREY[:, 0].astype("f4"), GREY),
    (GREY[:, 0] // 128, GREY // 128 * 255)])
def test_arrays_of_every_layout_are_the_same_images(tmp_path, given, wanted):
    file = npz(tmp_path / "a.npz", x_train=given, x_test=given[:60], x_val=given[:30],
               y_val=thirds(30), X_Unlabeled=given[:9])
    data = dataset(file, tmp_path)
    every = np.concatenate([wanted, wanted[:30], wanted[:9]])
    assert np.array_equal(data.images.numpy(), every)
    assert np.array_equal(data.test_images.numpy(), wanted[:60])
    assert data.validation.tolist() == list(range(200, 230))
    assert data.unlabelled().tolist() == list(range(230, 239))
    assert data.names[199:201] == ["train/199", "validation/0"]
    assert data.names[230:239:8] == ["unlabelled/0", "unlabelled/8"]


@pytest.mark.parametrize("kinds, classes, wanted, labels", [
    ([3, 7, 9, -1], None, ["3", "7", "9"], [0, 1, 2, -1]),
    ([3, 7, 9, -1], ANIMALS, ANIMALS, [0, 1, 2, -1]),
    ([[1], [0], [2], [-1]], ANIMALS, ANIMALS, [1, 0, 2, -1]),
    ([0.0, 1.0, 2.0, -1.0], ANIMALS, ANIMALS, [0, 1, 2, -1]),
    (np.eye(3, 3, 0, "u1"), ANIMALS, ANIMALS, [0, 1, 2]),
    (["dog", "eel", "cat", ""], None, ANIMALS, [1, 2, 0, -1]),
    ([b"dog", b"eel", b"cat", b""], None, ANIMALS, [1, 2, 0, -1]),
    (["cafe\u0301", "b", "a", ""], None, ["a", "b", "caf\xe9"], [2, 1, 0, -1])])
def test_labels_are_numbers_names_or_one_hot_rows(tmp_path, kinds, classes, wanted, labels):
    def drawn(count, kinds, values):
        return np.array(values)[np.arange(count) % len(kinds)]

    changes = {"y_train": drawn(200, kinds, kinds), "y_test": drawn(60, labels[:3], kinds),
               "classes": None if classes is None else np.array(classes)}
    data = dataset(npz(tmp_path / "a.npz", **changes), tmp_path)
    assert data.classes == wanted
    assert data.labels.tolist() == drawn(200, kinds, labels).tolist()
    assert data.test_labels.tolist() == labels[:3] * 20
    assert (data.labels[data.validation] >= 0).all()


def scaled(factor, offset=0.0, dtype=np.float64, **changes):
    """Arrays of the tiny data set with pixels value / 255 * factor + offset."""
    arrays = {}
    for part, count in (("train", 200), ("test", 60)):
        x = easy(count, seed=count)[0].numpy()
        pixels = x / x.max() * factor + offset
        arrays[f"x_{part}"] = (pixels.round() if factor > 500 else pixels).astype(dtype)
    return arrays | changes


@pytest.mark.parametrize("highest, dtype, white", [
    (1.2499, "f4", 1), (1.0, "f2", 1), (260.4, "f8", 255), (1023, "u2", 1023),
    (4000, "i4", 4095), (65535, "u2", 65535),
    (300, "u2", 1023)])                 # whole numbers are not cut off
def test_pixels_of_every_usual_scale_are_read(tmp_path, capsys, highest, dtype, white):
    arrays = scaled(highest, dtype=dtype)
    arrays["x_test"] = arrays["x_test"] // 2 if white > 255 else arrays["x_test"] / 2
    data = dataset(npz(tmp_path / "a.npz", **arrays), tmp_path)
    for part, images in (("x_train", data.images), ("x_test", data.test_images)):
        wanted = (arrays[part].astype(np.float64) * 255 / white).clip(0, 255)
        assert np.abs(images.numpy() - wanted).max() <= 0.6
    assert data.facts()["white"] == white
    said = f"read as [0, {white}]" in capsys.readouterr().err
    assert said == (arrays["x_train"].max() != white)


@pytest.mark.parametrize("height, width", [(8, 8), (80, 80), (30, 90)])
def test_other_sides_than_16_to_64_become_squares(tmp_path, capsys, height, width):
    x = np.full((200, height, width), 200, np.uint8)
    x[:, :, :width // 2] = 100
    x[:, :, :(width - height) // 2] = 0                 # the margins are cut off
    file = npz(tmp_path / "a.npz", x_train=x, x_test=x[:60])
    data = dataset(file, tmp_path, "--image-size", 20)
    assert data.images.shape == (200, 1, 20, 20)
    assert data.images[..., :9].unique().tolist() == approx([100], abs=3)
    assert data.images[..., 11:].unique().tolist() == approx([200], abs=3)
    assert "the middle squares are scaled to 20x20" in capsys.readouterr().err
    Image.fromarray(x[0]).save(tmp_path / "a.png")
    like, _ = common.read_like(tmp_path / "a.png", data.facts())
    gap = like[0].float() - data.images[0]
    assert gap.abs().max() < 12


@pytest.mark.parametrize("name, kind", [
    ("cifar10", "CIFAR10"), ("emnist-letters", "EMNIST"), ("stl10", "STL10")])
def test_data_sets_of_torchvision_are_read_upright(tmp_path, monkeypatch, name, kind):
    from torchvision import datasets
    pixels = random_pixels(200, 16, 16).numpy()
    colour = np.stack([pixels] * 3, 1 if kind == "STL10" else 3)
    part = SimpleNamespace(data=pixels if kind == "EMNIST" else colour, targets=thirds(200),
                           labels=thirds(200), classes=["0 - a", "1 - b", "2 - c"])

    def offline(*root, **words):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets, kind, lambda *root, **words: part)
    data = dataset(name, tmp_path)
    wanted = pixels.transpose(0, 2, 1) if kind == "EMNIST" else pixels
    assert np.array_equal(data.images[:, 0].numpy(), wanted)
    assert data.classes == ["0", "1", "2"]
    monkeypatch.setattr(datasets, kind, offline)
    with pytest.raises(common.Mistake, match="in data, .*no route to host.*files into data"):
        dataset(name, tmp_path)


def noisy(root, classes=("bird", "fish"), per_class=10, seed=0):
    """Classes of small colour pictures, no two alike."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng([seed, zlib.crc32(str(root / name).encode())])
        for k in range(per_class):
            pixels = draw.integers(0, 250, (20, 20, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{k}.png")
    return root


# Folders of two classes, or of none, and how many pictures there are of each.
@pytest.mark.parametrize("given", [
    {"": 13}, {"": 3}, {"train": 13, "dev": 2}, {"Training": 10, "TEST": 3},
    {"train": 10, "Validation": 2, "Testing": 3}, {"": 13, "unlabelled": 3},
    {"train": 10, "test": 2, "unlabelled": 3},
    {"train": 12, "UNLABELLED/a/b": 3, "UNLABELLED": 3},
    {"train": 14, "unlabelled": 3, "train/unlabelled": 3}, {"": 10, "unlabelled": 0}])
def test_every_picture_of_a_folder_has_its_name_label_and_part(tmp_path, given, monkeypatch):
    monkeypatch.setattr(common, "FEW", 10)
    root = tmp_path / "zoo"
    wanted = {part: {} for part in ("train", "validation", "unlabelled", "test")}
    for folder, count in given.items():
        names = [common.PARTS.get(name.lower(), "train") for name in folder.split("/")]
        part = "unlabelled" if "unlabelled" in names else names[0]
        for c in [""] if part == "unlabelled" else ["bird", "fish"]:
            noisy(root / folder, [c], count)
            wanted[part] |= {Path(folder, c, f"{k}.png").as_posix(): c for k in range(count)}
    for part, *how in (("test", 0.2, 2, False), ("validation", 0.1, 10, True)):
        rest = wanted["train"]
        names = list(rest)
        if not wanted[part]:            # chosen by name, and not by the seed
            for row in set_aside_by_hand(list(rest.values()), names, *how):
                wanted[part][names[row]] = rest.pop(names[row])
    data = dataset(root, tmp_path, "--seed", 5)
    every = torch.arange(len(data.names))
    found = {"train": data.labelled(), "validation": data.validation,
             "unlabelled": data.unlabelled(), "test": every[len(data.images):]}
    labels = every_label(data)
    images = torch.cat([data.images, data.test_images])
    for part, rows in found.items():
        files = [data.names[row] for row in rows]
        assert {file: labels[file] for file in files} == wanted[part]
        for row, file in zip(rows, files):
            assert np.array_equal(images[row], common.read_image(root / file, (32, 32)))


def every_label(data):
    """The class of each image by its name; "" is none."""
    labels = [*data.labels.tolist(), *data.test_labels.tolist()]
    return dict(zip(data.names, [[*data.classes, ""][label] for label in labels]))


@pytest.mark.parametrize("parts", [[""], ["train", "test"]])
def test_hidden_things_links_and_results_are_no_classes(tmp_path, parts, monkeypatch):
    root = tmp_path / "zoo"
    for part in parts:
        noisy(root / part)
    before = dataset(root, tmp_path)
    for part in parts:
        for hidden in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
            noisy(root / part, [hidden, f"bird/{hidden}"], per_class=2)
        (root / part / "bird" / "._0.png").write_text("resource fork")
        (root / part / "bird" / "loop").symlink_to(root / part / "bird")
    monkeypatch.chdir(root)
    for out in ("runs/zoo", "results"):
        dataset(".", Path(out))
        noisy(root / out / "png")       # an export, as it were
        after = dataset(".", Path(out))
        assert after.names == before.names
        assert after.fingerprint == before.fingerprint
        assert (after.classes, after.name) == (["bird", "fish"], "zoo")


def test_scripts_on_a_folder_of_colour_pictures(tmp_path, undrawn, monkeypatch):
    monkeypatch.setattr(deform.Deformations, "fit", found((0.5, True)))
    words = ["--dataset", noisy(tmp_path / "zoo", per_class=16), "--image-size", 20]
    out = tmp_path / "run"
    assert run("deform", *words, "-o", out, "--images", 12) == 0
    assert run("vae", "-o", out, "--steps", 10, "--latent-dim", 1) == 0
    assert run("latent", "-o", out) == 0
    assert len(read(out / "latent.pt")["mu"]) == 12
    assert run("hybrids", "-o", out, "--count", 40, "--export", out / "png") == 0
    assert run("cnn", "-o", out, "--steps", 10, "--width", 4, "--augment") == 0
    assert read(out / "cnn.pt")["dataset"]["shape"] == [3, 20, 20]
    exported = next((out / "png").rglob("*.png"))
    assert Image.open(exported).mode == "RGB"


# ---- what is said of a data set, and what is kept of it -------------------------------------

def arrays(**changes):
    """Of a folder, where a tiny .npz is written with these changes -> its path."""
    return lambda folder: npz(folder / "a.npz", **changes)


def folders(*names, spoil=None, count=2):
    """Of a folder, where so many pictures are put into each of these; none if it ends in !."""
    def write(folder):
        for name in names:
            noisy(folder / "a", [name.strip("!")], 0 if name.endswith("!") else count)
        if spoil:
            spoil(folder / "a")
        return folder / "a"

    return write


def all_but_one_grey(root):
    for file in sorted(root.rglob("*.png"))[1:]:
        Image.open(file).convert("L").save(file)


TESTS = easy(60, seed=60)[0][:, 0].numpy()
SOME = functools.partial(folders, "bird", "fish", count=13)
@pytest.mark.parametrize("make_data, pattern", [
    (SOME(), None),
    (arrays(), None),
    (SOME(spoil=lambda root: shutil.copy(root / "bird/0.png", root / "fish/x.png")),
     "1 images are in two classes"),
    (arrays(x_unlabelled=TESTS[:7]), "7 of 81 validation and test images are training"),
    (SOME(spoil=all_but_one_grey), "only 1 of 26 images have colour"),
    (SOME(spoil=lambda root: (root / "bird/a.heic").write_text("")), "left out: 1 .heic"),
    (arrays(x_unlabeld=TESTS), "left out: x_unlabeld .*x_unlabelled"),
    (arrays(x_train=np.full((200, 16, 16), 60000, "u2") * (np.arange(16) > 0).astype("u2"),
            x_test=TESTS.astype("u2") * 16), "the highest pixels of the parts are .*65535"),
    (arrays(y_test=thirds(60) // 2), "no test images of eel"),
    (folders("bird", "fish", count=11), "fewer than 10 images a class")])
def test_what_a_person_should_know_of_a_data_set_is_said(tmp_path, capsys, make_data, pattern,
                                                         monkeypatch):
    monkeypatch.setattr(common, "FEW", 10)
    dataset(make_data(tmp_path), tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a: ")]
    if pattern is None:
        assert said == []
    else:
        assert any(re.match(f"a: {pattern}", line) for line in said), said


def test_a_picture_is_decoded_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    root = noisy(tmp_path / "zoo", per_class=13)
    reads = []

    def spy(path, true=common.read_image, **how):
        reads.append(f"{path.parent.name}/{path.name}")
        if len(reads) == 8:
            raise KeyboardInterrupt
        return true(path, **how)

    monkeypatch.setattr(common, "PART", 1)
    monkeypatch.setattr(common, "read_image", spy)
    with pytest.raises(KeyboardInterrupt):
        dataset(root, tmp_path)
    first = dataset(root, tmp_path)
    assert dataset(root, tmp_path).facts() == first.facts()
    assert len(reads) == 27             # each of 26 once, but for the interruption
    Image.new("RGB", (20, 20)).save(root / "bird" / "3.png")
    noisy(root, ["unlabelled"], 1)
    changed = dataset(root, tmp_path)
    assert sorted(reads[27:]) == ["bird/3.png", "unlabelled/0.png"]
    assert changed.fingerprint == dataset(root, tmp_path / "fresh").fingerprint
    assert not unfinished(tmp_path)


def deep_folder(root, dtype, highest, suffix):
    """Two classes of ramps from 0; those of the class bird are ten times darker."""
    ramp = np.linspace(0, highest, 32 * 32).reshape(32, 32)
    for name, level in (("bird", 0.1), ("fish", 1.0)):
        (root / name).mkdir(parents=True)
        for k in range(6):
            pixels = level * np.roll(ramp, k)
            Image.fromarray(pixels.astype(dtype)).save(root / name / f"{k}.{suffix}")
    return root


def ramp_picture(file, lowest, highest, dtype=np.float32):
    """A picture of 16x16 pixels, from the lowest to the highest value."""
    ramp = np.linspace(lowest, highest, 256).reshape(16, 16)
    Image.fromarray(ramp.astype(dtype)).save(file)
    return file


def change_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("change", ["brighter", "fewer", "other", "cut off"])
def test_what_is_kept_is_not_believed_against_the_pictures(tmp_path, change):
    root = deep_folder(tmp_path / "deep", np.uint16, 4095, "png")
    dataset(root, tmp_path)
    if change == "brighter":            # and all are read otherwise
        ramp_picture(root / "fish" / "bright.png", 0, 65535, np.uint16)
    elif change == "fewer":
        (root / "fish" / "0.png").unlink()
    else:
        kept = next(tmp_path.glob("cache/images-*/*.npz"))
        values = np.load(kept)["values"]
        values = 255 - values if change == "other" else values[:, :, :9]
        np.savez(kept, **{**np.load(kept), "values": values})
    assert dataset(root, tmp_path).fingerprint == dataset(root, tmp_path / "new").fingerprint


# ---- pictures -------------------------------------------------------------------------------

def plain(kind=None, size=(20, 20), mode="RGB", colour=(200, 100, 50), **more):
    return lambda file: Image.new(mode, size, colour).save(file, kind, **more)


def clear(file):
    """Red, and clear at the right."""
    picture = Image.new("RGBA", (20, 20), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (10, 0, 20, 20))
    picture.save(file)


SEVERAL = {"save_all": True, "append_images": [Image.new("RGB", (20, 20))]}
@pytest.mark.parametrize("called, make_picture, wanted", [
    ("ein Löwe 🦁.png", plain(size=(1, 1)), [200, 100, 50]),
    ("a.gif", plain(**SEVERAL), [200, 100, 50]),
    ("a.WEBP", plain("WEBP"), [200, 100, 50]),
    ("a.jpg", plain(None, (14_200, 14_200), "L", 120), [120] * 3),
    ("a.tif", plain(None, (4960, 7016), "1", 1, compression="group4"), [255] * 3),
    ("a.png", clear, [255, 128, 128])])
def test_pictures_are_read_on_white(tmp_path, called, make_picture, wanted):
    make_picture(tmp_path / called)
    file, = common.pictures_in(tmp_path)
    pixels = common.read_image(file, (32, 32))
    assert pixels.mean((1, 2)).tolist() == approx(wanted, abs=3)


STORED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
          5: np.transpose, 6: np.rot90, 7: lambda a: np.rot90(a, 2).T,
          8: lambda a: np.rot90(a, -1)}
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "deep.tif"])
def test_every_orientation_is_brought_upright(tmp_path, name):
    upright = np.kron([[255, 0], [85, 170]], np.ones((8, 8))).astype(np.uint16)
    for orientation, turn in STORED.items():
        deep = name.startswith("deep")
        pixels = np.ascontiguousarray(turn(upright)) * (257 if deep else 1)
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture = Image.fromarray(pixels if deep else pixels.astype(np.uint8))
        picture.save(tmp_path / name, exif=exif)
        found = common.read_image(tmp_path / name, (16, 16))
        assert np.abs(found[0].astype(int) - upright).max() < 12


@pytest.mark.parametrize("error", [struct.error, NotImplementedError, MemoryError, zlib.error])
def test_whatever_a_reader_raises_names_the_file(tmp_path, monkeypatch, error):
    def fails(*words, **more):
        raise error("too bad")

    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(common.Mistake, match="a.png cannot be read as an image .too bad"):
        common.read_image(tmp_path / "a.png", (16, 16))


DAMAGED = ["unlabelled/1.png", "bird/4.png", "fish/0.png"]


def spoil_three(root):
    for name in DAMAGED[:2]:
        (root / name).write_text("not a picture")
    (root / DAMAGED[2]).unlink()
    (root / DAMAGED[2]).symlink_to("nowhere.png")


with_damaged = folders("bird", "fish", "unlabelled", spoil=spoil_three, count=10)


def test_damaged_pictures_are_left_out_if_asked_counted_and_listed(tmp_path, capsys):
    root = with_damaged(tmp_path)
    data = dataset(root, tmp_path, "--skip-damaged")
    assert f"a: left out: 3 pictures that cannot be read: {', '.join(DAMAGED)}" in (
        capsys.readouterr().err)
    for name in DAMAGED:
        (root / name).unlink()
    clean = dataset(root, tmp_path / "clean")
    assert clean.fingerprint == data.fingerprint
    assert clean.names == data.names


@pytest.mark.parametrize("dtype, highest, white, suffix", [
    ("u2", 4000, 4095, "png"), ("u2", 65535, 65535, "png"), ("i4", 60_000, 65535, "tif"),
    ("f4", 1.02, 1, "tif"), ("f4", 254.5, 255, "tif")])
def test_deep_pictures_have_one_white(tmp_path, capsys, dtype, highest, white, suffix):
    root = deep_folder(tmp_path / "deep", dtype, highest, suffix)
    data = dataset(root, tmp_path)
    said = capsys.readouterr().err
    assert (f"read as [0, {white}]" in said) == (highest != white)
    for c, level in enumerate((0.1, 1)):
        found = data.images[data.labels == c].max()
        assert found == approx(min(255, 255 * level * highest / white), abs=1)
    facts = data.facts()
    assert dataset(root, tmp_path).facts() == facts     # from what is kept
    assert data.names[0].startswith("bird/")            # a dark one
    like, _ = common.read_like(root / data.names[0], facts)
    assert torch.equal(data.images[0], like[0])


@pytest.mark.parametrize("lowest, highest, dtype, known, white", [
    (0, 0.7, "f4", 1, 1), (0, 65535, "u2", 1, 65535), (0, 4000, "i4", 1, 4095),
    (0, 255, "u2", 1, 255),             # each by itself, for a set of bytes
    (0, 20.5, "f4", 255, 255),          # or as a deep one was
    (-1, 1, "f4", 1, None), (0, 70_000, "f4", 1, None), (0, math.nan, "f4", 1, None)])
def test_a_deep_picture_is_read_as_its_set_was(tmp_path, lowest, highest, dtype, known, white):
    file = ramp_picture(tmp_path / "a.tif", lowest, highest, dtype)
    facts = {"shape": [1, 16, 16], "ground": [0], "white": known}       # of a grey data set
    if white is None:
        with pytest.raises(common.Mistake, match="a.tif.*wanted "):
            common.read_like(file, facts)
        return
    like, report = common.read_like(file, facts)
    assert like.max() == approx(255 * highest / white, abs=1)
    assert (f"read as [0, {white}]" in report) == (highest != white)


@pytest.mark.parametrize("height, width", [(16, 64), (64, 16), (28, 28)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_the_same_shape_is_left_as_it_is(tmp_path, height, width, channels):
    x = random_pixels(6, height, width, channels).numpy()
    file = npz(tmp_path / "a.npz", x_train=x, y_train=thirds(6), x_test=x, y_test=thirds(6))
    data = dataset(file, tmp_path)
    assert data.images.shape == (6, channels, height, width)
    for pixels, image in zip(x, data.images):
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(tmp_path / "a.png")
        like, _ = common.read_like(tmp_path / "a.png", data.facts())
        assert torch.equal(like[0], image)


@pytest.mark.parametrize("part", ["x_train", "x_test", "x_unlabelled"])
@pytest.mark.parametrize("gap, channels", [(2, 1), (3, 3)])
def test_one_image_whose_channels_differ_makes_all_colour(tmp_path, part, gap, channels):
    grey = np.repeat(GREY // 2, 3, 1)
    arrays = {"x_train": grey, "x_test": grey[:60], "x_unlabelled": grey[:60]}
    arrays[part] = arrays[part].copy()
    arrays[part][4, 0, 7, 7] += gap     # JPEG files add no more than 2
    data = dataset(npz(tmp_path / "a.npz", **arrays), tmp_path)
    assert data.images.shape[1] == data.test_images.shape[1] == channels


@pytest.mark.parametrize("grounds, ground, inverted", [
    ([10] * 24 + [240], 250, False),    # 4% of the training images are so
    ([10], 250, True), ([240], 5, True), ([20], 160, True),
    ([100], 170, False)])               # its negative is hardly nearer
def test_what_no_training_image_was_like_is_inverted(tmp_path, grounds, ground, inverted):
    levels = np.resize(grounds, 200)[:, None, None]
    x = np.tile(levels, (1, 16, 16)).astype(np.uint8)
    x[:, 4:12, 4:12] = 255 - x[:, 4:12, 4:12]
    facts = dataset(npz(tmp_path / "a.npz", x_train=x, x_test=x[:60]), tmp_path).facts()
    pixels = np.full((16, 16), ground, np.uint8)
    pixels[5:11, 5:11] = 100
    Image.fromarray(pixels).save(tmp_path / "a.png")
    like, report = common.read_like(tmp_path / "a.png", facts)
    assert np.array_equal(like[0, 0], 255 - pixels if inverted else pixels)
    assert ("inverted to" in report) == inverted


# ---- labels: few of those there are, or those of a table ------------------------------------

@pytest.mark.parametrize("n, judged, validated", [
    (12, False, False), (29, False, False), (30, False, True), (12, True, True)])
def test_so_many_images_keep_their_label_and_no_row_moves(tmp_path, n, judged, validated,
                                                          monkeypatch):
    monkeypatch.setattr(common, "FEW", 10)
    whole = dataset(with_loose(tmp_path / "a.npz"), tmp_path)
    few = common.with_labels(whole, n, 3, judged)
    kept = common.subset(whole, n, 3)
    assert few.names == whole.names
    assert torch.equal(few.images, whole.images)
    assert torch.equal(few.labelled(), kept.sort()[0])
    # Below ten labels a class all others train without one, those kept for validation, too.
    assert torch.equal(few.validation, whole.validation[:len(whole.validation) * validated])
    rows = torch.cat([few.pool, few.validation])
    assert torch.equal(rows.sort()[0], torch.arange(290))
    wanted = torch.full((290,), -1)
    for some in (kept, few.validation):
        wanted[some] = whole.labels[some]
    assert torch.equal(few.labels, wanted)
    assert (whole.labels >= 0).sum() == 200             # it is as it was
    if not judged:
        read_so = dataset(tmp_path / "a.npz", tmp_path / "few", "--labels", n, "--seed", 3)
        assert read_so.fingerprint == few.fingerprint


@pytest.mark.parametrize("mark, start", [(",", ""), (";", "\ufeff"), ("\t", ""),
                                         (";", "sep=;\n")])
def test_labels_of_a_table_take_the_place_of_those_there_were(tmp_path, capsys, mark, start):
    file = with_loose(tmp_path / "a.npz")
    whole = dataset(file, tmp_path / "whole")
    chosen = f"train/{whole.validation[0]}"
    wanted = {"train/4": "eel", chosen: "dog", "unlabelled/7": "cat", "test/3": "eel"}
    marks = {name: whole.mark(row) for row, name in enumerate(whole.names)}
    lines = ["Image,why,fingerprint, New_Label", "train/5,,,", "", ' test/3 ,"a\rb",, eel ',
             "test/4"]
    lines += [f"{image},,{marks[image]},{label}" for image, label in wanted.items()]
    table = tmp_path / "new.csv"
    table.write_text(start + "\n".join(lines).replace(",", mark), "utf-8")
    data = dataset(file, tmp_path / "new", "--labels-from", table)
    assert every_label(data) == every_label(whole) | wanted
    assert torch.equal(data.pool, whole.pool)
    assert torch.equal(data.validation, whole.validation)
    assert f"4 labels are those of {table}" in capsys.readouterr().err
    assert data.fingerprint != whole.fingerprint


def test_a_table_may_be_in_nfd_name_pictures_moved_since_and_has_columns_that_are_told_apart(
        tmp_path, capsys):
    root = noisy(tmp_path / "zoo", ("cafe\u0301", " th\xe9"))           # as a Mac has them
    noisy(root, ["unlabelled"], 1)
    table = tmp_path / "new.csv"
    table.write_text("image,new_label\n./the\u0301/3.png,cafe\u0301 \n"
                     "unlabelled/0.png,th\xe9\n")
    first = every_label(dataset(root, tmp_path / "first", "--labels-from", table))
    assert first["th\xe9/3.png"] == "caf\xe9"
    assert first["unlabelled/0.png"] == "th\xe9"
    (root / "unlabelled/0.png").rename(root / " th\xe9/0.png")
    for words in ((), ("--labels", 2)):                 # all other labels may be hidden
        out = tmp_path / f"moved{len(words)}"
        moved = every_label(dataset(root, out, "--labels-from", table, *words))
        assert moved["th\xe9/0.png"] == "th\xe9"
        assert "1 of these are of pictures that are not there" in capsys.readouterr().err
    (root / " th\xe9/0.png").rename(root / "cafe\u0301/x.png")  # not where the table says
    with pytest.raises(common.Mistake, match="no image 'unlabelled/0.png'"):
        dataset(root, tmp_path / "other", "--labels-from", table)

    names = ["cat", "label", "a, b", 'a "b"', "a\rb", "a\nb"]
    columns = common.columns(["image", "label"], names)
    assert columns == ["image", "label", "cat", "class label", *names[2:]]
    cells = [f"{name}!" for name in columns]
    common.write(tmp_path / "a.csv", [columns, cells])
    lines = common.read_table(tmp_path / "a.csv", ["image", "label"])
    assert lines == [dict(zip(columns, cells))]


# ---- what cannot be read, and what the one line says ----------------------------------------

def table(content, encoding="utf-8", header="image,new_label\n"):
    """A tiny .npz, and a table of labels."""
    def write(folder):
        (folder / "new.csv").write_bytes((header + content).encode(encoding))
        return [npz(folder / "a.npz"), "--labels-from", folder / "new.csv"]

    return write


ONE_NAN = np.full((200, 16, 16), 0.5)
ONE_NAN[3, 4, 5] = math.nan
FEATURES = noise(200, 12).numpy()
@pytest.mark.parametrize("write, pattern", [
    (arrays(y_test=None), "a.npz.*x_test and y_test differ in number.*savez"),
    (arrays(x_test=None), "no test images"),
    (arrays(y_train=thirds(9)), "x_train and y_train differ in number"),
    (arrays(x_train=ONE_NAN, x_test=ONE_NAN[:60]), "a.npz: pixels span .*no NaN"),
    (arrays(y_train=0 * thirds(200), y_test=0 * thirds(60)), "only one class"),
    (arrays(y_test=np.arange(60)), r"classes without training images: \[3, 4, 5, 6, 7\]"),
    (arrays(y_test=thirds(60) - 1), "test images without a label"),
    (arrays(y_train=thirds(200) - 2), "labels must be numbers from 0.*-1 or no name"),
    (arrays(y_train=thirds(200) + 5, y_test=thirds(60) + 5, classes=np.array(list("abcd"))),
     "4 names for 3 classes"),
    (arrays(x_unlabelled=np.zeros((9, 16, 16), "u2")), "wanted one .*type"),
    (arrays(**scaled(1.0, -0.01)), "span -0.01 to 0.99; wanted numbers in"),
    (arrays(f_train=FEATURES), "f_test is not of as many images as x_test"),
    (arrays(f_train=FEATURES, f_test=FEATURES[:60, 1:]), "along dimension 1"),
    (arrays(f_train=FEATURES, f_test=FEATURES[:60] * math.nan),
     r"features of shape \(260, 12\), or NaN"),
    (folders("train", "car", "plane"), "if train is a class, call it otherwise"),
    (folders("cat", "dog", "val/cat", "val/dog"), "no train/; move the classes there"),
    (folders("train/cat", "train/dog", "val/cat", "dev/cat"), "val/ and .*dev are one part"),
    (lambda folder: npz(folder / "a.npz", X_train=RGB), "there are two arrays x_train"),
    (arrays(classes=np.array(["cat", "cat ", "eel"])), r"classes are called \['cat'\]"),
    (arrays(f_train=0 * FEATURES, f_test=0 * FEATURES[:60]), "the same for all images"),
    (folders("cat", "dog", "owl!"), "no pictures in owl/; remove it"),
    (folders("seg_train/cat", "seg_train/dog", "seg_test/cat", "seg_test/dog"),
     "rename seg_test/ to test/ and seg_train/ to train/; else call"),
    (folders("cat", "dog", "unlabelled images"), "unlabelled images: .*rename it unlabelled"),
    (folders("train/cat", "train/dog", "test/cat", "test/unlabelled"),
     "a/test/unlabelled: .*among those for training"),
    (folders("train/cat", "train/dog", "test_set/cat", "test_set/dog"),
     "rename test_set/ to test/"),
    (folders("cat/train", "cat/test", "dog/train"),
     "a/cat/test: is this a part .* call it .*a/test/cat; else"),
    (folders("images/cat", "images/dog"), "all is in images/; .*give .*a/images"),
    (with_damaged,
     f"/a: 3 pictures that cannot be read: {', '.join(DAMAGED)}; .*--skip-damaged"),
    (lambda folder: "xyzzy", "no data set or folder 'xyzzy'.*glyphs mnist"),
    (lambda folder: change_a_bit(npz(folder / "a.npz")), "a.npz: .*CRC.*savez"),
    (lambda folder: [npz(folder / "a.npz"), "--labels", 181], "there are 179 "),
    (lambda folder: [npz(folder / "a.npz"), "--labels-from", "gone.csv"],
     r"gone.csv not found; .*, or begin without it: python deform.py --dataset \S+ -o"),
    (table("train/4,owl"), "new.csv: train/4 is .* class 'owl'; the classes are cat, dog"),
    (table("train/999,cat"), "no image 'train/999'; they are called train/0"),
    (table("train/4,cat\ntrain/4,dog"), "train/4 is both cat and dog; remove"),
    (table("train/4,"), "no line has a new label; write some into its column"),
    (table("train/4,cat,x", header="image,new_label,fingerprint\n"),
     "train/4 is another picture than the one that was looked at; remove the line"),
    (table("1.png,cat", header="file,label\n"), "no column image; wanted"),
    (table("train/4,caf\xe9", "cp1252"), "save it as CSV UTF-8"),
    (table("train/4,caf\xe9", "utf-16"), "save it as CSV UTF-8"),
    (table("PK\x03\x04\x14\0\6\0\xdf\xa4\xd2", "latin-1", ""), "save it as CSV UTF-8")])
def test_what_cannot_be_read_ends_in_one_line(tmp_path, capsys, write, pattern):
    out = tmp_path / "run"
    data, *more = np.ravel(write(tmp_path))
    assert run("vae", "--dataset", data, *more, "-o", out, "--steps", 1) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert re.search(f"^vae.py: .*{pattern}", line), line
    assert all(said.startswith("reading ") for said in before)
    assert not (out / "vae.pt").exists()


# ---- statistics of the comparison -----------------------------------------------------------

@pytest.mark.parametrize("df", [*range(1, 22), 30, 59, 500])
def test_a_twentieth_of_students_distribution_is_beyond_its_quantile(df):
    t = compare.t_quantile(df)
    x = torch.linspace(-t, t, 20_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + x.square() / df) ** (-(df + 1) / 2)
    assert torch.trapezoid(density, x).item() == approx(0.95, abs=2e-4)


def cells(n, arm, accuracies):
    """Rows of one size and arm, a subset each."""
    rows = []
    for seed, accuracy in enumerate(accuracies):
        row = dict.fromkeys(compare.AVERAGED, 0.5)
        rows.append({**row, "n": n, "seed": seed, "arm": arm, "accuracy": accuracy})
    return rows


def summed_up(rows, **how):
    """The entries of a summary, by size and arm."""
    return {(entry["n"], entry["arm"]): entry for entry in compare.summarise(rows, **how)}


SMALL = [*cells(10, "real", [0.5, 0.6]), *cells(10, "mixup", [0.7, 0.7])]
LARGE = [*cells(20, "real", [0.5] * 6), *cells(20, "mixup", [0.61, 0.59] * 3),
         *cells(20, "real+hybrid", [0.42, 0.39, 0.39] * 2)]


def test_a_summary_pairs_rows_of_a_subset_averages_and_has_no_interval_from_half_the_pool_on():
    table = summed_up(SMALL)
    entry = table[10, "mixup"]
    assert entry["subsets"] == 2
    assert entry["accuracy"] == approx(70)
    assert entry["accuracy_half"] == approx(0)
    assert entry["gain"] == approx(15)
    assert entry["gain_half"] == approx(12.706 * 5, rel=1e-3)
    assert summed_up(SMALL[::-1]) == table
    assert "gain" not in table[10, "real"]
    alone = summed_up(cells(30, "mixup", [0.5]))[30, "mixup"]
    assert alone["accuracy_half"] is None
    assert "gain" not in alone
    for key in compare.AVERAGED:
        first, second = cells(10, "real", [0.5, 0.5])
        first[key] = 0.2
        second[key] = 0.6
        assert summed_up([first, second])[10, "real"][key] == approx(0.4)
    entry = summed_up(LARGE, pool=39)[20, "mixup"]      # more than half of the pool
    assert entry["hollow"]
    assert entry["gain"] == approx(10)
    assert entry["gain_half"] is entry["accuracy_half"] is None
    assert not summed_up(LARGE, pool=40)[20, "mixup"]["hollow"]


def test_an_answer_has_a_verdict_if_its_interval_has_no_zero_and_balanced_accuracy_is_shown(
        capsys):
    for gain, half, said in ((3.0, 2.0, "better than real"), (-3.0, 2.0, "worse than real"),
                             (-3.0, 3.5, "inconclusive"), (3.0, None, "inconclusive")):
        assert compare.verdict(gain, half) == said
    sentence, = compare.answers(compare.summarise(LARGE))
    assert sentence == ("20 images: hybrids change accuracy by -10.0 ± 1.6 points "
                        "(6 subsets): worse than real")
    rows = cells(10, "real", [0.5, 0.7])
    rows[0]["balanced_accuracy"] = 0.124
    compare.report(compare.summarise(rows))
    head, line = capsys.readouterr().out.splitlines()
    assert "balanced" in head and " 31.2 " in line


@pytest.mark.parametrize("sharpness, temperature", [
    (0.3, 0.3), (1, 1), (4, 4), (0.01, 1 / 4), (100, 16)])
def test_one_temperature_undoes_over_and_underconfidence(sharpness, temperature):
    """Of a classifier whose logits are so many times the true log-odds."""
    def logits_of(images):
        odds = (brightness(images.float()) - 127.5) / 40
        return sharpness * torch.stack([-odds / 2, odds / 2], 1)

    images = random_pixels(6000, 1, 1, 1).expand(-1, 1, 16, 16)
    chance = (logits_of(images) / sharpness).softmax(1)
    y = torch.multinomial(chance, 1, generator=seeded())[:, 0]
    true = common.scores(chance[:4000], y[:4000])
    scores = compare.evaluate(logits_of, images[:4000], y[:4000], images[4000:], y[4000:])
    assert scores["temperature"] == approx(temperature, rel=0.15)
    assert scores["accuracy"] == true["accuracy"]
    if sharpness == temperature:
        assert scores["scaled_nll"] == approx(true["nll"], abs=0.01)
    if sharpness != 1:                  # what is not scaled shows it
        assert scores["nll"] > true["nll"] + 0.05


def test_the_temperature_is_fitted_on_validation_images():
    def logits_of(images):
        right = images[:, 0, 0, :1].float()
        return 6 * torch.cat([1 - right, right], 1)

    y = torch.arange(2000) % 2
    images = evenly(y.byte())
    wrong = (torch.rand(2000, generator=seeded()) < 0.27).long()
    scores = compare.evaluate(logits_of, images, y, images, y ^ wrong)
    # Right in 73 of 100: odds of 1 = 6 / T. On the images that are scored it is always right.
    assert scores["temperature"] == approx(6, rel=0.1)
    assert scores["accuracy"] == 1


def test_noise_is_normal_with_15_hundredths_new_at_every_pixel_and_always_the_same():
    grey = torch.full((50, 3, 20, 20), 128).byte()
    noisy = compare.noisy(grey)
    noise = (noisy.float() - 128) / 255
    assert noise.mean() == approx(0, abs=0.005)
    assert noise.std() == approx(0.15, abs=0.003)
    # Of a normal, 4.6 in 100 are beyond two deviations.
    assert part_of(noise.abs() > 0.3) == approx(0.0455, abs=0.005)
    assert len(noisy.view(150, 400).unique(dim=0)) == 150
    assert torch.equal(noisy, compare.noisy(grey))
    white = compare.noisy(torch.full_like(grey, 255))
    assert part_of(white == 255) == approx(0.5, abs=0.03)       # none has gone round to black


# ---- command lines --------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_docstrings_have_commands_and_examples_that_work(script,
                                                                                   capsys):
    module = SCRIPTS[script]
    commands = commands_of(module.__doc__)
    assert {name for name, _ in commands} == {script}
    for _, words in commands:
        module.parse_args(words)
    found = doctest.testmod(module)
    assert (found.attempted > 0, found.failed) == (script == "latent", 0)
    known = vars(module.parse_args([]))
    with pytest.raises(SystemExit, match="0"):
        module.parse_args(["--help"])
    flags = re.findall(r"^  (?:-\w \w+, )?(--[\w-]+)", capsys.readouterr().out, re.M)
    wanted = known.keys() - {"script", "writes", "changed", "settings"}
    assert {*flags} == {"--" + key.replace("_", "-") for key in wanted}


def commands_of(text):
    """[script, words] of every `python <script>.py ...`, alone in a line or in backticks."""
    found = re.findall(r"^    python (\w+)\.py(.*)$", text, re.M)
    found += re.findall(r"`python (\w+)\.py([^`]*)`", text)
    return [(script, shlex.split(rest, comments=True)) for script, rest in found]


def default_of(function, name):
    return inspect.signature(function).parameters[name].default


def test_a_flag_has_the_default_of_the_library_and_defaults_are_those_that_were_chosen():
    for script, function, names in [
            ("vae", vae.train, "latent_dim steps batch_size beta lr"),
            ("cnn", cnn.train, "width steps batch_size lr weight_decay"),
            ("hybrids", hybrids.make, "strategy count residual cut"),
            ("compare", cnn.train, "width steps")]:
        args = vars(SCRIPTS[script].parse_args([]))
        for name in names.split():
            assert args[name] == default_of(function, name), name
    chosen = json.loads((HERE / "assets/baseline.json").read_text())["chosen"]
    for name in ("width", "weight_decay", "batch_size", "lr"):
        assert default_of(cnn.train, name) == chosen[name]
    assert cnn.STEPS == {int(n): steps for n, steps in chosen["steps"].items()}
    assert default_of(cnn.train, "share") == (1.0, 0.0) == compare.Arm().share
    assert tuple(cnn.parse_args([]).hybrid_fraction) == (1.0, 0.0)
    assert hybrids.parse_args([]).label is default_of(hybrids.make, "rule") is None
    assert hybrids.default_rule("between", easy(9)[0]) == "product"
    assert hybrids.default_rule("prior", easy(9)[0]) == "density"
    assert hybrids.default_rule("between", noise(9, 4)) == "density"
    assert hybrids.default_rule("images", noise(9, 4)) == "product"
    assert compare.USUAL == ["real", "mixup", "real+hybrid"]


# ---- what reaches the trainings, and what the files hold ------------------------------------

def note_calls(patch, module, name, **more):
    """Have the calls of a function noted, and told `more` -> a list of them that grows."""
    calls = []
    plain = getattr(module, name)

    def noted(*given, **told):
        result = plain(*given, **told, **more)
        calls.append(SimpleNamespace(given=given, told=told, result=result))
        return result

    patch.setattr(module, name, noted)
    return calls


def note_fits(patch, module):
    """Have every training noted -> a list that grows: settings, batches, weights."""
    fits = []
    plain = module.fit

    def weights_of(model):
        return {key: value.clone() for key, value in model.state_dict().items()}

    def fit(model, next_batch, **settings):
        record = SimpleNamespace(model=model, settings=settings, batches=[],
                                 first=weights_of(model))
        record.seed = settings["generator"].initial_seed()
        fits.append(record)

        def noted(*arguments):
            record.batches.append(next_batch(*arguments))
            return record.batches[-1]

        yield from plain(model, noted, **settings)
        record.last = weights_of(model)

    patch.setattr(module, "fit", fit)
    return fits


def note_moves(patch, strength=0.5, mirror=False):
    """Have all images move -> a list that grows: deformations, and what each has moved."""
    every = []

    class Noting(deform.Deformations):
        def __init__(self, *fields, **more):
            super().__init__(*fields, **more)
            self.calls = []
            every.append(self)

        @classmethod
        def fit(cls, images, y, generator):
            noting = cls(**vars(deformations(strength, mirror, *images.shape[2:])))
            noting.asked = images, y, generator.initial_seed()
            return noting

        def __call__(self, x, q, generator, share=1.0):
            moved, q = super().__call__(x, q, generator, share)
            self.calls.append(SimpleNamespace(x=x, q=q, moved=moved, share=share))
            return moved, q

    patch.setattr(deform, "Deformations", Noting)
    return every


def leave_blank(patch):
    """Pictures stay empty: drawing takes longest."""
    for name in ("deform.draw", "vae.draw", "latent.draw_map", "latent.draw_reliability",
                 "hybrids.draw", "hybrids.draw_features", "cnn.draw", "compare.curves",
                 "compare.summary"):
        patch.setattr(name, lambda *content, **look: common.figure(1, 1))


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures stay empty, hybrids are few, and what paints features learns little."""
    leave_blank(monkeypatch)
    few_hybrids(monkeypatch)
    monkeypatch.setattr(vae.train_painter, "__defaults__", (0, False, 2, 64, 3e-3))


def rows_among(x, images):
    """The row of each of x (B,C,H,W), uint8 or in [0,1], among uint8 images; -1 if nowhere."""
    rows = {image.numpy().tobytes(): k for k, image in enumerate(images)}
    x = (x * 255).round().byte() if x.is_floating_point() else x
    return torch.tensor([rows.get(image.numpy().tobytes(), -1) for image in x]).long()


def rows_used(fit, images):
    """The rows of uint8 images that a training saw; -1 for what is not among them."""
    batches = [batch[0] if isinstance(batch, tuple) else batch for batch in fit.batches]
    return set(rows_among(torch.cat(batches), images).tolist())


def part_of(condition):
    """How much of a boolean tensor is true."""
    return condition.float().mean().item()


def one_hot(y, classes=3):
    return F.one_hot(y, classes).float()


def backwards(path):
    """A tiny data set file whose test labels are not the first training labels again."""
    x, y = easy(60, seed=60)
    return npz(path, x_test=x[:, 0].flip(0).numpy(), y_test=y.flip(0).numpy())


def facts_of(folder, stem):
    return json.loads((folder / f"{stem}.json").read_text())


def note_chain(out, words, hybrid_words):
    """A chain in plain float32, and what reached its trainings."""
    noted = SimpleNamespace(out=out)
    with pytest.MonkeyPatch.context() as patch:
        leave_blank(patch)
        noted.moves = note_moves(patch, 0.5, True)
        fits = {kind: note_fits(patch, SCRIPTS[kind]) for kind in ("vae", "cnn")}
        noted.embedded = note_calls(patch, latent, "embed")
        noted.trained = note_calls(patch, cnn, "train")
        assert run("deform", "-o", out, *words) == 0
        assert run("vae", "-o", out, "--steps", 60, "--latent-dim", 4, "--batch-size", 32,
                   "--no-amp") == 0
        assert run("latent", "-o", out, "--no-amp") == 0
        assert run("hybrids", "-o", out, "--no-amp", *hybrid_words) == 0
        assert run("cnn", "-o", out, "--steps", 40, "--width", 8, "--no-amp") == 0
    noted.vae, = fits["vae"]
    noted.cnn, = fits["cnn"]
    noted.files = {kind: read(out / f"{kind}.pt") for kind in STEPS}
    noted.model = vae.restore(noted.files["vae"])
    noted.classifier = cnn.restore(noted.files["cnn"])
    _, noted.data = opened("cnn", "-o", out)
    return noted


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    """A chain on 90 images that move, of seed 5."""
    out = tmp_path_factory.mktemp("seen") / "run"
    tiny = backwards(out.parent / "tiny.npz")
    noted = note_chain(out, ["--dataset", tiny, "--images", 90, "--seed", 5], ["--count", 90])
    noted.rows = common.subset(noted.data, 90, 5)
    noted.images = noted.data.images[noted.rows]
    noted.labels = noted.data.labels[noted.rows]
    return noted


@pytest.fixture
def bare(copy, undrawn):
    """One's own copy of a finished folder, where pictures stay empty and hybrids are few."""
    return copy


@pytest.mark.parametrize("kind, upstream, keys", [
    ("deform", [], "deformations"), ("vae", [], "config rows model"),
    ("latent", ["vae"], "rows mu logvar y given q percentages labeller"),
    ("hybrids", ["vae", "latent", "deform"], "images q z pseudo_rows pseudo_labels"),
    ("cnn", ["hybrids"], "config model")])
def test_a_file_holds_its_content_and_the_facts_beside_it(chain, kind, upstream, keys):
    saved = read(chain / f"{kind}.pt")
    facts = facts_of(chain, kind)
    assert set(saved) == {*facts, *keys.split()}
    assert facts == {key: saved[key] for key in facts}
    assert facts["made_from"] == {u: common.fingerprint(chain / f"{u}.pt") for u in upstream}
    assert (facts["kind"], facts["format"]) == (kind, common.FORMAT)
    wanted = {"classes": ANIMALS, "shape": [1, 16, 16], "images": 200, "test_images": 60}
    assert facts["dataset"].items() >= wanted.items()
    assert Image.open(chain / f"{kind}.png").width > 600
    assert not unfinished(chain)
    assert not list(chain.glob("*.last.pt"))
    if kind in ("vae", "cnn"):
        log = log_of(chain, kind)
        history = facts["metrics"]["history"]
        assert [row["step"] for row in log] == [row["step"] for row in history]


def log_of(folder, kind):
    """The rows of a training's log."""
    lines = (folder / f"{kind}.log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_step_learns_from_its_subset_or_from_all_but_validation_images(seen, chain):
    data = dataset(chain.parent / "tiny.npz", chain)
    assert torch.equal(read(chain / "vae.pt")["rows"], data.pool)
    metrics = facts_of(chain, "cnn")["metrics"]
    assert metrics["real_images"] == len(data.pool) == 179
    assert metrics["accuracy"] > 0.9    # easy bars are learnt
    wanted = {"images": 90, "strength": 0.5, "mirror": True}
    assert seen.files["deform"]["metrics"].items() >= wanted.items()
    images, y, seed = seen.moves[0].asked
    assert torch.equal(images, seen.images)
    assert torch.equal(y, seen.labels)
    assert seed == 5
    assert torch.equal(seen.files["vae"]["rows"], seen.rows)
    assert rows_used(seen.vae, seen.data.images) == set(seen.rows.tolist())
    assert rows_used(seen.cnn, seen.data.images) <= {-1, *seen.rows.tolist()}


@pytest.mark.parametrize("script, words, told, config", [
    ("vae", ["--lr", 0.002, "--beta", 0.5, "--latent-dim", 3], {"lr": 0.002, "beta": 0.5},
     {"latent_dim": 3}),
    ("cnn", ["--lr", 0.002, "--weight-decay", 0.5, "--width", 4],
     {"lr": 0.002, "weight_decay": 0.5}, {"width": 4})], ids=["vae", "cnn"])
def test_flags_reach_the_training(bare, monkeypatch, script, words, told, config):
    fits = note_fits(monkeypatch, SCRIPTS[script])
    assert run(script, "-o", bare, "--steps", 3, "--batch-size", 7, "--amp", *words) == 0
    fit, = fits
    told = {"steps": 3, "amp": True, "state": None, **told}
    assert fit.settings.items() >= told.items()
    assert fit.model.config.items() >= config.items()
    assert [len(batch[0] if script == "cnn" else batch) for batch in fit.batches] == [7, 7, 7]


@pytest.mark.parametrize("script", STEMS)
def test_networks_compute_in_the_arithmetic_asked_for(bare, monkeypatch, script):
    states = []

    def noted(plain):
        def call(*arguments):
            states.append(torch.is_autocast_enabled("cpu"))
            return plain(*arguments)

        return call

    for network, name in ((vae.VAE, "encode"), (vae.VAE, "logits"), (cnn.CNN, "forward")):
        monkeypatch.setattr(network, name, noted(getattr(network, name)))
    usual = common.bfloat16_is_fast(torch.device("cpu"))
    words = ["--arms", "real+hybrid", "latent posterior"] if script == "compare" else []
    assert run(script, "-o", bare, *STEMS[script], OTHER_AMP, *words) == 0
    assert set(states) == (set() if script == "deform" else {not usual})
    for file in bare.glob("*.pt"):      # what is kept has 32 bits
        assert b"BFloat16Storage" not in file.read_bytes()


def test_the_scores_in_files_are_those_of_the_images_that_they_name(seen):
    metrics = seen.files["vae"]["metrics"]
    for stated, images in ((metrics["train"], seen.images),
                           (metrics["test"], seen.data.test_images)):
        wanted = vae.evaluate(seen.model, images, generator=seeded(6))
        assert stated == approx(wanted, rel=1e-4)
    metrics = seen.files["cnn"]["metrics"]
    q = cnn.predict(seen.classifier, seen.data.test_images).softmax(1)
    for key, value in common.scores(q, seen.data.test_labels).items():
        assert metrics[key] == approx(value, abs=1e-4)
    assert (metrics["real_images"], metrics["pseudo_labelled"]) == (90, 0)
    validation = cnn.predict(seen.classifier, seen.data.images[seen.data.validation])
    right = validation.argmax(1) == seen.data.labels[seen.data.validation]
    assert metrics["history"][-1]["validation"] == approx(part_of(right), abs=1e-4)


def test_the_density_with_the_lower_held_out_nll_speaks(seen):
    saved = seen.files["latent"]
    metrics = saved["metrics"]
    known = saved["mu"], saved["logvar"], saved["y"]
    validation = seen.data.validation
    held_out = vae.encode_all(seen.model, seen.data.images[validation])
    test = vae.encode_all(seen.model, seen.data.test_images)
    found = {}
    for name, (kind, choices, _) in latent.KINDS.items():
        posterior, choice, nll = latent.calibrate(
            kind, choices, known, (*held_out, seen.data.labels[validation]), 3)
        found[nll] = posterior, kind, choice
        wanted = {"choice": choice, "temperature": posterior.temperature}
        assert metrics[name].items() >= wanted.items()
        assert metrics[name]["held_out_nll"] == approx(nll, rel=1e-3)
        scores = common.scores(posterior(*test), seen.data.test_labels)
        for key, value in scores.items():
            assert metrics[name][key] == approx(value, abs=1e-3)
    posterior, kind, choice = found[min(found)]
    speaking = latent.restored(saved["percentages"])
    assert type(speaking) is kind
    close(speaking(*test), posterior(*test))
    close(saved["q"], latent.left_out(kind, choice, posterior.temperature, *known, 3))


@pytest.mark.parametrize("words, told", [
    ("--strategy around", {"strategy": "around"}),
    ("--strategy images", {"strategy": "images"}),
    ("--strategy prior", {"strategy": "prior", "rule": "density"}),
    ("--no-residual", {"residual": False}), ("--cut", {"cut": True}),
    ("--no-cut", {"cut": False}), ("--no-deform", {"moves": None}),
    ("--label weight", {"rule": "weight"})])
def test_every_kind_of_hybrid_is_made_as_asked(bare, monkeypatch, words, told):
    calls = note_calls(monkeypatch, hybrids, "make")
    assert run("hybrids", "-o", bare, "--count", 30, *words.split()) == 0
    plain = {"strategy": "between", "count": 30, "rule": "product", "residual": True,
             "cut": None, **told}
    assert calls[0].told.items() >= plain.items()
    assert ("moves" in told) == (calls[0].told["moves"] is None)
    made_from = read(bare / "hybrids.pt")["made_from"]
    assert ("moves" in told) == ("deform" not in made_from)


def test_hybrids_unchanged_fill_half_of_the_training_then_fewer_and_real_ones_are_gently_moved(
        seen):
    made = seen.files["hybrids"]
    calls = seen.moves[-1].calls
    counts = [64 - len(call.x) for call in calls]
    assert counts == [64] * 20 + [64, 58, 51, 45, 38, 32, 26, 19, 13, 6] + [0] * 10
    for (x, q), call in zip(seen.cnn.batches, calls, strict=True):
        assert call.share == 0.5        # of the strength 0.5
        first = len(x) - len(call.x)
        where = rows_among(x[:first], made["images"])
        assert (where >= 0).all()
        assert torch.equal(q[:first], made["q"][where])
        assert torch.equal(x[first:], call.moved)
        where = rows_among(call.x, seen.images)
        assert (where >= 0).all()
        assert torch.equal(q[first:], one_hot(seen.labels[where]))


def cnn_fit_of(folder, monkeypatch, *words):
    """What reaches the training loop of `cnn.py` with these words."""
    fits = note_fits(monkeypatch, cnn)
    assert run("cnn", "-o", folder, "--width", 4, *words) == 0
    return fits[0]


@pytest.mark.parametrize("share, of_hybrids", [
    ([0], [0, 0, 0, 0]), ([0.25], [16, 16, 16, 16]), ([0.5, 1], [32, 32, 32, 64])])
def test_one_share_of_hybrids_holds_and_two_are_the_first_and_the_last(
        bare, monkeypatch, share, of_hybrids):
    fit = cnn_fit_of(bare, monkeypatch, "--steps", 4, "--hybrid-fraction", *share)
    made = read(bare / "hybrids.pt")["images"]
    counts = [int((rows_among(x, made) >= 0).sum()) for x, _ in fit.batches]
    assert counts == approx(of_hybrids, abs=2)          # a hybrid may equal an image


def test_augmentation_changes_all_and_no_label_and_if_learned_moves_all_and_needs_no_vae(
        bare, monkeypatch):
    known = torch.cat([read(bare / "hybrids.pt")["images"],
                       opened("cnn", "-o", bare)[1].images])
    for words in ([], ["--hybrid-fraction", 0]):
        fit = cnn_fit_of(bare, monkeypatch, "--steps", 2, "--augment", *words)
        assert rows_used(fit, known) == {-1}
    assert {value for _, q in fit.batches for value in q.unique().tolist()} == {0, 1}
    for name in ("vae", "latent", "hybrids"):
        for suffix in (".pt", ".json"):
            (bare / f"{name}{suffix}").unlink()
    moves = note_moves(monkeypatch)
    fit = cnn_fit_of(bare, monkeypatch, "--hybrid-fraction", 0, "--deform", "--steps", 2)
    calls = moves[-1].calls
    assert [(len(call.x), call.share) for call in calls] == [(64, 1.0)] * 2
    assert all(x is call.moved for (x, _), call in zip(fit.batches, calls))
    assert facts_of(bare, "cnn")["made_from"].keys() == {"deform"}


# ---- the grid of the comparison -------------------------------------------------------------

def compared(folder, *words):
    """What compare.json says after these words."""
    assert run("compare", "-o", folder, "--jobs", 1, *words) == 0
    return facts_of(folder, "compare")


def cells_of(folder):
    return {file.name: file.read_text() for file in (folder / "cells").iterdir()}


def grid_of(*words):
    """The Grid that these words plan."""
    args = compare.parse_args([*map(str, words), "--threads", "1", "--quiet"])
    started = common.start(args)
    started.release()
    return compare.plan(started, args)


def test_a_grid_holds_a_row_for_every_size_subset_and_arm(grid):
    facts = facts_of(grid, "compare")
    every = list(itertools.product([12, 30], [0, 1], ["real", "real+hybrid"]))
    assert [(row["n"], row["seed"], row["arm"]) for row in facts["rows"]] == every
    recipe = {"steps": 8, "vae_steps": 8, "width": 4, "latent_dim": 4, "unlabelled": False}
    assert facts["recipes"]["12"].items() >= recipe.items()
    assert facts["summary"] == compare.summarise(facts["rows"], 179)
    table = table_of(grid / "compare.csv")
    assert table == [{key: str(value) for key, value in row.items()} for row in facts["rows"]]
    assert len(cells_of(grid)) == 8
    assert not unfinished(grid)


@pytest.fixture
def same_grid(grid, tmp_path, undrawn):
    """One's own copy of the finished grid, and the words that go on with it."""
    out = Path(shutil.copytree(grid, tmp_path / "grid"))
    return out, [*GRID, "--dataset", grid / "tiny.npz", "-o", out, "--jobs", 1]


def test_a_grid_computes_only_what_was_lost_or_cannot_be_true_and_gathers_without_training(
        same_grid, grid, capsys, monkeypatch):
    out, words = same_grid
    lost, cut, other, *kept = sorted((out / "cells").iterdir())
    before = {file: file.stat().st_mtime_ns for file in kept}
    wanted = cells_of(out)
    lost.unlink()
    cut.write_text(cut.read_text()[:-9])
    shutil.copy(kept[-1], other)        # of another subset
    assert run(*words) == 0
    assert cells_of(out) == wanted
    assert {file: file.stat().st_mtime_ns for file in kept} == before
    assert (out / "compare.csv").read_text() == (grid / "compare.csv").read_text()
    lines = capsys.readouterr().out.splitlines()
    table = facts_of(out, "compare")["summary"]
    for line, entry in zip(lines[1:5], table):
        assert f"{entry['accuracy']:.1f} ± {entry['accuracy_half']:.1f}" in line
    assert lines[-2:] == compare.answers(table)
    fits = note_fits(monkeypatch, cnn)
    (out / "compare.json").unlink()
    assert run(*words, "--gather") == 0
    assert facts_of(out, "compare")["summary"] == facts_of(grid, "compare")["summary"]
    next((out / "cells").glob("30-1-*")).unlink()
    assert run(*words, "--gather") == 2
    assert "n=30 subset 1: not finished" in capsys.readouterr().err
    assert fits == []


@pytest.mark.parametrize("change", [
    "--width 5", "--steps 9", "--vae-steps 9", "--latent-dim 5",
    "--score validation", "--unlabelled", "--seed 2", "--labels 100", "OTHER_AMP", "TEST"])
def test_other_settings_and_other_images_make_other_cells(same_grid, monkeypatch, tmp_path,
                                                          change):
    out, words = same_grid
    asked_for = []

    def no_unit(unit, grid):
        asked_for.append(unit)
        return unit, "not now"

    monkeypatch.setattr(compare, "run_unit", no_unit)
    if change == "TEST":
        x, _ = easy(60, seed=5)
        (out / "compare.json").unlink()
        change = f"--dataset {npz(tmp_path / 'tiny.npz', x_test=x[:, 0].numpy())}"
    assert run(*words, *change.replace("OTHER_AMP", OTHER_AMP).split()) == 2
    assert len(asked_for) == 4


@pytest.mark.parametrize("words, wanted", [
    ("--sizes 12 120 20", {12: {"steps": 300, "vae_steps": 600, "latent_dim": 16},
                           20: {}, 120: {"steps": 400}}),
    ("", {100: {}, 179: {"unlabelled": False}}), ("--labels 30", {30: {"unlabelled": True}}),
    ("--sizes 12 --unlabelled", {12: {"steps": 400, "unlabelled": True}}),
    ("--sizes 12 --labels 30 --no-unlabelled", {12: {"steps": 300, "unlabelled": False}}),
    ("--sizes 12 --steps 7 --vae-steps 9", {12: {"steps": 7, "vae_steps": 9}})])
def test_sizes_fit_the_images_and_a_recipe_has_their_steps_unless_told_otherwise(
        tmp_path, words, wanted):
    planned = grid_of("--dataset", npz(tmp_path / "tiny.npz"), "-o", tmp_path, "--seeds", 2,
                      "--seed", 4, *words.split())
    assert list(planned.recipes) == list(wanted)
    assert planned.units() == list(itertools.product([*wanted][::-1], [4, 5]))
    for n, recipe in wanted.items():
        assert planned.recipes[n].items() >= recipe.items()


def test_a_failing_arm_is_recorded_and_others_go_on(tmp_path, undrawn, monkeypatch, capsys):
    def failing_fit(model, next_batch, **settings):
        raise FloatingPointError("the loss is not finite between steps 0 and 9\nmore of it")
        yield {}

    monkeypatch.setattr(cnn, "fit", failing_fit)
    assert run("compare", "--dataset", npz(tmp_path / "tiny.npz"), "-o", tmp_path,
               *STEMS["compare"], "--arms", "real", "latent posterior") == 2
    facts = facts_of(tmp_path, "compare")
    wanted = "n=12 subset 0: real: the loss is not finite between steps 0 and 9"
    assert facts["failed"] == [wanted]
    assert [row["arm"] for row in facts["rows"]] == ["latent posterior"]
    assert f"failed: {wanted}\n" in capsys.readouterr().err
    result = tmp_path / "compare.json"  # so old that make begins it again
    assert result.stat().st_mtime < (tmp_path / "compare.csv").stat().st_mtime


@pytest.mark.parametrize("how", ["jobs", pytest.param("ranks", marks=slow)])
def test_processes_and_ranks_make_the_same_cells(grid, tmp_path, undrawn, how):
    words = [*GRID[1:-1], "--dataset", grid / "tiny.npz", "-o", tmp_path]       # no hybrids
    if how == "ranks":
        done = shell(sys.executable, "-m", "torch.distributed.run", "--standalone",
                     "--nproc-per-node=2", HERE / "compare.py", *words, "--threads", 1)
        assert done.returncode == 0, done.stdout + done.stderr
        words.append("--gather")
    assert run("compare", *words, "--jobs", 2) == 0
    wanted = {name: text for name, text in cells_of(grid).items() if "-real-" in name}
    assert cells_of(tmp_path) == wanted


# ---- the arms of the comparison: what reaches their training --------------------------------

def note_grid(tmp_path_factory, tiny, *words):
    """A comparison of one subset, and what reached its trainings, its hybrids, its scores."""
    out = tmp_path_factory.mktemp("noted")
    noted = SimpleNamespace(out=out)
    with pytest.MonkeyPatch.context() as patch:
        leave_blank(patch)
        noted.vaes = note_fits(patch, vae)
        fits = note_fits(patch, cnn)
        made = note_calls(patch, hybrids, "make", count=512)    # 20,000 take long
        trained = note_calls(patch, cnn, "train")
        moves = note_moves(patch)
        noted.scores = note_calls(patch, compare, "evaluate")
        facts = compared(out, "--dataset", tiny, "--sizes", 12, "--seeds", 1, "--seed", 3,
                         "--width", 4, "--latent-dim", 4, "--steps", 8, "--no-amp", *words)
    noted.rows = {row["arm"]: row for row in facts["rows"]}
    noted.data = dataset(tiny, out / "other")
    noted.subset = common.subset(noted.data, 12, 3)
    noted.images = noted.data.images[noted.subset]
    noted.labels = noted.data.labels[noted.subset]
    arms = [arm for arm in noted.rows if arm != "latent posterior"]
    noted.fits = dict(zip(arms, fits, strict=True))
    noted.trained = dict(zip(arms, trained, strict=True))
    with_hybrids = [arm for arm in arms if compare.ARMS[arm].strategy]
    noted.made = dict(zip(with_hybrids, made, strict=True))
    noted.moves, = moves                # asked once, for all arms
    return noted


@pytest.fixture(scope="session")
def grey(tmp_path_factory):
    """Every arm of the comparison on one subset of grey images."""
    tiny = backwards(tmp_path_factory.mktemp("grey") / "tiny.npz")
    return note_grid(tmp_path_factory, tiny, "--vae-steps", 20, "--arms", *compare.ARMS)


# What an arm's hybrids are, in words of hybrids.make; all else as by default.
OF_HYBRIDS = {
    "real+hybrid": {}, "hybrid only": {}, "undeformed hybrid": {"moves": None},
    "augment+hybrid": {"moves": None, "cut": False},
    "prior hybrid": {"strategy": "prior", "moves": None},
    "cross-faded hybrid": {"register": False}, "deformed images": {"strategy": "images"},
    "weight labels": {"rule": "weight"}, "density labels": {"rule": "density"},
    "product labels": {"rule": "product"}, "no residual": {"residual": False},
    "reconstructions": {"strategy": "around", "rule": "weight", "residual": False,
                        "moves": None},
    "pseudo-labels": {"strategy": "images", "moves": None},
    "mixup+pseudo": {"strategy": "images", "moves": None},
    "mixup+pseudo only": {"strategy": "images", "moves": None},
    "mixup+soft pseudo": {"strategy": "images", "rule": "density", "moves": None},
    "soft pseudo-labels": {"strategy": "images", "rule": "density", "moves": None},
    "augment+pseudo": {"strategy": "images", "moves": None}}
MOVED = [arm for arm, told in OF_HYBRIDS.items() if "moves" not in told]


def test_every_arm_is_trained_from_the_same_weights_by_the_same_settings_beside_one_vae(grey):
    fit, = grey.vaes
    assert rows_used(fit, grey.data.images) == set(grey.subset.tolist())
    torch.manual_seed(3)
    assert same(fit.first, vae.VAE(1, 16, 16, latent_dim=4).state_dict())
    assert fit.seed == grey.moves.asked[2] == 3
    assert fit.settings.items() >= {"steps": 20, "amp": False, "lr": 3e-3}.items()
    assert torch.equal(grey.moves.asked[0], grey.images)
    assert torch.equal(grey.moves.asked[1], grey.labels)
    assert list(grey.rows) == list(compare.ARMS)
    torch.manual_seed(3)
    wanted = cnn.CNN(1, 3, 4, 16).state_dict()
    told = {"steps": 8, "weight_decay": 0.05, "lr": 3e-3, "amp": False, "state": None}
    for arm, fit in grey.fits.items():
        assert same(fit.first, wanted), arm
        assert fit.seed == 3
        assert fit.settings.items() >= told.items()
        assert [len(x) for x, _ in fit.batches] == [64] * 8, arm


@pytest.mark.parametrize("arm", OF_HYBRIDS)
def test_an_arm_has_the_hybrids_that_it_is_named_for(grey, arm):
    call = grey.made[arm]
    known, images, decode = call.given
    told = {"strategy": "between", "rule": None, "residual": True, "cut": None,
            "moves": grey.moves, "register": True, **OF_HYBRIDS[arm]}
    said = {key: value for key, value in call.told.items() if key != "generator"}
    assert said == told                 # and no number of them: as many as hybrids.py makes
    assert torch.equal(images, grey.images)
    assert torch.equal(known.y, grey.labels)
    assert torch.equal(known.rows, grey.subset)
    mu, logvar = vae.encode_all(grey.vaes[0].model, grey.images)
    close((known.mu, known.logvar), (mu, logvar))
    close(decode(mu), grey.vaes[0].model.decode(mu))
    wanted = hybrids.sample(told["strategy"], 512, known, seeded(3),
                            lines=hybrids.LINES if arm in MOVED else None)
    assert torch.equal(call.result.points.z, wanted.z)
    trained = grey.trained[arm].told
    assert trained["made"] == (call.result.x, call.result.q)
    assert trained.get("move") == (grey.moves.gently if arm in MOVED else None)


def test_an_arm_is_trained_on_its_subset_as_it_is_named_for(grey):
    # In words of cnn.train: what augments all images of a batch, and how hybrids or real
    # images are mixed.
    besides = {
        "augment": (cnn.augment, None), "elastic": (cnn.elastic, None),
        "augment+hybrid": (cnn.augment, None), "augment+pseudo": (cnn.augment, None),
        "deform": (grey.moves, None), "deform+mixup": (grey.moves, "mixup"),
        "deform+cutmix": (grey.moves, cnn.cutmix), "augment+mixup": (cnn.augment, "mixup"),
        "mixup": (None, cnn.mixup), "mixup+pseudo": (None, cnn.mixup),
        "mixup+pseudo only": (None, cnn.mixup), "mixup+soft pseudo": (None, cnn.mixup),
        "cutmix": (None, cnn.cutmix), "mixup+cutmix": (None, "both")}
    for arm, call in grey.trained.items():
        augmentation, mix = besides.get(arm, (None, None))
        images, q, seed = call.given
        assert torch.equal(images, grey.images)
        assert torch.equal(q, one_hot(grey.labels))
        assert seed == 3
        only = arm in ("hybrid only", "mixup+pseudo only")
        assert call.told["share"] == ((1.0, 1.0) if only else (1.0, 0.0))
        assert call.told["augmentations"] == ([augmentation] if augmentation else []), arm
        found = call.told["mix"]
        if mix == "mixup":              # of images that are augmented not by halves
            assert (found.func, found.keywords) == (cnn.mixup, {"alpha": 4.0})
        elif mix != "both":
            assert found is mix, arm
    pair = grey.images / 255, one_hot(grey.labels)
    mix = compare.mixing("both")        # one and the other in turn
    for wanted in (cnn.mixup, cnn.cutmix, cnn.mixup):
        close(mix(*pair, seeded()), wanted(*pair, seeded()))


def test_test_and_validation_images_never_reach_a_training(grey, seen):
    for noted in (grey, seen):
        rest = noted.data.images[noted.data.validation]
        strangers = torch.cat([noted.data.test_images, rest])
        fits = [noted.vae, noted.cnn] if noted is seen else [*noted.fits.values(), *noted.vaes]
        for fit in fits:
            assert rows_used(fit, strangers) == {-1}


def test_scores_are_of_last_weights_on_test_images_temperatures_of_half_of_validation(grey):
    test_images, test_y = grey.data.test_images, grey.data.test_labels
    noisy = compare.noisy(test_images)
    for arm, fit in grey.fits.items():
        row = grey.rows[arm]
        fit.model.load_state_dict(fit.last)
        q = cnn.predict(fit.model, test_images).softmax(1)
        for key, value in common.scores(q, test_y).items():
            assert row[key] == approx(value, abs=1e-5), arm
        right = cnn.predict(fit.model, noisy).argmax(1) == test_y
        assert row["noise"] == approx(part_of(right))
    known = grey.made["real+hybrid"].given[0]
    q = known.posterior(*vae.encode_all(grey.vaes[0].model, test_images))
    wanted = common.scores(q, test_y)
    assert grey.rows["latent posterior"]["accuracy"] == wanted["accuracy"]
    assert grey.rows["latent posterior"]["nll"] == approx(wanted["nll"], rel=1e-3)
    _, images, y, fitting, fitting_y = grey.scores[0].given
    assert torch.equal(images, test_images)
    assert torch.equal(y, test_y)
    where = rows_among(fitting, grey.data.images)
    assert torch.isin(where, grey.data.validation).all()
    assert torch.equal(fitting_y, grey.data.labels[where])
    assert len(where) == math.ceil(len(grey.data.validation) / 2)


def test_images_that_fit_temperatures_do_not_score_and_are_of_all_classes(grid, tmp_path):
    planned = grid_of("--dataset", grid / "tiny.npz", "-o", tmp_path, "--sizes", 12, "--score",
                      "validation")
    data = planned.data
    data.validation = data.validation[data.labels[data.validation].argsort()]
    unit = compare.Unit(planned, 12, 0)
    fitting, scored = (set(rows_among(images, data.images).tolist())
                       for images, _ in (unit.fitting, unit.scored))
    assert fitting.isdisjoint(scored)
    assert fitting | scored == set(data.validation.tolist())
    assert abs(len(fitting) - len(scored)) <= 1
    assert set(unit.fitting[1].tolist()) == {0, 1, 2}
    data.validation = torch.arange(3000) % 200
    assert len(compare.Unit(planned, 12, 0).fitting[1]) == 1000


# ---- what the scripts make is what is measured; few labels, many images ---------------------

@pytest.mark.parametrize("few", ["--images", "--labels"])
def test_the_scripts_make_the_networks_that_a_comparison_measures(tmp_path, undrawn, few):
    data = backwards(tmp_path / "tiny.npz")
    scripts = tmp_path / "scripts"
    assert run("deform", "--dataset", data, "-o", scripts, few, 12, "--seed", 3) == 0
    for script in ("vae", "latent", "hybrids", "cnn"):
        steps = ["--steps", 30] if script in ("vae", "cnn") else []
        assert run(script, "-o", scripts, *steps) == 0
    made = [facts_of(scripts, "cnn")["metrics"]]
    assert run("cnn", "-o", scripts, "--steps", 30, "--hybrid-fraction", 0) == 0
    made.insert(0, facts_of(scripts, "cnn")["metrics"])
    unlabelled = ["--unlabelled"] if few == "--labels" else []
    rows = compared(tmp_path / "compared", "--dataset", data, "--sizes", 12, "--seeds", 1,
                    "--seed", 3, "--arms", "real", "real+hybrid", "--steps", 30, "--vae-steps",
                    30, *unlabelled)["rows"]
    for row, metrics in zip(rows, made, strict=True):           # to the last digit
        assert (row["accuracy"], row["nll"]) == (metrics["accuracy"], metrics["nll"])
    assert (rows[1]["sources"] > 12) == (few == "--labels")     # labels were spread


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A chain on 30 labelled images, and others, whose hybrids do not move."""
    out = tmp_path_factory.mktemp("few") / "run"
    tiny = with_loose(out.parent / "tiny.npz", x_test=easy(60, seed=61)[0][:, 0].numpy())
    noted = note_chain(out, ["--dataset", tiny, "--labels", 30],
                       ["--count", 300, "--no-deform"])
    noted.true = dataset(tiny, out.parent / "other").labels
    return noted


def test_labels_are_those_given_and_those_spread_by_codes_and_by_images_that_move(few):
    pool = few.data.pool
    assert (len(few.data.labelled()), len(few.data.unlabelled())) == (30, 260)
    used = rows_used(few.vae, few.data.images)
    assert used <= set(pool.tolist()) and len(used) > 250
    assert len(few.moves[0].asked[0]) == 30
    saved = few.files["latent"]
    assert torch.equal(saved["rows"], pool)
    y = few.data.labels[pool]
    assert torch.equal(saved["given"], y >= 0)
    wanted = latent.embed(saved["mu"], saved["logvar"], pool, y, 3, saved["mu"],
                          few.data.images[pool], deformations(0.5, True))
    assert torch.equal(saved["y"], wanted.y)
    assert few.embedded[0].given[-1].strength == 0.5
    known = few.true[pool] >= 0
    assert part_of(saved["y"][known] == few.true[pool][known]) > 0.95
    assert set(saved["made_from"]) == {"vae", "deform"}


def test_hybrids_are_made_of_and_a_classifier_sees_given_and_spread_labels(few):
    saved = few.files["latent"]
    known = latent.Codes.restore(saved).known()
    made = hybrids.make(known, few.data.images[known.rows],
                        functools.partial(vae.decode_all, few.model), count=300,
                        generator=seeded())
    assert torch.equal(few.files["hybrids"]["images"], made.x)
    assert torch.equal(few.files["hybrids"]["q"], made.q)
    (images, q, _), told = few.trained[0].given, few.trained[0].told
    rows = few.data.labelled()
    assert torch.equal(images, few.data.images[rows])
    assert torch.equal(q, one_hot(few.data.labels[rows]))
    guessed = ~saved["given"]
    assert torch.equal(told["pseudo_labelled"][0], few.data.images[saved["rows"][guessed]])
    assert torch.equal(told["pseudo_labelled"][1], one_hot(saved["y"][guessed]))
    assert "move" not in told           # as hybrids.pt says, made with --no-deform
    metrics = few.files["cnn"]["metrics"]
    assert (metrics["real_images"], metrics["pseudo_labelled"]) == (30, 260)
    assert set(few.files["cnn"]["made_from"]) == {"hybrids"}


# ---- percentages of pictures and of points --------------------------------------------------

@pytest.fixture
def dog(tmp_path):
    """A picture of the second class."""
    file = tmp_path / "dog.png"
    Image.fromarray(easy(3, seed=9)[0][1, 0].numpy()).save(file)
    return file


@pytest.mark.parametrize("words, ink", [
    ("latent --point", False), ("latent --image", False), ("cnn --predict", False),
    ("cnn --predict", True)])
def test_points_and_pictures_have_the_percentages_that_speak_and_those_of_the_classifier(
        seen, dog, capsys, words, ink):
    image = torch.from_numpy(np.array(Image.open(dog)))[None, None]
    if ink:                             # on white paper, where the set is chalk on a board
        Image.fromarray(255 - np.asarray(Image.open(dog))).convert("RGB").save(dog)
    script, flag = words.split()
    posterior = latent.restored(seen.files["latent"]["percentages"])
    asked = dog
    if flag == "--point":
        asked = "0.3,-1.2,0,1"
        wanted = posterior(torch.tensor([[0.3, -1.2, 0, 1]]))[0]
    elif flag == "--image":
        wanted = posterior(*vae.encode_all(seen.model, image))[0]
    else:
        wanted = cnn.predict(seen.classifier, image).softmax(1)[0]
    assert run(script, flag, asked, "-o", seen.out) == 0
    printed = capsys.readouterr().out
    lines = re.findall(r"^ *([\d.]+)% +(\w+)$", printed, re.M)         # one a class
    found = {name: float(percent) / 100 for percent, name in lines}
    assert [found[name] for name in ANIMALS] == approx(wanted.tolist(), abs=6e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert ("inverted" in printed) == ink


def test_pictures_of_a_folder_are_a_table_that_no_bad_one_ends_nor_a_name_that_is_no_text(
        chain, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for k, image in enumerate(easy(6, seed=9)[0]):
        folder = tmp_path / "in" if k % 2 else tmp_path
        Image.fromarray(image[0].numpy()).save(folder / f'{k} "a".png')
    (tmp_path / "0.png").write_text("no picture")
    assert run("cnn", "-o", chain, "--predict", tmp_path) == 2
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert len(rows) == 6
    for row in rows:
        assert row["likeliest"] == ANIMALS[int(Path(row["file"]).name[0]) % 3]
        assert sum(float(row[c]) for c in ANIMALS) == approx(1, abs=1e-3)
    assert said.err.splitlines()[-1] == "cnn.py: 1 of 7 pictures cannot be read"
    (tmp_path / "odd").mkdir()
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/odd/\xff.png"))
    Image.fromarray(easy(1)[0][0, 0].numpy()).save(odd)
    done = shell(sys.executable, HERE / "cnn.py", "-o", chain, "--predict", odd.parent,
                 PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0, done.stderr
    _, line = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path}/odd/\\udcff.png,")


def contents(folder):
    """Every file below a folder and what it holds."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_two_runs_in_one_folder_do_not_mix_but_a_question_is_free_and_writes_nothing(
        bare, dog, capsys):
    fcntl = pytest.importorskip("fcntl")
    with (bare / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = contents(bare)
        mistake(capsys, "hybrids", "-o", bare, "--count", 9, says="another run works in")
        assert run("latent", "-o", bare, "--point", "0,0,0,0") == 0
        assert run("cnn", "-o", bare, "--predict", dog) == 0
        assert contents(bare) == before
        assert "not found" in mistake(capsys, "cnn", "-o", "typo", "--predict", dog)
        assert not Path("typo").exists()
    assert run("hybrids", "-o", bare, "--count", 9) == 0


# ---- hybrids.py --export, notebooks, and latent.py --review: what to look at next -----------

def table_of(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))


def test_an_export_holds_images_and_percentages_and_goes_into_an_empty_folder_outside_the_data(
        chain, there, capsys, monkeypatch):
    rows = table_of(chain / "png/labels.csv")
    saved = read(chain / "hybrids.pt")
    assert len(rows) == 90
    assert list(rows[0]) == ["file", *ANIMALS]
    for row, image, q in zip(rows, saved["images"], saved["q"]):
        pixels = np.asarray(Image.open(chain / "png" / row["file"]))
        assert np.array_equal(pixels, image[0].numpy())
        assert [float(row[name]) for name in ANIMALS] == approx(q.tolist(), abs=1e-5)
        assert ANIMALS[int(q.argmax())] in row["file"].split("/")[0]

    monkeypatch.setattr(deform.Deformations, "fit", found((0.0, False)))
    assert run("deform", "-o", there) == run("latent", "-o", there) == 0
    words = ["hybrids", "-o", there, "--no-deform", "--count", 9, "--export"]
    Path("new").mkdir()
    Path("new/.DS_Store").write_text("of a Mac")
    assert run(*words, "new") == 0
    assert len(contents(Path("new"))) == 11
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    before = contents(Path())
    capsys.readouterr()
    for folder in ("new", "mine", "photos.v1", "photos.v1/new", "photos.v1/0/new"):
        mistake(capsys, *words, folder, says="inside the data set|is not empty")
    assert contents(Path()) == before
    Path("mnist").mkdir()               # called like a data set that lies elsewhere
    hybrids.check_export(Path("mnist/new"), "mnist")


def test_a_notebook_finds_its_settings_as_they_were(copy):
    torch.set_num_threads(2)
    os.environ["MPLBACKEND"] = "module://of_a_notebook"
    try:
        assert run("cnn", "-o", copy, *STEMS["cnn"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
        assert os.environ.pop("MPLBACKEND") == "module://of_a_notebook"


def test_a_comparison_learns_movements_from_given_labels_and_spreads_hard_ones(
        tmp_path, undrawn, monkeypatch):
    note_moves(monkeypatch)
    planned = grid_of("--dataset", npz(tmp_path / "tiny.npz"), "-o", tmp_path, "--sizes", 12,
                      "--unlabelled", "--vae-steps", 30)
    unit = compare.Unit(planned, 12, 3)
    kept = common.subset(planned.data, 12, 3).sort()[0]
    assert len(unit.images) > 100
    images, y, seed = unit.moves.asked
    assert torch.equal(images, planned.data.images[kept])
    assert torch.equal(y, planned.data.labels[kept])
    assert seed == 3
    _, q = unit.with_hybrids(compare.ARMS["pseudo-labels"])["pseudo_labelled"]
    assert set(q.unique().tolist()) == {0, 1}           # one class each


@pytest.mark.parametrize("right, doubted", [(0.6, 1), (0.5, 0)])
def test_labels_are_doubted_only_by_percentages_that_agree_with_most(
        few, capsys, monkeypatch, right, doubted):
    rows = few.data.labelled()[:10]
    y = few.data.labels[rows]
    said = torch.where(torch.arange(10) < 10 * right, y, (y + 1) % 3)
    q = 0.97 * one_hot(said) + 0.01
    codes = latent.Codes(rows, noise(10, 2), noise(10, 2), y, y >= 0, None)
    monkeypatch.setattr(latent, "REVIEWED", 1)       # of two
    capsys.readouterr()
    lines = latent.findings(few.data, codes, q, q, set())
    assert len(lines) == doubted
    assert ("know too little to doubt" in capsys.readouterr().err) != doubted


def test_a_review_holds_given_labels_against_given_ones_alone(few, tmp_path, undrawn,
                                                              monkeypatch):
    calls = note_calls(monkeypatch, latent, "review")
    out = shutil.copytree(few.out, tmp_path / "run")
    assert run("latent", "-o", out, "--review", "--no-amp") == 0
    saved = read(out / "latent.pt")
    codes = latent.Codes.restore(saved)
    posterior = latent.restored(saved["percentages"])
    choice = saved["metrics"][type(posterior).__name__.lower()]["choice"]
    own = functools.partial(latent.left_out, type(posterior), choice, posterior.temperature,
                            classes=3)
    *_, q, labelled_q = calls[0].given
    close(q, own(*codes.labelled()))
    close(labelled_q, own(*codes.some(codes.given).labelled()))     # no label that was spread
    assert (labelled_q - q[codes.given]).abs().max() > 1e-3


def test_a_table_has_the_percentages_of_every_image(few):
    table = {line["image"]: line for line in table_of(few.out / "latent.csv")}
    data, saved = few.data, few.files["latent"]
    assert set(table) == set(data.names)
    counts = Counter(line["part"] for line in table.values())
    assert counts == {"train": 30, "unlabelled": 260, "test": 60}       # of few labels
    posterior = latent.restored(saved["percentages"])
    tests = posterior(*vae.encode_all(few.model, data.test_images))
    names = [data.names[row] for row in saved["rows"]]
    every_name = names + data.names[len(data.images):]
    for name, q in zip(every_name, torch.cat([saved["q"], tests]), strict=True):
        line = table[name]
        assert [float(line[animal]) for animal in ANIMALS] == approx(q.tolist(), abs=1e-4)
        assert line["likeliest"] == ANIMALS[q.argmax()]
    for name, y, given in zip(names, saved["y"], saved["given"]):
        label = ANIMALS[y]
        found = table[name]["label"], table[name]["spread"]
        assert found == ((label, "") if given else ("", label))


def test_a_review_lists_wrong_labels_and_what_would_teach_most_until_a_person_has_said(
        tmp_path, undrawn, capsys):
    y = easy(200)[1].numpy()
    rows = dataset(npz(tmp_path / "a.npz"), tmp_path).pool[[5, 50, 120]].tolist()
    y[rows] = (y[rows] + 1) % 3
    right = {f"train/{row}": ANIMALS[row % 3] for row in rows}
    file = with_loose(tmp_path / "a.npz", y_train=y, x_test=easy(60, seed=61)[0][:, 0].numpy())
    out = tmp_path / "run"
    assert run("deform", "--dataset", file, "-o", out) == 0
    assert run("vae", "-o", out, "--steps", 60, "--latent-dim", 4) == 0
    assert run("latent", "-o", out, "--review") == 0
    table = table_of(out / "review.csv")
    suspected, teaching = ([line for line in table if line["why"] == why]
                           for why in ("label looks wrong", "label would teach most"))
    wrong = {line["image"]: line["likeliest"] for line in suspected}
    assert wrong and wrong.items() <= right.items()     # it does not cry wolf
    assert len(teaching) == 90
    assert all(line["image"].startswith("unlabelled/") for line in teaching)
    assert {line["new_label"] for line in table} == {""}

    codes = latent.Codes.restore(saved := read(out / "latent.pt"))
    _, data = opened("latent", "-o", out)
    for line in (suspected[0], teaching[0]):            # what was said is not asked again
        for seen, wanted in ((set(), True), ({line["image"]}, False)):
            found = latent.findings(data, codes, saved["q"], saved["q"][codes.given], seen)
            assert (line["image"] in {other["image"] for other in found}) is wanted
    sure = teaching[0]["image"]
    mine = out / "labels.csv"           # with a column more, and a line that is not yet done
    marks = {line["image"]: line["fingerprint"] for line in table}
    lines = ["image,new_label,reviewer,fingerprint", f"{teaching[1]['image']},,"]
    lines += [f"{name},{label},me,{marks.get(name, '')}"
              for name, label in [(sure, "eel"), *right.items()]]
    mine.write_text("\n".join(lines))
    before = mine.read_bytes()
    assert run("deform", "--dataset", file, "-o", out, "--labels-from", mine) == 0
    assert run("vae", "-o", out, *STEMS["vae"]) == 0
    assert run("latent", "-o", out, "--review") == 0
    assert mine.read_bytes() == before
    assert not {line["image"] for line in table_of(out / "review.csv")} & {*right, sure}
    typed = (out / "review.csv").read_text().replace(",,", ",eel,")     # in the wrong table
    (out / "review.csv").write_text(typed)
    capsys.readouterr()
    line = mistake(capsys, "latent", "-o", out, "--review")
    assert f"review.csv has new labels, and would be replaced; move it to {mine}" in line
    assert (out / "review.csv").read_text() == typed
    labels = {line["image"]: line["label"] for line in table_of(out / "latent.csv")}
    assert labels.items() >= {**right, sure: "eel"}.items()


# ---- unfinished work ------------------------------------------------------------------------

def interrupted(folder, name, rounds, *words):
    """What a training leaves where Ctrl-C was pressed after so many rounds."""
    module = SCRIPTS[name]
    plain = module.fit

    def fit(*arguments, **settings):
        yield from itertools.islice(plain(*arguments, **settings), rounds)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit", fit)
        assert run(name, "-o", folder, *words) == 130
    return read(folder / f"{name}.last.pt")


@pytest.mark.parametrize("name, words", [
    ("vae", ["--batch-size", 32]), ("cnn", ["--width", 8, "--augment"])], ids=["vae", "cnn"])
def test_a_training_in_two_pieces_is_the_training_in_one(bare, tmp_path, capsys, name, words):
    straight = Path(shutil.copytree(bare, tmp_path / "straight"))
    words = [*words, "--steps", 40]
    assert run(name, "-o", straight, *words) == 0
    (bare / f"{name}.pt").unlink()
    work = interrupted(bare, name, 4, *words)
    assert capsys.readouterr().err == f"{name}.py: interrupted; what was finished is kept\n"
    assert (work["state"]["step"], len(work["history"])) == (16, 4)
    assert not (bare / f"{name}.pt").exists()
    assert run(name, "-o", bare, *words, "--resume") == 0
    one, two = (read(folder / f"{name}.pt") for folder in (straight, bare))
    assert same(one["model"], two["model"])
    assert one["metrics"] == two["metrics"]
    assert [row["step"] for row in log_of(bare, name)] == list(range(4, 41, 4))
    assert not list(bare.glob("*.last*.pt"))


TEN = ["--steps", 10, "--width", 4]
@pytest.mark.parametrize("words, names", [
    ("--lr 0.001 --resume", "lr 0.003, now 0.001"), ("--width 5 --resume", "width 4, now 5"),
    ("", "not asked for")])
def test_unfinished_work_that_does_not_fit_is_kept_and_the_line_names_what_differs(
        bare, capsys, monkeypatch, words, names):
    interrupted(bare, "cnn", 2, *TEN)
    work = (bare / "cnn.last.pt").read_bytes()
    (bare / "cnn.last.1.pt").write_text("kept before")
    fits = note_fits(monkeypatch, cnn)
    capsys.readouterr()
    assert run("cnn", "-o", bare, *TEN, *words.split()) == 0
    line, = capsys.readouterr().err.splitlines()
    assert names in line
    assert line.endswith("kept as cnn.last.2.pt")
    assert fits[0].settings["state"] is None
    assert (bare / "cnn.last.2.pt").read_bytes() == work
    assert (bare / "cnn.last.1.pt").read_text() == "kept before"


def test_other_threads_and_a_moved_data_set_are_no_hindrance(bare, monkeypatch):
    interrupted(bare, "cnn", 2, *TEN)
    fits = note_fits(monkeypatch, cnn)
    monkeypatch.chdir(bare.parent)
    shutil.copy(opened("cnn", "-o", bare)[0].dataset, "moved.npz")
    words = ["-o", bare, *TEN, "--resume", "--dataset", "./moved.npz", "--threads", "2"]
    assert cnn.main([*map(str, words), "--quiet"]) == 0
    assert fits[0].settings["state"]["step"] == 2


# ---- a folder belongs to its data set, and settings are passed down -------------------------

@pytest.fixture(scope="session")
def settled(tmp_path_factory):
    """A folder of pictures, and a run on it whose settings are none of the defaults."""
    root = tmp_path_factory.mktemp("settled")
    for k, (image, label) in enumerate(zip(*easy(90))):
        (root / f"photos.v1/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(root / f"photos.v1/{label}/{k}.png")
    with pytest.MonkeyPatch.context() as patch:
        leave_blank(patch)
        patch.chdir(root)
        assert run("vae", "--dataset", "photos.v1", "--labels", 30, "--seed", 3,
                   "--image-size", 40, *STEMS["vae"]) == 0
    return root


@pytest.fixture
def there(settled, tmp_path, undrawn, monkeypatch):
    """One's own copy of it, to work in."""
    shutil.copytree(settled, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/photos.v1")       # the name is whole


@pytest.mark.parametrize("spoil", ["", "gone", "damaged"])
@pytest.mark.parametrize("script", ["vae", "cnn", "compare"])
def test_a_folder_goes_on_with_its_own_data_set_and_settings(there, script, spoil):
    if spoil == "gone":
        (there / "vae.pt").unlink()
    if spoil == "damaged":
        (there / "vae.pt").write_bytes(b"half")
    started, data = opened(script, "-o", there)
    assert (data.name, list(data.images.shape[1:])) == ("photos.v1", [1, 40, 40])
    assert len(data.labelled()) == 30
    wanted = {"dataset": "photos.v1", "labels": 30, "seed": 3, "image_size": 40}
    assert started.which.items() >= wanted.items()


def test_a_folder_may_be_called_like_its_data_set_and_a_comparison_have_subsets_of_its_own(
        chain, tmp_path, monkeypatch):
    started, data = opened("compare", "-o", chain, "--seed", 9)
    assert (started.seed, len(data.labelled())) == (9, 179)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        common.start(vae.parse_args(["--dataset", "mnist", "-o", "mnist"])).release()
    noisy(Path("glyphs"), ("a", "b"))   # a folder of the user's
    with pytest.raises(common.Mistake, match="glyphs is a named data set, and a folder of"):
        dataset("glyphs", "out")


@pytest.mark.parametrize("out, refused", [
    ("photos.v1", True), ("photos.v1/", True), ("photos.v1/0", True), ("photos.v1/new", False),
    (".", False)])
def test_results_do_not_go_among_the_pictures_of_the_data_set(there, capsys, out, refused):
    files = [*Path("photos.v1").rglob("*")]
    for _ in range(2):
        code = run("vae", "--dataset", "photos.v1", "-o", out, *STEMS["vae"])
        assert code == (2 if refused else 0)
    if refused:
        assert "holds pictures of the data set; give another -o" in capsys.readouterr().err
        assert [*Path("photos.v1").rglob("*")] == files


@pytest.mark.parametrize("spelt", ["photos.v1/", "./photos.v1", "ABSOLUTE", "moved"])
def test_one_data_set_has_many_spellings_and_may_move(there, capsys, spelt):
    if spelt == "moved":
        os.rename("photos.v1", "moved")
        mistake(capsys, "cnn", "-o", there, "--hybrid-fraction", 0,
                says="one that was moved has to be named again, by each command")
    spelt = os.path.abspath("photos.v1") if spelt == "ABSOLUTE" else spelt
    assert len(opened("cnn", "-o", there, "--dataset", spelt)[1].labelled()) == 30


@pytest.mark.parametrize("script", ["deform", "vae", "latent", "cnn", "compare"])
def test_another_data_set_in_the_folder_is_refused_with_both_and_another_o(there, capsys,
                                                                          script):
    other = npz("other.npz")
    before = contents(there)
    words = ["--hybrid-fraction", 0] if script == "cnn" else []
    mistake(capsys, script, "--dataset", other, "-o", there, *STEMS[script], *words,
            remarks=True, says=r"photos\.v1.*other\.npz.* another -o")
    after = contents(there)
    assert {file: after[file] for file in before} == before


def command_in(line):
    """The whole command that a line names -> its script and words."""
    words = shlex.split(re.search(r"(python \w+\.py .*?)([,;] or give|$)", line)[1])
    return words[1].removesuffix(".py"), words[2:]


@pytest.mark.parametrize("script, flag, value, known", [
    ("latent", "--seed", 1, 3), ("hybrids", "--labels", 33, 30), ("cnn", "--images", 9, None),
    ("cnn", "--image-size", 36, 40), ("compare", "--labels", 33, 30)])
def test_a_flag_against_the_folder_is_refused_with_a_whole_command(there, capsys, script, flag,
                                                                   value, known):
    line = mistake(capsys, script, "-o", there, flag, value)
    assert re.search(rf"{flag[2:].replace('-', '.')} {value}.*made with {known}", line), line
    name, words = command_in(line)
    wanted = {"dataset": "photos.v1", "labels": 30, "seed": 3, "image_size": 40, "steps": 3,
              "latent_dim": 4, "out": there, flag[2:].replace("-", "_"): value}
    assert name == "vae"
    found = vars(vae.parse_args(words))
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("words, printed", [
    (["--dataset", "glyphs"], "--dataset glyphs"), ([], "--images 9"),
    (["--dataset", "glyphs", "--images", 7], "--images 7")])
def test_a_command_that_is_printed_makes_what_was_asked_for(tmp_path, capsys, words, printed):
    record = {"kind": "cnn", "format": common.FORMAT, "changed": {},
              "dataset": {"which": {**common.WHICH, "images": 9}}}
    common.write(tmp_path / "cnn.json", record)         # its vae.pt is lost
    mistake(capsys, "latent", *words, "-o", tmp_path,
            says=re.escape(f"python vae.py {printed} -o {tmp_path}"))


@pytest.mark.parametrize("script, missing", [
    ("latent", "vae"), ("hybrids", "latent"), ("hybrids", "deform"), ("cnn", "vae"),
    ("cnn", "hybrids"), ("cnn --hybrid-fraction 0 --deform", "deform")])
def test_a_file_that_is_missing_comes_with_the_command_that_makes_it_as_it_was(
        bare, capsys, script, missing):
    (bare / f"{missing}.pt").unlink()
    line = mistake(capsys, *script.split(), "-o", bare, says=rf"{missing}\.pt not found")
    before = facts_of(bare, missing)["settings"]
    name, words = command_in(line)
    assert name == missing
    assert run(name, *words) == 0
    assert facts_of(bare, missing)["settings"] == before


def change(path, **changes):
    torch.save(read(path) | changes, path)


@pytest.mark.parametrize("spoil, script, pattern", [
    (lambda out: os.truncate(out / "vae.pt", 500), "latent", "damaged.* vae.py"),
    (lambda out: os.truncate(out / "latent.pt", 0), "hybrids", "damaged.*latent.py"),
    (lambda out: change_a_bit(out / "vae.pt"), "latent", "damaged.* vae.py"),
    (lambda out: change(out / "vae.pt", format=5), "latent", "another version.* vae.py"),
    (lambda out: change(out / "vae.pt", more=1), "hybrids",
     "latent.pt was made from another vae.pt.* latent.py"),
    (lambda out: change(out / "deform.pt", more=1), "cnn",
     "hybrids.pt was made from another deform.pt.* hybrids.py"),
    (lambda out: (out / "deform.json").write_text("{"), "cnn",
     "deform.json is damaged.*remove it")])
def test_files_that_do_not_fit_end_in_one_line(copy, capsys, spoil, script, pattern):
    spoil(copy)
    mistake(capsys, script, "-o", copy, says=pattern)
    assert not unfinished(copy)


# ---- mistakes, bad machines, ranks ----------------------------------------------------------

ABSENT = "mps" if torch.cuda.is_available() else "cuda"
@pytest.mark.parametrize("command, pattern", [
    ("deform --dataset TINY --sizes 9 181 -o NEW", "181 images asked for.*SIZES"),
    ("vae --batch-size 1000000000000", "out of memory"),
    (f"vae --device {ABSENT}", f"--device {ABSENT}"), ("vae -o OUT/vae.pt", "File exists"),
    ("latent --point 1,2", "4 finite numbers"), ("latent --point 1,nan,2,3", "finite"),
    ("latent --image OUT/no.png", r"no\.png"),
    ("hybrids --count 9 --export OUT/vae.pt", "vae.pt"),
    ("cnn --predict OUT/nothing", "nothing"), ("cnn --predict OUT/none", "no images"),
    ("compare --sizes 9999", "9999 images asked for.*SIZES")])
def test_commands_that_cannot_be_obeyed_end_in_one_line(copy, capsys, command, pattern):
    (copy / "none").mkdir()
    for name, path in (("NEW", copy / "new"), ("TINY", npz(copy.parent / "tiny.npz")),
                       ("OUT", copy)):
        command = command.replace(name, str(path))
    script, *words = command.split()
    mistake(capsys, script, "-o", copy, *words, says=pattern, remarks=True)
    assert not unfinished(copy)


@pytest.mark.parametrize("words", [
    "vae --steps 0", "vae --steps 1.5", "vae --lr nan", "vae --lr -1", "vae --beta inf",
    "vae --seed -1", "vae --seed 99999999999999999999", "vae --device tpu", "vae --nosuch",
    "deform --images 0", "latent --point 1,a", "hybrids --strategy nowhere",
    "hybrids --strategy prior --label product", "cnn --hybrid-fraction 2",
    "cnn --hybrid-fraction 1 0 0", "cnn --batch-size 1", "compare --images 9",
    "latent --point 1,2 --image a.png",
    "compare --sizes 1", "compare --arms nosuch"])
def test_flags_out_of_range_end_in_one_line(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words.split())
    script = words.split()[0]
    assert re.search(rf"\A{script}\.py: [^\n]+\n\Z", capsys.readouterr().err)


def test_a_fault_of_the_program_itself_is_not_explained_away(tmp_path):
    def wrong(run, args):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        common.run_script(wrong, vae.parse_args(["-o", str(tmp_path)]))


# Of .json and .pt files alike: the .png comes between.
@pytest.mark.parametrize("script", STEMS)
def test_a_full_disk_leaves_the_files_as_they_were(bare, capsys, monkeypatch, script):
    before = {file: content for file, content in contents(bare).items()
              if file.suffix in (".json", ".pt")}
    last = ".json" if script == "compare" else ".pt"
    plain = common.put

    def full(path, content):
        if path.suffix == last and (last != ".pt" or "kind" in content):
            raise OSError(28, "No space left on device")
        plain(path, content)

    monkeypatch.setattr(common, "put", full)
    monkeypatch.setattr(latent, "CODES", 30)
    words = {"compare": ["--arms", "latent posterior"],
             "hybrids": ["--count", 91]}.get(script, [])        # other than there were
    mistake(capsys, script, "-o", bare, *STEMS[script], *words,
            says="No space left on device$")
    after = contents(bare)
    assert {file: after[file] for file in before} == before
    assert not unfinished(bare)
    assert not (bare / "compare.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("name, code", [("closed", 0), ("full", 2)])
def test_the_result_does_not_depend_on_who_listens(bare, monkeypatch, capsys, name, code):
    stream = open("/dev/full", "w") if name == "full" else None
    (bare / "hybrids.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert run("hybrids", "-o", bare, "--count", 9) == code
        if stream:
            stream.close()              # as Python does in the end: nothing is left to write
    assert (bare / "hybrids.pt").exists()
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("hybrids.py: ") for line in said] == [True] * (code == 2)


def wait_for(condition, seconds=60):
    """Until the condition holds -> does it?"""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to look into")
@pytest.mark.parametrize("whom, code", [("all", 130), pytest.param("worker", 2, marks=slow)])
def test_a_signal_ends_a_grid_in_one_line_and_leaves_no_process(grid, tmp_path, whom, code):
    words = [*GRID[1:], "--dataset", grid / "tiny.npz", "-o", tmp_path, "--jobs", 2, "--quiet",
             "--steps", 5000 if whom == "all" else 200]
    parent = subprocess.Popen([sys.executable, HERE / "compare.py", *map(str, words)], env=ENV,
                              text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              start_new_session=True)
    workers = []

    def both_there():
        workers[:] = shell("pgrep", "-P", parent.pid, "-f", "spawn_main").stdout.split()
        return len(workers) == 2

    assert wait_for(both_there)
    if whom == "worker":
        os.kill(int(workers[0]), signal.SIGKILL)
    while whom == "all" and parent.poll() is None:      # again and again
        os.killpg(parent.pid, signal.SIGINT)
        time.sleep(0.05)
    said = parent.communicate(timeout=200)[1]
    assert parent.returncode == code
    assert "Traceback" not in said
    wanted = "what was finished is kept" if whom == "all" else "run the same command again"
    assert wanted in said
    assert wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def test_a_rank_trains_its_share_of_a_comparison_and_no_single_network(grid, tmp_path,
                                                                      monkeypatch, capsys):
    monkeypatch.setattr(common, "RANK", 1)
    monkeypatch.setattr(common, "RANKS", 2)
    words = [*GRID, "--dataset", grid / "tiny.npz", "-o", tmp_path / "new", "--jobs", 1]
    assert run(*words) == 0
    assert "--gather" in capsys.readouterr().out
    units = {name.rsplit("-", 2)[0] for name in cells_of(tmp_path / "new")}
    assert units == {"30-1", "12-1"}
    assert not (tmp_path / "new/compare.json").exists()
    assert "start without torchrun" in mistake(capsys, "vae", "-o", tmp_path / "other")


@pytest.mark.parametrize("variables, ranks", [
    ("MASTER_ADDR=here", 1), ("RANK=1 WORLD_SIZE=4", 1),        # as batch systems set them
    ("TORCHELASTIC_RUN_ID=a RANK=1 WORLD_SIZE=4 MASTER_ADDR=here", 4)])
def test_only_torchrun_makes_ranks(variables, ranks):
    told = dict(word.split("=") for word in variables.split())
    done = shell(sys.executable, "-c", "import common; print(common.RANKS)", **told)
    assert done.stdout == f"{ranks}\n", done.stderr


# ---- the make chain -------------------------------------------------------------------------

def commands_printed(tree, *words):
    """[script, words] of what make would call."""
    printed = make(tree, "-n", "all", "PYTHON=python", *words)
    return commands_of(re.sub("^", "    ", printed, flags=re.M))


def test_make_n_lists_six_commands_with_settings_and_clean_leaves_the_labels_of_a_person(tree):
    commands = commands_printed(tree, "DATASET=mnist", "SIZES=50 60", "SEED=3", "LABELS=70",
                                "IMAGES=80", "IMAGE_SIZE=40", "LABELS_FROM=a.csv", "STEPS=7")
    told = {script: vars(SCRIPTS[script].parse_args(words)) for script, words in commands}
    assert list(told) == list(SCRIPTS)
    assert {args["out"] for args in told.values()} == {Path("runs/mnist")}
    wanted = {"dataset": "mnist", "seed": 3, "labels": 70, "images": 80, "image_size": 40,
              "labels_from": "a.csv"}
    assert told["deform"].items() >= wanted.items()
    assert [told[script]["steps"] for script in ("vae", "cnn", "compare")] == [7, 7, 7]
    assert told["compare"]["sizes"] == [50, 60]
    assert told["latent"]["review"]
    told = dict(commands_printed(tree, "DATASET=mnist"))
    assert not any("--steps" in words for words in told.values())
    for name in ("a/labels.csv", "a/vae.pt", "a/cells/1.json", "b/.lock", "c.png"):
        (tree / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "runs" / name).touch()
    make(tree, "clean")
    assert [path.name for path in (tree / "runs").rglob("*")] == ["a", "labels.csv"]
    shutil.rmtree(tree / "runs")
    make(tree, "clean")


@pytest.mark.parametrize("path, name", [
    ("photos/2024.05.01", "2024.05.01"), ("photos/", "photos"), ("./leaves.v1", "leaves.v1"),
    ("a/b.npz", "b")])
def test_a_run_has_the_whole_name_of_its_data_set_in_make_and_without(tree, path, name):
    assert common.name_of(path) == name
    _, words = commands_printed(tree, f"DATASET={path}")[0]
    assert deform.parse_args(words).out == Path("runs", name)


def test_above_the_project_there_may_be_blanks_in_a_path_that_is_given_none(tree):
    spaced = tree.rename(tree.parent / "my project")
    (spaced / "photos").mkdir()
    for name in ("glyphs", "photos", "./photos/"):
        _, words = commands_printed(spaced, f"DATASET={name}")[0]
        args = deform.parse_args(words)
        name = Path(name).name
        assert (args.dataset, args.out) == (name, Path("runs", name))
    for word in ("DATASET=my photos", "OUT=a b", "DATA=a b", "OUT=a&b", "DATASET=photos(1)"):
        done = shell("make", "-n", "all", word, cwd=spaced)
        assert f"{word}: make cannot handle blanks and & ( ) ' \" ; in a path" in done.stderr


STAND_IN = """#!/bin/sh
# In python's place: notes which script was called, and leaves its stem file.
echo "$1" >> called
stem=${1%.py} end=pt
[ $stem = compare ] && end=json
while [ "$1" != -o ]; do shift; done
echo whole > "$2/$stem.$end"
"""


def stand_in(tree, end=""):
    """-> the command of a make whose scripts are done at once, and then do `end`."""
    (tree / "stand-in").write_text(STAND_IN + end)
    (tree / "stand-in").chmod(0o755)
    return ["make", "all", "PYTHON=./stand-in"]


@pytest.fixture
def made(tree):
    """-> a function: the scripts that `make all` calls with these words."""
    command = stand_in(tree)

    def calls(*words):
        (tree / "called").write_text("")
        make(tree, *command[1:], *words)
        return (tree / "called").read_text().replace(".py", "").split()

    assert calls() == list(SCRIPTS)
    assert calls() == []
    return calls


@pytest.mark.parametrize("setting, first", [
    ("DEVICE=cpu", "deform"), ("DATA=other", "deform"), ("LABELS=100", "deform"),
    ("IMAGES=100", "deform"), ("SEED=3", "deform"), ("IMAGE_SIZE=40", "deform"),
    ("LABELS_FROM=gone.csv", "deform"), ("STEPS=7", "vae"), ("VAE_FLAGS=--beta 2", "vae"),
    ("HYBRID_FLAGS=--count 9", "hybrids"), ("SIZES=50", "compare"), ("SEEDS=2", "compare"),
    ("COMPARE_FLAGS=--arms real", "compare")])
def test_make_repeats_what_other_settings_change_and_no_more(made, setting, first):
    assert made(setting) == list(SCRIPTS)[list(SCRIPTS).index(first):]
    assert made(setting) == []


def test_make_repeats_what_a_changed_or_lost_file_changes_and_no_more(made, tree):
    names = [*SCRIPTS, "common"]
    for k, name in enumerate(names):
        time.sleep(0.02)                # a file system's clock is coarse
        (tree / f"{name}.py").touch()
        assert made() == names[k:-1]    # of common.py nothing
    (tree / "runs/glyphs/hybrids.pt").unlink()
    assert made("-j2") == ["hybrids", "cnn", "compare"]
    for _ in range(2):                  # what a person writes beside the review
        time.sleep(0.02)
        (tree / "runs/glyphs/labels.csv").write_text("image,new_label")
        assert made() == list(SCRIPTS)
        assert made() == []
    _, words = commands_printed(tree)[0]
    assert deform.parse_args(words).labels_from == "runs/glyphs/labels.csv"


def start_make(tree, command):
    return subprocess.Popen(command, cwd=tree, env=ENV, text=True, stderr=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, start_new_session=True)


def test_make_keeps_whole_files_whatever_happens_and_a_second_one_in_the_folder_stops(tree):
    assert shell(*stand_in(tree, "exit 1"), cwd=tree).returncode == 2
    whole = tree / "runs/glyphs/deform.pt"
    assert whole.read_text() == "whole\n"
    whole.unlink()
    process = start_make(tree, stand_in(tree, "sleep 60"))
    assert wait_for(whole.exists)
    os.killpg(process.pid, signal.SIGINT)
    assert "Deleting" not in process.communicate(timeout=30)[1]
    assert whole.exists()

    whole.unlink()
    command = stand_in(tree, "sleep 0.5")
    first = start_make(tree, command)
    assert wait_for(whole.exists)
    second = shell(*command, "STEPS=7", cwd=tree)
    assert second.returncode == 2
    assert "another make works in runs/glyphs; wait for it" in second.stderr
    said = first.communicate(timeout=30)[1]
    assert first.returncode == 0, said
    for process in (os.getpid(), 2 ** 22 + 1, ""):      # of another program by now
        (tree / "runs/glyphs/.make").write_text(str(process))
        assert shell(*command, cwd=tree).returncode == 0


def test_make_quick_twice_on_a_small_folder_with_unlabelled_pictures(tree):
    for k, (image, label) in enumerate(zip(*easy(150))):
        where = tree / ("photos/unlabelled" if k >= 110 else f"photos/class{label}")
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(where / f"{k}.png")
    words = ["quick", f"PYTHON={sys.executable}", "DATASET=photos", "IMAGE_SIZE=16"]
    first = make(tree, *words)
    assert [name for name in SCRIPTS if f" {name}.py " in first] == list(SCRIPTS)
    assert "10 images: hybrids change accuracy by " in first
    assert ".py" not in make(tree, *words)
    out = tree / "runs/quick"
    files = {file.name for file in out.iterdir()}
    assert {f"{name}.{end}" for name in STEPS for end in ("pt", "json", "png")} <= files
    assert {"latent.csv", "review.csv", "compare.json", "compare.csv", "summary.png"} <= files
    assert not unfinished(out)
    assert facts_of(out, "compare")["recipes"]["10"]["unlabelled"]
    assert len(list((tree / "photos").rglob("*.png"))) == 150


# ---- the pages ------------------------------------------------------------------------------

PAGES = ["README.md", "assets/METHOD.md", "assets/EVIDENCE.md", "assets/PARTS.md"]
PAGE = {name: (HERE / name).read_text(encoding="utf-8") for name in PAGES}
SNIPPETS = [snippet for text in PAGE.values()
            for snippet in re.findall(r"```python\n(.*?)```", text, re.S)]
TABLES = {(name, table) for name in PAGES
          for table in re.findall(r"<!-- table (.*) -->", PAGE[name])}


@pytest.mark.parametrize("place", range(len(SNIPPETS)))
def test_a_snippet_of_the_pages_runs_beside_a_finished_chain(chain, tmp_path, monkeypatch,
                                                             place):
    shutil.copytree(chain, tmp_path / "runs" / "glyphs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    exec(compile(SNIPPETS[place], f"snippet {place}", "exec"), {})


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A copy of the pages and of the result files that their tables are made of."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "assets").mkdir()
    shutil.copy(HERE / "README.md", tmp_path)
    for file in (HERE / "assets").iterdir():
        if file.suffix in (".json", ".md", ".py"):
            shutil.copy(file, tmp_path / "assets")
    return tmp_path


def evidence_in(folder):
    """assets/evidence.py of a copy of the project, as a module."""
    spec = importlib.util.spec_from_file_location("evidence", folder / "assets/evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differing(pages, capsys):
    """The tables that `evidence.py --check` names."""
    code = evidence_in(pages).main(["--check"])
    lines = capsys.readouterr().out.splitlines()
    assert code == bool(lines)
    return {tuple(line.split(" differs")[0].split(": table ")) for line in lines}


def test_the_tables_of_the_pages_are_those_of_their_result_files(pages, capsys):
    assert {table for _, table in TABLES} == set(evidence_in(pages).TABLES)
    assert differing(pages, capsys) == set()


@pytest.mark.parametrize("stem", sorted(file.stem for file in HERE.glob("assets/*.json")))
def test_a_number_changed_in_a_result_file_is_found(pages, capsys, stem):
    def larger(found):
        number = float(found[0])
        return str(round(1.07 * number, 6) if "." in found[0] else int(1.07 * number))

    file = pages / f"assets/{stem}.json"
    number = r'(?<!"n": )(?<!"seed": )(?<![\w."])(\d+\.\d+|\d{3,})(?![\w."])'
    file.write_text(re.sub(number, larger, file.read_text()))
    assert differing(pages, capsys)


def test_the_commands_and_links_of_the_pages_lead_somewhere(tree):
    for name, text in PAGE.items():
        for link in re.findall(r"\]\((?!http)([^)#\s]+)", text):
            assert ((HERE / name).parent / link).exists()
        for script, words in commands_of(text.split("## Commands")[0]):
            SCRIPTS[script].parse_args([word for word in words if word != "..."])
        for command in re.findall(r"^    (make .*)$", text, re.M):
            make(tree, "-n", "PYTHON=python", *shlex.split(command, comments=True)[1:])
    lines = re.findall(r"`(--dataset [^`]*)`", PAGE["assets/EVIDENCE.md"])
    for line in lines:
        assert compare.parse_args(shlex.split(line)).dataset


# ---- features of a pretrained network -------------------------------------------------------

# Mean colours of 4 x 4 fields; notes.txt says when it ran, 0, and on how many pictures.
NETWORK = """import torch
SIZE = 24
NOTES = open(__file__.replace("net.py", "notes.txt"), "a", buffering=1)
NOTES.write("0\\n")
class Backbone(torch.nn.Module):
    def forward(self, x):
        NOTES.write(f"{len(x)}\\n")
        return torch.linspace(1, 2, 48) * torch.nn.functional.avg_pool2d(x, 6).flatten(1)
"""
CHANGED = NETWORK.replace("(1, 2", "(3, 2")


def notes():
    """How often net.py ran, and how many pictures it has seen."""
    numbers = [int(word) for word in Path("notes.txt").read_text().split()]
    return numbers.count(0), sum(numbers)


def album(root, each=26, loose=0, seed=0):
    """A folder of photographs of two classes and, if any are `loose`, some without a label."""
    images, _ = easy(2 * each + loose, 40, 3, 2, seed)
    for k, image in enumerate(images):
        folder = Path(root, "unlabelled" if k >= 2 * each else ["cat", "dog"][k % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{seed}-{k}.png")


def with_features(path, loose=0, **changes):
    """A data set file that carries features of its own, which tell its classes."""
    arrays = {}
    for part, count in (("train", 200), ("test", 60), ("unlabelled", loose)):
        x = 4 * torch.eye(12)[torch.arange(count) % 3] + noise(count, 12, seed=count)
        arrays[f"f_{part}"] = x.numpy() if count else None
    make = functools.partial(with_loose, count=loose) if loose else npz
    return make(path, **{**arrays, **changes})


@pytest.mark.parametrize("given, width", [(0.05, 0.05), (3.0, 3.0), (1e-4, math.exp(-6))])
def test_the_elbo_of_a_linear_gaussian_model_is_its_log_likelihood(given, width, monkeypatch):
    model = vae.FeatureVAE(9, 5, 3)
    model.axes.copy_(torch.linalg.qr(noise(9, 5))[0])
    w = torch.linalg.qr(noise(5, 3, seed=1))[0] * torch.tensor([2.0, 1.0, 0.5])
    variance = width / (w.square().sum(0) + width)      # of z given x = W z + noise
    model.encoder = torch.nn.Linear(5, 6)
    model.encoder.weight.data = torch.cat([variance[:, None] * w.T / width, torch.zeros(3, 5)])
    model.encoder.bias.data = torch.cat([torch.zeros(3), variance.log()])
    model.decoder = torch.nn.Linear(3, 5, bias=False)
    model.decoder.weight.data = w
    model.log_variance.data.fill_(math.log(given))      # which has a lower bound
    x = noise(4, 9, seed=2).repeat_interleave(6, 0)
    # Six points have those moments of the normal distribution that a square looks at.
    axes = math.sqrt(3) * torch.cat([torch.eye(3), -torch.eye(3)])
    monkeypatch.setattr(torch, "randn", lambda shape, **_: axes.repeat(4, 1))
    reconstruction, kl = model(x)
    marginal = dist.MultivariateNormal(torch.zeros(5), w @ w.T + width * torch.eye(5))
    close(reconstruction + kl, -marginal.log_prob(x @ model.axes).mean(), rtol=1e-4, atol=0)
    z = model.encode(x)[0] + axes.repeat(4, 1) * variance.sqrt()
    nats = -dist.Normal(z @ w.T, math.sqrt(width)).log_prob(x @ model.axes)
    close(reconstruction, nats.sum(1).mean())


@pytest.mark.parametrize("rows, features, times, count", [
    (300, 40, 1, 40), (20, 60, 1, 19), (400, 150, 1, 128), (2, 5, 1, 1), (15, 60, 2, 14),
    (15_000, 6, 2, 6)], ids=str)        # pictures that are there twice
def test_the_directions_are_the_principal_ones_the_widest_first(rows, features, times, count):
    x = noise(rows, features) * torch.linspace(1, 4, features)
    x = x[x[:, 0].argsort()] - x.mean(0)                # in order, as folders are
    model = vae.FeatureVAE.of(x.repeat_interleave(times, 0), 4)
    assert model.config["directions"] == count
    wanted = torch.linalg.svd(x.double(), full_matrices=False)[2][:count]
    cosines = (wanted @ model.axes.double()).abs()
    close(cosines, torch.eye(count).double(), atol=2e-3, rtol=0)
    z = noise(3, 4, seed=1)
    close(model.project(model.decode(z)), model.decoder(z), atol=1e-4, rtol=0)


def test_features_are_of_unit_length_centred_of_mean_square_1_and_in_the_fingerprint(tmp_path):
    x = 3 * noise(6023, 7) * torch.arange(1, 8) + 1
    data = SimpleNamespace(images=None, test_images=None)
    data.features, data.test_features = x[:6003].half(), x[6003:].half()
    rows = torch.arange(6003).flip(0)[:5500]
    inputs = common.Inputs(data, rows)
    units = F.normalize(x.half().float(), dim=1)
    away = units - units[rows].mean(0)
    wanted = away / away[rows].square().mean().sqrt()
    close(inputs[rows], wanted[rows], atol=1e-4, rtol=0)
    close(inputs.test(), wanted[6003:], atol=1e-4, rtol=0)

    file = with_features(tmp_path / "own.npz", 30)
    arrays = np.load(file)
    data = dataset(file, tmp_path / "x")
    parts = [arrays[key] for key in ("f_train", "f_unlabelled", "f_test")]
    kept = np.concatenate([data.features, data.test_features])
    assert (kept == np.concatenate(parts)).all()
    other = with_features(tmp_path / "other.npz", 30, f_test=arrays["f_test"] + 1)
    assert dataset(other, tmp_path / "y").fingerprint != data.fingerprint


def test_the_painter_learns_what_lies_at_points_and_leaves_them_there():
    bright = torch.arange(40) % 2
    z = 2 * torch.eye(4)[bright]
    before = z.clone()
    painter = vae.train_painter(z, evenly(40 + 170 * bright, 3).byte(), seed=3, steps=60)
    assert torch.equal(z, before) and not z.requires_grad
    close(255 * brightness(painter.decode(z[:2])), torch.tensor([40.0, 210]), atol=15, rtol=0)


def test_a_classifier_of_features_is_a_logistic_regression_whose_weights_cost_half_a_square():
    model = cnn.LinearClassifier(6, 3, l2=0.7)
    weight = noise(3, 6)
    model.head.weight.data = weight.clone()
    x = noise(5, 6, seed=2)
    q = noise(5, 3, seed=3).softmax(1)
    row = next(cnn.fit(model, lambda *_: (x, q), steps=1, lr=0.0, generator=seeded()))
    nats = -(q * (x @ weight.T).log_softmax(1)).sum(1).mean()
    cost = 0.7 / 2 * weight.square().sum()
    assert row["loss"] == approx(float(nats + cost), rel=1e-5)
    x = noise(90, 100)
    q = one_hot((x[:, :3] + noise(90, 3, seed=1)).argmax(1), 3)
    model, rows = cnn.train(x, q, steps=800)
    list(rows)
    slope = (cnn.predict(model, x).softmax(1) - q).T @ x / 90 + 0.03 * model.head.weight
    assert slope.abs().mean() < 0.002   # the gradient of loss and cost vanishes


def test_hybrids_of_features_have_density_labels_no_bounds_and_sources_at_their_ends():
    mu, logvar, y = codes(40, 3)
    x = 5 * noise(40, 10, seed=1)
    where = latent.embed(mu, logvar, torch.arange(40), y, 3, mu, x)

    def decode(z):
        return 4 * z @ noise(3, 10, seed=2)

    for strategy in hybrids.STRATEGIES:
        made = hybrids.make(where, x, decode, strategy=strategy, count=50, generator=seeded())
        wanted = where.posterior(made.points.z)
        if strategy == "images":
            wanted = one_hot(y[made.points.i])
        assert torch.equal(made.q, wanted) and len(made.x[0]) == 10
    i, j = torch.randint(40, (2, 60), generator=seeded(1))
    t = torch.rand(60, generator=seeded(3))
    t[:40] = (torch.arange(40) < 20).float()
    decoded = torch.arange(60) % 2 == 0
    points = hybrids.interpolate(where.mu, i, j, t, decoded)
    made = hybrids.render(points, where, x, decode)
    close(made[:40], torch.cat([x[i[:20]], x[j[20:40]]]), atol=1e-4, rtol=0)
    w = t[:, None]
    line = w * x[i] + (1 - w) * x[j]
    straight = w * decode(where.mu[i]) + (1 - w) * decode(where.mu[j])
    bent = line - straight + decode(points.z)
    close(made, torch.where(decoded[:, None], bent, line), atol=1e-4, rtol=0)
    assert made.min() < -5 and made.max() > 5


@pytest.fixture(scope="session")
def studio(tmp_path_factory):
    """Photographs, a backbone's file, and what the scripts make of them in out."""
    root = tmp_path_factory.mktemp("studio")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(vae.train_painter, "__defaults__", (0, False, 20, 64, 3e-3))
        few_hybrids(patch)
        album("photos", loose=16)
        Path("net.py").write_text(NETWORK)
        assert run("vae", "--dataset", "photos", "--backbone", "net.py", "--labels", 12,
                   "--seed", 3, "--steps", 30, "--latent-dim", 4, "-o", "out") == 0
        assert run("latent", "-o", "out") == run("hybrids", "-o", "out") == 0
        assert run("cnn", "-o", "out", "--steps", 60) == 0
        assert notes() == (1, 68)       # no other script has run the file
    return root


@pytest.fixture
def visit(studio, tmp_path, monkeypatch):
    """One's own copy of that, as the current folder."""
    monkeypatch.chdir(shutil.copytree(studio, tmp_path / "studio"))


def oracle(names):
    """What net.py makes of pictures, by hand, in unit length (n,48)."""
    rows = []
    for name in names:
        picture = Image.open(name).resize((24, 24), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        rows.append(torch.linspace(1, 2, 48) * F.avg_pool2d(x, 6).flatten())
    return F.normalize(torch.stack(rows), dim=1)


def test_features_are_made_once_and_kept_in_parts(visit, monkeypatch):
    monkeypatch.setattr(common, "PART", 10)
    counts = [68]

    def features():
        """Those of the data set, and how many pictures the network was shown for them."""
        data = dataset("photos", "new", "--backbone", "net.py")
        counts.append(notes()[1])
        return data, torch.cat([data.features, data.test_features]), counts[-1] - counts[-2]

    def stop(self, done, *_):
        if done == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Progress, "__call__", stop)
        features()
    data, made, shown = features()      # the three parts that were finished are kept
    assert shown == 30 + 38 and len(made) == 68 and made.dtype == torch.half
    close(made.float(), oracle(Path("photos", name) for name in data.names), atol=1e-3, rtol=0)
    assert features()[2] == 0 and not unfinished(Path("new"))

    parts = sorted(Path("new").glob("cache/features-*/*.npz"), key=os.path.getmtime)
    parts[0].write_bytes(parts[0].read_bytes()[:-30])   # a damaged one is made anew
    _, again, shown = features()
    assert shown == 10 and torch.equal(again, made)
    album("photos", each=2, seed=1)                     # new pictures, and only these
    assert features()[2] == 4
    Path("net.py").write_text(CHANGED)
    assert features()[2] == 72


def test_features_are_augmented_by_those_of_mirror_images(visit, monkeypatch, capsys):
    words = ["--sizes", 12, "--arms", "real", "augment"]
    planned = grid_of("--dataset", "photos", "--backbone", "net.py", "-o", "grid", *words)
    calls = note_calls(monkeypatch, cnn, "train")
    unit = compare.Unit(planned, 12, 3)
    rows = [unit.row(arm) for arm in planned.arms]
    assert rows[0]["nll"] != rows[1]["nll"]
    (plain, q, _), (both, both_q, _) = (call.given for call in calls)
    assert torch.equal(both[:12], plain) and torch.equal(both_q, torch.cat([q, q]))
    names = [planned.data.names[row] for row in unit.rows[unit.y >= 0]]
    for name in names:                  # as a person would make them
        ImageOps.mirror(Image.open(Path("photos", name))).save(Path("photos", name))
    inputs = common.Inputs(planned.data, unit.rows)
    mirrored = oracle(Path("photos", name) for name in names)
    close(both[12:], inputs.of(mirrored), atol=0.02, rtol=0)
    own = with_features(Path("own.npz"))
    mistake(capsys, "compare", "--dataset", own, "-o", "own", *words,
            says="not those of mirror images; leave out augment")


def test_a_backbones_file_runs_only_when_it_is_named(visit, undrawn, capsys):
    words = [*STEMS["compare"], "--arms", "real"]
    assert run("compare", "-o", "out", *words) == run("vae", "-o", "out", "--steps", 3) == 0
    album("photos", each=2, seed=1)     # of which no features are kept
    capsys.readouterr()
    assert run("vae", "-o", "out") == 2
    assert "name the network again: --backbone net.py" in capsys.readouterr().err
    assert notes() == (1, 68)


def test_every_hybrid_is_shown_beside_the_two_nearest_photographs(visit, monkeypatch):
    made = read("out/hybrids.pt")
    sheets = []
    monkeypatch.setattr(hybrids, "gallery", lambda *words, **_: sheets.append(words[1:3]))
    data = dataset("photos", "out")
    saved = read("out/latent.pt")
    rows = (made["q"].amax(1) < 0.9).nonzero()[:12, 0]
    few = hybrids.Hybrids(made["features"][rows], made["q"][rows],
                          hybrids.Points(made["z"][rows]))
    hybrids.draw_features(data, few, made["images"][rows], latent.Codes.restore(saved),
                          saved["q"], data.classes)
    (images, shares), = sheets
    photographs = torch.stack([common.square(data.original(row), 96) for row in saved["rows"]])
    for k, z in enumerate(few.points.z):
        assert torch.equal(shares[3 * k], few.q[k])
        distance = (saved["mu"] - z).norm(dim=1)
        for j in (1, 2):
            place, = (photographs == images[3 * k + j]).flatten(1).all(1).nonzero()[:, 0]
            close(distance[place], distance.sort()[0][j - 1], atol=0.02, rtol=0)
            assert torch.equal(shares[3 * k + j], saved["q"][place])


def test_new_photographs_get_their_percentages_where_the_network_is_named(visit, capsys):
    album("more", each=6, seed=7)
    shutil.copy("net.py", "more")       # the same network, elsewhere
    words = ["-o", "out", "--backbone", "more/net.py"]
    assert run("cnn", *words, "--predict", "more") == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    saved = read("out/cnn.pt")
    x = (oracle(line["file"] for line in lines) - saved["mean"]) * saved["scale"]
    q = (x @ saved["model"]["head.weight"].T + saved["model"]["head.bias"]).softmax(1)
    for line, row in zip(lines, q, strict=True):
        assert line["likeliest"] == Path(line["file"]).parent.name      # all are right
        assert [float(line[name]) for name in ("cat", "dog")] == approx(row.tolist(), abs=0.01)

    assert run("latent", *words, "--image", lines[0]["file"]) == 0
    model = vae.restore(read("out/vae.pt"))
    q = latent.restored(read("out/latent.pt")["percentages"])(*model.encode(x[:1]))[0]
    shown = re.search(r"([\d.]+)%  cat", capsys.readouterr().out)[1]
    assert float(shown) == approx(100 * q[0].item(), abs=1)


@pytest.mark.parametrize("few, loose", [("--labels", None), ("--images", 0), ("--labels", 90)])
def test_scripts_on_features_make_what_is_compared(few, loose, visit, undrawn, capsys):
    source = ["--dataset", "photos", "--backbone", "net.py", "--latent-dim", 4]
    out = Path("out")
    if loose is not None:               # features of its own
        source = ["--dataset", with_features(Path("own.npz"), loose)]
        out = Path("own")
        assert run("vae", *source, "-o", out, few, 12, "--seed", 3, "--steps", 30) == 0
        assert run("latent", "-o", out) == run("hybrids", "-o", out) == 0
        assert run("cnn", "-o", out, "--steps", 60) == 0
        capsys.readouterr()
        mistake(capsys, "cnn", "-o", out, "--predict", "photos/cat/0-0.png",
                says="the features came with own; of a new picture there are none")
        mistake(capsys, "vae", *source, "-o", "new", "--backbone", "net.py",
                says="own has features of its own; leave out --backbone")
    assert run("compare", *source, "-o", "grid", "--sizes", 12, "--seeds", 1, "--seed", 3,
               "--steps", 60, "--vae-steps", 30, "--jobs", 1) == 0
    rows = facts_of(Path("grid"), "compare")["rows"]
    spread_to = [row["arm"] for row in rows if row["sources"] > 12]
    wanted = ["real+hybrid", "pseudo-labels", "mixup+pseudo"] if few == "--labels" else []
    assert spread_to == wanted and len(rows) == 2 + max(len(wanted), 1)
    for arm in ("real+hybrid", "real"):
        if arm == "real":
            assert run("cnn", "-o", out, "--steps", 60, "--hybrid-fraction", 0) == 0
        metrics = facts_of(out, "cnn")["metrics"]
        row, = [row for row in rows if row["arm"] == arm]
        assert all(metrics[key] == row[key] for key in ("accuracy", "nll"))
        assert row["accuracy"] > 0.8


def test_work_on_pixels_and_on_several_networks_is_kept_apart(visit, undrawn, capsys):
    words = ["--dataset", npz(Path("grey.npz")), "-o", "other"]
    grid = ["compare", *words, *STEMS["compare"], "--arms", "real"]
    assert run(*grid) == run(*grid, "--backbone", "net.py") == 0
    assert run("deform", *words) == 0   # of the pixels, too: a VAE of features does not mind
    train = [*words, "--backbone", "net.py", "--steps", 3]
    interrupted(Path("other"), "vae", 1, *train)
    Path("net.py").write_text(CHANGED)
    capsys.readouterr()
    assert run("vae", *train, "--resume") == 0
    said = capsys.readouterr().err
    assert re.search(r"vae.last.pt is not resumed \(backbone \w{16}, now \w{16}\)", said)
    assert "the network sees grey pictures in three equal channels" in said
    assert run(*grid, "--backbone", "net.py") == 0
    assert len(list(Path("other/cells").iterdir())) == 3


def test_a_network_by_its_name_with_its_own_preprocessing_and_where_its_file_belongs(
        visit, undrawn, tmp_path, monkeypatch, capsys):
    from torchvision import models
    name = "mobilenet_v3_small"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = models.get_model_weights(name).DEFAULT
    place = tmp_path / "hub" / "checkpoints" / Path(weights.url).name
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)        # no connection
    words = ["vae", "-o", "out", "--backbone", name]
    line = mistake(capsys, *words, remarks=True)
    assert f"{place} is missing" in line and f"put the file of {weights.url} there" in line
    place.write_bytes(b"half of it")
    assert f"{place} is missing or damaged" in mistake(capsys, *words)

    plain = models.mobilenet_v3_small()
    torch.save(plain.state_dict(), place)
    assert run(*words, "--steps", 3) == 0
    data = dataset("photos", "out", "--backbone", name)
    plain.eval().classifier[3] = torch.nn.Identity()
    pictures = [Image.open(Path("photos", name)) for name in data.names[-10:]]
    with torch.no_grad():
        wanted = plain(torch.stack([weights.transforms()(picture) for picture in pictures]))
    close(data.test_features.float(), F.normalize(wanted), atol=1e-3, rtol=0)


HEAD = "import torch\nSIZE = 24\n\n\nclass Backbone(torch.nn.Module):\n"
SEES = HEAD + "    def forward(self, x):\n        return "
WANTED = "; wanted a class Backbone, images (B,3,S,S) -> features (B,F), and SIZE"
BAD = "vae --backbone bad.py"
@pytest.mark.parametrize("text, words, line", [
    # bad.py, or another net.py; a command; its line.
    (None, BAD, "bad.py: FileNotFoundError: "),
    ("SIZE = 24", BAD, "module 'backbone' has no attribute 'Backbone'" + WANTED),
    ("import json\n\njson.loads('[1,')", BAD, "bad.py, line 3: JSONDecodeError: "),
    ("SIZE = 24\nclass Backbone(:\n", BAD, "bad.py, line 2: SyntaxError: "),
    (SEES + "x", BAD, "bad.py makes features (50, 3, 24, 24) of images (50, 3, 24, 24); "),
    (SEES + "x.flatten(1) / 0", BAD, "bad.py makes features that are not finite"),
    (CHANGED, "latent --backbone net.py", "vae.pt is of another network than net.py is now;"),
    (CHANGED, "cnn --backbone net.py --predict photos/cat/0-0.png", "out is of another net"),
    (None, "latent --backbone vgg11", "backbone vgg11: out/vae.pt was made with net.py; make"),
    (None, "latent --image photos/cat/0-0.png", "name the network again: --backbone net.py"),
    (None, "vae --backbone resnt18", "in torchvision.models; did you mean resnet18 or "),
    (None, "deform --backbone net.py", "features do not move: with --backbone begin with vae"),
    (None, "compare --sizes 12 --arms real cutmix deform", "cannot be cut: no cutmix, deform"),
    (None, "hybrids --cut", "features cannot be cut; leave out --cut"),
    (None, "cnn --width 9 --augment", "channels; leave out --augment and --width")])
def test_what_does_not_suit_features_ends_in_one_line(text, words, line, visit, capsys):
    if text:
        Path("net.py" if text == CHANGED else "bad.py").write_text(text)
    assert line in mistake(capsys, *words.split(), "-o", "out")


@pytest.mark.parametrize("arm, soft, words", [
    ("real+hybrid", True, ""),
    ("soft pseudo-labels", True, "--strategy images --label density"),
    ("pseudo-labels", False, "--strategy images"),
    ("mixup+pseudo", False, None)])
def test_labels_spread_to_features_are_as_soft_as_the_labeller_unless_plain(
        arm, soft, words, visit, undrawn, monkeypatch):
    monkeypatch.setattr(latent, "SOFT", 0)              # a labeller that knows too little
    planned = grid_of("--dataset", "photos", "--backbone", "net.py", "-o", "grid", "--sizes",
                      12, "--unlabelled", "--vae-steps", 2)
    unit = compare.Unit(planned, 12, 3)
    given = unit.with_hybrids(compare.ARMS[arm])
    _, q = given["pseudo_labelled"]
    assert torch.equal(q, latent.pseudo_labels(unit.codes, soft)[1])
    if compare.ARMS[arm].strategy == "images":          # the first half of the training, too
        assert (given["made"][1].amax(1) == 1).all() == (not soft)
    if words is not None:               # and so do the scripts
        calls = note_calls(monkeypatch, cnn, "train")
        assert run("latent", "-o", "out") == 0
        assert run("hybrids", "-o", "out", "--count", 9, *words.split()) == 0
        assert run("cnn", "-o", "out", "--steps", 2) == 0
        codes = latent.Codes.restore(read("out/latent.pt"))
        _, q = calls[-1].told["pseudo_labelled"]
        assert torch.equal(q, latent.pseudo_labels(codes, soft)[1])
        if words:
            assert (calls[-1].told["made"][1].amax(1) == 1).all() == (not soft)
