"""Write every table of the pages from the result files beside this one.

    python assets/evidence.py                # rewrite the tables of the pages in place
    python assets/evidence.py --check        # write nothing; exit code 1 names what differs
    python assets/evidence.py --draw         # accuracy versus number of images, too

Reads:  assets/*.json.
Writes: README.md assets/METHOD.md assets/EVIDENCE.md, between `<!-- table NAME -->` and
        `<!-- end -->` and nowhere else; with --draw assets/<data set>.png.
"""
import argparse
import functools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ASSETS = Path(__file__).resolve().parent
ROOT = ASSETS.parent
sys.path.insert(0, str(ROOT))           # compare.py stands one folder up

import common
import compare

PAGES = ("README.md", "assets/METHOD.md", "assets/EVIDENCE.md")
BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.S)
TABLES = {}                             # name -> the function that writes this table

# Every set with its sizes.
SETS = [
    ("MNIST", "mnist", (50, 100, 300, 1000)),
    ("Fashion-MNIST", "fashion-mnist", (50, 100, 300, 1000)),
    ("CIFAR-10", "cifar10", (50, 100, 300, 1000)),
    ("glyphs", "glyphs", (50, 100, 300)),
    ("8x8 digits", "digits", (50, 100, 300)),
]
EVERY = tuple(name for name, _, _ in SETS)
GREY = ("MNIST", "Fashion-MNIST", "glyphs", "8x8 digits")


class Row(NamedTuple):
    """One line of a table: the set by name, the stem of its result file, n real images."""
    name: str
    stem: str
    n: int


class Entry(NamedTuple):
    """A line of the leaderboard; `seconds` is processor time, per subset."""
    regime: str
    stem: str
    n: int
    arm: str
    published: str
    seconds: int


# One arm for each regime, set here and not picked by its score: hybrids, of augmented images
# where the published number has augmentation too. Those numbers are quoted from the papers.
# Seconds were timed by hand on one core: reading the data, VAE, hybrids, CNN and scoring. With
# --unlabelled, one VAE serves all subsets, and its time is counted for each of them.
LEADERBOARD = [
    Entry("MNIST, 50 labels, the other images unlabelled", "mnist-all", 50, "real+hybrid",
          "about 98.4, Ladder network (Rasmus et al. 2015)", 62),
    Entry("MNIST, 100 labels, likewise", "mnist-all", 100, "real+hybrid",
          "99.04, ADGM (Maaløe et al. 2016)", 62),
    Entry("Fashion-MNIST, 100 labels, likewise", "fashion-mnist-all", 100, "real+hybrid",
          "none found", 62),
    Entry("MNIST, 50 images", "mnist", 50, "real+hybrid", "none found", 12),
    Entry("MNIST, 100 images", "mnist", 100, "real+hybrid", "none found", 22),
    Entry("MNIST, 300 images", "mnist", 300, "real+hybrid",
          "about 95.9, convolutional kernel network (Mairal et al. 2014)", 24),
    Entry("MNIST, 1,000 images", "mnist", 1000, "real+hybrid",
          "about 97.9, convolutional kernel network (Mairal et al. 2014)", 40),
    Entry("Fashion-MNIST, 100 images", "fashion-mnist", 100, "real+hybrid", "none found", 17),
    Entry("Fashion-MNIST, 1,000 images", "fashion-mnist", 1000, "real+hybrid",
          "none found", 39),
    Entry("CIFAR-10, 300 images, augmented", "cifar10", 300, "augment+hybrid",
          "none found", 38),
    Entry("cats and dogs, 20 labels, the others unlabelled, ImageNet features",
          "cats-and-dogs", 20, "real+hybrid",
          "about 98.9 with 25,000 labels, OverFeat (Kaggle 2014)", 14),
    Entry("CIFAR-10 at 128 pixels, 40 labels, likewise", "cifar10-backbone", 40,
          "real+hybrid", "about 86.2, FixMatch, without other images (Sohn et al. 2020)", 22),
]

# The arms of the controls, in words.
CONTROLS = {
    "real": "real images only",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "mixup+cutmix": "mixup and cutmix in turn",
    "deform": "all real images deformed, no hybrids",
    "deformed images": "hybrids of one image each",
    "undeformed hybrid": "hybrids that do not move",
    "cross-faded hybrid": "sources not brought into register",
    "weight labels": "labelled by the mixing weight",
    "density labels": "labelled by the density",
    "no residual": "all decoded, nothing added back",
    "hybrid only": "hybrids only, to the last step",
    "prior hybrid": "points from N(0, I), density labels",
    "reconstructions": "reconstructions, hard labels",
    "latent posterior": "the latent posterior, no CNN",
}

