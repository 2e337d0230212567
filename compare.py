"""Compare classifiers fairly: accuracy versus number of real images, many arms, many subsets.

    python compare.py                               # runs/glyphs: 2 sizes x 5 subsets x 3 arms
    python compare.py -o runs/mnist --sizes 100 1000 --seeds 10 --arms real mixup real+hybrid

Every arm of one size and subset has the same images, initial weights and number of steps; the
VAE sees no others, unless told to. The last step's score counts; none is picked. A cell makes
what the scripts make, by the same calls: real+hybrid with 100 images of subset 3 is the
network that `--images 100 --seed 3` leaves in cnn.pt.

Reads:  a data set (that of vae.pt, if --dataset is not given); latent.pt, hybrids.pt to show.
Writes: compare.json compare.csv compare.png, summary.png; cells/, from which a grid goes on.
"""
import argparse
import functools
import itertools
import json
import math
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import cnn
import common
import deform
import hybrids
import latent
import vae

# Letters: n real images, S subsets (seeds); an arm is one way to train the CNN; a unit is one
# subset of one size, (n, seed); a cell is one arm of a unit.


class Arm(NamedTuple):
    """How the CNN of an arm is trained; without a strategy it sees no hybrids."""
    strategy: str = ""                  # of hybrids.sample
    rule: str | None = None             # of hybrids.label; None: its default
    share: tuple = (1.0, 0.0)           # of hybrid or mixed images: at first, in the end
    residual: bool = True
    mix: str = ""                       # halves, mixup, cutmix or both
    augmentation: str = ""              # of all images of a batch: augment, elastic, deform
    moves: bool = True                  # hybrids move, and then real images
    register: bool = True               # and their sources are brought into register
    cut: bool | None = None             # hybrids cut, not mixed; None: those of colour


ARMS = {                                # the first ten have a colour of their own
    "real": Arm(),
    "mixup": Arm(mix="halves"),
    "real+hybrid": Arm("between"),
    "augment": Arm(augmentation="augment"),
    "deform": Arm(augmentation="deform"),
    "elastic": Arm(augmentation="elastic"),
    "deform+mixup": Arm(mix="mixup", augmentation="deform"),
    "undeformed hybrid": Arm("between", moves=False),
    "mixup+cutmix": Arm(mix="both"),
    "augment+hybrid": Arm("between", augmentation="augment", moves=False, cut=False),
    "augment+mixup": Arm(mix="mixup", augmentation="augment"),
    "cutmix": Arm(mix="cutmix"),
    "deform+cutmix": Arm(mix="cutmix", augmentation="deform"),
    # The controls: where is a gain from?
    "hybrid only": Arm("between", share=(1.0, 1.0)),
    "prior hybrid": Arm("prior", moves=False),       # the idea as first stated
    "cross-faded hybrid": Arm("between", register=False),
    "deformed images": Arm("images"),   # hybrids of one image each
    "weight labels": Arm("between", "weight"),
    "density labels": Arm("between", "density"),
    "product labels": Arm("between", "product"),
    "no residual": Arm("between", residual=False),
    "reconstructions": Arm("around", "weight", residual=False, moves=False),
    # With --unlabelled, images under the labels that were spread to them.
    "pseudo-labels": Arm("images", moves=False),
    "augment+pseudo": Arm("images", augmentation="augment", moves=False),
    "soft pseudo-labels": Arm("images", "density", moves=False),
    "mixup+pseudo": Arm("images", mix="halves", moves=False),
    "mixup+soft pseudo": Arm("images", "density", mix="halves", moves=False),
    "mixup+pseudo only": Arm("images", mix="halves", share=(1.0, 1.0), moves=False),
    "latent posterior": Arm("posterior"),               # no classifier at all
}
# What is compared unless told otherwise; of features, with images without a label, too.
USUAL = ["real", "mixup", "real+hybrid"]
USUAL_OF_FEATURES = ["real", "mixup", "pseudo-labels", "mixup+pseudo", "real+hybrid"]
# Nothing in features moves, or can be cut.
OF_IMAGES = ["cutmix", "mixup+cutmix", "undeformed hybrid", "cross-faded hybrid",
             "deformed images"] + [name for name, arm in ARMS.items()
                                   if arm.augmentation and name != "augment"]
