"""Make hybrid images: decoded latent points, labelled with the percentages of their classes.

    python hybrids.py                                # 20,000 hybrids -> runs/glyphs/hybrids.pt
    python hybrids.py --strategy prior --count 5000    # points from N(0, I): the idea as such
    python hybrids.py --export png                  # PNG files and labels.csv, for other tools

Reads:  vae.pt latent.pt and their data set.
Writes: hybrids.pt hybrids.json hybrids.png.
"""
import argparse
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

# Letters: N codes, M points, D latent size, K classes.  x (M,C,H,W) in [0,1]; q (M,K).
# `codes` has mu, logvar (N,D), y (N,) and a posterior: z (M,D) -> q (M,K) with a prior (K,).

STRATEGIES = ("between", "around", "prior")
LABELS = ("product", "density", "weight")
FLOWS = 1000                            # by which real images move
LINES = 2000                            # most pairs that are brought into register


class Points(NamedTuple):
    """M latent points; those on lines between codes are z = t mu_i + (1-t) mu_j."""
    z: torch.Tensor                     # (M,D)
    i: torch.Tensor | None = None      # (M,) rows of the codes; None for points from the prior
    j: torch.Tensor | None = None
    t: torch.Tensor | None = None       # (M,) in [0,1]

    def take(self, rows):
        """Some of the points: rows is an index or a slice."""
        return Points(*(None if part is None else part[rows] for part in self))


def sample(strategy, count, codes, generator, alpha=4, same=0.3, lines=None) -> Points:
    """Draw `count` points.

    prior     z ~ N(0, I)
    around    z ~ q(z|x_i), a code and its own width
    between   on lines between two codes, t ~ Beta(alpha, alpha): a part `same` of the lines
              within one class, the others between two; at most `lines` of them, if given
    """
    mu = codes.mu.float()
    size, dim = mu.shape
    source = {"device": mu.device, "generator": generator}      # of random numbers
    if strategy == "prior":
        return Points(torch.randn(count, dim, **source))
    if strategy == "around":
        i = torch.randint(size, (count,), **source)
        noise = torch.randn(count, dim, **source)
        width = (codes.logvar[i].float() / 2).exp()
        t = torch.ones(count, device=mu.device)
        return Points(mu[i] + width * noise, i, i, t)
    lines = min(lines or count, count)
    i = torch.randint(size, (lines,), **source)
    j = partners(codes.y, i, same, generator)
    t = random_weights(count, alpha, mu.device, generator)
    which = torch.arange(count, device=mu.device) % lines       # each line has several points
    return line(mu, i[which], j[which], t)


def registration(morph, deform, cut):
    """What brings sources into register, for `render`, and the most lines, for `sample`.

    `morph` is vae.Morph. None, and None, of hybrids that are cut or do not deform.
    """
    if cut or deform is None or deform.strength == 0:
        return None, None
    # Each line is registered once, at a cost: so many of them serve any number of points.
    return functools.partial(morph, strength=deform.strength), LINES


def line(mu, i, j, t) -> Points:
    """The points z = t mu_i + (1-t) mu_j; exactly a code at both ends."""
    z = torch.lerp(mu[j], mu[i], t[:, None])
    return Points(z, i, j, t)


def random_weights(count, alpha, device, generator):
    """(count,) draws from Beta(alpha, alpha): medians of 2 alpha - 1 uniform numbers each."""
    numbers = torch.rand(count, 2 * alpha - 1, device=device, generator=generator)
    return numbers.median(1).values


def partners(y, i, same, generator):
    """For each row i a random row j: with chance `same` of its class, else of another one."""
    order = y.argsort(stable=True)      # one block of rows a class
    counts = y.bincount()
    size = counts[y[i]]
    first = (counts.cumsum(0) - counts)[y[i]]           # where the block of y_i begins
    chance, number = torch.rand(2, len(i), device=y.device, generator=generator)
    alike = (chance < same) | (size == len(y))          # there may be no other class
    choices = torch.where(alike, size, len(y) - size)
    step = (number * choices).long().clamp(max=choices - 1)     # 1.0 is a rounded number
    # From the start of the block; or from its end onwards, and round to the rows before it.
    start = torch.where(alike, first, first + size)
    return order[(start + step) % len(y)]