# Choices made by a rule set before. Their single runs are not kept, but trials.json states the
# result in words: the paragraph, and what stands there before the numbers.
CHOICES = [
    ("hybrids: three tenths of the pairs of one class, `T = 1/s`", "one class",
     "s3t1, 40 pairs", "yes"),
    ("mixup: halves, in place of Beta(4, 4)", "mixup again", "ainf c3, 28 pairs", "yes"),
    ("mixup of augmented images: halves", "mixup again", "aminf over am4, 18 pairs", "no"),
    ("hybrids: halves where they are mixed as pixels", "mixup again", "pA, 26 pairs", "no"),
    ("hybrids of colour images: cut, not mixed", "cutting", "k40: 10 pairs", "yes"),
    ("half of them cut, in place of all", "cut or mixed", "14 pairs of CIFAR-10", "no"),
]

# Sets made to ask whether colour decides: their names in trials.json.
MADE = {
    "grey": "CIFAR-10, turned grey",
    "plain": "the same, on black outside an ellipse",
    "onphoto": "digits of MNIST on grey photographs",
    "mnistm": "digits of MNIST on colour photographs",
}


def table(name):
    """Register the function below it as the writer of the table `name`."""
    def register(function):
        # The result files do not change meanwhile, so that one writing serves every caller.
        TABLES[name] = functools.cache(function)
        return function
    return register


@functools.cache
def result(stem):
    """What assets/<stem>.json holds."""
    return json.loads((ASSETS / f"{stem}.json").read_text())


def file_of(stem, n):
    """The result file of a set: a size with other subsets has one of its own."""
    own = f"{stem}-{n}"
    return own if (ASSETS / f"{own}.json").exists() else stem


def rows_of(names=EVERY, sizes=None):
    """The lines of a table: one per set and size."""
    rows = []
    for name, stem, every in SETS:
        for n in every:
            if name in names and (sizes is None or n in sizes):
                rows.append(Row(name, file_of(stem, n), n))
    return rows


def measured(row, arm) -> bool:
    """Has this arm been measured with so many images?"""
    return any((line["n"], line["arm"]) == (row.n, arm) for line in result(row.stem)["rows"])


def hollow(row) -> bool:
    """Are the subsets nearly the same images, so that they have no interval?"""
    entries = result(row.stem)["summary"]
    return any(entry["n"] == row.n and entry["hollow"] for entry in entries)


def values(row, arm, key="accuracy"):
    """{subset: value} of an arm; accuracies in %."""
    scale = 100 if key in ("accuracy", "noise") else 1
    found = {}
    for line in result(row.stem)["rows"]:
        if line["n"] == row.n and line["arm"] == arm:
            found[line["seed"]] = scale * line[key]
    if not found:                       # a table with a hole would go unnoticed
        raise KeyError(f"{row.stem}.json has no {arm} with {row.n} images")
    return found


def mean(row, arm, key="accuracy"):
    """Mean of an arm over its subsets."""
    return compare.interval(list(values(row, arm, key).values()))[0]


def difference(row, arm, other, key="accuracy"):
    """Mean and 95% half-width of the paired difference, arm less other."""
    # Both arms had the same images and initial weights, so that only the difference counts.
    mine = values(row, arm, key)
    theirs = values(row, other, key)
    return compare.interval([mine[seed] - theirs[seed] for seed in mine if seed in theirs])


def pm(pair, digits=1, sign="+"):
    """'+4.7 ± 1.3' of a mean and its half-width."""
    middle, half = pair
    return f"{middle:{sign}.{digits}f} ± {half:.{digits}f}"


def over(row, arm, other):
    """The paired difference of accuracies, in points, as it is printed."""
    return pm(difference(row, arm, other))


def percent(row, arm):
    """A mean accuracy as it is printed."""
    return f"{mean(row, arm):.1f}"


def grid(head, lines, words=1):
    """A Markdown table; the first `words` columns are text, the others numbers."""
    marks = ["---" if place < words else "---:" for place in range(len(head))]
    text = []
    for cells in [head, marks, *lines]:
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def by_hand(row):
    """The arm of the augmentation that a person chose and tuned for such images."""
    return "elastic" if row.name in GREY else "augment"


@table("first-short")
def first_short():
    """What a reader wants to know first: the strongest rival, and the price."""
    head = ["data set", "images", "plain", "mixup", "by hand", "deform+mixup", "hybrids",
            "over deform+mixup", "NLL: deform+mixup", "hybrids", "seconds"]
    lines = []
    for row in rows_of(sizes=(100, 1000)):
        cost = [line for line in result("cost")["rows"]
                if line["set"].startswith(row.stem) and line["n"] == row.n]
        if not cost:
            continue
        cells = [row.name, f"{row.n:,}"]
        for arm in ("real", "mixup", by_hand(row), "deform+mixup", "real+hybrid"):
            cells.append(percent(row, arm))
        cells.append(over(row, "real+hybrid", "deform+mixup"))
        for arm in ("deform+mixup", "real+hybrid"):
            cells.append(f"{mean(row, arm, 'nll'):.3f}")
        cells.append(f"{cost[0]['plain']:.0f} / {cost[0]['hybrids']:.0f}")
        lines.append(cells)
    return grid(head, lines)


