"""Compare classifiers fairly: accuracy versus number of real images, many arms, many subsets.

    python compare.py                                  # runs/glyphs: 2 sizes x 5 subsets x 3 arms
    python compare.py -o runs/mnist --sizes 100 1000 --seeds 10 --arms real mixup real+hybrid

Every arm of one size and subset has the same images, initial weights and number of steps; the VAE
sees no others, unless told to. The last step's score counts; none is picked.

Reads:  a data set (the one of vae.pt, if --dataset is not given); latent.pt, hybrids.pt to show.
Writes: compare.json compare.csv compare.png, summary.png, and cells/, from which a grid goes on.
"""
import functools
import itertools
import json
import math
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import cnn
import common
import hybrids
import latent
import vae

# Letters: n real images, S subsets (seeds), an arm is one way to train the CNN.
class Arm(NamedTuple):
    """How the CNN of an arm is trained; without a strategy it sees no hybrids."""
    strategy: str = ""
    label: str = "product"
    share: tuple = (1.0, 0.0)           # of hybrid or mixed images: at first, in the end
    residual: bool = True
    mix: str = ""                       # halves, mixup, cutmix or both
    augment: bool = False
    pixels: float = 0.5                 # part of the hybrids mixed without the decoder
    cut: bool | None = None             # hybrids cut, not mixed; without it those of colour

ARMS = {
    "real": Arm(), "augment": Arm(augment=True),
    "mixup": Arm(mix="halves"), "cutmix": Arm(mix="cutmix"),
    "real+hybrid": Arm("between"),
    "hybrid only": Arm("between", share=(1.0, 1.0)),
    "prior hybrid": Arm("prior", "density"),            # the idea as first stated
    "augment+mixup": Arm(mix="mixup", augment=True),
    "augment+hybrid": Arm("between", augment=True, cut=False),
    "weight labels": Arm("between", "weight"),          # the controls: where is a gain from?
    "density labels": Arm("between", "density"),
    "no residual": Arm("between", residual=False),
    "all decoded": Arm("between", pixels=0.0), "mixup+cutmix": Arm(mix="both"),
    "never cut": Arm("between", cut=False), "always cut": Arm("between", cut=True),
    "mixup density labels": Arm("between", "density", pixels=1.0),  # the same pairs, undecoded
    "reconstructions": Arm("around", "weight", residual=False),
    "pseudo-labels": Arm("around", "weight", pixels=1.0),   # images as such: --vae-data all
    "latent posterior": Arm("posterior"),               # no CNN at all
}
STEPS = {100: 300, 300: 400, 1000: 800, 3000: 1600}     # of the CNN, up to so many real images
BATCH, POOL, UNLABELLED = 64, 50_000, 20_000    # a batch; at most: hybrids, labels spread
AVERAGED = ("nll", "ece", "scaled_nll", "scaled_ece", "noise", "blur", "shift")
VIEWS = 9                               # augmented ones of a grey image, for augment+hybrid's VAE
generator = lambda images, seed: torch.Generator(images.device).manual_seed(seed)

def train_vae(images, seed, recipe):
    """A VAE of uint8 images (n,C,H,W), and nothing else."""
    torch.manual_seed(seed)
    model = vae.VAE(*images.shape[1:], latent_dim=recipe["latent_dim"])
    model = model.to(images.device, memory_format=torch.channels_last)
    for _ in vae.fit(model, vae.batches(images, BATCH), steps=recipe["vae_steps"], rounds=1,
                     amp=recipe["amp"], generator=generator(images, seed)):
        pass
    return model.eval()