def label(rule, points, codes, epsilon=0.1):
    """Class probabilities q (M,K) of points, by the named rule.

    density  q(c) = p(c|z), the latent posterior
    weight   q = t [c=y_i] + (1-t) [c=y_j], as mixup does (Zhang et al. 2018)
    product  a logarithmic opinion pool of the two (Genest and Zidek 1986):
             q(c) ~ [(1-e)(t [c=y_i] + (1-t) [c=y_j]) + e pi_c] (p(z|c) + b)^(1/T),
             e = 4 epsilon t (1-t), so that both ends are exactly one-hot
    Raises ValueError for weight and product of points from the prior: they have no weights.
    """
    if rule not in LABELS:
        raise ValueError(f"no rule {rule!r}; there are {', '.join(LABELS)}")
    if rule == "density":
        return codes.posterior(points.z)
    if points.i is None:
        raise ValueError("points from the prior have no mixing weights; label them by density")
    weight = mixing_label(points, codes)
    if rule == "weight":
        return weight
    return opinion_pool(weight, points, codes.posterior, epsilon)


def mixing_label(points, codes):
    """q = t [c=y_i] + (1-t) [c=y_j] (M,K)."""
    classes = len(codes.posterior.prior)
    t = points.t[:, None]
    first = F.one_hot(codes.y[points.i].long(), classes)
    second = F.one_hot(codes.y[points.j].long(), classes)
    return t * first + (1 - t) * second


def opinion_pool(weight, points, posterior, epsilon):
    """The product of mixing weights and the evidence q(c|z) / pi_c, normalised (M,K)."""
    t = points.t[:, None]
    doubt = 4 * epsilon * t * (1 - t)   # a third class may lie between the two
    mixed = (1 - doubt) * weight + doubt * posterior.prior
    # Where t is 0 or 1 one class is left: its evidence, too, must not be 0, for 0 / 0 is none.
    q = posterior(points.z).clamp(min=1e-30)
    product = mixed * q / posterior.prior.clamp(min=1e-30)
    return product / product.sum(1, keepdim=True)


def render(points, codes, images, decode, residual=True, cut=None, morph=None,
           generator=None, decoded=0.5, batch=1000):
    """Images (M,C,H,W) of points: decode(z), plus what the decoder lost of their sources.

    x = decode(z) + w (x_i - decode(mu_i)) + (1-w) (x_j - decode(mu_j)), clipped; at z = mu_i
    it is x_i, so no sharpness is lost. The last points, all but a part `decoded`, do without
    the decoder, which may know little: x = w x_i + (1-w) x_j. w is t. With `morph`, as
    vae.Morph, parts of both images are moved to where they meet before they are added; with
    `cut` (None: of colour images) w is 0 in a rectangle drawn from `generator`, of area 1-t,
    and 1 elsewhere. Points from the prior, and all without `residual`, are decode(z).
    `images`, uint8 or float in [0,1], are the sources of the codes.
    """
    if points.i is None or not residual:
        made = [as_dtype(decode(z), images.dtype) for z in points.z.split(batch)]
        return torch.cat(made)
    if cut is None:
        cut = images.shape[1] == 3
    lost = residuals(codes.mu, images, decode, batch)
    if morph and not cut:               # each line once, however many points lie on it
        pairs = torch.stack([points.i, points.j], 1)
        lines, which = pairs.unique(dim=0, return_inverse=True)
        meet = morph(as_float(images[lines[:, 0]]), as_float(images[lines[:, 1]]))
    middle = math.ceil(decoded * len(points.z))
    parts = []
    for begin, end, sources in ((0, middle, lost), (middle, len(points.z), images)):
        for start in range(begin, end, batch):
            rows = slice(start, min(start + batch, end))
            z, i, j, t = points.take(rows)
            first = as_float(sources[i]).float()
            second = as_float(sources[j]).float()
            w = t[:, None, None, None]
            if cut:
                w = rectangles(t, *images.shape[2:], generator)
            elif morph:
                first, second = meet(first, second, which[rows], t)
            x = w * first + (1 - w) * second
            if sources is lost:
                x = x + decode(z)
            parts.append(as_dtype(x.clamp(0, 1), images.dtype))
    return torch.cat(parts)


def residuals(mu, images, decode, batch=1000):
    """What the decoder loses of each image (N,C,H,W); of uint8, half precision will do."""
    precision = torch.half if images.dtype == torch.uint8 else images.dtype
    parts = []
    for codes, sources in zip(mu.split(batch), images.split(batch)):
        lost = as_float(sources) - decode(codes.float())
        parts.append(lost.to(precision))
    return torch.cat(parts)