def strongest(key, digits, word):
    """Hybrids and the three rivals that are the hardest to beat."""
    rivals = ("by hand", "deform+mixup", "deform+cutmix")
    head = ["data set", "real images", *rivals, "real+hybrid",
            *(f"{word} {rival}" for rival in rivals)]
    lines = []
    for row in rows_of():
        if not measured(row, "deform+cutmix"):
            continue
        others = (by_hand(row), "deform+mixup", "deform+cutmix")
        cells = [row.name, f"{row.n:,}"]
        for arm in (*others, "real+hybrid"):
            cells.append(f"{mean(row, arm, key):.{digits}f}")
        for arm in others:
            cells.append(pm(difference(row, "real+hybrid", arm, key), digits))
        lines.append(cells)
    return grid(head, lines)


@table("first")
def first():
    return strongest("accuracy", 1, "over")


@table("first-nll")
def first_nll():
    return strongest("nll", 3, "less")


@table("main")
def main_table():
    """Real, mixup and hybrids with paired differences."""
    head = ["data set", "real images", "real", "mixup", "augment", "real+hybrid", "over real",
            "over mixup", "over augment"]
    lines = []
    for row in rows_of():
        cells = [row.name, f"{row.n:,}"]
        for arm in ("real", "mixup", "augment", "real+hybrid"):
            cells.append(percent(row, arm))
        for other in ("real", "mixup", "augment"):
            cells.append(over(row, "real+hybrid", other))
        lines.append(cells)
    return grid(head, lines)


@table("deformed")
def deformed():
    """Grey images: deformations without hybrids, hybrids without deformations, both."""
    others = ("deform", "undeformed hybrid")
    head = ["data set", "real images", *others, "real+hybrid"]
    head += [f"over {arm}" for arm in others]
    lines = []
    for row in rows_of(GREY):
        cells = [row.name, f"{row.n:,}"]
        for arm in (*others, "real+hybrid"):
            cells.append(percent(row, arm))
        for arm in others:
            cells.append(over(row, "real+hybrid", arm))
        lines.append(cells)
    return grid(head, lines)


@table("augmented")
def augmented():
    head = ["data set", "real images", "augment", "augment+mixup", "augment+hybrid",
            "over augment", "over augment+mixup", "NLL less augment+mixup"]
    lines = []
    for row in rows_of(("CIFAR-10",)):
        arm = "augment+hybrid"
        cells = [row.name, f"{row.n:,}", percent(row, "augment"), "", percent(row, arm),
                 over(row, arm, "augment"), "", ""]
        if measured(row, "augment+mixup"):
            cells[3] = percent(row, "augment+mixup")
            cells[6] = over(row, arm, "augment+mixup")
            cells[7] = pm(difference(row, arm, "augment+mixup", "nll"), 3)
        lines.append(cells)
    return grid(head, lines)


@table("probabilities")
def probabilities():
    head = ["data set", "real images", "NLL: real", "mixup", "hybrid", "ECE: real", "mixup",
            "hybrid", "in noise: real", "mixup", "hybrid"]
    lines = []
    for row in rows_of():
        cells = [row.name, f"{row.n:,}"]
        for key, digits in (("nll", 3), ("ece", 3), ("noise", 1)):
            for arm in ("real", "mixup", "real+hybrid"):
                cells.append(f"{mean(row, arm, key):.{digits}f}")
        lines.append(cells)
    return grid(head, lines)


def count(rows, arm, other, key):
    """How often the arm is better than the other one, indistinguishable from it, worse."""
    better, same, worse = 0, 0, 0
    for row in rows:
        gain, half = difference(row, arm, other, key)
        if key == "nll":                # the lower the better
            gain = -gain
        if gain > half:
            better += 1
        elif gain < -half:
            worse += 1
        else:                           # the interval holds 0
            same += 1
    return [str(better), str(same), str(worse)]


@table("tally")
def tally():
    everything = rows_of()
    grey = rows_of(GREY)
    colour = rows_of(("CIFAR-10",))
    pairs = [
        (everything, "real+hybrid", "real"),
        (everything, "real+hybrid", "mixup"),
        (everything, "real+hybrid", "augment"),
        (grey, "real+hybrid", "elastic"),
        (everything, "real+hybrid", "deform"),
        (everything, "real+hybrid", "deform+mixup"),
        (everything, "real+hybrid", "deform+cutmix"),
        (colour, "real+hybrid", "mixup+cutmix"),
        (colour, "augment+hybrid", "augment"),
        (colour, "augment+hybrid", "augment+mixup"),
    ]
    head = ["compared", "rows", "accuracy: ahead", "same", "behind", "NLL: better", "same",
            "worse"]
    lines = []
    for rows, arm, other in pairs:
        rows = [row for row in rows if measured(row, other)]
        cells = [f"{arm}, to {other}", str(len(rows))]
        for key in ("accuracy", "nll"):
            cells += count(rows, arm, other, key)
        lines.append(cells)
    return grid(head, lines)


