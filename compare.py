"""Compare classifiers fairly: accuracy versus number of real images, many arms, many subsets.

    python compare.py                               # runs/glyphs: 2 sizes x 5 subsets x 3 arms
    python compare.py -o runs/mnist --sizes 100 1000 --seeds 10 --arms real mixup real+hybrid

Every arm of one size and subset has the same images, initial weights and number of steps; the
VAE sees no others, unless told to. The last step's score counts; none is picked.

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
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import cnn
import common
import hybrids
import latent
import vae

# Letters: n real images, S subsets (seeds); an arm is one way to train the CNN; a unit is one
# subset of one size, (n, seed); a cell is one arm of a unit.


class Arm(NamedTuple):
    """How the CNN of an arm is trained; without a strategy it sees no hybrids."""
    strategy: str = ""
    label: str = "product"
    share: tuple = (1.0, 0.0)           # of hybrid or mixed images: at first, in the end
    residual: bool = True
    mix: str = ""                       # halves, mixup, cutmix or both
    change: str = ""                    # of all images of a batch: augment, elastic, deform
    deform: bool = True                 # hybrids move, and then real images
    morph: bool = True                  # and their sources are brought into register
    cut: bool | None = None             # hybrids cut, not mixed; None: those of colour


ARMS = {                                # the first ten have a colour of their own
    "real": Arm(),
    "mixup": Arm(mix="halves"),
    "real+hybrid": Arm("between"),
    "augment": Arm(change="augment"),
    "deform": Arm(change="deform"),
    "elastic": Arm(change="elastic"),
    "deform+mixup": Arm(mix="mixup", change="deform"),
    "undeformed hybrid": Arm("between", deform=False),
    "mixup+cutmix": Arm(mix="both"),
    "augment+hybrid": Arm("between", change="augment", deform=False, cut=False),
    "augment+mixup": Arm(mix="mixup", change="augment"),
    "cutmix": Arm(mix="cutmix"),
    # The controls: where is a gain from?
    "hybrid only": Arm("between", share=(1.0, 1.0)),
    "prior hybrid": Arm("prior", "density", deform=False),      # the idea as first stated
    "cross-faded hybrid": Arm("between", morph=False),
    "deformed images": Arm("images"),   # hybrids of one image each
    "weight labels": Arm("between", "weight"),
    "density labels": Arm("between", "density"),
    "no residual": Arm("between", residual=False),
    "reconstructions": Arm("around", "weight", residual=False, deform=False),
    # With --unlabelled, images under the labels that were spread to them.
    "pseudo-labels": Arm("images", deform=False),
    "augment+pseudo": Arm("images", change="augment", deform=False),
    "latent posterior": Arm("posterior"),               # no CNN at all
}
STEPS = {100: 300, 300: 400, 1000: 800, 3000: 1600}     # of the CNN, up to so many real images
BATCH = 64
POOL = 50_000                           # most hybrids of a cell
CODES = 20_000                          # most codes that a density is made of
# What a row says of a classifier, and the highest value that each can have.
SCORES = {"accuracy": 1, "balanced_accuracy": 1, "nll": 28, "brier": 2.01, "ece": 1.01,
          "temperature": 16, "scaled_nll": 28, "scaled_ece": 1.01, "noise": 1, "blur": 1,
          "shift": 1}
# What a folder may hold when all steps have run, in their order.
PICTURES = ("vae.png latent.png review.png hybrids.png cnn.png compare.png "
            "summary.png").split()
AVERAGED = ("nll", "ece", "scaled_nll", "scaled_ece", "noise", "blur", "shift")


# ---- training one cell ----------------------------------------------------------------------

def generator_for(images, seed):
    return torch.Generator(images.device).manual_seed(seed)


def train_vae(images, seed, recipe):
    """A VAE of uint8 images (n,C,H,W), and nothing else."""
    torch.manual_seed(seed)
    model = vae.VAE(*images.shape[1:], latent_dim=recipe["latent_dim"]).to(images.device)
    for _ in vae.fit(model, vae.batches(images, BATCH), steps=recipe["vae_steps"], rounds=1,
                     amp=recipe["amp"], generator=generator_for(images, seed)):
        pass
    return model.eval()


class Source(NamedTuple):
    """What the hybrids of a unit are made of."""
    images: torch.Tensor                # uint8 (N,C,H,W)
    codes: latent.Codes                 # of these images
    model: vae.VAE
    amp: bool

    def classify(self, images):
        """Logits (M,K) of uint8 images by the latent posterior alone."""
        codes = vae.encode_all(self.model, images, self.amp)
        return self.codes.posterior(*codes).clamp(min=1e-9).log()

    def beyond(self, n, classes):
        """The images after the first n, and their labels one-hot; None if there are none."""
        if len(self.images) == n:
            return None
        return self.images[n:], F.one_hot(self.codes.y[n:], classes).float()

    def pool(self, arm, count, deform, seed):
        """Hybrids of an arm: uint8 (count,C,H,W) and their probabilities (count,K)."""
        colour = self.images.shape[1] == 3              # its hybrids are cut
        morph, lines = hybrids.registration(vae.Morph, deform if arm.morph else None, colour)
        generator = generator_for(self.codes.mu, seed)
        if arm.strategy == "images":
            points = hybrids.sample("around", count, self.codes, generator)
            points = hybrids.line(self.codes.mu, points.i, points.i, points.t)
        else:
            points = hybrids.sample(arm.strategy, count, self.codes, generator, lines=lines)
        decode = functools.partial(vae.decode_all, self.model, amp=self.amp)
        return hybrids.make(points, self.codes, self.images, decode, rule=arm.label,
                            residual=arm.residual, cut=arm.cut, morph=morph, deform=deform,
                            generator=generator)


def source_of_all(images, y, classes, recipe, model, unlabelled, deform) -> Source:
    """Codes of n images and of unlabelled ones, which get their labels from the n."""
    images = torch.cat([images, unlabelled])
    mu, _ = vae.encode_all(model, images, recipe["amp"])
    distances = functools.partial(deform.distances, images)
    labels = latent.spread_labels(mu, y, classes, distances, deform.strength)
    known = labels >= 0                 # without a label an image is of no use
    return source_of(images[known], labels[known], classes, model, recipe["amp"])


def source_of(images, y, classes, model, amp) -> Source:
    mu, logvar = vae.encode_all(model, images, amp)
    some = latent.subsample(len(mu), CODES).to(mu.device)
    posterior = latent.teach(mu[some], logvar[some], y[some], classes)
    return Source(images, latent.Codes(mu, logvar, y, posterior), model, amp)


def mixing(name):
    """The mixing that an arm names: (x, q, generator) -> (x, q), or None."""
    if name == "halves":
        return cnn.mixup
    if name == "mixup":                 # of augmented images halves are no better
        return functools.partial(cnn.mixup, alpha=4.0)
    if name == "cutmix":
        return cnn.cutmix
    if name == "both":
        return in_turn(cnn.mixup, cnn.cutmix)
    return None


def in_turn(*transforms):
    """One of the transforms a batch, one after the other."""
    turns = itertools.cycle(transforms)

    def transform(x, q, generator):
        return next(turns)(x, q, generator)

    return transform


def changes(name, deform):
    """Transforms of all images of a batch, by the name that an arm has for them."""
    if name == "augment":
        return [cnn.augment]
    if name == "elastic":
        return [cnn.elastic]
    if name == "deform":
        return [deform]
    return []


def train_cnn(arm, images, y, classes, made, spread, deform, seed, recipe):
    """The CNN of one arm on n real images, on hybrids `made` and on images under labels that
    were `spread` to them: images and probabilities, or None.
    """
    generator = generator_for(images, seed)
    real = (images, F.one_hot(y, classes).float())
    move = None
    if arm.strategy and deform and deform.moves():
        move = cnn.moving(deform.repertoire(hybrids.FLOWS, generator))
    next_batch = cnn.batches(real, BATCH, made, mixing(arm.mix), arm.share,
                             changes(arm.change, deform), move, spread)
    torch.manual_seed(seed)             # the same initial weights for every arm
    model = cnn.CNN(images.shape[1], classes, recipe["width"], max(images.shape[2:]))
    model = model.to(images.device)
    for _ in cnn.fit(model, next_batch, steps=recipe["steps"], rounds=1, amp=recipe["amp"],
                     weight_decay=recipe["weight_decay"], generator=generator):
        pass
    return model


def corrupt(images, seed=0):
    """Named harder copies of uint8 images: noise of 0.15, a 3x3 blur, a shift by 2 pixels."""
    x = images.float() / 255
    noise = torch.randn(x.shape, device=x.device, generator=generator_for(images, seed))
    copies = {"noise": x + 0.15 * noise,
              "blur": F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1),
              "shift": F.pad(x, (2, 0, 2, 0), mode="replicate")[..., :-2, :-2]}
    for name, copy in copies.items():
        copies[name] = (copy.clamp(0, 1) * 255).round().byte()
    return copies


def evaluate(logits_of, images, y, validation, validation_y) -> dict:
    """Scores on images: plain, after one temperature fitted on others, and made harder."""
    logits = logits_of(images)
    validation_logits = logits_of(validation)

    def nll(temperature):
        return F.cross_entropy(validation_logits / temperature, validation_y).item()

    temperature = min(torch.logspace(-2, 4, 61, base=2).tolist(), key=nll)
    scaled = common.scores((logits / temperature).softmax(1), y)
    result = {**common.scores(logits.softmax(1), y), "temperature": temperature,
              "scaled_nll": scaled["nll"], "scaled_ece": scaled["ece"]}
    some = latent.subsample(len(y), 2000)
    for name, harder in corrupt(images[some]).items():
        right = logits_of(harder).argmax(1) == y[some]
        result[name] = right.float().mean().item()
    return result


# ---- the grid: units, cells and the processes that work on them -----------------------------

class Grid(NamedTuple):
    """What is compared: these arms on these subsets, by the recipe of each size."""
    data: common.Dataset
    pool: torch.Tensor                  # rows that subsets are drawn from
    validation: torch.Tensor
    arms: list
    seeds: range
    recipes: dict                       # n -> settings that a cell depends on
    folder: Path                        # of the cells

    def recipe(self) -> dict:
        """Of any size: what sizes have in common."""
        return next(iter(self.recipes.values()))

    def units(self):
        """The largest first: at the end of a grid no core waits long for another."""
        return list(itertools.product(sorted(self.recipes, reverse=True), self.seeds))

    def cell(self, n, seed, arm) -> Path:
        """The file of a cell; other settings have another name."""
        settings = json.dumps([ARMS[arm], self.recipes[n]], sort_keys=True)
        mark = common.fingerprint(settings.encode())
        return self.folder / f"{n}-{seed}-{arm.replace(' ', '_')}-{mark}.json"

    def finished(self, n, seed, arm):
        """The row of a cell, or None."""
        return read_cell(self.cell(n, seed, arm), n, seed, arm)

    def missing(self, unit) -> list:
        """The arms of a unit that have no cell yet."""
        return [arm for arm in self.arms if self.finished(*unit, arm) is None]

    def rows(self) -> list:
        """The finished cells, by size, subset and arm."""
        rows = []
        for cell in itertools.product(sorted(self.recipes), self.seeds, self.arms):
            row = self.finished(*cell)
            if row is not None:
                rows.append(row)
        return rows


def mark_of(row: dict) -> str:
    """By which a cell knows that its row is as it was written."""
    return common.fingerprint(json.dumps(row).encode())


def read_cell(file: Path, n: int, seed: int, arm: str):
    """The row of a cell; None where there is none, or it is not what was written."""
    try:
        common.require_regular(file)
        row, mark = json.loads(file.read_text())
        asked = {"n": n, "seed": seed, "arm": arm, "sources": int(row["sources"])}
        fits = (mark == mark_of(row) and row == {**row, **asked}
                and [*row] == [*asked, *SCORES]
                and all(0 <= row[key] <= SCORES[key] for key in SCORES))
    except Exception:                   # there are many ways to be no cell
        return None
    return row if fits else None


def write_cell(file: Path, row: dict):
    common.write(file, [row, mark_of(row)])


class Unit:
    """One subset of one size: its images, those that score it, its hybrids' sources."""

    def __init__(self, grid: Grid, n: int, seed: int, shared=None):
        data = grid.data
        self.seed = seed
        self.classes = len(data.classes)
        self.recipe = grid.recipes[n]
        self.shared = shared            # of all units: the model and images of --unlabelled
        self.images, self.y = rows_of(data, common.subset(data, grid.pool, n, seed))
        # Temperatures are fitted on some validation images; the others may be the judges.
        count = min(1000, (len(grid.validation) + 1) // 2)
        some = grid.validation[latent.subsample(len(grid.validation), count)]
        self.fitting = rows_of(data, some)
        self.scored = (data.test_images, data.test_labels)
        if self.recipe["score"] == "validation":
            self.scored = rows_of(data, grid.validation[~torch.isin(grid.validation, some)])

    @functools.cached_property
    def deform(self):
        """The deformations of the n images."""
        generator = generator_for(self.images, self.seed)
        return vae.Deformations.fit(self.images, self.y, generator)

    @functools.cached_property
    def source(self) -> Source:
        """Made when it is first asked for; the arms share it."""
        labelled = (self.images, self.y, self.classes)
        if self.shared:
            return source_of_all(*labelled, self.recipe, *self.shared, self.deform)
        model = train_vae(self.images, self.seed, self.recipe)
        return source_of(*labelled, model, self.recipe["amp"])

    def row(self, name: str) -> dict:
        """Train an arm and score it."""
        arm = ARMS[name]
        sources = len(self.y)
        if arm.strategy:
            sources = len(self.source.images)           # with those that got a label
        if arm.strategy == "posterior":
            logits_of = self.source.classify
        else:
            model = self.train(arm)
            logits_of = functools.partial(cnn.predict, model, amp=self.recipe["amp"])
        return {"n": len(self.y), "seed": self.seed, "arm": name, "sources": sources,
                **evaluate(logits_of, *self.scored, *self.fitting)}

    def train(self, arm: Arm):
        """The CNN of an arm."""
        made = None
        spread = None
        deform = None                   # fitted where it is needed
        if arm.change == "deform" or (arm.strategy and arm.deform):
            deform = self.deform
        if arm.strategy:
            count = min(POOL, BATCH * self.recipe["steps"])
            made = self.source.pool(arm, count, deform, self.seed)
            spread = self.source.beyond(len(self.y), self.classes)
        return train_cnn(arm, self.images, self.y, self.classes, made, spread, deform,
                         self.seed, self.recipe)


def rows_of(data, rows):
    """Images and labels of some rows."""
    rows = rows.to(data.images.device)
    return data.images[rows], data.labels[rows]


def run_unit(unit, grid: Grid, shared=None):
    """Train and score the missing arms of a unit, a file each -> the unit, its failures."""
    work = Unit(grid, *unit, shared)
    failed = []
    for arm in grid.missing(unit):
        try:
            write_cell(grid.cell(*unit, arm), work.row(arm))
        except (ArithmeticError, RuntimeError, ValueError, common.Mistake) as error:
            reason = str(error) or repr(error)          # the other arms, and the grid, go on
            failed.append(f"{arm}: {reason.splitlines()[0]}")
    return unit, "; ".join(failed)


def start_worker(threads):
    """A process of the grid: so many threads, and no life after its parent's."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the parent
    parent = torch.multiprocessing.parent_process()

    def follow():
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_grid(units, work, jobs, threads, progress):
    """work((n, seed)) -> unit, its failures, for all units -> the failures there were."""
    failed = []
    pool = None
    if jobs <= 1:
        results = map(work, units)
    else:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is for the parent
        pool = ProcessPoolExecutor(jobs, torch.multiprocessing.get_context("spawn"),
                                   start_worker, [threads])
        futures = [pool.submit(work, unit) for unit in units]
        signal.signal(signal.SIGINT, before)
        results = (future.result() for future in as_completed(futures))
    try:
        for done, ((n, seed), reason) in enumerate(results, 1):
            name = f"n={n} subset {seed}"
            if reason:
                failed.append(f"{name}: {reason}")
            progress(done, reason or name)
    except RuntimeError as error:       # a process killed, or no shared memory
        raise common.Mistake(f"{error}; run the same command again, with --jobs 1") from None
    finally:
        if pool:
            for process in list(pool._processes.values()):
                process.terminate()
    return failed


# ---- statistics -----------------------------------------------------------------------------

def t_quantile(df: int, p=0.975) -> float:
    """Of Student's t: with t = sqrt(df) tan(a), the density of a is cos(a)^(df-1)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    mass = np.cumsum(np.maximum(np.cos(angle), 0) ** (df - 1))
    return math.sqrt(df) * math.tan(np.interp(p * mass[-1], mass, angle))


def interval(values):
    """Mean and half-width of its 95% t interval; None for the width of a single value."""
    count = len(values)
    mean = float(np.mean(values))
    if count == 1:
        return mean, None
    half = t_quantile(count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return mean, float(half)


def sign_flip_p(differences):
    """Two-sided exact p of a mean difference: all 2^S signs; None but for 6 to 16 pairs."""
    if not 6 <= len(differences) <= 16:
        return None
    signs = list(itertools.product((-1, 1), repeat=len(differences)))
    sums = np.abs(np.array(signs) @ differences)
    # Rounding must not take the signs as they are out of the count.
    least = abs(sum(differences)) - 1e-12
    return float(np.mean(sums >= least))


def holm(ps):
    """Holm's step-down correction of p values, in their own order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = list(ps)                # to be replaced, the smallest first
    worst = 0.0
    order = sorted(range(len(ps)), key=ps.__getitem__)
    for rank, k in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[k]))
        corrected[k] = worst
    return corrected


def summarise(rows, pool=math.inf, base="real"):
    """One entry per size and arm: mean, interval, paired difference to `base`, in points.

    Where n is over half of the `pool`, subsets are nearly the same images: no interval, no p.
    """
    table = []
    baseline = {(row["n"], row["seed"]): row for row in rows if row["arm"] == base}
    for n in sorted({row["n"] for row in rows}):
        for arm in ARMS:
            cells = [row for row in rows if row["n"] == n and row["arm"] == arm]
            if cells:
                table.append(summary_entry(n, arm, cells, baseline, hollow=2 * n > pool))
    tested = [entry for entry in table if entry.get("p") is not None]
    for entry, p in zip(tested, holm([entry["p"] for entry in tested])):
        entry["p_holm"] = p
    return table


def summary_entry(n, arm, cells, baseline, hollow):
    """What the rows of one size and arm say together."""
    entry = {"n": n, "arm": arm, "subsets": len(cells), "hollow": hollow}
    accuracies = []
    gains = []
    for row in cells:
        accuracies.append(100 * row["accuracy"])
        pair = baseline.get((n, row["seed"]))
        if pair is not None and pair["arm"] != arm:
            gains.append(accuracies[-1] - 100 * pair["accuracy"])
    for what, numbers in (("accuracy", accuracies), ("gain", gains)):
        if numbers:
            entry[what], half = interval(numbers)
            entry[f"{what}_half"] = None if hollow else half
    if gains:
        entry["p"] = None if hollow else sign_flip_p(gains)
    for key in AVERAGED:
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
    parser = common.flags("compare.py", __doc__)
    add = parser.add_argument_group("the grid").add_argument
    add("--sizes", type=common.number(int, 2), nargs="+", default=[100, 300], metavar="N",
        help="numbers of real training images")
    add("--seeds", type=common.number(int, 1), default=5,
        help="number of subsets of each size; each is a seed, from --seed on")
    add("--arms", nargs="+", choices=list(ARMS), default=["real", "mixup", "real+hybrid"],
        metavar="ARM", help="what is compared, of: " + ", ".join(ARMS))
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
    add("--weight-decay", type=common.number(float, 0, 10), default=0.05,
        help="weight decay of every CNN")
    add("--vae-steps", type=common.number(int, 1),
        help="optimiser steps of a VAE; if not given, 600, or 3000 with --unlabelled")
    add("--latent-dim", type=common.number(int, 1, 512), default=16, help="latent size D")
    add("--jobs", type=common.number(int, 1),
        help="number of processes; if not given, one per core; on a GPU at most four, which "
        "share it: give 1 where it serves one process only")
    add("--gather", action="store_true",
        help="train nothing; make the result of the cells that are finished")
    return parser.parse_args(argv)


def cnn_steps(n: int, channels: int) -> int:
    """Optimiser steps of a CNN on n real images, twice as many in colour."""
    steps = 2400
    for size in reversed(STEPS):
        if n <= size:
            steps = STEPS[size]
    return 2 * steps if channels == 3 else steps


def plan(run, args) -> Grid:
    """The data set, the sizes that it has images for, and the settings of each."""
    upstream = None
    if not args.dataset and (run.out / "vae.pt").exists():
        upstream = common.load(run, "vae")
    data = common.load_dataset(run, upstream)
    pool, validation = common.split(data)
    sizes = sorted({n for n in args.sizes if n <= len(pool)})
    common.require(sizes, f"{min(args.sizes)} images asked for; there are {len(pool)} to "
                   "train on")
    if max(args.sizes) > len(pool):
        print(f"sizes above the {len(pool)} images there are left out", file=sys.stderr)
    common.say_if_few(sizes[0], data)
    unlabelled = args.unlabelled
    if unlabelled is None:
        unlabelled = len(data.unlabelled) > 0
    vae_steps = 600
    if unlabelled:                      # many images take more steps than few do
        vae_steps = 3000
    recipes = {}
    for n in sizes:
        seen = n
        if unlabelled:
            seen = max(n, 1000)
        recipes[n] = {
            "format": common.FORMAT, "data": data.facts()["fingerprint"], "amp": run.amp,
            "score": args.score, "unlabelled": unlabelled, "latent_dim": args.latent_dim,
            "vae_steps": args.vae_steps or vae_steps, "width": args.width,
            "weight_decay": args.weight_decay,
            "steps": args.steps or cnn_steps(seen, data.images.shape[1])}
    folder = run.out / "cells"
    folder.mkdir(exist_ok=True)
    arms = [arm for arm in ARMS if arm in args.arms]    # one order, whatever was typed
    seeds = range(args.seed, args.seed + args.seeds)
    return Grid(data, pool, validation, arms, seeds, recipes, folder)


def train_missing(run, args, grid: Grid) -> list:
    """Train the cells that are not there yet -> the reasons of failures."""
    # Under torchrun each rank takes every so-manieth unit; ranks never wait for each other.
    units = grid.units()[common.RANK::common.RANKS]
    units = [unit for unit in units if grid.missing(unit)]
    threads = args.threads or 1
    torch.set_num_threads(threads)      # everywhere: jobs must not change a result
    jobs = args.jobs
    if jobs is None:
        jobs = max(run.cores // threads, 1)
        if run.device.type == "cuda":   # one process keeps it busy for a part of the time
            jobs = min(jobs, 4)
        if run.device.type == "mps":
            jobs = 1
    shared = None
    recipe = grid.recipe()
    if recipe["unlabelled"] and units:
        images = torch.cat([grid.data.images[grid.pool.to(run.device)], grid.data.unlabelled])
        model = train_vae(images, 0, recipe)
        shared = (model, images[latent.subsample(len(images), latent.SPREAD)])
    work = functools.partial(run_unit, grid=grid, shared=shared)
    progress = common.Progress(len(units), "subsets", args.quiet)
    return run_grid(units, work, min(jobs, len(units)), threads, progress)


def curves(left, right, table, rows, grid: Grid):
    """Accuracy versus n, and the paired gain over `real`, on two axes."""
    seen = {entry["arm"] for entry in table}
    arms = [arm for arm in ARMS if arm in seen]
    for k, arm in enumerate(arms):
        side = 1 + 0.03 * (k - (len(arms) - 1) / 2)    # side by side, not on top of each other
        dots = [row for row in rows if row["arm"] == arm]
        left.scatter(side * column(dots, "n"), 100 * column(dots, "accuracy"), s=9, alpha=0.5,
                     color=arm_look(arm)["color"], linewidths=0)
        entries = [entry for entry in table if entry["arm"] == arm]
        draw_arm(left, arm, entries, "accuracy", side)
        draw_arm(right, arm, entries, "gain", side)
    right.axhline(0, color="black", lw=0.8)
    recipe = grid.recipe()
    all_seen = recipe["unlabelled"]
    images = "labelled images" if all_seen else "real images"
    name, = common.legible([grid.data.name])
    common.tidy(left, f"How accurate? ({name})", images,
                f"{recipe['score']} accuracy, %")
    common.tidy(right, "How much better than real images alone?", images,
                "paired difference, points")
    sizes = np.unique(column(table, "n"))
    for axes in (left, right):
        axes.set_xscale("log", subs=[])
        axes.set(xticks=sizes, xticklabels=sizes, xlim=(sizes[0] / 1.5, sizes[-1] * 1.5))
    left.set_ylim(*np.clip(left.get_ylim(), 0, 100))    # no bar goes beyond
    left.legend(frameon=False, fontsize=9, loc="lower right")
    left.figure.supxlabel(caption(table, all_seen), fontsize=8, color="0.35")


def arm_look(arm) -> dict:
    """One look per arm, whichever are compared."""
    place = list(ARMS).index(arm)
    again = place // 10                 # how often its colour was used before
    look = dict(color=common.COLOURS[place % 10],
                marker=common.MARKERS[(place + 3 * again) % 10],
                ls=("-", "--", ":", "-.")[(place + again) % 4], lw=1.3)
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


def caption(table, all_seen) -> str:
    """What dots, bars and hollow marks are."""
    counts = np.unique(column(table, "subsets"))
    subsets = " to ".join(str(count) for count in counts[[0, -1]])
    if len(counts) == 1:
        subsets = str(counts[0])
    parts = [f"{subsets} subsets, each a dot", "bars: 95% t intervals"]
    if column(table, "hollow").any():
        parts.append("hollow: over half of the pool, no interval")
    if all_seen:
        parts.append("the VAE saw all images")
    return "; ".join(parts)


def summary(run, table, rows, grid: Grid):
    """The run on one sheet: map, hybrids, curves; None where the chain has not run."""
    facts = grid.data.facts()
    try:
        codes = common.load(run, "latent", restore=latent.best_calibrated)
        made = common.load(run, "hybrids", like=codes)
    except common.Mistake:
        return None
    if codes["dataset"]["fingerprint"] != facts["fingerprint"]:
        return None                     # of other images
    sheet = common.figure(16, 11)
    top, bottom = sheet.subfigures(2, 1, height_ratios=[1.15, 1])
    left, right = top.subfigures(1, 2, width_ratios=[1, 1.25])
    sheet.suptitle("Do hybrid images help?  " + "\n".join(answers(table)), fontsize=12,
                   fontweight="bold")
    classes = common.legible(facts["classes"])
    hybrids.gallery(right, made["images"], made["q"], classes, 3, 6)
    curves(*bottom.subplots(1, 2), table, rows, grid)
    latent.draw_map(left.subplots(), codes["mu"], codes["labels"], classes,
                    latent.best_calibrated(codes),
                    torch.Generator().manual_seed(run.seed), given=codes.get("given"))
    return sheet


def report(table):
    """The closing table."""
    print(f"{'n':>6}  {'arm':22}{'accuracy, %':>14}{'NLL':>8}{'ECE':>7}{'gain over real':>16}")
    for entry in table:
        accuracy = plus_minus(entry, "accuracy")
        line = f"{entry['n']:6,}  {entry['arm']:22}{accuracy:>14}"
        line += f"{entry['nll']:8.3f}{entry['ece']:7.3f}"
        if "gain" in entry:
            gain = plus_minus(entry, "gain", "+")
            line += f"{gain:>16}  {verdict(entry['gain'], entry['gain_half'])}"
        print(line)


def hybrids_against(rows, pool) -> dict:
    """The gains of hybrid arms over each arm without them, by the name of that one."""
    against = {}
    for base in ARMS:
        if "hybrid" in base:
            continue
        against[base] = []
        for entry in summarise(rows, pool, base):
            if "gain" in entry and "hybrid" in entry["arm"]:
                against[base].append(entry)
    return against


def publish(run, grid: Grid, failed):
    """Tables and pictures of the finished cells."""
    rows = grid.rows()
    for reason in failed:
        print(f"failed: {reason}", file=sys.stderr)
    common.require(rows, "there is no finished cell")
    table = summarise(rows, len(grid.pool))
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
        "rows": rows, "hybrids_against": hybrids_against(rows, len(grid.pool)),
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__}})

    report(table)
    print(run.out / "compare.csv", run.out / "compare.json", sep="\n")
    pictures = [name for name in PICTURES if (run.out / name).exists()]
    print(f"pictures in {run.out}:", *pictures)
    print(*answers(table), sep="\n")
    if failed:
        os.utime(run.out / "compare.json", (0, 0))      # so old that make begins it again
    common.require(not failed, f"{len(failed)} subsets are incomplete; run it again")


def command(run, args):
    grid = plan(run, args)
    if args.gather:
        failed = []
        for n, seed in grid.units():
            if grid.missing((n, seed)):
                failed.append(f"n={n} subset {seed}: not finished")
    else:
        failed = train_missing(run, args, grid)
    common.drop_checkpoint(run, "cnn")
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