def rectangles(t, height, width, generator):
    """(M,1,height,width): 0 in a rectangle of area 1-t (M,), to whole pixels, 1 elsewhere."""
    side = (1 - t).sqrt()
    place = torch.rand(2, len(t), device=t.device, generator=generator)
    # A centre so far from the border that nothing is cut off: else the area is not 1-t.
    down, right = place * (1 - side) + side / 2
    rows = covered(height, down, side)
    columns = covered(width, right, side)
    inside = rows[:, :, None] & columns[:, None, :]
    return 1.0 - inside[:, None].float()


def covered(size, centre, side):
    """(M,size) bool: pixels within side / 2 of a centre (M,); both in parts of the image."""
    pixel = (torch.arange(size, device=centre.device) + 0.5) / size
    return (pixel - centre[:, None]).abs() < side[:, None] / 2


def as_float(images):
    """uint8 -> [0,1]; floats, which are there already, as they are."""
    return images / 255 if images.dtype == torch.uint8 else images


def as_dtype(x, dtype):
    """x in [0,1] -> uint8, rounded, or another float."""
    if dtype == torch.uint8:
        return (x * 255).round().byte()
    return x.to(dtype)


def make(points, codes, images, decode, *, rule="product", residual=True, cut=None, morph=None,
         deform=None, generator=None, decoded=0.5, batch=1000):
    """The hybrids of points -> x (M,C,H,W) as `images`, q (M,K); see `render` and `label`.

    `deform`, (x, q, generator) -> (x, q), has the last word: each hybrid moves as images do.
    """
    x = render(points, codes, images, decode, residual, cut, morph, generator, decoded, batch)
    q = label(rule, points, codes)
    if deform:
        parts = []
        for some, its in zip(x.split(batch), q.split(batch)):
            moved, _ = deform(as_float(some), its, generator)
            parts.append(as_dtype(moved, x.dtype))
        x = torch.cat(parts)
    return x, q


@dataclass(eq=False)
class HybridMixer:
    """mixer(x, y) -> x, q: hybrids of a batch, where torchvision.transforms.v2.MixUp stood.

    Between the codes of each image and another one of the batch; `cut` as of `render`,
    `deform` as of `make`. encode: x (B,C,H,W) in [0,1] -> mu, logvar (B,D); decode: z (B,D) ->
    images; posterior: z -> q (B,K), as latent.teach makes it. x float in [0,1] or uint8, y
    integer labels (B,). Raises ValueError for a batch that has been normalised.
    """
    encode: Callable
    decode: Callable
    posterior: Callable
    rule: str = "product"
    generator: torch.Generator | None = None
    cut: bool | None = None
    deform: Callable | None = None

    @torch.no_grad()
    def __call__(self, x, y):
        x = as_float(x)
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"the batch spans {low:g} to {high:g}; mix images in [0, 1], and "
                             "normalise them afterwards")
        mu, _ = self.encode(x)
        codes = SimpleNamespace(mu=mu.float(), y=y, posterior=self.posterior)
        # In random order, so that the half that is decoded is any half of the batch.
        i = torch.randperm(len(x), device=x.device, generator=self.generator)
        j = partners(y, i, 0.3, self.generator)
        t = random_weights(len(x), 4, x.device, self.generator)
        points = line(codes.mu, i, j, t)
        made, q = make(points, codes, x, self.decode, rule=self.rule, cut=self.cut,
                       deform=self.deform, generator=self.generator)
        back = i.argsort()
        return made[back], q[back]


def entropy(q):
    """Of each row of q (M,K), in nats.

    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor([0.0000, 0.6931])
    """
    return torch.special.entr(q).sum(1)


# ---- command --------------------------------------------------------------------------------

