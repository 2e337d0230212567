"""Tests: maths against oracles, what reaches the trainings, every command line and mistake.

    python -m pytest -q test_all.py

In this order: the percentages, hybrids, augmentations, deformations, scores, training, a GPU;
data sets and pictures; the scripts, the comparison, ranks, make, the pages; mistakes, files
and signals. The maths is held against torch.distributions, closed forms and brute force,
never against itself.
"""
import contextlib
import csv
import dataclasses
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
import types
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL import ImageChops
from torch import distributions as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import cnn
import common
import compare
import hybrids
import latent
import vae

HERE = Path(__file__).resolve().parent
REAL_DATA = HERE.parent / "shared" / "data"     # tests that need it skip where it is absent
SCRIPTS = {"vae": vae, "latent": latent, "hybrids": hybrids, "cnn": cnn, "compare": compare}
STEPS = ["vae", "latent", "hybrids", "cnn"]             # of the chain, those that leave a .pt
ANIMALS = ["cat", "dog", "eel"]
VARIABLES = ("DATASET DATA OUT SIZES SEEDS STEPS LABELS LABELS_FROM DEVICE PYTHON "
             "PIP_ARGS").split()


def clean_environment() -> dict:
    """What `make test` itself was told must not reach the processes that the tests start."""
    kept = {}
    for key, value in os.environ.items():
        if key not in (*VARIABLES, "PYTHONPATH", "MFLAGS") and not key.startswith("MAKE"):
            kept[key] = value
    return kept


# Only processors repeat a result exactly: a GPU is for one test, and for `make bench`.
WITH_GPU = {**clean_environment(), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
ENV = {**WITH_GPU, "CUDA_VISIBLE_DEVICES": ""}
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)        # ignored in the background
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


RGB = easy(200, channels=3)[0].numpy()
GREY = RGB[:, :1]


def zoo(root, grey=False, per_class=9):
    """Two classes of pictures, each of one colour; of many sizes, modes and formats."""
    for name, level in (("bird", 60), ("fish", 200)):
        (root / name).mkdir(parents=True)
        (root / name / "notes.txt").write_text("not a picture")
        for k in range(per_class):
            size = (20 + 7 * k, 90 - 5 * k)
            if grey:
                modes = (Image.new("L", size, level), Image.new("LA", size, (level, 255)),
                         Image.new("RGB", size, (level, level, level)))
                modes[k % 3].save(root / name / f"{k}.png")
            else:
                colour = Image.new("RGB", size, (level, 0, 255 - level))
                kind = "png" if k % 3 else "jpg"
                colour.convert(("RGB", "P", "RGBA")[k % 3]).save(root / name / f"{k}.{kind}")
    return root


def run(script, *words):
    """A script's main, in this process -> its exit code."""
    return SCRIPTS[script].main([str(word) for word in (*words, "--threads", 1, "--quiet")])


def mistake(capsys, script, *words):
    """The one line that a mistake ends in."""
    assert run(script, *words) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}.py: ")
    return line


def shell(*words, cwd=HERE, **env):
    return subprocess.run([str(word) for word in words], cwd=cwd, env={**ENV, **env},
                          text=True, capture_output=True)


def dataset(spec, out, *words):
    """A data set as the scripts load it."""
    args = vae.parse_args(["--dataset", str(spec), "-o", str(out), "--quiet", "--threads", "1",
                           *map(str, words)])
    started = common.start(args)
    started.release()
    return common.load_dataset(started)


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def unfinished(folder):
    return [file for file in folder.rglob("*") if ".tmp" in file.name]


TRUE_FIT = vae.Deformations.fit


def deformations(strength=0.5, mirror=False, height=16, width=16):
    """Some that move every part of an image, as if they had been learned."""
    directions = 0.1 * noise(56, 3)
    nll = [0.7, 0.65, 0.6, 0.64, 0.68, 0.5]
    return vae.Deformations(directions, height, width, strength, mirror, nll)


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
        if len(images) > 50:
            return not_at_all(images, y, generator)
        return TRUE_FIT(images, y, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae.Deformations, "fit", fit)
        yield


@pytest.fixture(scope="session")
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


# The flags with which each script is done in seconds.
STEMS = {"vae": ["--steps", 3, "--latent-dim", 4], "latent": [], "hybrids": ["--count", 90],
         "cnn": ["--steps", 3, "--width", 8],
         "compare": ["--sizes", 12, "--seeds", 1, "--steps", 3, "--vae-steps", 3, "--jobs", 1]}
GRID = ["compare", "--sizes", 12, 30, "--seeds", 2, "--steps", 8, "--vae-steps", 8,
        "--width", 4, "--latent-dim", 4, "--arms", "real", "real+hybrid"]


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """A folder with a finished comparison."""
    out = tmp_path_factory.mktemp("grid")
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


def torchrun(ranks, script, *words, **env):
    """-> the process; its ranks see one processor thread each."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             f"--nproc-per-node={ranks}", str(script), *map(str, words)],
                            env={**ENV, **env}, cwd=HERE, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


# ---- what many of these tests are made of ---------------------------------------------------

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

KINDS = (latent.Aggregate, latent.Gaussian)


def true_density(mu, logvar, y, z, bandwidth=1.0, own=0.0, without=-1):
    """log p(z|c) (K,) of one point, in float64, straight from the definition."""
    mu = mu.double()
    dim = mu.shape[1]
    classes = y.unique()
    within = torch.zeros(dim)
    for c in classes:
        own_codes = mu[y == c]
        within = within + (own_codes - own_codes.mean(0)).square().sum(0)
    total = mu.var(0, unbiased=False)
    spread = ((within + total) / (len(y) - len(classes) + 1)).sqrt()
    columns = []
    for c in classes:
        count = int((y == c).sum())
        h = bandwidth * spread * count ** (-1 / (dim + 4))
        kept = (y == c) & (torch.arange(len(y)) != without)
        width = (logvar[kept].double().exp() + h ** 2 + own).sqrt()
        normals = dist.Independent(dist.Normal(mu[kept], width), 1)
        weights = dist.Categorical(torch.ones(len(width)))
        columns.append(dist.MixtureSameFamily(weights, normals).log_prob(z.double()))
    return torch.stack(columns)


def nearly(found, true):
    """float32 found by cancelling large numbers, and the float64 that it should be."""
    close(found, true, atol=2e-3, rtol=1e-4, check_dtype=False)


@pytest.mark.parametrize("dim", [1, 2, 16, 64])
@pytest.mark.parametrize("bandwidth", [0.0, 0.7])
def test_the_aggregate_of_points_is_a_mixture_of_normals(dim, bandwidth):
    known = codes(60, dim)
    z, _, _ = codes(20, dim, seed=1)
    posterior = latent.Aggregate.fit(*known, 3, bandwidth)
    true = torch.stack([true_density(*known, point, bandwidth) for point in z])
    nearly(posterior.log_density(z), true)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 64])
def test_the_aggregate_of_images_adds_their_own_variance(dim):
    known = codes(60, dim)
    z, logvar, _ = codes(20, dim, seed=1)
    posterior = latent.Aggregate.fit(*known, 3)
    found = posterior.log_density(z, logvar)
    for log_density, point, width in zip(found, z, logvar):
        own = width.double().exp()
        nearly(log_density, true_density(*known, point, own=own))


def test_leaving_a_code_out_takes_it_from_its_class():
    mu, logvar, y = codes(60, 2)
    posterior = latent.Aggregate.fit(mu, logvar, y, 3)
    order = y.argsort(stable=True)
    rows = order[latent.subsample(60, 25)]
    found, own = posterior.leave_one_out(limit=25)
    for log_density, i in zip(found, rows):
        nearly(log_density, true_density(mu, logvar, y, mu[i], without=i))
    assert torch.equal(own, y[rows])


def test_leaving_an_image_out_integrates_its_own_width():
    mu, logvar, y = codes(60, 2)
    posterior = latent.Aggregate.fit(mu, logvar, y, 3)
    order = y.argsort(stable=True)
    found, _ = posterior.leave_one_out(logvar[order])
    for log_density, i in zip(found, order):
        own = logvar[i].double().exp()
        nearly(log_density, true_density(mu, logvar, y, mu[i], own=own, without=i))


@pytest.mark.parametrize("kind", KINDS)
def test_percentages_obey_the_rule_of_bayes(kind):
    mu, logvar, y = codes(60, 2)
    z, _, _ = codes(20, 2, seed=1)
    posterior = kind.fit(mu, logvar, y, 3)
    posterior.log_floor = -4.0
    posterior.temperature = 2.5
    density = posterior.log_density(z).exp() + math.exp(-4)
    q = y.bincount() / 60 * density ** (1 / 2.5)
    close(posterior(z), q / q.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", KINDS)
def test_percentages_of_images_have_a_floor_of_their_own(kind):
    mu, logvar, y = codes(60, 2)
    z, own, _ = codes(20, 2, seed=1)
    posterior = kind.fit(mu, logvar, y, 3)
    posterior.image_floor = -4.0
    density = posterior.log_density(z, own).exp() + math.exp(-4)
    q = y.bincount() / 60 * density
    close(posterior(z, own), q / q.sum(1, keepdim=True))


def test_without_a_floor_of_their_own_images_have_that_of_points():
    assert latent.Posterior(torch.ones(1), log_floor=-7.0).image_floor == -7.0


@pytest.mark.parametrize("dim", [1, 2, 64])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_gaussian_is_a_normal_of_shrunk_covariance(dim, shrinkage):
    mu, logvar, y = codes(300, dim)
    points, _, _ = codes(3, dim, seed=1)
    posterior = latent.Gaussian.fit(mu, logvar, y, 3, shrinkage, ridge=0.01)
    scatter = []
    for c in range(3):
        away = (mu[y == c] - mu[y == c].mean(0)).double()
        width = logvar[y == c].double().exp()
        scatter.append(away.T @ away + width.sum(0).diag())
    for c in range(3):
        count = (1 - shrinkage) * int((y == c).sum()) + shrinkage * 300
        mixed = ((1 - shrinkage) * scatter[c] + shrinkage * sum(scatter)) / count
        jitter = 0.01 * mixed.trace() / dim + 1e-6
        covariance = 0.99 * mixed + jitter * torch.eye(dim)
        normal = dist.MultivariateNormal(mu[y == c].double().mean(0), covariance)
        nearly(posterior.log_density(points)[:, c], normal.log_prob(points.double()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_integral_over_an_image_is_its_monte_carlo_mean(kind):
    posterior = kind.fit(*codes(50, 2), 3)
    z = torch.tensor([[0.3, -0.5], [1.5, 1.0]])
    logvar = torch.tensor([[-1.0, 0.2], [-2.0, -0.5]])
    draws = z + noise(40_000, 2, 2) * (logvar / 2).exp()
    density = posterior.log_density(draws.flatten(0, 1)).exp()
    mean = density.view(40_000, 2, 3).mean(0)
    close(posterior.log_density(z, logvar).exp(), mean, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("dim, temperature", [(1, 1.0), (5, 1.0), (1, 3.0)])
def test_between_two_normals_the_percentage_is_a_sigmoid(dim, temperature):
    a = torch.full((dim,), 0.8)
    logvar = torch.full((2, dim), -0.5)
    mu = torch.stack([-a, a])
    posterior = latent.Aggregate.fit(mu, logvar, torch.arange(2), 2, bandwidth=0.0)
    posterior.log_floor = -math.inf
    posterior.temperature = temperature
    z = noise(20, dim)
    log_odds = 2 * (z @ a) / math.exp(-0.5)
    close(posterior(z)[:, 1], torch.sigmoid(log_odds / temperature))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 16, 64])
@pytest.mark.parametrize("deviations", [10, 100, 1e4])
def test_far_from_all_codes_the_priors_are_left(kind, dim, deviations):
    mu, logvar, y = codes(300, dim)
    posterior = kind.fit(mu, logvar, y, 3)
    direction = noise(8, dim).sign()
    far = mu.mean(0) + deviations * direction * mu.std(0)
    prior = (y.bincount() / 300).expand(8, 3)
    close(posterior(far), prior, atol=1e-4, rtol=0)


def test_far_from_zero_the_density_is_as_exact():
    mu, logvar, y = codes(60, 2)
    far = mu + 1000
    posterior = latent.Aggregate.fit(far, logvar, y, 3)
    for log_density, point in zip(posterior.log_density(far), far):
        nearly(log_density, true_density(far, logvar, y, point))


def test_the_widest_and_the_narrowest_images_have_a_density():
    known = codes(60, 24)
    posterior = latent.Aggregate.fit(*known, 3)
    for logvar in (-10.0, 10.0):        # as far as an encoder goes
        z = known[0][:5]
        found = posterior.log_density(z, torch.full((5, 24), logvar))
        for log_density, point in zip(found, z):
            nearly(log_density, true_density(*known, point, own=math.exp(logvar)))


def test_unless_told_otherwise_covariances_are_shrunk_by_a_tenth():
    known = codes(60, 2)
    found = latent.Gaussian.fit(*known, 3)
    true = latent.Gaussian.fit(*known, 3, shrinkage=0.1, ridge=0.01)
    assert torch.equal(found.covariance, true.covariance)


def test_a_class_without_codes_does_not_need_shrinkage():
    mu, logvar, y = codes(60, 2)
    posterior = latent.Gaussian.fit(mu, logvar, y, 4, shrinkage=0.0)
    assert posterior(mu).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_without_codes_has_no_percentage(kind):
    mu, logvar, y = codes(60, 2)
    three = kind.fit(mu, logvar, y, 3)
    four = kind.fit(mu, logvar, y, 4)
    close(four(mu, logvar)[:, :3], three(mu, logvar))
    assert (four(mu)[:, 3] == 0).all()


@pytest.mark.parametrize("of", ["points", "images", "points without themselves"])
def test_many_points_have_the_densities_that_each_has_alone(of):
    count = 2 ** 22                     # so many codes that four points are taken at a time
    mu = torch.linspace(-3, 3, count)[:, None]
    mu[-9:, 0] = torch.arange(9.0) - 4  # a second class, so few that each of them counts
    variance = torch.full((count, 1), 0.1)
    prior = torch.tensor([0.5, 0.5])
    posterior = latent.Aggregate(mu, variance, [count - 9, 9], prior)
    z = torch.tensor([-1.0, 0.0, 3.0, 2.0, 3.1])[:, None]
    more = {}
    if of == "images":
        more["logvar"] = torch.tensor([0.0, -1.0, -2.0, 1.0, -9.0])[:, None]
    if of == "points without themselves":
        more["without"] = torch.tensor([3, 5, count - 9, 8, count - 1])
    together = posterior.log_density(z, **more)
    for i in range(5):
        own = {name: value[[i]] for name, value in more.items()}
        close(together[[i]], posterior.log_density(z[[i]], **own))


def test_many_images_have_the_gaussian_densities_that_each_has_alone():
    mu, logvar, y = codes(200, 64, 10)
    posterior = latent.Gaussian.fit(mu, logvar, y, 10)
    z, own, _ = codes(300, 64, seed=1)          # 204 of them are taken at a time
    together = posterior.log_density(z, own)
    for i in (0, 203, 204, 299):
        alone = posterior.log_density(z[[i]], own[[i]])
        close(together[[i]], alone, atol=1e-3, rtol=1e-5)


def marginal(posterior, log_density):
    return (log_density + posterior.prior.log()).logsumexp(1)


def test_the_floor_is_a_low_quantile_of_the_densities_of_codes_left_out():
    posterior = latent.Aggregate.fit(*codes(300, 4), 3)
    log_density, _ = posterior.leave_one_out()
    quantile = marginal(posterior, log_density).quantile(0.001)
    assert posterior.log_floor == approx(quantile.item())


def test_the_floor_of_images_is_a_low_quantile_of_the_densities_of_images_left_out():
    mu, logvar, y = codes(300, 4)
    posterior = latent.Aggregate.fit(mu, logvar, y, 3)
    log_density, _ = posterior.leave_one_out(logvar[y.argsort(stable=True)])
    quantile = marginal(posterior, log_density).quantile(0.001)
    assert posterior.image_floor == approx(quantile.item())


def test_the_floors_of_a_gaussian_are_quantiles_as_well():
    mu, logvar, y = codes(300, 4)
    posterior = latent.Gaussian.fit(mu, logvar, y, 3)
    of_points = marginal(posterior, posterior.log_density(mu))
    of_images = marginal(posterior, posterior.log_density(mu, logvar))
    assert posterior.log_floor == approx(of_points.quantile(0.001).item())
    assert posterior.image_floor == approx(of_images.quantile(0.001).item())


def test_a_single_code_sets_no_floor():
    zero = torch.zeros(1, 2)
    alone = latent.Aggregate.fit(zero, zero, torch.tensor([0]), 1)
    assert alone.log_floor == -math.inf


def partly_unused(dim, count, seed):
    """Codes of two classes that overlap in the first dimension; the others are N(0, 1)."""
    y = torch.arange(count) % 2
    mu = torch.zeros(count, dim)
    mu[:, 0] = 2.0 * y - 1 + noise(count, seed=seed)
    logvar = torch.zeros(count, dim)
    logvar[:, 0] = -4.0
    return mu, logvar, y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 16, 64, 512])
def test_unused_dimensions_do_not_drown_the_percentages_of_images(kind, dim):
    posterior = kind.fit(*partly_unused(dim, 40, 0), 2)
    mu, logvar, y = partly_unused(dim, 40, 1)
    images = common.scores(posterior(mu, logvar), y)
    points = common.scores(posterior(mu), y)
    assert images["nll"] < min(0.55, points["nll"] + 0.02)


def test_teaching_takes_the_lowest_hundredth_as_the_floor():
    posterior = latent.teach(*codes(300, 4), 3)
    log_density, _ = posterior.leave_one_out()
    quantile = marginal(posterior, log_density).quantile(0.01)
    assert posterior.log_floor == approx(quantile.item())


def test_teaching_takes_the_bandwidth_asked_for():
    known = codes(60, 2)
    posterior = latent.teach(*known, 3, bandwidth=0.3)
    close(posterior.variance, latent.Aggregate.fit(*known, 3, 0.3).variance)
    close(latent.teach(*known, 3).variance, latent.Aggregate.fit(*known, 3, 1.0).variance)


def test_teaching_is_as_soft_as_its_accuracy_above_guessing():
    posterior = latent.teach(*codes(300, 1), 3)
    log_density, own = posterior.leave_one_out()
    density = log_density.exp() + math.exp(posterior.log_floor)
    right = (posterior.prior * density).argmax(1) == own
    guess = posterior.prior.max()
    skill = (right.float().mean() - guess) / (1 - guess)
    assert 0.1 < skill < 0.9
    assert posterior.temperature == approx(1 / skill.item(), rel=1e-4)


def test_classes_that_never_overlap_are_taught_without_softening():
    y = torch.arange(60) % 3
    mu = 100 * F.one_hot(y).float()
    posterior = latent.teach(mu, torch.zeros(60, 3), y, 3)
    assert posterior.temperature == approx(1)


def test_codes_that_say_nothing_teach_nearly_the_priors():
    _, _, y = codes(300, 2)
    same_code = torch.zeros(300, 2)
    posterior = latent.teach(same_code, same_code, y, 3)
    assert posterior.temperature == approx(1 / 0.03)


def given_density(mu, logvar):
    """In place of a posterior's own: codes are log-densities."""
    return mu


def drawn_at(temperature):
    """A posterior of given densities, these, and labels drawn at a temperature."""
    log_density = 4 * noise(20_000, 3)
    posterior = latent.Posterior(torch.tensor([0.5, 0.3, 0.2]), temperature=temperature)
    posterior.log_density = given_density
    q = posterior.weigh(log_density, -math.inf)
    y = torch.multinomial(q, 1, generator=seeded())[:, 0]
    return posterior, log_density, y


@pytest.mark.parametrize("true", [0.5, 4.0, 20.0])
def test_best_temperature_is_the_true_one(true):
    posterior, log_density, y = drawn_at(true)
    temperature, nll = latent.best_temperature(posterior, log_density, None, y)
    assert temperature == approx(true, rel=0.13)
    posterior.temperature = temperature
    q = posterior.weigh(log_density, -math.inf)
    assert nll == approx(common.scores(q, y)["nll"], rel=1e-4)


@pytest.mark.parametrize("true, bound", [(0.01, 1 / 4), (1000, 64)])
def test_best_temperature_stays_within_its_bounds(true, bound):
    posterior, log_density, y = drawn_at(true)
    temperature, _ = latent.best_temperature(posterior, log_density, None, y)
    assert temperature == approx(bound)


def test_an_image_of_a_class_without_codes_costs_thirty_nats():
    posterior, log_density, y = drawn_at(1.0)
    log_density[:, 1] = -math.inf
    y[:] = 1
    _, nll = latent.best_temperature(posterior, log_density, None, y)
    assert nll == approx(30)


def test_best_temperature_sets_nothing():
    posterior, log_density, y = drawn_at(4.0)
    posterior.temperature = 7.0
    latent.best_temperature(posterior, log_density, None, y)
    assert posterior.temperature == 7.0


def test_the_temperature_is_fitted_above_the_floor_of_images():
    posterior, log_density, y = drawn_at(1.0)
    posterior.image_floor = 50.0        # nothing rises above it: any temperature gives priors
    _, nll = latent.best_temperature(posterior, log_density, None, y)
    of_priors = -posterior.prior.log()[y].mean()
    assert nll == approx(of_priors.item())


def test_calibrating_finds_the_bandwidth_of_the_least_held_out_nll():
    mu, logvar, y = codes(500, 4)
    held_out = (mu[300:], logvar[300:], y[300:])

    def fit(bandwidth):
        return latent.Aggregate.fit(mu[:300], logvar[:300], y[:300], 3, bandwidth)

    tried = []
    for bandwidth in (0.01, 1.0, 20.0):
        temperature, nll = latent.best_temperature(fit(bandwidth), *held_out)
        tried.append((nll, bandwidth, temperature))
    _, bandwidth, temperature = min(tried)
    posterior, choice = latent.calibrate(fit, (0.01, 1.0, 20.0), *held_out)
    assert choice == bandwidth == 1
    assert posterior.temperature == temperature
    close(posterior.variance, fit(1.0).variance)


def test_calibrating_chooses_by_a_few_images_and_fits_the_temperature_to_all():
    asked = []

    def log_density_of(mu, logvar):
        asked.append(len(mu))
        return mu

    def fit(choice):
        posterior, _, _ = drawn_at(4.0)
        posterior.log_density = log_density_of
        return posterior

    _, log_density, y = drawn_at(4.0)
    codes_of = (log_density, log_density, y)
    posterior, _ = latent.calibrate(fit, (1, 2), *codes_of, limit=50)
    assert asked == [50, 50, 20_000]
    assert posterior.temperature == approx(4, rel=0.13)


def test_words_name_the_likeliest_classes_the_likeliest_last():
    assert latent.words([0.2, 0.001, 0.799], ANIMALS) == "20% cat + 80% eel"
    assert latent.words([0.004, 0.0, 0.996], ANIMALS) == "100% eel"
    assert latent.words([0.006, 0.0, 0.994], ANIMALS) == "1% cat + 99% eel"
    assert latent.words([0.2, 0.3, 0.5], ANIMALS, most=3) == "20% cat + 30% dog + 50% eel"


def test_a_subsample_is_sorted_random_and_always_the_same():
    rows = latent.subsample(1000, 100)
    assert torch.equal(rows, latent.subsample(1000, 100))
    assert torch.equal(rows, rows.unique()) and len(rows) == 100
    assert rows.float().mean() == approx(500, abs=90)
    assert torch.equal(latent.subsample(5, 100), torch.arange(5))


# ---- labels spread to images without one ----------------------------------------------------

def two_moons():
    """Codes of two half circles that reach into each other (400,2), their labels."""
    turns = torch.linspace(0, math.pi, 200)
    moon = torch.stack([turns.cos(), turns.sin()], 1)
    mu = torch.cat([moon, torch.tensor([1.0, 0.4]) - moon])
    mu += 0.05 * noise(400, 2)
    y = torch.arange(2).repeat_interleave(200)
    first = torch.tensor([0, 100, 200, 300])
    order = torch.cat([first, torch.randperm(400, generator=seeded())])
    return mu[order], y[order]


def test_labels_are_spread_along_the_clusters_and_not_across():
    mu, y = two_moons()
    found = latent.spread_labels(mu, y[:4], 2)
    assert found.dtype == torch.long
    assert (found == y).float().mean() > 0.98
    nearest = torch.cdist(mu, mu[:4]).argmin(1)
    assert (y[nearest] == y).float().mean() < 0.9       # the nearest label would not do


def shuffled_neighbours(near):
    """Squared distances that turn the order of all 30 codes about."""
    return near.float() + 1


def graph_by_hand(mu, share, k=4):
    """The weights of `neighbour_graph` (30,30), all pairs at once."""
    square = torch.cdist(mu, mu).square()
    others = shuffled_neighbours(torch.arange(30).expand(30, 30)).clone()
    for distances in (square, others):
        distances.fill_diagonal_(1e9)
        distances /= distances.topk(k, largest=False).values[:, -1:]
    mixed = (1 - share) * square + share * others
    last = mixed.topk(k, largest=False).values[:, -1:]
    weight = (-mixed / last).exp() * (mixed <= last)
    return weight + weight.T


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
def test_the_graph_mixes_distances_of_codes_and_of_images(share):
    mu, _, _ = codes(30, 3)
    graph = latent.neighbour_graph(mu, shuffled_neighbours, share, neighbours=4)
    assert torch.allclose(graph.to_dense(), graph_by_hand(mu, share), atol=1e-6)


def test_without_a_share_images_are_not_looked_at():
    mu, _, _ = codes(30, 3)
    graph = latent.neighbour_graph(mu, None, 0.0, neighbours=4)
    assert torch.allclose(graph.to_dense(), graph_by_hand(mu, 0.0), atol=1e-6)


def test_label_spreading_solves_its_equation():
    mu, _, y = codes(30, 3)
    distance, near = torch.cdist(mu, mu).sort(1)
    weight = (-(distance / distance[:, 4:5]).square()).exp()
    graph = torch.zeros(30, 30)
    graph.scatter_(1, near[:, 1:5], weight[:, 1:5])
    graph = graph + graph.T
    degree = graph.sum(0)
    system = torch.eye(30) - 0.9 * graph / (degree[:, None] * degree).sqrt()
    given = F.one_hot(y, 3).float()
    given[20:] = 0
    solved = torch.linalg.solve(system, given).argmax(1)
    found = latent.spread_labels(mu, y[:20], 3, neighbours=4, alpha=0.9)
    assert torch.equal(found, torch.cat([y[:20], solved[20:]]))


def test_random_labels_of_six_classes_are_not_spread():
    y = torch.arange(60) % 6
    found = latent.spread_labels(noise(300, 4), y, 6)
    assert torch.equal(found[:60], y)
    assert (found[60:] == -1).all()


def test_random_labels_of_two_classes_are_seldom_spread():
    believed = 0                        # half of them are right by chance
    for seed in range(10):
        mu = noise(200, 4, seed=seed)
        found = latent.spread_labels(mu, torch.arange(40) % 2, 2)
        believed += int(found[40:].max() >= 0)
    assert believed <= 1


@pytest.mark.parametrize("agreeing, believed", [
    (17, True),
    (15, False),
    (13, False)])
def test_two_classes_are_spread_if_more_than_three_quarters_agree(agreeing, believed):
    cluster = torch.arange(40) // 2     # twenty clusters of two labels each
    y = cluster % 2
    torn = cluster >= agreeing
    y[torn] = torch.arange(40)[torn] % 2
    mu = 100 * F.one_hot(cluster).float() + 0.1 * noise(40, 20)
    graph = latent.neighbour_graph(mu, neighbours=1)
    assert latent.labels_agree(graph, y, 2) == believed


def test_classes_of_one_label_each_are_not_held_against_the_others():
    centre = 9 * noise(12, 4).repeat(20, 1)
    mu = centre + 0.1 * noise(240, 4, seed=1)
    found = latent.spread_labels(mu, torch.arange(16) % 12, 12)
    assert torch.equal(found, torch.arange(240) % 12)


def test_a_single_label_is_nothing_to_judge_by():
    found = latent.spread_labels(noise(3, 4), torch.tensor([0]), 6)
    assert found.tolist() == [0, -1, -1]


def test_labels_are_spread_among_codes_that_coincide():
    mu = torch.eye(2).repeat(20, 1)     # each code twenty times
    y = torch.arange(40) % 2
    assert torch.equal(latent.spread_labels(mu, y[:8], 2), y)


def test_no_label_reaches_an_island():
    mu = 0.1 * noise(90, 2)
    mu[30:60] += 5
    mu[60:] += 50
    known = torch.tensor([0, 1, 31, 32])
    mu = torch.cat([mu[known], mu])
    found = latent.spread_labels(mu, torch.tensor([0, 0, 1, 1]), 2)[4:]
    assert (found[:30] == 0).all()
    assert (found[30:60] == 1).all()
    assert (found[60:] == -1).all()


# ---- where hybrids are made and what they are labelled --------------------------------------

def known_codes(classes=3):
    """Codes (90,2) of three classes and their posterior, of temperature 2."""
    mu, logvar, y = codes(90, 2, classes)
    posterior = latent.Aggregate.fit(mu, logvar, y, classes)
    posterior.temperature = 2.0
    return latent.Codes(mu, logvar, y, posterior)


def points_between(count=200, strategy="between"):
    known = known_codes()
    return known, hybrids.sample(strategy, count, known, seeded())


@pytest.mark.parametrize("strategy", hybrids.STRATEGIES)
def test_a_seed_draws_the_same_points(strategy):
    _, points = points_between(50, strategy)
    _, again = points_between(50, strategy)
    assert points.z.shape == (50, 2)
    assert torch.equal(points.z, again.z)


def test_points_of_the_prior_are_standard_normal():
    _, points = points_between(4000, "prior")
    assert points.i is None
    assert points.z.mean(0).abs().max() < 0.06
    assert (points.z.var(0) - 1).abs().max() < 0.1


def test_points_around_codes_have_the_width_of_their_image():
    known, points = points_between(4000, "around")
    width = (known.logvar[points.i] / 2).exp()
    white = (points.z - known.mu[points.i]) / width
    assert white.mean(0).abs().max() < 0.06
    assert (white.var(0) - 1).abs().max() < 0.1
    assert torch.equal(points.i, points.j)
    assert (points.t == 1).all()


def test_points_lie_on_the_line_of_their_two_codes():
    known, points = points_between(4000)
    t = points.t[:, None]
    first = known.mu[points.i]
    second = known.mu[points.j]
    close(points.z, t * first + (1 - t) * second)
    assert 0 <= points.t.min() and points.t.max() <= 1


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_so_many_pairs_are_of_one_class(share):
    known = known_codes()
    points = hybrids.sample("between", 2000, known, seeded(), same=share)
    alike = known.y[points.i] == known.y[points.j]
    assert part_of(alike) == approx(share, abs=0.03 * (0 < share < 1))


def test_unless_told_otherwise_three_tenths_of_the_pairs_are_of_one_class():
    known, points = points_between(2000)
    told = hybrids.sample("between", 2000, known, seeded(), same=0.3)
    assert torch.equal(points.j, told.j)


@pytest.mark.parametrize("count, most, lines", [(50, 2000, 50), (60, 60, 60), (150, 60, 60)])
def test_there_are_so_many_lines_all_over_the_points(count, most, lines):
    points = hybrids.sample("between", count, known_codes(), seeded(), lines=most)
    pairs = torch.stack([points.i, points.j], 1)
    assert torch.equal(pairs, pairs[:lines].repeat(3, 1)[:count])
    assert len(points.t.unique()) > 0.99 * count        # each with a weight of its own


def test_unless_told_otherwise_each_point_has_a_line_of_its_own():
    _, points = points_between(4500)
    pairs = torch.stack([points.i, points.j], 1)
    assert not torch.equal(pairs[:2000], pairs[2000:4000])
    assert len(pairs.unique(dim=0)) > 2500


@pytest.mark.parametrize("strength, channels, limit", [(0.5, 1, 2000), (0.0, 1, None),
                                                       (0.5, 3, None)])
def test_the_lines_of_a_comparison_are_limited_where_they_are_registered(
        monkeypatch, strength, channels, limit):
    told = []
    plain = hybrids.sample

    def noted(*arguments, lines=None):
        told.append(lines)
        return plain(*arguments, lines=lines)

    monkeypatch.setattr(hybrids, "sample", noted)
    known = known_codes()
    images = torch.zeros(len(known.y), channels, 16, 16, dtype=torch.uint8)
    model = vae.VAE(channels, 16, 16, latent_dim=2, hidden=4, units=8).eval()
    source = compare.Source(images, known, model, False)
    source.pool(compare.ARMS["real+hybrid"], 12, deformations(strength), 0)
    assert told == [limit]


def test_weights_are_those_of_a_beta_of_four():
    _, points = points_between(4000)
    assert points.t.mean() == approx(0.5, abs=0.01)
    assert points.t.var() == approx(1 / 36, rel=0.1)


@pytest.mark.parametrize("strategy", ["between", "around"])
def test_every_code_is_as_often_the_first_of_a_pair(strategy):
    often = 0
    for seed in range(5):               # of more points the pairs repeat
        points = hybrids.sample(strategy, 1800, known_codes(), seeded(seed))
        often = often + points.i.bincount(minlength=90)
    assert (often - 100).abs().max() < 45


@pytest.mark.parametrize("same_class", [True, False])
def test_partners_are_all_those_allowed_and_no_other(same_class):
    y = torch.tensor([2, 0, 1, 1, 0, 1, 2])
    i = torch.arange(7).repeat(500)
    j = hybrids.partners(y, i, float(same_class), seeded())
    allowed = set()
    for a, b in itertools.product(range(7), range(7)):
        if (y[a] == y[b]) == same_class:
            allowed.add((a, b))
    assert set(zip(i.tolist(), j.tolist())) == allowed


def test_partners_are_drawn_evenly():
    y = torch.tensor([2, 0, 1, 1, 0, 1, 2])
    i = torch.zeros(8000).long()
    j = hybrids.partners(y, i, 0, seeded())
    often = j.bincount(minlength=7)
    assert often[0] == often[6] == 0    # the first row and its classmate
    assert (often[1:6] - 1600).abs().max() < 150


def test_an_only_class_has_partners_in_itself():
    y = torch.zeros(5).long()
    j = hybrids.partners(y, torch.arange(5), 0, seeded())
    assert j.min() >= 0 and j.max() < 5


def test_a_weight_label_is_the_share_of_each_source():
    known, points = points_between()
    q = hybrids.label("weight", points, known)
    for k in range(200):
        true = torch.zeros(3)
        true[known.y[points.i[k]]] += points.t[k]
        true[known.y[points.j[k]]] += 1 - points.t[k]
        close(q[k], true)


def test_a_product_label_is_the_weight_times_the_evidence():
    known, points = points_between()
    posterior = known.posterior
    density = posterior.log_density(points.z).exp() + math.exp(posterior.log_floor)
    evidence = density.sqrt()           # its temperature is 2
    doubt = (0.4 * points.t * (1 - points.t))[:, None]
    weight = hybrids.label("weight", points, known)
    product = ((1 - doubt) * weight + doubt * posterior.prior) * evidence
    true = product / product.sum(1, keepdim=True)
    close(hybrids.label("product", points, known), true, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("rule", hybrids.LABELS)
def test_labels_have_a_column_for_every_class(rule):
    mu, logvar, y = codes(60, 2)
    posterior = latent.Aggregate.fit(mu, logvar, y, 5)      # two classes have no codes
    known = latent.Codes(mu, logvar, y, posterior)
    points = hybrids.sample("between", 20, known, seeded())
    q = hybrids.label(rule, points, known)
    assert q.shape == (20, 5)
    assert (q[:, 3:] == 0).all()


@pytest.mark.parametrize("t, end", [(0.0, "j"), (1.0, "i")])
def test_at_both_ends_a_product_label_is_exactly_that_of_the_source(t, end):
    known, points = points_between()
    source = getattr(points, end)
    there = points._replace(t=torch.full((200,), t), z=known.mu[source])
    q = hybrids.label("product", there, known)
    assert torch.equal(q, F.one_hot(known.y[source], 3).float())


class Mistaken:
    """A posterior that is sure of the last class everywhere."""
    prior = torch.full((3,), 1 / 3)

    def __call__(self, z):
        return torch.tensor([0.0, 0.0, 1.0]).expand(len(z), 3)


def test_a_product_label_survives_a_density_that_contradicts_it():
    known, points = points_between()
    known = known._replace(posterior=Mistaken())
    there, source = at_an_end(known, points, "i")
    q = hybrids.label("product", there, known)
    assert torch.equal(q, F.one_hot(known.y[source], 3).float())


def test_a_density_label_is_the_posterior():
    known, points = points_between()
    q = hybrids.label("density", points, known)
    assert torch.equal(q, known.posterior(points.z))


@pytest.mark.parametrize("rule", ["weight", "product"])
def test_points_of_the_prior_have_no_mixing_weights(rule):
    known, points = points_between(5, "prior")
    with pytest.raises(ValueError, match="label them by density"):
        hybrids.label(rule, points, known)


def test_a_rule_that_is_not_there_is_refused_with_those_that_are():
    known, points = points_between(5)
    with pytest.raises(ValueError, match="no rule 'sum'; there are product, density"):
        hybrids.label("sum", points, known)


def test_entropy_is_in_nats():
    assert hybrids.entropy(torch.tensor([[0.0, 1.0]])) == 0
    fourths = torch.full((1, 4), 0.25)
    assert hybrids.entropy(fourths).item() == approx(math.log(4))


# ---- how hybrids are made of images ---------------------------------------------------------

def decoder(channels=1):
    """z (n,2) -> images (n,channels,16,16) that depend on every number of z."""
    weights = noise(2, channels * 256)

    def decode(z):
        return (z @ weights).sigmoid().view(-1, channels, 16, 16)

    return decode


def colours():
    """(90,3,16,16) in [0,1]."""
    grey = easy(90)[0] / 255
    return torch.cat([grey, grey.flip(2), 1 - grey], 1)


def rendered(points, known, images, **how):
    """`render` with a decoder for these images, in parts that are smaller than all."""
    how = {"generator": seeded(), "batch": 7, **how}
    return hybrids.render(points, known, images, decoder(images.shape[1]), **how)


def at_an_end(known, points, end):
    source = getattr(points, end)
    t = torch.full((len(source),), float(end == "i"))
    return points._replace(t=t, z=known.mu[source]), source


def mixed(points, images, w):
    """w x_i + (1 - w) x_j."""
    return w * images[points.i] + (1 - w) * images[points.j]


def by_definition(known, points, images, decode, w):
    """decode(z) + w r_i + (1 - w) r_j, where r = x - decode(mu), clipped."""
    lost = images - decode(known.mu)
    return (decode(points.z) + mixed(points, lost, w)).clamp(0, 1)


def weights_of(points):
    """t, for images."""
    return points.t[:, None, None, None]


@pytest.mark.parametrize("end", ["i", "j"])
@pytest.mark.parametrize("morph", [None, vae.Morph], ids=["cross-faded", "morphed"])
def test_at_both_ends_a_hybrid_is_exactly_its_source(end, morph):
    known, points = points_between(40)
    images, _ = easy(90)
    there, source = at_an_end(known, points, end)
    x = rendered(there, known, images, morph=morph)
    assert torch.equal(x, images[source])


@pytest.mark.parametrize("end", ["i", "j"])
def test_at_both_ends_a_cut_hybrid_is_its_source(end):
    known, points = points_between()
    there, source = at_an_end(known, points, end)
    images = colours()
    x = rendered(there, known, images)
    close(x, images[source])


def test_the_first_half_of_the_hybrids_is_decoded_plus_what_their_sources_lost():
    known, points = points_between()
    images = easy(90)[0] / 255
    true = by_definition(known, points, images, decoder(), weights_of(points))
    x = rendered(points, known, images)
    close(x[:100], true[:100])


def test_the_second_half_of_the_hybrids_is_mixed_of_pixels():
    known, points = points_between()
    images = easy(90)[0] / 255
    x = rendered(points, known, images)
    close(x[100:], mixed(points, images, weights_of(points))[100:])


@pytest.mark.parametrize("count, decoded", [(1, 1), (2, 1), (3, 2)])
def test_of_an_odd_number_of_hybrids_the_larger_half_is_decoded(count, decoded):
    known, points = points_between(count)
    images = easy(90)[0] / 255
    x = rendered(points, known, images)
    plain = mixed(points, images, weights_of(points))
    apart = (x - plain).abs().amax((1, 2, 3)) > 1e-4
    assert apart.tolist() == [True] * decoded + [False] * (count - decoded)


def test_hybrids_of_bytes_are_bytes():
    known, points = points_between()
    images, _ = easy(90)
    true = rendered(points, known, images / 255)
    made = rendered(points, known, images)
    assert made.dtype == torch.uint8
    assert (made - 255 * true).abs().max() < 0.7


@pytest.mark.parametrize("dtype", [torch.float64, torch.half, torch.bfloat16])
def test_hybrids_of_other_floats_are_of_that_kind(dtype):
    known, points = points_between()
    images = (easy(90)[0] / 255).to(dtype)
    true = rendered(points, known, images.float())
    made = rendered(points, known, images)
    assert made.dtype == dtype
    close(made.float(), true, atol=0.02, rtol=0)


def test_without_residual_a_hybrid_is_only_decoded():
    known, points = points_between()
    images = easy(90)[0] / 255
    x = rendered(points, known, images, residual=False)
    close(x, decoder()(points.z))


def test_hybrids_of_the_prior_are_only_decoded():
    known, points = points_between(20, "prior")
    x = rendered(points, known, easy(90)[0])
    decoded = 255 * decoder()(points.z)
    assert torch.equal(x, decoded.round().byte())


def test_colour_is_cut_in_rectangles():
    known, points = points_between()
    images = colours()
    w = hybrids.rectangles(points.t[:100], 16, 16, seeded())
    some = points.take(slice(100))
    true = by_definition(known, some, images, decoder(3), w)
    x = rendered(points, known, images, batch=100)
    close(x[:100], true)


def is_cut(x, points, images):
    """Is every pixel of the half that is not decoded of the one or the other source?"""
    half = len(x) // 2
    first = x[half:] == images[points.i[half:]]
    second = x[half:] == images[points.j[half:]]
    both = (first | second).all()
    return bool(both and not first.all() and not second.all())


def test_cut_pixels_are_those_of_the_one_or_the_other_source():
    known, points = points_between()
    images = colours()
    assert is_cut(rendered(points, known, images), points, images)
    assert not is_cut(rendered(points, known, images, cut=False), points, images)


def test_colour_is_mixed_where_no_cut_is_wanted():
    known, points = points_between()
    images = colours()
    x = rendered(points, known, images, cut=False)
    close(x[100:], mixed(points, images, weights_of(points))[100:])


def test_grey_is_cut_where_a_cut_is_wanted():
    known, points = points_between()
    images, _ = easy(90)
    assert is_cut(rendered(points, known, images, cut=True), points, images)
    assert not is_cut(rendered(points, known, images), points, images)


def test_cuts_are_drawn_from_the_generator_alone():
    known, points = points_between()
    state = torch.get_rng_state()
    hybrids.render(points, known, colours(), decoder(3), generator=seeded())
    assert torch.equal(state, torch.get_rng_state())


def cuts(t):
    """One rectangle a weight, in images of 60 by 40."""
    return hybrids.rectangles(t, 60, 40, seeded())


def test_cut_rectangles_are_rectangles():
    w = cuts(torch.linspace(0, 1, 41))
    assert w.shape == (41, 1, 60, 40)
    assert set(w.unique().tolist()) == {0, 1}
    inside = w == 0
    rows = inside.any(3, keepdim=True)
    columns = inside.any(2, keepdim=True)
    assert torch.equal(inside, rows & columns)


def test_cut_rectangles_have_their_area_to_whole_pixels():
    t = torch.linspace(0, 1, 41).repeat(50)
    error = brightness(cuts(t)) - t
    assert error.abs().max() < 0.05
    assert error.mean().abs() < 0.002


@pytest.mark.parametrize("module", [hybrids, cnn])
def test_a_pixel_is_covered_if_its_middle_is(module):
    centre = torch.tensor([0.5, 0.5, 0.1])
    side = torch.tensor([0.28, 0.32, 0.4])
    found = module.covered(10, centre, side)
    assert [row.nonzero().flatten().tolist() for row in found] == [
        [4, 5], [3, 4, 5, 6], [0, 1, 2]]


def test_a_weight_of_one_cuts_nothing_and_of_zero_all():
    assert cuts(torch.ones(9)).min() == 1
    assert cuts(torch.zeros(9)).max() == 0


def test_cut_rectangles_lie_anywhere():
    w = cuts(torch.full((2000,), 0.75))
    often = (w == 0).float().mean((0, 1))
    assert often[0].max() > 0 and often[:, 0].max() > 0     # up to the border
    close(often, often.flip(0), atol=0.1, rtol=0)
    close(often, often.flip(1), atol=0.1, rtol=0)


class StandIn:
    """In a morph's place: notes the pairs, and makes the first image of each negative."""

    def __init__(self, first, second):
        self.first = first
        self.second = second

    def __call__(self, first, second, rows, t):
        self.rows = [*getattr(self, "rows", []), *rows.tolist()]
        return -first, second


def stand_ins():
    """A morph, and the list of those that were made."""
    made = []

    def morph(first, second):
        made.append(StandIn(first, second))
        return made[-1]

    return morph, made


def test_what_a_morph_made_of_both_sources_is_mixed():
    known, points = points_between()
    images = easy(90)[0] / 255
    x = rendered(points, known, images, morph=stand_ins()[0])
    w = weights_of(points)
    plain = (1 - w) * images[points.j] - w * images[points.i]
    close(x[100:], plain[100:].clamp(0, 1))
    lost = images - decoder()(known.mu)
    decoded = decoder()(points.z) + (1 - w) * lost[points.j] - w * lost[points.i]
    close(x[:100], decoded[:100].clamp(0, 1))


def test_each_pair_of_images_is_brought_into_register_once():
    known, points = points_between(50)
    points = points.take(torch.arange(120) % 50)        # many hybrids of each pair
    images, _ = easy(90)
    morph, made = stand_ins()
    rendered(points, known, images, morph=morph)
    stand_in, = made
    pairs = torch.stack([points.i, points.j], 1)
    assert len(stand_in.first) == len(pairs.unique(dim=0)) <= 50
    close(stand_in.first[stand_in.rows], images[points.i] / 255)
    close(stand_in.second[stand_in.rows], images[points.j] / 255)


@pytest.mark.parametrize("how", [{"residual": False}, {"cut": True}])
def test_what_is_only_decoded_or_cut_is_not_morphed(how):
    known, points = points_between(40)
    images = easy(90)[0] / 255
    morph, made = stand_ins()
    x = rendered(points, known, images, morph=morph, **how)
    assert torch.equal(x, rendered(points, known, images, **how))
    assert made == []


def test_colour_is_not_morphed():
    known, points = points_between(40)
    morph, made = stand_ins()
    rendered(points, known, colours(), morph=morph)
    assert made == []


def as_negative(x, q, generator):
    """In place of deformations: float images in [0,1] become their negative."""
    assert x.is_floating_point()
    return 1 - x, 2 * q


@pytest.mark.parametrize("strategy", ["between", "prior"])
@pytest.mark.parametrize("batch", [7, 1000])
def test_every_hybrid_is_deformed_last_and_keeps_its_percentages(strategy, batch):
    known, points = points_between(30, strategy)
    images, _ = easy(90)
    how = {"rule": "density", "batch": batch}
    x, q = hybrids.make(points, known, images, decoder(), **how)
    moved, moved_q = hybrids.make(points, known, images, decoder(), deform=as_negative, **how)
    assert torch.equal(moved, 255 - x)
    assert torch.equal(moved_q, q)


def test_each_hybrid_moves_in_its_own_way():
    known, points = points_between(30)
    images, _ = easy(90)
    plain, _ = hybrids.make(points, known, images, decoder())
    deform = deformations(0.5)
    moved, _ = hybrids.make(points, known, images, decoder(), deform=deform,
                            generator=seeded())
    wanted, _ = deform(plain / 255, None, seeded())
    assert torch.equal(moved, as_bytes(wanted))


def test_making_is_rendering_and_labelling():
    known, points = points_between()
    images, _ = easy(90)
    x, q = hybrids.make(points, known, images, decoder(), rule="density", residual=False)
    assert torch.equal(x, rendered(points, known, images, residual=False))
    assert torch.equal(q, known.posterior(points.z))


def test_hybrids_are_labelled_by_product_unless_told_otherwise():
    known, points = points_between()
    _, q = hybrids.make(points, known, easy(90)[0], decoder())
    assert torch.equal(q, hybrids.label("product", points, known))


# ---- HybridMixer, for the training loops of others ------------------------------------------

def shades(channels=1, dtype=torch.float32):
    """A batch (300,channels,16,16) sorted by class, whose grey says the class: 0, 1/2, 1."""
    y = torch.arange(300) // 100
    x = evenly(y / 2, channels)
    return x.to(dtype), y


def two_pixels(x):
    """An encoder: two pixels of each image are its mu."""
    return x.flatten(1)[:, :2], None


def black(z):
    """A decoder that keeps nothing."""
    return z.new_zeros(len(z), 1, 16, 16)


def black_colour(z):
    return black(z).expand(-1, 3, 16, 16)


def mixer_of(decode, **more):
    return hybrids.HybridMixer(two_pixels, decode, known_codes().posterior, rule="weight",
                               generator=seeded(), **more)


def shade_of(q):
    """The grey that percentages stand for, as an image."""
    return evenly(q @ torch.tensor([0, 0.5, 1]))


def test_a_mixer_without_a_decoder_mixes_as_its_percentages_say():
    made, q = mixer_of(black)(*shades())
    close(made, shade_of(q))


def test_each_row_of_a_mixer_is_of_its_own_image():
    x, y = shades()
    _, q = mixer_of(black)(x, y)
    assert (q.gather(1, y[:, None]) > 0).all()


def test_a_mixer_pairs_three_tenths_within_a_class():
    _, q = mixer_of(black)(*shades())
    single = (q > 0).sum(1) == 1
    assert single.float().mean() == approx(0.3, abs=0.08)


def test_a_mixer_weighs_as_a_beta_of_four():
    x, y = shades()
    _, q = mixer_of(black)(x, y)
    weight = q.gather(1, y[:, None])
    mixed = weight[weight < 1]
    assert mixed.mean() == approx(0.5, abs=0.04)
    assert mixed.var() == approx(1 / 36, rel=0.3)


def test_a_mixer_decodes_half_of_the_batch_all_over_it():
    made, q = mixer_of(decoder())(*shades())
    difference = (made - shade_of(q)).abs()
    moved = difference.amax((1, 2, 3)) > 1e-4
    # Of the half that is decoded 0.3 are of one class, and so of one code.
    assert moved.sum() == approx(105, abs=20)
    assert (moved.view(3, 100).sum(1) > 20).all()


def test_a_mixer_cuts_colour():
    made, q = mixer_of(black_colour)(*shades(3))
    assert set(made.unique().tolist()) == {0, 0.5, 1}
    close(brightness(made), brightness(shade_of(q)), atol=0.08, rtol=0)


def test_a_mixer_told_not_to_cut_mixes_colour():
    mixer = mixer_of(black_colour, cut=False)
    made, q = mixer(*shades(3))
    close(made[:, :1], shade_of(q))
    assert (made == made[:, :1]).all()


def test_a_mixer_deforms_last_and_leaves_the_percentages():
    made, q = mixer_of(decoder())(*shades())
    moved, moved_q = mixer_of(decoder(), deform=as_negative)(*shades())
    close(moved, 1 - made)
    assert torch.equal(moved_q, q)


def test_a_mixer_takes_a_single_image():
    made, q = mixer_of(black)(torch.ones(1, 1, 16, 16), torch.tensor([2]))
    close(made, torch.ones(1, 1, 16, 16))
    assert q.tolist() == [[0, 0, 1]]


def test_a_mixer_labels_by_product_unless_told_otherwise():
    found = []
    for more in ({}, {"rule": "product"}, {"rule": "density"}):
        mixer = hybrids.HybridMixer(two_pixels, black, known_codes().posterior,
                                    generator=seeded(), **more)
        _, q = mixer(*shades())
        found.append(q)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_mixer_takes_bytes_and_labels_of_32_bits():
    x, y = shades()
    made, q = mixer_of(black)((255 * x).byte(), y.int())
    close(made, shade_of(q), atol=0.003, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.half, torch.bfloat16])
def test_a_mixer_takes_all_floats(dtype):
    made, q = mixer_of(black)(*shades(dtype=dtype))
    assert made.dtype == dtype
    close(made.float(), shade_of(q), atol=0.004, rtol=0)


@pytest.mark.parametrize("change", [
    lambda x: 2 * x - 1,
    lambda x: 1.01 * x,
    lambda x: 255 * x,
    lambda x: x / 0,
    lambda x: (255 * x).long()])
def test_a_mixer_refuses_a_batch_outside_of_0_to_1(change):
    x, y = shades()
    with pytest.raises(ValueError, match="mix images in .0, 1., and normalise them after"):
        mixer_of(black)(change(x), y)


# ---- augmentations and batches --------------------------------------------------------------

def places(count, height, width):
    """Images (count,2,H,W) that show where each of their pixels is: its column, its row."""
    columns = torch.arange(width).float().expand(height, width)
    rows = torch.arange(height).float()[:, None].expand(height, width)
    return torch.stack([columns, rows]).expand(count, 2, height, width)


def linear_maps(*kept, height=16, width=16, count=2000):
    """What affine does with only these of its parts -> (count,2,2), shifts (count,2)."""
    off = {"degrees": 0, "scale": 0, "shift": 0, "shear": 0}
    for name in kept:
        off.pop(name)
    seen, _ = cnn.affine(places(count, height, width), None, seeded(), **off)
    row = height // 2
    column = width // 2
    centre = seen[:, :, row, column]
    right = seen[:, :, row, column + 1] - centre
    down = seen[:, :, row + 1, column] - centre
    return torch.stack([right, down], 2), centre - torch.tensor([column, row])


def nothing_changed(maps):
    """Are they all the identity?"""
    eye = torch.eye(2).expand_as(maps)
    close(maps, eye, atol=1e-4, rtol=0)


def keep_their_area(maps):
    close(maps.det(), torch.ones(len(maps)), atol=1e-4, rtol=0)


def is_uniform(values, limit):
    """Do they spread evenly over [-limit, limit]?"""
    assert values.abs().max() <= 1.001 * limit
    assert values.mean() == approx(0, abs=0.06 * limit)
    assert values.std() == approx(limit / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("height, width", [
    (16, 16),
    (16, 40),
    (40, 16)])
def test_affine_turns_rigidly_by_up_to_15_degrees(height, width):
    maps, _ = linear_maps("degrees", height=height, width=width)
    nothing_changed(maps.mT @ maps)
    keep_their_area(maps)
    turn = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    is_uniform(turn.rad2deg(), 15)


@pytest.mark.parametrize("height, width", [(16, 16), (16, 40)])
def test_affine_shears_by_up_to_15_hundredths(height, width):
    maps, _ = linear_maps("shear", height=height, width=width)
    is_uniform(maps[:, 0, 1], 0.15)
    maps[:, 0, 1] = 0
    nothing_changed(maps)


def test_affine_stretches_each_direction_by_itself():
    maps, _ = linear_maps("scale")
    wide = maps[:, 0, 0].log()
    high = maps[:, 1, 1].log()
    is_uniform(wide, 0.15)
    is_uniform(high, 0.15)
    assert uncorrelated(wide, high)
    assert maps[:, 0, 1].abs().max() < 1e-4
    assert maps[:, 1, 0].abs().max() < 1e-4


def test_affine_shifts_each_direction_by_up_to_a_tenth_of_the_side():
    maps, shifts = linear_maps("shift", height=20, width=40)
    nothing_changed(maps)
    is_uniform(shifts[:, 0], 4)
    is_uniform(shifts[:, 1], 2)
    assert uncorrelated(*shifts.T)


def test_turning_and_shearing_keep_the_area():
    maps, _ = linear_maps("degrees", "shear")
    keep_their_area(maps)


def test_affine_turns_about_the_middle():
    x = torch.zeros(500, 1, 17, 17)
    x[:, :, 8, 8] = 1
    turned, _ = cnn.affine(x, None, seeded(), scale=0, shift=0, shear=0)
    assert turned[:, 0, 8, 8].min() > 0.9999


def test_affine_continues_the_border():
    white = torch.ones(50, 1, 16, 16)
    x, _ = cnn.affine(white, None, seeded())
    close(x, white)


def crops(count=4500):
    """What flip_crop shows at each pixel, which are mirrored, how far each is shifted."""
    seen, _ = cnn.flip_crop(places(count, 16, 20), None, seeded())
    column, row = seen[:, :, 8, 10].long().T
    mirrored = seen[:, 0, 8, 11] < column
    right = torch.where(mirrored, 19 - column, column) - 10
    return seen, mirrored, right, row - 8


def test_flip_crop_mirrors_half_of_the_images():
    _, mirrored, _, _ = crops()
    assert mirrored.float().mean() == approx(0.5, abs=0.03)


def test_flip_crop_shifts_by_every_number_of_pixels_up_to_four():
    _, mirrored, right, down = crops()
    for shift in (right, down, right[mirrored], right[~mirrored]):
        numbers, often = shift.unique(return_counts=True)
        assert numbers.tolist() == list(range(-4, 5))
        assert (often / len(shift) - 1 / 9).abs().max() < 0.03
    assert uncorrelated(right, down)


def test_flip_crop_reflects_the_edges():
    seen, mirrored, right, down = crops(200)
    columns = (torch.arange(20) + right[:, None]).abs()
    columns = torch.where(columns > 19, 38 - columns, columns)
    columns = torch.where(mirrored[:, None], 19 - columns, columns)
    rows = (torch.arange(16) + down[:, None]).abs()
    rows = torch.where(rows > 15, 30 - rows, rows)
    assert (seen[:, 0] == columns[:, None]).all()
    assert (seen[:, 1] == rows[:, :, None]).all()


TRANSFORMS = {"affine": cnn.affine, "elastic": cnn.elastic, "flip_crop": cnn.flip_crop,
              "deformations": deformations(0.5, True, 16, 20),
              "moving": cnn.moving(noise(500, 16, 20, 2)), "mixup": cnn.mixup,
              "mixup of 1": functools.partial(cnn.mixup, alpha=1.0), "cutmix": cnn.cutmix}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transform_draws_from_its_generator_alone(name, channels):
    x = torch.rand(64, channels, 16, 20, generator=seeded())
    state = torch.get_rng_state()
    first = TRANSFORMS[name](x, torch.eye(64), seeded(3))
    again = TRANSFORMS[name](x, torch.eye(64), seeded(3))
    assert all(map(torch.equal, first, again))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_keeps_shape_range_and_sum(name):
    x = torch.rand(64, 3, 16, 20, generator=seeded())
    out, q = TRANSFORMS[name](x, torch.eye(64), seeded(3))
    assert out.shape == x.shape
    assert out.min() >= 0 and out.max() < 1 + 1e-5
    close(q.sum(1), torch.ones(64))


@pytest.mark.parametrize("name", ["affine", "elastic", "flip_crop", "deformations", "moving"])
def test_each_image_is_changed_in_its_own_way(name):
    image = torch.rand(3, 16, 20, generator=seeded())
    x = image.expand(64, -1, -1, -1)
    out, q = TRANSFORMS[name](x, torch.eye(64), seeded())
    assert len(out.flatten(1).unique(dim=0)) > 50
    assert torch.equal(q, torch.eye(64))


@pytest.mark.parametrize("name", ["mixup", "mixup of 1", "cutmix"])
def test_mixed_labels_say_how_much_of_each_image_there_is(name):
    grey = torch.linspace(0, 1, 64)
    out, q = TRANSFORMS[name](evenly(grey, 3), torch.eye(64), seeded())
    close(brightness(out), q @ grey)
    assert (q.diag() > 0).sum() > 60    # each row is of its own image


@pytest.mark.parametrize("name", ["mixup of 1", "cutmix"])
def test_each_image_is_mixed_with_a_weight_of_its_own(name):
    x = torch.zeros(64, 1, 16, 20)
    _, q = TRANSFORMS[name](x, torch.eye(64), seeded())
    assert len(q.diag().unique()) > 40


def test_mixup_halves_images_unless_told_otherwise():
    x = torch.zeros(64, 1, 16, 16)
    _, q = cnn.mixup(x, torch.eye(64), seeded())
    assert set(q.unique().tolist()) <= {0, 0.5, 1}


def test_cutmix_pastes_a_rectangle():
    x = evenly(torch.linspace(0, 1, 64), width=20)
    out, _ = cnn.cutmix(x, torch.eye(64), seeded())
    pasted = out != x
    rows = pasted.any(3, keepdim=True)
    columns = pasted.any(2, keepdim=True)
    assert torch.equal(pasted, rows & columns)
    borders = rows.int().diff(dim=2).abs()
    assert borders.sum(2).max() <= 2    # one piece
    assert len(rows.flatten(1).unique(dim=0)) > 20


def test_cutmix_keeps_the_share_that_its_paper_leaves():
    x = torch.zeros(4000, 1, 32, 32)
    _, q = cnn.cutmix(x, torch.eye(4000), seeded())
    # Sides are the roots of uniform numbers u; a border cuts off s^2 / 4 of a side s on
    # average: what is pasted has the mean E[(s - s^2 / 4)^2] = 1/2 - 1/5 + 1/48.
    assert q.diag().mean() == approx(1 - 0.5 + 0.2 - 1 / 48, abs=0.015)


@pytest.mark.parametrize("channels, transform", [(1, cnn.affine), (3, cnn.flip_crop)])
def test_grey_is_bent_and_colour_is_mirrored(channels, transform):
    x = torch.rand(8, channels, 16, 16, generator=seeded())
    found, _ = cnn.augment(x, None, seeded())
    true, _ = transform(x, None, seeded())
    assert torch.equal(found, true)


OFF = {"degrees": 0, "scale": 0, "shift": 0, "shear": 0}


def bends(bend, count=3000):
    """How far affine bends what is in the middle of images of 17 x 21 (count,2)."""
    seen, _ = cnn.affine(places(count, 17, 21), None, seeded(), **OFF, bend=bend)
    return seen[:, :, 8, 10] - torch.tensor([10, 8])


def test_affine_bends_by_a_deviation_of_so_many_pixels():
    moved = bends(1.5)
    assert moved.mean(0).abs().max() < 0.1
    close(moved.std(0), torch.tensor([1.5, 1.5]), atol=0.1, rtol=0)
    assert uncorrelated(*moved.T)


def test_affine_bends_neighbours_alike_and_what_is_far_differently():
    seen, _ = cnn.affine(places(2000, 17, 33), None, seeded(), **OFF, bend=1.0)
    right = seen[:, 0, 8] - torch.arange(33)
    middle, neighbour, far = right[:, 16], right[:, 17], right[:, 26]
    assert torch.stack([middle, neighbour]).corrcoef()[0, 1] > 0.95
    assert torch.stack([middle, far]).corrcoef()[0, 1].abs() < 0.35


def test_unless_told_otherwise_affine_does_not_bend():
    x = torch.rand(8, 1, 16, 16, generator=seeded())
    plain, _ = cnn.affine(x, None, seeded())
    straight, _ = cnn.affine(x, None, seeded(), bend=0.0)
    assert torch.equal(plain, straight)


def test_elastic_is_affine_of_a_scale_and_bends():
    x = torch.rand(8, 1, 16, 16, generator=seeded())
    found, q = cnn.elastic(x, torch.eye(8), seeded(), scale=1.0, bend=1.0)
    true, _ = cnn.affine(x, None, seeded(), bend=1.0)
    assert torch.equal(found, true)
    assert torch.equal(q, torch.eye(8))
    found, _ = cnn.elastic(x, None, seeded(), scale=0.5, bend=2.0)
    true, _ = cnn.affine(x, None, seeded(), 7.5, 0.075, 0.05, 0.075, bend=2.0)
    close(found, true)


def test_elastic_does_with_colour_what_augment_does():
    x = torch.rand(8, 3, 16, 16, generator=seeded())
    found, _ = cnn.elastic(x, None, seeded())
    true, _ = cnn.augment(x, None, seeded())
    assert torch.equal(found, true)


def test_moving_draws_a_flow_for_each_image_evenly():
    right = torch.arange(4.0)
    flows = torch.stack([right, torch.zeros(4)], 1)[:, None, None].expand(4, 16, 20, 2)
    move = cnn.moving(flows.half())
    moved, q = move(places(4000, 16, 20), "percentages", seeded())
    often = moved[:, 0, 8, 5].round().long().bincount() # five columns and the flow
    assert often[:5].sum() == 0
    assert (often[5:] - 1000).abs().max() < 120
    assert q == "percentages"


def test_moving_gives_a_batch_without_images_back():
    x, q = cnn.moving(torch.zeros(1, 16, 16, 2))(torch.empty(0, 1, 16, 16), torch.eye(0), None)
    assert x.shape == (0, 1, 16, 16) and q.shape == (0, 0)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0, 200.0])
def test_beta_has_its_mean_and_its_variance(alpha):
    draws = cnn.random_beta(torch.empty(200_000), alpha, seeded())
    true = dist.Beta(alpha, alpha).variance
    assert draws.mean() == approx(0.5, abs=0.005)
    assert draws.var() == approx(true.item(), rel=0.02)


def some_of_each():
    """Nine real images that are black, five hybrids that are white; labels of their own."""
    q = torch.eye(14)
    black = torch.zeros(9, 1, 16, 16).byte()
    white = torch.full((5, 1, 16, 16), 255).byte()
    return (black, q[:9]), (white, q[9:])


# Share at first and in the end, how much of the training is over, hybrids in a batch of 40.
SHARES = [
    ((0, 0), 0, 0),
    ((0.25, 0.25), 0.7, 10),
    ((1, 1), 0.9, 40),
    ((1, 0), 0, 40),
    ((1, 0), 0.5, 40),
    ((1, 0), 0.5625, 30),
    ((1, 0), 0.75, 0),
    ((1, 0), 0.99, 0),
    ((0.5, 1), 0.1, 20),
    ((0.5, 1), 0.625, 30)]


def assert_first(x, count, value):
    """Are the first `count` images of one value, and the others black?"""
    assert (brightness(x[:count]) == value).all()
    assert (x[count:] == 0).all()


@pytest.mark.parametrize("share, done, count", SHARES)
def test_a_batch_holds_the_stated_share_of_hybrids(share, done, count):
    real, made = some_of_each()
    x, q = cnn.batches(real, 40, made, share=share)(seeded(), done)
    assert x.shape == (40, 1, 16, 16)
    assert_first(x, count, 1)
    assert torch.equal(q.argmax(1) >= 9, brightness(x) == 1)        # labels are their own


@pytest.mark.parametrize("share, done, count", SHARES)
def test_without_hybrids_the_same_share_of_real_images_is_mixed(share, done, count):
    def mark(x, q, generator):
        return x + 1, q

    real, _ = some_of_each()
    x, _ = cnn.batches(real, 40, mix=mark, share=share)(seeded(), done)
    assert_first(x, count, 1)


def test_hybrids_are_mixed_and_real_images_are_not():
    def mark(x, q, generator):
        return x + 1, 2 * q

    real, made = some_of_each()
    next_batch = cnn.batches(real, 40, made, mark, share=(0.25, 0.25))
    x, q = next_batch(seeded(), 0)
    assert_first(x, 10, 2)
    assert (q[:10].sum(1) == 2).all()
    assert (q[10:].sum(1) == 1).all()


def test_real_images_are_moved_and_hybrids_and_mixed_images_are_not():
    def mark(x, q, generator):
        return x + 1, 2 * q

    def double(x, q, generator):
        return 2 * x, q

    real, made = some_of_each()
    x, q = cnn.batches(real, 40, made, share=(0.25, 0.25), transforms=[double],
                       move=mark)(seeded(), 0)
    assert (x == 2).all()               # the white hybrids, the black images moved: doubled
    assert (q[:10].sum(1) == 1).all()
    assert (q[10:].sum(1) == 2).all()
    x, _ = cnn.batches(real, 40, mix=double, share=(0.25, 0.25), move=mark)(seeded(), 0)
    assert brightness(x).tolist() == [0] * 10 + [1] * 30


def test_each_image_of_a_batch_has_its_own_probabilities():
    grey = evenly(torch.arange(14).byte())
    own = torch.eye(14)
    real = (grey[:9], own[:9])
    made = (grey[9:], own[9:])
    x, q = cnn.batches(real, 40, made, share=(0.5, 0.5))(seeded(), 0)
    close(255 * brightness(x), q.argmax(1).float())


def test_a_batch_without_hybrids_and_mixing_is_all_real():
    real, _ = some_of_each()
    x, q = cnn.batches(real, 200)(seeded(), 0)
    assert x.max() == 0
    assert set(q.argmax(1).tolist()) == set(range(9))


def test_unless_told_otherwise_hybrids_come_first_and_real_images_last():
    real, made = some_of_each()
    next_batch = cnn.batches(real, 40, made)
    first, _ = next_batch(seeded(), 0)
    last, _ = next_batch(seeded(), 0.99)
    assert first.min() == 1 and last.max() == 0


def test_two_transforms_take_turns():
    def name(text):
        return lambda x, q, generator: (text, generator)

    transform = compare.in_turn(name("mixup"), name("cutmix"))
    seen = [transform(None, None, k) for k in range(3)]
    assert seen == [("mixup", 0), ("cutmix", 1), ("mixup", 2)]


def test_transforms_see_the_whole_batch_one_after_the_other():
    def add(x, q, generator):
        return x + 1, q

    def double(x, q, generator):
        return 2 * x, 3 * q

    real, made = some_of_each()
    next_batch = cnn.batches(real, 4, made, share=(0.5, 0.5),
                             transforms=[add, double])
    x, q = next_batch(seeded(), 0)
    assert brightness(x).tolist() == [4, 4, 2, 2]
    assert q.sum(1).tolist() == [3, 3, 3, 3]


# ---- deformations: how images of one class move into each other -----------------------------

def blobs(count, height=16, width=16, seed=0):
    """Smooth images (count,1,height,width) of four bright spots each, none like another."""
    g = seeded(seed)
    centre = torch.rand(count, 4, 2, 1, 1, generator=g) * 1.2 - 0.6
    radius = torch.rand(count, 4, 1, 1, generator=g) * 0.15 + 0.15
    right, down, *_ = vae.flow_functions(height, width)
    distance = (right - centre[:, :, 0]).square() + (down - centre[:, :, 1]).square()
    return (-distance / (2 * radius ** 2)).exp().amax(1, keepdim=True)


def affine_part(count, size=0.12, seed=0):
    """Coefficients (count,2,28) of random affine maps."""
    v = torch.zeros(count, 2, 28)
    v[:, :, :3] = size * noise(count, 2, 3, seed=seed)
    return v


def bending_part(count, size=0.12, seed=0):
    """Coefficients (count,2,28) of random smooth flows."""
    v = torch.zeros(count, 2, 28)
    v[:, :, 3:] = size * noise(count, 2, 25, seed=seed)
    return v


def square_error(a, b):
    return (a - b).square().mean((1, 2, 3))


WARPS = pytest.mark.parametrize("warp", [vae.warp, cnn.warp], ids=["vae", "cnn"])


@WARPS
def test_an_image_seen_through_no_flow_is_as_it_was(warp):
    x = torch.rand(3, 2, 12, 20, generator=seeded())
    close(warp(x, torch.zeros(3, 12, 20, 2)), x)


@WARPS
@pytest.mark.parametrize("right, down", [(3, 0), (0, 2), (-4, 5)])
def test_a_flow_of_whole_pixels_is_a_shift_with_the_border_continued(warp, right, down):
    x = torch.rand(3, 2, 12, 20, generator=seeded())
    flow = torch.tensor([right, down]).expand(3, 12, 20, 2)
    larger = F.pad(x, (5, 5, 5, 5), mode="replicate")
    close(warp(x, flow), larger[:, :, 5 + down:17 + down, 5 + right:25 + right])


@WARPS
def test_what_is_seen_at_p_is_the_image_at_p_and_the_flow_there(warp):
    here = places(3, 12, 20)
    flow = noise(3, 12, 20, 2)
    there = here + flow.permute(0, 3, 1, 2)
    inside = torch.stack([there[:, 0].clamp(0, 19), there[:, 1].clamp(0, 11)], 1)
    close(warp(here, flow), inside, atol=1e-4, rtol=0)


def test_there_and_back_again_is_nearly_the_image():
    x = blobs(9, 20, 24)
    flow = vae.flow_of(affine_part(9, 0.05) + bending_part(9, 0.05), 20, 24)
    there = vae.warp(x, flow)
    back = vae.warp(there, -flow)
    assert (square_error(back, x) < 0.3 * square_error(there, x)).all()


def test_the_mirroring_flow_mirrors():
    x = torch.rand(2, 3, 12, 20, generator=seeded())
    flow = vae.mirror_flow(12, 20).expand(2, -1, -1, -1)
    close(vae.warp(x, flow), x.flip(3))


def test_the_affine_part_of_a_flow_is_an_affine_map_in_half_sides():
    v = affine_part(2)
    flow = vae.flow_of(v, 12, 20)
    for k, row, column in itertools.product(range(2), (0, 5, 11), (0, 7, 19)):
        right = (column + 0.5) / 10 - 1
        down = (row + 0.5) / 6 - 1
        a, b, c = v[k, 0, :3].tolist()
        d, e, f = v[k, 1, :3].tolist()
        wanted = [10 * (a * right + b * down + c), 6 * (d * right + e * down + f)]
        assert flow[k, row, column].tolist() == approx(wanted, abs=1e-5)


def test_a_turn_is_a_turn_whatever_the_shape():
    v = torch.zeros(1, 2, 28)
    v[0, 0, :2] = torch.tensor([math.cos(0.3) - 1, -math.sin(0.3) * 12 / 20])
    v[0, 1, :2] = torch.tensor([math.sin(0.3) * 20 / 12, math.cos(0.3) - 1])
    there = places(1, 12, 20) + vae.flow_of(v, 12, 20).permute(0, 3, 1, 2)
    edge = there[0, :, 0, 1:] - there[0, :, 0, :-1]
    wanted = torch.tensor([[math.cos(0.3)], [math.sin(0.3)]])
    close(edge, wanted.expand(2, 19), atol=1e-4, rtol=0)


def test_a_grid_of_one_displacement_shifts_everything():
    v = torch.zeros(1, 2, 28)
    v[0, 0, 3:] = 0.2
    v[0, 1, 3:] = -0.1
    flow = vae.flow_of(v, 12, 20)
    close(flow, torch.tensor([2.0, -0.6]).expand(1, 12, 20, 2))


def test_a_flow_has_the_displacement_of_a_node_where_the_node_is():
    v = bending_part(1)
    flow = vae.flow_of(v, 17, 21)       # every fourth row, every fifth column
    nodes = v[0, :, 3:].unflatten(1, (5, 5)).permute(1, 2, 0)
    close(flow[0, ::4, ::5], nodes * torch.tensor([10.5, 8.5]))


@pytest.mark.parametrize("part, better, most", [
    (affine_part, 30, 0.1), (bending_part, 2, 0.7)])
def test_registration_finds_a_known_flow(part, better, most):
    moving = blobs(8, 20, 24)
    true = vae.flow_of(part(8), 20, 24)
    target = vae.warp(moving, true)
    found = vae.flow_of(vae.register(target, moving), 20, 24)
    after = square_error(vae.warp(moving, found), target)
    assert (after < square_error(moving, target) / better).all()
    # Where there is something to be seen.
    bright = target.squeeze(1) > 0.5
    miss = (found - true)[bright].norm(dim=1).mean()
    assert miss < most * true[bright].norm(dim=1).mean()


def test_equal_images_are_in_register_already():
    x = blobs(3)
    assert vae.flow_of(vae.register(x, x), 16, 16).abs().max() < 0.2


def test_pairs_are_registered_as_each_would_be_alone():
    target = blobs(3)
    moving = blobs(3, seed=1)
    together = vae.register(target, moving)
    for k in range(3):
        close(vae.register(target[[k]], moving[[k]]), together[[k]], atol=1e-3, rtol=0)


def test_registration_leaves_no_gradients_and_draws_nothing():
    state = torch.get_rng_state()
    v = vae.register(blobs(2), blobs(2, seed=1))
    assert not v.requires_grad
    assert torch.equal(state, torch.get_rng_state())


def test_directions_have_the_covariance_of_the_coefficients():
    v = noise(200, 2, 28) * torch.rand(56, generator=seeded()).view(2, 28) + 3
    directions = vae.square_root(v)
    true = v.flatten(1).double().T.cov(correction=0)
    close(directions @ directions.T, true, check_dtype=False, atol=1e-5, rtol=1e-4)
    widths = directions.norm(dim=0)
    assert torch.equal(widths, widths.sort(descending=True).values)
    close(directions.T @ directions, widths.square().diag(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pairs", [0, 1])
def test_the_directions_of_one_pair_or_none_are_zero(pairs):
    assert torch.equal(vae.square_root(noise(pairs, 2, 28)), torch.zeros(56, 56))


def test_pairs_are_of_one_class_and_never_of_an_image_with_itself():
    y = torch.tensor([0] * 30 + [1] * 4 + [2])
    i, j = vae.same_class_pairs(y[torch.randperm(35, generator=seeded())], seeded(), each=6)
    y = y[torch.randperm(35, generator=seeded())]
    assert torch.equal(y[i], y[j])
    assert (i != j).all()
    assert len(set(zip(i.tolist(), j.tolist()))) == len(i)
    often = i.bincount(minlength=35)
    assert torch.equal(often, torch.tensor([6, 3, 0])[y])       # a small class has fewer


def test_partners_of_one_class_are_drawn_evenly():
    often = torch.zeros(20)
    for seed in range(300):
        i, j = vae.same_class_pairs(torch.zeros(20).long(), seeded(seed), each=5)
        often += j[i == 0].bincount(minlength=20)
    assert often[0] == 0
    assert often[1:].min() > 50 and often[1:].max() < 110      # 79 on average


@pytest.mark.parametrize("height, width, smaller", [
    (32, 16, (32, 16)), (33, 33, (16, 16)), (48, 64, (24, 32))])
def test_large_images_are_registered_in_at_most_32_pixels_a_side(height, width, smaller):
    x = torch.rand(2, 1, height, width, generator=seeded())
    small = vae.small(x)
    assert small.shape[2:] == smaller
    cells = height // smaller[0]
    assert small[0, 0, 0, 0].item() == approx(x[0, 0, :cells, :cells].mean().item(), rel=1e-4)


def test_registration_of_large_images_finds_a_known_flow_too():
    moving = blobs(4, 40, 48)
    true = vae.flow_of(affine_part(4), 40, 48)
    found = vae.flow_of(vae.register(vae.warp(moving, true), moving), 40, 48)
    bright = vae.warp(moving, true).squeeze(1) > 0.5
    miss = (found - true)[bright].norm(dim=1).mean()
    assert miss < 0.2 * true[bright].norm(dim=1).mean()


@pytest.mark.parametrize("count, each", [(100, 10), (300, 10), (1000, 3), (4000, 1)])
def test_there_are_not_many_more_pairs_than_wanted(count, each):
    i, _ = vae.same_class_pairs(torch.arange(count) % 2, seeded())
    assert (i.bincount() == each).all()


def test_a_random_half_is_half_of_each_class_and_the_smaller_of_an_odd_one():
    y = torch.tensor([0] * 8 + [1] * 5 + [3])[torch.randperm(14, generator=seeded())]
    often = torch.zeros(14)
    for seed in range(400):
        half = vae.random_half(y, seeded(seed))
        assert y[half].bincount(minlength=4).tolist() == [4, 2, 0, 0]
        often += half
    close(often / 400, torch.tensor([0.5, 0.4, 0, 0])[y], atol=0.12, rtol=0)


def slow_kernel_nll(x, y, asked, asked_y, classes):
    """The least NLL over bandwidths, image by image and class by class."""
    nearest = []
    for image in asked:
        nearest.append(min(float((image - other).square().sum()) for other in x))
    nearest = sorted(nearest)[(len(asked) - 1) // 2]    # their median
    losses = []
    for factor in (0.05, 0.1, 0.2, 0.4, 1, 100):
        total = 0.0
        for image, true in zip(asked, asked_y):
            mass = [0.0] * classes
            for other, c in zip(x, y):
                distance = float((image - other).square().sum())
                mass[c] += math.exp(-distance / (2 * factor * nearest))
            q = 0.98 * mass[true] / sum(mass) + 0.02 / classes
            total -= math.log(q) / len(asked)
        losses.append(total)
    return min(losses)


@pytest.mark.parametrize("seed", range(3))
def test_the_nll_of_the_kernel_classifier_is_that_of_its_formula(seed):
    x = noise(12, 1, 4, 4, seed=seed)
    asked = noise(7, 1, 4, 4, seed=9 + seed)
    y = torch.arange(12) % 3
    asked_y = torch.arange(7) % 4       # one class is unknown
    found = vae.kernel_nll(x, y, asked, asked_y)
    wanted = slow_kernel_nll(x, y.tolist(), asked, asked_y.tolist(), classes=4)
    assert found == approx(wanted, rel=1e-4)


# ---- what the images say about their movements ----------------------------------------------

def set_that_moves(count=40, seed=0, size=0.15, objects=4):
    """Some objects, each seen turned, sheared and shifted at random; labels."""
    y = torch.arange(count) % objects
    v = affine_part(count, size, seed + 1)
    return vae.warp(blobs(objects, seed=seed)[y], vae.flow_of(v, 16, 16)), y


def set_of_many_objects(seed=0):
    """Two objects in two places: the place is the class, and nothing else moves."""
    y = torch.arange(40) % 2
    x = blobs(2, seed=seed)[torch.arange(40) // 2 % 2]
    x = torch.where(y[:, None, None, None] == 1, x.roll(2, 3), x)
    return (x + 0.05 * noise(40, 1, 16, 16, seed=seed)).clamp(0, 1), y


def set_without_movement(seed=0):
    """Four objects under noise."""
    y = torch.arange(40) % 4
    x = blobs(4, seed=seed)[y] + 0.2 * noise(40, 1, 16, 16, seed=seed)
    return x.clamp(0, 1), y


def set_of_random_labels(seed=0):
    x, y = set_that_moves(seed=seed)
    return x, y[torch.randperm(40, generator=seeded(seed))]


def set_of_mirrored_pairs(seed=0):
    """Ten objects that hardly move, half of the time seen in a mirror."""
    x, y = set_that_moves(seed=seed, size=0.05, objects=10)
    turned = torch.rand(40, 1, 1, 1, generator=seeded(seed)) < 0.5
    return torch.where(turned, x.flip(3), x), y


def set_of_mirrored_classes(seed=0):
    """Two objects, and two that are what the first look like in a mirror."""
    y = torch.arange(40) % 4
    two = blobs(2, seed=seed)
    x = torch.cat([two, two.flip(3)])[y] + 0.2 * noise(40, 1, 16, 16, seed=seed)
    return x.clamp(0, 1), y


@pytest.mark.parametrize("seed", range(3))
def test_images_that_move_say_so(seed):
    deform = TRUE_FIT(*set_that_moves(seed=seed), seeded())
    assert deform.strength > 0
    chosen = vae.STRENGTHS.index(deform.strength)
    assert deform.nll[chosen] < 0.8 * deform.nll[0]
    assert deform.moves()


@pytest.mark.parametrize("made", [set_of_many_objects, set_without_movement,
                                  set_of_random_labels])
@pytest.mark.parametrize("seed", range(2))
def test_images_that_do_not_move_say_so(made, seed):
    deform = TRUE_FIT(*made(seed=seed), seeded())
    assert deform.strength == 0
    assert not deform.mirror


@pytest.mark.parametrize("made, wanted", [(set_of_mirrored_pairs, True),
                                          (set_of_mirrored_classes, False)])
@pytest.mark.parametrize("seed", range(2))
def test_images_say_whether_a_mirror_makes_others_of_their_kind(made, wanted, seed):
    assert TRUE_FIT(*made(seed=seed), seeded()).mirror == wanted


def test_the_strength_is_one_of_the_least_nll():
    deform = TRUE_FIT(*set_that_moves(), seeded())
    *nll, _ = deform.nll
    assert len(nll) == len(vae.STRENGTHS)
    assert nll[vae.STRENGTHS.index(deform.strength)] < min(nll) + 0.02


def test_the_directions_are_those_of_pairs_of_one_class():
    x, y = set_that_moves()
    deform = TRUE_FIT(x, y, seeded())
    generator = seeded()
    rows = torch.randperm(40, generator=generator)
    i, j = vae.same_class_pairs(y[rows], generator)
    v = vae.register(x[rows][i], x[rows][j])
    close(deform.directions, vae.square_root(v))
    assert (deform.height, deform.width) == (16, 16)


def test_what_images_say_depends_on_the_generator_alone():
    x, y = set_that_moves(24)
    found = []
    for seed, draw in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(draw)
        before = torch.get_rng_state()
        found.append(TRUE_FIT(x, y, seeded(seed)))
        assert torch.equal(before, torch.get_rng_state())
    assert found[0].nll == found[1].nll != found[2].nll
    assert torch.equal(found[0].directions, found[1].directions)


def test_images_of_any_kind_say_the_same():
    x, y = set_that_moves(24)
    as_bytes_of_colour = as_bytes(x).expand(-1, 3, -1, -1)
    first = TRUE_FIT(as_bytes_of_colour, y.int(), seeded()).directions
    second = TRUE_FIT(as_bytes(x) / 255, y, seeded()).directions
    close(first @ first.T, second @ second.T, atol=1e-4, rtol=0)


def test_at_most_so_many_images_are_asked(monkeypatch):
    x, y = set_that_moves()
    asked = note_calls(monkeypatch, vae, "proof")
    TRUE_FIT(x, y, seeded(), most=12)
    assert len(asked[0][0][0]) == 12


def test_the_proof_moves_one_half_by_what_that_half_says_and_asks_the_other(monkeypatch):
    x, y = set_that_moves(16)
    x[:, :, 0, 0] = torch.linspace(0, 1, 16)[:, None]           # a name for each image
    monkeypatch.setattr(vae, "blur", lambda x, sigma: x)
    monkeypatch.setattr(vae, "warp", lambda x, flow: x)
    roots = note_calls(monkeypatch, vae, "square_root")
    asked = note_calls(monkeypatch, vae, "kernel_nll")
    i, j = vae.same_class_pairs(y, seeded())
    v = torch.stack([i, j], 1).float()[:, :, None].expand(-1, 2, 28)
    losses = vae.proof(x, y, i, j, v, seeded(), splits=2)
    assert losses.shape == (4, 6)       # two halves, each both ways
    close(losses.flatten(), torch.tensor([loss for _, loss in asked]))
    for k, ((seen, seen_y, other, other_y), _) in enumerate(asked):
        names = (15 * seen[:, 0, 0, 0]).round().long()
        others = (15 * other[:, 0, 0, 0]).round().long()
        if k % 6 < 5:                   # the sixth is mirrored
            assert torch.equal(y[names], seen_y)
            assert names.bincount(minlength=16).unique().tolist() == [0, 10]
            assert set(names.tolist()).isdisjoint(others.tolist())
            (pairs,), _ = roots[k // 6]
            assert set(pairs[:, :, 0].flatten().tolist()) <= set(names.tolist())
        assert torch.equal(y[others], other_y)
        assert len(others) == 8


@pytest.mark.parametrize("y", [[], [0], [0, 1], [0, 1, 2, 3]], ids=len)
def test_without_two_images_of_a_class_nothing_moves(y):
    deform = TRUE_FIT(easy(4)[0][:len(y)], torch.tensor(y).long(), seeded())
    assert not deform.moves()
    assert deform.words() == "no deformations"
    x = torch.rand(5, 1, 16, 16, generator=seeded())
    q = torch.eye(5)
    moved, same_q = deform(x, q, seeded())
    assert moved is x and same_q is q


def test_images_of_one_class_say_that_they_do_not_move():
    x, _ = set_that_moves()
    deform = TRUE_FIT(x, torch.zeros(40).long(), seeded())
    assert not deform.moves()           # what they are is known whatever they do
    assert deform.directions.isfinite().all()


# ---- tangents: how far apart are images that may move? --------------------------------------

def blob(down=0.0, right=0.0, side=24):
    """A smooth blob (1,1,side,side), so many pixels from the middle."""
    place = torch.arange(side) - side / 2 + 0.5
    rows = (-(place - down).square() / 18).exp()
    columns = (-(place - right).square() / 18).exp()
    return (rows[:, None] * columns)[None, None]


def test_tangents_are_derivatives_of_warped_images():
    x = vae.blur(torch.rand(2, 1, 16, 16, generator=seeded()), 1.5)
    deform = deformations(1.0)
    found = vae.tangents(x, deform.directions)
    for k in range(3):
        w = 1e-2 * F.one_hot(torch.tensor([k, k]), 3).float()
        change = (vae.warp(x, deform.flow(w)) - vae.warp(x, deform.flow(-w))) / 2e-2
        inside = (change - found[:, :, k].view_as(x))[..., 1:-1, 1:-1]
        assert inside.abs().mean() < 0.05 * change.abs().mean()


def shifts(strength):
    """Deformations that know only shifts to the right, by a sixth of the side or so."""
    directions = torch.zeros(2, 28, 1)
    directions[0, 2] = 1 / 3
    return vae.Deformations(directions.flatten(0, 1), 24, 24, strength)


def test_an_image_is_near_what_a_learned_movement_makes_of_it():
    x = torch.cat([blob(), blob(right=2), blob(down=2)])
    near = torch.tensor([[1, 2], [0, 2], [0, 1]])
    moved = shifts(1.0).distances(x, near)
    still = shifts(0.0).distances(x, near)
    assert still[0, 0] == approx(float(still[0, 1]))    # both are as far, as pixels see it
    assert moved[0, 0] < 0.2 * still[0, 0]
    assert moved[0, 1] > 0.9 * still[0, 1]


def test_without_strength_distances_are_those_of_blurred_pixels():
    x = torch.rand(5, 1, 24, 24, generator=seeded())
    near = torch.tensor([[k for k in range(5) if k != row] for row in range(5)])
    pixels = F.avg_pool2d(vae.blur(x, 1), 2).flatten(1)
    wanted = torch.cdist(pixels, pixels).square().gather(1, near)
    assert torch.allclose(shifts(0.0).distances(x, near), wanted, rtol=1e-4)


def test_distances_are_the_least_over_deformations():
    """Of |difference - T w|^2 + noise |w|^2, found by least squares."""
    x = vae.blur(torch.rand(4, 1, 24, 24, generator=seeded()), 2)
    near = torch.tensor([[1, 2], [2, 3], [3, 0], [0, 1]])
    deform = deformations(0.5, height=24, width=24)
    small = F.avg_pool2d(vae.blur(x, 1), 2)
    pixels = small.flatten(1)
    noise = (pixels[near[:, 0]] - pixels).square().mean() / 2 + 1e-6
    slopes = vae.tangents(small, 0.5 * deform.directions)
    found = deform.distances(x, near)
    for i in range(4):
        tall = torch.cat([slopes[i], noise.sqrt() * torch.eye(3)])
        for k in range(2):
            goal = torch.cat([pixels[near[i, k]] - pixels[i], torch.zeros(3)])
            w = torch.linalg.lstsq(tall, goal[:, None]).solution
            least = (goal - (tall @ w)[:, 0]).square().sum()
            assert found[i, k] == approx(float(least), rel=1e-3)


def test_distances_of_bytes_and_of_colours_are_those_of_their_mean():
    x = as_bytes(torch.rand(3, 3, 24, 24, generator=seeded()))
    near = torch.tensor([[1], [2], [0]])
    grey = (x / 255).mean(1, keepdim=True)
    assert torch.allclose(shifts(0.5).distances(x, near), shifts(0.5).distances(grey, near),
                          rtol=1e-4)


# ---- what deformations do -------------------------------------------------------------------

def test_a_flow_is_the_strength_times_the_directions_times_their_weights():
    deform = deformations(0.5, height=12, width=20)
    w = noise(4, 3)
    v = torch.stack([0.5 * deform.directions @ row for row in w])
    close(deform.flow(w), vae.flow_of(v.view(4, 2, 28), 12, 20))


def test_random_flows_have_standard_normal_weights():
    deform = deformations(1.0)
    flows = deform.sample(3000, seeded()).flatten(1)
    basis = deform.flow(torch.eye(3)).flatten(1)
    weights = torch.linalg.lstsq(basis.T, flows.T).solution
    close(weights.cov(), torch.eye(3), atol=0.1, rtol=0)
    close(weights.mean(1), torch.zeros(3), atol=0.06, rtol=0)


def test_each_image_is_deformed_by_a_flow_of_its_own():
    deform = deformations(0.5)
    x = blobs(6)
    q = torch.eye(6)
    moved, same_q = deform(x, q, seeded())
    close(moved, vae.warp(x, deform.sample(6, seeded())))
    assert same_q is q


def test_where_a_mirror_makes_others_of_their_kind_half_of_them_are_mirrored():
    deform = deformations(0.0, mirror=True)
    x = torch.rand(600, 1, 16, 16, generator=seeded())
    moved, _ = deform(x, None, seeded())
    mirrored = (moved == x.flip(3)).flatten(1).all(1)
    plain = (moved == x).flatten(1).all(1)
    assert (mirrored ^ plain).all()
    assert part_of(mirrored) == approx(0.5, abs=0.06)


@pytest.mark.parametrize("strength, mirror", [(0.0, False), (0.0, True), (1.0, True)])
def test_a_batch_without_images_is_given_back(strength, mirror):
    x, q = deformations(strength, mirror)(torch.empty(0, 1, 16, 16), torch.eye(0), seeded())
    assert x.shape == (0, 1, 16, 16) and q.shape == (0, 0)


def test_a_repertoire_holds_no_flow_as_often_as_the_strength_is_below_one():
    flows = deformations(0.25, height=8, width=8).repertoire(2000, seeded())
    still = (flows == 0).flatten(1).all(1)
    assert part_of(still) == approx(0.75, abs=0.03)


def test_half_of_a_repertoire_mirrors_where_a_mirror_makes_others_of_their_kind():
    plain = deformations(0.5).repertoire(200, seeded())
    flows = deformations(0.5, mirror=True).repertoire(200, seeded())
    x = torch.rand(1, 1, 16, 16, generator=seeded()).expand(200, -1, -1, -1)
    straight = vae.warp(x, plain)
    seen = vae.warp(x, flows)
    mirrored = (seen - straight.flip(3)).flatten(1).abs().amax(1) < 1e-4
    unturned = (seen - straight).flatten(1).abs().amax(1) < 1e-4
    assert (mirrored ^ unturned).all()
    still = (plain == 0).flatten(1).all(1)
    for part in (mirrored[still], mirrored[~still]):
        assert part_of(part) == approx(0.5, abs=0.15)


def test_a_classifier_sees_mirrored_images_through_a_mirroring_repertoire():
    flows = deformations(0.0, mirror=True).repertoire(50, seeded())
    x = torch.rand(60, 3, 16, 16, generator=seeded())
    moved, _ = cnn.moving(flows.half())(x, None, seeded())
    mirrored = (moved - x.flip(3)).flatten(1).abs().amax(1) < 1e-4
    unturned = (moved - x).flatten(1).abs().amax(1) < 1e-4
    assert (mirrored ^ unturned).all()
    assert 10 < mirrored.sum() < 50


@pytest.mark.parametrize("strength, mirror, words", [
    (0.0, False, "no deformations"), (0.0, True, "no deformations, mirrored or not"),
    (0.25, False, "deformations of strength 0.25"),
    (1.0, True, "deformations of strength 1, mirrored or not")])
def test_deformations_in_words(strength, mirror, words):
    deform = deformations(strength, mirror)
    assert deform.words() == words
    assert deform.moves() == (words != "no deformations")


def test_deformations_rebuild_themselves():
    deform = deformations(0.25, True, 12, 20)
    again = vae.Deformations.restore({"deformations": deform.fields()})
    assert again.fields().keys() == deform.fields().keys()
    assert torch.equal(again.sample(5, seeded()), deform.sample(5, seeded()))
    assert again.mirror is True


# ---- morphs: two images in register ---------------------------------------------------------

def spot(column, row=8):
    """A bright spot (1,1,16,24)."""
    right, down = places(1, 16, 24)[0]
    distance = (right - column).square() + (down - row).square()
    return (-distance / 8).exp()[None, None]


def column_of(x):
    """Where the brightness of an image has its centre, to the right."""
    right = torch.arange(24.0)
    return ((x * right).sum() / x.sum()).item()


def meeting(first, second, t, strength=1.0):
    """Two images where they meet."""
    return vae.Morph(first, second, strength)(first, second, torch.tensor([0]),
                                              torch.tensor([t]))


def test_a_morph_is_halfway_where_the_object_is_halfway():
    a, b = meeting(spot(9), spot(14), 0.5)
    assert column_of(a) == approx(11.5, abs=0.3)
    assert column_of(b) == approx(11.5, abs=0.3)


def test_at_its_ends_a_morph_leaves_one_image_and_lays_the_other_on_it():
    first, second = spot(9), spot(14)
    a, b = meeting(first, second, 1.0)
    close(a, first)
    assert column_of(b) == approx(9, abs=0.4)
    a, b = meeting(first, second, 0.0)
    close(b, second)
    assert column_of(a) == approx(14, abs=0.4)


def test_images_come_as_far_towards_each_other_as_the_strength_says():
    a, b = meeting(spot(9), spot(14), 0.5, strength=0.4)
    assert column_of(a) == approx(10, abs=0.3)
    assert column_of(b) == approx(13, abs=0.3)


def test_a_morph_without_strength_is_a_cross_fade():
    a, b = meeting(spot(9), spot(14), 0.3, strength=0.0)
    close((a, b), (spot(9), spot(14)))


def test_a_morph_registers_every_pair_and_takes_those_asked_for():
    first = blobs(5).expand(-1, 3, -1, -1)
    second = blobs(5, seed=1).expand(-1, 3, -1, -1)
    meet = vae.Morph(first, second, batch=2)
    wanted = vae.register(first[:, :1], second[:, :1])
    close(meet.v, wanted, atol=1e-3, rtol=0)
    rows = torch.tensor([3, 0, 3])
    t = torch.tensor([0.2, 0.5, 0.8])
    seen = meet(first[rows], second[rows], rows, t)
    flow = vae.flow_of(meet.v[rows], 16, 16)
    w = t[:, None, None, None]
    close(seen, (vae.warp(first[rows], (w - 1) * flow), vae.warp(second[rows], w * flow)))


# ---- scores ---------------------------------------------------------------------------------

def test_scores_by_hand():
    q = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.9, 0.1]])
    y = torch.tensor([0, 1, 0, 0])
    nll = -math.log(0.8 * 0.6 * 0.3 * 0.9) / 4
    # Gaps by confidence: -0.4 +0.7 | -0.2 -0.1; two bins that miss by 0.3 each, of 4 images.
    assert common.scores(q, y, bins=2) == approx(
        {"accuracy": 0.75, "balanced_accuracy": 5 / 6, "nll": nll, "brier": 0.35,
         "ece": 0.15}, abs=1e-6)


def test_a_class_that_was_thought_impossible_costs_a_finite_number_of_nats():
    scores = common.scores(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert scores["nll"] == approx(math.log(1e12), rel=1e-5)


def test_unless_told_otherwise_the_ece_has_15_bins():
    confidence = torch.linspace(0.5, 1, 3000)
    right = (noise(3000) < 0).float()
    gaps = (confidence - right).view(15, 200).mean(1)
    ece = gaps.abs().mean().item()
    assert common.ece(confidence, right) == approx(ece, abs=1e-6)
    q = torch.stack([confidence, 1 - confidence], 1)
    y = (right == 0).long()
    assert common.scores(q, y)["ece"] == approx(ece, abs=1e-6)


def test_the_ece_does_not_depend_on_the_order_of_images():
    right = (torch.arange(90) % 3 == 0).float()             # one confidence, rightly stated
    third = torch.full((90,), 1 / 3)
    assert common.ece(third, right) == approx(0, abs=1e-6)
    assert common.ece(third, right.sort()[0]) == approx(0, abs=1e-6)


def overconfident(count):
    """Percentages of two classes that are stated at 0.9 and right in seven tenths."""
    q = torch.tensor([[0.9, 0.1]]).repeat(count, 1)
    y = (torch.arange(count) % 10 >= 7).long()
    return q, y


@pytest.mark.parametrize("count", [100, 1600])
def test_the_interval_of_the_ece_is_that_of_a_bootstrap(count):
    low, high = common.ece_interval(*overconfident(count), draws=2000)
    # With one confidence the ECE is |0.9 - accuracy|: binomial.
    half = 1.96 * math.sqrt(0.7 * 0.3 / count)
    assert low == approx(0.2 - half, abs=0.15 * half)
    assert high == approx(0.2 + half, abs=0.15 * half)


def test_the_interval_of_the_ece_is_the_same_every_time():
    few = overconfident(50)
    assert common.ece_interval(*few) == common.ece_interval(*few)
    assert common.ece_interval(*few) != common.ece_interval(*few, seed=1)


def test_reliability_leaves_out_what_is_too_certain_or_too_rare():
    stated = torch.tensor([0.3] * 100 + [0.5] * 10 + [0.01] * 50)
    q = torch.stack([stated, 1 - stated], 1)
    y = (torch.arange(160) >= 25).long()
    low, high = common.reliability(q, y)
    assert low == approx({"stated": 0.3, "observed": 0.25, "pairs": 100})
    assert high == approx({"stated": 0.7, "observed": 0.75, "pairs": 100})


def test_reliability_has_ten_bins_of_equal_width():
    q = torch.linspace(0.051, 0.949, 2000)
    q = torch.stack([q, 1 - q], 1)
    rows = common.reliability(q, torch.zeros(2000).long())
    stated = [row["stated"] for row in rows]
    assert stated == approx([0.095 + 0.09 * k for k in range(10)], abs=0.002)
    assert sum(row["pairs"] for row in rows) == 4000


def test_thirty_pairs_are_enough_for_a_row():
    q = torch.tensor([[0.3, 0.7]] * 30)
    assert len(common.reliability(q, torch.ones(30).long())) == 2
    assert not common.reliability(q[:29], torch.ones(29).long())


def test_a_ranking_is_a_line_a_class_the_likeliest_first():
    text = common.ranking(torch.tensor([0.25, 0.05, 0.7]), ANIMALS)
    assert text == " 70.0%  eel\n 25.0%  cat\n  5.0%  dog"


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0 s"),
    (59.4, "59 s"),
    (59.6, "1:00 min"),
    (185, "3:05 min"),
    (3599, "59:59 min"),
    (3600, "1:00 h"),
    (7800, "2:10 h")])
def test_a_clock_in_human_units(seconds, text):
    assert common.clock(seconds) == text


def first_line(what, monkeypatch, capsys):
    """What is said when one of four rounds of ten seconds is over."""
    seconds = itertools.count(0, 10)
    monkeypatch.setattr(common.time, "monotonic", seconds.__next__)
    progress = common.Progress(4, what)
    progress(1, "well")
    return capsys.readouterr().err.strip()


def test_a_step_by_itself_says_how_long_it_will_take(monkeypatch, capsys):
    monkeypatch.delenv("IN_CHAIN", raising=False)
    assert first_line("vae", monkeypatch, capsys) == "vae 1/4  well  30 s left"


def test_a_step_of_the_chain_says_when_all_will_be_done(monkeypatch, capsys):
    monkeypatch.setenv("IN_CHAIN", "yes")
    assert sum(common.CHAIN.values()) == approx(1)
    share = common.CHAIN["cnn"]
    left = common.clock(30 + 40 * common.CHAIN["subsets"] / share)
    line = first_line("cnn", monkeypatch, capsys)
    assert line == f"step 4 of 5: cnn 1/4  well  30 s left, {left} for all steps"


def test_when_the_last_step_is_done_all_is(monkeypatch, capsys):
    monkeypatch.setenv("IN_CHAIN", "yes")
    line = first_line("subsets", monkeypatch, capsys)
    assert line == "step 5 of 5: subsets 1/4  well  30 s left"


# ---- statistics of the comparison -----------------------------------------------------------

@pytest.mark.parametrize("df, t", [
    (1, 12.706),
    (4, 2.776),
    (9, 2.262),
    (30, 2.042)])
def test_quantiles_of_student(df, t):
    assert compare.t_quantile(df) == approx(t, abs=2e-3)


def test_an_interval_is_that_of_student():
    mean, half = compare.interval([1.0, 2.0, 3.0, 6.0])
    assert mean == 3
    assert half == approx(3.182 * math.sqrt(14 / 3) / 2, rel=1e-3)


def test_a_single_value_has_no_interval():
    assert compare.interval([5.0]) == (5, None)


@pytest.mark.parametrize("differences, p", [
    ([1] * 6, 2 / 64),
    ([1, -1] * 3, 1),
    ([3, 1, 1, 1, 1, -1], 12 / 64),
    ([0.7, 0.3, 0.1, 0.7, 0.3, 0.1], 2 / 64),           # whatever is rounded
    ([-1] * 16, 2 / 2 ** 16),
    ([1] * 5, None),
    ([1] * 17, None)])
def test_sign_flips_by_hand(differences, p):
    assert compare.sign_flip_p(differences) == p


@pytest.mark.parametrize("ps, corrected", [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
    ([0.6, 0.5], [1, 1]),
    ([0.01, 0.011], [0.02, 0.02]),
    ([], [])])
def test_the_correction_of_holm_by_hand(ps, corrected):
    assert compare.holm(ps) == approx(corrected)


def cells(n, arm, accuracies):
    """Rows of one size and arm, a subset each."""
    rows = []
    for seed, accuracy in enumerate(accuracies):
        row = dict.fromkeys(compare.AVERAGED, 0.5)
        rows.append({**row, "n": n, "seed": seed, "arm": arm, "accuracy": accuracy})
    return rows


def summed_up(rows, **how):
    """The entries of a summary, by size and arm."""
    table = {}
    for entry in compare.summarise(rows, **how):
        table[entry["n"], entry["arm"]] = entry
    return table


SMALL = [*cells(10, "real", [0.5, 0.6]),
         *cells(10, "mixup", [0.7, 0.7])]
LARGE = [*cells(20, "real", [0.5] * 6),
         *cells(20, "mixup", [0.61, 0.59] * 3),
         *cells(20, "real+hybrid", [0.41, 0.39] * 3)]


def test_a_summary_pairs_the_rows_of_one_subset():
    entry = summed_up(SMALL)[10, "mixup"]
    assert entry["subsets"] == 2
    assert entry["accuracy"] == approx(70)
    assert entry["accuracy_half"] == approx(0)
    assert entry["gain"] == approx(15)
    assert entry["gain_half"] == approx(12.706 * 5, rel=1e-3)
    assert entry["p"] is None


def test_pairs_are_found_whatever_the_order_of_rows():
    assert summed_up(SMALL[::-1]) == summed_up(SMALL)


def test_a_summary_tests_all_its_gains_together():
    table = summed_up(SMALL + LARGE)
    assert table[20, "mixup"]["p"] == 2 / 64
    assert table[20, "mixup"]["p_holm"] == table[20, "real+hybrid"]["p_holm"] == 4 / 64


def test_an_arm_alone_has_nothing_to_be_compared_with():
    entry = summed_up(cells(30, "mixup", [0.5]))[30, "mixup"]
    assert entry["accuracy_half"] is None
    assert "gain" not in entry


def test_real_has_no_gain_over_itself():
    assert "gain" not in summed_up(SMALL)[10, "real"]


def test_a_summary_against_another_arm():
    entry = summed_up(LARGE, base="mixup")[20, "real+hybrid"]
    assert entry["gain"] == approx(-20)


def test_every_other_figure_is_the_mean_of_its_rows():
    for key in compare.AVERAGED:
        first, second = cells(10, "real", [0.5, 0.5])
        first[key] = 0.2
        second[key] = 0.6
        entry = summed_up([first, second])[10, "real"]
        assert entry[key] == approx(0.4)


def test_from_half_of_the_pool_on_there_is_no_interval_and_no_p():
    entry = summed_up(LARGE, pool=39)[20, "mixup"]
    assert entry["hollow"]
    assert entry["gain"] == approx(10)
    assert entry["gain_half"] is None
    assert entry["accuracy_half"] is None
    assert entry["p"] is None
    assert not summed_up(LARGE, pool=40)[20, "mixup"]["hollow"]


@pytest.mark.parametrize("gain, half, said", [
    (3.0, 2.0, "better than real"),
    (-3.0, 2.0, "worse than real"),
    (3.0, 3.5, "inconclusive"),
    (-3.0, 3.5, "inconclusive"),
    (3.0, None, "inconclusive")])
def test_a_verdict_needs_an_interval_without_zero(gain, half, said):
    assert compare.verdict(gain, half) == said


def test_the_answer_is_a_sentence_a_size():
    sentence, = compare.answers(compare.summarise(LARGE))
    assert sentence == ("20 images: hybrids change accuracy by -10.0 ± 1.1 points "
                        "(6 subsets): worse than real")


@pytest.mark.parametrize("arm", ["mixup", "real+hybrid"])
def test_there_is_no_answer_without_a_pair_of_arms(arm):
    rows = cells(10, arm, [0.5, 0.6])
    assert not compare.answers(compare.summarise(rows))


@pytest.mark.parametrize("n, channels, steps", [
    (50, 1, 300),
    (100, 1, 300),
    (101, 1, 400),
    (300, 1, 400),
    (1000, 1, 800),
    (3000, 1, 1600),
    (3001, 1, 2400),
    (100, 3, 600),
    (9000, 3, 4800)])
def test_more_images_take_more_steps_and_colour_twice_as_many(n, channels, steps):
    assert compare.cnn_steps(n, channels) == steps


# ---- evaluation, and images made harder -----------------------------------------------------

def judged(sharpness):
    """`evaluate` of a classifier whose logits are so many times the true log-odds."""
    def logits_of(images):
        odds = (brightness(images.float()) - 127.5) / 40
        return sharpness * torch.stack([-odds / 2, odds / 2], 1)

    images = random_pixels(6000, 1, 1, 1).expand(-1, 1, 16, 16)
    chance = (logits_of(images) / sharpness).softmax(1)
    y = torch.multinomial(chance, 1, generator=seeded())[:, 0]
    x, validation = images.split([4000, 2000])
    y, validation_y = y.split([4000, 2000])
    scores = compare.evaluate(logits_of, x, y, validation, validation_y)
    return scores, common.scores(chance[:4000], y)


@pytest.mark.parametrize("sharpness", [0.3, 1, 4])
def test_one_temperature_undoes_over_and_underconfidence(sharpness):
    scores, true = judged(sharpness)
    assert scores["temperature"] == approx(sharpness, rel=0.15)
    assert scores["scaled_nll"] == approx(true["nll"], abs=0.01)
    assert scores["scaled_ece"] < 0.03


@pytest.mark.parametrize("sharpness, bound", [(0.01, 1 / 4), (100, 16)])
def test_the_temperature_of_a_classifier_stays_within_its_bounds(sharpness, bound):
    scores, _ = judged(sharpness)
    assert scores["temperature"] == approx(bound)


@pytest.mark.parametrize("sharpness", [0.3, 4])
def test_what_is_not_scaled_shows_over_and_underconfidence(sharpness):
    scores, true = judged(sharpness)
    assert scores["accuracy"] == true["accuracy"]
    assert scores["nll"] > true["nll"] + 0.05
    assert scores["ece"] > 0.1


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


def test_the_scores_of_harder_images_are_accuracies_on_those():
    images = random_pixels(100, 1, 16, 16)
    right_of = {"noise": 60, "blur": 70, "shift": 80}
    harder = compare.corrupt(images)

    def logits_of(seen):
        """Right about so many of the images, by which kind they are."""
        right = 90
        for name, count in right_of.items():
            if torch.equal(seen, harder[name]):
                right = count
        wrong = (torch.arange(100) >= right).float()
        return torch.stack([1 - wrong, wrong], 1)

    y = torch.zeros(100).long()
    scores = compare.evaluate(logits_of, images, y, images, y)
    assert scores["accuracy"] == approx(0.9)
    found = {name: scores[name] for name in right_of}
    assert found == approx({"noise": 0.6, "blur": 0.7, "shift": 0.8})


def test_noise_is_normal_with_15_hundredths():
    grey = torch.full((50, 1, 20, 20), 128).byte()
    noise = (compare.corrupt(grey)["noise"].float() - 128) / 255
    assert noise.mean() == approx(0, abs=0.005)
    assert noise.std() == approx(0.15, abs=0.003)
    # Of a normal, 4.6 in 100 are beyond two deviations, and 0.27 beyond three.
    beyond = [(noise.abs() > limit).float().mean() for limit in (0.3, 0.45)]
    assert beyond[0] == approx(0.0455, abs=0.005)
    assert beyond[1] == approx(0.0027, abs=0.002)


def test_noise_is_new_at_every_pixel_and_the_same_every_time():
    grey = torch.full((50, 3, 20, 20), 128).byte()
    noise = compare.corrupt(grey)["noise"]
    assert torch.equal(noise, compare.corrupt(grey)["noise"])
    assert not torch.equal(noise, compare.corrupt(grey, seed=1)["noise"])
    channels = noise.view(150, 400)
    assert len(channels.unique(dim=0)) == 150


def test_noise_stays_within_black_and_white():
    white = torch.full((9, 1, 20, 20), 255).byte()
    noise = compare.corrupt(white)["noise"]
    assert noise.float().mean() > 230   # nothing has gone round to black
    assert (noise == 255).float().mean() == approx(0.5, abs=0.03)


def test_a_blur_is_the_mean_of_nine_pixels():
    x = random_pixels(5, 3, 16, 20)
    padded = F.pad(x.float(), (1, 1, 1, 1), mode="replicate")
    total = torch.zeros(5, 3, 16, 20)
    for down, right in itertools.product(range(3), range(3)):
        total += padded[:, :, down:down + 16, right:right + 20]
    blurred = compare.corrupt(x)["blur"]
    assert (blurred - total / 9).abs().max() < 0.51


def test_a_shift_is_by_two_pixels_down_and_right():
    x = random_pixels(5, 3, 16, 20)
    shifted = compare.corrupt(x)["shift"]
    assert shifted.shape == x.shape
    assert torch.equal(shifted[..., 2:, 2:], x[..., :-2, :-2])
    for edge in (0, 1):                 # the border is continued
        assert torch.equal(shifted[..., edge, 2:], x[..., 0, :-2])
        assert torch.equal(shifted[..., 2:, edge], x[..., :-2, 0])


# ---- training: both networks, one loop ------------------------------------------------------

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
        next_batch = cnn.batches((x, F.one_hot(y, 3).float()), 8)
    how.setdefault("generator", seeded(seed))
    rows = module.fit(model, next_batch, steps=steps, rounds=rounds, **how)
    return model, next_batch, rows


def trained(module, **how):
    """The weights after a tiny training."""
    model, _, rows = tiny_training(module, **how)
    list(rows)
    return model.state_dict()


@pytest.fixture
def taken():
    """What the optimiser is about to do at each step: its kind and its settings."""
    steps = []

    def note(optimiser, args, keywords):
        group, = optimiser.param_groups
        steps.append({**group, "kind": type(optimiser)})

    hook = register_optimizer_step_pre_hook(note)
    yield steps
    hook.remove()


@NETWORKS
def test_the_learning_rate_rises_over_15_hundredths_and_falls_to_zero(module, taken):
    trained(module, steps=100, lr=0.02)
    rates = [step["lr"] for step in taken]
    # The first step counts as one; the last is followed by zero.
    true = np.interp(range(100), [-1, 14, 15, 100], [0, 0.02, 0.02, 0])
    assert rates == approx(true)


@NETWORKS
def test_unless_told_otherwise_the_highest_rate_is_3_thousandths(module, taken):
    trained(module, steps=100)
    assert max(step["lr"] for step in taken) == approx(0.003)


@NETWORKS
def test_a_resumed_training_goes_on_with_its_learning_rates(module, taken):
    _, _, rows = tiny_training(module)
    half = list(itertools.islice(rows, 2))[-1]
    trained(module, state=half["state"])
    trained(module)
    rates = [step["lr"] for step in taken]
    assert rates[:12] == rates[12:]


@NETWORKS
def test_every_weight_is_trained(module, taken):
    model, _, rows = tiny_training(module)
    list(rows)
    trained_ones = {id(weight) for weight in taken[0]["params"]}
    assert trained_ones == {id(weight) for weight in model.parameters()}


@pytest.mark.parametrize("how, momentum", [
    ({}, 0.9),
    ({"momentum": 0.5}, 0.5)])
def test_a_vae_is_trained_by_adam_with_the_momentum_asked_for(taken, how, momentum):
    trained(vae, **how)
    assert taken[0]["kind"] is torch.optim.Adam
    assert taken[0]["betas"] == (momentum, 0.99)
    assert taken[0]["weight_decay"] == 0


@pytest.mark.parametrize("how, decay", [
    ({}, 0.05),
    ({"weight_decay": 0.3}, 0.3)])
def test_a_cnn_is_trained_by_adamw_with_the_decay_asked_for(taken, how, decay):
    trained(cnn, **how)
    assert taken[0]["kind"] is torch.optim.AdamW
    assert taken[0]["betas"] == (0.9, 0.999)
    assert taken[0]["weight_decay"] == decay


@NETWORKS
@pytest.mark.parametrize("steps, rounds, ends", [
    (12, 4, [3, 6, 9, 12]),
    (3, 10, [1, 2, 3]),
    (7, 2, [4, 7])])
def test_a_row_tells_where_its_round_ends(module, steps, rounds, ends):
    _, _, rows = tiny_training(module, steps, rounds)
    rows = list(rows)
    assert [row["step"] for row in rows] == ends
    assert [row["state"]["step"] for row in rows] == ends


@NETWORKS
def test_unless_told_otherwise_there_are_ten_rounds(module):
    model, next_batch, _ = tiny_training(module)
    rows = module.fit(model, next_batch, steps=20, generator=seeded())
    assert len(list(rows)) == 10


@NETWORKS
def test_a_row_counts_the_images_of_its_seconds(module, monkeypatch):
    seconds = itertools.count()         # a clock that is looked at twice a round
    monkeypatch.setattr(module.time, "perf_counter", seconds.__next__)
    _, _, rows = tiny_training(module)
    assert [row["images_per_second"] for row in rows] == [8 * 3] * 4


def test_a_row_of_the_cnn_holds_the_mean_loss_of_its_round():
    model, next_batch, rows = tiny_training(cnn, steps=6, rounds=2, lr=0.0)
    generator = seeded()
    for row in rows:
        losses = []
        for step in range(3):
            x, q = next_batch(generator, 0)
            losses.append(F.cross_entropy(model(x), q).item())
        assert row["loss"] == approx(np.mean(losses), rel=1e-4)


def test_a_row_of_the_vae_holds_the_mean_nats_of_its_round():
    model, next_batch, rows = tiny_training(vae, steps=6, rounds=2, lr=0.0)
    generator = seeded()
    for row in rows:
        sums = np.zeros(2)
        for step in range(3):
            x = next_batch(generator)
            logits, mu, logvar = model(x, generator)
            for k, term in enumerate(vae.elbo_terms(logits, x, mu, logvar)):
                sums[k] += term.item()
        assert [row["reconstruction"], row["kl"]] == approx(sums / 3, rel=1e-4)


def has_gradients_of(loss, model):
    """Is the model left with these?"""
    true = torch.autograd.grad(loss, list(model.parameters()))
    for weight, gradient in zip(model.parameters(), true):
        close(weight.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how, beta", [
    ({}, 1),
    ({"beta": 7}, 7)])
def test_the_vae_goes_down_the_gradient_of_its_last_batch(how, beta):
    model, next_batch, rows = tiny_training(vae, steps=2, rounds=1, lr=0.0, **how)
    list(rows)
    generator = seeded()
    for step in range(2):
        x = next_batch(generator)
        logits, mu, logvar = model(x, generator)
    reconstruction, kl = vae.elbo_terms(logits, x, mu, logvar)
    has_gradients_of(reconstruction + beta * kl, model)


def test_the_cnn_goes_down_the_gradient_of_its_last_batch():
    q = noise(8, 3).softmax(1)
    x = torch.rand(8, 1, 16, 16, generator=seeded())
    model, _, _ = tiny_training(cnn)
    rows = cnn.fit(model, lambda generator, done: (x, q), steps=2, rounds=1, lr=0.0,
                   generator=seeded())
    list(rows)
    loss = -(q * model(x).log_softmax(1)).sum(1).mean()
    has_gradients_of(loss, model)


def test_a_batch_of_the_cnn_is_told_how_much_is_over():
    model, next_batch, _ = tiny_training(cnn)
    told = []

    def asked(generator, done):
        told.append(done)
        return next_batch(generator, done)

    list(cnn.fit(model, asked, steps=4, rounds=2, generator=seeded()))
    assert told == [0, 0.25, 0.5, 0.75]


def test_predicting_between_rounds_does_not_change_the_training():
    model, _, rows = tiny_training(cnn)
    for row in rows:
        cnn.predict(model, easy(9)[0])
    assert same(model.state_dict(), trained(cnn))


def test_predictions_use_the_statistics_of_the_training():
    model, _, rows = tiny_training(cnn)
    list(rows)
    x, _ = easy(9)
    together = cnn.predict(model, x)
    close(cnn.predict(model, x[:1]), together[:1])
    assert same(model.state_dict(), trained(cnn))


@NETWORKS
def test_a_seed_gives_the_same_weights_and_another_gives_others(module):
    assert same(trained(module), trained(module))
    assert not same(trained(module), trained(module, seed=1))


@NETWORKS
def test_a_training_draws_from_its_generator_alone(module):
    _, _, rows = tiny_training(module)
    state = torch.get_rng_state()
    list(rows)
    assert torch.equal(state, torch.get_rng_state())


@NETWORKS
def test_a_state_from_a_file_resumes_the_straight_run(module, tmp_path):
    _, _, rows = tiny_training(module)
    half = list(itertools.islice(rows, 2))[-1]
    torch.save(half["state"], tmp_path / "state.pt")
    resumed = trained(module, state=read(tmp_path / "state.pt"), generator=seeded(5), seed=1)
    assert same(resumed, trained(module))


@NETWORKS
def test_the_state_of_an_earlier_row_is_still_its_own_when_all_is_over(module):
    _, _, rows = tiny_training(module)
    rows = list(rows)
    resumed = trained(module, state=rows[1]["state"], seed=1)
    assert same(resumed, trained(module))
    assert same(rows[-1]["state"]["model"], resumed)


@NETWORKS
def test_a_loss_that_is_not_finite_is_told_with_its_steps(module):
    model, _, rows = tiny_training(module)
    assert next(rows)["step"] == 3
    for weight in model.parameters():
        weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite between steps 3 and 6"):
        next(rows)


PRECISIONS = pytest.mark.parametrize("how, dtype", [
    ({"amp": True}, torch.bfloat16),
    ({}, torch.float32)])


@NETWORKS
@PRECISIONS
def test_training_computes_in_the_precision_asked_for(module, how, dtype):
    model, _, rows = tiny_training(module, steps=1, rounds=1, **how)
    seen = precisions(model)
    row, = rows
    assert seen == {dtype}
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def precisions(model):
    """A set that fills with the precisions that the model's convolutions compute in."""
    seen = set()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, args, out: seen.add(out.dtype))
    return seen


@PRECISIONS
def test_coding_and_predicting_compute_in_the_precision_asked_for(how, dtype):
    x, _ = easy(9)
    model, _, _ = tiny_training(vae)
    classifier, _, _ = tiny_training(cnn)

    def mu():
        return vae.encode_all(model, x, **how)[0]

    def decoded():
        return vae.decode_all(model, torch.zeros(9, 4), **how)

    def logits():
        return cnn.predict(classifier, x, **how)

    for network, ask in ((model, mu), (model, decoded), (classifier, logits)):
        seen = precisions(network)
        assert ask().dtype == torch.float32
        assert seen == {dtype}


@PRECISIONS
def test_an_evaluation_computes_in_the_precision_asked_for(how, dtype):
    model, _, _ = tiny_training(vae)
    seen = precisions(model)
    vae.evaluate(model, easy(9)[0], generator=seeded(), **how)
    assert seen == {dtype}


# ---- the networks ---------------------------------------------------------------------------

def test_the_elbo_is_a_likelihood_and_a_divergence():
    logits = noise(5, 3, 4, 4)
    x = (noise(5, 3, 4, 4, seed=1) < 0).float()
    mu, logvar = noise(2, 5, 7)
    likelihood = dist.Bernoulli(logits=logits).log_prob(x).sum() / 5
    posterior = dist.Normal(mu, (logvar / 2).exp())
    divergence = dist.kl_divergence(posterior, dist.Normal(0, 1)).sum(1).mean()
    close(vae.elbo_terms(logits, x, mu, logvar), (-likelihood, divergence))


class Echo(torch.nn.Module):
    """In place of a VAE: what it says of an image depends on that image alone."""

    def forward(self, x, generator):
        mu, logvar = x[:, 0, :2].unbind(1)
        return 4 * x - 2, mu, -logvar


def test_an_evaluation_of_many_images_is_the_mean_over_them():
    images = random_pixels(25, 1, 16, 16)
    images[20:] = 255                   # the last part, a smaller one, is unlike the others
    x = images / 255
    logits, mu, logvar = Echo()(x, None)
    reconstruction, kl = vae.elbo_terms(logits, x, mu, logvar)
    found = vae.evaluate(Echo(), images, generator=seeded(), batch=10)
    assert found == approx({"reconstruction": reconstruction.item(), "kl": kl.item(),
                            "negative_elbo": (reconstruction + kl).item()}, rel=1e-4)


def test_a_vae_decodes_draws_of_the_width_that_it_states():
    model, _, _ = tiny_training(vae)
    x = easy(9)[0] / 255
    logits, mu, logvar = model(x, seeded())
    close((mu, logvar), model.encode(x))
    z = mu + noise(9, 4) * logvar.exp().sqrt()
    close(logits, model.logits(z))


def test_the_width_of_a_code_stays_within_what_can_be_computed():
    model, _, _ = tiny_training(vae)
    for weight in model.encoder.parameters():
        weight.data.zero_()
    stated = torch.linspace(-70, 70, 8)         # mu, then logvar: 10, 30, 50, 70
    model.encoder[-1].bias.data = stated
    _, logvar = model.encode(easy(1)[0] / 255)
    assert logvar.tolist() == [[10, 10, 10, 10]]
    model.encoder[-1].bias.data = -stated
    _, logvar = model.encode(easy(1)[0] / 255)
    assert logvar.tolist() == [[-10, -10, -10, -10]]


SIDES = pytest.mark.parametrize("height, width", [
    (16, 16),
    (28, 28),
    (31, 31),
    (64, 64),
    (17, 40),
    (40, 17)])


@SIDES
@pytest.mark.parametrize("channels", [1, 3])
def test_a_vae_of_any_shape_codes_and_decodes_it(height, width, channels):
    images = random_pixels(7, channels, height, width)
    model = vae.VAE(channels, height, width, latent_dim=5, hidden=8, units=16)
    mu, logvar = vae.encode_all(model, images, batch=3)
    x = vae.decode_all(model, mu, batch=3)
    assert mu.shape == logvar.shape == (7, 5)
    assert x.shape == images.shape
    assert x.min() >= 0 and x.max() <= 1


@SIDES
def test_every_pixel_reaches_the_code(height, width):
    model = vae.VAE(1, height, width, latent_dim=5, hidden=8, units=16)
    x = torch.rand(1, 1, height, width, generator=seeded(), requires_grad=True)
    mu, logvar = model.encode(x)
    (mu.square().sum() + logvar.square().sum()).backward()
    assert (x.grad != 0).float().mean() > 0.9
    assert x.grad[..., -1, :].any()     # the last row
    assert x.grad[..., -1].any()        # the last column


@SIDES
def test_a_cnn_takes_any_shape(height, width):
    images = random_pixels(7, 3, height, width)
    model = cnn.CNN(3, 4, width=4, side=max(height, width))
    assert cnn.predict(model, images, batch=3).shape == (7, 4)


@pytest.mark.parametrize("split", [3, 7, 1000])
def test_images_in_parts_have_the_codes_and_predictions_of_all(split):
    x, _ = easy(7)
    model, _, _ = tiny_training(vae)
    classifier, _, _ = tiny_training(cnn)
    mu, _ = vae.encode_all(model, x, batch=split)
    close(mu, model.encode(x / 255)[0])
    close(vae.decode_all(model, mu, batch=split), model.decode(mu))
    close(cnn.predict(classifier, x, batch=split), classifier(x / 255))


@NETWORKS
def test_a_model_is_restored_from_its_config_and_weights(module):
    model = vae.VAE(3, 16, 20, 5, 8, 16)
    if module is cnn:
        model = cnn.CNN(3, 4, 8, 40)
    saved = {"config": model.config, "model": model.state_dict()}
    again = type(model).restore(saved)
    assert same(again.state_dict(), model.state_dict())
    assert not again.training


def filled(model):
    """The model, evaluating, with weights that are the same on every machine."""
    for weight in model.parameters():
        wave = torch.arange(weight.numel()).double().mul(0.7).sin()
        wave *= weight.numel() ** -0.25
        weight.data = wave.float().view(weight.shape)
    return model.eval()


def waves(side):
    """An image (1,1,side,side) that is the same on every machine."""
    wave = torch.arange(side ** 2).double().mul(0.3).sin()
    return (wave / 2 + 0.5).float().view(1, 1, side, side)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_layer_normalises_its_responses_and_learns_as_if_it_had_them(channels):
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


def test_the_first_layer_predicts_by_the_moments_that_it_has_seen():
    layer = cnn.NormalisedConvolution(1, 4)
    x = torch.rand(8, 1, 16, 16, generator=seeded())
    for _ in range(200):
        trained = layer(x)
    layer.eval()
    close(layer(x), trained, atol=1e-4, rtol=1e-4)
    close(layer(x[:2]), trained[:2], atol=1e-4, rtol=1e-4)      # whatever else is in the batch


# Of the networks as files of this format hold them: change one, and FORMAT with it.
@pytest.mark.parametrize("side, weights, codes_of, spread", [
    (28, 4572, [0.2441, 0.6114, 0.6945, 0.4509], 0.0897),
    (64, 9096, [1.1466, 1.7326, 1.5311, 0.6275], 0.0686)])
def test_a_vae_of_this_format_computes_what_it_did(side, weights, codes_of, spread):
    model = filled(vae.VAE(1, side, side, latent_dim=2, hidden=4, units=8))
    mu, logvar = model.encode(waves(side))
    assert common.FORMAT == 5
    assert sum(weight.numel() for weight in model.parameters()) == weights
    found = torch.cat([mu, logvar], 1)
    assert found[0].tolist() == approx(codes_of, abs=2e-4)
    assert model.decode(mu).std().item() == approx(spread, abs=2e-4)


@pytest.mark.parametrize("kind, shape, weights", [
    (vae.VAE, (1, 32, 32), 1_669_744),
    (vae.VAE, (1, 33, 33), 697_792),
    (cnn.CNN, (1, 10), 95_986),
    (cnn.CNN, (1, 10, 24, 32), 95_986),
    (cnn.CNN, (1, 10, 24, 33), 428_146)])
def test_a_network_of_this_format_has_so_many_weights(kind, shape, weights):
    model = kind(*shape)
    assert common.FORMAT == 5
    assert sum(weight.numel() for weight in model.parameters()) == weights


@pytest.mark.parametrize("side, weights, logits", [
    (28, 2782, [1.9016, -1.1787]), (64, 12_062, [2.43, -1.6487])])
def test_a_cnn_of_this_format_computes_what_it_did(side, weights, logits):
    model = filled(cnn.CNN(1, 2, width=4, side=side))
    assert common.FORMAT == 5
    assert sum(weight.numel() for weight in model.parameters()) == weights
    assert model(waves(side))[0].tolist() == approx(logits, abs=2e-4)


# ---- what people hand in: kinds of numbers, and ranges --------------------------------------

NUMBERS = pytest.mark.parametrize("dtype", [torch.float64, torch.half, torch.bfloat16])


def codes_as(dtype):
    mu, logvar, y = codes(200, 3)
    return mu.to(dtype), logvar.to(dtype), y.int()


@NUMBERS
@pytest.mark.parametrize("kind", KINDS)
def test_percentages_of_any_floats_and_labels_of_32_bits(kind, dtype):
    mu, logvar, y = codes_as(dtype)
    posterior = kind.fit(mu, logvar, y, 3)
    true = kind.fit(mu.float(), logvar.float(), y.long(), 3)
    assert torch.equal(posterior(mu), true(mu.float()))
    assert torch.equal(posterior(mu, logvar), true(mu.float(), logvar.float()))


@NUMBERS
def test_teaching_and_calibrating_take_any_floats(dtype):
    mu, logvar, y = codes_as(dtype)
    teacher = latent.teach(mu, logvar, y, 3)
    true = latent.teach(mu.float(), logvar.float(), y.long(), 3)
    assert teacher.temperature == true.temperature
    teacher.image_floor = true.image_floor = 0.0        # else the labels are too clear
    found = latent.best_temperature(teacher, mu, logvar, y)
    wanted = latent.best_temperature(true, mu.float(), logvar.float(), y.long())
    assert found == approx(wanted, rel=1e-3)


@NUMBERS
def test_labels_are_spread_over_any_floats(dtype):
    mu, _, y = codes_as(dtype)
    found = latent.spread_labels(mu, y[:100], 3)
    true = latent.spread_labels(mu.float(), y[:100].long(), 3)
    assert torch.equal(found.long(), true)


def linear_decoder(z):
    """Weights of 32 bits, as a network has them."""
    return (z @ noise(3, 256)).sigmoid().view(-1, 1, 16, 16)


@NUMBERS
@pytest.mark.parametrize("strategy", hybrids.STRATEGIES)
def test_hybrids_of_any_floats(strategy, dtype):
    mu, logvar, y = codes_as(dtype)
    posterior = latent.teach(mu, logvar, y, 3)
    known = latent.Codes(mu, logvar, y, posterior)
    true = latent.Codes(mu.float(), logvar.float(), y.long(), posterior)
    points = hybrids.sample(strategy, 40, known, seeded())
    close(points.z, hybrids.sample(strategy, 40, true, seeded()).z)
    rule = "density" if strategy == "prior" else "product"
    x, q = hybrids.make(points, known, easy(200)[0], linear_decoder, rule=rule)
    true_x, true_q = hybrids.make(points, true, easy(200)[0], linear_decoder, rule=rule)
    assert torch.equal(x, true_x)
    assert torch.equal(q, true_q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.half, torch.bfloat16, torch.int16,
                                   torch.int32, torch.int64])
def test_images_of_any_kind_of_number_are_read_alike(dtype):
    x, _ = easy(9)
    model, _, _ = tiny_training(vae)
    classifier, _, _ = tiny_training(cnn)
    same_images = x.to(dtype)
    if dtype.is_floating_point:
        same_images = (x / 255).to(dtype)
    loose = dict(atol=0.01, rtol=0)
    close(vae.encode_all(model, same_images), vae.encode_all(model, x), **loose)
    close(cnn.predict(classifier, same_images), cnn.predict(classifier, x), **loose)


OUTSIDE = pytest.mark.parametrize("spoil", [
    lambda x: x.float(),
    lambda x: x / 127.5 - 1,
    lambda x: x / 255 * 1.2,
    lambda x: x / 255 * math.nan,
    lambda x: x.int() + 100,
    lambda x: x.long() - 100],
    ids=["bytes as floats", "from -1 to 1", "above 1", "NaN", "above 255", "below 0"])


@OUTSIDE
def test_images_outside_their_range_are_not_coded(spoil):
    model, _, _ = tiny_training(vae)
    images = spoil(easy(9)[0])
    with pytest.raises(ValueError, match="wanted floats in .0, 1., or uint8"):
        vae.encode_all(model, images)
    with pytest.raises(ValueError, match="wanted floats in .0, 1., or uint8"):
        vae.evaluate(model, images, generator=seeded())


@OUTSIDE
def test_images_outside_their_range_are_not_predicted(spoil):
    model, _, _ = tiny_training(cnn)
    with pytest.raises(ValueError, match="wanted floats in .0, 1., or uint8"):
        cnn.predict(model, spoil(easy(9)[0]))


@OUTSIDE
@NETWORKS
def test_images_outside_their_range_make_no_batch(module, spoil):
    images = spoil(easy(9)[0])
    with pytest.raises(ValueError, match="wanted floats in .0, 1., or uint8"):
        if module is vae:
            vae.batches(images, 30)(seeded())
        else:
            cnn.batches((images, torch.eye(9)), 30)(seeded(), 0)


@OUTSIDE
def test_a_vae_is_not_trained_on_images_outside_their_range(spoil):
    model, _, _ = tiny_training(vae)
    images = spoil(easy(9)[0]).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="wanted floats in .0, 1., or uint8"):
        next(vae.fit(model, lambda generator: images, steps=3, generator=seeded()))
    assert same(before, model.state_dict())


def test_the_range_of_a_resumed_training_is_looked_at_as_well():
    _, _, rows = tiny_training(vae)
    half = next(rows)["state"]
    model, _, _ = tiny_training(vae)
    x = torch.full((3, 1, 16, 16), 2.0)
    rows = vae.fit(model, lambda generator: x, steps=12, state=half, generator=seeded())
    with pytest.raises(ValueError, match="images span 2 to 2"):
        next(rows)


# ---- the embedded digits, and the rows that train -------------------------------------------

@functools.cache
def digits():
    return common.glyphs()


def test_glyphs_have_their_numbers_shapes_and_classes():
    data = digits()
    assert data.images.dtype == torch.uint8
    assert data.images.shape == (10_000, 1, 28, 28)
    assert data.test_images.shape == (2_000, 1, 28, 28)
    assert data.labels.bincount().tolist() == [1000] * 10
    assert data.test_labels.bincount().tolist() == [200] * 10


def test_glyphs_are_the_same_every_time_and_draw_nothing_from_others():
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = common.glyphs()
    torch.set_rng_state(state)
    for found, true in zip(again.tensors(), digits().tensors()):
        assert torch.equal(found, true)
    digits()
    assert torch.equal(state, torch.get_rng_state())


def test_glyphs_are_those_of_the_results_that_stand_in_assets():
    data = digits()
    assert data.images.float().mean().item() == approx(35.887, abs=0.005)
    assert data.test_images.float().mean().item() == approx(30.507, abs=0.005)
    first = brightness(data.images[:5].float())
    assert first.tolist() == approx([38.17, 26.72, 48.46, 37.25, 26.97], abs=0.02)


def test_no_two_glyphs_are_alike():
    assert len(digits().images.flatten(1).unique(dim=0)) == 10_000


def test_the_validation_glyphs_are_those_of_other_fonts():
    data = digits()
    _, validation = common.split(data)
    assert torch.equal(validation, data.validation)
    assert torch.equal(validation, torch.arange(9000, 10_000))


def written(digit):
    """A digit as matplotlib writes it, white on black (28,28), 18 pixels high."""
    sheet = common.figure(2, 2)
    sheet.text(0.5, 0.5, digit, fontsize=72, ha="center", va="center")
    buffer = io.BytesIO()
    sheet.savefig(buffer)
    ink = ImageChops.invert(Image.open(buffer).convert("L"))
    ink = ink.crop(ink.getbbox())
    ink = ink.resize((round(18 * ink.width / ink.height), 18))
    page = Image.new("L", (28, 28))
    page.paste(ink, ((28 - ink.width) // 2, 5))
    return torch.from_numpy(np.array(page)).float()


@pytest.mark.parametrize("part", ["training", "test"])
def test_glyphs_are_digits_neither_mirrored_nor_upside_down(part):
    data = digits()
    images, labels = data.images, data.labels
    if part == "test":
        images, labels = data.test_images, data.test_labels
    for digit in (2, 3, 4, 5, 6, 7, 9):         # the others look alike from two sides
        true = written(str(digit))
        mean = images[labels == digit].float().mean((0, 1))
        likeness = (true * mean).sum()
        for axes in ([0], [1], [0, 1]):
            assert likeness > (true.flip(axes) * mean).sum()


def uneven():
    """Seven classes of unequal size."""
    x, y = easy(3000, classes=7)
    y[:500] = 6
    return common.Dataset(x, y, x, y, list("abcdefg"), "uneven")


SETS = pytest.mark.parametrize("make_set", [digits, uneven], ids=["glyphs", "uneven"])


@SETS
def test_pool_and_validation_are_all_training_images(make_set):
    data = make_set()
    pool, validation = common.split(data)
    count = len(data.labels)
    rows = torch.cat([pool, validation])
    assert torch.equal(rows.sort()[0], torch.arange(count))
    assert len(validation) == approx(count / 10, abs=4)


@SETS
@pytest.mark.parametrize("n", [100, 300])
def test_a_subset_holds_each_class_as_often_to_within_one(make_set, n):
    data = make_set()
    pool, _ = common.split(data)
    for seed in range(10):
        rows = common.subset(data, pool, n, seed)
        counts = data.labels[rows].bincount()
        assert counts.max() - counts.min() <= 1
        assert len(rows.unique()) == n
        assert torch.isin(rows, pool).all()


@SETS
def test_a_small_subset_is_in_a_large_one(make_set):
    data = make_set()
    pool, _ = common.split(data)
    for seed in range(10):
        small = common.subset(data, pool, 100, seed)
        assert torch.isin(small, common.subset(data, pool, 300, seed)).all()


@SETS
def test_subsets_of_ten_seeds_share_no_image(make_set):
    data = make_set()
    pool, _ = common.split(data)
    used = set()
    for seed in range(10):
        used.update(common.subset(data, pool, 100, seed).tolist())
    assert len(used) == 1000


@SETS
def test_after_ten_seeds_the_order_is_another(make_set):
    data = make_set()
    pool, _ = common.split(data)
    first = common.subset(data, pool, 100, 0)
    eleventh = common.subset(data, pool, 100, 10)
    assert not torch.equal(first, eleventh)


def test_what_is_held_out_is_the_same_on_every_machine():
    _, away = common.hold_out(torch.zeros(40).long(), torch.arange(40), 0.1)
    assert away.tolist() == [4, 5, 16, 21]


def test_validation_takes_one_image_of_a_small_class_and_not_the_only_one():
    labels = torch.tensor([0] * 40 + [1] * 2 + [2])
    kept, away = common.hold_out(labels, torch.arange(43), 0.1)
    assert labels[away].bincount().tolist() == [4, 1]
    assert labels[kept].bincount().tolist() == [36, 1, 1]
    assert torch.equal(torch.cat([kept, away]).sort()[0], torch.arange(43))


@SETS
def test_a_subset_of_all_is_the_pool(make_set):
    data = make_set()
    pool, _ = common.split(data)
    rows = common.subset(data, pool, len(pool), 3)
    assert torch.equal(rows.sort()[0], pool)


# ---- each file by itself --------------------------------------------------------------------

IMPORTS = """
import os, random, sys, numpy, torch
def state():
    return (str(random.getstate()), str(numpy.random.get_state()),
            torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_default_dtype(), list(sys.argv), dict(os.environ),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled())
before = state()
for name in "common vae latent hybrids cnn compare".split():
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
        shutil.copy(HERE / f"{name}.py", tmp_path)
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == tmp_path
        return module

    return alone


def test_vae_works_alone(alone):
    vae = alone("vae")
    model = vae.VAE(3, 20, 20, latent_dim=4)
    next_batch = vae.batches(torch.zeros(5, 3, 20, 20).byte(), 8)
    row = list(vae.fit(model, next_batch, steps=3, generator=seeded()))[-1]
    assert row["step"] == 3
    x = torch.zeros(5, 3, 20, 20)
    mu, _ = vae.encode_all(model, x)
    assert vae.decode_all(model, mu).shape == x.shape
    assert vae.evaluate(model, x, generator=seeded())["kl"] > 0
    images = torch.rand(8, 3, 20, 20, generator=seeded())
    deform = vae.Deformations.fit(images, torch.arange(8) % 2, seeded())
    deform.strength = 1.0
    moved, _ = deform(images, None, seeded())
    assert moved.shape == images.shape
    half = torch.full((8,), 0.5)
    meet = vae.Morph(images, images.flip(0))
    first, second = meet(images, images.flip(0), torch.arange(8), half)
    assert first.shape == second.shape == images.shape


def test_latent_works_alone(alone):
    latent = alone("latent")
    mu = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    logvar = torch.full((4, 1), -2.0)
    y = torch.tensor([0, 0, 1, 1])
    middle = torch.zeros(1, 1)
    teacher = latent.teach(mu, logvar, y, 2)
    gaussian = latent.Gaussian.fit(mu, logvar, y, 2)
    for posterior in (teacher, gaussian):
        assert latent.words(posterior(middle)[0], ["cat", "dog"]) == "50% cat + 50% dog"
    assert latent.spread_labels(mu, y, 2).tolist() == y.tolist()


class Undecided:
    """A posterior of one's own: all that hybrids ask of one."""
    prior = torch.tensor([0.5, 0.5])

    def __call__(self, z):
        return torch.full((len(z), 2), 0.5)


@pytest.mark.parametrize("strategy", hybrids.STRATEGIES)
def test_hybrids_work_alone(alone, strategy):
    hybrids = alone("hybrids")
    mu = torch.randn(6, 2, generator=seeded())
    known = types.SimpleNamespace(mu=mu, logvar=mu, y=torch.arange(6) % 2,
                                  posterior=Undecided())
    points = hybrids.sample(strategy, 10, known, seeded())
    rule = "density" if strategy == "prior" else "product"
    images = torch.zeros(6, 1, 16, 16).byte()
    x, q = hybrids.make(points, known, images, black, rule=rule, deform=as_negative,
                        morph=stand_ins()[0], generator=seeded())
    assert x.shape == (10, 1, 16, 16)
    close(q.sum(1), torch.ones(10))


def test_cnn_works_alone(alone):
    cnn = alone("cnn")
    real = (torch.zeros(9, 1, 16, 16).byte(), torch.eye(9))
    model = cnn.CNN(1, 9, width=4)
    move = cnn.moving(torch.zeros(3, 16, 16, 2))
    next_batch = cnn.batches(real, 4, real, cnn.mixup, transforms=[cnn.augment, cnn.elastic],
                             move=move)
    row = list(cnn.fit(model, next_batch, steps=3, generator=seeded()))[-1]
    assert math.isfinite(row["loss"])
    assert cnn.predict(model, real[0]).shape == (9, 9)


# ---- a GPU for machines without one: it finds what forgets where the tensors are ------------

class OnGpu(torch.Tensor):
    """A tensor that says it is on the device `gpu`; its numbers are in `true`."""

    @staticmethod
    def __new__(cls, true):
        self = torch.Tensor._make_wrapper_subclass(
            cls, true.shape, true.stride(), true.storage_offset(), dtype=true.dtype,
            device="gpu:0")
        self.true = true
        return self

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), keywords=None):
        return compute(operator, args, keywords or {})

    def tolist(self):
        WAITS.append("tolist")
        return self.true.tolist()

    def __deepcopy__(self, memo):
        return OnGpu(self.true.clone())


WAITS = []                              # what made the processor wait for the pretended GPU
TRUE_GENERATOR = torch.Generator


class OnGpuOrNot(TRUE_GENERATOR):
    """A generator that remembers for which device it was made."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.place = torch.device(device).type
        return self


def without_gpu(it):
    """What stands for it on the processor."""
    if isinstance(it, OnGpu):
        return it.true
    if isinstance(it, torch.device):
        return torch.device("cpu")
    return it


def compute(operator, args, keywords):
    """An operator's result, on the device of its tensors; two devices do not mix."""
    aten = torch.ops.aten
    tensors = []
    for leaf in pytree.tree_leaves((args, keywords)):
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
    here = {id(tensor.true): tensor for tensor in tensors if isinstance(tensor, OnGpu)}
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    # Copies are what moves tensors; rows and single numbers may come from the processor.
    may_mix = operator in (aten.copy_.default, aten.index.Tensor, aten.index_put_.default)
    mixed = bool(here) and any(tensor.dim() for tensor in elsewhere)
    assert may_mix or not mixed, f"tensors of two devices in {operator}"

    on_gpu = bool(here)
    if operator is aten.copy_.default:
        on_gpu = isinstance(args[0], OnGpu)
    elif keywords.get("device") is not None:
        on_gpu = torch.device(keywords["device"]).type == "gpu"
    if operator is aten._local_scalar_dense.default and here or here and not on_gpu:
        WAITS.append(str(operator))
    result = operator(*pytree.tree_map(without_gpu, args),
                      **pytree.tree_map(without_gpu, keywords))
    if not on_gpu:
        return result

    def as_ours(tensor):                # what was changed in place is the tensor it was
        return here[id(tensor)] if id(tensor) in here else OnGpu(tensor)

    return pytree.tree_map_only(torch.Tensor, as_ours, result)


class ComputeThere(TorchDispatchMode):
    """Makes new tensors where their `device` says."""

    def __torch_dispatch__(self, operator, types, args=(), keywords=None):
        return compute(operator, args, keywords or {})


class SameDevice(TorchFunctionMode):
    """Random numbers come from a generator of the device that they are for."""

    def __torch_function__(self, function, types, args=(), keywords=None):
        keywords = keywords or {}
        result = function(*args, **keywords)
        generator = keywords.get("generator")
        if isinstance(generator, OnGpuOrNot) and isinstance(result, torch.Tensor):
            assert generator.place == result.device.type, f"another device in {function}"
        return result


def moved(it, where):
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(where), it)


def install_gpu():
    """Tell torch and the scripts of the pretended GPU. It stays: for a process of its own."""
    import torch._dynamo                # both are to find the true torch.Generator
    import torch.distributed.tensor
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = list
    backend_registration._setup_privateuseone_for_python_backend("gpu", module)

    def copy_from(source, target, wait=False):
        without_gpu(target).copy_(without_gpu(source))
        return target

    def empty(size, *args, dtype=None, **keywords):
        return OnGpu(torch.ops.aten.empty(size, dtype=dtype))

    def empty_strided(size, stride, dtype=None, **keywords):
        return OnGpu(torch.ops.aten.empty_strided(size, stride, dtype=dtype))

    kernels = torch.library.Library("aten", "IMPL")     # what Python's brackets ask for
    kernels.impl("_copy_from", copy_from, "PrivateUse1")
    kernels.impl("empty.memory_format", empty, "PrivateUse1")
    kernels.impl("empty_strided", empty_strided, "PrivateUse1")
    torch.Generator = OnGpuOrNot
    torch.__future__.set_swap_module_params_on_conversion(True)
    return kernels                      # forgotten when it is deleted


def use_gpu_in_scripts():
    """The scripts compute there, and their files hold no tensor of it but unfinished work."""
    true_read = common.read
    true_write = common.write
    true_start = common.start

    def read_there(path, device="cpu"):
        return moved(true_read(path), device)

    def write_from_there(path, content):
        if path.suffix == ".png":       # takes longer than all else
            return
        left = any(isinstance(leaf, OnGpu) for leaf in pytree.tree_leaves(content))
        assert not left or path.name.endswith(".last.pt"), f"{path} needs a GPU"
        true_write(path, moved(content, "cpu") if left else content)

    def start_there(args):
        started = true_start(args)
        return dataclasses.replace(started, device=torch.device("gpu:0"), amp=False)

    common.read = read_there
    common.write = write_from_there
    common.start = start_there


def the_gpu_refuses_what_a_true_one_does():
    with pytest.raises(AssertionError, match="two devices"):
        torch.ones(2, device="gpu:0") + torch.ones(2)
    with pytest.raises(AssertionError, match="another device"):
        torch.rand(2, generator=torch.Generator("gpu:0"))


def there(fit, images, y, generator):
    """The deformations of `fit`, on the device of the images."""
    deform = fit(images, y, generator)
    deform.directions = deform.directions.to(images.device)
    return deform


def every_script_runs_there(folder):
    data = npz(folder / "tiny.npz")
    vae.Deformations.fit = functools.partial(there, found((0.5, True)))
    assert run("vae", "--dataset", data, "--steps", 4, "-o", folder) == 0
    assert run("latent", "-o", folder) == 0
    assert run("hybrids", "--count", 40, "-o", folder) == 0
    assert run("cnn", "--steps", 4, "--augment", "--mixup", 0.5, "--cutmix", 1,
               "-o", folder) == 0
    few = ["--sizes", 12, "--seeds", 1, "--steps", 3, "--vae-steps", 3, "--width", 4]
    grid = ["compare", *few, "--dataset", data, "-o", folder / "grid", "--arms"]
    assert run(*grid, "mixup+cutmix", "augment+hybrid", "deform", "latent posterior") == 0
    assert run(*grid, "real+hybrid", "--unlabelled") == 0


def hybrids_are_made_there():
    mu, logvar, y = (part.to("gpu:0") for part in codes(60, 2))
    known = latent.Codes(mu, logvar, y, latent.teach(mu, logvar, y, 3))
    generator = torch.Generator("gpu:0")
    images = easy(60)[0].to("gpu:0")
    for strategy in hybrids.STRATEGIES:
        points = hybrids.sample(strategy, 40, known, generator)
        for rule in hybrids.LABELS if points.i is not None else ["density"]:
            for part in hybrids.make(points, known, images, black, rule=rule, cut=True,
                                     generator=generator):
                assert part.device.type == "gpu"


def the_library_ends_run_there():
    generator = torch.Generator("gpu:0")
    x, y = (part.to("gpu:0") for part in easy(60))
    colour = x.float().repeat(1, 3, 1, 1) / 255
    assert cnn.augment(colour, None, generator)[0].device.type == "gpu"
    assert cnn.elastic(colour[:, :1], None, generator)[0].device.type == "gpu"
    moves = TRUE_FIT(x[:12], y[:12], generator)
    moves.strength = 0.5
    moves.mirror = True
    assert moves(colour, None, generator)[0].device.type == "gpu"
    move = cnn.moving(moves.repertoire(9, generator))
    assert move(colour, None, generator)[0].device.type == "gpu"
    assert moves.fields()["directions"].device.type == "cpu"
    first, second = colour[:4], colour[4:8]
    rows = torch.arange(4, device="gpu:0")
    for part in vae.Morph(first, second)(first, second, rows, rows / 4):
        assert part.device.type == "gpu"
    model = vae.VAE(1, 16, 16, 4).to("gpu:0")
    posterior = latent.teach(*vae.encode_all(model, x), y, 3)
    mixer = hybrids.HybridMixer(model.encode, model.decode, posterior, generator=generator)
    for part in mixer(x.float() / 255, y):
        assert part.device.type == "gpu"


def a_round_waits_once():
    """However many its steps: what is added is one wait a round."""
    for module in (vae, cnn):
        counts = []
        for steps, rounds in ((2, 1), (12, 1), (12, 3)):
            generator = torch.Generator("gpu:0")
            model, next_batch, _ = tiny_training(module)
            x, y = (part.to("gpu:0") for part in easy(60))
            next_batch = vae.batches(x, 8)
            if module is cnn:
                real = (x, F.one_hot(y, 3).float())
                next_batch = cnn.batches(real, 8, real, cnn.mixup, transforms=[cnn.augment])
            rows = module.fit(model.to("gpu:0"), next_batch, steps=steps, rounds=rounds,
                              generator=generator)
            WAITS.clear()
            list(rows)
            counts.append(len(WAITS))
        few, many, of_three_rounds = counts
        assert few == many
        assert of_three_rounds == few + 2


def check_the_pretended_gpu(folder):
    kernels = install_gpu()
    use_gpu_in_scripts()
    with ComputeThere(), SameDevice():
        the_gpu_refuses_what_a_true_one_does()
        the_library_ends_run_there()
        hybrids_are_made_there()
        a_round_waits_once()
        every_script_runs_there(Path(folder))
    del kernels


@pytest.mark.skipif("_setup_privateuseone_for_python_backend" not in dir(backend_registration),
                    reason="this torch has no devices in Python")
def test_nothing_forgets_the_device_of_its_tensors(tmp_path):
    name = Path(__file__).stem
    code = f"import {name}; {name}.check_the_pretended_gpu({str(tmp_path)!r})"
    done = shell(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no GPU")
def test_the_chain_runs_on_a_true_gpu_and_its_files_without(tree, tmp_path):
    there = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda')"]
    if subprocess.run(there, env=WITH_GPU, capture_output=True).returncode:
        pytest.skip("there is no GPU that torch can use")
    out = tmp_path / "run"
    words = ["make", "quick", f"PYTHON={sys.executable}", f"OUT={out}", "DEVICE=cuda",
             "COMPARE_FLAGS=--vae-steps 20 --jobs 2"]
    done = subprocess.run(words, cwd=tree, env=WITH_GPU, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((out / "compare.json").read_text())["rows"]) == 6
    assert run("latent", "-o", out) == run("hybrids", "-o", out) == 0   # on the processor


@pytest.mark.parametrize("device, cards, backend", [
    ("cuda", 2, "nccl"), ("cuda", 1, "gloo"), ("cpu", 2, "gloo")])
def test_ranks_without_a_card_each_talk_through_gloo(monkeypatch, device, cards, backend):
    chosen = []
    monkeypatch.setattr(common, "RANKS", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch, "Generator", lambda device: TRUE_GENERATOR())
    monkeypatch.setattr(torch.distributed, "init_process_group", chosen.append)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
    job = types.SimpleNamespace(device=torch.device(device), seed=0)
    _, size, _ = common.distribute(None, job, 8)
    assert size == 4
    assert chosen == [backend]


def test_ranks_that_do_not_divide_the_batch_are_refused(monkeypatch):
    monkeypatch.setattr(common, "RANKS", 3)
    with pytest.raises(common.Mistake, match="no multiple of the 3 ranks"):
        common.distribute(None, types.SimpleNamespace(device="cpu", seed=0), 8)


def test_every_rank_draws_other_numbers(monkeypatch):
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        job = types.SimpleNamespace(device=torch.device("cpu"), seed=7)
        _, _, generator = common.distribute(None, job, 8)
        drawn.append(generator.initial_seed())
    assert drawn == [7, 1_000_007]


def test_a_gpu_that_torch_has_no_code_for_is_told(tmp_path, capsys):
    def command(started, args):
        raise RuntimeError("CUDA error: no kernel image is available for execution")

    assert common.run_script(command, vae.parse_args(["-o", str(tmp_path)])) == 2
    assert "no code for this GPU; use --device cpu" in capsys.readouterr().err


def test_a_fault_of_the_program_itself_is_not_explained_away(tmp_path):
    def command(started, args):
        raise RuntimeError("any other")

    with pytest.raises(RuntimeError, match="any other"):
        common.run_script(command, vae.parse_args(["-o", str(tmp_path)]))


# ---- data sets ------------------------------------------------------------------------------

def alike(file, x, y, tests=60):
    """A data set file whose first images are the test images, too."""
    return npz(file, x_train=x, y_train=y, x_test=x[:tests], y_test=y[:tests])


def noise_images(n, *shape, seed=0):
    """Noise, uint8 (n,*shape)."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (n, *shape)).astype(np.uint8)


LAYOUTS = {
    "NHW": (GREY[:, 0], GREY),
    "N1HW": (GREY, GREY),
    "NHW1": (GREY.transpose(0, 2, 3, 1), GREY),
    "N3HW": (RGB, RGB),
    "NHW3": (RGB.transpose(0, 2, 3, 1), RGB),
    "floats in [0,1]": (GREY[:, 0] / 255, GREY),
    "floats in [0,255]": (GREY[:, 0].astype("f4"), GREY),
    "whole numbers": (RGB.astype("i8"), RGB),
    "binary": (GREY[:, 0] // 128, GREY // 128 * 255),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_every_layout_are_the_same_images(tmp_path, layout):
    given, wanted = LAYOUTS[layout]
    file = npz(tmp_path / "a.npz", x_train=given, x_test=given[:60])
    data = dataset(file, tmp_path)
    assert np.array_equal(data.images.numpy(), wanted)
    assert np.array_equal(data.test_images.numpy(), wanted[:60])
    assert data.images.dtype == torch.uint8


@pytest.mark.parametrize("names, wanted", [
    (None, ["3", "7", "9"]),
    (list("abc"), list("abc")),
    (list("0123456789"), ["3", "7", "9"])])
def test_labels_may_be_any_whole_numbers_and_names_go_with_them(tmp_path, names, wanted):
    y = np.array([3, 7, 9])[np.arange(200) % 3]
    classes = None if names is None else np.array(names)
    data = dataset(npz(tmp_path / "a.npz", y_train=y, y_test=y[:60],
                       classes=classes), tmp_path)
    assert data.classes == wanted
    assert data.labels.tolist() == [k % 3 for k in range(200)]


@pytest.mark.parametrize("side", [8, 80])
def test_sides_outside_16_to_64_are_resized(tmp_path, side):
    x = easy(200, side)[0].numpy()
    file = npz(tmp_path / "a.npz", x_train=x, x_test=x[:60])
    data = dataset(file, tmp_path, "--image-size", 24)
    assert data.images.shape == (200, 1, 24, 24)
    assert abs(data.images.float().mean() - x.mean()) < 2


@pytest.mark.parametrize("grey", [True, False], ids=["grey", "RGB"])
@pytest.mark.parametrize("parts, test", [
    ([""], 4),
    (["train"], 4),
    (["train", "test"], 18)])
def test_folders_of_mixed_pictures_become_one_data_set(tmp_path, grey, parts, test):
    for part in parts:
        zoo(tmp_path / "zoo" / part, grey)
    data = dataset(tmp_path / "zoo", tmp_path, "--image-size", 24)
    assert data.images.shape[0] == 18 * len(parts) - test
    assert data.images.shape[2:] == (24, 24)
    assert data.test_labels.bincount().tolist() == [test / 2] * 2
    assert data.classes == ["bird", "fish"]
    trained = (data.images, data.labels)
    tested = (data.test_images, data.test_labels)
    for x, y in (trained, tested):
        level = torch.tensor([60.0, 200.0])[y]
        gap = x[:, 0].float().mean((1, 2)) - level
        assert gap.abs().max() < 12     # palettes are coarse


def test_a_folder_is_decoded_once(tmp_path):
    zoo(tmp_path / "zoo")
    data = dataset(tmp_path / "zoo", tmp_path)
    stored, = tmp_path.glob("images-*.npy")
    before = stored.stat().st_mtime_ns
    again = dataset(tmp_path / "zoo", tmp_path)
    assert stored.stat().st_mtime_ns == before
    assert torch.equal(again.images, data.images)
    assert not unfinished(tmp_path)


def test_scripts_on_a_folder_of_colour_pictures(tmp_path):
    data = zoo(tmp_path / "zoo", per_class=16)
    out = tmp_path / "run"
    assert run("vae", "--dataset", data, "--image-size", 20, "-o", out, "--steps", 10,
               "--latent-dim", 1, "--images", 12) == 0
    assert run("latent", "-o", out, "--dataset", data) == 0         # at the side of vae.pt
    assert len(read(out / "latent.pt")["mu"]) == 12
    assert run("hybrids", "-o", out, "--count", 40, "--export", out / "png") == 0
    assert run("cnn", "-o", out, "--steps", 10, "--augment", "--images", 20) == 0
    assert read(out / "cnn.pt")["metrics"]["real_images"] == 20
    exported = next((out / "png").rglob("*.png"))
    assert Image.open(exported).mode == "RGB"
    assert len(list(out.glob("*.npy"))) == 1


def test_scripts_on_hardly_any_images(tmp_path, capsys, recwarn):
    data = npz(tmp_path / "tiny.npz")
    assert run("vae", "--dataset", data, "-o", tmp_path, "--steps", 3, "--images", 2,
               "--latent-dim", 2) == 0  # one of the three classes has none
    assert run("latent", "-o", tmp_path) == 0
    for strategy in ("between", "prior"):
        assert run("hybrids", "-o", tmp_path, "--count", 5, "--strategy", strategy) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1          # see `say_if_few`
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.skipif(not (REAL_DATA / "MNIST").is_dir(), reason="no MNIST in ../shared/data")
def test_mnist(tmp_path):
    data = dataset("mnist", tmp_path, "--data-dir", REAL_DATA)
    assert data.images.shape == (60_000, 1, 28, 28)
    assert len(data.test_images) == 10_000
    assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.classes[7] == "7"
    assert data.labels.bincount()[:2].tolist() == [5923, 6742]


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
    first, second = capsys.readouterr().err.splitlines()
    assert "downloading it" in first
    assert re.search("no route to host.*put its files into .*KMNIST.*dataset glyphs", second)


def test_no_fonts(tmp_path, capsys, monkeypatch):
    import matplotlib
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    assert "DejaVuSans.ttf" in mistake(capsys, "vae", "-o", tmp_path)


def test_a_collapsed_vae_is_said(tmp_path, capsys):
    data = npz(tmp_path / "tiny.npz")
    assert run("vae", "--dataset", data, "-o", tmp_path, "--steps", 20, "--beta", 1000) == 0
    assert "collapsed" in capsys.readouterr().out


# ---- pictures -------------------------------------------------------------------------------

def levels(picture):
    """The mean of each channel of a picture (C,H,W)."""
    means = np.asarray(picture).mean((1, 2))
    return means.round().tolist()


def test_one_pixel_and_a_name_beyond_ascii(tmp_path):
    file = tmp_path / "ein Löwe 🦁.png"
    colour = (10, 20, 30)
    Image.new("RGB", (1, 1), colour).save(file)
    pixels = common.read_image(file, (16, 16))
    assert levels(pixels) == [10, 20, 30]


def test_a_large_photograph_keeps_its_colour(tmp_path):
    picture = Image.new("RGB", (8000, 8000), (200, 100, 50))
    picture.save(tmp_path / "large.jpg")
    pixels = common.read_image(tmp_path / "large.jpg", (32, 32))
    assert levels(pixels) == approx([200, 100, 50], abs=3)


def on_its_side():
    """Light above, dark below, stored lying on its side; and the EXIF that says so."""
    upright = Image.new("L", (40, 40))
    upright.paste(255, (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    return upright.rotate(90), exif


def is_upright(file) -> bool:
    pixels = common.read_image(file, (16, 16))
    above = pixels[:, :6]
    below = pixels[:, -6:]
    return above.min() > 240 and below.max() < 15


def test_a_photograph_stands_upright(tmp_path):
    picture, exif = on_its_side()
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert is_upright(tmp_path / "turned.jpg")


def picture_that_claims(file, width, height):
    """A tiny PNG whose header states another size."""
    Image.new("L", (1, 1)).save(file)
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    picture_that_claims(tmp_path / "bomb.png", 10**5, 10**5)
    for name in ("empty", "text", "bomb"):
        with pytest.raises(common.Mistake, match=f"{name}.png cannot be read as an image"):
            common.read_image(tmp_path / f"{name}.png", (32, 32))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_picture_of_16_bits_stands_upright(tmp_path, suffix):
    picture, exif = on_its_side()
    deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    deep.save(tmp_path / f"deep.{suffix}", exif=exif)
    assert is_upright(tmp_path / f"deep.{suffix}")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_brought_upright_as_pil_does(tmp_path, orientation):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "noise.png"
    picture = Image.fromarray(noise_images(1, 16, 16)[0])
    picture.save(file, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file))
    pixels = common.read_image(file, (16, 16))
    assert np.array_equal(pixels[0], upright)


def test_exif_that_cannot_be_rewritten_does_no_harm(tmp_path):
    picture, exif = on_its_side()
    exif[0x0128] = 2
    broken = exif.tobytes().replace(b"\x28\x01\x03\x00", b"\x28\x01\x02\x00")
    picture.save(tmp_path / "camera.jpg", exif=broken)
    assert is_upright(tmp_path / "camera.jpg")


@pytest.mark.parametrize("kind", ["GIF", "JPEG"])
def test_pictures_called_gif_and_jfif_are_read(tmp_path, kind):
    file = tmp_path / {"GIF": "a.gif", "JPEG": "a.jfif"}[kind]
    other = Image.new("RGB", (20, 20))
    several = dict(save_all=True, append_images=[other]) if kind == "GIF" else {}
    picture = Image.new("RGB", (20, 20), (200, 100, 50))
    picture.save(file, kind, **several)
    pixels = common.read_image(file, (16, 16))
    assert levels(pixels) == approx([200, 100, 50], abs=3)
    assert common.pictures_in(tmp_path, []) == [str(file)]


# ---- damaged pictures -----------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["PCX", "TGA", "ICO"])
def test_no_other_readers_than_those_of_the_endings_are_tried(tmp_path, kind):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png", kind)
    with pytest.raises(common.Mistake, match="a.png cannot be read as an image"):
        common.read_image(tmp_path / "a.png", (16, 16))


BOARD = {"shape": [1, 16, 16], "ground": [0], "white": 1}       # facts of a grey data set


@pytest.mark.parametrize("kind", "PNG TIFF GIF BMP PPM WEBP JPEG".split())
def test_damaged_pictures_are_read_or_refused_in_one_line(tmp_path, kind):
    buffer = io.BytesIO()
    picture = Image.fromarray(noise_images(1, 16, 16, 3)[0])
    picture.save(buffer, kind)
    file = tmp_path / "a.png"
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        content = bytearray(buffer.getvalue())
        for place in draw.integers(0, min(len(content), 200), 4):
            content[place] = draw.integers(256)
        file.write_bytes(content)
        try:
            common.read_like(file, BOARD)
        except common.Mistake as mistaken:
            refused += 1
            assert str(file) in str(mistaken)
    assert refused


@pytest.mark.parametrize("error", [
    struct.error, NotImplementedError, RuntimeError, MemoryError, zlib.error, RecursionError])
def test_whatever_a_reader_raises_names_the_file(tmp_path, monkeypatch, error):
    def fails(*words, **more):
        raise error("too bad")

    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(common.Mistake, match="a.png cannot be read as an image .too bad"):
        common.read_image(tmp_path / "a.png", (16, 16))


def tiff_that_claims(file, width, height):
    """A tiny TIFF of 16 bits whose tags state another size."""
    picture = Image.fromarray(np.zeros((20, 30), np.uint16))
    picture.save(file, compression="tiff_lzw")
    content = file.read_bytes()
    for tag, old, new in ((256, 30, width), (257, 20, height)):
        entry = struct.pack("<HHLL", tag, 3, 1, old)
        assert entry in content
        content = content.replace(entry, struct.pack("<HHLL", tag, 3, 1, new))
    file.write_bytes(content)


@pytest.mark.parametrize("claim, name", [(picture_that_claims, "a.png"),
                                         (tiff_that_claims, "a.tif")])
def test_a_small_file_that_claims_many_pixels_is_refused_at_once(tmp_path, claim, name):
    claim(tmp_path / name, 12_000, 13_000)
    start = time.monotonic()
    with pytest.raises(common.Mistake, match=f"{name} cannot be read.*12000.*bytes"):
        common.read_image(tmp_path / name, (16, 16))
    assert time.monotonic() - start < 0.5


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
@pytest.mark.parametrize("name", ["a.png", "a.npz"])
def test_a_named_pipe_is_no_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(common.Mistake, match="no regular file"):
        if name == "a.png":
            common.read_image(tmp_path / name, (16, 16))
        else:
            dataset(tmp_path / name, tmp_path / "run")


# ---- one geometry for training and prediction -----------------------------------------------

def bars(n, height, width, seed=0):
    """Noise, and a bright bar whose place along the longer side is the class of three."""
    x = torch.rand(n, 1, height, width, generator=seeded(seed)) * 80
    y = torch.arange(n) % 3
    longer = max(height, width)
    for c in range(3):
        bar = slice(c * longer // 3, (c + 1) * longer // 3)
        if height >= width:
            x[y == c, :, bar] += 150
        else:
            x[y == c, :, :, bar] += 150
    return x[:, 0].byte().numpy(), y.numpy()


def bars_npz(file, height, width):
    x, y = bars(200, height, width, seed=1)
    x_test, y_test = bars(60, height, width, seed=2)
    return npz(file, x_train=x, y_train=y, x_test=x_test, y_test=y_test)


def save_as_pictures(folder, images):
    """Images (N,H,W) or (N,H,W,3) as PNG files 000.png, 001.png, ..."""
    folder.mkdir()
    for k, image in enumerate(np.asarray(images)):
        Image.fromarray(image).save(folder / f"{k:03}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("height, width", [
    (16, 64),
    (64, 16),
    (28, 28),
    (40, 33)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_the_data_sets_shape_goes_through_untouched(tmp_path, height, width,
                                                                 channels):
    x = noise_images(6, height, width, channels)
    file = alike(tmp_path / "a.npz", x, np.arange(6) % 3)
    data = dataset(file, tmp_path)
    assert data.images.shape == (6, channels, height, width)
    pictures = x[..., 0] if channels == 1 else x
    for file, image in zip(save_as_pictures(tmp_path / "in", pictures), data.images):
        like, _ = common.read_like(file, data.facts())
        assert torch.equal(like[0], image)


def test_a_picture_of_another_shape_is_cut_and_not_stretched(tmp_path):
    x, y = bars(6, 16, 64)
    file = alike(tmp_path / "a.npz", x, y)
    facts = dataset(file, tmp_path).facts()
    square = noise_images(1, 64, 64)
    picture, = save_as_pictures(tmp_path / "in", square)
    like, _ = common.read_like(picture, facts)
    assert np.array_equal(like[0], square[:, 24:40])


@pytest.mark.parametrize("height, width", [(16, 64), (40, 20)])
def test_prediction_is_as_right_as_the_test_was(tmp_path, capsys, height, width):
    data = bars_npz(tmp_path / "bars.npz", height, width)
    out = tmp_path / "run"
    assert run("cnn", "--dataset", data, "--hybrid-fraction", 0, "--steps", 60, "--width", 8,
               "-o", out) == 0
    assert read(out / "cnn.pt")["metrics"]["accuracy"] > 0.97
    x, y = bars(60, height, width, seed=2)
    save_as_pictures(tmp_path / "in", x)
    capsys.readouterr()
    assert run("cnn", "-o", out, "--predict", tmp_path / "in") == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    predicted = [ANIMALS.index(row["likeliest"]) for row in rows]
    assert len(predicted) == 60
    assert np.mean(predicted == y) > 0.97


def test_images_that_are_too_long_are_cut_to_their_middle_square_and_it_is_said(tmp_path,
                                                                                capsys):
    x = np.zeros((9, 30, 90), np.uint8)
    x[:, :, 30:60] = 200
    x[:, :, 30:45] = 100                # only this is in the middle square
    file = alike(tmp_path / "a.npz", x, np.arange(9) % 3)
    data = dataset(file, tmp_path, "--image-size", 20)
    assert data.images.shape == (9, 1, 20, 20)
    assert data.images[..., :9].unique().tolist() == [100]
    assert data.images[..., 11:].unique().tolist() == [200]
    assert "of 30x90 pixels, the middle squares are scaled to 20x20" in capsys.readouterr().err
    picture, = save_as_pictures(tmp_path / "in", x[:1])
    like, _ = common.read_like(picture, data.facts())
    gap = like[0].float() - data.images[0]
    assert gap.abs().max() < 12


STILL = dict(degrees=0, scale=0, shear=0, shift=0)


@pytest.mark.parametrize("height, width", [
    (16, 64),
    (64, 16),
    (24, 40)])
@pytest.mark.parametrize("flags", [
    dict(degrees=15),
    dict(shear=0.15),
    dict(degrees=15, scale=0.15, shear=0.15)])
def test_an_affine_map_is_that_of_the_pixels_whatever_the_shape(height, width, flags):
    """What a window sees of a map of the whole square is the map of what it sees."""
    axis = torch.arange(64.0)
    wave = torch.sin(axis / 9).outer(torch.cos(axis / 7))
    square = wave.expand(20, 1, 64, 64)
    top = (64 - height) // 2
    left = (64 - width) // 2
    rows = slice(top, top + height)
    columns = slice(left, left + width)
    flags = STILL | flags
    whole, _ = cnn.affine(square, None, seeded(), **flags)
    part, _ = cnn.affine(square[..., rows, columns], None, seeded(), **flags)
    middle = slice(30, 34)              # of the square: the border is not the same
    seen = part[..., 30 - top:34 - top, 30 - left:34 - left]
    assert (whole[..., middle, middle] - seen).abs().max() < 1e-3


@pytest.mark.parametrize("height, width", [
    (16, 64),
    (64, 16),
    (28, 28)])
def test_a_shift_is_a_tenth_of_its_side_at_most(height, width):
    down = torch.arange(64.0)[:height, None].expand(height, width)
    right = torch.arange(64.0)[None, :width].expand(height, width)
    for ramp, side in ((down, height), (right, width)):
        x = ramp.expand(300, 1, height, width)
        flags = STILL | {"shift": 0.1}
        moved, _ = cnn.affine(x, None, seeded(), **flags)
        gaps = (moved - x)[..., height // 2, width // 2]
        most = gaps.abs().max().item()
        assert 0.09 * side < most <= 0.1 * side + 1e-3


# ---- pixels: one rule for a whole data set --------------------------------------------------

def scaled_npz(file, factor, offset=0.0, dtype=np.float64, **changes):
    """The tiny data set with pixels value / 255 * factor + offset."""
    arrays = {}
    for part, count in (("train", 200), ("test", 60)):
        x = easy(count, seed=count)[0].numpy()
        arrays[f"x_{part}"] = (x / x.max() * factor + offset).astype(dtype)
    return npz(file, **(arrays | changes))


SCALES = {
    "one pixel a little above 1": (1.0000002, np.float64, 1),
    "floats to 1.02": (1.02, np.float32, 1),
    "floats to 1.25": (1.2499, np.float32, 1),
    "half precision": (1.0, np.float16, 1),
    "floats to 260": (260.4, np.float64, 255),
    "10 bits": (1023, np.uint16, 1023),
    "12 bits": (4000, np.int32, 4095),
    "14 bits": (16383, np.int64, 16383),
    "16 bits": (65535, np.uint16, 65535),
    "whole floats of 12 bits": (4095, np.float32, 4095),
}


@pytest.mark.parametrize("name", SCALES)
def test_pixels_of_every_usual_scale_are_read(tmp_path, capsys, name):
    factor, dtype, white = SCALES[name]
    file = scaled_npz(tmp_path / "a.npz", factor, dtype=dtype)
    if white == 4095 and dtype == np.float32:
        given = np.load(file)
        changes = {part: given[part].round() for part in ("x_train", "x_test")}
        npz(file, **changes)
    data = dataset(file, tmp_path)
    for part, images in (("x_train", data.images), ("x_test", data.test_images)):
        given = np.load(file)[part].astype(np.float64)
        wanted = (given * 255 / white).clip(0, 255)
        assert np.abs(images.numpy() - wanted).max() <= 0.6
    assert data.facts()["white"] == white
    said = f"read as [0, {white}]" in capsys.readouterr().err
    assert said == (given.max() != white)


BAD_SCALES = {
    "negative": (dict(factor=2.0, offset=-1.0), r"span -1 to 1; wanted numbers in \[0, 1\]"),
    "a little negative": (dict(factor=1.0, offset=-0.01), "wanted numbers in"),
    "above 16 bits": (dict(factor=70_000, dtype=np.int32), "wanted numbers in"),
    "infinite": (dict(factor=math.inf), "wanted numbers in"),
    "neither 1 nor 255": (dict(factor=2.8), r"wanted \[0, 1\] or \[0, 255\]"),
    "two scales": (dict(factor=1.0, x_test=easy(60)[0].numpy()), "wanted one scale"),
    "complex": (dict(factor=1.0, dtype=np.complex64), "complex64; wanted numbers"),
    "text": (dict(factor=1, x_train=np.full((200, 16, 16), "white")), "wanted numbers"),
}


@pytest.mark.parametrize("name", BAD_SCALES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_pixels_of_no_known_scale_are_refused(tmp_path, capsys, name):
    changes, pattern = BAD_SCALES[name]
    file = scaled_npz(tmp_path / "a.npz", **changes)
    line = mistake(capsys, "vae", "--dataset", file, "-o", tmp_path / "run")
    assert re.search(pattern, line), line


def test_train_and_test_are_read_by_one_rule(tmp_path):
    x = easy(60)[0].numpy() / 255
    wider = easy(200)[0].numpy() / 255 * 1.2
    file = npz(tmp_path / "a.npz", x_train=wider, x_test=x)
    data = dataset(file, tmp_path)
    assert torch.equal(data.test_images, easy(60)[0])


@pytest.mark.parametrize("shape", [
    (0, 28),
    (28, 0),
    (0, 0)])
def test_images_without_pixels_are_refused(tmp_path, capsys, shape):
    empty = {f"x_{part}": np.zeros((count, *shape), np.uint8)
             for part, count in (("train", 200), ("test", 60))}
    file = npz(tmp_path / "a.npz", **empty)
    line = mistake(capsys, "vae", "--dataset", file, "-o", tmp_path / "run")
    assert f"images of {shape[0]}x{shape[1]} pixels" in line


DEEP = {
    "12 bits in a PNG": (np.uint16, 4000, 4095, "png"),
    "16 bits in a PNG": (np.uint16, 65535, 65535, "png"),
    "12 bits in a TIFF": (np.uint16, 4095, 4095, "tif"),
    "8 bits in 32": (np.int32, 255, 255, "tif"),
    "16 bits in 32": (np.int32, 60_000, 65535, "tif"),
    "floats to 1": (np.float32, 1.0, 1, "tif"),
    "floats to 1.02": (np.float32, 1.02, 1, "tif"),
    "floats to 255": (np.float32, 254.5, 255, "tif"),
}


def deep_folder(root, dtype, highest, suffix):
    """Two classes of ramps from 0; those of the class bird are ten times darker."""
    ramp = np.linspace(0, highest, 32 * 32).reshape(32, 32)
    for name, level in (("bird", 0.1), ("fish", 1.0)):
        (root / name).mkdir(parents=True)
        for k in range(6):
            pixels = level * np.roll(ramp, k)
            picture = Image.fromarray(pixels.astype(dtype))
            picture.save(root / name / f"{k}.{suffix}")
    return root


@pytest.mark.parametrize("name", DEEP)
def test_deep_pictures_of_a_folder_have_one_white(tmp_path, capsys, name):
    dtype, highest, white, suffix = DEEP[name]
    root = deep_folder(tmp_path / "deep", dtype, highest, suffix)
    data = dataset(root, tmp_path)
    birds = data.images[data.labels == 0]
    fish = data.images[data.labels == 1]
    assert birds.max() == approx(25.5 * highest / white, abs=1)
    assert fish.max() == approx(min(255, 255 * highest / white), abs=1)
    assert data.facts()["white"] == white
    said = f"read as [0, {white}]" in capsys.readouterr().err
    assert said == (highest != white)
    again = dataset(root, tmp_path)     # from the stored images
    assert again.facts() == data.facts()


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_picture_is_predicted_as_it_was_trained(tmp_path, name):
    dtype, highest, _, suffix = DEEP[name]
    root = deep_folder(tmp_path / "deep", dtype, highest, suffix)
    data = dataset(root, tmp_path)
    like, _ = common.read_like(root / "bird" / f"1.{suffix}", data.facts())
    same_pixels = (data.images == like).flatten(1)
    assert same_pixels.all(1).any()     # a dark one, too


def ramp_picture(file, lowest, highest, dtype=np.float32):
    """A picture of 16x16 pixels, from the lowest to the highest value."""
    ramp = np.linspace(lowest, highest, 256).reshape(16, 16)
    Image.fromarray(ramp.astype(dtype)).save(file)
    return file


@pytest.mark.parametrize("dtype, highest, white", [
    (np.float32, 1.0, 1),
    (np.float32, 0.7, 1),
    (np.uint16, 65535, 65535),
    (np.int32, 4000, 4095),
    (np.uint16, 255, 255)])
def test_a_deep_picture_for_a_set_of_bytes_is_judged_by_itself(chain, tmp_path, dtype, highest,
                                                               white):
    file = ramp_picture(tmp_path / "a.tif", 0, highest, dtype)
    facts = read(chain / "cnn.pt")["dataset"]
    like, report = common.read_like(file, facts)
    assert like.max() == approx(255 * highest / white, abs=1)
    assert (f"read as [0, {white}]" in report) == (highest != white)


@pytest.mark.parametrize("lowest, highest", [
    (-1, 1),
    (0, 2.8),
    (0, 70_000),
    (0, math.nan)])
def test_a_deep_picture_of_no_known_scale_is_refused_by_name(tmp_path, lowest, highest):
    file = ramp_picture(tmp_path / "a.tif", lowest, highest)
    with pytest.raises(common.Mistake, match="a.tif.*wanted "):
        common.read_like(file, BOARD)


def test_a_dark_picture_of_floats_is_read_as_its_data_set_was(tmp_path):
    file = ramp_picture(tmp_path / "a.tif", 0, 20.5)
    like, _ = common.read_like(file, BOARD | {"white": 255})
    assert like.max() == 20


# ---- labels and names -----------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["U", "S"])
def test_labels_may_be_names(tmp_path, kind):
    names = np.array(["dog", "eel", "cat"], kind)
    y = names[np.arange(200) % 3]
    file = npz(tmp_path / "a.npz", y_train=y, y_test=y[:60], classes=None)
    data = dataset(file, tmp_path)
    assert data.classes == ["cat", "dog", "eel"]
    assert data.labels[:6].tolist() == [1, 2, 0, 1, 2, 0]
    assert data.test_labels[:3].tolist() == [1, 2, 0]


def test_a_name_that_training_lacks_is_said(tmp_path, capsys):
    y = np.array(["cat", "dog"])[np.arange(200) % 2]
    y_test = np.array(["cat", "owl"])[np.arange(60) % 2]
    file = npz(tmp_path / "a.npz", y_train=y, y_test=y_test, classes=None)
    assert "owl" in mistake(capsys, "vae", "--dataset", file, "-o", tmp_path / "run")


@pytest.mark.parametrize("label", [np.complex64(1), np.datetime64("2020-01-01")])
def test_labels_of_other_kinds_are_refused(tmp_path, capsys, label):
    file = npz(tmp_path / "a.npz", y_train=np.full(200, label), y_test=np.full(60, label))
    line = mistake(capsys, "vae", "--dataset", file, "-o", tmp_path / "run")
    assert "labels must be whole numbers, or names" in line


def test_names_may_be_bytes(tmp_path):
    file = npz(tmp_path / "a.npz", classes=np.array(ANIMALS, "S"))
    data = dataset(file, tmp_path)
    assert data.classes == ANIMALS


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8_are_spelt_out(tmp_path, capsys):
    root = zoo(tmp_path / "zoo", per_class=12)
    odd = os.path.join(os.fsencode(root), b"caf\xe9")
    os.rename(root / "bird", odd)
    out = tmp_path / "run"
    assert run("vae", "--dataset", root, "-o", out, "--steps", 3, "--latent-dim", 2) == 0
    assert run("latent", "-o", out) == 0
    data = dataset(root, tmp_path)
    assert data.classes == [r"caf\udce9", "fish"]
    assert "".join(data.classes).encode()


# ---- folders as people have them ------------------------------------------------------------

def noisy(root, classes=("bird", "fish"), per_class=10, seed=0):
    """Classes of small colour pictures, no two alike."""
    draw = np.random.default_rng([seed, len(str(root))])
    for level, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(per_class):
            pixels = draw.integers(0, 100, (20, 20, 3)) + 150 * (level % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{k}.png")
    return root


@pytest.mark.parametrize("train, test", [("Training", "Testing"), ("TRAIN", "Test"),
                                         ("train", "testing")])
def test_training_and_test_folders_are_known_by_their_usual_names(tmp_path, train, test):
    noisy(tmp_path / "zoo" / train)
    noisy(tmp_path / "zoo" / test, per_class=3)
    data = dataset(tmp_path / "zoo", tmp_path)
    assert data.classes == ["bird", "fish"]
    assert (len(data.images), len(data.test_images)) == (20, 6)


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev"])
@pytest.mark.parametrize("test", [True, False])
def test_a_validation_folder_chooses_and_never_trains(tmp_path, name, test):
    noisy(tmp_path / "zoo" / "train")
    noisy(tmp_path / "zoo" / name, per_class=2)
    if test:
        noisy(tmp_path / "zoo" / "test", per_class=3)
    data = dataset(tmp_path / "zoo", tmp_path)
    assert len(data.test_images) == (6 if test else 4)
    assert len(data.images) == 20 + 4 - (0 if test else 4)
    pool, validation = common.split(data)
    own = [common.read_image(file, (32, 32)) for file in sorted(
        (tmp_path / "zoo" / name).rglob("*.png"))]
    assert np.array_equal(data.images[validation].numpy(), own)
    assert not torch.isin(pool, validation).any()


AMBIGUOUS = {
    "a class called train": (["train", "car", "plane"],
                             "train/ beside car/, plane/: either .*parts.*or all are classes"),
    "a class called Test": (["Test", "car", "plane"],
                            "Test/ beside car/, plane/: either .*parts.*or all are classes"),
    "train twice": (["train/cat", "train/dog", "Training/cat", "Training/dog"],
                    "Training/ and train/ .*both its train images, or two classes"),
    "val and validation": (["train/cat", "train/dog", "val/cat", "validation/dog"],
                           "val/ and validation/ are either both its validation images, or"),
    "validation without training": (["val/cat", "val/dog"], "no train/"),
    "an empty class": (["cat", "dog", "owl"], "no pictures in owl/"),
    "parts without classes": (["train", "test"], "subfolder"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_folder_of_two_readings_is_refused_with_both(tmp_path, capsys, name):
    folders, pattern = AMBIGUOUS[name]
    for folder in folders:
        noisy(tmp_path / "zoo", [folder], per_class=0 if folder == "owl" else 2)
    line = mistake(capsys, "vae", "--dataset", tmp_path / "zoo", "-o", tmp_path / "run")
    assert re.search(pattern, line), line


def test_a_folder_without_pictures_beside_train_and_test_is_no_class(tmp_path):
    noisy(tmp_path / "zoo" / "train")
    noisy(tmp_path / "zoo" / "test")
    (tmp_path / "zoo" / "docs").mkdir()
    (tmp_path / "zoo" / "docs" / "notes.txt").write_text("cameras")
    assert dataset(tmp_path / "zoo", tmp_path).classes == ["bird", "fish"]


@pytest.mark.parametrize("part", ["test", "val"])
def test_classes_that_training_lacks_are_named(tmp_path, capsys, part):
    noisy(tmp_path / "zoo" / "train")
    noisy(tmp_path / "zoo" / part, ("bird", "owl"))
    line = mistake(capsys, "vae", "--dataset", tmp_path / "zoo", "-o", tmp_path / "run")
    assert "owl" in line and "bird" not in line


HIDDEN = [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash", "#recycle"]


@pytest.mark.parametrize("parts", [[""], ["train", "test"]])
def test_hidden_things_are_no_pictures_and_no_classes(tmp_path, parts):
    root = tmp_path / "zoo"
    for part in parts:
        noisy(root / part)
    before = dataset(root, tmp_path)
    for part in parts:
        for hidden in HIDDEN:
            noisy(root / part, [hidden, f"bird/{hidden}"], per_class=2)
        (root / part / "bird" / "._0.png").write_text("resource fork")
        (root / part / "fish" / "Thumbs.db").write_text("previews")
    noisy(root / ".git")
    after = dataset(root, tmp_path)
    assert after.classes == before.classes
    assert after.facts()["fingerprint"] == before.facts()["fingerprint"]


def test_files_that_are_left_out_are_counted_and_said(tmp_path, capsys):
    root = noisy(tmp_path / "zoo")
    for name in ("bird/a.heic", "bird/b.HEIC", "fish/c.avif", "fish/notes", "loose.png"):
        (root / name).write_text("something")
    data = dataset(root, tmp_path)
    assert len(data.images) + len(data.test_images) == 20
    said = capsys.readouterr().err
    for words in ("zoo: left out: 2 .heic", "1 .avif", "1 notes", "1 pictures in no class"):
        assert words in said


def test_what_a_data_set_is_like_is_said_once_in_a_chain(tmp_path, capsys):
    root = noisy(tmp_path / "zoo")
    (root / "bird" / "a.heic").touch()
    assert run("vae", "--dataset", root, "-o", tmp_path / "run", "--steps", 3,
               "--latent-dim", 2) == 0
    assert "left out" in capsys.readouterr().err
    assert run("cnn", "-o", tmp_path / "run", "--hybrid-fraction", 0, "--steps", 3,
               "--width", 4) == 0
    assert capsys.readouterr().err == ""


def test_results_inside_the_data_set_are_no_class(tmp_path, capsys, monkeypatch):
    root = noisy(tmp_path / "zoo")
    monkeypatch.chdir(root)
    assert run("vae", "--dataset", ".", "-o", "runs/zoo", "--steps", 3, "--latent-dim", 2) == 0
    Image.new("RGB", (20, 20)).save(root / "runs" / "zoo" / "0.png")
    capsys.readouterr()
    for out in ("runs/zoo", "results", tmp_path / "elsewhere"):
        data = dataset(".", Path(out))
        assert data.classes == ["bird", "fish"]
        assert data.name == "zoo"
        assert "runs/ with results" in capsys.readouterr().err


def test_a_class_that_is_called_runs_is_a_class(tmp_path):
    noisy(tmp_path / "sport", ("jumps", "runs"))
    assert dataset(tmp_path / "sport", tmp_path).classes == ["jumps", "runs"]


def test_images_of_the_folder_as_it_was_are_removed(tmp_path):
    first = noisy(tmp_path / "zoo")
    other = noisy(tmp_path / "other")
    out = tmp_path / "run"
    dataset(first, out)
    dataset(other, out)
    before = set(out.glob("images-*.npy"))
    assert len(before) == 2
    (first / "bird" / "0.png").unlink()
    dataset(first, out)
    after = set(out.glob("images-*.npy"))
    assert len(after) == 2
    assert len(before & after) == 1     # that of the other folder


# ---- colour is what has colour --------------------------------------------------------------

def grey_as_rgb(root, grey=10, rgb=1, wobble=0):
    """Two classes of grey noise, some of it stored as RGB that differs by `wobble`."""
    for name in ("bird", "fish"):
        (root / name).mkdir(parents=True)
        noise = noise_images(grey + rgb, 16, 16, seed=len(name) + len(str(root)))
        for k, pixels in enumerate(noise // 2):
            if k >= grey:
                pixels = np.stack([pixels, pixels + wobble, pixels], 2)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


@pytest.mark.parametrize("grey, rgb, wobble, channels", [
    (10, 1, 0, 1),
    (0, 10, 0, 1),
    (10, 1, 2, 1),
    (10, 1, 3, 3),
    (10, 0, 0, 1)])
def test_channels_that_differ_are_colour(tmp_path, grey, rgb, wobble, channels):
    root = grey_as_rgb(tmp_path / "zoo", grey, rgb, wobble)
    assert dataset(root, tmp_path, "--image-size", 16).images.shape[1] == channels


def test_one_test_picture_in_colour_is_enough(tmp_path):
    root = tmp_path / "zoo"
    grey_as_rgb(root / "train", 10, 0)
    grey_as_rgb(root / "test", 10, 1, wobble=40)
    data = dataset(root, tmp_path)
    assert data.images.shape[1] == data.test_images.shape[1] == 3


def test_grey_arrays_of_three_channels_are_grey(tmp_path):
    grey = np.repeat(GREY, 3, 1)
    file = npz(tmp_path / "a.npz", x_train=grey, x_test=grey[:60])
    data = dataset(file, tmp_path)
    assert np.array_equal(data.images.numpy(), GREY)
    file = npz(tmp_path / "b.npz", x_train=grey, x_test=RGB[:60])
    data = dataset(file, tmp_path)
    assert np.array_equal(data.images.numpy(), grey)


def test_grey_images_of_torchvision_are_grey(tmp_path, monkeypatch):
    class Part:
        data = np.repeat(GREY, 3, 1)
        targets = list(np.arange(200) % 3)

    monkeypatch.setattr(common, "torchvision_part", lambda *words, **more: Part)
    data = dataset("cifar10", tmp_path)
    assert np.array_equal(data.images.numpy(), GREY)


def test_a_picture_in_colour_is_read_grey_by_the_weights_of_itu_r_601(tmp_path):
    picture = Image.fromarray(noise_images(1, 16, 16, 3)[0])
    picture.save(tmp_path / "a.png")
    facts = BOARD | {"ground": [0, 128, 248]}
    like, _ = common.read_like(tmp_path / "a.png", facts)
    assert np.array_equal(like[0, 0], picture.convert("L"))


# ---- light on dark, dark on light -----------------------------------------------------------

def on_grounds(tmp_path, levels, n=200):
    """The facts of a grey data set whose images have these grounds, in turn."""
    x = np.zeros((n, 16, 16), np.uint8)
    for k in range(n):
        x[k] = levels[k % len(levels)]
        x[k, 4:12, 4:12] = 255 - x[k, 0, 0]
    file = alike(tmp_path / "a.npz", x, np.arange(n) % 3)
    return dataset(file, tmp_path).facts()


def is_inverted(tmp_path, facts, ground) -> bool:
    pixels = np.full((16, 16), ground, np.uint8)
    pixels[5:11, 5:11] = 128
    Image.fromarray(pixels).save(tmp_path / "a.png")
    like, report = common.read_like(tmp_path / "a.png", facts)
    changed = like[0, 0, 0, 0].item() == 255 - ground != ground
    assert changed == ("inverted to" in report)
    return changed


@pytest.mark.parametrize("levels, ground, inverted", [
    ([10] * 24 + [240], 250, False),    # 4% of the training images are so
    ([10] * 199 + [240], 230, False),
    ([10], 250, True),
    ([240], 5, True),
    ([20], 160, True),
    ([100], 170, False),                # its negative is hardly nearer
    ([20, 230], 240, False)])
def test_a_picture_is_inverted_only_if_no_training_image_was_like_it(tmp_path, levels, ground,
                                                                     inverted):
    assert is_inverted(tmp_path, on_grounds(tmp_path, levels), ground) == inverted


@pytest.mark.parametrize("light, ground, inverted", [
    (0.0, 250, True),
    (0.01, 250, True),
    (0.3, 250, False),
    (1.0, 5, True),
    (0.5, 5, False)])
def test_files_that_know_the_share_of_light_grounds_only(tmp_path, light, ground, inverted):
    facts = {"shape": [1, 16, 16], "light": light}
    assert is_inverted(tmp_path, facts, ground) == inverted


# ---- subsets and duplicates -----------------------------------------------------------------

def ten_classes():
    x, y = easy(600, classes=10)
    return common.Dataset(x, y, x, y, list("0123456789"), "ten")


def classes_of(data, n, seed):
    rows = common.subset(data, common.split(data)[0], n, seed)
    return data.labels[rows].tolist()


def test_which_classes_have_an_image_depends_on_the_seed_if_not_all_can():
    data = ten_classes()
    seen = Counter()
    for seed in range(40):
        labels = classes_of(data, 3, seed)
        assert len(set(labels)) == 3
        assert set(labels) < set(classes_of(data, 5, seed))
        assert labels == classes_of(data, 3, seed)
        seen.update(labels)
    assert len(seen) == 10
    assert max(seen.values()) < 25


def test_ten_images_of_ten_classes_are_one_of_each():
    data = ten_classes()
    assert classes_of(data, 10, 3) == list(range(10))
    few = common.subset(data, common.split(data)[0], 4, 3)
    many = common.subset(data, common.split(data)[0], 30, 3)
    assert torch.isin(few, many).all()


FEW = "2 images for 3 classes: --seed draws which have one"


@pytest.mark.parametrize("script, words", [
    ("vae", ["--images", 2, "--steps", 3, "--latent-dim", 2]),
    ("cnn", ["--images", 2, "--steps", 3, "--width", 4, "--hybrid-fraction", 0]),
    ("compare", ["--sizes", 2, 12, "--seeds", 2, "--steps", 2, "--vae-steps", 2, "--width", 4,
                 "--latent-dim", 2, "--arms", "real", "--jobs", 1])])
def test_images_for_a_part_of_the_classes_are_said_once(tmp_path, capsys, script, words):
    file = npz(tmp_path / "tiny.npz")
    assert run(script, "--dataset", file, "-o", tmp_path / "run", *words) == 0
    assert capsys.readouterr().err.count(FEW) == 1


def test_test_images_that_are_training_images_are_counted(tmp_path, capsys):
    x, y = easy(200)
    x_test, y_test = easy(60, seed=5)
    x_test[:7] = x[100:107]
    file = npz(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    data = dataset(file, tmp_path)
    _, validation = common.split(data)
    among = ((validation >= 100) & (validation < 107)).sum().item()
    said = capsys.readouterr().err
    assert f"{7 - among} of 60 test images are training images" in said
    assert "validation" not in said
    assert len(data.test_images) == 60


def test_pictures_copied_five_times_are_counted_in_every_part(tmp_path, capsys):
    root = tmp_path / "zoo"
    noisy(root, per_class=20)
    for file in sorted(root.rglob("*.png")):
        for k in range(4):
            shutil.copy(file, file.with_name(f"{file.stem} copy {k}.png"))
    data = dataset(root, tmp_path)
    said = capsys.readouterr().err
    tests = len(data.test_images)
    counts = re.findall(r"(\d+) of (\d+) (\w+) images are training images", said)
    assert [part for _, _, part in counts] == ["validation", "test"]
    assert int(counts[1][0]) > 0.9 * tests


def test_a_data_set_without_duplicates_says_nothing(tmp_path, capsys):
    dataset(npz(tmp_path / "a.npz"), tmp_path)
    assert capsys.readouterr().err == ""


# ---- a table of predictions -----------------------------------------------------------------

def test_a_bad_file_does_not_end_a_table_of_predictions(chain, tmp_path, capsys):
    files = save_as_pictures(tmp_path / "in", noise_images(5, 16, 16))
    files[1].write_text("not a picture")
    (tmp_path / "in" / "._000.png").write_text("not even a name of one")
    assert run("cnn", "-o", chain, "--predict", tmp_path / "in") == 2
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out)))
    named = [Path(row["file"]) for row in rows]
    assert named == [files[0], *files[2:]]
    assert f"{files[1]} cannot be read as an image" in said.err
    assert said.err.splitlines()[-1] == "cnn.py: 1 of 5 pictures cannot be read"


@pytest.mark.parametrize("script", ["cnn", "latent"])
def test_one_bad_picture_is_one_line(chain, tmp_path, capsys, script):
    (tmp_path / "a.png").write_text("not a picture")
    flag = "--predict" if script == "cnn" else "--image"
    assert "a.png cannot be read as an image" in mistake(capsys, script, "-o", chain, flag,
                                                         tmp_path / "a.png")


# ---- command lines --------------------------------------------------------------------------

@pytest.mark.parametrize("module", [common, latent, hybrids, compare])
def test_the_examples_in_docstrings_give_what_they_say(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def helps_of(script, monkeypatch, capsys):
    """{flag: its help}, as --help prints them on a very wide terminal."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as end:
        SCRIPTS[script].parse_args(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    text = re.sub(r"\n {20,}", "   ", text)     # behind a long flag the help is on a new line
    return dict(re.findall(r"^  (?:-\w \w+, )?(--[\w-]+)[^\n]*?   *(\S[^\n]*)$", text, re.M))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script, monkeypatch, capsys):
    known = vars(SCRIPTS[script].parse_args([]))
    flags = {f"--{key.replace('_', '-')}" for key in known if key not in ("script", "writes")}
    assert set(helps_of(script, monkeypatch, capsys)) == flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_states_every_default_or_what_happens_without(script, monkeypatch, capsys):
    known = vars(SCRIPTS[script].parse_args([]))
    for flag, text in helps_of(script, monkeypatch, capsys).items():
        value = known[flag[2:].replace("-", "_")]
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if value is None or value is False or "if not given" in text:
            assert "(default:" not in text, flag
        else:
            assert text.endswith(f"(default: {value})"), flag


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_made_of_phrases_not_of_words(script, monkeypatch, capsys):
    for flag, text in helps_of(script, monkeypatch, capsys).items():
        phrase = text.split(" (default")[0]
        assert len(phrase.split()) >= 3, flag


def commands_of(text):
    """[script, words] of every `python <script>.py ...`, alone in a line or in backticks."""
    found = re.findall(r"^    python (\w+)\.py(.*)$", text, re.M)
    found += re.findall(r"`python (\w+)\.py([^`]*)`", text)
    return [(script, shlex.split(rest, comments=True)) for script, rest in found]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_a_docstring_are_understood(script):
    commands = commands_of(SCRIPTS[script].__doc__)
    assert commands
    for name, words in commands:
        assert name == script
        SCRIPTS[name].parse_args(words)


# ---- what the files hold --------------------------------------------------------------------

def note_calls(patch, module, name):
    """Have every call of a function noted -> a list that grows: arguments and result."""
    calls = []
    plain = getattr(module, name)

    def noted(*arguments, **settings):
        result = plain(*arguments, **settings)
        calls.append((arguments, result))
        return result

    patch.setattr(module, name, noted)
    return calls


def note_fits(patch, module):
    """Have every training noted -> a list that grows: settings, batches, weights."""
    fits = []
    plain = module.fit

    def fit(model, next_batch, **settings):
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        record = SimpleNamespace(model=model, weights=weights, settings=settings, batches=[])
        record.seed = settings["generator"].initial_seed()
        fits.append(record)

        def noted(*arguments):
            batch = next_batch(*arguments)
            record.batches.append(batch)
            return batch

        yield from plain(model, noted, **settings)
        record.last = {key: value.clone() for key, value in model.state_dict().items()}

    patch.setattr(module, "fit", fit)
    return fits


def rows_among(x, images):
    """The row of each of x (B,C,H,W) among uint8 images (N,C,H,W); -1 if nowhere."""
    if x.is_floating_point():
        x = as_bytes(x)
    rows = {bytes_in(image): k for k, image in enumerate(images)}
    return torch.tensor([rows.get(bytes_in(image), -1) for image in x])


def bytes_in(tensor):
    return tensor.numpy().tobytes()


def rows_used(fit, images):
    """The rows of uint8 images that a training saw; -1 for what is not among them."""
    batches = fit.batches
    if isinstance(batches[0], tuple):
        batches = [x for x, _ in batches]
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


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    """A chain in plain float32 of images that move, and what reached its training loops."""
    out = tmp_path_factory.mktemp("seen") / "run"
    tiny = backwards(out.parent / "tiny.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae.Deformations, "fit", found((0.5, True)))
        moved = note_calls(patch, cnn, "warp")
        pictures = {kind: note_calls(patch, SCRIPTS[kind], "draw")
                    for kind in ("vae", "hybrids", "cnn")}
        pictures["map"] = note_calls(patch, latent, "draw_map")
        pictures["reliability"] = note_calls(patch, latent, "draw_reliability")
        vae_fits = note_fits(patch, vae)
        cnn_fits = note_fits(patch, cnn)
        assert run("vae", "--dataset", tiny, "-o", out, "--steps", 60, "--latent-dim", 4,
                   "--seed", 5, "--batch-size", 32, "--images", 90, "--no-amp") == 0
        assert run("latent", "-o", out, "--seed", 5, "--no-amp") == 0
        assert run("hybrids", "-o", out, "--seed", 5, "--count", 90, "--no-amp") == 0
        assert run("cnn", "-o", out, "--seed", 5, "--steps", 40, "--width", 8, "--no-amp") == 0
    noted = SimpleNamespace(out=out, vae=vae_fits[0], cnn=cnn_fits[0], moved=moved)
    noted.files = {kind: read(out / f"{kind}.pt") for kind in STEPS}
    noted.model = vae.VAE.restore(noted.files["vae"])
    noted.classifier = cnn.CNN.restore(noted.files["cnn"])
    noted.data = dataset(tiny, out)
    noted.pool, noted.validation = common.split(noted.data)
    # What each picture was drawn of.
    noted.drawn = {kind: calls[0][0] for kind, calls in pictures.items()}
    return noted


@pytest.fixture
def bare(copy, monkeypatch):
    """One's own copy of that folder, where pictures stay empty: drawing takes longest."""
    def draw(*content, **look):
        return common.figure(1, 1)

    for script in (vae, hybrids, cnn):
        monkeypatch.setattr(script, "draw", draw)
    monkeypatch.setattr(latent, "draw_map", draw)
    return copy


def first_weights_of(model_class, seed, *arguments, **settings):
    torch.manual_seed(seed)
    return model_class(*arguments, **settings).state_dict()


@pytest.mark.parametrize("kind, upstream, keys", [
    ("vae", [], "config rows model deformations"),
    ("hybrids", ["vae", "latent"], "images q z flows"),
    ("latent", ["vae"], "mu logvar labels given q calibrated teaching"),
    ("cnn", ["vae", "hybrids"], "config model")])
def test_a_file_holds_its_content_and_the_facts_beside_it(chain, kind, upstream, keys):
    saved = read(chain / f"{kind}.pt")
    facts = json.loads((chain / f"{kind}.json").read_text())
    assert set(saved) == {*facts, *keys.split()}
    assert facts == {key: saved[key] for key in facts}
    assert facts["made_from"] == {u: common.fingerprint(chain / f"{u}.pt") for u in upstream}


@pytest.mark.parametrize("kind", STEPS)
def test_the_facts_of_a_file_say_how_and_of_what_it_was_made(chain, kind):
    facts = json.loads((chain / f"{kind}.json").read_text())
    assert facts["kind"] == kind
    assert facts["format"] == common.FORMAT
    assert facts["settings"]["seed"] == 0
    assert facts["versions"] == {"torch": torch.__version__, "numpy": np.__version__}
    wanted = {"classes": ANIMALS, "shape": [1, 16, 16], "images": 200, "test_images": 60}
    assert facts["dataset"].items() >= wanted.items()


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_leaves_a_picture_and_nothing_unfinished(chain, kind):
    assert Image.open(chain / f"{kind}.png").width > 600
    assert not unfinished(chain)


def test_vae_pt_holds_the_weights_of_the_last_step(seen):
    assert same(seen.files["vae"]["model"], seen.vae.last)
    assert not same(seen.vae.weights, seen.vae.last)


def test_vae_pt_names_the_rows_that_it_was_trained_on(seen):
    wanted = common.subset(seen.data, seen.pool, 90, 5)
    assert torch.equal(seen.files["vae"]["rows"], wanted)


def test_without_a_number_the_vae_sees_all_but_the_validation_images(chain):
    pool, _ = common.split(dataset(chain.parent / "tiny.npz", chain))
    assert torch.equal(read(chain / "vae.pt")["rows"], pool)


def test_the_vae_sees_its_images_and_no_other(seen):
    rows = seen.files["vae"]["rows"]
    assert rows_used(seen.vae, seen.data.images) == set(rows.tolist())


def test_a_vae_starts_from_the_weights_and_the_draws_of_its_seed(seen):
    wanted = first_weights_of(vae.VAE, 5, 1, 16, 16, latent_dim=4)
    assert same(seen.vae.weights, wanted)
    assert seen.vae.seed == 5


def test_the_flags_of_the_vae_reach_its_training(bare, monkeypatch):
    fits = note_fits(monkeypatch, vae)
    tiny = npz(bare / "tiny.npz")
    assert run("vae", "-o", bare, "--dataset", tiny, "--steps", 3, "--lr", 0.002, "--beta",
               0.5, "--batch-size", 7, "--latent-dim", 3, "--amp") == 0
    fit, = fits
    wanted = {"steps": 3, "lr": 0.002, "beta": 0.5, "amp": True, "state": None}
    assert fit.settings.items() >= wanted.items()
    assert [len(x) for x in fit.batches] == [7, 7, 7]
    assert fit.model.config["latent_dim"] == 3


def test_vae_pt_holds_how_its_images_move(seen):
    saved = seen.files["vae"]
    wanted = deformations(0.5, True)
    again = vae.Deformations.restore(saved)
    assert torch.equal(again.sample(5, seeded()), wanted.sample(5, seeded()))
    assert again.mirror is True
    assert saved["metrics"].items() >= {"strength": 0.5, "mirror": True}.items()
    proof = saved["metrics"]["proof"]
    assert list(proof["strengths"]) == [0, 0.25, 0.5, 0.75, 1]
    assert proof["nll"] == [0.7, 0.65, 0.6, 0.64, 0.68]
    assert proof["nll_mirrored"] == 0.5


def test_the_images_of_a_vae_are_asked_how_they_move(bare):
    tiny = npz(bare / "tiny.npz")
    words = ["--dataset", tiny, *STEMS["vae"], "--images", 24, "--seed", 4]
    assert run("vae", "-o", bare, *words) == 0
    saved = read(bare / "vae.pt")
    data = data_of(bare)
    rows = saved["rows"]
    wanted = TRUE_FIT(data.images[rows], data.labels[rows], seeded(4))
    close(saved["deformations"]["directions"], wanted.directions)
    proof = saved["metrics"]["proof"]
    assert [*proof["nll"], proof["nll_mirrored"]] == approx(wanted.nll, abs=1e-6)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_elbo_of_a_vae_is_that_of_the_images_it_names(seen, part):
    saved = seen.files["vae"]
    images = seen.data.test_images
    if part == "train":
        images = seen.data.images[saved["rows"]]
    wanted = vae.evaluate(seen.model, images, generator=seeded(6))
    assert saved["metrics"][part] == approx(wanted, rel=1e-4)


def test_the_history_of_a_vae_ends_with_the_elbo_of_validation_images(seen):
    saved = seen.files["vae"]
    images = seen.data.images[seen.validation]
    wanted = vae.evaluate(vae.VAE.restore(saved), images, generator=seeded(6))
    history = saved["metrics"]["history"]
    assert history[-1]["validation"] == approx(wanted["negative_elbo"], rel=1e-4)
    assert steps_of(history) == list(range(6, 61, 6))


def test_a_vae_says_what_its_file_says(bare, capsys):
    tiny = npz(bare / "tiny.npz")
    assert run("vae", "-o", bare, "--dataset", tiny, "--steps", 40) == 0
    lines = capsys.readouterr().out.splitlines()
    metrics = read(bare / "vae.pt")["metrics"]
    for line, part in zip(lines, ("train", "test")):
        assert line.split()[0] == f"{part}:"
        assert f"= {metrics[part]['negative_elbo']:.1f} nats per image" in line
    assert lines[2].startswith("what an image may become: no deformations, ")
    # And no word of a collapse.
    assert lines[3:] == [str(bare / "vae.png"), str(bare / "vae.pt")]


def test_latent_pt_holds_the_codes_of_the_images_of_the_vae(seen):
    rows = seen.files["vae"]["rows"]
    saved = seen.files["latent"]
    assert torch.equal(saved["labels"], seen.data.labels[rows])
    codes = vae.encode_all(seen.model, seen.data.images[rows])
    close((saved["mu"], saved["logvar"]), codes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, kind", [("aggregate", latent.Aggregate),
                                        ("gaussian", latent.Gaussian)])
def test_percentages_are_scored_on_test_images(seen, name, kind):
    codes = vae.encode_all(seen.model, seen.data.test_images)
    q = kind(**seen.files["latent"]["calibrated"][name])(*codes)
    wanted = common.scores(q, seen.data.test_labels)
    stated = seen.files["latent"]["metrics"][name]
    for key, value in wanted.items():
        assert stated[key] == approx(value, abs=1e-4)


def test_percentages_are_calibrated_on_validation_images(seen):
    codes = vae.encode_all(seen.model, seen.data.images[seen.validation])
    for name, kind in (("aggregate", latent.Aggregate), ("gaussian", latent.Gaussian)):
        stored = seen.files["latent"]["calibrated"][name]
        y = seen.data.labels[seen.validation]
        wanted, _ = latent.best_temperature(kind(**stored), *codes, y)
        assert stored["temperature"] == approx(wanted)
        assert seen.files["latent"]["metrics"][name]["temperature"] == stored["temperature"]


def test_the_first_two_lines_are_the_priors_and_the_bare_widths_of_the_encoder(seen):
    saved = seen.files["latent"]
    parts = (saved["mu"], saved["logvar"], saved["labels"])
    codes = vae.encode_all(seen.model, seen.data.test_images)
    bare = latent.Aggregate.fit(*parts, 3, bandwidth=0.0)(*codes)
    priors = saved["labels"].bincount().float() / len(saved["labels"])
    for name, q in (("class priors", priors.expand(60, 3)), ("encoder's width", bare)):
        wanted = common.scores(q, seen.data.test_labels)["nll"]
        assert saved["metrics"][name]["nll"] == approx(wanted, rel=1e-3)


def test_the_teaching_density_is_that_of_the_codes(seen):
    saved = seen.files["latent"]
    parts = (saved["mu"], saved["logvar"], saved["labels"])
    wanted = latent.stored(latent.teach(*parts, 3))
    stored = saved["teaching"]
    assert stored["temperature"] == approx(wanted["temperature"])
    close(stored["variance"], wanted["variance"])


def test_a_density_of_few_codes_is_made_of_so_many(bare):
    assert run("latent", "-o", bare, "--codes", 30) == 0
    saved = read(bare / "latent.pt")
    for density in (saved["calibrated"]["aggregate"], saved["teaching"]):
        assert len(density["mu"]) == 30
    assert len(saved["mu"]) == len(read(bare / "vae.pt")["rows"])       # all, for hybrids


def test_hybrids_are_bytes_with_probabilities(chain):
    saved = read(chain / "hybrids.pt")
    assert saved["images"].dtype == torch.uint8
    assert saved["images"].shape == (90, 1, 16, 16)
    assert saved["q"].dtype == torch.float32
    assert saved["z"].shape == (90, 4)
    close(saved["q"].sum(1), torch.ones(90))


def test_hybrids_are_those_of_the_codes_and_the_seed(seen):
    saved = seen.files["hybrids"]
    model = seen.model
    codes = latent.Codes.restore(seen.files["latent"])
    sources = seen.data.images[seen.files["vae"]["rows"]]
    generator = seeded(5)
    points = hybrids.sample("between", 90, codes, generator)
    close(saved["z"], points.z)
    deform = deformations(0.5, True)
    morph = functools.partial(vae.Morph, strength=0.5)
    x, q = hybrids.make(points, codes, sources, model.decode, morph=morph, deform=deform,
                        generator=generator)
    close(x.int(), saved["images"].int(), atol=1, rtol=0)
    close(saved["q"], q)


def test_the_flows_of_real_images_are_a_thousand_of_those_deformations(seen):
    flows = seen.files["hybrids"]["flows"]
    assert flows.shape == (1000, 16, 16, 2)
    basis = deformations(0.5, True).flow(torch.eye(3)).flatten(1)
    unturned = (flows - vae.mirror_flow(16, 16)).flip(2)
    misses = []
    for part in (flows.float(), unturned):
        part = part.flatten(1)
        weights = torch.linalg.lstsq(basis.T, part.T).solution
        misses.append((part - weights.T @ basis).norm(dim=1))
    straight, mirrored = torch.stack(misses) < 0.1
    assert (straight ^ mirrored).all()
    assert part_of(mirrored) == approx(0.5, abs=0.06)
    assert part_of((flows == 0).flatten(1).all(1)) == approx(0.25, abs=0.05)


@pytest.fixture
def lively(bare):
    """One's own copy of a folder whose vae.pt says that images move."""
    change(bare / "vae.pt", "deformations", lambda fields: deformations(0.5).fields())
    assert run("latent", "-o", bare) == 0
    return bare


def test_hybrids_move_as_vae_pt_says_and_not_with_no_deform(lively):
    moved = made_by(lively)
    still = made_by(lively, "--no-deform")
    change(lively / "vae.pt", "deformations", lambda fields: deformations(0.0).fields())
    assert run("latent", "-o", lively) == 0
    without = made_by(lively)
    assert torch.equal(still["images"], without["images"])
    assert not torch.equal(moved["images"], without["images"])
    assert torch.equal(moved["z"], without["z"])
    assert torch.equal(still["flows"], torch.zeros(1, 16, 16, 2).half())
    assert torch.equal(without["flows"], still["flows"])


def test_with_no_deform_the_classifier_sees_real_images_as_they_are(lively, monkeypatch):
    made_by(lively, "--no-deform")
    fit = cnn_fit_of(lively, monkeypatch, "--steps", 4, "--hybrid-fraction", 0.25)
    data = data_of(lively)
    assert counts_of(data.images, fit) == approx([48] * 4, abs=2)


def test_their_percentages_move_by_what_the_made_images_say(seen):
    saved = seen.files["hybrids"]
    posterior = latent.Codes.restore(seen.files["latent"]).posterior
    mu, _ = vae.encode_all(seen.model, saved["images"])
    difference = posterior(mu) - posterior(saved["z"])
    apart = difference.abs().sum(1) / 2
    assert saved["metrics"]["moved"] == approx(apart.mean().item(), rel=1e-3)
    assert 0.01 < saved["metrics"]["moved"] < 0.99


def test_the_figures_of_hybrids_are_made_of_their_percentages(seen):
    q = seen.files["hybrids"]["q"]
    metrics = seen.files["hybrids"]["metrics"]
    entropies = torch.distributions.Categorical(q).entropy()
    assert metrics["entropy"] == approx(entropies.mean().item(), rel=1e-3)
    assert metrics["top"] == approx(q.max(1).values.mean().item())
    counts, _ = np.histogram(entropies.numpy(), 20, (0, math.log(3)))
    assert metrics["histogram"] == counts.tolist()
    assert metrics["temperature"] == seen.files["latent"]["teaching"]["temperature"]


def test_hybrids_say_in_bits_and_percent_what_their_file_says(bare, capsys):
    assert run("hybrids", "-o", bare, "--count", 50) == 0
    metrics = read(bare / "hybrids.pt")["metrics"]
    printed = capsys.readouterr().out
    assert f"{metrics['entropy'] / math.log(2):.2f} bits of label entropy" in printed
    assert f"their percentages move by {metrics['moved']:.1%} on average" in printed


def test_cnn_pt_holds_the_weights_of_the_last_step(seen):
    assert same(seen.files["cnn"]["model"], seen.cnn.last)
    assert seen.files["cnn"]["metrics"]["history"][-1]["step"] == 40


def test_the_scores_of_a_classifier_are_those_of_its_last_weights_on_test_images(seen):
    model = seen.classifier
    q = cnn.predict(model, seen.data.test_images).softmax(1)
    wanted = common.scores(q, seen.data.test_labels)
    stated = seen.files["cnn"]["metrics"]
    for key, value in wanted.items():
        assert stated[key] == approx(value, abs=1e-4)
    assert stated["real_images"] == 90


def test_the_history_of_a_classifier_ends_with_its_accuracy_on_validation_images(seen):
    q = cnn.predict(seen.classifier, seen.data.images[seen.validation])
    right = q.argmax(1) == seen.data.labels[seen.validation]
    last = seen.files["cnn"]["metrics"]["history"][-1]
    assert last["validation"] == approx(part_of(right), abs=1e-4)


def test_easy_bars_are_learnt(chain):
    assert read(chain / "cnn.pt")["metrics"]["accuracy"] > 0.9


@pytest.mark.parametrize("kind", ["vae", "cnn"])
def test_the_log_has_the_rounds_of_the_history(chain, kind):
    log = log_of(chain, kind)
    history = read(chain / f"{kind}.pt")["metrics"]["history"]
    assert steps_of(log) == steps_of(history)
    assert all(row["images_per_second"] > 0 for row in log)


def log_of(folder, kind):
    """The rows of a training's log."""
    lines = (folder / f"{kind}.log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps_of(rows):
    return [row["step"] for row in rows]


# ---- what the pictures show -----------------------------------------------------------------

def test_the_picture_of_a_vae_shows_its_history(seen):
    history, model, *_ = seen.drawn["vae"]
    assert history == seen.files["vae"]["metrics"]["history"]
    assert same(model.state_dict(), seen.files["vae"]["model"])


def test_the_picture_of_a_vae_shows_how_its_images_move(seen):
    _, _, deform, images, *_ = seen.drawn["vae"]
    assert deform.fields().items() >= {"strength": 0.5, "mirror": True}.items()
    assert torch.equal(images, seen.data.images[seen.files["vae"]["rows"]])


def test_the_map_shows_the_codes_and_the_calibrated_percentages(seen):
    saved = seen.files["latent"]
    _, mu, y, classes, posterior, generator, given = seen.drawn["map"]
    assert torch.equal(mu, saved["mu"])
    assert torch.equal(y, saved["labels"])
    assert classes == ANIMALS
    wanted = latent.Aggregate(**saved["calibrated"]["aggregate"])
    close(posterior(mu), wanted(mu))
    assert generator.initial_seed() == 5
    assert given.all()


def test_the_reliability_that_is_drawn_is_that_of_the_file(seen):
    _, metrics = seen.drawn["reliability"]
    assert metrics == seen.files["latent"]["metrics"]


def test_the_gallery_shows_the_hybrids_of_the_file(seen):
    x, q, *_, classes = seen.drawn["hybrids"]
    assert torch.equal(x, seen.files["hybrids"]["images"])
    assert torch.equal(q, seen.files["hybrids"]["q"])
    assert classes == ANIMALS


def test_the_walk_leads_from_an_image_to_one_of_another_class(seen):
    _, _, strip, strip_q, *_ = seen.drawn["hybrids"]
    ends = rows_among(strip[[0, -1]], seen.data.images)
    assert ends[0] == seen.files["vae"]["rows"][0]
    assert ends[1] in seen.files["vae"]["rows"]
    y = seen.data.labels[ends]
    assert y[0] != y[1]
    close(strip_q[[0, -1]], one_hot(y))
    assert len(strip) == 9


def test_with_points_from_the_prior_the_walk_is_decoded_and_labelled_so(bare, monkeypatch):
    drawn = note_calls(monkeypatch, hybrids, "draw")
    saved = made_by(bare, "--strategy", "prior")
    (_, _, strip, strip_q, *_), _ = drawn[0]
    codes = latent.Codes.restore(read(bare / "latent.pt"))
    model = vae.VAE.restore(read(bare / "vae.pt"))
    generator = seeded()
    hybrids.sample("prior", len(saved["z"]), codes, generator)
    z = hybrids.walk(codes, generator).z
    close(strip_q, codes.posterior(z))
    close(strip.float(), 255 * model.decode(z), atol=3, rtol=0)


def test_halfway_the_walk_is_decoded_and_both(seen):
    points = hybrids.walk(latent.Codes.restore(seen.files["latent"]), seeded(1))
    close(points.t, torch.linspace(1, 0, 9))
    mu = seen.files["latent"]["mu"]
    close(points.z[4], (mu[0] + mu[points.j[0]]) / 2)


def test_halfway_a_picture_of_the_walk_is_mixed_not_cut(seen):
    _, _, strip, *_ = seen.drawn["hybrids"]
    ends = rows_among(strip[[0, -1]], seen.data.images)
    x = seen.data.images[ends] / 255
    mu, _ = vae.encode_all(seen.model, seen.data.images[ends])
    middle = seen.model.decode(mu.mean(0, keepdim=True))
    lost = x - seen.model.decode(mu)
    first, second = x.split(1)
    meet = vae.Morph(first, second, strength=0.5)
    moved = meet(*lost.split(1), torch.tensor([0]), torch.tensor([0.5]))
    wanted = middle[0] + torch.cat(moved).mean(0)
    close(strip[4] / 255, wanted.clamp(0, 1), atol=0.02, rtol=0)


def test_below_the_walk_its_first_image_moves(seen):
    _, _, strip, _, moved, how, _ = seen.drawn["hybrids"]
    close(moved[0], strip[0] / 255)
    assert len(moved[1:].flatten(1).unique(dim=0)) == 8
    assert how == "deformations of strength 0.5, mirrored or not"


def test_the_confusion_that_is_drawn_is_that_of_test_images(seen):
    history, q, y, classes = seen.drawn["cnn"]
    assert history == seen.files["cnn"]["metrics"]["history"]
    assert torch.equal(y, seen.data.test_labels)
    close(q, cnn.predict(seen.classifier, seen.data.test_images).softmax(1))
    assert classes == ANIMALS


# ---- what reaches the classifier, and when --------------------------------------------------

def test_the_first_half_of_the_training_sees_hybrids_with_their_percentages(seen):
    made = seen.files["hybrids"]
    for x, q in seen.cnn.batches[:20]:
        where = rows_among(x, made["images"])
        assert (where >= 0).all()
        assert torch.equal(q, made["q"][where])


def test_real_images_are_moved_and_hybrids_are_as_they_are(seen):
    batches = seen.cnn.batches[-len(seen.moved):]       # the others hold no real image
    for (x, q), ((real, _), moved) in zip(batches, seen.moved):
        first = len(x) - len(real)
        assert (rows_among(x[:first], seen.files["hybrids"]["images"]) >= 0).all()
        assert torch.equal(x[first:], moved)
        where = rows_among(real, seen.data.images)
        assert torch.isin(where, seen.files["vae"]["rows"]).all()
        assert torch.equal(q[first:], one_hot(seen.data.labels[where]))


def test_the_last_quarter_sees_real_images_alone(seen):
    assert [len(real) for (real, _), _ in seen.moved[-10:]] == [64] * 10


def test_images_are_moved_by_the_flows_of_the_file(seen):
    flows = seen.files["hybrids"]["flows"]
    known = {bytes_in(flow) for flow in flows}
    used = torch.cat([flow for (_, flow), _ in seen.moved])
    assert {bytes_in(flow) for flow in used.half()} <= known
    assert len(used.flatten(1).unique(dim=0)) > 200


def counts_of(images, fit):
    """How many of each batch are of these images; chance may make a real one equal to one."""
    counts = []
    for x, _ in fit.batches:
        found = rows_among(x, images) >= 0
        counts.append(int(found.sum()))
    return counts


def test_between_them_the_share_of_hybrids_falls_linearly(seen):
    made = seen.files["hybrids"]["images"]
    wanted = [64, 64, 58, 51, 45, 38, 32, 26, 19, 13, 6, 0, 0]
    assert counts_of(made, seen.cnn)[19:32] == approx(wanted, abs=2)


def test_a_classifier_starts_from_the_weights_and_the_draws_of_its_seed(seen):
    wanted = first_weights_of(cnn.CNN, 5, 1, 3, 8, 16)
    assert same(seen.cnn.weights, wanted)
    assert seen.cnn.seed == 5


def cnn_fit_of(folder, monkeypatch, *words):
    """What reaches the training loop of `cnn.py` with these words."""
    fits = note_fits(monkeypatch, cnn)
    assert run("cnn", "-o", folder, "--width", 4, *words) == 0
    return fits[0]


def test_the_flags_of_the_classifier_reach_its_training(bare, monkeypatch):
    words = ["--steps", 3, "--lr", 0.002, "--weight-decay", 0.5, "--batch-size", 7, "--amp"]
    fit = cnn_fit_of(bare, monkeypatch, *words)
    wanted = {"steps": 3, "lr": 0.002, "weight_decay": 0.5, "amp": True, "state": None}
    assert fit.settings.items() >= wanted.items()
    assert [len(x) for x, _ in fit.batches] == [7, 7, 7]
    assert fit.model.config == {"channels": 1, "classes": 3, "width": 4, "side": 16}


def test_without_hybrids_every_step_sees_real_images(bare, monkeypatch):
    fit = cnn_fit_of(bare, monkeypatch, "--steps", 4, "--hybrid-fraction", 0)
    data = data_of(bare)
    for x, q in fit.batches:
        where = rows_among(x, data.images)
        assert (where >= 0).all()
        assert torch.equal(q, one_hot(data.labels[where]))


def data_of(folder):
    """The data set that a folder's vae.pt was made from."""
    return dataset(read(folder / "vae.pt")["dataset"]["spec"], folder)


def test_one_share_of_hybrids_holds_from_first_to_last(bare, monkeypatch):
    fit = cnn_fit_of(bare, monkeypatch, "--steps", 4, "--hybrid-fraction", 0.25)
    made = read(bare / "hybrids.pt")["images"]
    assert counts_of(made, fit) == approx([16, 16, 16, 16], abs=2)


def test_two_shares_are_the_first_and_the_last(bare, monkeypatch):
    fit = cnn_fit_of(bare, monkeypatch, "--steps", 4, "--hybrid-fraction", 0.5, 1)
    made = read(bare / "hybrids.pt")["images"]
    assert counts_of(made, fit) == approx([32, 32, 32, 64], abs=2)


@pytest.mark.parametrize("shares, printed", [
    (["0"], "0% hybrids"),
    (["1"], "100% hybrids"),
    (["1", "0"], "62% hybrids"),
    (["0", "1"], "38% hybrids")])
def test_the_average_share_is_said(bare, capsys, shares, printed):
    words = ["--steps", 2, "--width", 2, "--hybrid-fraction", *shares]
    assert run("cnn", "-o", bare, *words) == 0
    assert printed in capsys.readouterr().out


def test_a_number_of_images_is_drawn_by_the_seed(bare, monkeypatch, capsys):
    words = ["--steps", 9, "--hybrid-fraction", 0, "--images", 12, "--seed", 3]
    fit = cnn_fit_of(bare, monkeypatch, *words)
    data = data_of(bare)
    pool, _ = common.split(data)
    wanted = common.subset(data, pool, 12, 3)
    assert rows_used(fit, data.images) == set(wanted.tolist())
    assert capsys.readouterr().out.startswith("12 real images")


def test_augmented_images_keep_their_labels_and_no_pixel(bare, monkeypatch):
    fit = cnn_fit_of(bare, monkeypatch, "--steps", 4, "--hybrid-fraction", 0, "--augment")
    data = data_of(bare)
    for x, q in fit.batches:
        assert (rows_among(x, data.images) < 0).all()
        assert set(q.unique().tolist()) == {0, 1}


def test_augment_changes_hybrids_too(bare, monkeypatch):
    fit = cnn_fit_of(bare, monkeypatch, "--steps", 4, "--augment")
    made = read(bare / "hybrids.pt")["images"]
    assert counts_of(made, fit)[0] == 0


@pytest.mark.parametrize("flag", ["--mixup", "--cutmix"])
def test_real_images_are_mixed_at_first_and_whole_in_the_end(bare, monkeypatch, flag):
    fit = cnn_fit_of(bare, monkeypatch, "--steps", 8, "--hybrid-fraction", 0, flag, 1)
    data = data_of(bare)
    whole = counts_of(data.images, fit)
    mixed = [int((q.amax(1) < 1).sum()) for _, q in fit.batches]
    assert max(whole[:5]) < 40
    assert min(mixed[:5]) > 25          # others mix two images of one class
    assert whole[6:] == [64, 64]
    assert mixed[6:] == [0, 0]


def test_mixup_averages_two_images(bare, monkeypatch):
    words = ["--steps", 1, "--hybrid-fraction", 0, "--mixup", 100]
    x, q = cnn_fit_of(bare, monkeypatch, *words).batches[0]
    two = q[(q > 0).sum(1) == 2]
    assert len(two) > 10
    assert 0.3 < two[two > 0].min() and two.max() < 0.7         # Beta(100, 100) is near 1/2


def test_cutmix_shows_pixels_as_they_are_and_labels_by_area(bare, monkeypatch):
    words = ["--steps", 1, "--hybrid-fraction", 0, "--cutmix", 1]
    x, q = cnn_fit_of(bare, monkeypatch, *words).batches[0]
    close(255 * x, (255 * x).round(), atol=1e-3, rtol=0)
    close(256 * q, (256 * q).round(), atol=1e-3, rtol=0)        # images of 16 x 16
    assert (q > 0).sum(1).max() == 2


def test_with_hybrids_it_is_hybrids_that_are_mixed(bare, monkeypatch):
    fit = cnn_fit_of(bare, monkeypatch, "--steps", 8, "--mixup", 100)
    made = read(bare / "hybrids.pt")["images"]
    data = data_of(bare)
    assert counts_of(made, fit)[0] < 6
    assert counts_of(data.images, fit)[7] == 64


@pytest.mark.parametrize("flag", ["--amp", "--no-amp"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_networks_compute_in_the_arithmetic_asked_for(bare, monkeypatch, script, flag):
    states = []

    def noted(plain):
        def call(*arguments):
            states.append(torch.is_autocast_enabled("cpu"))
            return plain(*arguments)

        return call

    for network, name in ((vae.VAE, "encode"), (vae.VAE, "logits"), (cnn.CNN, "forward")):
        monkeypatch.setattr(network, name, noted(getattr(network, name)))
    words = {"vae": ["--dataset", npz(bare / "tiny.npz")],
             "compare": ["--arms", "real+hybrid", "latent posterior"]}.get(script, [])
    assert run(script, "-o", bare, *STEMS[script], flag, *words) == 0
    assert set(states) == {flag == "--amp"}


# ---- hybrids: their kinds and their export --------------------------------------------------

def made_by(folder, *words):
    """The hybrids.pt that these words make."""
    assert run("hybrids", "-o", folder, "--count", 30, *words) == 0
    return read(folder / "hybrids.pt")


@pytest.mark.parametrize("words", [
    ["--strategy", "between"], ["--strategy", "around"], ["--strategy", "prior"],
    ["--no-residual"], ["--cut"], ["--no-deform"], ["--label", "density"],
    ["--label", "weight"]], ids=" ".join)
def test_every_kind_of_hybrid_is_made(bare, words):
    saved = made_by(bare, *words)
    assert saved["images"].shape == (30, 1, 16, 16)
    close(saved["q"].sum(1), torch.ones(30))
    assert not unfinished(bare)


def test_points_from_the_prior_are_labelled_by_the_density(bare):
    saved = made_by(bare, "--strategy", "prior")
    posterior = latent.Codes.restore(read(bare / "latent.pt")).posterior
    assert saved["settings"]["label"] == "density"
    close(saved["q"], posterior(saved["z"]))


def test_grey_images_are_not_cut_unless_asked(bare):
    plain = made_by(bare)
    faded = made_by(bare, "--no-cut")
    cut = made_by(bare, "--cut")
    assert torch.equal(plain["images"], faded["images"])
    assert not torch.equal(plain["images"], cut["images"])
    assert plain["settings"]["cut"] is False
    assert cut["settings"]["cut"] is True


def test_colour_images_are_cut_unless_asked_otherwise(bare):
    tiny = npz(bare / "rgb.npz", x_train=RGB, x_test=RGB[:60])
    assert run("vae", "--dataset", tiny, "-o", bare, "--steps", 2, "--latent-dim", 2) == 0
    assert run("latent", "-o", bare) == 0
    plain = made_by(bare)
    cut = made_by(bare, "--cut")
    assert torch.equal(plain["images"], cut["images"])
    assert plain["settings"]["cut"] is True


def exported(folder):
    return list(csv.DictReader((folder / "labels.csv").open(encoding="utf-8")))


def test_an_export_holds_the_images_and_percentages_of_the_file(chain):
    rows = exported(chain / "png")
    saved = read(chain / "hybrids.pt")
    assert len(rows) == 90
    assert list(rows[0]) == ["file", *ANIMALS]
    for row, image, q in zip(rows, saved["images"], saved["q"]):
        pixels = np.asarray(Image.open(chain / "png" / row["file"]))
        assert np.array_equal(pixels, image[0].numpy())
        stated = [float(row[name]) for name in ANIMALS]
        assert stated == approx(q.tolist(), abs=1e-5)


def test_an_exported_image_lies_in_the_folder_of_its_likeliest_class(chain):
    for row, q in zip(exported(chain / "png"), read(chain / "hybrids.pt")["q"]):
        assert ANIMALS[int(q.argmax())] in row["file"].split("/")[0]


def test_an_export_of_any_class_names_can_be_made_again(tmp_path):
    names = ['he said "$x"', "a/$b", "../../c, d"]      # a pair of $ is a formula to some
    out = tmp_path / "odd"
    tiny = npz(tmp_path / "tiny.npz", classes=np.array(names))
    assert run("vae", "--dataset", tiny, "-o", out, "--steps", 3, "--latent-dim", 2) == 0
    assert run("latent", "-o", out) == 0
    folder = out / "x/y/z"
    for count in (40, 20):              # the second replaces the first
        assert run("hybrids", "-o", out, "--count", count, "--export", folder) == 0
    rows = exported(folder)
    assert list(rows[0]) == ["file", *names]
    assert {folder / row["file"] for row in rows} == set(folder.glob("*/*.png"))


# ---- percentages of pictures and of points --------------------------------------------------

def percentages(text):
    """{class: its percentage} as printed, in that order."""
    lines = re.findall(r"^ *([\d.]+)% +(\w+)$", text, re.M)
    return {name: float(percent) for percent, name in lines}


def in_order(found):
    """Percentages by class, in the order of the classes."""
    return [found[name] for name in ANIMALS]


@pytest.fixture
def dog(tmp_path):
    """A picture of the second class."""
    file = tmp_path / "dog.png"
    images, _ = easy(3, seed=9)
    Image.fromarray(images[1, 0].numpy()).save(file)
    return file


def asked(capsys, folder, *words):
    """What a script prints when it is asked about a picture or a point."""
    assert run(*words, "-o", folder) == 0
    return capsys.readouterr().out


def test_every_class_has_its_percentage_the_likeliest_first(chain, dog, capsys):
    for words in (["latent", "--image", dog], ["latent", "--point", "0.3,-1.2,0,1"],
                  ["cnn", "--predict", dog]):
        found = percentages(asked(capsys, chain, *words))
        assert set(found) == set(ANIMALS)
        assert sum(found.values()) == approx(100, abs=0.2)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_picture_of_a_dog_is_a_dog(chain, dog, capsys):
    printed = asked(capsys, chain, "cnn", "--predict", dog)
    assert next(iter(percentages(printed))) == "dog"
    assert "inverted" not in printed


def test_a_point_has_the_percentages_of_the_calibrated_density(chain, capsys):
    posterior = latent.Aggregate(**read(chain / "latent.pt")["calibrated"]["aggregate"])
    wanted = posterior(torch.tensor([[0.3, -1.2, 0, 1]]))[0]
    found = percentages(asked(capsys, chain, "latent", "--point", "0.3,-1.2,0,1"))
    assert in_order(found) == approx((100 * wanted).tolist(), abs=0.06)


def test_a_picture_has_the_percentages_of_its_code_and_width(seen, dog, capsys):
    image = torch.from_numpy(np.array(Image.open(dog)))[None, None]
    posterior = latent.Aggregate(**seen.files["latent"]["calibrated"]["aggregate"])
    codes = vae.encode_all(seen.model, image)
    wanted = posterior(*codes)[0]
    printed = asked(capsys, seen.out, "latent", "--image", dog)
    assert printed.startswith(f"{dog}: grey, 16x16\n")
    found = percentages(printed)
    assert in_order(found) == approx((100 * wanted).tolist(), abs=0.06)


def test_ink_on_paper_is_inverted_where_the_set_is_chalk(chain, dog, capsys):
    chalk = percentages(asked(capsys, chain, "cnn", "--predict", dog))
    pixels = np.asarray(Image.open(dog))
    Image.fromarray(255 - pixels).convert("RGB").save(dog)      # and in colour
    printed = asked(capsys, chain, "cnn", "--predict", dog)
    assert "inverted" in printed
    assert percentages(printed) == chalk


def photographs(light):
    """A data set of 60 images, of which every third is light on request, and its facts."""
    x, y = easy(60)
    if light:
        x[::3] = 255 - x[::3]
    data = common.Dataset(x, y, x, y, ANIMALS, "photographs")
    return x, data.facts()


@pytest.mark.parametrize("row", range(4))
def test_pictures_of_a_set_of_light_and_dark_ones_are_never_inverted(tmp_path, row):
    x, facts = photographs(light=True)
    Image.fromarray(x[row, 0].numpy()).save(tmp_path / "one.png")
    image, report = common.read_like(tmp_path / "one.png", facts)
    assert torch.equal(image, x[row:row + 1])
    assert "inverted" not in report


def test_the_light_picture_of_a_dark_set_is_inverted(tmp_path):
    x, facts = photographs(light=False)
    Image.fromarray(255 - x[1, 0].numpy()).save(tmp_path / "one.png")
    image, _ = common.read_like(tmp_path / "one.png", facts)
    assert torch.equal(image, x[1:2])


def test_the_pictures_of_a_folder_are_a_table(chain, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for k, image in enumerate(easy(6, seed=9)[0]):
        folder = tmp_path / "in" if k % 2 else tmp_path
        Image.fromarray(image[0].numpy()).save(folder / f'{k} "a".png')
    printed = asked(capsys, chain, "cnn", "--predict", tmp_path)
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert len(rows) == 6
    assert list(rows[0]) == ["file", "likeliest", *ANIMALS]
    for row in rows:
        name = Path(row["file"]).name
        assert Path(row["file"]).exists()
        assert row["likeliest"] == ANIMALS[int(name[0]) % 3]
        assert sum(float(row[c]) for c in ANIMALS) == approx(1, abs=1e-3)


@pytest.mark.parametrize("words", [["latent", "--point", "0,0,0,0"], ["cnn", "--predict"]])
def test_a_question_writes_nothing(bare, dog, words):
    if words[-1] == "--predict":
        words = [*words, dog]
    before = {file: file.stat().st_mtime_ns for file in bare.rglob("*")}
    assert run(*words, "-o", bare) == 0
    assert {file: file.stat().st_mtime_ns for file in bare.rglob("*")} == before


# ---- unfinished work ------------------------------------------------------------------------

RESUMABLE = {"vae": ["--batch-size", 32],
             "cnn": ["--width", 8, "--augment", "--mixup", 1, "--cutmix", 1]}


def stop_after(patch, module, rounds):
    """Have Ctrl-C pressed when so many rounds of training are done and written down."""
    plain = module.fit

    def fit(*arguments, **settings):
        yield from itertools.islice(plain(*arguments, **settings), rounds)
        raise KeyboardInterrupt

    patch.setattr(module, "fit", fit)


@pytest.fixture(scope="session", params=RESUMABLE)
def resumed(request, chain, tmp_path_factory):
    """One training in one piece, and the same one in two; and what the first piece left."""
    name = request.param
    root = tmp_path_factory.mktemp("resumed")
    straight = Path(shutil.copytree(chain, root / "straight"))
    pieces = Path(shutil.copytree(chain, root / "pieces"))
    words = [name, *RESUMABLE[name], "--dataset", chain.parent / "tiny.npz", "--steps", 40]
    assert run(*words, "-o", straight) == 0
    (pieces / f"{name}.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, SCRIPTS[name], 4)
        code = run(*words, "-o", pieces)
    left = {file.name for file in pieces.iterdir()}
    unfinished_work = read(pieces / f"{name}.last.pt")
    assert run(*words, "-o", pieces, "--resume") == 0
    return SimpleNamespace(name=name, straight=straight, pieces=pieces, code=code, left=left,
                           work=unfinished_work)


def test_an_interruption_keeps_what_was_done_and_leaves_no_stem(resumed):
    assert resumed.code == 130
    assert f"{resumed.name}.pt" not in resumed.left
    assert resumed.work["state"]["step"] == 16
    assert len(resumed.work["history"]) == 4


def test_a_training_in_two_pieces_is_the_training_in_one(resumed):
    one = read(resumed.straight / f"{resumed.name}.pt")
    two = read(resumed.pieces / f"{resumed.name}.pt")
    assert same(one["model"], two["model"])
    assert one["metrics"] == two["metrics"]


def test_the_log_of_two_pieces_is_whole(resumed):
    assert steps_of(log_of(resumed.pieces, resumed.name)) == list(range(4, 41, 4))


@pytest.mark.parametrize("script", ["vae", "cnn"])
def test_ctrl_c_ends_in_one_line(chain, tmp_path, script):
    last = tmp_path / f"{script}.last.pt"
    command = [sys.executable, f"{script}.py", "--dataset", chain.parent / "tiny.npz", "-o",
               tmp_path, "--steps", 5000, "--threads", 1, "--quiet"]
    if script == "cnn":
        command += ["--hybrid-fraction", 0]
    command = [str(word) for word in command]
    process = subprocess.Popen(command, cwd=HERE, env=ENV, text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL)
    while not last.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert printed == f"{script}.py: interrupted; what was finished is kept\n"
    assert process.returncode == 130


def test_unfinished_work_of_another_kind_is_not_taken_up(bare, capsys):
    shutil.copy(bare / "vae.pt", bare / "cnn.last.pt")
    assert run("cnn", "-o", bare, "--steps", 3, "--width", 4, "--resume") == 0
    assert "does not fit these settings; starting afresh" in capsys.readouterr().err


@pytest.mark.parametrize("flag, value", [("--lr", 0.001), ("--seed", 1), ("--width", 5)])
def test_unfinished_work_of_other_settings_is_not_taken_up(bare, capsys, monkeypatch, flag,
                                                           value):
    words = ["cnn", "-o", bare, "--steps", 10, "--width", 4]
    with monkeypatch.context() as patch:
        stop_after(patch, cnn, 2)
        assert run(*words) == 130
    fits = note_fits(monkeypatch, cnn)
    assert run(*words, flag, value, "--resume") == 0
    assert "starting afresh" in capsys.readouterr().err
    assert fits[0].settings["state"] is None


def test_unfinished_work_on_other_hybrids_is_not_taken_up(bare, capsys, monkeypatch):
    words = ["cnn", "-o", bare, "--steps", 10, "--width", 4]
    with monkeypatch.context() as patch:
        stop_after(patch, cnn, 2)
        assert run(*words) == 130
    assert run("hybrids", "-o", bare, "--count", 90, "--seed", 9) == 0
    assert run(*words, "--resume") == 0
    assert "starting afresh" in capsys.readouterr().err


def test_without_resume_a_training_starts_afresh(bare, monkeypatch):
    words = ["cnn", "-o", bare, "--steps", 10, "--width", 4]
    with monkeypatch.context() as patch:
        stop_after(patch, cnn, 2)
        assert run(*words) == 130
    fits = note_fits(monkeypatch, cnn)
    assert run(*words) == 0
    assert fits[0].settings["state"] is None


# ---- the grid of the comparison -------------------------------------------------------------

def compared(folder, *words):
    """What compare.json says after these words."""
    assert run("compare", "-o", folder, "--jobs", 1, *words) == 0
    return json.loads((folder / "compare.json").read_text())


def test_every_size_subset_and_arm_has_its_cell_and_its_row(grid):
    wanted = set(itertools.product([12, 30], [0, 1], ["real", "real+hybrid"]))
    rows = json.loads((grid / "compare.json").read_text())["rows"]
    assert {(row["n"], row["seed"], row["arm"]) for row in rows} == wanted
    assert len(rows) == len(list((grid / "cells").iterdir())) == 8


def test_the_result_of_a_grid_says_what_it_is(grid):
    facts = json.loads((grid / "compare.json").read_text())
    assert facts["kind"] == "compare"
    assert facts["failed"] == []
    assert [(entry["n"], entry["arm"]) for entry in facts["summary"]] == [
        (12, "real"), (12, "real+hybrid"), (30, "real"), (30, "real+hybrid")]
    wanted = {"steps": 8, "vae_steps": 8, "width": 4}
    assert facts["recipes"]["12"].items() >= wanted.items()
    assert facts["dataset"]["classes"] == ANIMALS


def test_the_csv_has_the_figures_of_the_cells(grid):
    rows = list(csv.DictReader((grid / "compare.csv").open()))
    assert len(rows) == 8
    for content in cells_of(grid).values():
        cell, _ = json.loads(content)
        assert {key: str(value) for key, value in cell.items()} in rows


def test_a_grid_leaves_a_picture_and_nothing_unfinished(grid):
    assert Image.open(grid / "compare.png").width > 600
    assert not unfinished(grid)


@pytest.fixture
def same_grid(grid, tmp_path):
    """One's own copy of the finished grid, and the words that go on with it."""
    out = Path(shutil.copytree(grid, tmp_path / "grid"))
    words = [*GRID, "--dataset", grid / "tiny.npz", "-o", out, "--jobs", 1]
    return out, words


def test_a_grid_computes_again_only_the_cell_that_was_lost(same_grid, grid):
    out, words = same_grid
    lost, *kept = sorted((out / "cells").iterdir())
    before = {file: file.stat().st_mtime_ns for file in kept}
    content = lost.read_bytes()
    lost.unlink()
    assert run(*words) == 0
    assert lost.read_bytes() == content
    assert {file: file.stat().st_mtime_ns for file in kept} == before
    assert (out / "compare.csv").read_text() == (grid / "compare.csv").read_text()


@pytest.mark.parametrize("change", [
    ["--weight-decay", "0.1"], ["--width", "5"], ["--steps", "9"], ["--vae-steps", "9"],
    ["--latent-dim", "5"], ["--score", "validation"], ["--unlabelled"], ["--seed", "2"]],
    ids=" ".join)
def test_other_settings_make_other_cells(same_grid, monkeypatch, change):
    out, words = same_grid
    asked_for = []

    def no_unit(unit, grid, shared=None):
        asked_for.append(unit)
        return unit, "not now"

    monkeypatch.setattr(compare, "run_unit", no_unit)
    assert run(*words, *change) == 2
    assert len(asked_for) == 4


def test_other_arithmetic_makes_other_cells(same_grid, capsys):
    out, words = same_grid
    fast = common.bfloat16_is_fast(torch.device("cpu"))
    assert run(*words, "--no-amp" if fast else "--amp", "--gather") == 2
    assert capsys.readouterr().err.endswith("compare.py: there is no finished cell\n")


def test_a_comparison_says_how_far_it_is(same_grid, capsys):
    out, words = same_grid
    for file in (out / "cells").glob("12-*"):
        file.unlink()
    words = [str(word) for word in words[1:]]
    assert compare.main([*words, "--threads", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["subsets 1/2", "n=12 subset 0"], ["subsets 2/2", "n=12 subset 1"]]


def test_a_comparison_is_by_default_of_two_sizes_five_subsets_and_three_arms():
    args = compare.parse_args([])
    assert args.sizes == [100, 300]
    assert args.seeds == 5
    assert args.arms == ["real", "mixup", "real+hybrid"]


def test_the_defaults_are_those_that_were_chosen():
    chosen = json.loads((HERE / "assets/baseline.json").read_text())["chosen"]
    args = compare.parse_args([])
    assert args.width == chosen["width"]
    assert args.weight_decay == chosen["weight_decay"]
    assert compare.BATCH == chosen["batch_size"]
    assert compare.STEPS == {int(n): steps for n, steps in chosen["steps"].items()}
    assert inspect.signature(cnn.fit).parameters["lr"].default == chosen["lr"]


def cells_of(folder):
    return {file.name: file.read_text() for file in (folder / "cells").iterdir()}


def test_two_jobs_make_the_same_cells_in_processes_of_their_own(grid, tmp_path, monkeypatch):
    fits = note_fits(monkeypatch, cnn)
    assert run(*GRID, "--dataset", grid / "tiny.npz", "-o", tmp_path, "--jobs", 2) == 0
    assert fits == []
    assert cells_of(tmp_path) == cells_of(grid)


def test_sizes_above_the_images_there_are_left_out_and_said(tmp_path, capsys):
    tiny = npz(tmp_path / "tiny.npz")
    words = [*STEMS["compare"], "--sizes", 12, 5000, "--arms", "real"]
    facts = compared(tmp_path, "--dataset", tiny, *words)
    assert list(facts["recipes"]) == ["12"]
    assert "sizes above the 179 images there are left out" in capsys.readouterr().err


def test_largest_subsets_come_first(tmp_path):
    tiny = npz(tmp_path / "tiny.npz")
    grid = grid_of("--dataset", tiny, "-o", tmp_path, "--sizes", 12, 30, 20, "--seeds", 2,
                   "--seed", 4)
    sizes = [n for n, _ in grid.units()]
    assert sizes == [30, 30, 20, 20, 12, 12]
    assert [seed for _, seed in grid.units()] == [4, 5, 4, 5, 4, 5]


def grid_of(*words):
    """The Grid that these words plan."""
    args = compare.parse_args([*map(str, words), "--threads", "1", "--quiet"])
    started = common.start(args)
    started.release()
    return compare.plan(started, args)


def failing_fit(model, next_batch, **settings):
    """In place of a training that does not stay finite, where the CNN is the wide one."""
    if settings["steps"] == 9:
        raise FloatingPointError("the loss is not finite between steps 0 and 9\nmore of it")
    yield {}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A folder where one of two cells cannot be trained, and the words that try."""
    tiny = npz(tmp_path / "tiny.npz")
    words = ["compare", "--dataset", tiny, "-o", tmp_path, "--sizes", 12, "--seeds", 1,
             "--vae-steps", 3, "--steps", 9, "--jobs", 1, "--arms", "real", "latent posterior"]
    monkeypatch.setattr(cnn, "fit", failing_fit)
    return tmp_path, words


def test_a_failing_arm_is_recorded_and_the_others_go_on(broken, capsys):
    out, words = broken
    assert run(*words) == 2
    facts = json.loads((out / "compare.json").read_text())
    wanted = "n=12 subset 0: real: the loss is not finite between steps 0 and 9"
    assert facts["failed"] == [wanted]
    assert [row["arm"] for row in facts["rows"]] == ["latent posterior"]
    printed = capsys.readouterr().err
    assert f"failed: {wanted}" in printed
    assert "1 subsets are incomplete; run it again" in printed


def test_gather_trains_nothing_and_says_what_is_missing(same_grid, capsys, monkeypatch):
    out, words = same_grid
    sorted((out / "cells").glob("30-1-*"))[0].unlink()
    fits = note_fits(monkeypatch, cnn)
    assert run(*words, "--gather") == 2
    assert fits == []
    assert "n=30 subset 1: not finished" in capsys.readouterr().err
    assert len(json.loads((out / "compare.json").read_text())["rows"]) == 7


def test_gather_of_a_whole_grid_makes_its_result(same_grid, grid):
    out, words = same_grid
    (out / "compare.csv").unlink()
    (out / "compare.json").unlink()
    assert run(*words, "--gather") == 0
    assert (out / "compare.csv").read_text() == (grid / "compare.csv").read_text()
    facts = json.loads((out / "compare.json").read_text())
    assert facts["summary"] == json.loads((grid / "compare.json").read_text())["summary"]


def test_gather_of_nothing_is_a_mistake(tmp_path, capsys):
    tiny = npz(tmp_path / "tiny.npz")
    assert run("compare", "--dataset", tiny, "-o", tmp_path, "--sizes", 12, "--gather") == 2
    assert capsys.readouterr().err.endswith("compare.py: there is no finished cell\n")


@pytest.mark.parametrize("words, device, wanted", [
    ([], "cpu", 4),
    (["--threads", 2], "cpu", 2),
    (["--jobs", 3], "cpu", 3),
    (["--jobs", 9], "cpu", 5),          # there are no more subsets
    ([], "cuda", 4),                    # of eight cores
    (["--jobs", 1], "cuda", 1),
    ([], "mps", 1)])
def test_a_job_per_core_unless_told_otherwise(tmp_path, monkeypatch, words, device, wanted):
    calls = []

    def run_grid(units, work, jobs, threads, progress):
        calls.append((jobs, threads))
        return []

    monkeypatch.setattr(compare, "run_grid", run_grid)
    tiny = npz(tmp_path / "tiny.npz")
    words = ["--dataset", tiny, "-o", tmp_path, "--seeds", 5, "--sizes", 12, *words]
    args = compare.parse_args([str(word) for word in words])
    started = common.start(args)
    grid = compare.plan(started, args)
    started.cores = 8 if device == "cuda" else 4
    started.device = torch.device(device)
    compare.train_missing(started, args, grid)
    started.release()
    torch.set_num_threads(1)
    assert calls == [(wanted, args.threads or 1)]


# ---- the arms of the comparison: what reaches their training --------------------------------

def note_grid(tmp_path_factory, tiny, *words):
    """A comparison of one subset, and what reached its trainings, its hybrids, its scores."""
    out = tmp_path_factory.mktemp("noted")
    noted = SimpleNamespace(out=out)
    with pytest.MonkeyPatch.context() as patch:
        noted.vaes = note_fits(patch, vae)
        fits = note_fits(patch, cnn)
        pools = note_calls(patch, hybrids, "make")
        moves = note_calls(patch, cnn, "moving")
        sources = note_calls(patch, cnn, "batches")
        noted.spreads = note_calls(patch, latent, "spread_labels")
        asked = note_deformations(patch)
        noted.scores = note_calls(patch, compare, "evaluate")
        facts = compared(out, "--dataset", tiny, "--sizes", 12, "--seeds", 1, "--seed", 3,
                         "--width", 4, "--latent-dim", 4, "--vae-steps", 20, "--no-amp",
                         *words)
    noted.rows = {row["arm"]: row for row in facts["rows"]}
    noted.data = dataset(tiny, out)
    noted.pool, noted.validation = common.split(noted.data)
    noted.subset = common.subset(noted.data, noted.pool, 12, 3)
    trained = [arm for arm in noted.rows if arm != "latent posterior"]
    noted.fits = dict(zip(trained, fits, strict=True))
    noted.sources = {arm: given for arm, (given, _) in zip(trained, sources, strict=True)}
    mixed = [arm for arm in trained if compare.ARMS[arm].strategy]
    pools = [Pool(*arguments, *result) for arguments, result in pools]
    noted.pools = dict(zip(mixed, pools, strict=True))
    # Every arm of hybrids that are deformed has flows for its real images.
    deformed = [arm for arm in mixed if compare.ARMS[arm].deform]
    noted.flows = {arm: flows for arm, ((flows,), _) in zip(deformed, moves, strict=True)}
    noted.asked = asked
    return noted


class Pool(NamedTuple):
    """What the hybrids of an arm were made of, and what they are."""
    points: hybrids.Points
    codes: latent.Codes
    images: torch.Tensor
    decode: object
    x: torch.Tensor
    q: torch.Tensor


class Noting(vae.Deformations):
    """Deformations that note what they were made of, what they are given and what they do."""

    def __init__(self, images, y, generator):
        super().__init__(**deformations(0.5, False, *images.shape[2:]).fields())
        self.images = images
        self.y = y
        self.seed = generator.initial_seed()
        self.calls = []

    def __call__(self, x, q, generator):
        result = super().__call__(x, q, generator)
        self.calls.append((x, *result))
        return result


def note_deformations(patch):
    """Have all images move -> a list that grows: the deformations, which note their use."""
    asked = []

    def fit(images, y, generator):
        asked.append(Noting(images, y, generator))
        return asked[-1]

    patch.setattr(vae.Deformations, "fit", fit)
    return asked


@pytest.fixture(scope="session")
def grey(tmp_path_factory):
    """Every arm of the comparison on one subset of grey images."""
    tiny = backwards(tmp_path_factory.mktemp("grey") / "tiny.npz")
    return note_grid(tmp_path_factory, tiny, "--steps", 8, "--arms", *compare.ARMS)


@pytest.fixture(scope="session")
def colour(tmp_path_factory):
    """Some arms on one subset of colour images."""
    test, _ = easy(60, channels=3, seed=60)
    tiny = tmp_path_factory.mktemp("colour") / "tiny.npz"
    npz(tiny, x_train=RGB, x_test=test.numpy())
    return note_grid(tmp_path_factory, tiny, "--steps", 8, "--arms", "real", "elastic",
                     "real+hybrid", "augment+hybrid", "undeformed hybrid",
                     "cross-faded hybrid")


DEFORMED = ["real+hybrid", "hybrid only", "cross-faded hybrid", "deformed images",
            "weight labels", "density labels", "no residual"]
UNDEFORMED = ["undeformed hybrid", "prior hybrid", "reconstructions", "pseudo-labels"]
CLEAN_IN_THE_END = ["real", "mixup", "cutmix", "mixup+cutmix", *UNDEFORMED]


def test_every_arm_was_compared(grey):
    assert list(grey.rows) == list(compare.ARMS)


def test_every_arm_starts_from_the_same_weights(grey):
    wanted = first_weights_of(cnn.CNN, 3, 1, 3, 4, 16)
    for arm, fit in grey.fits.items():
        assert same(fit.weights, wanted), arm
        assert fit.seed == 3


def test_every_arm_takes_the_same_steps_on_batches_of_the_same_size(grey):
    for arm, fit in grey.fits.items():
        assert fit.settings["steps"] == 8, arm
        assert [len(x) for x, _ in fit.batches] == [64] * 8, arm


def test_every_arm_is_trained_by_the_same_settings(grey):
    for arm, fit in grey.fits.items():
        assert fit.settings["weight_decay"] == 0.05
        assert fit.settings["amp"] is False
        assert "lr" not in fit.settings


@pytest.mark.parametrize("arm", CLEAN_IN_THE_END)
def test_in_the_end_an_arm_sees_the_images_of_its_subset_with_their_labels(grey, arm):
    for x, q in grey.fits[arm].batches[6:]:
        where = rows_among(x, grey.data.images)
        assert torch.isin(where, grey.subset).all()
        assert torch.equal(q, one_hot(grey.data.labels[where]))


def test_real_sees_only_and_all_of_the_images_of_its_subset(grey):
    used = rows_used(grey.fits["real"], grey.data.images)
    assert used == set(grey.subset.tolist())


@pytest.mark.parametrize("arm", [*DEFORMED, *UNDEFORMED, "augment+hybrid"])
def test_a_hybrid_arm_gets_as_many_hybrids_as_its_training_takes_images(grey, arm):
    assert len(grey.pools[arm].x) == 8 * 64
    assert len(grey.pools[arm].q) == 8 * 64


def pairs_of(x, q):
    """Every image with its probabilities, as bytes: few images make some hybrids alike."""
    if x.is_floating_point():
        x = as_bytes(x)
    return [bytes_in(image) + bytes_in(row) for image, row in zip(x, q)]


def as_bytes(x):
    """Images in [0,1] as uint8."""
    return (x * 255).round().byte()


@pytest.mark.parametrize("arm", [*DEFORMED, *UNDEFORMED])
def test_in_its_first_half_a_hybrid_arm_sees_hybrids_with_their_percentages(grey, arm):
    made = set(pairs_of(grey.pools[arm].x, grey.pools[arm].q))
    batches = grey.fits[arm].batches
    if arm != "hybrid only":
        batches = batches[:5]
    for x, q in batches:
        assert set(pairs_of(x, q)) <= made


def test_between_first_half_and_last_quarter_a_hybrid_arm_sees_both(grey):
    pool = grey.pools["real+hybrid"]
    made = set(pairs_of(pool.x, pool.q))
    x, q = grey.fits["real+hybrid"].batches[5]
    assert sum(pair in made for pair in pairs_of(x, q)) == 32


def test_hybrids_have_percentages_of_several_classes(grey):
    q = grey.pools["real+hybrid"].q
    assert part_of(q.amax(1) < 0.9) > 0.3
    close(q.sum(1), torch.ones(len(q)))


@pytest.mark.parametrize("arm", [
    "hybrid only", "undeformed hybrid", "cross-faded hybrid", "weight labels",
    "density labels", "no residual", "augment+hybrid"])
def test_all_hybrid_arms_between_codes_have_the_same_points(grey, arm):
    wanted = grey.pools["real+hybrid"].points
    assert torch.equal(grey.pools[arm].points.z, wanted.z)


def test_points_between_codes_mix_two_images(grey):
    points = grey.pools["real+hybrid"].points
    codes = grey.pools["real+hybrid"].codes
    assert 0.6 < part_of(codes.y[points.i] != codes.y[points.j]) < 0.8
    t = points.t[:, None]
    first = codes.mu[points.i]
    second = codes.mu[points.j]
    close(points.z, t * first + (1 - t) * second)


def test_points_of_the_prior_hybrid_arm_are_of_no_images(grey):
    points = grey.pools["prior hybrid"].points
    assert points.i is None
    assert points.z.std().item() == approx(1, abs=0.1)


@pytest.mark.parametrize("arm", ["reconstructions", "pseudo-labels", "deformed images"])
def test_points_about_one_code_have_its_label(grey, arm):
    pool = grey.pools[arm]
    assert torch.equal(pool.points.i, pool.points.j)
    y = pool.codes.y[pool.points.i]
    assert torch.equal(pool.q, one_hot(y))


@pytest.mark.parametrize("arm, rule", [
    ("real+hybrid", "product"), ("hybrid only", "product"), ("augment+hybrid", "product"),
    ("no residual", "product"), ("weight labels", "weight"), ("density labels", "density"),
    ("undeformed hybrid", "product"), ("cross-faded hybrid", "product"),
    ("prior hybrid", "density")])
def test_hybrids_of_an_arm_are_labelled_by_its_rule(grey, arm, rule):
    pool = grey.pools[arm]
    close(pool.q, hybrids.label(rule, pool.points, pool.codes))


def before_they_moved(grey, arm):
    """The hybrids of an arm as they were given to the deformations, as bytes."""
    for x, moved, _ in grey.asked[0].calls:
        if torch.equal(as_bytes(moved), grey.pools[arm].x):
            return as_bytes(x)
    raise AssertionError(f"{arm} was not deformed")


@pytest.mark.parametrize("arm", ["prior hybrid", "reconstructions"])
def test_an_arm_without_residual_shows_what_the_decoder_says(grey, arm):
    pool = grey.pools[arm]
    decoded = pool.decode(pool.points.z)
    assert torch.equal(pool.x, as_bytes(decoded))


def test_hybrids_without_residual_are_decoded_and_then_deformed(grey):
    pool = grey.pools["no residual"]
    decoded = pool.decode(pool.points.z)
    assert torch.equal(before_they_moved(grey, "no residual"), as_bytes(decoded))


def test_hybrids_are_morphs_before_they_are_deformed(grey):
    pool = grey.pools["real+hybrid"]
    morph = functools.partial(vae.Morph, strength=0.5)
    morphed = hybrids.render(pool.points, pool.codes, pool.images, pool.decode, morph=morph)
    assert torch.equal(before_they_moved(grey, "real+hybrid"), morphed)


def test_undeformed_hybrids_are_neither_morphed_nor_deformed(grey):
    pool = grey.pools["undeformed hybrid"]
    plain = hybrids.render(pool.points, pool.codes, pool.images, pool.decode)
    assert torch.equal(pool.x, plain)


def test_cross_faded_hybrids_are_deformed_but_not_morphed(grey):
    plain = grey.pools["undeformed hybrid"].x
    assert torch.equal(before_they_moved(grey, "cross-faded hybrid"), plain)
    assert not torch.equal(before_they_moved(grey, "real+hybrid"), plain)


def test_deformed_images_are_images_of_the_subset_that_move(grey):
    pool = grey.pools["deformed images"]
    given = before_they_moved(grey, "deformed images")
    assert torch.equal(given, pool.images[pool.points.i])
    assert set(rows_among(given, grey.data.images).tolist()) == set(grey.subset.tolist())


@pytest.mark.parametrize("arm", [*DEFORMED, *UNDEFORMED, "augment+hybrid"])
def test_percentages_of_hybrids_are_as_without_deformations(grey, arm):
    pool = grey.pools[arm]
    rule = compare.ARMS[arm].label
    close(pool.q, hybrids.label(rule, pool.points, pool.codes))


def test_an_arm_of_deformed_hybrids_has_a_thousand_flows_for_its_real_images(grey):
    assert list(grey.flows) == [arm for arm in grey.fits if arm in DEFORMED]
    wanted = grey.asked[0].repertoire(1000, seeded(3))
    for arm, flows in grey.flows.items():
        assert torch.equal(flows, wanted), arm


def test_the_real_images_of_a_deformed_arm_are_moved_by_its_flows(grey):
    x, q = grey.fits["real+hybrid"].batches[6]
    images = grey.data.images[grey.subset]
    seen = {}
    for image, y in zip(images / 255, grey.data.labels[grey.subset]):
        moved = vae.warp(image.expand(1000, -1, -1, -1), grey.flows["real+hybrid"])
        seen.update(dict.fromkeys(map(bytes_in, as_bytes(moved)), int(y)))
    for image, row in zip(as_bytes(x), q):
        assert row[seen[bytes_in(image)]] == 1


@pytest.mark.parametrize("arm", ["deform", "deform+mixup"])
def test_all_batches_of_an_arm_deform_are_deformed(grey, arm):
    made = {id(moved): x for x, moved, _ in grey.asked[0].calls}
    for x, _ in grey.fits[arm].batches:
        assert id(x) in made


def test_the_arm_deform_sees_the_images_of_its_subset_moved_and_no_other(grey):
    made = {id(moved): x for x, moved, _ in grey.asked[0].calls}
    for x, q in grey.fits["deform"].batches:
        where = rows_among(made[id(x)], grey.data.images)
        assert torch.isin(where, grey.subset).all()
        assert torch.equal(q, one_hot(grey.data.labels[where]))


def test_the_arm_deform_with_mixup_mixes_first_and_moves_then(grey):
    made = {id(moved): x for x, moved, _ in grey.asked[0].calls}
    batches = grey.fits["deform+mixup"].batches
    assert part_of(rows_among(made[id(batches[0][0])], grey.data.images) < 0) > 0.8
    weights = batches[0][1]
    weights = weights[(weights > 0) & (weights < 1)]
    assert weights.std().item() == approx(1 / 6, abs=0.05)      # of Beta(4, 4)
    last = rows_among(made[id(batches[7][0])], grey.data.images)
    assert torch.isin(last, grey.subset).all()


@pytest.mark.parametrize("arm", [*CLEAN_IN_THE_END, "augment", "elastic", "augment+mixup",
                                 "augment+hybrid"])
def test_other_arms_are_not_deformed(grey, arm):
    made = {id(moved) for _, moved, _ in grey.asked[0].calls}
    assert not any(id(x) in made for x, _ in grey.fits[arm].batches)
    assert arm not in grey.flows


def test_the_deformations_of_a_subset_are_asked_of_its_images_and_of_no_other(grey):
    deform, = grey.asked                # once, for all arms
    assert torch.equal(deform.images, grey.data.images[grey.subset])
    assert torch.equal(deform.y, grey.data.labels[grey.subset])
    assert deform.seed == 3


@pytest.mark.parametrize("arm, as_arm", [
    ("real+hybrid", "undeformed hybrid"), ("cross-faded hybrid", "undeformed hybrid"),
    ("deformed images", "pseudo-labels"), ("deform", "real"),
    ("deform+mixup", "augment+mixup")])
def test_where_nothing_moves_an_arm_is_trained_as_without(tmp_path, monkeypatch, arm, as_arm):
    monkeypatch.setattr(vae.Deformations, "fit", found((0.0, False)))
    monkeypatch.setattr(cnn, "augment", lambda x, q, generator: (x, q))
    facts = compared(tmp_path, "--dataset", npz(tmp_path / "tiny.npz"), *STEMS["compare"],
                     "--arms", arm, as_arm)
    first, second = facts["rows"]
    assert {**first, "arm": ""} == {**second, "arm": ""}


def test_pseudo_labels_are_of_images_as_they_are(grey):
    pool = grey.pools["pseudo-labels"]
    assert torch.equal(pool.x, pool.images[pool.points.i])


@pytest.mark.parametrize("channels, arm, wanted", [
    (1, "undeformed hybrid", False), (1, "augment+hybrid", False),
    (3, "undeformed hybrid", True), (3, "augment+hybrid", False)])
def test_colour_is_cut_unless_augmented_and_grey_is_mixed(grey, colour, channels, arm, wanted):
    pool = {1: grey.pools, 3: colour.pools}[channels][arm]
    assert is_cut(pool.x, pool.points, pool.images) == wanted


def test_hybrids_of_colour_are_cut_and_deformed_but_not_morphed(colour):
    cut = before_they_moved(colour, "real+hybrid")
    assert torch.equal(cut, colour.pools["undeformed hybrid"].x)
    assert torch.equal(cut, before_they_moved(colour, "cross-faded hybrid"))


def test_mixup_shows_halves_of_two_images_of_the_subset(grey):
    x, q = grey.fits["mixup"].batches[0]
    assert set(q.unique().tolist()) <= {0.0, 0.5, 1.0}
    images = grey.data.images[grey.subset].int()
    pairs = (images[:, None] + images[None]).flatten(0, 1)
    sums = (x * 510).round().int()
    assert part_of(rows_among(x, grey.data.images) < 0) > 0.8   # not of one image, twice
    for total in sums[:9]:
        assert (pairs == total).flatten(1).all(1).any()


def test_cutmix_shows_pixels_of_images_of_the_subset(grey):
    x, q = grey.fits["cutmix"].batches[0]
    close(255 * x, (255 * x).round(), atol=1e-3, rtol=0)
    close(256 * q, (256 * q).round(), atol=1e-3, rtol=0)
    assert len(q.unique()) > 20


def test_mixup_and_cutmix_take_turns(grey):
    halves = []
    for _, q in grey.fits["mixup+cutmix"].batches[:4]:
        halves.append(set(q.unique().tolist()) <= {0.0, 0.5, 1.0})
    assert halves == [True, False, True, False]


def test_mixup_of_augmented_images_has_random_weights(grey):
    q = torch.cat([q for _, q in grey.fits["augment+mixup"].batches[:5]])
    weights = q[(q > 0) & (q < 1)]
    assert len(weights.unique()) > 100
    assert weights.std().item() == approx(1 / 6, abs=0.02)      # of Beta(4, 4)


@pytest.mark.parametrize("arm", ["augment", "augment+mixup", "augment+hybrid", "elastic"])
def test_an_augmented_arm_never_sees_an_image_as_it_is(grey, arm):
    assert rows_used(grey.fits[arm], grey.data.images) == {-1}


@pytest.mark.parametrize("arm", ["augment", "elastic", "deform"])
def test_an_arm_that_changes_images_keeps_their_labels(grey, arm):
    for _, q in grey.fits[arm].batches:
        assert set(q.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("channels, transform", [(1, cnn.elastic), (3, cnn.flip_crop)])
def test_the_arm_elastic_bends_grey_images_and_mirrors_those_of_colour(grey, colour, channels,
                                                                      transform):
    noted = {1: grey, 3: colour}[channels]
    generator = seeded(3)
    images = noted.data.images[noted.subset]
    plain = cnn.batches((images, one_hot(noted.data.labels[noted.subset])), 64)
    x, q = noted.fits["elastic"].batches[0]
    wanted, _ = transform(*plain(generator, 0), generator)
    assert torch.equal(x, wanted)


def test_hybrids_are_augmented_where_the_arm_says_so(grey):
    made = grey.pools["augment+hybrid"].x
    assert rows_used(grey.fits["augment+hybrid"], made) == {-1}


def test_test_and_validation_images_never_reach_a_training(grey, colour):
    for noted in (grey, colour):
        rest = noted.data.images[noted.validation]
        strangers = torch.cat([noted.data.test_images, rest])
        for fit in [*noted.fits.values(), *noted.vaes]:
            assert rows_used(fit, strangers) == {-1}


def test_the_vae_of_a_subset_sees_its_images_and_no_other(grey):
    used = rows_used(grey.vaes[0], grey.data.images)
    assert used == set(grey.subset.tolist())


def test_the_arms_of_a_subset_share_their_vae(grey):
    assert len(grey.vaes) == 1
    for pool in grey.pools.values():
        assert pool.codes is grey.pools["real+hybrid"].codes


def test_the_vae_of_a_subset_is_trained_by_its_settings(grey):
    wanted = first_weights_of(vae.VAE, 3, 1, 16, 16, latent_dim=4)
    for fit in grey.vaes:
        assert same(fit.weights, wanted)
        assert fit.seed == 3
        assert fit.settings["steps"] == 20
        assert fit.settings["amp"] is False
        assert [len(x) for x in fit.batches] == [64] * 20


def test_codes_and_percentages_are_those_of_the_vae(grey):
    codes = grey.pools["real+hybrid"].codes
    images = grey.data.images[grey.subset]
    mu, logvar = vae.encode_all(grey.vaes[0].model, images)
    close((codes.mu, codes.logvar), (mu, logvar))
    assert torch.equal(codes.y, grey.data.labels[grey.subset])
    wanted = latent.teach(mu, logvar, codes.y, 3)
    close(codes.posterior(mu), wanted(mu))


def test_sources_says_how_many_images_hybrids_were_made_of(grey):
    for row in grey.rows.values():
        assert row["sources"] == 12


def test_amp_and_weight_decay_reach_every_training(tmp_path, monkeypatch):
    fits = note_fits(monkeypatch, cnn)
    vaes = note_fits(monkeypatch, vae)
    tiny = npz(tmp_path / "tiny.npz")
    compared(tmp_path, "--dataset", tiny, *STEMS["compare"], "--amp", "--weight-decay", 0.2,
             "--arms", "real+hybrid")
    assert fits[0].settings["amp"] is True
    assert fits[0].settings["weight_decay"] == 0.2
    assert vaes[0].settings["amp"] is True


def test_each_subset_has_images_and_weights_of_its_own(tmp_path, monkeypatch):
    fits = note_fits(monkeypatch, cnn)
    tiny = npz(tmp_path / "tiny.npz")
    compared(tmp_path, "--dataset", tiny, *STEMS["compare"], "--seeds", 2, "--arms", "real")
    data = dataset(tiny, tmp_path)
    pool, _ = common.split(data)
    for seed, fit in enumerate(fits):
        subset = common.subset(data, pool, 12, seed)
        assert rows_used(fit, data.images) == set(subset.tolist())
    assert not same(fits[0].weights, fits[1].weights)


@pytest.mark.parametrize("images, steps", [(GREY, 300), (RGB, 600)])
def test_a_grid_plans_the_steps_of_its_images(tmp_path, images, steps):
    tiny = npz(tmp_path / "tiny.npz", x_train=images, x_test=images[:60])
    recipes = grid_of("--dataset", tiny, "-o", tmp_path, "--sizes", 12, 120).recipes
    assert recipes[12]["steps"] == steps
    assert recipes[120]["steps"] == steps / 3 * 4


def test_steps_that_are_given_are_taken(tmp_path):
    tiny = npz(tmp_path / "tiny.npz")
    words = ["--dataset", tiny, "-o", tmp_path, "--sizes", 12, 120, "--steps", 7]
    for recipe in grid_of(*words).recipes.values():
        assert recipe["steps"] == 7


@pytest.mark.parametrize("words, steps", [
    ([], 600),
    (["--unlabelled"], 3000),
    (["--unlabelled", "--vae-steps", "9"], 9)])
def test_a_vae_of_all_images_takes_more_steps(tmp_path, words, steps):
    data = str(npz(tmp_path / "tiny.npz"))
    args = compare.parse_args(["--dataset", data, "-o", str(tmp_path / "out"), "--sizes", "12",
                               *words])
    work = common.start(args)
    assert compare.plan(work, args).recipes[12]["vae_steps"] == steps
    work.release()


def test_a_pool_holds_at_most_50_000_hybrids(monkeypatch, tmp_path):
    counts = []

    def pool(source, arm, count, deform, seed):
        counts.append(count)

    monkeypatch.setattr(compare.Source, "pool", pool)
    monkeypatch.setattr(cnn, "fit", failing_fit)
    tiny = npz(tmp_path / "tiny.npz")
    grid = grid_of("--dataset", tiny, "-o", tmp_path, "--sizes", 12, "--steps", 800,
                   "--vae-steps", 1)
    compare.Unit(grid, 12, 0).row("real+hybrid")
    assert counts == [50_000]


# ---- images without a label -----------------------------------------------------------------

def loose(folder, count=3, seed=7):
    """Pictures of no class, no two alike."""
    return noisy(folder.parent, [folder.name], count, seed)


PLACES = {                             # where the labelled ones are, and those without
    "beside train": ("train", ["unlabelled"]),
    "beside bare classes": ("", ["unlabelled"]),
    "inside train": ("train", ["train/unlabelled"]),
    "as Americans write it": ("", ["Unlabeled"]),
    "in any case, any depth": ("train", ["UNLABELLED/a/b", "UNLABELLED/a"]),
    "in several places": ("train", ["unlabelled", "unlabeled", "train/unlabelled"]),
}


@pytest.mark.parametrize("name", PLACES)
def test_pictures_without_a_label_are_found(tmp_path, name):
    train, places = PLACES[name]
    root = tmp_path / "zoo"
    noisy(root / train)
    before = dataset(root, tmp_path)
    for k, place in enumerate(places):
        loose(root / place, seed=k)
    data = dataset(root, tmp_path)
    assert data.classes == ["bird", "fish"]
    assert len(data.unlabelled) == 3 * len(places)
    for part, images in enumerate(before.tensors()):
        assert torch.equal(images, data.tensors()[part])
    first = len(data.images)
    for name, image in zip(data.names[first:], data.unlabelled):
        assert np.array_equal(common.read_image(root / name, (32, 32)), image)


def test_an_empty_folder_of_them_is_as_good_as_none(tmp_path):
    root = noisy(tmp_path / "zoo")
    before = dataset(root, tmp_path).facts()
    (root / "unlabelled").mkdir()
    assert dataset(root, tmp_path).facts() == before


@pytest.mark.parametrize("places, pattern", [
    (["cat", "dog", "unlabled"], "is unlabled a class. .*rename it unlabeled"),
    (["train/cat", "train/dog", "test/cat", "test/dog", "test/unlabelled"],
     "zoo/test/unlabelled: .*for training; move them to .*zoo/unlabelled"),
    (["unlabelled"], "no classes"),
    (["test/cat", "test/dog", "unlabelled"], "no train/")])
def test_a_folder_of_them_in_a_wrong_place_ends_in_one_line(tmp_path, capsys, places, pattern):
    for place in places:
        loose(tmp_path / "zoo" / place)
    line = mistake(capsys, "vae", "--dataset", tmp_path / "zoo", "-o", tmp_path / "run")
    assert re.search(pattern, line), line


def test_a_damaged_picture_among_them_is_named(tmp_path, capsys):
    root = noisy(tmp_path / "zoo")
    loose(root / "unlabelled")
    (root / "unlabelled" / "1.png").write_text("not a picture")
    assert run("vae", "--dataset", root, "-o", tmp_path / "run") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "unlabelled/1.png cannot be read as an image" in line


def test_every_file_has_its_name(tmp_path):
    root = noisy(tmp_path / "zoo")
    loose(root / "unlabelled" / "deep")
    data = dataset(root, tmp_path)
    every = torch.arange(len(data.names))
    for name, image, y in zip(data.names, data.take(every), data.labels_of(every)):
        assert np.array_equal(common.read_image(root / name, (32, 32)), image)
        assert data.classes[y] == name.split("/")[0] or name.startswith("unlabelled/deep/")
    assert len(set(data.names)) == 23


def with_loose(path, count=90, **changes):
    """A tiny .npz that has images without a label as well."""
    x, _ = easy(count, seed=9)
    return npz(path, x_unlabelled=x[:, 0].numpy(), **changes)


def test_arrays_may_have_images_without_a_label(tmp_path):
    data = dataset(with_loose(tmp_path / "a.npz"), tmp_path)
    x, _ = easy(90, seed=9)
    assert torch.equal(data.unlabelled, x)
    assert data.names[200] == "unlabelled/0"
    assert data.names[-1] == "test/59"


def test_one_colour_image_among_them_makes_all_colour(tmp_path):
    grey = np.repeat(GREY, 3, 1)
    one = grey[:9].copy()
    one[4, 0] = 255
    for x, channels in ((grey[:9], 1), (one, 3)):
        file = npz(tmp_path / "a.npz", x_train=grey, x_test=grey[:60], x_unlabelled=x)
        data = dataset(file, tmp_path)
        assert data.images.shape[1] == data.unlabelled.shape[1] == channels


def test_one_rule_for_pixels_holds_for_them_too(tmp_path):
    x = np.linspace(0, 1, 200 * 256).reshape(200, 16, 16)
    file = npz(tmp_path / "a.npz", x_train=x, x_test=x[:60], x_unlabelled=1.2 * x)
    data = dataset(file, tmp_path)
    wanted = (1.2 * 255 * x).round().clip(0, 255)
    assert np.array_equal(data.unlabelled[:, 0].numpy(), wanted)


def test_they_are_part_of_the_fingerprint_if_there_are_any(tmp_path):
    file = npz(tmp_path / "a.npz")
    data = dataset(file, tmp_path)
    marks = "".join(common.fingerprint(bytes_in(part)) for part in data.tensors())
    assert data.facts()["fingerprint"] == common.fingerprint(marks.encode())    # as it was
    first = dataset(with_loose(file), tmp_path).facts()
    x, _ = easy(90, seed=9)
    x[5, 0, 3, 3] += 1
    second = dataset(npz(file, x_unlabelled=x[:, 0].numpy()), tmp_path).facts()
    assert (first["images"], first["unlabelled"]) == (200, 90)
    assert len({data.facts()["fingerprint"], first["fingerprint"], second["fingerprint"]}) == 3


def test_copies_of_labelled_and_of_test_images_among_them_are_counted(tmp_path, capsys):
    x, _ = easy(200, seed=200)
    tests, _ = easy(60, seed=60)
    pool, _ = common.split(dataset(npz(tmp_path / "a.npz"), tmp_path))
    copies = torch.cat([x[pool[:4]], tests[:7]])[:, 0]
    capsys.readouterr()
    dataset(npz(tmp_path / "a.npz", x_unlabelled=copies.numpy()), tmp_path)
    said = capsys.readouterr().err
    assert "200 training images with a label, 11 without" in said
    assert "4 of 11 images without a label are there with one, too" in said
    assert "7 of 60 test images are training images" in said


# ---- --labels: few of the labels there are --------------------------------------------------

def test_so_many_images_keep_their_label_and_the_others_become_unlabelled(tmp_path):
    whole = dataset(with_loose(tmp_path / "a.npz"), tmp_path)
    pool, validation = common.split(whole)
    few = dataset(tmp_path / "a.npz", tmp_path, "--labels", 12)
    rows, kept = common.split(few)
    assert few.labels[rows].bincount().tolist() == [4, 4, 4]
    assert torch.equal(few.images[kept], whole.images[validation])
    assert torch.equal(few.labels[kept], whole.labels[validation])
    assert torch.equal(few.test_images, whole.test_images)
    assert len(few.unlabelled) == len(pool) - 12 + 90
    numbers = {name: row for row, name in enumerate(whole.names)}
    order = torch.tensor([numbers[name] for name in few.names])
    assert len(order.unique()) == len(whole.names)
    assert torch.equal(few.take(torch.arange(len(order))), whole.take(order))
    labels = few.labels_of(torch.arange(len(order)))
    assert torch.equal(labels[labels >= 0], whole.labels_of(order)[labels >= 0])


def test_more_labels_than_there_are_end_in_one_line(tmp_path, capsys):
    file = npz(tmp_path / "a.npz")
    line = mistake(capsys, "vae", "--dataset", file, "-o", tmp_path / "run", "--labels", 181)
    assert "181 images asked for; there are 179" in line


def test_later_scripts_take_the_labels_from_the_vae(copy, capsys):
    npz(copy.parent / "tiny.npz")
    words = ["--dataset", copy.parent / "tiny.npz", "-o", copy]
    assert run("vae", *words, *STEMS["vae"], "--labels", 30) == 0
    said = capsys.readouterr()
    assert "51 training images with a label, 149 without" in said.err
    assert "learnt from 30 images with a label, 149 without" in said.out
    assert run("latent", "-o", copy) == 0
    assert read(copy / "latent.pt")["dataset"]["labels"] == 30
    assert "149 images without one" in capsys.readouterr().out
    line = mistake(capsys, "latent", *words, "--labels", 33)
    assert re.search("other images.* make .*LABELS=33", line), line


# ---- --labels-from: labels that a person has corrected or added -----------------------------

def corrections(path, *pairs, mark=",", before=""):
    lines = [mark.join(["image", "why", "new_label"])]
    lines += [mark.join([image, "", label]) for image, label in pairs]
    path.write_text(before + "\n".join(lines) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("mark, before", [(",", ""), (";", "\ufeff"), ("\t", "")])
def test_labels_of_a_table_take_the_place_of_those_there_were(tmp_path, mark, before):
    file = with_loose(tmp_path / "a.npz")
    whole = dataset(file, tmp_path)
    _, validation = common.split(whole)
    row = int(validation[0])
    wanted = {"train/4": "eel", f"train/{row}": "dog", "unlabelled/7": " cat", "test/3": "dog"}
    table = corrections(tmp_path / "new.csv", *wanted.items(), ("train/5", ""), mark=mark,
                        before=before)
    data = dataset(file, tmp_path, "--labels-from", table)
    labels = data.labels_of(torch.arange(len(data.names)))
    before = dict(zip(whole.names, whole.labels_of(torch.arange(len(whole.names)))))
    for name, label in zip(data.names, labels.tolist()):
        if name in wanted:
            assert data.classes[label] == wanted[name].strip()
        else:
            assert label == before[name]
    assert data.names.index("unlabelled/7") == 200
    assert len(data.unlabelled) == 89
    kept = {data.names[row] for row in common.split(data)[1]}
    assert kept == {whole.names[row] for row in validation}


@pytest.mark.parametrize("pairs, pattern", [
    ([("train/4", "owl")], "train/4 is given the class 'owl'; the classes are cat, dog, eel"),
    ([("train/4", "Cat")], "the class 'Cat'"),
    ([("train/999", "cat")], "no image 'train/999'; they are called train/0"),
    ([("train/4", "cat"), ("train/4", "dog")], "train/4 is both cat and dog; remove one"),
    ([("train/4", "")], "no line has a new label; write some into its column new_label")])
def test_labels_that_cannot_be_end_in_one_line(tmp_path, capsys, pairs, pattern):
    table = corrections(tmp_path / "new.csv", *pairs)
    words = ["--dataset", npz(tmp_path / "a.npz"), "-o", tmp_path / "run"]
    line = mistake(capsys, "vae", *words, "--labels-from", table)
    assert re.search(f"new.csv: .*{pattern}", line), line


@pytest.mark.parametrize("content, pattern", [
    (None, "cannot be read as a table .*image,new_label, as latent.py --review"),
    (b"file,label\n1.png,cat\n", "no column 'image'; wanted image and new_label"),
    (b"image,new_label\ntrain/4\n", "cannot be read as a table"),
    (b"\xff\xfe\x00\x01", "cannot be read as a table")])
def test_what_is_no_table_of_labels_ends_in_one_line(tmp_path, capsys, content, pattern):
    if content is not None:
        (tmp_path / "new.csv").write_bytes(content)
    words = ["--dataset", npz(tmp_path / "a.npz"), "-o", tmp_path / "run"]
    line = mistake(capsys, "vae", *words, "--labels-from", tmp_path / "new.csv")
    assert re.search(f"new.csv.*{pattern}", line), line


# ---- what reaches the trainings where labels are few ----------------------------------------

@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A chain on 30 labelled images, and others, and what reached its two trainings."""
    out = tmp_path_factory.mktemp("few") / "run"
    tiny = with_loose(out.parent / "tiny.npz", x_test=easy(60, seed=61)[0][:, 0].numpy())
    with pytest.MonkeyPatch.context() as patch:
        fits = {kind: note_fits(patch, SCRIPTS[kind]) for kind in ("vae", "cnn")}
        maps = note_calls(patch, latent, "draw_map")
        spreads = note_calls(patch, latent, "spread_labels")
        patch.setattr(vae.Deformations, "fit", found((0.75, False)))
        assert run("vae", "--dataset", tiny, "-o", out, "--steps", 60, "--latent-dim", 4,
                   "--labels", 30, "--no-amp") == 0
        assert run("latent", "-o", out, "--no-amp") == 0
        assert run("hybrids", "-o", out, "--count", 300, "--no-deform",
                   "--no-amp") == 0
        assert run("cnn", "-o", out, "--steps", 40, "--width", 8, "--no-amp") == 0
    noted = SimpleNamespace(out=out, vae=fits["vae"][0], cnn=fits["cnn"][0], map=maps[0],
                            spread=spreads[0])
    noted.files = {kind: read(out / f"{kind}.pt") for kind in STEPS}
    noted.data = dataset(tiny, out, "--labels", 30)
    noted.pool, noted.validation = common.split(noted.data)
    noted.all = noted.data.take(torch.arange(len(noted.data.names)))
    noted.true = dict(zip(dataset(tiny, out).names, easy(200)[1]))
    return noted


def test_a_vae_learns_from_images_with_and_without_a_label(few):
    first = len(few.data.images)
    wanted = {*few.pool.tolist(), *range(first, first + len(few.data.unlabelled))}
    assert rows_used(few.vae, few.all) == wanted
    assert set(few.files["vae"]["rows"].tolist()) == wanted


def test_labels_are_those_given_and_those_spread_from_them(few):
    saved = few.files["latent"]
    rows = few.files["vae"]["rows"]
    given = rows < len(few.data.images)
    assert torch.equal(saved["given"], given)
    assert torch.equal(saved["labels"][given], few.data.labels[few.pool])
    _, wanted = few.spread
    assert torch.equal(saved["labels"], wanted)
    right = []
    for row, label in zip(rows.tolist(), saved["labels"].tolist()):
        name = few.data.names[row]
        if name.startswith("train"):
            right.append(label == few.true[name])
    assert np.mean(right) > 0.95


def test_labels_are_spread_by_codes_and_by_images_that_move(few):
    (mu, y, classes, distances, share), _ = few.spread
    rows = few.files["vae"]["rows"]
    assert torch.equal(mu, few.files["latent"]["mu"])
    assert torch.equal(y, few.data.labels[few.pool])
    assert (classes, share) == (3, 0.75)
    near = torch.arange(len(rows)).flip(0)[:, None]
    deform = deformations(0.75, False)
    wanted = deform.distances(few.data.take(rows), near)
    assert torch.allclose(distances(near), wanted)


def test_hybrids_are_of_given_and_of_spread_labels(few):
    codes = latent.Codes.restore(few.files["latent"])
    points = hybrids.sample("between", 300, codes, seeded())
    made = few.files["hybrids"]
    close(made["z"], points.z)
    images = few.data.take(few.files["vae"]["rows"])
    whole = images[points.i[150:]].float()              # the half that is never decoded
    t = points.t[150:, None, None, None]
    close(made["images"][150:].float(), t * whole + (1 - t) * images[points.j[150:]],
          atol=0.51, rtol=0)
    assert (points.i >= 30).any()


def test_an_eighth_of_the_real_images_of_a_batch_has_a_given_label(few):
    saved = few.files["latent"]
    rows = few.files["vae"]["rows"]
    labels = torch.full((len(few.all),), -1)
    labels[rows] = saved["labels"]
    seen_rows = []
    for x, q in few.cnn.batches[30:]:
        where = rows_among(x, few.all)
        given = where < len(few.data.images)
        natural = len(few.pool) / len(rows)
        assert given.sum() == round(64 * max(1 / 8, natural))
        assert torch.isin(where[given], few.pool).all()
        assert torch.equal(q, one_hot(labels[where]))
        seen_rows += where[~given].tolist()
    assert len(set(seen_rows)) > 150


@pytest.mark.parametrize("given, spread, wanted", [(10, 990, 8), (10, 80, 8), (50, 50, 32)])
def test_the_part_with_a_given_label_is_never_less_than_there_are(given, spread, wanted):
    def pool(count, c):
        return random_pixels(count, 1, 8, 8), one_hot(torch.full((count,), c))

    next_batch = cnn.batches(pool(given, 0), 64, spread=pool(spread, 1))
    _, q = next_batch(seeded(), 0.0)
    assert q.sum(0).tolist() == [wanted, 64 - wanted, 0]


def test_the_plain_classifier_of_so_many_images_sees_no_spread_label(few, monkeypatch, capsys):
    words = ["--hybrid-fraction", 0, "--steps", 4, "--images", 12]
    out = shutil.copytree(few.out, few.out.parent / "plain", dirs_exist_ok=True)
    fit = cnn_fit_of(out, monkeypatch, *words)
    assert rows_used(fit, few.all) <= set(few.pool.tolist())
    assert "spread" not in capsys.readouterr().out


def test_labels_that_do_not_prove_themselves_are_not_spread(tmp_path, capsys, monkeypatch):
    y = torch.randint(3, (200,), generator=seeded()).numpy()
    file = with_loose(tmp_path / "a.npz", y_train=y)
    out = tmp_path / "run"
    assert run("vae", "--dataset", file, "-o", out, *STEMS["vae"]) == 0
    assert run("latent", "-o", out) == 0
    said = capsys.readouterr().out
    assert "do not predict each other: none is spread to the 90 images" in said
    saved = read(out / "latent.pt")
    assert (saved["labels"][~saved["given"]] == -1).all()
    assert run("hybrids", "-o", out, "--count", 90) == 0
    assert "spread" not in capsys.readouterr().out
    pool, _ = common.split(dataset(file, tmp_path))
    fit = cnn_fit_of(out, monkeypatch, "--hybrid-fraction", 0, "--steps", 4)
    images = dataset(file, tmp_path)
    assert rows_used(fit, images.take(torch.arange(290))) <= set(pool.tolist())


def test_a_classifier_asks_for_the_labels_that_were_spread(few, tmp_path, capsys):
    out = Path(shutil.copytree(few.out, tmp_path / "run"))
    (out / "latent.pt").unlink()
    line = mistake(capsys, "cnn", "-o", out, "--hybrid-fraction", 0)
    assert re.search("latent.pt not found; make it with: python latent.py", line), line


def test_the_map_shows_given_labels_large_and_spread_ones_small(few):
    (axes, mu, y, *_), _ = few.map
    saved = few.files["latent"]
    assert torch.equal(y, saved["labels"])
    counts = Counter()
    for drawn in axes.collections:
        counts[int(drawn.get_sizes()[0])] += len(drawn.get_offsets())
    assert counts[30] == 30
    assert counts[4] == len(y) - 30


def test_codes_without_any_label_are_grey_on_the_map():
    axes = common.figure(5, 5).subplots()
    mu, logvar, y = codes(60, 2)
    posterior = latent.teach(mu, logvar, y, 3)
    latent.draw_map(axes, mu, torch.where(torch.arange(60) < 20, y, -1), ANIMALS, posterior,
                    seeded())
    sizes = {int(drawn.get_sizes()[0]): len(drawn.get_offsets()) for drawn in axes.collections}
    assert sizes[3] == 40


# ---- latent.csv: the percentages of every image ---------------------------------------------

def table_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_table_has_the_percentages_of_every_image(few):
    table = {line["image"]: line for line in table_of(few.out / "latent.csv")}
    data = few.data
    assert set(table) == set(data.names)
    parts = Counter(line["part"] for line in table.values())
    assert parts == {"train": 30, "unlabelled": len(data.unlabelled), "test": 60,
                     "validation": len(few.validation)}
    q = few.files["latent"]["q"]
    for k, row in enumerate(few.files["vae"]["rows"].tolist()):
        line = table[data.names[row]]
        shares = [float(line[animal]) for animal in ANIMALS]
        assert shares == approx(q[k].tolist(), abs=1e-4)
        assert line["likeliest"] == ANIMALS[q[k].argmax()]
        assert float(line["sure"]) == approx(max(shares))
        spread = ANIMALS[few.files["latent"]["labels"][k]]
        given = row < len(data.images)
        assert (line["label"], line["spread"]) == ((spread, "") if given else ("", spread))


def test_the_percentages_of_a_test_image_are_those_of_its_picture(few):
    table = {line["image"]: line for line in table_of(few.out / "latent.csv")}
    model = vae.VAE.restore(few.files["vae"])
    posterior = latent.best_calibrated(few.files["latent"])
    q = posterior(*vae.encode_all(model, few.data.test_images[:5]))
    for k in range(5):
        shares = [float(table[f"test/{k}"][animal]) for animal in ANIMALS]
        assert shares == approx(q[k].tolist(), abs=1e-4)


def test_the_percentages_of_an_image_do_without_its_own_code():
    mu, logvar, y = codes(60, 2)
    some = latent.subsample(60, 40)
    known = (mu[some], logvar[some], y[some])
    posterior = latent.Aggregate.fit(*known, 3)
    part = latent.Part("", torch.arange(60), y, y, mu, logvar)
    q = latent.without_own(posterior, part, some)
    place = {row: k for k, row in enumerate(some.tolist())}
    for i in range(60):
        own = logvar[i].double().exp()
        true = true_density(*known, mu[i], own=own, without=place.get(i, -1))
        wanted = posterior.weigh(true.float()[None], posterior.image_floor)[0]
        close(q[i], wanted, atol=1e-3, rtol=0)


def test_a_file_has_these_percentages(few):
    saved = few.files["latent"]
    rows = few.files["vae"]["rows"]
    part = latent.Part("", rows, saved["labels"], saved["labels"], saved["mu"],
                       saved["logvar"])
    posterior = latent.best_calibrated(saved)
    close(saved["q"], latent.without_own(posterior, part, torch.arange(len(rows))))


# ---- latent.py --review: what to look at next -----------------------------------------------

def test_wrong_labels_are_found_and_the_wrongest_comes_first():
    q = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.01, 0.99], [0.1, 0.9]])
    rows, claims = latent.suspects(q, torch.tensor([0, 0, 0, 0, 1]))
    assert rows.tolist() == [3, 2]
    assert claims.tolist() == [1, 1]


def test_a_class_that_is_seldom_sure_is_measured_by_itself():
    """Class 2 has 40% of its own images on average: more than that is much."""
    q = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.3, 0.3, 0.4], [0.5, 0.0, 0.5],
                      [0.4, 0.3, 0.3]])
    rows, claims = latent.suspects(q, torch.tensor([0, 1, 2, 0, 2]))
    usual = torch.tensor([0.7, 0.9, 0.35])
    wanted = [k for k, y in enumerate([0, 1, 2, 0, 2])
              if (q[k] / usual).argmax() != y]
    assert rows.tolist() == wanted == [3]
    assert claims.tolist() == [2]


def test_flipped_labels_of_clusters_are_all_found():
    mu, logvar, y = codes(300, 2, seed=3)
    mu = mu + 20 * one_hot(y)[:, :2]
    given = y.clone()
    given[:15] = (y[:15] + 1) % 3
    posterior = latent.Aggregate.fit(mu, logvar, given, 3)
    part = latent.Part("train", torch.arange(300), given, given, mu, logvar)
    q = latent.without_own(posterior, part, torch.arange(300))
    rows, claims = latent.suspects(q, given)
    assert set(rows[:15].tolist()) == set(range(15))
    assert torch.equal(claims[:15], y[rows[:15]])


def test_images_to_label_are_undecided_and_unlike_each_other():
    q = torch.tensor([0.5, 0.51, 0.52, 0.53, 0.54] + 200 * [0.99])
    q = torch.stack([q, 1 - q], 1)
    mu = torch.tensor([[0.0, 0], [0.1, 0], [5, 0], [5.1, 0], [0, 9]] + 200 * [[50.0, 50]])
    rows = latent.to_label(q, mu, known=torch.tensor([[0.0, 0.2]]), count=3)
    assert rows[0] >= 5                 # of thirty candidates it is the farthest from all
    rows = latent.to_label(q[:5], mu[:5], torch.tensor([[0.0, 0.2]]), 3)
    assert rows.tolist() == [4, 3, 1]   # 2 is far from the label, but near 3
    assert sorted(latent.to_label(q[:5], mu[:5], mu[:1], 99).tolist()) == [0, 1, 2, 3, 4]
    assert latent.to_label(q[:0], mu[:0], mu, 9).tolist() == []


def test_almost_the_same_images_are_paired():
    x, _ = easy(60)
    tests, _ = easy(30, seed=1)
    tests[4] = x[17]
    tests[9] = (x[33].float() + 2 * noise(1, 16, 16)).clamp(0, 255).byte()
    mu = brightness(x.float())[:, None]
    test_mu = brightness(tests.float())[:, None]
    rows, where, difference = latent.near_duplicates(mu, x, test_mu, tests)
    assert (rows.tolist(), where.tolist()) == ([17, 33], [4, 9])
    gap = (x[33].float() - tests[9].float()).square().mean() / tests[9].float().var()
    assert difference.tolist() == approx([0, gap.item()], rel=0.01)


@pytest.fixture
def flipped(tmp_path, capsys):
    """A folder with a review of a set with three wrong labels and a copy among its tests."""
    y = easy(200)[1].numpy()
    wrong = common.split(dataset(npz(tmp_path / "a.npz"), tmp_path))[0][[5, 50, 120]].tolist()
    y[wrong] = (y[wrong] + 1) % 3
    tests = easy(60, seed=61)[0][:, 0]
    tests[8] = easy(200, seed=200)[0][0, 0]
    file = with_loose(tmp_path / "a.npz", y_train=y, x_test=tests.numpy())
    out = tmp_path / "run"
    assert run("vae", "--dataset", file, "-o", out, "--steps", 60, "--latent-dim", 4) == 0
    capsys.readouterr()
    assert run("latent", "-o", out, "--review") == 0
    return SimpleNamespace(out=out, file=file, wrong=[f"train/{row}" for row in wrong],
                           said=capsys.readouterr().out)


def test_a_review_lists_what_to_look_at(flipped):
    table = table_of(flipped.out / "review.csv")
    kinds = {why: [line for line in table if line["why"] == why] for why in latent.WHY}
    suspected = kinds["label looks wrong"]
    assert {line["image"] for line in suspected[:3]} == set(flipped.wrong)
    for line in suspected[:3]:
        assert ANIMALS.index(line["label"]) == (ANIMALS.index(line["likeliest"]) + 1) % 3
    teaching = kinds["label would teach most"]
    assert len(teaching) == 90
    assert {(line["image"].split("/")[0], line["label"]) for line in teaching} == {
        ("unlabelled", "")}
    assert [(line["image"], line["like"]) for line in kinds["nearly a training image"]] == [
        ("test/8", "train/0")]
    assert (flipped.out / "review.png").exists()
    assert "percentages agree with 98% of the labels" in flipped.said       # 176 of 179
    counts = [f"{why}: {len(lines)}" for why, lines in kinds.items()]
    assert ", ".join(counts) in flipped.said.splitlines()


def fill_in(path, **labels):
    """Write new labels into a review, as a person would."""
    table = table_of(path)
    for line in table:
        line["new_label"] = labels.get(line["image"], line["new_label"])
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def test_what_was_filled_in_is_used_and_kept_and_not_asked_again(flipped, capsys):
    review = flipped.out / "review.csv"
    names = [line["image"] for line in table_of(review)]
    sure = next(name for name in names if name.startswith("unlabelled"))
    right = {name: ANIMALS[int(name.split("/")[1]) % 3] for name in flipped.wrong}
    fill_in(review, **right, **{sure: "eel"})
    os.utime(review, (1, 1))
    words = ["--dataset", flipped.file, "-o", flipped.out, "--labels-from", review]
    assert run("vae", *words, *STEMS["vae"]) == 0
    assert f"4 labels are those of {review}" in capsys.readouterr().err
    assert run("latent", "-o", flipped.out, "--review") == 0
    assert review.stat().st_mtime == 1  # else make would begin again
    command = capsys.readouterr().out.split("then:\n")[1].splitlines()[0]
    assert command.startswith("make DATASET=") and f"LABELS_FROM={review} all" in command
    table = table_of(review)
    assert {line["image"]: line["new_label"] for line in table[:4]} == {**right, sure: "eel"}
    asked = [line["image"] for line in table[4:]]
    assert not set(asked) & {*right, sure}
    labels = {line["image"]: line["label"] for line in table_of(flipped.out / "latent.csv")}
    assert {name: labels[name] for name in right} == right
    assert labels[sure] == "eel"


def test_labels_of_another_table_stay_in_the_next_review(flipped):
    review = flipped.out / "review.csv"
    name, = flipped.wrong[:1]
    table = corrections(flipped.out / "mine.csv", (name, "cat"))
    words = ["--dataset", flipped.file, "-o", flipped.out, "--labels-from", table]
    assert run("vae", *words, *STEMS["vae"]) == 0
    own = {flipped.wrong[1]: "dog", "unlabelled/3": "cat"}
    fill_in(review, **own)
    assert run("latent", "-o", flipped.out, "--review") == 0
    lines = table_of(review)
    assert {line["image"]: line["new_label"] for line in lines[:3]} == {name: "cat", **own}
    assert not {line["image"] for line in lines[3:]} & {name, *own}


def test_a_review_that_cannot_be_read_is_not_overwritten(copy, capsys):
    npz(copy.parent / "tiny.npz")
    (copy / "review.csv").write_text("my notes\n1\n")
    line = mistake(capsys, "latent", "-o", copy, "--review")
    assert "review.csv has no column 'image'" in line
    assert (copy / "review.csv").read_text() == "my notes\n1\n"


# ---- --unlabelled: the images without a label -----------------------------------------------

@pytest.fixture(scope="session")
def semi(tmp_path_factory):
    """Arms of one subset where the VAE sees all images of the pool."""
    tiny = npz(tmp_path_factory.mktemp("semi") / "tiny.npz")
    return note_grid(tmp_path_factory, tiny, "--steps", 8, "--vae-steps", 150,
                     "--unlabelled", "--arms", "real", "real+hybrid", "augment+hybrid",
                     "latent posterior")


def test_one_vae_sees_all_images_of_the_pool(semi):
    fit, = semi.vaes
    assert rows_used(fit, semi.data.images) == set(semi.pool.tolist())
    assert fit.seed == 0                # of all subsets


def test_hybrids_are_made_of_all_images_of_the_pool(semi):
    images = semi.pools["real+hybrid"].images
    assert len(images) == 12 + len(semi.pool)
    assert torch.equal(images[:12], semi.data.images[semi.subset])
    where = rows_among(images[12:], semi.data.images)
    assert set(where.tolist()) == set(semi.pool.tolist())


def test_the_labels_that_they_get_are_right(semi):
    pool = semi.pools["real+hybrid"]
    where = rows_among(pool.images, semi.data.images)
    assert torch.equal(pool.codes.y[:12], semi.data.labels[semi.subset])
    assert part_of(pool.codes.y == semi.data.labels[where]) > 0.9


def test_labels_are_spread_to_at_most_so_many_images(semi, monkeypatch):
    monkeypatch.setattr(latent, "SPREAD", 50)
    spec = semi.data.source["spec"]
    facts = compared(semi.out, "--dataset", spec, "--sizes", 12, "--seeds", 1, "--seed", 4,
                     "--steps", 2, "--width", 4, "--vae-steps", 150, "--unlabelled",
                     "--arms", "real+hybrid")
    assert facts["rows"][0]["sources"] == 12 + 50


def test_a_finished_grid_trains_no_vae_again(semi, monkeypatch):
    fits = note_fits(monkeypatch, vae)
    spec = semi.data.source["spec"]
    compared(semi.out, "--dataset", spec, "--sizes", 12, "--seeds", 1, "--seed", 3, "--width",
             4, "--latent-dim", 4, "--no-amp", "--steps", 8, "--vae-steps", 150,
             "--unlabelled", "--arms", "real")
    assert fits == []


@pytest.mark.parametrize("arm", ["real+hybrid", "augment+hybrid", "latent posterior"])
def test_all_hybrid_arms_have_those_images(semi, arm):
    assert semi.rows[arm]["sources"] == 12 + len(semi.pool)
    assert semi.rows["real"]["sources"] == 12


def test_the_labelled_images_alone_say_there_how_images_move(semi):
    deform, = semi.asked
    assert torch.equal(deform.images, semi.data.images[semi.subset])


def test_the_classifier_sees_labelled_images_only(semi):
    used = rows_used(semi.fits["real"], semi.data.images)
    assert used == set(semi.subset.tolist())


def test_classifiers_of_hybrids_also_see_real_images_under_spread_labels(semi):
    for arm in ("real+hybrid", "augment+hybrid"):
        images, q = semi.sources[arm][-1]
        pool = semi.pools[arm]
        assert torch.equal(images, pool.images[12:])
        assert torch.equal(q, one_hot(pool.codes.y[12:]))
    assert semi.sources["real"][-1] is None


def test_the_comparison_spreads_labels_by_codes_and_by_images_that_move(semi):
    ((mu, y, classes, distances, share), _), = semi.spreads
    images = semi.pools["real+hybrid"].images
    assert len(mu) == len(images)
    assert torch.equal(y, semi.data.labels[semi.subset])
    assert (classes, share) == (3, 0.5)
    near = torch.arange(len(images)).flip(0)[:, None]
    assert torch.allclose(distances(near), semi.asked[0].distances(images, near))


def test_labels_that_mislead_are_not_spread():
    x, y = easy(300)
    recipe = {"vae_steps": 120, "latent_dim": 2, "amp": False}
    model = compare.train_vae(x, 0, recipe)
    wrong = torch.arange(12) % 5
    still = deformations(0.0, False)
    spread = compare.source_of_all(x[:12], y[:12], 3, recipe, model, x, still)
    misled = compare.source_of_all(x[:12], wrong, 5, recipe, model, x, still)
    assert len(spread.images) == 312
    assert len(misled.images) == 12


# ---- what a reported number is made of ------------------------------------------------------

@pytest.mark.parametrize("arm", [arm for arm in compare.ARMS if arm != "latent posterior"])
def test_a_score_is_that_of_the_weights_of_the_last_step_on_test_images(grey, arm):
    fit = grey.fits[arm]
    fit.model.load_state_dict(fit.last)
    q = cnn.predict(fit.model, grey.data.test_images).softmax(1)
    wanted = common.scores(q, grey.data.test_labels)
    for key, value in wanted.items():
        assert grey.rows[arm][key] == approx(value, abs=1e-5)


def test_the_score_of_the_latent_posterior_is_that_of_its_percentages(grey):
    posterior = grey.pools["real+hybrid"].codes.posterior
    codes = vae.encode_all(grey.vaes[0].model, grey.data.test_images)
    q = posterior(*codes)
    wanted = common.scores(q, grey.data.test_labels)
    assert grey.rows["latent posterior"]["accuracy"] == wanted["accuracy"]
    assert grey.rows["latent posterior"]["nll"] == approx(wanted["nll"], rel=1e-3)


def test_a_row_names_its_cell(grey):
    for arm, row in grey.rows.items():
        assert row.items() >= {"n": 12, "seed": 3, "arm": arm}.items()


def test_temperatures_are_fitted_on_validation_images(grey):
    (_, images, y, fitting, fitting_y), _ = grey.scores[0]
    assert torch.equal(images, grey.data.test_images)
    assert torch.equal(y, grey.data.test_labels)
    where = rows_among(fitting, grey.data.images)
    assert torch.isin(where, grey.validation).all()
    assert torch.equal(fitting_y, grey.data.labels[where])
    assert len(where) == math.ceil(len(grey.validation) / 2)


def test_images_that_fit_temperatures_do_not_score(tmp_path, monkeypatch):
    tiny = npz(tmp_path / "tiny.npz")
    unit = compare.Unit(grid_of("--dataset", tiny, "-o", tmp_path, "--sizes", 12, "--score",
                                "validation"), 12, 0)
    data = dataset(tiny, tmp_path)
    _, validation = common.split(data)
    fitting = set(rows_among(unit.fitting[0], data.images).tolist())
    scored = set(rows_among(unit.scored[0], data.images).tolist())
    assert fitting.isdisjoint(scored)
    assert fitting | scored == set(validation.tolist())
    assert abs(len(fitting) - len(scored)) <= 1


def test_images_of_all_classes_fit_temperatures_if_the_set_is_sorted(tmp_path):
    tiny = npz(tmp_path / "tiny.npz")
    grid = grid_of("--dataset", tiny, "-o", tmp_path, "--sizes", 12)
    by_class = grid.validation[grid.data.labels[grid.validation].argsort()]
    unit = compare.Unit(grid._replace(validation=by_class), 12, 0)
    assert set(unit.fitting[1].tolist()) == {0, 1, 2}


def test_at_most_a_thousand_images_fit_a_temperature(tmp_path):
    tiny = npz(tmp_path / "tiny.npz")
    grid = grid_of("--dataset", tiny, "-o", tmp_path, "--sizes", 12)
    many = torch.arange(3000) % 200
    unit = compare.Unit(grid._replace(validation=many), 12, 0)
    assert len(unit.fitting[1]) == 1000


def test_every_averaged_figure_is_the_mean_over_the_subsets(grid):
    facts = json.loads((grid / "compare.json").read_text())
    for entry in facts["summary"]:
        own = [row for row in facts["rows"]
               if row["n"] == entry["n"] and row["arm"] == entry["arm"]]
        for key in ("nll", "ece", "scaled_nll", "scaled_ece", "noise", "blur", "shift"):
            assert entry[key] == approx((own[0][key] + own[1][key]) / 2)


def test_hybrids_are_held_against_every_arm_without_them(grey):
    facts = json.loads((grey.out / "compare.json").read_text())
    against = facts["hybrids_against"]
    assert set(against) >= {"real", "augment", "elastic", "mixup", "cutmix", "augment+mixup",
                            "deform", "deform+mixup", "deformed images"}
    assert not any("hybrid" in base for base in against)
    accuracy = {arm: row["accuracy"] for arm, row in grey.rows.items()}
    for base, entries in against.items():
        assert [entry["arm"] for entry in entries] == [
            "real+hybrid", "undeformed hybrid", "augment+hybrid", "hybrid only",
            "prior hybrid", "cross-faded hybrid"]
        for entry in entries:
            wanted = 100 * (accuracy[entry["arm"]] - accuracy[base])
            assert entry["gain"] == approx(wanted)


def test_a_comparison_prints_its_table_its_files_and_its_answer(same_grid, capsys):
    out, words = same_grid
    assert run(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = json.loads((out / "compare.json").read_text())
    assert len(lines) == 1 + 4 + 2 + 1 + 2
    for line, entry in zip(lines[1:5], facts["summary"]):
        assert line.split()[0] == str(entry["n"])
        assert f"{entry['accuracy']:.1f} ± {entry['accuracy_half']:.1f}" in line
        assert f"{entry['nll']:.3f}" in line
        assert f"{entry['ece']:.3f}" in line
        if entry["arm"] != "real":
            gain = f"{entry['gain']:+.1f} ± {entry['gain_half']:.1f}"
            assert line.endswith(f"{gain}  inconclusive")
    assert lines[5:7] == [str(out / "compare.csv"), str(out / "compare.json")]
    assert lines[7] == f"pictures in {out}: compare.png"
    assert lines[8:] == compare.answers(facts["summary"])


def test_a_grid_shows_its_rows_and_their_means(grid):
    rows = json.loads((grid / "compare.json").read_text())["rows"]
    table = compare.summarise(rows)
    planned = grid_of(*GRID[1:], "--dataset", grid / "tiny.npz", "-o", grid)
    left, right = common.figure().subplots(1, 2)
    compare.curves(left, right, table, rows, planned)
    dots = []
    for part in left.collections:
        if len(part.get_offsets()) == 4:                # others are the bars
            dots += part.get_offsets()[:, 1].tolist()
    assert sorted(dots) == approx(sorted(100 * row["accuracy"] for row in rows))
    means = heights_in(left)
    assert sorted(means) == approx(sorted(entry["accuracy"] for entry in table))
    wanted = [entry["gain"] for entry in table if "gain" in entry]
    assert heights_in(right) == approx(wanted)


@pytest.mark.parametrize("counts, words", [
    ([6, 6], "6 subsets, each a dot"),
    ([10, 6, 8], "6 to 10 subsets, each a dot")])
def test_a_caption_says_how_many_subsets_there_are(counts, words):
    table = [{"subsets": count, "hollow": False} for count in counts]
    assert compare.caption(table, False).startswith(words)


def test_no_two_arms_look_alike():
    looks = {tuple(compare.arm_look(arm).items()) for arm in compare.ARMS}
    assert len(looks) == len(compare.ARMS)
    without_lines = {(look[0], look[1]) for look in looks}
    assert len(without_lines) == len(compare.ARMS)


def heights_in(axes):
    """The y of every point with an error bar."""
    heights = []
    for line, *_ in axes.containers:
        heights += list(line.get_ydata())
    return heights


def test_a_folder_with_the_whole_chain_gets_a_summary(copy, capsys):
    compared(copy, *STEMS["compare"], "--arms", "real")
    assert Image.open(copy / "summary.png").width > 1000
    wanted = "vae.png latent.png hybrids.png cnn.png compare.png summary.png"
    assert f"pictures in {copy}: {wanted}" in capsys.readouterr().out


def test_a_summary_of_other_images_is_not_kept(copy, tmp_path):
    (copy / "summary.png").write_bytes(b"of an earlier comparison")
    other = npz(tmp_path / "other.npz", 120)
    facts = compared(copy, *STEMS["compare"], "--dataset", other, "--arms", "real")
    assert facts["dataset"]["images"] == 120
    assert not (copy / "summary.png").exists()


def test_without_a_data_set_it_is_that_of_the_vae(copy):
    facts = compared(copy, *STEMS["compare"], "--arms", "real")
    assert facts["dataset"]["fingerprint"] == read(copy / "vae.pt")["dataset"]["fingerprint"]


# ---- ranks ----------------------------------------------------------------------------------

@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_trains_its_share_and_no_result(grid, tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setattr(common, "RANK", rank)
    monkeypatch.setattr(common, "RANKS", 2)
    words = [*GRID, "--dataset", grid / "tiny.npz", "-o", tmp_path, "--jobs", 1, "--no-amp"]
    assert run(*words) == 0
    assert capsys.readouterr().out == (
        f"rank {rank} has finished; then: python compare.py with the same flags and --gather "
        "--no-amp\n")
    units = {name.rsplit("-", 2)[0] for name in cells_of(tmp_path)}
    assert units == {f"30-{rank}", f"12-{rank}"}
    assert not (tmp_path / "compare.json").exists()


@pytest.mark.parametrize("name", ["vae", "cnn"])
def test_only_the_first_rank_writes_and_reports(bare, monkeypatch, capsys, name):
    monkeypatch.setattr(common, "RANK", 1)
    tiny = npz(bare / "tiny.npz")
    (bare / f"{name}.pt").unlink()
    if name == "vae":
        (bare / "cnn.pt").unlink()
    assert run(name, "-o", bare, *STEMS[name], "--dataset", tiny, *REAL_ONLY[name]) == 0
    assert not (bare / f"{name}.pt").exists()
    assert not (bare / "vae.last.pt").exists()
    assert read(bare / "cnn.last.pt")["state"]["step"] == 40    # that of the chain, still
    assert capsys.readouterr().out == ""


REAL_ONLY = {"vae": [], "cnn": ["--hybrid-fraction", 0]}


def test_ranks_share_the_cells_and_gather_makes_the_result(grid, tmp_path):
    words = [*GRID[1:], "--dataset", grid / "tiny.npz", "-o", tmp_path]
    process = torchrun(2, HERE / "compare.py", *words, "--threads", 1, "--quiet")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert printed.count("has finished") == 2
    assert cells_of(tmp_path) == cells_of(grid)
    assert run("compare", *words, "--gather") == 0
    assert (tmp_path / "compare.csv").read_text() == (grid / "compare.csv").read_text()


@slow
def test_a_dead_rank_costs_its_cells_only(grid, tmp_path, capsys):
    words = [*GRID[1:], "--seeds", 4, "--steps", 60, "--dataset", grid / "tiny.npz", "-o",
             tmp_path]
    process = torchrun(3, HERE / "compare.py", *words, "--threads", 1, "--quiet")
    while process.poll() is None and not list(tmp_path.glob("cells/*.json")):
        time.sleep(0.05)
    ranks = shell("pgrep", "-f", f"compare.py.*{tmp_path}").stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)     # torchrun, the first of them, sees to it
    assert process.wait(timeout=60) != 0
    kept = cells_of(tmp_path)
    assert kept
    assert run("compare", *words, "--gather") == 2
    assert "subsets are incomplete" in capsys.readouterr().err
    process = torchrun(3, HERE / "compare.py", *words, "--threads", 1)
    assert process.wait(timeout=300) == 0
    assert run("compare", *words, "--gather") == 0
    assert cells_of(tmp_path).items() >= kept.items()
    assert len(cells_of(tmp_path)) == 16


# A script's main, and the weights that each rank ends with.
WATCHED = """
import importlib, os, sys
import torch

name, where = sys.argv[1:3]
module = importlib.import_module(name)
plain = module.fit
models = []

def fit(net, *arguments, **settings):
    models.append(net.module)
    yield from plain(net, *arguments, **settings)

module.fit = fit
code = module.main(sys.argv[3:])
torch.save(models[0].state_dict(), f"{where}/rank{os.environ['RANK']}.pt")
sys.exit(code)
"""


@slow
@pytest.mark.parametrize("name", ["vae", "cnn"])
def test_two_ranks_train_one_model(copy, tmp_path, name):
    (tmp_path / "watched.py").write_text(WATCHED)
    tiny = npz(copy.parent / "tiny.npz")
    process = torchrun(2, tmp_path / "watched.py", name, tmp_path, "-o", copy, "--steps", 40,
                       "--dataset", tiny, "--threads", 1, "--quiet", PYTHONPATH=str(HERE))
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    one = read(tmp_path / "rank0.pt")
    two = read(tmp_path / "rank1.pt")
    for key in one:
        if "running" not in key and "tracked" not in key:       # statistics of each rank
            assert torch.equal(one[key], two[key]), key
    assert same(one, read(copy / f"{name}.pt")["model"])


# ---- the make chain -------------------------------------------------------------------------

def test_make_n_lists_the_five_commands(tree):
    printed = make(tree, "-n", "all", "PYTHON=python", "DATASET=mnist", "SIZES=50 60")
    commands = commands_of(re.sub("^", "    ", printed, flags=re.M))
    assert [script for script, _ in commands] == list(SCRIPTS)
    for script, words in commands:
        args = SCRIPTS[script].parse_args(words)
        assert args.out == Path("runs/mnist")
    assert args.sizes == [50, 60]
    assert args.dataset == "mnist"


@pytest.mark.parametrize("word", ["all", "quick", "test", "clean", *VARIABLES])
def test_make_help_names_targets_and_variables(tree, word):
    assert re.search(rf"\b{word}\b", make(tree, "help", "PYTHON=python"))


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """A tree where `make quick` was done once, and again: the words, both outputs."""
    root = tmp_path_factory.mktemp("quick")
    for file in [*HERE.glob("*.py"), HERE / "Makefile", HERE / "requirements.txt"]:
        shutil.copy(file, root)
    words = ["quick", f"PYTHON={sys.executable}", f"OUT={root / 'out'}",
             f"DATASET={npz(root / 'tiny.npz', 500)}"]
    first = make(root, *words)
    second = make(root, *words)
    return SimpleNamespace(out=root / "out", first=first, second=second)


def test_make_quick_runs_the_five_scripts(quick):
    assert [name for name in SCRIPTS if f" {name}.py " in quick.first] == list(SCRIPTS)


def test_make_quick_leaves_every_file_and_picture(quick):
    files = {f.name for f in quick.out.iterdir()}
    for name in STEPS:
        assert {f"{name}.pt", f"{name}.json", f"{name}.png"} <= files
    assert {"compare.json", "compare.csv", "compare.png", "summary.png"} <= files
    assert not unfinished(quick.out)


def test_make_says_at_its_end_where_the_pictures_are_and_one_sentence(quick):
    *_, where, answer = quick.first.rstrip().splitlines()
    pictures = "vae.png latent.png review.png hybrids.png cnn.png compare.png summary.png"
    assert where == f"pictures in {quick.out}: {pictures}"
    assert re.fullmatch(r"20 images: hybrids change accuracy by .* points \(2 subsets\): .*",
                        answer)


def test_a_second_make_does_nothing(quick):
    assert ".py" not in quick.second


def photos(folder):
    """Pictures of three classes, fifty each, and sixty of them again without a label."""
    for k, (image, label) in enumerate(zip(*easy(210))):
        where = folder / "unlabelled" if k >= 150 else folder / f"class{label}"
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(where / f"{k}.png")
    return folder


def test_a_folder_with_unlabelled_pictures_is_made_and_corrected(tree):
    folder = photos(tree / "photos")
    out = tree / "runs/quick"
    words = ["quick", f"PYTHON={sys.executable}", "DATASET=photos", "IMAGE_SIZE=16"]
    first = make(tree, *words)
    assert "learnt from 100 images with a label, 60 without" in first
    assert read(out / "vae.pt")["dataset"]["unlabelled"] == 60
    lines = table_of(out / "latent.csv")
    assert sum(line["part"] == "unlabelled" for line in lines) == 60
    assert (out / "review.png").exists()
    assert json.loads((out / "compare.json").read_text())["recipes"]["20"]["unlabelled"]

    names = [f"unlabelled/{k}.png" for k in (150, 151, 152)]
    fill_in(out / "review.csv", **{name: f"class{k}" for k, name in enumerate(names)})
    planned = make(tree, "-n", *words, f"LABELS_FROM={out / 'review.csv'}")
    assert [name for name in SCRIPTS if f" {name}.py " in planned] == list(SCRIPTS)
    assert f"--labels-from {out / 'review.csv'}" in planned
    data = dataset(folder, out, "--image-size", 16, "--labels-from", out / "review.csv")
    rows = torch.tensor([data.names.index(name) for name in names])
    assert data.labels_of(rows).tolist() == [0, 1, 2]
    assert len(data.unlabelled) == 57
    assert len(list(folder.rglob("*.png"))) == 210


STAND_IN = """#!/bin/sh
# In python's place: notes which script was called, and leaves its stem file.
echo "$1" >> called
stem=${1%.py} end=pt
[ $stem = compare ] && end=json
while [ "$1" != -o ]; do shift; done
touch "$2/$stem.$end"
"""


@pytest.fixture
def made(tree):
    """-> a function: the scripts that `make all` calls with these words."""
    (tree / "stand-in").write_text(STAND_IN)
    (tree / "stand-in").chmod(0o755)

    def calls(*words):
        (tree / "called").write_text("")
        make(tree, "all", "PYTHON=./stand-in", *words)
        return (tree / "called").read_text().replace(".py", "").split()

    assert calls() == list(SCRIPTS)
    return calls


def test_make_all_tells_the_scripts_that_they_are_its_steps(made, tree):
    noting = STAND_IN.replace('echo "$1"', 'echo "$1" $IN_CHAIN')
    (tree / "stand-in").write_text(noting)
    assert made("STEPS=9") == ["vae", "yes", "latent", "yes", "hybrids", "yes", "cnn", "yes",
                               "compare", "yes"]


def test_the_demonstration_is_shorter_and_other_sets_are_not(tree):
    printed = make(tree, "-n", "all", "PYTHON=python")
    assert "--seeds 3 --steps 150 --vae-steps 300" in printed
    printed = make(tree, "-n", "all", "PYTHON=python", "DATASET=mnist")
    assert "--steps" not in printed
    assert "--seeds 5" in printed
    printed = make(tree, "-n", "all", "PYTHON=python", "STEPS=7")
    assert len(re.findall("^python .* --steps 7 ", printed, re.M)) == 3


def test_make_without_changes_calls_nothing(made):
    assert made() == []


@pytest.mark.parametrize("setting, wanted", [
    ("STEPS=7", [*SCRIPTS]),
    ("DEVICE=cpu", [*SCRIPTS]),
    ("DATA=other", [*SCRIPTS]),
    ("LABELS=100", [*SCRIPTS]),
    ("LABELS_FROM=gone.csv", [*SCRIPTS]),
    ("VAE_FLAGS=--beta 2", [*SCRIPTS]),
    ("HYBRID_FLAGS=--count 9", ["hybrids", "cnn", "compare"]),
    ("SIZES=50", ["compare"]),
    ("SEEDS=2", ["compare"]),
    ("COMPARE_FLAGS=--arms real", ["compare"])])
def test_make_repeats_what_other_settings_change_and_no_more(made, setting, wanted):
    assert made(setting) == wanted
    assert made(setting) == []


@pytest.mark.parametrize("file, wanted", [
    ("vae.py", [*SCRIPTS]),
    ("latent.py", ["latent", "hybrids", "cnn", "compare"]),
    ("hybrids.py", ["hybrids", "cnn", "compare"]),
    ("cnn.py", ["cnn", "compare"]),
    ("compare.py", ["compare"]),
    ("common.py", [])])
def test_make_repeats_what_a_changed_script_made_and_no_more(made, tree, file, wanted):
    time.sleep(0.02)                    # a file system's clock is coarse
    (tree / file).touch()
    assert made() == wanted


def test_make_repeats_all_when_labels_are_written(made, tree):
    (tree / "runs/glyphs/review.csv").write_text("image,new_label")
    words = "LABELS_FROM=runs/glyphs/review.csv"
    assert made(words) == [*SCRIPTS]
    assert made(words) == []
    time.sleep(0.02)
    (tree / "runs/glyphs/review.csv").touch()
    assert made(words) == [*SCRIPTS]
    printed = make(tree, "-n", "all", "PYTHON=python", "LABELS=50", words)
    for script, arguments in commands_of(re.sub("^", "    ", printed, flags=re.M)):
        args = SCRIPTS[script].parse_args(arguments)
        if script in ("vae", "compare"):
            assert (args.labels, args.labels_from) == (50, "runs/glyphs/review.csv")
        assert script != "latent" or args.review


def test_make_makes_a_lost_file_again_and_what_is_made_of_it(made, tree):
    (tree / "runs/glyphs/hybrids.pt").unlink()
    assert made("-j2") == ["hybrids", "cnn", "compare"]


def test_make_clean_removes_runs_and_nothing_else(tree):
    for folder in ("runs/glyphs/cells", "data/MNIST", "elsewhere"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "file.pt").write_text("x")
    before = outside_runs(tree)
    make(tree, "clean", "OUT=elsewhere", "DATA=data")
    assert outside_runs(tree) == before
    assert not list(tree.glob("runs/*"))


def outside_runs(tree):
    files = {file.relative_to(tree) for file in tree.rglob("*")}
    return {file for file in files if file.parts[0] != "runs"}


# ---- the pages ------------------------------------------------------------------------------

PAGES = ["README.md", "assets/METHOD.md", "assets/EVIDENCE.md"]


def page(name):
    return (HERE / name).read_text(encoding="utf-8")


SNIPPETS = [(name, snippet) for name in PAGES
            for snippet in re.findall(r"```python\n(.*?)```", page(name), re.S)]


@pytest.mark.parametrize("place", range(len(SNIPPETS)))
def test_a_snippet_of_the_pages_runs_beside_a_finished_chain(chain, tmp_path, monkeypatch,
                                                              place):
    _, snippet = SNIPPETS[place]
    shutil.copytree(chain, tmp_path / "runs" / "glyphs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    exec(compile(snippet, f"snippet {place}", "exec"), {})


def test_both_pages_with_code_have_their_snippets():
    assert [name for name, _ in SNIPPETS].count("README.md") == 1
    assert [name for name, _ in SNIPPETS].count("assets/METHOD.md") == 3


def test_the_readme_is_read_in_three_minutes():
    text = page("README.md")
    assert len(text.splitlines()) <= 160
    assert len(text.encode()) <= 12 * 1024


def evidence_in(folder):
    """assets/evidence.py of a copy of the project, as a module."""
    spec = importlib.util.spec_from_file_location("evidence", folder / "assets/evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A copy of the three pages and of the result files that their tables are made of."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    # The quantile of the same few sample sizes takes most of the time.
    monkeypatch.setattr(compare, "t_quantile", functools.cache(compare.t_quantile))
    (tmp_path / "assets").mkdir()
    shutil.copy(HERE / "README.md", tmp_path)
    for file in (HERE / "assets").iterdir():
        if file.suffix in (".json", ".md", ".py"):
            shutil.copy(file, tmp_path / "assets")
    return tmp_path


def differing(pages, capsys):
    """The tables that `evidence.py --check` names."""
    code = evidence_in(pages).main(["--check"])
    lines = capsys.readouterr().out.splitlines()
    assert code == bool(lines)
    return {line.split(" differs")[0] for line in lines}


def test_the_tables_of_the_pages_are_those_of_their_result_files(pages):
    assert evidence_in(pages).main([]) == 0
    for name in PAGES:
        assert (pages / name).read_text(encoding="utf-8") == page(name)


TABLES = [(name, table) for name in PAGES for table in re.findall(r"<!-- table (.*) -->",
                                                                page(name))]


def test_every_table_that_can_be_written_stands_in_a_page(pages):
    assert {table for _, table in TABLES} == set(evidence_in(pages).TABLES)


def test_a_changed_digit_in_any_table_is_found_and_mended(pages, capsys):
    for name, table in TABLES:
        text = (pages / name).read_text(encoding="utf-8")
        start = text.index(f"<!-- table {table} -->")
        digit = re.compile(r"\d(?= \|)").search(text, start)
        other = str((int(digit[0]) + 1) % 10)
        changed = text[:digit.start()] + other + text[digit.end():]
        (pages / name).write_text(changed, encoding="utf-8")
    assert differing(pages, capsys) == {f"{name}: table {table}" for name, table in TABLES}
    assert evidence_in(pages).main([]) == 0
    capsys.readouterr()
    assert differing(pages, capsys) == set()


RESULTS = sorted(file.stem for file in (HERE / "assets").glob("*.json"))


def scaled(value):
    """A result file with every number 7% larger: those of text, the counts of steps, too."""
    if isinstance(value, dict):
        larger = {key: scaled(part) for key, part in value.items()}
        return {**larger, **{key: value[key] for key in ("n", "seed") if key in value}}
    if isinstance(value, list):
        return [scaled(part) for part in value]
    if isinstance(value, str):
        return re.sub(r"\d\.\d+", lambda found: f"{1.07 * float(found[0]):.3f}", value)
    if isinstance(value, bool) or value is None:
        return value
    return type(value)(1.07 * value)


@pytest.mark.parametrize("stem", RESULTS)
def test_a_number_changed_in_a_result_file_is_found(pages, capsys, stem):
    file = pages / f"assets/{stem}.json"
    file.write_text(json.dumps(scaled(json.loads(file.read_text()))))
    assert differing(pages, capsys)


@pytest.mark.parametrize("name", ["README.md", "assets/METHOD.md"])
def test_the_commands_of_a_page_are_understood(name):
    for script, words in commands_of(page(name)):
        SCRIPTS[script].parse_args([word for word in words if word != "..."])


@pytest.mark.parametrize("name", PAGES)
def test_the_make_commands_of_a_page_are_understood(name, tree):
    for command in re.findall(r"^    (make .*)$", page(name), re.M):
        _, *words = shlex.split(command, comments=True)
        make(tree, "-n", "PYTHON=python", *words)


def test_the_commands_behind_the_tables_are_understood():
    section = page("assets/EVIDENCE.md").split("## Commands")[1]
    block = re.search(r"\n\n((?: {4}.*\n)+)", section)[1]
    stand_in = 'python() { shift; printf "%q " "$@"; echo; }\n'
    done = shell("bash", "-e", "-c", stand_in + block)
    lines = done.stdout.splitlines()
    assert len(lines) > 5
    for line in lines:
        args = compare.parse_args(shlex.split(line))
        assert args.dataset


def test_the_commands_of_the_leaderboard_are_understood():
    commands = re.findall(r"`(--dataset [^`]*)`", page("assets/EVIDENCE.md"))
    assert len(commands) > 5
    for words in commands:
        compare.parse_args(shlex.split(words))


FLAGS_OF_OTHERS = {"--nproc-per-node", "--index-url", "--extra-index-url", "--check", "--help"}


@pytest.mark.parametrize("name", PAGES)
def test_a_flag_that_a_page_names_is_there(name, monkeypatch, capsys):
    known = set(FLAGS_OF_OTHERS)
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            SCRIPTS[script].parse_args(["--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page(name)))
    assert named - known == set()


@pytest.mark.parametrize("name", PAGES)
def test_a_link_of_a_page_leads_to_a_file_and_a_heading(name):
    folder = (HERE / name).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else HERE / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_a_file_that_a_page_names_is_there(name):
    for path in re.findall(r"`((?:assets/)?[\w-]+\.(?:py|md|json))`", page(name)):
        of_a_run = Path(path).stem in SCRIPTS
        here = (HERE / path).exists() or (HERE / "assets" / path).exists()
        assert of_a_run or here, path


# ---- mistakes -------------------------------------------------------------------------------

def thirds(n):
    """Labels 0, 1, 2, 0, 1, 2, ..."""
    return np.arange(n) % 3


def with_one_nan():
    x = np.full((200, 16, 16), 0.5)
    x[3, 4, 5] = math.nan
    return x


# What is changed in an .npz file, and what the line must say.
BAD_ARRAYS = {
    "no key": (dict(y_test=None), "y_test.*savez"),
    "NaN": (dict(x_train=with_one_nan()), "NaN"),
    "one class": (dict(y_train=0 * thirds(200), y_test=0 * thirds(60)), "one class"),
    "test labels": (dict(y_test=np.arange(60)), "not in training"),
    "one-hot": (dict(y_train=np.eye(3)[thirds(200)]), "label"),
    "halves": (dict(y_train=thirds(200) + 0.5), "label"),
    "NaN label": (dict(y_train=np.full(200, math.nan)), "label"),
    "few labels": (dict(y_train=thirds(9)), "differ in number"),
    "one name": (dict(classes=np.array(["a"])), "1 names"),
    "4 names": (dict(y_train=thirds(200) + 5, y_test=thirds(60) + 5,
                     classes=np.array(list("abcd"))), "4 names"),
    "shape": (dict(x_train=np.zeros((200, 9))), "shape"),
    "no images": (dict(x_train=GREY[:0], y_train=thirds(0)), "no images"),
    "unlabelled shape": (dict(x_unlabelled=np.zeros((9, 16, 17))), "without a label differ"),
    "unlabelled NaN": (dict(x_unlabelled=with_one_nan()), "NaN"),
    "unlabelled list": (dict(x_unlabelled=np.zeros((9, 256))), "shape"),
    "unlabelled scale": (dict(x_unlabelled=np.full((9, 16, 16), 0.5)), "one scale"),
    "one image a class": (dict(x_train=GREY[:3], y_train=thirds(3)), "valid"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_no_data_set_end_in_one_line(tmp_path, capsys, name):
    changes, pattern = BAD_ARRAYS[name]
    file = npz(tmp_path / "bad.npz", **changes)
    line = mistake(capsys, "vae", "--dataset", file, "-o", tmp_path / "run", "--steps", 3)
    assert re.search(pattern, line), line


ABSENT = "mps" if torch.cuda.is_available() else "cuda"
# Commands on a finished folder OUT, and what the line must say.
BAD_COMMANDS = {
    "vae.py --dataset mnits": "did you mean mnist",
    "vae.py --dataset xyzzy": "glyphs mnist",
    "vae.py --dataset gone.npz": r"gone\.npz.*savez",
    "vae.py --dataset OUT/vae.json": "no data set",
    "vae.py --dataset OUT/json.npz": "json.npz.*savez",
    "vae.py --dataset OUT/folders/none": "subfolder",
    "vae.py --dataset OUT/folders/empty": "cat",
    "vae.py --dataset OUT/folders/tested": "no train/",
    "vae.py --dataset OUT/../tiny.npz --batch-size 1000000000000": "out of memory",
    "vae.py --dataset OUT/../tiny.npz --images 181": "181 images",
    f"vae.py --device {ABSENT}": f"--device {ABSENT}",
    "vae.py -o OUT/vae.pt": "is a file",
    "vae.py -o OUT/vae.pt/x": "vae.pt",
    "latent.py --point 1,2": "4 finite numbers",
    "latent.py --point 1,a,2,3": "numbers",
    "latent.py --point 1,nan,2,3": "finite",
    "latent.py --image OUT/no.png": r"no\.png",
    "latent.py --dataset OUT/other.npz": "other images.* make ",
    "hybrids.py --count 9 --export OUT/vae.pt": "vae.pt",
    "cnn.py --predict OUT/nothing": "nothing",
    "cnn.py --predict OUT/folders/none": "no images",
    "compare.py --sizes 9999": "9999 images",
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_commands_that_cannot_be_obeyed_end_in_one_line(copy, capsys, command):
    for folder in ("none", "empty/cat", "tested/test/cat"):
        (copy / "folders" / folder).mkdir(parents=True)
    shutil.copy(copy / "vae.json", copy / "json.npz")
    npz(copy.parent / "tiny.npz")
    npz(copy / "other.npz", y_train=thirds(200)[::-1])
    script, *words = command.replace("OUT", str(copy)).split()
    line = mistake(capsys, script.removesuffix(".py"), "-o", copy, *words)
    assert re.search(BAD_COMMANDS[command], line), line
    assert not list(copy.rglob("*.tmp"))


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rewrite(path, **changes):
    torch.save(read(path) | changes, path)


def truncate_vae(out):
    os.truncate(out / "vae.pt", 500)


def empty_latent(out):
    os.truncate(out / "latent.pt", 0)


def give_cnn_for_vae(out):
    shutil.copy(out / "cnn.pt", out / "vae.pt")


def date_from_the_future(out):
    rewrite(out / "vae.pt", format=99)


def put_a_list_there(out):
    torch.save([1], out / "vae.pt")


def put_code_there(out):
    torch.save(Payload(out / "harm"), out / "vae.pt")


def train_another_vae(out):
    rewrite(out / "vae.pt", more=1)


@pytest.mark.parametrize("script, spoil, pattern", [
    ("latent", truncate_vae, "damaged.* make "),
    ("hybrids", empty_latent, "damaged.* python latent.py"),
    ("latent", give_cnn_for_vae, "cnn"),
    ("latent", date_from_the_future, "99.* make "),
    ("latent", put_a_list_there, "damaged"),
    ("latent", put_code_there, "damaged"),
    ("hybrids", train_another_vae, "latent.pt was made from another vae.pt"),
    ("cnn", train_another_vae, "hybrids.pt was made from another vae.pt")])
def test_files_that_do_not_fit_end_in_one_line(copy, capsys, script, spoil, pattern):
    spoil(copy)
    line = mistake(capsys, script, "-o", copy)
    assert re.search(pattern, line), line
    assert not (copy / "harm").exists()
    assert not list(copy.rglob("*.tmp"))


@pytest.mark.parametrize("script", ["latent", "cnn"])
def test_a_vae_that_is_missing_comes_with_the_make_command_for_it(copy, capsys, script):
    (copy / "vae.pt").unlink()
    line = mistake(capsys, script, "-o", copy)
    command = shlex.split(line.split("make it with: ")[1])
    planned = shell(*command, "-n", "PYTHON=python").stdout
    assert "python vae.py" in planned
    assert str(copy) in planned


@pytest.mark.parametrize("script, missing", [("hybrids", "latent"), ("cnn", "hybrids")])
def test_a_later_file_that_is_missing_comes_with_its_script(copy, capsys, script, missing):
    """Not with make, which might train another VAE, with other flags."""
    (copy / f"{missing}.pt").unlink()
    vae_before = (copy / "vae.pt").read_bytes()
    line = mistake(capsys, script, "-o", copy)
    command = shlex.split(line.split("not found; make it with: ")[1])
    assert command[:2] == ["python", f"{missing}.py"]
    assert run(missing, *command[2:]) == 0
    assert (copy / f"{missing}.pt").exists()
    assert (copy / "vae.pt").read_bytes() == vae_before


@pytest.mark.parametrize("words", [
    "vae --steps 0", "vae --steps 1.5", "vae --lr nan", "vae --lr -1", "vae --beta inf",
    "vae --latent-dim 0", "vae --batch-size -3", "vae --seed -1", "vae --image-size 8",
    "vae --seed 99999999999999999999", "vae --device tpu", "vae --threads 0", "vae --nosuch",
    "latent --codes 1", "hybrids --count 0", "hybrids --strategy nowhere",
    "hybrids --strategy prior --label product", "cnn --hybrid-fraction 2",
    "cnn --hybrid-fraction 1 0 0", "cnn --mixup nan", "cnn --cutmix -1", "cnn --width 0",
    "cnn --batch-size 1", "compare --sizes 1", "compare --seeds 0", "compare --arms nosuch",
    "compare --weight-decay inf", "compare --jobs 0"])
def test_flags_out_of_range_end_in_one_line(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words.split())
    script = words.split()[0]
    assert re.search(rf"\A{script}\.py: [^\n]+\n\Z", capsys.readouterr().err)


# ---- bad machines ---------------------------------------------------------------------------

@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: writing fails as on a full disk."""
    resource = pytest.importorskip("resource")
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


@pytest.mark.parametrize("most", [0, 500, 20_000])
@pytest.mark.parametrize("script", STEMS)
def test_a_full_disk_leaves_no_half_of_a_file(copy, capsys, script, most):
    stem = copy / f"{script}.{'json' if script == 'compare' else 'pt'}"
    stem.unlink(missing_ok=True)
    before = {copy / f"{name}.pt": (copy / f"{name}.pt").read_bytes()
              for name in STEPS if name != script}
    with largest_file(most):
        line = mistake(capsys, script, "-o", copy, *STEMS[script])
    assert "large" in line
    assert not stem.exists()
    assert not list(copy.rglob("*.tmp"))
    for file, content in before.items():
        assert file.read_bytes() == content
    assert run(script, "-o", copy, *STEMS[script]) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0,
                    reason="root may write here")
def test_a_folder_that_is_read_only_can_be_read(copy, capsys):
    os.chmod(copy, 0o555)
    assert "Permission denied" in mistake(capsys, "hybrids", "-o", copy)
    assert run("latent", "-o", copy, "--point=0,0,0,0") == 0
    os.chmod(copy, 0o755)


def test_two_runs_in_one_folder_do_not_mix(copy, capsys):
    fcntl = pytest.importorskip("fcntl")
    with (copy / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another run works in" in mistake(capsys, "vae", "-o", copy)
        assert run("latent", "-o", copy, "--point=0,0,0,0") == 0        # reading is free
    assert run("hybrids", "-o", copy, "--count", 9) == 0


def wait_for(condition, seconds=60):
    """Until the condition holds -> does it?"""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def start_grid(grid, out, *words):
    """compare.py with two workers that have long to do -> the process, its workers' ids."""
    words = [*GRID[1:], "--dataset", grid / "tiny.npz", "-o", out, "--jobs", 2,
             "--steps", 5000, *words]
    parent = subprocess.Popen([sys.executable, HERE / "compare.py", *map(str, words)], env=ENV,
                              text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              start_new_session=True)
    workers = []

    def both_there():
        workers[:] = shell("pgrep", "-P", parent.pid, "-f", "spawn_main").stdout.split()
        return len(workers) == 2

    assert wait_for(both_there)
    return parent, [int(worker) for worker in workers]


def is_alive(process_id):
    return Path(f"/proc/{process_id}").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to look into")
def test_workers_do_not_outlive_their_parent(grid, tmp_path):
    parent, workers = start_grid(grid, tmp_path)
    parent.kill()
    parent.communicate()
    assert wait_for(lambda: not any(is_alive(worker) for worker in workers))


def test_other_test_images_make_other_cells(grid, tmp_path):
    out = Path(shutil.copytree(grid, tmp_path / "grid"))
    x, _ = easy(60, seed=5)
    data = npz(tmp_path / "tiny.npz", x_test=x[:, 0].numpy())
    before = len(list((out / "cells").iterdir()))
    assert run(*GRID, "--dataset", data, "-o", out, "--jobs", 1) == 0
    assert len(list((out / "cells").iterdir())) == 2 * before


def test_a_data_set_that_does_not_fit_in_memory_is_refused():
    with pytest.raises(common.Mistake, match=r"photos needs \d+\.\d GiB of memory, and this"):
        common.require_memory(2 ** 62, "photos")
    common.require_memory(1, "a byte")


# ---- folders and files of others ------------------------------------------------------------

@contextlib.contextmanager
def within(seconds):
    """What waits for a pipe for longer than this fails, and does not hang."""
    def give_up(number, frame):
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def contents(folder):
    """Every file below a folder and what it holds."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def export_to(copy, folder, count=9):
    return run("hybrids", "-o", copy, "--count", count, "--export", folder)


@pytest.mark.parametrize("names", [["000-cat/000001.png"], ["000-cat/1.png", "labels.csv"],
                                   ["notes.txt"]])
def test_an_export_does_not_touch_a_folder_of_somebody_elses(copy, capsys, tmp_path, names):
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("file,label\n000-cat/1.png,cat\n")
    before = contents(tmp_path / "mine")
    line = mistake(capsys, "hybrids", "-o", copy, "--export", tmp_path / "mine")
    assert "is not of an earlier export; --export takes a new or an empty folder" in line
    assert contents(tmp_path / "mine") == before


def test_an_export_takes_the_place_of_an_earlier_one(copy):
    assert export_to(copy, copy / "png") == 0           # there were 90
    with (copy / "png/labels.csv").open(encoding="utf-8") as file:
        listed = {copy / "png" / row["file"] for row in csv.DictReader(file)}
    assert len(listed) == 9
    assert set(contents(copy / "png")) == {*listed, copy / "png/labels.csv"}


def test_an_export_with_a_file_more_is_left_alone(copy, capsys):
    (copy / "png/000-cat/999999.png").write_text("mine")
    before = contents(copy / "png")
    assert "999999.png" in mistake(capsys, "hybrids", "-o", copy, "--export", copy / "png")
    assert contents(copy / "png") == before


@pytest.mark.parametrize("link", ["000-cat", "000-cat/000000.png", "labels.csv"])
def test_an_export_follows_no_link(copy, capsys, tmp_path, link):
    there = tmp_path / "there"
    there.mkdir()
    (there / "000000.png").write_text("mine")
    folder = tmp_path / "png"
    (folder / link).parent.mkdir(parents=True)
    (folder / link).symlink_to(there if link == "000-cat" else there / "000000.png")
    mistake(capsys, "hybrids", "-o", copy, "--export", folder)
    assert contents(there) == {there / "000000.png": b"mine"}


def test_an_export_with_an_endless_class_name(copy):
    data = npz(copy / "tiny.npz", classes=np.array(["a" * 300, "b/../c", "."]))
    assert run("hybrids", "-o", copy, "--dataset", data, "--count", 90,
               "--export", copy / "new") == 0
    folders = [path.name for path in (copy / "new").iterdir() if path.is_dir()]
    assert sorted(folders) == ["000-" + "a" * 50, "001-b____c", "002-_"]


@pytest.mark.parametrize("name", ["latent.pt.tmp", "latent.json.tmp", "latent.png.tmp"])
def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(copy, tmp_path, name):
    (tmp_path / "mine").write_text("mine")
    (copy / name).symlink_to(tmp_path / "mine")
    assert run("latent", "-o", copy) == 0
    assert (tmp_path / "mine").read_text() == "mine"
    assert not list(copy.glob("*.tmp"))


@pytest.mark.parametrize("name", [".lock", ".lock-0", "cnn.log.jsonl"])
def test_a_link_in_the_place_of_a_lasting_file_is_refused(copy, capsys, tmp_path, name):
    (tmp_path / "mine").write_text("mine")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "mine")
    assert name in mistake(capsys, "cnn", "-o", copy, *STEMS["cnn"])
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("script, name", [("latent", "vae.pt"), ("cnn", "hybrids.pt"),
                                          ("latent --point=0,0,0,0", "vae.pt"),
                                          ("latent", ".lock")])
def test_a_pipe_in_the_place_of_a_file_is_refused(copy, capsys, script, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with within(30):
        assert name in mistake(capsys, *script.split(), "-o", copy)


def test_a_device_in_the_place_of_a_file_is_refused(copy, capsys):
    (copy / "vae.pt").unlink()
    (copy / "vae.pt").symlink_to("/dev/zero")
    with within(30):
        assert "vae.pt is damaged" in mistake(capsys, "latent", "-o", copy)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_unfinished_work_that_is_a_pipe_is_begun_afresh(copy, capsys):
    (copy / "cnn.last.pt").unlink()
    os.mkfifo(copy / "cnn.last.pt")
    with within(60):
        assert run("cnn", "-o", copy, *STEMS["cnn"], "--resume") == 0
    assert "starting afresh" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_cell_that_is_a_pipe_is_computed_again(grid, tmp_path):
    out = Path(shutil.copytree(grid, tmp_path / "grid"))
    cell = next((out / "cells").iterdir())
    row = cell.read_text()
    cell.unlink()
    os.mkfifo(cell)
    with within(60):
        assert run(*GRID, "--dataset", grid / "tiny.npz", "-o", out, "--jobs", 1) == 0
    assert cell.read_text() == row


# ---- lost work ------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [vae, cnn], ids=["vae", "cnn"])
def test_each_row_of_a_fit_keeps_its_own_state(module):
    x, y = easy(60)
    real = cnn.batches((x, F.one_hot(y, 3).float()), 8)

    def next_batch(generator, done=0.0):
        x, q = real(generator, done)
        return x if module is vae else (x, q)

    def fit(model, state=None):
        return list(module.fit(model, next_batch, steps=12, rounds=4, generator=seeded(),
                               state=state))

    torch.manual_seed(0)
    model = vae.VAE(1, 16, 16, 4) if module is vae else cnn.CNN(1, 3, width=4)
    rows = fit(model)
    last = {key: value.clone() for key, value in model.state_dict().items()}
    assert rows[1]["state"]["step"] == 6
    resumed = fit(model, rows[1]["state"])
    assert [row["step"] for row in resumed] == [9, 12]
    assert same(model.state_dict(), last)
    fit(model)                          # what comes later changes none of them, either
    assert same(rows[-1]["state"]["model"], last)


def test_unfinished_work_stays_until_the_next_step_has_begun(copy):
    assert (copy / "cnn.last.pt").exists()
    assert not (copy / "vae.last.pt").exists()          # latent.py has run
    npz(copy.parent / "tiny.npz")
    assert run("vae", "-o", copy, *STEMS["vae"], "--dataset", copy.parent / "tiny.npz") == 0
    assert (copy / "vae.last.pt").exists()
    assert run("latent", "-o", copy) == 0
    assert not (copy / "vae.last.pt").exists()
    assert run("compare", "-o", copy, *STEMS["compare"]) == 0
    assert not (copy / "cnn.last.pt").exists()


def test_unfinished_work_that_is_younger_than_the_result_stays(copy):
    (copy / "vae.last.pt").write_text("of a training that was interrupted")
    assert run("latent", "-o", copy) == 0
    assert (copy / "vae.last.pt").exists()


# Each in python's place: it leaves its stem file, and what follows goes wrong.
WRITE_STEM = """#!/bin/sh
stem=${1%.py} end=pt
[ $stem = compare ] && end=json
while [ "$1" != -o ]; do shift; done
echo whole > "$2/$stem.$end"
"""


def stand_in(tree, end):
    (tree / "stand-in").write_text(WRITE_STEM + end)
    (tree / "stand-in").chmod(0o755)
    return ["make", "all", "PYTHON=./stand-in"]


def start_make(tree, command):
    return subprocess.Popen(command, cwd=tree, env=ENV, text=True, stderr=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, start_new_session=True)


def test_make_keeps_a_whole_file_whose_step_fails_afterwards(tree):
    done = shell(*stand_in(tree, "exit 1"), cwd=tree)
    assert done.returncode == 2
    assert (tree / "runs/glyphs/vae.pt").read_text() == "whole\n"


def test_make_keeps_a_whole_file_when_it_is_interrupted(tree):
    process = start_make(tree, stand_in(tree, "sleep 60"))
    assert wait_for((tree / "runs/glyphs/vae.pt").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert "Deleting" not in process.communicate(timeout=30)[1]
    assert (tree / "runs/glyphs/vae.pt").exists()


def test_a_second_make_in_one_folder_stops_and_the_first_ends_well(tree):
    command = stand_in(tree, "sleep 0.5")
    first = start_make(tree, command)
    assert wait_for((tree / "runs/glyphs/vae.pt").exists)
    second = shell(*command, "STEPS=7", cwd=tree)
    assert second.returncode == 2
    assert "another make works in runs/glyphs; wait for it" in second.stderr
    said = first.communicate(timeout=30)[1]
    assert first.returncode == 0, said
    assert (tree / "runs/glyphs/compare.json").exists()
    assert shell(*command, cwd=tree).returncode == 0


@pytest.mark.parametrize("process", [os.getpid(), 2 ** 22 + 1, ""])
def test_what_a_make_that_has_ended_left_is_no_hindrance(tree, process):
    """Its number may be that of another program by now."""
    (tree / "runs/glyphs").mkdir(parents=True)
    (tree / "runs/glyphs/.make").write_text(str(process))
    done = shell(*stand_in(tree, ""), cwd=tree)
    assert done.returncode == 0, done.stderr


def test_make_takes_up_a_grid_that_is_incomplete(grid, tmp_path, monkeypatch):
    train = compare.train_cnn

    def without_hybrids(arm, images, y, classes, made, *others):
        if made:
            raise ValueError("for the test")
        return train(arm, images, y, classes, made, *others)

    monkeypatch.setattr(compare, "train_cnn", without_hybrids)
    words = [*GRID, "--dataset", grid / "tiny.npz", "-o", tmp_path, "--jobs", 1]
    assert run(*words) == 2
    result = tmp_path / "compare.json"
    assert result.stat().st_mtime < (tmp_path / "compare.csv").stat().st_mtime
    assert len(json.loads(result.read_text())["failed"]) == 4


@slow
@pytest.mark.parametrize("how, code", [(signal.SIGINT, 0), (signal.SIGKILL, 2)])
def test_a_signal_to_a_worker_does_not_leave_the_grid_waiting(grid, tmp_path, how, code):
    parent, workers = start_grid(grid, tmp_path, "--steps", 200)
    os.kill(workers[0], how)
    said = parent.communicate(timeout=200)[1]
    assert parent.returncode == code
    assert "Traceback" not in said
    assert ("run the same command again" in said) == (code == 2)


def test_ctrl_c_again_and_again_prints_one_line(grid, tmp_path):
    parent, workers = start_grid(grid, tmp_path, "--quiet")
    while parent.poll() is None:
        os.killpg(parent.pid, signal.SIGINT)
        time.sleep(0.05)
    assert parent.returncode == 130
    assert parent.stderr.read() == "compare.py: interrupted; what was finished is kept\n"


# ---- files that lie -------------------------------------------------------------------------

def damage(file, target, generator, at_end=False):
    """A copy of a file with one bit changed, or with its end cut off."""
    content = bytearray(file.read_bytes())
    place = generator.integers(len(content))
    if at_end:
        del content[place:]
    else:
        content[place] ^= 1 << generator.integers(7)
    target.write_bytes(content)


def content_of(folder, name):
    """What a data set or a .pt file gives the scripts, as text."""
    if name.endswith(".npz"):
        data = dataset(folder / name, folder)
        return str([part.tolist() for part in data.tensors()])
    args = vae.parse_args(["-o", str(folder), "--dataset", str(folder / "tiny.npz")])
    started = common.start(args)
    started.release()
    return str(common.load(started, name.removesuffix(".pt")))


def test_every_changed_bit_is_found(chain, tmp_path):
    """100 seeded changes: refused in one line that names the file, or without any effect."""
    torch.set_printoptions(threshold=10 ** 9, precision=10)
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    shutil.copy(chain.parent / "tiny.npz", tmp_path)
    names = [*(f"{kind}.pt" for kind in STEPS), "tiny.npz"]
    truth = {name: content_of(tmp_path, name) for name in names}
    generator = np.random.default_rng(0)
    refused = 0
    for k in range(100):
        file = tmp_path / names[k % len(names)]
        whole = file.read_bytes()
        damage(file, file, generator, at_end=k % 4 == 3)
        try:
            assert content_of(tmp_path, file.name) == truth[file.name]
        except common.Mistake as line:
            refused += 1
            assert file.name in str(line)
        file.write_bytes(whole)
    torch.set_printoptions(profile="default")
    assert refused > 75


def test_changed_cells_are_computed_again(grid, tmp_path):
    out = Path(shutil.copytree(grid, tmp_path / "grid"))
    generator = np.random.default_rng(0)
    for file in (out / "cells").iterdir():
        damage(file, file, generator)
    assert run(*GRID, "--dataset", grid / "tiny.npz", "-o", out, "--jobs", 1) == 0
    assert (out / "compare.csv").read_text() == (grid / "compare.csv").read_text()


def change(path, key, value):
    """A .pt file with another value at a/place/like/this; None: without it."""
    saved = read(path)
    *outer, last = key.split("/")
    place = saved
    for name in outer:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value(place[last])
    torch.save(saved, path)


def with_nan(tensor):
    tensor[0] = math.nan
    return tensor


def cut_in_half(tensor):
    return tensor[:len(tensor) // 2]


def as_floats(tensor):
    return tensor.float()


def negative(tensor):
    return -1 - tensor


def doubled(content):
    return content * 2


def as_words(content):
    return "many"


def zero(content):
    return 0.0


def doubled_type(tensor):
    return tensor.double()


def above_one(content):
    return 1.5


def of_half_the_height(flows):
    return flows[:, :8]


def with_a_third_direction(flows):
    return torch.cat([flows, flows[..., :1]], 3)


def far_away(flows):
    return flows + 1000


LIES = {
    "vae": [("rows", None), ("rows", negative), ("rows", as_floats), ("rows", doubled),
            ("model", None), ("model/encoder.1.weight", with_nan), ("config/units", doubled),
            ("model/encoder.1.weight", cut_in_half), ("config/latent_dim", doubled),
            ("config/height", as_words), ("dataset", None), ("dataset/classes", None),
            ("dataset/shape", doubled), ("dataset/spec", len), ("made_from", None),
            ("deformations", None), ("deformations/directions", None),
            ("deformations/directions", with_nan), ("deformations/directions", cut_in_half),
            ("deformations/directions", doubled_type), ("deformations/height", doubled),
            ("deformations/width", as_words), ("deformations/strength", above_one),
            ("deformations/strength", as_words), ("deformations/mirror", as_words),
            ("deformations/mirror", None)],
    "latent": [("mu", None), ("mu", with_nan), ("mu", cut_in_half), ("labels", negative),
               ("labels", doubled), ("labels", as_floats), ("teaching/prior", doubled),
               ("teaching/prior", negative), ("teaching/temperature", zero),
               ("teaching/counts", doubled), ("teaching/variance", negative),
               ("teaching/log_floor", as_words), ("dataset/spec", len)],
    "hybrids": [("images", as_floats), ("images", cut_in_half), ("q", with_nan),
                ("q", doubled), ("q", cut_in_half), ("q", None), ("flows", None),
               ("flows", with_nan), ("flows", as_floats), ("flows", of_half_the_height),
               ("flows", with_a_third_direction), ("flows", far_away)],
    "cnn": [("model/head.weight", with_nan), ("model/head.bias", cut_in_half),
            ("config/classes", doubled), ("config", None), ("dataset/shape", doubled)],
}
RESTORE = {"vae": vae.VAE.restore, "latent": latent.Codes.restore, "cnn": cnn.CNN.restore}


@pytest.mark.parametrize("kind", LIES)
def test_a_file_that_cannot_be_true_is_refused_with_the_remedy(copy, kind):
    args = latent.parse_args(["--out", str(copy)])
    started = common.start(args)
    started.release()
    whole = (copy / f"{kind}.pt").read_bytes()
    upstream = common.load(started, "vae")
    for key, value in LIES[kind]:
        change(copy / f"{kind}.pt", key, value)
        with pytest.raises(common.Mistake, match=f"{kind}.pt is damaged; make it with: "):
            common.load(started, kind, restore=RESTORE.get(kind), like=upstream)
        (copy / f"{kind}.pt").write_bytes(whole)


def every_place(content, before=""):
    """Where all stands in nested dicts: a/place/like/this."""
    for key, value in content.items():
        yield before + key
        if isinstance(value, dict):
            yield from every_place(value, f"{before}{key}/")


@slow
@pytest.mark.parametrize("kind, words", [
    ("vae", ["latent"]), ("vae", ["compare", *STEMS["compare"]]),
    ("latent", ["hybrids", "--count", 9]),
    ("latent", ["latent", "--point=0,0,0,0"]), ("hybrids", ["cnn", *STEMS["cnn"]]),
    ("cnn", ["cnn", "--predict", "OUT/vae.png"])])
def test_whatever_a_file_lacks_no_script_ends_in_a_traceback(copy, kind, words):
    npz(copy.parent / "tiny.npz")
    words = [str(word).replace("OUT", str(copy)) for word in words]
    whole = (copy / f"{kind}.pt").read_bytes()
    places = list(every_place(read(copy / f"{kind}.pt")))
    for key, value in itertools.product(places, (None, as_words)):
        if key.split("/")[0] not in ("metrics", "settings", "versions", "made_from"):
            change(copy / f"{kind}.pt", key, value)
            assert run(*words, "-o", copy) in (0, 2), key
            (copy / f"{kind}.pt").write_bytes(whole)


@pytest.mark.parametrize("key, value", [
    ("state/model/head.weight", cut_in_half), ("state/model/head.weight", with_nan),
    ("state/model", None), ("state/optimiser", None), ("state/generator", cut_in_half),
    ("state/generator", torch.zeros_like), ("state/step", as_words), ("state/step", zero),
    ("history", cut_in_half), ("state/optimiser", dict.popitem)])
def test_unfinished_work_that_cannot_be_true_is_begun_afresh(copy, capsys, key, value):
    words = ["cnn", "-o", copy, "--steps", 3, "--width", 8]
    assert run(*words) == 0
    straight = read(copy / "cnn.pt")["model"]
    change(copy / "cnn.last.pt", key, value)
    assert run(*words, "--resume") == 0
    assert "does not fit these settings; starting afresh" in capsys.readouterr().err
    assert same(read(copy / "cnn.pt")["model"], straight)


NESTED = "[" * 100_000


@pytest.mark.parametrize("change", [
    {"accuracy": math.nan}, {"accuracy": 7.5}, {"accuracy": "0.9"}, {"accuracy": None},
    {"arm": "mixup"}, {"n": 13}, {"seed": 9}, {"nll": math.inf}, {"ece": -0.1}, {"more": 1},
    {"sources": [1]}])
def test_a_cell_that_cannot_be_true_is_as_good_as_none(tmp_path, change):
    scores = dict.fromkeys(compare.SCORES, 0.5)
    row = {"n": 12, "seed": 0, "arm": "real", "sources": 12, **scores}
    file = tmp_path / "cell.json"
    compare.write_cell(file, row)
    assert compare.read_cell(file, 12, 0, "real") == row
    row = {**row, **change}
    file.write_text(json.dumps([row, common.fingerprint(json.dumps(row).encode())]))
    assert compare.read_cell(file, 12, 0, "real") is None


@pytest.mark.parametrize("text", [NESTED, "", "[]", "{}", "[1, 2]", "\x00"])
def test_a_cell_of_another_form_is_as_good_as_none(tmp_path, text):
    (tmp_path / "cell.json").write_text(text)
    assert compare.read_cell(tmp_path / "cell.json", 12, 0, "real") is None


# ---- streams, alphabets, containers ---------------------------------------------------------

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


def reader_gone():
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@needs_full
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("opened", [lambda: None, lambda: FULL.open("w"), reader_gone],
                         ids=["closed", "full", "gone"])
def test_the_result_does_not_depend_on_who_listens(copy, monkeypatch, name, opened):
    (copy / "latent.pt").unlink()
    stream = opened()
    monkeypatch.setattr(sys, name, stream)
    assert latent.main(["-o", str(copy), "--threads", "1"]) == 0
    assert (copy / "latent.pt").exists()
    if stream:
        stream.close()                  # as Python does in the end: nothing is left to write


@needs_full
@pytest.mark.parametrize("opened, code", [(lambda: None, 0), (reader_gone, 0),
                                          (lambda: FULL.open("w"), 2)],
                         ids=["closed", "gone", "full"])
def test_a_table_that_nobody_takes_ends_in_one_line_or_none(copy, monkeypatch, capsys, opened,
                                                            code):
    monkeypatch.setattr(sys, "stdout", opened())
    words = ["-o", str(copy), "--predict", str(copy / "png/000-cat")]
    assert cnn.main(words) == code
    said = capsys.readouterr().err
    assert ("cnn.py: " in said) == (code == 2)
    assert "Traceback" not in said


@slow
@pytest.mark.parametrize("script", STEMS)
@pytest.mark.parametrize("ending", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full",
                                    "2> /dev/full", "2>&1 | head -c 1", "2>&1 | true"])
def test_every_script_writes_its_result_whoever_listens(copy, script, ending):
    stem = copy / f"{script}.{'json' if script == 'compare' else 'pt'}"
    stem.unlink(missing_ok=True)
    words = ["--dataset", npz(copy.parent / "tiny.npz"), *STEMS[script], "-o", copy]
    words = shlex.join([sys.executable, f"{script}.py", *map(str, words)])
    done = shell("bash", "-c", f"set -o pipefail; ( {words}; echo $? > {copy}/code ) {ending}")
    assert (copy / "code").read_text() == "0\n"
    assert stem.exists()
    assert "Exception ignored" not in done.stderr + done.stdout


@slow
@pytest.mark.parametrize("ending", [">&-", "> /dev/full", "| head -n 1", "| true"])
def test_a_table_is_not_followed_by_complaints_of_python(copy, ending):
    words = f"{sys.executable} cnn.py -o {copy} --predict {copy}/png"
    done = shell("bash", "-c", f"( {words}; echo $? > {copy}/code ) {ending}")
    code = int((copy / "code").read_text())
    assert code == (2 if "full" in ending else 0)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


NAMES = ["猫", "$x$ ü", "caf\udce9"]     # the last one is not UTF-8
LEGIBLE = ["猫", "$x$ ü", r"caf\udce9"]


@pytest.fixture
def renamed(copy):
    """The finished folder, its classes of other alphabets."""
    words = ["-o", copy, "--dataset", npz(copy / "tiny.npz", classes=np.array(NAMES))]
    assert run("latent", *words) == 0
    assert run("hybrids", *words, "--count", 30, "--export", copy / "export") == 0
    assert run("cnn", *words, *STEMS["cnn"]) == 0
    return copy


def test_class_names_of_all_alphabets_reach_files_and_figures(renamed, recwarn):
    table = (renamed / "export/labels.csv").read_text(encoding="utf-8")
    assert table.splitlines()[0] == "file,猫,$x$ ü,caf\\udce9"
    assert json.loads((renamed / "cnn.json").read_text())["dataset"]["classes"] == LEGIBLE
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_names_that_a_terminal_cannot_show_are_escaped(renamed, monkeypatch):
    for encoding, shown in (("ascii", "\\u732b"), ("latin-1", "$x$ ü"), ("utf-8", "猫"),
                            ("utf-8", "caf\\udce9")):
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding))
        assert run("latent", "-o", renamed, "--point=0,0,0,0") == 0
        assert run("cnn", "-o", renamed, "--predict", renamed / "vae.png") == 0
        said = buffer.getvalue().decode(encoding)
        assert said.count(shown) == 2


def test_names_are_legible_in_figures():
    assert common.legible(["cat", "a_b^c", "ü"]) == ["cat", "a_b^c", "ü"]
    assert common.legible(["$5 or $6", "猫x"]) == [r"\$5 or \$6", r"\u732bx"]
    text = common.figure().text(0, 0, common.legible(["$5 or $6"])[0])
    plain = common.figure().text(0, 0, "S5 or S6")
    assert text.get_window_extent().width == approx(plain.get_window_extent().width, rel=0.05)


def test_figures_leave_the_settings_of_matplotlib_alone(copy):
    import matplotlib
    del (before := dict(matplotlib.rcParams))["backend"]
    assert run("latent", "-o", copy) == 0
    assert {key: matplotlib.rcParams[key] for key in before} == before


MEET = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variables, wanted", [
    ({}, (0, 1)), ({"WORLD_SIZE": "4"}, (0, 1)), ({"RANK": "0", "WORLD_SIZE": "4"}, (0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "4", **MEET}, (1, 4)),
    ({"RANK": "x", "WORLD_SIZE": "4", **MEET}, (0, 1)),
    ({"RANK": "", "WORLD_SIZE": "4", **MEET}, (0, 1)),
    ({"RANK": "4", "WORLD_SIZE": "4", **MEET}, (0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, (0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "4", **MEET, "MASTER_PORT": "x"}, (0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "4", **MEET, "MASTER_ADDR": ""}, (0, 1))])
def test_ranks_are_those_of_torchrun_or_one(monkeypatch, variables, wanted):
    for name in ("RANK", "WORLD_SIZE", *MEET):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert common.torchrun_rank() == wanted


def test_variables_of_a_batch_system_and_of_a_notebook_do_no_harm(copy):
    data = npz(copy.parent / "tiny.npz")
    done = shell(sys.executable, "vae.py", "-o", copy, "--dataset", data, *STEMS["vae"],
                 RANK="x", WORLD_SIZE="4", LOCAL_RANK="", MPLBACKEND="nonsense")
    assert done.returncode == 0, done.stderr


@slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not
                    shutil.which("setpriv"), reason="only root may be somebody else")
def test_a_user_without_a_name_and_a_home_can_run_everything(tmp_path):
    rights = "+dac_override,+dac_read_search"           # to read this Python, wherever it is
    user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups",
            f"--inh-caps={rights}", f"--ambient-caps={rights}",
            "env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME", sys.executable, "-B"]
    data = ["--dataset", npz(tmp_path / "tiny.npz"), "-o", tmp_path / "run"]
    for script in STEMS:
        done = shell(*user, f"{script}.py", *data, *STEMS[script])
        assert done.returncode == 0, done.stderr


# ---- killed anywhere ------------------------------------------------------------------------

def findings(out):
    """What a run states: tensors, metrics, the table; not when, nor from which file."""
    found = {}
    for kind in STEPS:
        found[kind] = read(out / f"{kind}.pt")
        del found[kind]["made_from"]
    return str(found).replace(str(out), "") + (out / "compare.csv").read_text()


def make_until_killed(command, tree, seconds, how):
    """Start make, kill it after so many seconds -> was it through before?"""
    process = subprocess.Popen(command, cwd=tree, env=ENV, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert process.wait(timeout=seconds) == 0
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, how)
        process.wait()
        return False


@slow
def test_make_quick_killed_at_20_random_moments(tree, tmp_path):
    """kill -9 and Ctrl-C in turn, again and again until it is through: the same result."""
    torch.set_printoptions(threshold=10 ** 9, precision=10)
    command = ["make", "quick", f"PYTHON={sys.executable}",
               f"DATASET={npz(tmp_path / 'tiny.npz', 500)}"]
    make(tree, *command[1:], f"OUT={tmp_path / 'straight'}")
    wanted = findings(tmp_path / "straight")
    moments = np.random.default_rng(0)
    killed = 0
    while killed < 20:
        out = tmp_path / f"out{killed}"
        through = False
        while not through:
            how = signal.SIGKILL if killed % 2 else signal.SIGINT
            seconds = moments.uniform(0, 12)
            through = make_until_killed([*command, f"OUT={out}"], tree, seconds, how)
            killed += not through
        assert findings(out) == wanted
        assert not unfinished(out)
    torch.set_printoptions(profile="default")


@slow
@pytest.mark.skipif(not (REAL_DATA / "MNIST").is_dir(), reason="no MNIST in ../shared/data")
def test_the_mnist_chain_stays_below_2_and_a_half_gigabytes(tree, tmp_path):
    resource = pytest.importorskip("resource")
    make(tree, "all", f"PYTHON={sys.executable}", "DATASET=mnist", f"DATA={REAL_DATA}",
         f"OUT={tmp_path}", "STEPS=20", "SIZES=100 3000", "SEEDS=2",
         "COMPARE_FLAGS=--vae-steps 20")
    kibibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert kibibytes < 2.5 * 2 ** 20