def against_cutmix(rows):
    """Colour: hybrids and the best ready-made way to mix, mixup and cutmix in turn."""
    head = ["real images", "real", "mixup", "mixup+cutmix", "real+hybrid", "over real",
            "over mixup", "over mixup+cutmix", "NLL, to mixup+cutmix"]
    lines = []
    for row in rows:
        cells = [f"{row.n:,}"]
        for arm in ("real", "mixup", "mixup+cutmix", "real+hybrid"):
            cells.append(percent(row, arm))
        for other in ("real", "mixup", "mixup+cutmix"):
            cells.append(over(row, "real+hybrid", other))
        cells.append(pm(difference(row, "real+hybrid", "mixup+cutmix", "nll"), 3))
        lines.append(cells)
    return grid(head, lines, words=0)


@table("colour")
def colour_table():
    return against_cutmix(rows_of(("CIFAR-10",)))


FEW = [Row("MNIST", file_of("mnist-all", 50), 50), Row("MNIST", "mnist-all", 100),
       Row("Fashion-MNIST", "fashion-mnist-all", 100)]


@table("labels")
def labels():
    """Grey images: ways to use those without a label."""
    arms = ("real", "mixup", "latent posterior", "pseudo-labels", "augment+pseudo",
            "deformed images", "real+hybrid")
    others = ("pseudo-labels", "augment+pseudo", "deformed images")
    lines = []
    for row in FEW:
        cells = [row.name, str(row.n)]
        cells += [percent(row, arm) for arm in arms]
        cells += [over(row, "real+hybrid", arm) for arm in others]
        lines.append(cells)
    return grid(["data set", "labels", *arms, *(f"over {arm}" for arm in others)], lines)


@table("labels-nll")
def labels_nll():
    """The NLL of the same arms."""
    arms = ("real", "latent posterior", "pseudo-labels", "augment+pseudo", "deformed images",
            "real+hybrid")
    others = ("pseudo-labels", "augment+pseudo", "deformed images")
    lines = []
    for row in FEW:
        cells = [row.name, str(row.n)]
        cells += [f"{mean(row, arm, 'nll'):.3f}" for arm in arms]
        cells += [pm(difference(row, "real+hybrid", arm, "nll"), 3) for arm in others]
        lines.append(cells)
    head = ["data set", "labels", *arms, *(f"less {arm}" for arm in others)]
    return grid(head, lines)


@table("labels-colour")
def labels_colour():
    """CIFAR-10, where the labels do not predict each other."""
    arms = ("real", "mixup+cutmix", "augment", "pseudo-labels", "augment+pseudo",
            "real+hybrid", "augment+hybrid")
    row = Row("CIFAR-10", "cifar10-all", 300)
    cells = [f"{row.n:,}"] + [percent(row, arm) for arm in arms]
    cells.append(over(row, "augment+hybrid", "augment+pseudo"))
    return grid(["labels", *arms, "augment+hybrid over augment+pseudo"], [cells], words=0)


@table("spread")
def spread():
    """How many of the labels that are spread are right, by what a neighbour is."""
    words = {"codes": "codes alone", "images": "images alone, once they have moved",
             "by s": "both, by the strength s: taken"}
    lines = []
    for line in result("trials")["labels along deformed images"]["rows"]:
        right = list(line["right"].values())
        lines.append([line["set"], f"{line['images']:,}", words[line["distance"]],
                      str(len(right)), pm(compare.interval(right), sign="")])
    head = ["data set", "images", "what is near", "subsets", "of the spread labels right, %"]
    return grid(head, lines, words=3)


def control_rows():
    """The three sets of controls."""
    return [Row(name, f"{stem}-controls", 100) for name, stem, _ in SETS[:3]]


@table("controls")
def controls():
    """Points ahead of the default hybrids."""
    rows = control_rows()
    lines = []
    for arm, words in CONTROLS.items():
        lines.append([words] + [over(row, arm, "real+hybrid") for row in rows])
    return grid([""] + [f"{row.name}, {row.n:,}" for row in rows], lines)


@table("controls-nll")
def controls_nll():
    rows = control_rows()
    lines = []
    for arm, words in CONTROLS.items():
        if arm in ("latent posterior", "cutmix", "real"):
            continue
        cells = [words]
        for row in rows:
            cells.append(pm(difference(row, arm, "real+hybrid", "nll"), 3))
        lines.append(cells)
    return grid([""] + [f"{row.name}, {row.n:,}" for row in rows], lines)


def yes(reached):
    return "yes" if reached else "no"


def accurate(row, aim, what):
    """A line of the aims: an accuracy that was to be reached."""
    found = compare.interval(list(values(row, "real+hybrid").values()))
    return [f"accuracy, {row.name}, {row.n:,} {what}", f"{aim:g}", pm(found, sign=""),
            yes(found[0] >= aim)]