def parse_args(argv=None):
    from common import flags, number
    parser = flags("hybrids.py", __doc__)
    add = parser.add_argument_group("hybrids").add_argument
    add("--count", type=number(int, 1, 2_000_000), default=20_000,
        help="number of hybrids to make")
    add("--strategy", choices=STRATEGIES, default="between",
        help="where latent points are drawn")
    add("--label", choices=LABELS, help="rule that gives the percentages; if not given, "
        "product, or density of points from the prior")
    add("--residual", action=argparse.BooleanOptionalAction, default=True,
        help="add what the decoder lost of the source images")
    add("--cut", action=argparse.BooleanOptionalAction,
        help="paste a rectangle of the second source into the first in place of mixing them; "
        "if not given, so of colour images")
    add("--deform", action=argparse.BooleanOptionalAction, default=True,
        help="move each hybrid as images of one class move, by the deformations of vae.pt")
    add("--export", type=Path, metavar="FOLDER",
        help="write PNG files and their labels.csv there as well")
    args = parser.parse_args(argv)
    if args.label is None:
        args.label = "density" if args.strategy == "prior" else "product"
    if args.strategy == "prior" and args.label != "density":
        parser.error(f"--label {args.label} needs points made of codes, not --strategy prior")
    return args


def gallery(figure, x, q, classes, rows=1, columns=9, title="What do the hybrids look like?"):
    """Images on a figure, their percentages below as a bar and as words."""
    import common
    from latent import words
    headline(figure, title)
    shown = common.spaced(len(q), min(len(q), rows * columns))
    if rows > 1:                        # a walk keeps its order
        shown = shown[q[shown].argmax(1).argsort(stable=True)]
    for axes, image, row in zip(figure.subplots(rows, columns).flat, x[shown], q[shown]):
        text = words(row, classes)
        if len(text) > 22:
            text = text.replace(" + ", " +\n")
        common.show_images(axes, image[None], 1, text)
        axes.xaxis.labelpad = 15                        # below the bar
        left = 0.0
        for c in row.argsort(descending=True)[:4].tolist():
            share = float(row[c])
            axes.barh(-0.09, share, 0.07, left, transform=axes.transAxes, clip_on=False,
                      color=common.COLOURS[c % 10], edgecolor="white", linewidth=0.5)
            left += share