class Source:
    """The hybrids of one cell: a VAE of its images, their codes, the posterior of its classes."""
    def __init__(self, images, y, classes, seed, recipe, views=0, model=None, unlabelled=()):
        self.seed, self.count, amp = seed, min(POOL, BATCH * recipe["steps"]), recipe["amp"]
        g, x = generator(images, seed), images.float() / 255
        seen = [(cnn.augment(x, None, g)[0] * 255).round().byte() for _ in range(views)]
        self.images = torch.cat([images, *seen, *unlabelled])
        model = model or train_vae(self.images, seed, recipe)
        self.decode = lambda z: vae.decode_all(model, z, amp)
        mu, logvar = vae.encode_all(model, self.images, amp)
        found = latent.spread_labels(mu, y, classes) if unlabelled else y.repeat(1 + views)
        self.images, self.y, self.mu, self.logvar = (
            v[found >= 0] for v in (self.images, found, mu, logvar))
        posterior = self.posterior = latent.teach(self.mu, self.logvar, self.y, classes)
        self.classify = lambda x: posterior(*vae.encode_all(model, x, amp))

    def pool(self, arm):
        """Images uint8 (count,C,H,W) and their probabilities (count,K)."""
        g = generator(self.mu, self.seed)
        points = hybrids.sample(arm.strategy, self.count, self.mu, self.logvar, self.y,
                                self.posterior, g)
        x = hybrids.render(points, self.decode, self.mu, self.images, arm.residual, arm.pixels,
                           arm.cut, g)
        return x, hybrids.label(arm.label, points, self.y, self.posterior, g)

def train_cnn(arm, images, y, classes, source, seed, recipe):
    """The CNN of one arm on n real images, and on hybrids of source(whether from views)."""
    real, augment = (images, F.one_hot(y, classes).float()), [cnn.augment] * arm.augment
    made = source(arm.augment).pool(arm) if arm.strategy else None
    turns = itertools.cycle([cnn.mixup, cnn.cutmix])
    mix = {"halves": cnn.mixup, "cutmix": cnn.cutmix, "both": lambda *batch: next(turns)(*batch),
           "mixup": functools.partial(cnn.mixup, alpha=4.0)}.get(arm.mix)   # of augmented images
    torch.manual_seed(seed)                             # the same initial weights for every arm
    model = cnn.CNN(images.shape[1], classes, recipe["width"], max(images.shape[2:]))
    model = model.to(images.device, memory_format=torch.channels_last)
    for _ in cnn.fit(model, cnn.batches(real, BATCH, made, mix, arm.share, augment),
                     steps=recipe["steps"], weight_decay=recipe["weight_decay"], rounds=1,
                     amp=recipe["amp"], generator=generator(images, seed)):
        pass
    return model

def cell(folder, n, seed, arm, recipe):
    """-> the file of a cell, its row; None where that is absent, or a bit of it has changed."""
    mark = common.fingerprint(json.dumps([ARMS[arm], recipe], sort_keys=True).encode())
    file = folder / f"{n}-{seed}-{arm.replace(' ', '_')}-{mark}.json"
    try:
        row, check = json.loads(file.read_text())
        return file, row if check == common.fingerprint(json.dumps(row).encode()) else None
    except (OSError, ValueError, TypeError):
        return file, None

