"""Make hybrid images: decoded latent points, labelled with the percentages of their classes.

    python hybrids.py                                # 20,000 hybrids -> runs/glyphs/hybrids.pt
    python hybrids.py --strategy prior --count 5000    # points from N(0, I): the idea as such
    python hybrids.py --export png                  # PNG files and labels.csv, for other tools

Reads:  vae.pt latent.pt and their data set; deform.pt, unless --no-deform.
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
# `codes` is latent.Codes or has its mu, logvar (N,D), y (N,) and its posterior: z (M,D) ->
# q (M,K), with a prior (K,).  `moves` is deform.Deformations, or None: nothing moves.  In
# place of images there may be features (N,F), of any numbers; then x is (M,F).

STRATEGIES = ("between", "around", "prior", "images")
RULES = ("product", "density", "weight")
COUNT = 20_000                          # hybrids, unless told otherwise
MIXED = 0.9                             # of one class: a hybrid of less is mixed
LINES = 2000                            # most pairs that are brought into register


class Points(NamedTuple):
    """M latent points; those on lines between codes are z = t mu_i + (1-t) mu_j."""
    z: torch.Tensor                     # (M,D)
    i: torch.Tensor | None = None       # (M,) places of codes; None for points from the prior
    j: torch.Tensor | None = None
    t: torch.Tensor | None = None       # (M,) in [0,1]
    decoded: torch.Tensor | None = None         # (M,) bool: by the decoder, or without it


class Hybrids(NamedTuple):
    """What `make` makes."""
    x: torch.Tensor                     # (M,C,H,W) as the images
    q: torch.Tensor                     # (M,K)
    points: Points


def make(codes, images, decode, *, strategy="between", count=COUNT, rule=None,
         residual=True, cut=None, moves=None, register=True, generator=None) -> Hybrids:
    """Hybrids of images (N,C,H,W), uint8 or float in [0,1], which have the codes.

    See `sample` for strategies, `label` for rules, `render` for `residual` and `cut` (None: of
    colour images). `decode`: z (M,D) -> images. With `moves` hybrids move as images do and,
    if they are mixed and `register`, their sources are brought into register first.
    """
    if cut is None:
        cut = is_colour(images)
    morph = None
    lines = count
    mixed = strategy == "between" and not cut
    if mixed and register and moves is not None and moves.strength > 0:
        morph = moves.morph
        lines = LINES                   # each line is registered once, at a cost
    points = sample(strategy, count, codes, generator, lines=lines)
    rule = rule or default_rule(strategy, images)
    return make_at(points, codes, images, decode, rule=rule, residual=residual, cut=cut,
                   morph=morph, moves=moves, generator=generator)


def make_at(points, codes, images, decode, *, rule="product", residual=True, cut=False,
            morph=None, moves=None, generator=None, batch=1000) -> Hybrids:
    """As `make`, of points that are there already."""
    q = label(rule, points, codes)
    x = render(points, codes, images, decode, residual, cut, morph, generator, batch)
    if moves is not None:               # it has the last word: each moves in its own way
        parts = []
        for some in x.split(batch):
            moved, _ = moves(as_float(some), None, generator)
            parts.append(as_dtype(moved, x.dtype))
        x = torch.cat(parts)
    return Hybrids(x, q, points)


def default_rule(strategy, images) -> str:
    """How hybrids are labelled, unless told otherwise.

    Points from the prior have no weights, and between features the density knows more. A code
    as it is has the label of its image.
    """
    mixed_features = images.dim() == 2 and strategy != "images"
    return "density" if strategy == "prior" or mixed_features else "product"


def are_soft(strategy, rule):
    """Whether pseudo-labels beside such hybrids are soft; None: see latent.pseudo_labels."""
    return rule == "density" if strategy == "images" else None


def sample(strategy, count, codes, generator, same=0.3, lines=None) -> Points:
    """Draw `count` points.

    prior     z ~ N(0, I)
    around    z ~ q(z|x_i), a code and its own width
    images    z = mu_i, codes as they are
    between   on lines between two codes, t ~ Beta(4, 4): a part `same` of the lines within
              one class, the others between two; at most `lines` of them, if given; every
              other point, at random, is decoded
    """
    mu = codes.mu.float()
    size, dim = mu.shape
    source = {"device": mu.device, "generator": generator}      # of random numbers
    if strategy == "between":
        i = torch.randint(size, (min(lines or count, count),), **source)
        return between(codes, i, count, generator, same)
    decoded = torch.full((count,), strategy != "images", device=mu.device)
    if strategy == "prior":
        return Points(torch.randn(count, dim, **source), decoded=decoded)
    i = torch.randint(size, (count,), **source)
    z = mu[i]
    if strategy == "around":
        width = (codes.logvar[i].float() / 2).exp()
        z = z + width * torch.randn(count, dim, **source)
    return Points(z, i, i, torch.ones(count, device=mu.device), decoded)


def between(codes, i, count, generator, same=0.3) -> Points:
    """`count` points on as many lines as there are rows i of codes, see `sample`."""
    j = partners(codes.y, i, same, generator)
    t = random_weights(count, 4, i.device, generator)
    which = torch.arange(count, device=i.device) % len(i)       # each line has several points
    decoded = torch.rand(count, device=i.device, generator=generator) < 0.5
    return interpolate(codes.mu.float(), i[which], j[which], t, decoded)


def interpolate(mu, i, j, t, decoded) -> Points:
    """The points z = t mu_i + (1-t) mu_j; exactly a code at both ends."""
    z = torch.lerp(mu[j], mu[i], t[:, None])
    return Points(z, i, j, t, decoded)


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
    if rule not in RULES:
        raise ValueError(f"no rule {rule!r}; there are {', '.join(RULES)}")
    if rule == "density":
        return codes.posterior(points.z)
    if points.i is None:
        raise ValueError("points from the prior have no mixing weights; label them by density")
    prior = codes.posterior.prior
    one_hot = F.one_hot(codes.y.long(), len(prior))
    t = points.t[:, None]
    weight = t * one_hot[points.i] + (1 - t) * one_hot[points.j]
    if rule == "weight":
        return weight
    doubt = 4 * epsilon * t * (1 - t)   # a third class may lie between the two
    mixed = (1 - doubt) * weight + doubt * prior
    # Where t is 0 or 1 one class is left: its evidence, too, must not be 0, for 0 / 0 is none.
    evidence = codes.posterior(points.z).clamp(min=1e-30) / prior.clamp(min=1e-30)
    product = mixed * evidence
    return product / product.sum(1, keepdim=True)


def render(points, codes, images, decode, residual=True, cut=False, morph=None,
           generator=None, batch=1000):
    """Images (M,C,H,W) of points: decode(z), plus what the decoder lost of their sources.

    x = decode(z) + w (x_i - decode(mu_i)) + (1-w) (x_j - decode(mu_j)), clipped; at z = mu_i
    it is x_i, so no sharpness is lost. Points that are not `decoded` do without the decoder,
    which may know little: x = w x_i + (1-w) x_j. w is t. With `morph`, as of
    deform.Deformations, parts of both images are moved to where they meet before they are
    added; with `cut` w is 0 in a rectangle drawn from `generator`, of area 1-t, and 1
    elsewhere. Points from the prior, and all without `residual`, are decode(z).
    """
    if points.i is None or not residual:
        made = [as_dtype(decode(z), images.dtype) for z in points.z.split(batch)]
        return torch.cat(made)
    # Each source is looked at once, however many points have it.
    used, ends = torch.stack([points.i, points.j]).unique(return_inverse=True)
    sources = images[used]
    lost = residuals(codes.mu[used], sources, decode, batch)
    meet = None
    if morph and not cut:               # likewise each pair
        pairs, which = ends.unique(dim=1, return_inverse=True)
        meet = morph(*as_float(sources[pairs]))
    parts = []
    for rows in torch.arange(len(points.z), device=sources.device).split(batch):
        t = points.t[rows]
        decoded = points.decoded[rows]
        shaped = decoded.view(-1, *[1] * (images.dim() - 1))
        pair = ends[:, rows]
        plain = as_float(sources[pair]).float()
        a, b = lost[pair].float().where(shaped, plain)
        w = t.view(shaped.shape)
        if cut:
            w = rectangles(t, *images.shape[2:], generator)
        elif meet:
            a, b = meet(a, b, which[rows], t)
        x = w * a + (1 - w) * b
        x[decoded] += decode(points.z[rows][decoded])
        if images.dim() == 4:
            x = x.clamp(0, 1)
        parts.append(as_dtype(x, images.dtype))
    return torch.cat(parts)


def is_colour(images) -> bool:
    return images.dim() == 4 and images.shape[1] == 3


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


@dataclass(eq=False)
class HybridMixer:
    """mixer(x, y) -> x, q: hybrids of a batch, where torchvision.transforms.v2.MixUp stood.

    Between the codes of each image and another one of the batch; `rule`, `cut` and `moves` as
    of `make`. encode: x (B,C,H,W) in [0,1] -> mu, logvar (B,D); decode: z (B,D) -> images;
    posterior: z -> q (B,K), as latent.fit_labeller makes it. x float in [0,1] or uint8, y
    integer labels (B,), 0..K-1. In the workers of a DataLoader each draws numbers of its own.
    Raises ValueError for a batch that has been normalised, or other labels.
    """
    encode: Callable
    decode: Callable
    posterior: Callable
    rule: str = "product"
    generator: torch.Generator | None = None
    cut: bool | None = None
    moves: Callable | None = None

    @torch.no_grad()
    def __call__(self, x, y):
        x = as_float(x)
        low, high = x.aminmax()
        if x.dim() == 4 and not (low >= 0 and high <= 1):
            raise ValueError(f"the batch spans {low:g} to {high:g}; mix images in [0, 1], and "
                             "normalise them afterwards")
        classes = len(self.posterior.prior)
        whole = y.shape == x.shape[:1] and not y.is_floating_point()
        if not whole or y.min() < 0 or y.max() >= classes:
            raise ValueError(f"labels of shape {tuple(y.shape)}, {y.dtype}; wanted one "
                             f"integer an image, in 0..{classes - 1}")
        reseed(self.generator)
        mu, _ = self.encode(x)
        codes = SimpleNamespace(mu=mu, y=y.long(), posterior=self.posterior)
        every = torch.arange(len(x), device=x.device)
        points = between(codes, every, len(x), self.generator)
        cut = is_colour(x) if self.cut is None else self.cut
        made = make_at(points, codes, x, self.decode, rule=self.rule, cut=cut,
                       moves=self.moves, generator=self.generator)
        return made.x, made.q


def reseed(generator):
    """The workers of a DataLoader have copies of a generator: each gets a seed of its own."""
    worker = torch.utils.data.get_worker_info()
    if worker and generator and generator.initial_seed() != worker.seed:
        generator.manual_seed(worker.seed)


# ---- command --------------------------------------------------------------------------------

def parse_args(argv=None):
    from common import flags, number
    parser = flags("hybrids.py", __doc__)
    add = parser.add_argument_group("hybrids").add_argument
    add("--count", type=number(int, 1, 2_000_000), default=COUNT,
        help="number of hybrids to make")
    add("--strategy", choices=STRATEGIES, default="between",
        help="where latent points are drawn")
    add("--label", choices=RULES, help="rule that gives the percentages; if not given, "
        "product, or density of features and of points from the prior")
    add("--residual", action=argparse.BooleanOptionalAction, default=True,
        help="add what the decoder lost of the source images")
    add("--cut", action=argparse.BooleanOptionalAction,
        help="paste a rectangle of the second source into the first in place of mixing them; "
        "if not given, so of colour images")
    add("--deform", action=argparse.BooleanOptionalAction, default=True,
        help="move hybrids as images of one class move, and later real images, too")
    add("--export", type=Path, metavar="FOLDER",
        help="write PNG files and their labels.csv there as well")
    args = parser.parse_args(argv)
    if args.strategy == "prior" and args.label not in (None, "density"):
        parser.error(f"--label {args.label} needs points made of codes, not --strategy prior")
    return args


def gallery(figure, x, q, classes, rows=1, columns=9, title="What do the hybrids look like?"):
    """Images on a figure, their percentages below as a bar and as words.

    Where there are more than places, some mixed ones, in the order of their classes.
    """
    import common
    from latent import words
    shown = torch.arange(len(q))
    if len(q) > rows * columns:
        share = (q.amax(1) < MIXED).float().mean()
        title += f"  {share:.0%} are less than {MIXED:.0%} one class; some of these"
        shown = mixed_rows(q, rows * columns)
        shown = shown[q[shown].argmax(1).argsort(stable=True)]
    headline(figure, title)
    for axes, image, row in zip(figure.subplots(rows, columns).flat, x[shown], q[shown]):
        text = words(row, classes)
        if len(text) > 22:
            text = text.replace(" + ", " +\n")
        common.show_images(axes, image[None], 1, text)
        axes.xaxis.labelpad = 15                        # below the bar
        share, c = row.topk(min(4, len(row)))
        colours = [common.COLOURS[k % 10] for k in c.tolist()]
        axes.barh(-0.09, share, 0.07, share.cumsum(0) - share, transform=axes.transAxes,
                  clip_on=False, color=colours, edgecolor="white", linewidth=0.5)


def mixed_rows(q, count):
    """`count` rows of q (M,K) that are less than MIXED one class, or else the most mixed."""
    import common
    top = q.amax(1)
    most = max(count, int((top < MIXED).sum()))
    mixed = top.argsort()[:most].sort()[0]
    return mixed[common.spaced(len(mixed), min(count, len(mixed)))]


def headline(figure, title):
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def draw(x, q, strip, strip_q, moved, how, classes):
    """A walk from one class to another, one image deformed, a gallery."""
    import common
    fig = common.figure(13, 9.8)
    top, middle, bottom = fig.subfigures(3, 1, height_ratios=[1, 0.85, 3.1])
    start = classes[int(strip_q[0].argmax())]
    end = classes[int(strip_q[-1].argmax())]
    gallery(top, strip, strip_q, classes, title=f"What lies between {start} and {end}?")
    headline(middle, f"How may one {start} move?")
    captions = {0: "a training image", len(moved) // 2: how}
    for k, axes in enumerate(middle.subplots(1, len(moved))):
        common.show_images(axes, moved[[k]], 1, captions.get(k, ""))
    gallery(bottom, x, q, classes, 4, 9)
    return fig


def check_export(folder: Path, dataset):
    """Make the folder of an export: new or empty, and no part of the data set."""
    import common
    inside = folder.resolve().is_relative_to(Path(dataset).resolve())
    of_pictures = dataset not in common.NAMES and Path(dataset).is_dir()
    common.require(not (inside and of_pictures),
                   f"{folder} is inside the data set {dataset}; give --export another folder")
    folder.mkdir(parents=True, exist_ok=True)
    files = [path for path in folder.iterdir() if not common.is_hidden(path)]
    common.require(not files, f"{folder} is not empty; --export takes a new or an empty one")


def export(folder, x, q, classes):
    """PNG files in the folder of their likeliest class, percentages in labels.csv."""
    import common
    from PIL import Image
    folders = []
    for c, name in enumerate(classes):
        short = re.sub(r"[^\w-]", "_", name)[:50]
        folders.append(f"{c:03}-{short}")
    table = [common.columns(["file"], classes)]
    for k, (image, row) in enumerate(zip(x, q)):
        file = Path(folders[int(row.argmax())], f"{k:06}.png")
        (folder / file.parent).mkdir(exist_ok=True)
        pixels = image.permute(1, 2, 0).squeeze(2)
        Image.fromarray(pixels.numpy()).save(folder / file)
        table.append([file.as_posix(), *(f"{p:.5f}" for p in row.tolist())])
    common.write(folder / "labels.csv", table)


def measure(made, encode, posterior) -> dict:
    """How mixed the labels are, and how far the percentages move if encoded again."""
    from latent import subsample
    some = subsample(len(made.x), 2000)
    mu, _ = encode(made.x[some])
    # Total variation between the percentages of a point and of the image made from it.
    moved = posterior(mu) - posterior(made.points.z[some])
    moved = moved.abs().sum(1) / 2
    entropy = torch.special.entr(made.q).sum(1)         # of each label, in nats
    mixed = made.q.amax(1) < MIXED
    return {"entropy": entropy.mean().item(), "moved": moved.mean().item(),
            "mixed": mixed.float().mean().item()}


def pictures(codes, images, decode, made, moves, strategy, rule, residual, classes, seed):
    """The figure of made hybrids; its random numbers are its own."""
    generator = torch.Generator(images.device).manual_seed(seed)
    # A walk from the first image to one of another class, all of it decoded.
    i = torch.zeros(9, dtype=torch.long, device=images.device)
    j = partners(codes.y, i[:1], 0, generator).expand(9)
    t = torch.linspace(1, 0, 9, device=images.device)
    strip = interpolate(codes.mu, i, j, t, torch.ones_like(i, dtype=torch.bool))
    if strategy == "prior":             # made as these are: decoded, labelled by density
        strip = Points(strip.z, decoded=strip.decoded)
    # A cut draws its place anew for each image: nothing would move from one to the next.
    morph = moves.morph if moves is not None and moves.strength > 0 else None
    shown = make_at(strip, codes, images, decode, rule=rule, residual=residual,
                    morph=morph)
    moved = as_float(shown.x[:1]).expand(9, -1, -1, -1)
    how = "it does not"
    if moves is not None:
        others, _ = moves(moved[1:], None, generator)
        moved = torch.cat([moved[:1], others])
        how = moves.words()
    return draw(made.x.cpu(), made.q.cpu(), shown.x.cpu(), shown.q.cpu(),
                moved.cpu(), how, classes)


def draw_features(data, made, painted, codes, q, classes, groups=12, side=96):
    """Hybrids of features, painted, each beside the two photographs whose codes are nearest.

    painted (M,C,h,w) are pictures of the points, q (N,K) the percentages of the codes.
    """
    import common
    shown = mixed_rows(made.q, groups)
    distance = torch.cdist(made.points.z[shown], codes.mu.float())
    nearest = distance.topk(2, largest=False).indices
    images = []
    shares = []
    for row, near in zip(shown.tolist(), nearest):
        image = F.interpolate(painted[[row]] / 255, (side, side), mode="bicubic")[0]
        images.append(image.clamp(0, 1).expand(3, -1, -1))
        shares.append(made.q[row].cpu())
        for place in near.tolist():
            photograph = data.original(int(codes.rows[place]))
            images.append(common.square(photograph, side))
            shares.append(q[place].cpu())
    fig = common.figure(13, 8)
    gallery(fig, torch.stack(images), torch.stack(shares), classes, groups // 3, 9,
            "What is a hybrid like?  A point between two codes, as far as it can be painted, "
            "and the two photographs nearest to it")
    return fig


def command(run, args):
    import common
    from deform import Deformations
    from latent import Codes, pseudo_labels
    from vae import decode_all, encode_all, restore
    upstream = common.load(run, "vae", run.device)
    saved = common.load(run, "latent", run.device)
    data = common.load_dataset(run)
    of_features = data.features is not None
    common.require(not (of_features and args.cut), "features cannot be cut; leave out --cut")
    if args.export:
        check_export(args.export, run.dataset)
    sources = [run.out / "vae.pt", run.out / "latent.pt"]
    moves = None
    if args.deform and not of_features:
        moves = Deformations.restore(common.load(run, "deform", run.device))
        sources.append(run.out / "deform.pt")
    run.settings["deform"] = moves is not None          # cnn.py moves real images, too
    codes = Codes.restore(saved)
    guessed, pseudo = pseudo_labels(codes, are_soft(args.strategy, args.label))
    content = {"pseudo_rows": codes.rows[guessed].cpu(), "pseudo_labels": pseudo.cpu()}
    codes = codes.known()
    model = restore(upstream, run.device)
    images = common.Inputs(data, upstream["rows"])[codes.rows]          # or features
    rule = args.label or default_rule(args.strategy, images)
    encode = functools.partial(encode_all, model, amp=run.amp)
    decode = functools.partial(decode_all, model, amp=run.amp)
    generator = torch.Generator(run.device).manual_seed(run.seed)
    made = make(codes, images, decode, strategy=args.strategy, count=args.count,
                rule=rule, residual=args.residual, cut=args.cut, moves=moves,
                generator=generator)

    metrics = measure(made, encode, codes.posterior)
    classes = common.legible(data.classes)
    content.update(images=made.x.cpu(), q=made.q.cpu(), z=made.points.z.cpu())
    if of_features:
        painter = restore(upstream["painter"], run.device)
        painted = as_dtype(decode_all(painter, made.points.z, run.amp), torch.uint8).cpu()
        content.update(images=painted, features=made.x.cpu())
        q = saved["q"][saved["y"] >= 0]
        picture = draw_features(data, made, painted, codes, q, classes)
    else:
        picture = pictures(codes, images, decode, made, moves, args.strategy, rule,
                           args.residual, classes, run.seed)
    common.write(run.out / "hybrids.png", picture)
    common.save(run.out / "hybrids.pt", run, data, metrics, sources, **content)
    bits = metrics["entropy"] / math.log(2)
    print(f"{len(made.x):,} hybrids ({args.strategy}, labelled by {rule}), "
          f"{metrics['mixed']:.0%} of them less than 90% one class: {bits:.2f} bits of label "
          "entropy on average;\nencoded again, their percentages move by "
          f"{metrics['moved']:.1%} on average")
    if args.export:
        export(args.export, content["images"], content["q"], data.classes)
        print(args.export / "labels.csv")
    print(run.out / "hybrids.png", run.out / "hybrids.pt", sep="\n")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