def headline(figure, title):
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def draw(x, q, strip, strip_q, moved, how, classes):
    """A walk from one class to another, one image deformed, a gallery, the entropies."""
    import common
    fig = common.figure(13, 9.8)
    top, middle, bottom = fig.subfigures(3, 1, height_ratios=[1, 0.85, 3.1])
    left, side = bottom.subfigures(1, 2, width_ratios=[3, 1])
    start = classes[int(strip_q[0].argmax())]
    end = classes[int(strip_q[-1].argmax())]
    gallery(top, strip, strip_q, classes, title=f"What lies between {start} and {end}?")
    headline(middle, f"How may one {start} move?")
    captions = {0: "a training image", len(moved) // 2: how}
    for k, axes in enumerate(middle.subplots(1, len(moved))):
        common.show_images(axes, moved[[k]], 1, captions.get(k, ""))
    gallery(left, x, q, classes, 4, 7)
    axes = side.subplots()
    bits = entropy(q).cpu().numpy() / math.log(2)
    most = max(math.log2(len(classes)), 1)
    axes.hist(bits, bins=30, range=(0, most), color=common.COLOURS[0])
    common.tidy(axes, "How mixed are they?", "label entropy, bits", "hybrids")
    return fig


def earlier_export(folder) -> list:
    """The pictures in a folder that holds an earlier export and nothing else, or nothing."""
    import common
    manifest = folder / "labels.csv"
    ours = {manifest}
    if manifest.is_file():
        text = manifest.read_text("utf-8", "replace")
        names = re.findall(r"^\d{3}-[\w-]*/\d{6,}\.png(?=,)", text, re.MULTILINE)
        ours.update(folder / name for name in names)
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in files:
        common.require(path in ours and not path.is_symlink(), f"{path} is not of an earlier "
                       "export; --export takes a new or an empty folder")
    # The manifest stays until a new one takes its place: it says which pictures are ours.
    return [path for path in files if path != manifest]


def export(folder, x, q, classes):
    """PNG files in the folder of their likeliest class, percentages in labels.csv."""
    import common
    from PIL import Image
    folders = []
    for k, name in enumerate(classes):
        folders.append(f"{k:03}-" + re.sub(r"[^\w-]", "_", name)[:50])
    table = [["file", *classes]]
    for k, row in enumerate(q):
        name = f"{folders[int(row.argmax())]}/{k:06}.png"
        table.append([name, *(f"{p:.5f}" for p in row.tolist())])
    folder.mkdir(parents=True, exist_ok=True)
    common.write(folder / "labels.csv", table)          # first: it says what is ours
    for image, line in zip(x, table[1:]):
        path = folder / line[0]
        path.parent.mkdir(exist_ok=True)
        pixels = image.permute(1, 2, 0).squeeze(2).numpy()
        with common.create(path) as file:
            Image.fromarray(pixels).save(file, "png")


def walk(codes, generator, steps=9) -> Points:
    """Points on the line from the first code to one of another class."""
    device = codes.mu.device
    i = torch.zeros(steps, dtype=torch.long, device=device)
    j = partners(codes.y, i[:1], 0, generator)
    t = torch.linspace(1, 0, steps, device=device)
    return line(codes.mu, i, j.expand(steps), t)


def measure(points, x, q, encode, posterior) -> dict:
    """How mixed the labels are, and how far the percentages move if encoded again."""
    from latent import subsample
    some = subsample(len(x), 2000)
    mu, _ = encode(x[some])
    # Total variation between the percentages of a point and of the image made from it.
    moved = (posterior(mu) - posterior(points.z[some])).abs().sum(1) / 2
    entropies = entropy(q)
    histogram = entropies.histc(20, 0, math.log(q.shape[1]))
    return {"entropy": entropies.mean().item(), "temperature": posterior.temperature,
            "moved": moved.mean().item(), "top": q.amax(1).mean().item(),
            "histogram": histogram.tolist()}


def command(run, args):
    import common
    from latent import Codes
    from vae import VAE, Deformations, Morph, decode_all, encode_all
    earlier = earlier_export(args.export) if args.export else []
    upstream = common.load(run, "vae", run.device, VAE.restore)
    saved = common.load(run, "latent", run.device, Codes.restore, upstream)
    codes = Codes.restore(saved)
    model = VAE.restore(upstream, run.device)
    data = common.load_dataset(run, upstream)
    rows = upstream["rows"][saved["labels"] >= 0]
    images = data.take(rows)
    if args.cut is None:                # recorded as what is done
        args.cut = run.settings["cut"] = images.shape[1] == 3
    generator = torch.Generator(run.device).manual_seed(args.seed)
    encode = functools.partial(encode_all, model, amp=run.amp)
    decode = functools.partial(decode_all, model, amp=run.amp)
    deform = Deformations.restore(upstream, run.device)
    deformed_by = deform if args.deform else None
    morph, lines = registration(Morph, deformed_by, args.cut)
    points = sample(args.strategy, args.count, codes, generator, lines=lines)
    x, q = make(points, codes, images, decode, rule=args.label, residual=args.residual,
                cut=args.cut, morph=morph, deform=deformed_by, generator=generator)
    metrics = measure(points, x, q, encode, codes.posterior)
    x = x.cpu()
    q = q.cpu()

    strip = walk(codes, generator)
    if args.strategy == "prior":        # made as these are: decoded, labelled by density
        strip = Points(strip.z)
    # A cut draws its place anew for each image: nothing would move from one to the next.
    strip_x, strip_q = make(strip, codes, images, decode, rule=args.label,
                            residual=args.residual, cut=False, morph=morph, decoded=1)
    still = as_float(strip_x[:1])
    moved, _ = deform(still.expand(8, -1, -1, -1), None, generator)
    picture = draw(x, q, strip_x.cpu(), strip_q.cpu(), torch.cat([still, moved]),
                   deform.words(), common.legible(data.classes))
    common.write(run.out / "hybrids.png", picture)
    sources = [run.out / "vae.pt", run.out / "latent.pt"]
    flows = torch.zeros(1, *images.shape[2:], 2)        # of real images: they stand still
    if args.deform and deform.moves():
        flows = deform.repertoire(FLOWS, generator)
    common.save(run.out / "hybrids.pt", run, data, metrics, sources, images=x, q=q,
                z=points.z.cpu(), flows=flows.half().cpu())
    print(f"{len(x):,} hybrids ({args.strategy}, labelled by {args.label}): "
          f"{metrics['entropy'] / math.log(2):.2f} bits of label entropy on average;\n"
          f"encoded again, their percentages move by {metrics['moved']:.1%} on average")
    spread = int((rows >= len(data.images)).sum())
    if spread:
        print(f"made of {len(rows) - spread:,} images with a label and {spread:,} with one "
              "that was spread")
    if args.export:
        for file in earlier:
            file.unlink()
        export(args.export, x, q, data.classes)
        print(args.export / "labels.csv")
    print(run.out / "hybrids.png", run.out / "hybrids.pt", sep="\n")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