SIZES = [100, 300]
AVERAGED = ("balanced_accuracy", "nll", "ece", "scaled_nll", "scaled_ece", "noise")
# Of Student's t, 97.5%, by degrees of freedom from 1 on.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
               2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


# ---- one cell -------------------------------------------------------------------------------

def generator_for(images, seed):
    return torch.Generator(images.device).manual_seed(seed)


def mixing(name):
    """The mixing that an arm names: (x, q, generator) -> (x, q), or None."""
    mixes = {"": None, "halves": cnn.mixup, "cutmix": cnn.cutmix,
             "mixup": functools.partial(cnn.mixup, alpha=4.0),  # here halves are no better
             "both": in_turn(cnn.mixup, cnn.cutmix)}
    return mixes[name]


def in_turn(*transforms):
    """One of the transforms a batch, one after the other."""
    turns = itertools.cycle(transforms)

    def transform(x, q, generator):
        return next(turns)(x, q, generator)

    return transform


class Unit:
    """One subset of one size: its images, its judges, what its hybrids are made of."""

    def __init__(self, grid, n: int, seed: int):
        data = grid.data
        self.of_features = data.features is not None
        self.n = n
        self.seed = seed
        self.classes = len(data.classes)
        self.recipe = grid.recipes[n]
        by_validation = self.recipe["score"] == "validation"
        if self.recipe["unlabelled"]:   # the VAE sees all images; n keep their label
            data = common.with_labels(data, n, seed, judged=by_validation)
            self.rows = data.pool
        else:
            self.rows = common.subset(data, n, seed)
        self.y = data.labels[self.rows]
        inputs = common.Inputs(data, self.rows)
        self.images = inputs[self.rows]                 # or features
        self.labelled = self.images[self.y >= 0]
        self.labels = self.y[self.y >= 0]
        if data.mirrored is not None:
            self.mirrored = inputs.of(data.mirrored[self.rows[self.y >= 0]])
        # Temperatures are fitted on some validation images; the others may be the judges.
        count = min(1000, (len(data.validation) + 1) // 2)
        some = data.validation[latent.subsample(len(data.validation), count)]
        self.fitting = (inputs[some], data.labels[some])
        self.scored = (inputs.test(), data.test_labels)
        if by_validation:
            others = data.validation[~torch.isin(data.validation, some)]
            self.scored = (inputs[others], data.labels[others])

    # The arms share what these make; each is made when it is first asked for.

    @functools.cached_property
    def moves(self):
        """How the labelled images move."""
        generator = generator_for(self.images, self.seed)
        return deform.Deformations.fit(self.labelled, self.labels, generator)

    @functools.cached_property
    def model(self):
        """The VAE."""
        model, training = vae.train(self.images, self.seed, amp=self.recipe["amp"], rounds=1,
                                    latent_dim=self.recipe["latent_dim"],
                                    steps=self.recipe["vae_steps"])
        for _ in training:
            pass
        return model

    @functools.cached_property
    def codes(self):
        """The codes of the images, with a label if one is given or was spread."""
        mu, logvar = self.encode(self.images)
        moves = None if self.of_features or (self.y >= 0).all() else self.moves
        places = self.model.project(self.images) if self.of_features else mu
        return latent.embed(mu, logvar, self.rows, self.y, self.classes, places, self.images,
                            moves)

    def encode(self, images):
        return vae.encode_all(self.model, images, self.recipe["amp"])

    def posterior_logits(self, images):
        """Logits (M,K) of uint8 images by the latent posterior alone."""
        return self.codes.posterior(*self.encode(images)).clamp(min=1e-9).log()

    def row(self, name: str) -> dict:
        """Train an arm and score it."""
        arm = ARMS[name]
        sources = self.n
        if arm.strategy:
            sources = len(self.codes.known().y)         # with those that got a label
        if arm.strategy == "posterior":
            logits_of = self.posterior_logits
        else:
            model = self.train(arm)
            logits_of = functools.partial(cnn.predict, model, amp=self.recipe["amp"])
        return {"n": self.n, "seed": self.seed, "arm": name, "sources": sources,
                **evaluate(logits_of, *self.scored, *self.fitting)}

    def train(self, arm: Arm):
        """The CNN of an arm."""
        given = self.with_hybrids(arm) if arm.strategy else {}
        images = self.labelled
        y = self.labels
        augmentations = []
        if arm.augmentation and self.of_features:       # those of mirror images are there
            images = torch.cat([images, self.mirrored])
            y = torch.cat([y, y])
        elif arm.augmentation == "deform":
            augmentations = [self.moves]
        elif arm.augmentation:
            augmentations = [getattr(cnn, arm.augmentation)]
        model, training = cnn.train(
            images, F.one_hot(y, self.classes).float(), self.seed, **given,
            mix=mixing(arm.mix), share=arm.share, augmentations=augmentations, rounds=1,
            amp=self.recipe["amp"], width=self.recipe["width"], steps=self.recipe["steps"])
        for _ in training:
            pass
        return model

    def with_hybrids(self, arm: Arm) -> dict:
        """What `cnn.train` is given besides labelled images."""
        known = self.codes.known()
        moves = self.moves if arm.moves and not self.of_features else None
        decode = functools.partial(vae.decode_all, self.model, amp=self.recipe["amp"])
        labelled = self.images[self.codes.y >= 0]
        made = hybrids.make(known, labelled, decode, strategy=arm.strategy, rule=arm.rule,
                            residual=arm.residual, cut=arm.cut, moves=moves,
                            register=arm.register,
                            generator=generator_for(self.images, self.seed))
        given = {"made": (made.x, made.q)}
        if moves:
            given["move"] = moves.gently
        soft = hybrids.are_soft(arm.strategy, arm.rule)
        guessed, q = latent.pseudo_labels(self.codes, soft)
        if guessed.any():
            given["pseudo_labelled"] = (self.images[guessed], q)
        return given


def evaluate(logits_of, images, y, validation, validation_y) -> dict:
    """Scores on images: plain, after one temperature fitted on others, and under noise."""
    logits = logits_of(images)
    validation_logits = logits_of(validation)

    def nll(temperature):
        return F.cross_entropy(validation_logits / temperature, validation_y).item()

    temperature = 1.0
    if len(validation_y):
        temperature = min(torch.logspace(-2, 4, 61, base=2).tolist(), key=nll)
    scaled = common.scores((logits / temperature).softmax(1), y)
    row = {**common.scores(logits.softmax(1), y), "temperature": temperature,
           "scaled_nll": scaled["nll"], "scaled_ece": scaled["ece"]}
    if images.dim() == 4:               # noise in features would mean nothing
        some = latent.subsample(len(y), 2000)
        right = logits_of(noisy(images[some])).argmax(1) == y[some]
        row["noise"] = right.float().mean().item()
    return row


def noisy(images, deviation=0.15):
    """uint8 images under normal noise of so many parts of white, always the same."""
    x = images.float() / 255
    noise = torch.randn(x.shape, device=x.device, generator=generator_for(images, 0))
    return ((x + deviation * noise).clamp(0, 1) * 255).round().byte()


# ---- the grid: units, cells and the processes that work on them -----------------------------

class Grid(NamedTuple):
    """What is compared: these arms on these subsets, by the recipe of each size."""
    data: common.Dataset
    arms: list
    seeds: range
    recipes: dict                       # n -> settings that a cell depends on; n ascends
    folder: Path                        # of the cells

    def units(self):
        """The largest first: at the end of a grid no core waits long for another."""
        return list(itertools.product(reversed(self.recipes), self.seeds))

    def mark(self, n, seed, arm) -> str:
        """By which a cell says what it is of."""
        settings = json.dumps([n, seed, arm, ARMS[arm], self.recipes[n]], sort_keys=True)
        return common.fingerprint(settings.encode())

    def cell(self, n, seed, arm) -> Path:
        """The file of a cell."""
        mark = self.mark(n, seed, arm)
        return self.folder / f"{n}-{seed}-{arm.replace(' ', '_')}-{mark}.json"

    def finished(self, n, seed, arm):
        """The row of a cell; None where there is none, or it is of other settings."""
        try:
            cell = json.loads(self.cell(n, seed, arm).read_text())
        except (OSError, ValueError):
            return None
        return cell["row"] if cell["made_from"] == self.mark(n, seed, arm) else None

    def missing(self, unit) -> list:
        """The arms of a unit that have no cell yet."""
        return [arm for arm in self.arms if self.finished(*unit, arm) is None]

    def rows(self) -> list:
        """The finished cells, by size, subset and arm."""
        cells = itertools.product(self.recipes, self.seeds, self.arms)
        rows = [self.finished(*cell) for cell in cells]
        return [row for row in rows if row]


def run_unit(unit, grid: Grid):
    """Train and score the missing arms of a unit, a file each -> the unit, its failures."""
    work = Unit(grid, *unit)
    failed = []
    for arm in grid.missing(unit):
        try:
            cell = {"made_from": grid.mark(*unit, arm), "row": work.row(arm)}
            common.write(grid.cell(*unit, arm), cell)
        except (ArithmeticError, RuntimeError, ValueError, common.Mistake) as error:
            reason = str(error) or repr(error)          # the other arms, and the grid, go on
            failed.append(f"{arm}: {reason.splitlines()[0]}")
    return unit, "; ".join(failed)


def run_grid(units, work, jobs, threads, progress):
    """work((n, seed)) -> unit, its failures, for all units -> the failures there were."""
    if jobs <= 1:
        return collect(map(work, units), progress)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, [threads]) as pool:
        try:
            # Ctrl-C is for the parent: what begins now ignores it for good.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            futures = [pool.submit(work, unit) for unit in units]
            signal.signal(signal.SIGINT, before)
            return collect((future.result() for future in as_completed(futures)), progress)
        except RuntimeError as error:   # a process killed, or no shared memory
            raise common.Mistake(f"{error}; run the same command again, with --jobs 1"
                                 ) from None
        finally:                        # else an interruption would wait for all units
            pool.shutdown(wait=False, cancel_futures=True)
            for process in torch.multiprocessing.active_children():
                process.terminate()