def run_cells(unit, *, data, arms, recipes, folder, shared):
    """Train and score the missing arms of a unit (n, seed); each leaves one small file."""
    (n, seed), recipe, failed, classes = unit, recipes[unit[0]], [], len(data.classes)
    cells = [(arm, *cell(folder, n, seed, arm, recipe)) for arm in arms]
    pool, validation = common.split(data)
    take = lambda rows: [v[rows.to(v.device)] for v in (data.images, data.labels)]
    x, y = take(common.subset(data, pool, n, seed))
    some = latent.subsample(len(validation), min(1000, (len(validation) + 1) // 2))
    held, rest = take(validation[some]), validation[~torch.isin(validation, validation[some])]
    judged = (data.test_images, data.test_labels) if recipe["score"] == "test" else take(rest)
    make = functools.cache(lambda views: Source(x, y, classes, seed, recipe, views, **shared))
    source = lambda augment: make(VIEWS * (augment and x.shape[1] == 1 and not shared))
    for arm, file, _ in filter(lambda found: not found[2], cells):
        try:
            if ARMS[arm].strategy == "posterior":
                logits_of = lambda v: source(False).classify(v).clamp(min=1e-9).log()
            else:
                model = train_cnn(ARMS[arm], x, y, classes, source, seed, recipe)
                logits_of = lambda v: cnn.predict(model, v, recipe["amp"])
            mixed = len(source(ARMS[arm].augment).y) if ARMS[arm].strategy else n
            row = {"n": n, "seed": seed, "arm": arm, "sources": mixed,      # with spread labels
                   **cnn.judge(logits_of, *judged, *held)}
            common.write(file, [row, common.fingerprint(json.dumps(row).encode())])
        except (ArithmeticError, RuntimeError, ValueError, common.Mistake) as error:
            failed.append(f"{arm}: {str(error) or repr(error)}".splitlines()[0])
    return unit, "; ".join(failed)                      # the other arms, and the grid, go on

def start_worker(threads):
    """A process of the grid: so many threads, and no life after its parent's."""
    torch.set_num_threads(threads)
    parent = torch.multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def run_grid(units, work, jobs, threads, progress):
    """work((n, seed)) -> unit, reason of a failure, for all units; -> the reasons there were."""
    failed, pool = [], None
    if jobs > 1:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is the parent's business
        pool = ProcessPoolExecutor(jobs, torch.multiprocessing.get_context("spawn"),
                                   start_worker, [threads])
        futures = [pool.submit(work, unit) for unit in units]
        signal.signal(signal.SIGINT, before)
    try:
        results = (f.result() for f in as_completed(futures)) if pool else map(work, units)
        for done, ((n, seed), reason) in enumerate(results, 1):
            failed += [f"n={n} subset {seed}: {reason}"] if reason else []
            progress(done, reason or f"n={n} subset {seed}")
    except RuntimeError as error:                       # a process killed, or no shared memory
        raise common.Mistake(f"{error}; run the same command again, with --jobs 1") from None
    finally:
        for process in [*pool._processes.values()] if pool else []:
            process.terminate()
    return failed

def t_quantile(df: int, p=0.975) -> float:
    """Of Student's t: with t = sqrt(df) tan(a), the density of a is cos(a)^(df-1)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    mass = np.cumsum(np.maximum(np.cos(angle), 0) ** (df - 1))
    return math.sqrt(df) * math.tan(np.interp(p * mass[-1], mass, angle))

def interval(values):
    """Mean and half-width of its 95% t interval; None for the width of a single value."""
    mean, count = float(np.mean(values)), len(values)
    return mean, float(t_quantile(count - 1) * np.std(values, ddof=1) / math.sqrt(count)) \
        if count > 1 else None

def sign_flip_p(differences):
    """Two-sided exact p of a mean difference: all 2^S signs; None below 6 pairs or above 16."""
    if not 6 <= len(differences) <= 16:
        return None
    sums = np.array(list(itertools.product((-1, 1), repeat=len(differences)))) @ differences
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-12))

def holm(ps):
    """Holm's step-down correction of p values, in their own order.
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]"""
    worst, out = 0.0, [0.0] * len(ps)
    for rank, k in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        worst = out[k] = max(worst, min(1.0, (len(ps) - rank) * ps[k]))
    return out

def summarise(rows, pool=math.inf, base="real"):
    """One entry a size and arm: mean, interval, and the paired difference to `base`, in points.

    Where n is over half of the `pool`, subsets are nearly the same images: no interval, no p.
    """
    table, by = [], {(r["n"], r["seed"], r["arm"]): 100 * r["accuracy"] for r in rows}
    for n, arm in itertools.product(sorted({r["n"] for r in rows}), ARMS):
        own = [r for r in rows if (r["n"], r["arm"]) == (n, arm)]
        values = {"accuracy": [by[n, r["seed"], arm] for r in own],
                  "gain": [by[n, r["seed"], arm] - by[n, r["seed"], base] for r in own
                           if arm != base and (n, r["seed"], base) in by]}
        entry = {"n": n, "arm": arm, "subsets": len(own), "hollow": 2 * n > pool}
        for what, numbers in values.items():
            if numbers:
                entry[what], half = interval(numbers)
                entry[f"{what}_half"] = None if entry["hollow"] else half
        if values["gain"]:
            entry["p"] = None if entry["hollow"] else sign_flip_p(values["gain"])
        if own:
            table.append(entry | {key: float(np.mean([r[key] for r in own])) for key in AVERAGED})
    tested = [e for e in table if e.get("p") is not None]
    for entry, p in zip(tested, holm([e["p"] for e in tested])):
        entry["p_holm"] = p
    return table

def verdict(gain, half) -> str:
    sure = half is not None and abs(gain) > half
    return f"{'better' if gain > 0 else 'worse'} than real" if sure else "inconclusive"

def pm(mean, half, sign=""):
    return f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if half is not None else "")

def answers(table):
    """Did hybrids help, by how much, how sure: a sentence a size."""
    return [f"{e['n']:,} images: hybrids change accuracy by {pm(e['gain'], e['gain_half'], '+')} "
            f"points ({e['subsets']} subsets): {verdict(e['gain'], e['gain_half'])}"
            for e in table if e["arm"] == "real+hybrid" and "gain" in e]

def parse_args(argv=None):
    parser = common.flags("compare.py", __doc__)
    add = parser.add_argument_group("the grid").add_argument
    add("--sizes", type=common.number(int, 2), nargs="+", default=[100, 300], help="real images")
    add("--seeds", type=common.number(int, 1), default=5, help="how many subsets, each a seed")
    add("--arms", nargs="+", choices=list(ARMS), default=["real", "mixup", "real+hybrid"],
        metavar="ARM", help="of: " + ", ".join(ARMS))
    add("--score", choices=["test", "validation"], default="test", help="which images judge")
    add("--vae-data", choices=["subset", "all"], default="subset", help="the VAE sees the cell's n "
        "images, or all, and labels are spread to those without")
    add("--steps", type=common.number(int, 1), help="of every CNN; without it by size, 300 to 4800")
    add("--width", type=common.number(int, 1, 1024), default=32, help="of a CNN's first block")
    add("--weight-decay", type=common.number(float, 0, 10), default=0.05, help="of every CNN")
    add("--vae-steps", type=common.number(int, 1), help="of a VAE; else 600, 3000 if it sees all")
    add("--latent-dim", type=common.number(int, 1, 512), default=16, help="latent size")
    add("--jobs", type=common.number(int, 1), help="processes; else one a core, and one on a GPU")
    add("--gather", action="store_true", help="train nothing: make the result of finished cells")
    return parser.parse_args(argv)

def curves(left, right, table, rows, facts, args):
    """Accuracy versus n, and the paired gain over `real`, on two axes."""
    arms = [arm for arm in ARMS if any(e["arm"] == arm for e in table)]
    for k, arm in enumerate(arms):
        place = list(ARMS).index(arm)                   # one look an arm, whichever are compared
        colour, marker = vae.COLOURS[place % 10], vae.MARKERS[place % 10]
        look = dict(color=colour, marker=marker, ms=6, label=arm, capsize=3,
                    ls=("-", "--", ":", "-.")[place % 4], lw=2.5 if arm == "real+hybrid" else 1.3)
        own = [e for e in table if e["arm"] == arm]
        side = 1 + 0.03 * (k - (len(arms) - 1) / 2)     # side by side, not on top of each other
        dots = [(r["n"] * side, 100 * r["accuracy"]) for r in rows if r["arm"] == arm]
        left.scatter(*zip(*dots), s=9, color=colour, alpha=0.5, linewidths=0)
        for axes, what in ((left, "accuracy"), (right, "gain")):
            if there := [e for e in own if what in e]:
                axes.errorbar([e["n"] * side for e in there], [e[what] for e in there],
                              [e[f"{what}_half"] or 0 for e in there], **look)
                for e in filter(lambda e: e["hollow"], there):
                    axes.plot(e["n"] * side, e[what], marker, color=colour, mfc="white", zorder=5)
    right.axhline(0, color="black", lw=0.8)
    what = "labelled images" if args.vae_data == "all" else "real images"
    vae.tidy(left, f"How accurate? ({facts['name']})", what, f"{args.score} accuracy, %")
    vae.tidy(right, "How much better than real images alone?", what, "paired difference, points")
    sizes = sorted({e["n"] for e in table})
    for axes in (left, right):
        axes.set_xscale("log", subs=[])
        axes.set(xticks=sizes, xticklabels=sizes, xlim=(sizes[0] / 1.5, sizes[-1] * 1.5))
    left.set_ylim(*np.clip(left.get_ylim(), 0, 100))     # no bar goes beyond
    left.legend(frameon=False, fontsize=9, loc="lower right")
    left.figure.supxlabel("; ".join([
        f"{max(e['subsets'] for e in table)} subsets, each a dot", "bars: 95% t intervals",
        *["hollow: over half of the pool, no interval"] * any(e["hollow"] for e in table),
        *["the VAE saw all images"] * (args.vae_data == "all")]), fontsize=8, color="0.35")

def summary(table, rows, facts, args):
    """The run on one sheet: the map, the hybrids, the curves; None where the chain has not run."""
    try:
        codes, made = (common.load(args, kind) for kind in ("latent", "hybrids"))
        common.need(codes["dataset"]["fingerprint"] == facts["fingerprint"], "other images")
    except common.Mistake:
        return None
    sheet = vae.figure(16, 11)
    top, bottom = sheet.subfigures(2, 1, height_ratios=[1.15, 1])
    left, right = top.subfigures(1, 2, width_ratios=[1, 1.25])
    shown = latent.Aggregate(**codes["calibrated"]["aggregate"])
    latent.draw_map(left.subplots(), codes["mu"], codes["labels"], facts["classes"], shown,
                    torch.Generator().manual_seed(args.seed))
    hybrids.gallery(right, made["images"], made["q"], facts["classes"], 3, 6)
    curves(*bottom.subplots(1, 2), table, rows, facts, args)
    sheet.suptitle("Do hybrid images help?  " + "\n".join(answers(table)), fontsize=12,
                   fontweight="bold")
    return sheet

def report(table):
    """The closing table, and the answer in words."""
    print(f"{'n':>6}  {'arm':22}{'accuracy, %':>14}{'NLL':>8}{'ECE':>7}{'gain over real':>16}")
    for e in table:
        gain = (e["gain"], e["gain_half"]) if "gain" in e else None
        print(f"{e['n']:6,}  {e['arm']:22}{pm(e['accuracy'], e['accuracy_half']):>14}"
              f"{e['nll']:8.3f}{e['ece']:7.3f}"
              + (f"{pm(*gain, '+'):>16}  {verdict(*gain)}" if gain else ""))
    print(*answers(table), sep="\n")

def command(args):
    cores = torch.get_num_threads()     # or OMP_NUM_THREADS, which torchrun sets to 1
    device, amp = common.start(args)
    known = not args.dataset and (args.out / "vae.pt").exists()
    data = common.load_dataset(args, device, common.load(args, "vae") if known else None)
    pool, _ = common.split(data)
    sizes = sorted({n for n in args.sizes if n <= len(pool)})
    common.need(sizes, f"{min(args.sizes)} images asked for; there are {len(pool)} to train on")
    if max(args.sizes) > len(pool):
        print(f"sizes above the {len(pool)} images there are left out", file=sys.stderr)
    facts = data.facts(args)
    args.vae_steps = args.vae_steps or {"subset": 600, "all": 3000}[args.vae_data]
    recipe = {"format": common.FORMAT, "data": facts["fingerprint"], "amp": amp, **{
        key: vars(args)[key] for key in
        ("score", "vae_data", "latent_dim", "vae_steps", "width", "weight_decay")}}
    (folder := args.out / "cells").mkdir(exist_ok=True)
    arms = [arm for arm in ARMS if arm in args.arms]     # one order, whatever was typed
    seeds = range(args.seed, args.seed + args.seeds)
    recipes = {n: {**recipe, "steps": args.steps or (2 if facts["shape"][0] == 3 else 1) * next(
        (steps for size, steps in STEPS.items() if n <= size), 2400)} for n in sizes}
    def found(n, seed):
        return list(filter(None, (cell(folder, n, seed, arm, recipes[n])[1] for arm in arms)))
    # Under torchrun each rank takes every so-manieth unit; ranks never wait for each other.
    units = list(itertools.product(sizes[::-1], seeds))[common.RANK::common.RANKS]
    units = [unit for unit in units if len(found(*unit)) < len(arms)]
    failed = [f"n={n} subset {seed}: not finished" for n, seed in units if args.gather]
    units = [] if args.gather else units
    jobs = args.jobs or (cores // (args.threads or 1) if device.type == "cpu" else 1)
    torch.set_num_threads(args.threads or 1)    # everywhere: jobs must not change a result
    images = data.images[pool.to(device)] if args.vae_data == "all" and units else None
    shared = {} if images is None else {"model": train_vae(images, 0, recipe), "unlabelled": [
        images[latent.subsample(len(images), UNLABELLED)]]}
    work = functools.partial(run_cells, data=data, arms=arms, recipes=recipes, folder=folder,
                             shared=shared)
    failed += run_grid(units, work, min(jobs, len(units)), args.threads or 1,
                       vae.Progress(len(units), "subsets", args.quiet))
    if common.RANKS > 1:
        return print(f"rank {common.RANK} has finished; then: python compare.py with the same "
                     f"flags and --gather --{'' if amp else 'no-'}amp", *failed, sep="\n")
    rows = [row for n in sizes for seed in seeds for row in found(n, seed)]
    print(*(f"failed: {reason}\n" for reason in failed), sep="", end="", file=sys.stderr)
    common.need(rows, "there is no finished cell")
    table = summarise(rows, len(pool))
    common.write(args.out / "compare.csv", "".join(
        ",".join(map(str, line)) + "\n" for line in [rows[0], *(row.values() for row in rows)]))
    fig, sheet = vae.figure(13, 5.6), summary(table, rows, facts, args)
    curves(*fig.subplots(1, 2), table, rows, facts, args)
    pictures = {"summary.png": sheet, "compare.png": fig} if sheet else {"compare.png": fig}
    (args.out / "summary.png").unlink(missing_ok=True)
    for name, picture in pictures.items():
        common.write(args.out / name, picture)
    common.write(args.out / "compare.json", {
        "kind": "compare", "format": common.FORMAT, "dataset": facts, "recipes": recipes,
        "settings": common.settings(args), "failed": failed, "summary": table, "rows": rows,
        "hybrids_against": {base: [e for e in summarise(rows, len(pool), base) if "gain" in e and
                                   "hybrid" in e["arm"]] for base in ARMS if "hybrid" not in base},
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__}})
    report(table)
    print(*(args.out / name for name in [*pictures, "compare.csv", "compare.json"]), sep="\n")
    common.need(not failed, f"{len(failed)} subsets are incomplete; run it again")

def main(argv=None) -> int:
    return common.guard(command, parse_args(argv))

if __name__ == "__main__":
    raise SystemExit(main())