def gained(words, row, other, aim, bound=False):
    """A line of the aims: points that were to be gained, and those that were.

    With `bound` the interval has to lie above 0, too.
    """
    gain, half = difference(row, "real+hybrid", other)
    reached = gain >= aim and (gain > half or not bound)
    return [f"{words}, {row.name}, {row.n:,} images", f"{aim:+g}", pm((gain, half)),
            yes(reached)]


def not_behind(row, other):
    """A line of the aims: hybrids are not significantly behind another arm."""
    gain, half = difference(row, "real+hybrid", other)
    return [f"not behind {other}, {row.name}, {row.n:,} images", "0 in the interval, or above",
            pm((gain, half)), yes(gain + half >= 0)]


@table("aims")
def aims():
    lines = []
    sizes = (100, 300, 1000)
    for row, aim in zip(rows_of(("MNIST",), sizes), (95.8, 97.5, 98.5)):
        lines.append(accurate(row, aim, "images"))
    for name, points in (("MNIST", (6, 2, 0.8)), ("Fashion-MNIST", (1.5, 1.5, 1))):
        for row, aim in zip(rows_of((name,), sizes), points):
            lines.append(gained("over mixup", row, "mixup", aim, bound=True))
    for row in rows_of(("CIFAR-10",)):
        lines.append(gained("over mixup+cutmix", row, "mixup+cutmix", 0.5))
    for row in rows_of(("MNIST",)):
        for other in ("augment", "elastic"):
            lines.append(not_behind(row, other))
    for row in rows_of(("Fashion-MNIST",)):
        for other in ("augment", "elastic"):
            lines.append(gained(f"over {other}", row, other, 1))
    # Harm is what cannot be ruled out: the lower end of the interval, not the mean.
    bounds = []
    for row in rows_of():
        gain, half = difference(row, "real+hybrid", "real")
        bounds.append(gain - half)
    lines.append(["no harm, of pixels: lower bound over real", "above -0.5",
                  f"lowest {min(bounds):.1f}", yes(min(bounds) > -0.5)])
    return grid(["aim", "asked", "measured", "reached"], lines)


@table("aims-labels")
def aims_labels():
    """Few labels, many images."""
    lines = []
    for row, aim in zip(FEW, (97.8, 98.3, 79)):
        lines.append(accurate(row, aim, "labels"))
    for row in FEW:
        gain, half = difference(row, "real+hybrid", "augment+pseudo")
        less, error = difference(row, "real+hybrid", "augment+pseudo", "nll")
        reached = gain > half or -less > error
        lines.append([f"over augment+pseudo, {row.name}, {row.n} labels",
                      "above 0 in accuracy or NLL",
                      f"{pm((gain, half))}, NLL {pm((less, error), 3)}", yes(reached)])
    with_others = values(Row("CIFAR-10", "cifar10-all", 300), "augment+hybrid")
    without = values(Row("CIFAR-10", file_of("cifar10", 300), 300), "augment+hybrid")
    gain, half = compare.interval([with_others[seed] - without[seed] for seed in without])
    lines.append(["augment+hybrid, CIFAR-10, 300 labels, over no unlabelled images",
                  "0 in the interval, or above", pm((gain, half)), yes(gain + half >= 0)])
    for line, words in zip(result("review")["summary"], ("MNIST", "Fashion-MNIST")):
        found = 100 * line["precision_50"]
        lines.append([f"wrong labels among the first 50, {words}, %", "80", f"{found:.1f}",
                      yes(found >= 80)])
    return grid(["aim", "asked", "measured", "reached"], lines)


@table("gpu")
def gpu():
    """What one GPU does, launched kernel by kernel."""
    lines = []
    for line in result("gpu")["rows"]:
        quality = QUALITY[line["work"]].format(line["quality"])
        lines.append([line["work"], line["how"], f"{line['seconds']:.1f}", quality])
    return grid(["work, on all of MNIST", "how", "seconds", "quality"], lines, words=2)


@table("gpu-grid")
def gpu_grid():
    """How much of a grid is done in 45 seconds."""
    lines = [[how, str(cells)] for how, cells in result("gpu")["grid"].items()]
    return grid(["processes", "cells in 45 seconds"], lines)


@table("leaderboard")
def leaderboard():
    head = ["regime", "ours, test accuracy in %", "best published known to us",
            "minutes of one core", "command: `python compare.py` and"]
    lines = []
    for entry in LEADERBOARD:
        row = Row("", file_of(entry.stem, entry.n), entry.n)
        found = list(values(row, entry.arm).values())
        settings = result(row.stem)["settings"]
        command = f"--dataset {settings['dataset']} --sizes {entry.n} --seeds {len(found)} "
        if settings.get("backbone"):
            command += f"--backbone {settings['backbone']} "
        if settings.get("unlabelled"):
            command += "--unlabelled "
        command += f"--arms {entry.arm}"
        lines.append([
            entry.regime,
            f"{pm(compare.interval(found), sign='')} ({entry.arm}, {len(found)} subsets)",
            entry.published,
            f"{entry.seconds * len(found) / 60:.0f}",
            f"`{command}`",
        ])
    return grid(head, lines, words=5)