def collect(results, progress) -> list:
    """The failures among results (unit, reason), as they come in."""
    failed = []
    for done, ((n, seed), reason) in enumerate(results, 1):
        name = f"n={n} subset {seed}"
        if reason:
            failed.append(f"{name}: {reason}")
        progress(done, reason or name)
    return failed


# ---- statistics -----------------------------------------------------------------------------

def t_quantile(df: int) -> float:
    """Of Student's t with so many degrees of freedom, 97.5%."""
    if df <= len(T_QUANTILES):
        return T_QUANTILES[df - 1]
    return 1.96 + 2.5 / df              # right to the third digit


def interval(values):
    """Mean and half-width of its 95% t interval; None for the width of a single value."""
    count = len(values)
    mean = float(np.mean(values))
    if count == 1:
        return mean, None
    half = t_quantile(count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return mean, float(half)


def summarise(rows, pool=math.inf):
    """One entry per size and arm: mean, interval, paired difference to `real`, in points.

    Where n is over half of the `pool`, subsets are nearly the same images: no interval.
    """
    table = []
    real = {(row["n"], row["seed"]): row for row in rows if row["arm"] == "real"}
    for n in sorted({row["n"] for row in rows}):
        for arm in ARMS:
            cells = [row for row in rows if row["n"] == n and row["arm"] == arm]
            if cells:
                table.append(summary_entry(n, arm, cells, real, hollow=2 * n > pool))
    return table


def summary_entry(n, arm, cells, real, hollow):
    """What the rows of one size and arm say together."""
    entry = {"n": n, "arm": arm, "subsets": len(cells), "hollow": hollow}
    accuracies = []
    gains = []
    for row in cells:
        accuracies.append(100 * row["accuracy"])
        pair = real.get((n, row["seed"]))
        if pair and arm != "real":
            gains.append(100 * row["accuracy"] - 100 * pair["accuracy"])
    for what, numbers in (("accuracy", accuracies), ("gain", gains)):
        if numbers:
            entry[what], half = interval(numbers)
            entry[f"{what}_half"] = None if hollow else half
    for key in AVERAGED:
        if key in cells[0]:             # older results lack some
            entry[key] = float(column(cells, key).mean())
    return entry


def column(rows, key):
    """What each of some rows has under a key, as an array."""
    return np.array([row[key] for row in rows])


def verdict(gain, half) -> str:
    if half is None or abs(gain) <= half:
        return "inconclusive"
    return "better than real" if gain > 0 else "worse than real"


def plus_minus(entry, what, sign="") -> str:
    """A mean in an entry of the summary, and the half-width of its interval, if any."""
    half = entry[f"{what}_half"]
    text = f"{entry[what]:{sign}.1f}"
    return text if half is None else f"{text} ± {half:.1f}"


def answers(table):
    """Did hybrids help, by how much, how sure: a sentence a size."""
    sentences = []
    for entry in table:
        if entry["arm"] == "real+hybrid" and "gain" in entry:
            gain = plus_minus(entry, "gain", "+")
            result = verdict(entry["gain"], entry["gain_half"])
            sentences.append(f"{entry['n']:,} images: hybrids change accuracy by {gain} "
                             f"points ({entry['subsets']} subsets): {result}")
    return sentences


# ---- command: plan, run the grid, publish ---------------------------------------------------

def parse_args(argv=None):
    parser = common.flags("compare.py", __doc__, images=False)
    add = parser.add_argument_group("the grid").add_argument
    add("--sizes", type=common.number(int, 2), nargs="+", metavar="N",
        help="numbers of real training images; if not given, 100 300, as far as there are")
    add("--seeds", type=common.number(int, 1), default=5,
        help="number of subsets of each size; each is a seed, from --seed on")
    add("--arms", nargs="+", choices=list(ARMS), metavar="ARM",
        help="what is compared; if not given, real mixup real+hybrid and, of features with "
        "images without a label, pseudo-labels mixup+pseudo; of: " + ", ".join(ARMS))
    add("--score", choices=["test", "validation"], default="test",
        help="images that the classifiers are scored on")
    add("--unlabelled", action=argparse.BooleanOptionalAction,
        help="few labels, many images: the VAE learns from all images, and the labels of the "
        "n are spread to images without one, or whose label is not looked at; if not given, "
        "so where the data set has images without a label")
    add("--steps", type=common.number(int, 1),
        help="optimiser steps of every CNN; if not given, 300 to 4800 by number of images")
    add("--width", type=common.number(int, 1, 1024), default=24,
        help="number of channels of a CNN's first block")
    add("--vae-steps", type=common.number(int, 1),
        help="optimiser steps of a VAE; if not given, 600 to 3000 by number of images")
    add("--latent-dim", type=common.number(int, 1, 512),
        help="latent size D; if not given, that of vae.pt, else 16")
    add("--jobs", type=common.number(int, 1),
        help="number of processes; if not given, one per core; on a GPU at most four, which "
        "share it: give 1 where it serves one process only")
    add("--gather", action="store_true",
        help="train nothing; make the result of the cells that are finished")
    return parser.parse_args(argv)


def plan(run, args) -> Grid:
    """The data set, the sizes that it has images for, and the settings of each."""
    data = common.load_dataset(run)
    sizes = common.fit_sizes(args.sizes or SIZES, bool(args.sizes), len(data.labelled()))
    unlabelled = args.unlabelled
    if unlabelled is None:
        unlabelled = len(data.unlabelled()) > 0
    known = common.record_of(run.out, "vae").get("settings", {})
    of_features = data.features is not None
    seen = data.features if of_features else data.images
    recipes = {}
    for n in sizes:
        others = 0
        if unlabelled:
            few = common.with_labels(data, n, run.seed, judged=args.score == "validation")
            others = len(few.pool) - n
        recipes[n] = {
            "format": common.FORMAT, "data": data.fingerprint, "amp": run.amp,
            "backbone": data.backbone,
            "score": args.score, "unlabelled": unlabelled, "width": args.width,
            "threads": args.threads,
            "latent_dim": args.latent_dim or known.get("latent_dim", 16),
            "vae_steps": args.vae_steps or vae.steps_for(seen, n + others),
            "steps": args.steps or cnn.steps_for(seen, n, others)}
    asked = args.arms or (USUAL_OF_FEATURES if of_features and unlabelled else USUAL)
    wrong = [arm for arm in asked if of_features and arm in OF_IMAGES]
    common.require(not wrong, f"features do not move and cannot be cut: no {', '.join(wrong)}")
    if of_features and "augment" in asked:
        common.add_mirrored(run, data)
    arms = [arm for arm in ARMS if arm in asked]        # one order, whatever was typed
    seeds = range(run.seed, run.seed + args.seeds)
    folder = run.out / "cells"
    folder.mkdir(exist_ok=True)
    return Grid(data, arms, seeds, recipes, folder)


def train_missing(run, args, grid: Grid) -> list:
    """Train the cells that are not there yet -> the reasons of failures."""
    # Under torchrun each rank takes every so-manieth unit; ranks never wait for each other.
    units = grid.units()[common.RANK::common.RANKS]
    units = [unit for unit in units if grid.missing(unit)]
    # One process keeps a GPU busy for a part of the time; Apple's serves one only.
    most = {"cuda": 4, "mps": 1}.get(run.device.type, run.cores)
    jobs = args.jobs or min(run.cores // args.threads, most)
    work = functools.partial(run_unit, grid=grid)
    progress = common.Progress(len(units), "subsets", args.quiet)
    return run_grid(units, work, min(jobs, len(units)), args.threads, progress)


def curves(left, right, table, rows, grid: Grid):
    """Accuracy versus n, and the paired gain over `real`, on two axes."""
    arms = [arm for arm in ARMS if arm in column(table, "arm")]
    for k, arm in enumerate(arms):
        side = 1 + 0.03 * (k - (len(arms) - 1) / 2)    # side by side, not on top of each other
        dots = [row for row in rows if row["arm"] == arm]
        left.scatter(side * column(dots, "n"), 100 * column(dots, "accuracy"), s=9, alpha=0.5,
                     color=arm_look(arm)["color"], linewidths=0)
        entries = [entry for entry in table if entry["arm"] == arm]
        draw_arm(left, arm, entries, "accuracy", side)
        draw_arm(right, arm, entries, "gain", side)
    right.axhline(0, color="black", lw=0.8)
    recipe, *_ = grid.recipes.values()
    images = "labelled images" if recipe["unlabelled"] else "real images"
    name, = common.legible([grid.data.name])
    common.tidy(left, f"How accurate? ({name})", images, f"{recipe['score']} accuracy, %")
    common.tidy(right, "How much better than real images alone?", images,
                "paired difference, points")
    sizes = np.unique(column(table, "n"))
    for axes in (left, right):
        axes.set_xscale("log", subs=[])
        axes.set(xticks=sizes, xticklabels=sizes, xlim=(sizes[0] / 1.5, sizes[-1] * 1.5))
    left.set_ylim(*np.clip(left.get_ylim(), 0, 100))    # no bar goes beyond
    left.legend(frameon=False, fontsize=9, loc="lower right")
    subsets = column(table, "subsets").max()
    left.figure.supxlabel(f"up to {subsets} subsets, each a dot; bars: 95% t intervals; "
                          "hollow: over half of the pool, no interval",
                          fontsize=8, color="0.35")


def arm_look(arm) -> dict:
    """One look per arm, whichever are compared."""
    place = list(ARMS).index(arm)
    # Ten colours, nine marks and four lines: no two arms have the same.
    look = dict(color=common.COLOURS[place % 10], marker=common.MARKERS[place % 9],
                ls=("-", "--", ":", "-.")[place % 4], lw=1.3)
    if arm == "real+hybrid":
        look.update(ls="-", lw=2.5)
    return look


def draw_arm(axes, arm, entries, what, side):
    """One curve with its intervals; hollow where there are none."""
    # `real` has no gain, nor has an arm that no `real` can be paired with.
    entries = [entry for entry in entries if what in entry]
    if not entries:
        return
    x = side * column(entries, "n")
    y = column(entries, what)
    halves = [entry[f"{what}_half"] or 0 for entry in entries]
    look = arm_look(arm)
    axes.errorbar(x, y, halves, ms=6, label=arm, capsize=3, **look)
    hollow = column(entries, "hollow")
    axes.plot(x[hollow], y[hollow], look["marker"], color=look["color"], mfc="white", zorder=5)


def summary(run, table, rows, grid: Grid):
    """The run on one sheet: map, hybrids, curves; None where the chain has not run."""
    try:
        codes = common.load(run, "latent")
        made = common.load(run, "hybrids")
    except common.Mistake:
        return None
    sheet = common.figure(16, 11)
    top, bottom = sheet.subfigures(2, 1, height_ratios=[1.15, 1])
    left, right = top.subfigures(1, 2, width_ratios=[1, 1.25])
    sheet.suptitle("Do hybrid images help?  " + "\n".join(answers(table)), fontsize=12,
                   fontweight="bold")
    classes = common.legible(grid.data.classes)
    hybrids.gallery(right, made["images"], made["q"], classes, 3, 6)
    curves(*bottom.subplots(1, 2), table, rows, grid)
    latent.draw_map(left.subplots(), codes["mu"], codes["y"], classes,
                    latent.restored(codes["percentages"]),
                    torch.Generator().manual_seed(run.seed), codes["given"])
    return sheet


def report(table):
    """The closing table."""
    print(f"{'n':>6}  {'arm':22}{'accuracy, %':>14}{'balanced, %':>14}{'NLL':>8}{'ECE':>7}"
          f"{'gain over real':>16}")
    for entry in table:
        accuracy = plus_minus(entry, "accuracy")
        balanced = 100 * entry["balanced_accuracy"]
        line = (f"{entry['n']:6,}  {entry['arm']:22}{accuracy:>14}{balanced:14.1f}"
                f"{entry['nll']:8.3f}{entry['ece']:7.3f}")
        if "gain" in entry:
            gain = plus_minus(entry, "gain", "+")
            line += f"{gain:>16}  {verdict(entry['gain'], entry['gain_half'])}"
        print(line)


def publish(run, grid: Grid, failed):
    """Tables and pictures of the finished cells."""
    rows = grid.rows()
    for reason in failed:
        print(f"failed: {reason}", file=sys.stderr)
    common.require(rows, "there is no finished cell")
    table = summarise(rows, len(grid.data.labelled()))
    lines = [row.values() for row in rows]
    common.write(run.out / "compare.csv", [rows[0].keys(), *lines])
    fig = common.figure(13, 5.6)
    curves(*fig.subplots(1, 2), table, rows, grid)
    sheet = summary(run, table, rows, grid)
    (run.out / "summary.png").unlink(missing_ok=True)   # an old one is of other cells
    if sheet:
        common.write(run.out / "summary.png", sheet)
    common.write(run.out / "compare.png", fig)

    common.write(run.out / "compare.json", {
        "kind": "compare", "format": common.FORMAT, "dataset": grid.data.facts(),
        "recipes": grid.recipes, "settings": run.settings, "failed": failed, "summary": table,
        "rows": rows, "versions": common.versions()})

    report(table)
    print(run.out / "compare.csv", run.out / "compare.json", sep="\n")
    pictures = sorted(path.name for path in run.out.glob("*.png"))
    print(f"pictures in {run.out}:", *pictures)
    print(*answers(table), sep="\n")
    if failed:
        os.utime(run.out / "compare.json", (0, 0))      # so old that make begins it again
    common.require(not failed, f"{len(failed)} subsets are incomplete; run it again")


def command(run, args):
    grid = plan(run, args)
    if args.gather:
        failed = [f"n={n} subset {seed}: not finished" for n, seed in grid.units()
                  if grid.missing((n, seed))]
    else:
        failed = train_missing(run, args, grid)
    if common.RANKS > 1:
        amp = "--amp" if run.amp else "--no-amp"
        print(f"rank {common.RANK} has finished; then: python compare.py with the same flags "
              f"and --gather {amp}", *failed, sep="\n")
        return
    publish(run, grid, failed)


def main(argv=None) -> int:
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