# How good the work of assets/bench.py is, by its name.
QUALITY = {"CNN": "{:.2f}% on test", "VAE": "{:.1f} nats on test",
           "codes and percentages": "{:.1f}% of their classes"}


@table("choices")
def choices():
    """Numbers that trials.json states in words, as the single runs are not kept."""
    number = r"([+-]\d\.\d+) \+- (\d\.\d+)"
    numbers = f".*?{number}( points, NLL {number})?"        # not all of them name the NLL
    lines = []
    for words, paragraph, start, taken in CHOICES:
        text = result("trials")[paragraph]["what"]
        found = re.search(re.escape(start) + numbers, text)
        points = (float(found[1]), float(found[2]))
        nll = ""
        if found[3]:
            nll = f"{found[4]} ± {found[5]}"
        pairs = re.search(r"(\d+) pairs", start)[1]
        lines.append([words, pairs, pm(points, 2), nll, taken])
    return grid(["change", "pairs of runs", "points", "NLL", "taken"], lines)


@table("cut-or-mixed")
def cut_or_mixed():
    rows = result("trials")["cut or mixed"]["rows"]
    lines = []
    for name, words in MADE.items():
        cells = [words]
        for n in (300, 1000):
            # Paired differences stand in the file, as the single runs are not kept.
            for line in rows:
                if (line["dataset"], line["n"], line["arm"]) == (name, n, "always cut"):
                    cells.append(pm((line["over_never_cut"], line["half_never_cut"])))
                    cells.append(pm((line["over_mixup"], line["half_mixup"])))
        lines.append(cells)
    return grid(["cut hybrids", "over mixed ones, 300 images", "over mixup", "1,000 images",
                 "over mixup"], lines)


def widest_gap(rows):
    """The largest gap of stated and observed frequency, over bins of at least 200 pairs."""
    # Of fewer pairs the observed frequency is too uncertain to be held against the stated one.
    gaps = []
    for line in rows:
        if line["pairs"] >= 200:
            gaps.append(abs(line["stated"] - line["observed"]))
    return max(gaps)


@table("percentages")
def percentages():
    head = ["data set", "density", "accuracy, %", "NLL", "ECE", "95% interval", "widest gap"]
    lines = []
    for name, stem in (("MNIST", "mnist"), ("Fashion-MNIST", "fashion-mnist"),
                       ("CIFAR-10", "cifar10"), ("glyphs", "glyphs")):
        for density in ("encoder's width", "aggregate", "gaussian"):
            scores = result(f"{stem}-latent")["metrics"][density]
            low, high = scores["ece_interval"]
            lines.append([
                name, density, f"{100 * scores['accuracy']:.1f}", f"{scores['nll']:.3f}",
                f"{scores['ece']:.3f}", f"{low:.3f} to {high:.3f}",
                f"{widest_gap(scores['reliability']):.2f}",
            ])
    return grid(head, lines, words=2)


@table("wrong-labels")
def wrong_labels():
    names = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
    lines = []
    for row in result("review")["summary"]:
        cells = [names.get(row["dataset"], row["dataset"])]
        for key in ("precision_50", "recall"):
            cells.append(f"{100 * row[key]:.1f} ± {100 * row[key + '_half']:.1f}")
        lines.append([*cells, f"{row['listed']:.0f}", f"{row['listed_clean']:.0f}"])
    head = ["data set", "of the first 50 are wrong, %", "of the wrong ones are listed, %",
            "listed", "listed where none is wrong"]
    return grid(head, lines)


PHOTOGRAPHS = [Row("cats and dogs", "cats-and-dogs", n) for n in (4, 20, 100)]
OF_CIFAR = [Row("CIFAR-10", "cifar10-backbone", n) for n in (40, 100, 1000)]
OF_CIFAR_224 = [Row("CIFAR-10, 224 pixels", "cifar10-backbone-224", n)
                for n in (40, 100, 1000)]
LABELLED = [Row("cats and dogs", "cats-and-dogs-labelled", n)
            for n in (4, 20, 100, 1000, 1800)]
SEMI = ("real", "pseudo-labels", "mixup+pseudo", "mixup+soft pseudo", "real+hybrid")
ALONE = ("real", "mixup", "augment", "real+hybrid")
RIVALS = ("pseudo-labels", "soft pseudo-labels", "mixup+pseudo", "mixup+soft pseudo",
          "mixup+pseudo only")


@table("photographs-short")
def photographs_short():
    """Accuracies, and how well calibrated those are that use unlabelled images."""
    head = ["data set", "labels", *SEMI, f"ECE: {SEMI[1]}", *SEMI[2:]]
    lines = []
    for row in PHOTOGRAPHS + OF_CIFAR:
        cells = [row.name, f"{row.n:,}"]
        for arm in SEMI:
            cells.append(percent(row, arm))
        for arm in SEMI[1:]:
            cells.append(f"{mean(row, arm, 'ece'):.3f}")
        lines.append(cells)
    return grid(head, lines)


@table("photographs")
def photographs():
    """Paired differences of the hybrids in accuracy."""
    head = ["data set", "labels", *(f"points over {arm}" for arm in ("real", *RIVALS))]
    lines = []
    for row in PHOTOGRAPHS + OF_CIFAR + OF_CIFAR_224:
        cells = [row.name, f"{row.n:,}"]
        for other in ("real", *RIVALS):
            cells.append(pm(difference(row, "real+hybrid", other), 2))
        lines.append(cells)
    return grid(head, lines)


@table("photographs-nll")
def photographs_nll():
    """Paired differences of the hybrids in NLL."""
    head = ["data set", "labels", *(f"NLL less {arm}" for arm in RIVALS)]
    lines = []
    for row in PHOTOGRAPHS + OF_CIFAR + OF_CIFAR_224:
        cells = [row.name, f"{row.n:,}"]
        for other in RIVALS:
            cells.append(pm(difference(row, "real+hybrid", other, "nll"), 3))
        lines.append(cells)
    return grid(head, lines)


@table("photographs-percentages")
def photographs_percentages():
    """What the percentages are worth: of the latent space, and of classifiers."""
    arms = ("latent posterior", "soft pseudo-labels", "real+hybrid")
    head = ["data set", "labels"]
    for key in ("accuracy", "NLL", "ECE"):
        head += [f"{key}: {arms[0]}", *arms[1:]]
    lines = []
    for row in PHOTOGRAPHS + OF_CIFAR + OF_CIFAR_224:
        cells = [row.name, f"{row.n:,}"]
        for key, digits in (("accuracy", 1), ("nll", 3), ("ece", 3)):
            for arm in arms:
                cells.append(f"{mean(row, arm, key):.{digits}f}")
        lines.append(cells)
    return grid(head, lines)


@table("photographs-labelled")
def photographs_labelled():
    """Labelled photographs alone."""
    head = ["data set", "labels", *ALONE, "points over real", "points over mixup",
            "NLL less real", "NLL less mixup"]
    lines = []
    for row in LABELLED:
        cells = [row.name, f"{row.n:,}"]
        for arm in ALONE:
            cells.append(percent(row, arm))
        for other in ("real", "mixup"):
            cells.append(pm(difference(row, "real+hybrid", other), 2))
        for other in ("real", "mixup"):
            cells.append(pm(difference(row, "real+hybrid", other, "nll"), 3))
        if hollow(row):
            cells[6:] = [cell.partition(" ±")[0] for cell in cells[6:]]
        lines.append(cells)
    return grid(head, lines)


@table("steps")
def steps():
    chosen = result("baseline")["chosen"]["steps"]
    head = ["real images, at most"] + [f"{int(n):,}" for n in chosen]
    grey = ["CNN steps, grey"] + [f"{count:,}" for count in chosen.values()]
    # baseline.json says it in words: colour takes twice the steps.
    colour = ["CNN steps, colour"] + [f"{2 * count:,}" for count in chosen.values()]
    return grid(head, [grey, colour])


@table("network")
def network():
    """The network before and the one of now on the same subsets; lines of all six of them."""
    names = {"mnist": "MNIST", "cifar": "CIFAR-10", "glyphs": "glyphs"}
    lines = []
    for line in result("trials")["a cheaper network"]["rows"]:
        seeds = sorted(line["today"].keys() & line["f24"].keys())
        if len(seeds) < 6:
            continue
        before = [line["today"][seed] for seed in seeds]
        now = [line["f24"][seed] for seed in seeds]
        gain = compare.interval([new - old for new, old in zip(now, before)])
        lines.append([names[line["set"]], line["arm"], f"{line['n']:,}",
                      f"{sum(before) / len(seeds):.1f}", f"{sum(now) / len(seeds):.1f}",
                      pm(gain)])
    head = ["data set", "arm", "real images", "before", "now", "difference"]
    return grid(head, lines, words=2)


# What was tried of hybrids that move, in words.
MOVING = {
    "old,ps=0": "hybrids that do not move",
    "old": "hybrids deformed, real images not",
    "decoded": "the same, all of them decoded",
    "mall": "the same, sources brought into register",
    "mhalf": "in register, half of them decoded",
    "mpix": "in register, none decoded",
    "mown": "the same, labelled at their own code",
    "dshare": "deformed images in place of hybrids",
    "deform": "all images deformed, no hybrids",
    "deformmix": "mixup, then all images deformed",
    "old,end=s": "hybrids and real images deformed",
    "old,end=part": "hybrids deformed, and a part s of the real images",
    "decoded,end=part": "the same, all of them decoded",
    "mall,end=part": "the same, in register",
    "dshare,end=part": "deformed images in place of hybrids",
    "fhalf,end=part": "half decoded, of 2,000 pairs",
    "shalf,end=part": "the same, brought into register by s: taken",
}


@table("moving")
def moving():
    """What was tried of hybrids that move: points over mixup, paired by subset."""
    found = {(line["set"], line["n"], line["arm"]): line["subsets"]
             for line in result("trials")["hybrids that move"]["rows"]}
    lines = []
    for arm, words in MOVING.items():
        cells = [words]
        for name in ("mnist", "fashion-mnist"):
            mine = found[name, 100, arm]
            mixup = found[name, 100, "mixup"]
            seeds = sorted(mine.keys() & mixup.keys())
            accuracy = [mine[seed][0] - mixup[seed][0] for seed in seeds]
            nll = [mine[seed][1] - mixup[seed][1] for seed in seeds]
            cells += [str(len(seeds)), pm(compare.interval(accuracy)),
                      f"{compare.interval(nll)[0]:+.3f}"]
        lines.append(cells)
    head = ["", "subsets", "MNIST", "NLL", "subsets", "Fashion-MNIST", "NLL"]
    return grid(head, lines)


@table("non-linear")
def non_linear():
    """A conditional VAE of pairs of images, less the Gaussian of flows."""
    names = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
    rows = result("trials")["a conditional VAE of pairs"]["rows"]
    lines = []
    for name, words in names.items():
        mine = [row for row in rows if row["set"] == name]
        cells = [words, str(len(mine))]
        for arm in ("deform", "deform+mixup"):
            for key, digits in ((0, 1), (1, 3)):
                gaps = [row[f"non-linear {arm}"][key] - row[f"linear {arm}"][key]
                        for row in mine]
                cells.append(pm(compare.interval(gaps), digits))
        lines.append(cells)
    head = ["data set", "subsets", "deform", "NLL", "deform+mixup", "NLL"]
    return grid(head, lines)


@table("speed")
def speed():
    lines = []
    for run in result("bench")["runs"]:
        for line in run["rows"]:
            quality = QUALITY[line["work"].split(",")[0]].format(line["quality"])
            ratio = line.get("times_as_fast", "")       # only of what is taught, too
            lines.append([run["features"], line["work"], quality, f"{line['seconds']:.1f}",
                          str(ratio)])
    head = ["processor", "work, on all of MNIST", "quality", "seconds", "times as fast"]
    return grid(head, lines, words=2)


@table("scaling")
def scaling():
    """Seconds of each script, as work grows."""
    lines = []
    for line in result("scaling")["rows"]:
        seconds = [f"{cost['seconds']:.1f}" for cost in line["costs"].values()]
        lines.append([line["axis"], f"{line['value']:,}", *seconds])
    scripts = list(result("scaling")["rows"][0]["costs"])
    return grid(["what grows", "to", *scripts], lines)


def rewrite(text):
    """A page with every table between its markers as it should be."""
    # A marker with a name that no function has ends in a KeyError that says the name.
    def fresh(found):
        return found[1] + TABLES[found[2]]() + "\n" + found[4]
    return BLOCK.sub(fresh, text)


def pages():
    """{path: text as it should be} of the three pages."""
    wanted = {}
    for name in PAGES:
        path = ROOT / name
        wanted[path] = rewrite(path.read_text(encoding="utf-8"))
    return wanted


def differences():
    """'page: table' for each table that differs from its result file."""
    found = []
    for path, wanted in pages().items():
        now = BLOCK.findall(path.read_text(encoding="utf-8"))
        for before, after in zip(now, BLOCK.findall(wanted)):
            if before != after:
                found.append(f"{path.relative_to(ROOT)}: table {before[1]}")
    return found


def draw():
    """Accuracy versus number of images, a picture for each set."""
    recipe = {"unlabelled": False, "score": "test"}
    for name, stem, _ in SETS:
        lines = []
        for row in rows_of((name,)):
            lines += [line for line in result(row.stem)["rows"] if line["n"] == row.n]
        measured = SimpleNamespace(data=SimpleNamespace(name=name), recipes={0: recipe})
        figure = common.figure(13, 5.6)
        compare.curves(*figure.subplots(1, 2), compare.summarise(lines), lines, measured)
        common.write(ASSETS / f"{stem}.png", figure)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("evidence.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true",
                        help="write nothing, name what differs")
    parser.add_argument("--draw", action="store_true",
                        help="draw the curves of the data sets as well")
    args = parser.parse_args(argv)
    if args.draw:
        draw()
    # What differs is looked for before anything is written: afterwards nothing would.
    differ = differences()
    if args.check:
        for line in differ:
            print(f"{line} differs; run python assets/evidence.py")
        return int(bool(differ))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    print(f"{len(TABLES)} tables; rewritten: {', '.join(differ) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
