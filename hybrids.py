"""Make hybrid images: decoded latent points, labelled with the percentages of their classes.

    python hybrids.py                                  # 20,000 hybrids -> runs/glyphs/hybrids.pt
    python hybrids.py --strategy prior --count 5000    # points from N(0, I): the idea at its purest
    python hybrids.py --export png                     # PNG files and labels.csv, for other tools

Reads:  vae.pt latent.pt and their data set.
Writes: hybrids.pt hybrids.json hybrids.png.
"""
import argparse
import csv
import io
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Letters: N codes, M points, D latent size, K classes.  x (M,C,H,W) in [0,1]; q (M,K).

STRATEGIES = ("between", "boundary", "same", "around", "prior")
LABELS = ("product", "density", "weight", "argmax", "sampled")

class Points(NamedTuple):
    """M latent points; those on lines between codes are z = t mu_i + (1-t) mu_j."""
    z: torch.Tensor                     # (M,D)
    i: torch.Tensor | None = None       # (M,) rows of the codes; None for points from the prior
    j: torch.Tensor | None = None
    t: torch.Tensor | None = None       # (M,) in [0,1]

def sample(strategy, count, mu, logvar, y, posterior, generator, alpha=4, same=0.3) -> Points:
    """Draw `count` points from codes mu, logvar (N,D) with labels y (N,).

    prior     z ~ N(0, I)
    around    z ~ q(z|x_i), a code and its own width
    between   on the line between two codes, t ~ Beta(alpha, alpha): a part `same` of them
              of one class, the others of two
    same      all of them of one class
    boundary  none of them; t uniform, thinned so that max q is spread evenly over [1/2, 1]
    """
    device = mu.device
    if strategy == "prior":
        return Points(torch.randn(count, mu.shape[1], device=device, generator=generator))
    if strategy == "boundary":
        points = sample("between", 8 * count, mu, logvar, y, posterior, generator, 1, same=0)
        top = posterior(points.z).amax(1)
        bins = ((top - 0.5) * 20).floor().long().clamp(-1, 9)           # ten bins over [1/2, 1]
        weight = (1 / (bins + 1).bincount(minlength=11).clamp(min=1))[bins + 1] * (bins >= 0)
        weight += float(not weight.any())                               # no point is that certain
        keep = torch.multinomial(weight, count, replacement=True, generator=generator)
        return Points(*(v[keep] for v in points))
    i = torch.randint(len(mu), (count,), device=device, generator=generator)
    if strategy == "around":
        noise = torch.randn(count, mu.shape[1], device=device, generator=generator)
        return Points(mu[i] + noise * (logvar[i] / 2).exp(), i, i, torch.ones(count, device=device))
    j = partners(y, i, 1 if strategy == "same" else same, generator)
    t = beta(mu[i], alpha, generator)
    return Points(torch.lerp(mu[j], mu[i], t[:, None]), i, j, t)

def beta(x, alpha, generator):
    """A draw from Beta(alpha, alpha) a row of x: the median of 2 alpha - 1 uniform numbers."""
    return torch.rand(len(x), 2 * alpha - 1, device=x.device, generator=generator).median(1).values

def partners(y, i, same, generator):
    """For each row i a random row j: with chance `same` of its class, or else of another one."""
    order, counts = y.argsort(stable=True), y.bincount()
    size, first = counts[y[i]], (counts.cumsum(0) - counts)[y[i]]
    chance, draw = torch.rand(2, len(i), device=y.device, generator=generator)
    alike = (chance < same) | (size == len(y))          # there may be no other class
    count = torch.where(alike, size, len(y) - size)
    place = first + (draw * count).long().clamp(max=count - 1)
    return order[torch.where(alike, place, place + size) % len(y)]     # past the block of y_i

def label(rule, points, y, posterior, generator=None, epsilon=0.1):
    """Class probabilities q (M,K) of points, by the named rule.

    density  q(c) = p(c|z), the latent posterior
    weight   q = t [c=y_i] + (1-t) [c=y_j], as mixup does (Zhang et al. 2018)
    product  a logarithmic opinion pool of the two (Genest and Zidek 1986):
             q(c) ~ [(1-e)(t [c=y_i] + (1-t) [c=y_j]) + e pi_c] (p(z|c) + b)^(1/T),
             e = 4 epsilon t (1-t), so that both ends are exactly one-hot
    argmax, sampled   hard labels from the density: the controls
    """
    if rule == "product" and points.i is not None or rule == "weight":
        if points.i is None:
            raise ValueError("points from the prior have no mixing weights; label them by density")
        classes, t = len(posterior.prior), points.t[:, None]
        q = t * F.one_hot(y[points.i], classes) + (1 - t) * F.one_hot(y[points.j], classes)
        if rule == "weight":
            return q
        e = 4 * epsilon * t * (1 - t)
        mixed, evidence = (1 - e) * q + e * posterior.prior, posterior(points.z).clamp(min=1e-30)
        product = mixed * evidence / posterior.prior.clamp(min=1e-30)      # q(c|z) / pi_c
        return product / product.sum(1, keepdim=True)
    q = posterior(points.z)
    if rule not in ("argmax", "sampled"):
        return q
    hard = q.argmax(1) if rule == "argmax" else torch.multinomial(q, 1, generator=generator)[:, 0]
    return F.one_hot(hard, q.shape[1]).float()

def rectangles(t, height, width, generator):
    """(M,1,height,width): 0 in a rectangle of area 1-t (M,), to whole pixels, 1 elsewhere."""
    side, corner = (1 - t).sqrt(), torch.rand(2, len(t), device=t.device, generator=generator)
    rows, columns = (((torch.arange(size, device=t.device) + 0.5) / size - at[:, None]
                      - side[:, None] / 2).abs() < side[:, None] / 2
                     for size, at in zip((height, width), corner * (1 - side)))
    return 1.0 - (rows[:, None, :, None] & columns[:, None, None, :]).float()

def render(points, decode, mu, images, residual=True, pixels=0.0, cut=None,
           generator=None, batch=1000):
    """Images (M,C,H,W) of points: decode(z), plus what the decoder lost of their sources.

    x = decode(z) + w (x_i - decode(mu_i)) + (1-w) (x_j - decode(mu_j)), clipped; at z = mu_i it
    is x_i, so no sharpness is lost. w is t, or with `cut` (None: of colour images) 0 in a
    rectangle drawn from `generator`, of area 1-t, and 1 elsewhere. The last points, the part
    `pixels` of all, are w x_i + (1-w) x_j, never decoded. Points from the prior, and all without
    `residual`, are decode(z). `images`, uint8 or float in [0,1], are the sources of mu.
    """
    whole = images.dtype == torch.uint8
    like = lambda x: (x * 255).round().byte() if whole else x.to(images.dtype)
    if not residual or points.i is None:
        return torch.cat([like(decode(z)) for z in points.z.split(batch)])
    cut = images.shape[1] == 3 if cut is None else cut
    said = round((1 - pixels) * len(points.z))          # so many are decoded
    used, place = torch.cat([points.i[:said], points.j[:said]]).unique(return_inverse=True)
    known = torch.cat([decode(mu[k]).to(torch.half if whole else images.dtype)
                       for k in used.split(batch)])
    mix = lambda a, b, w: w * a + (1 - w) * b
    source, place, out = lambda k: images[k] / (255 if whole else 1), place.view(2, said), []
    for rows in torch.arange(len(points.z), device=mu.device).split(batch):
        t = points.t[rows]
        w = rectangles(t, *images.shape[2:], generator) if cut else t[:, None, None, None]
        x = mix(source(points.i[rows]), source(points.j[rows]), w)
        rows = rows[rows < said]
        x[:len(rows)] += decode(points.z[rows]) - mix(*known[place[:, rows]], w[:len(rows)])
        out.append(like(x.clamp(0, 1)))
    return torch.cat(out)

class HybridMixer:
    """mixer(x, y) -> x, q: hybrids of a batch, where torchvision.transforms.v2.MixUp stood.

    Between the codes of each image and another one of the batch, as hybrids.py by default; `cut`
    as of `render`. encode: x (B,C,H,W) in [0,1] -> mu, logvar (B,D); decode: z (B,D) -> images;
    posterior: z -> q (B,K), as latent.teach makes it. x float in [0,1], y integer labels (B,).
    """
    def __init__(self, encode, decode, posterior, rule="product", generator=None, cut=None):
        self.encode, self.decode, self.posterior = encode, decode, posterior
        self.rule, self.generator, self.cut = rule, generator, cut

    @torch.no_grad()
    def __call__(self, x, y):
        mu, i = self.encode(x)[0], torch.randperm(len(x), device=x.device, generator=self.generator)
        j, t = partners(y, i, 0.3, self.generator), beta(x, 4, self.generator)
        points = Points(torch.lerp(mu[j], mu[i], t[:, None]), i, j, t)
        q = label(self.rule, points, y, self.posterior, self.generator)
        made = render(points, self.decode, mu, x, True, 0.5, self.cut, self.generator)
        return made[i.argsort()], q[i.argsort()]

def entropy(q):
    """Of each row of q (M,K), in nats.
    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor([0.0000, 0.6931])"""
    return torch.special.entr(q).sum(1)

# ---- command ---------------------------------------------------------------------------------
def parse_args(argv=None):
    import common
    parser = common.flags("hybrids.py", __doc__)
    add = parser.add_argument_group("hybrids").add_argument
    add("--count", type=common.number(int, 1, 2_000_000), default=20_000, help="how many")
    add("--strategy", choices=STRATEGIES, default="between", help="where to sample")
    add("--label", choices=LABELS, help="how to label; else product, or density of prior points")
    add("--residual", action=argparse.BooleanOptionalAction, default=True,
        help="add what the decoder lost of the source images")
    add("--pixels", type=common.number(float, 0, 1), default=0.5, help="the last part of them is "
        "made of pixels, not decoded (none of around, prior and --no-residual)")
    add("--cut", action=argparse.BooleanOptionalAction, help="paste a rectangle of "
        "the second source into the first, do not mix them; without it so of colour images")
    add("--export", type=Path, metavar="DIR", help="also PNG files, and their labels.csv")
    args = parser.parse_args(argv)
    args.label = args.label or ("density" if args.strategy == "prior" else "product")
    args.pixels *= args.residual and args.strategy not in ("around", "prior")
    if args.strategy == "prior" and args.label in ("product", "weight"):
        parser.error(f"--label {args.label} needs points made of codes, not --strategy prior")
    return args

def gallery(figure, x, q, classes, rows=1, columns=9, title="What do the hybrids look like?"):
    """The first images on a figure, their percentages below as a bar and as words."""
    from latent import words
    from vae import COLOURS, picture
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    shown = torch.linspace(0, len(q) - 1, min(len(q), rows * columns)).long()
    if rows > 1:                        # a walk keeps its order
        shown = shown[q[shown].argmax(1).argsort(stable=True)]
    for axes, image, row in zip(figure.subplots(rows, columns).flat, x[shown], q[shown]):
        text, left = words(row, classes), 0.0
        picture(axes, image[None], 1, text.replace(" + ", " +\n") if len(text) > 22 else text)
        axes.xaxis.labelpad = 15                    # below the bar
        for c in row.argsort(descending=True)[:4].tolist():
            axes.barh(-0.09, float(row[c]), 0.07, left, transform=axes.transAxes, clip_on=False,
                      color=COLOURS[c % 10], edgecolor="white", linewidth=0.5)
            left += float(row[c])

def draw(x, q, strip, strip_q, classes):
    """A walk from one class to another, a gallery sorted the same way, the entropies."""
    from vae import COLOURS, figure, tidy
    fig = figure(13, 8.6)
    top, bottom = fig.subfigures(2, 1, height_ratios=[1, 3.1])
    left, side = bottom.subfigures(1, 2, width_ratios=[3, 1])
    gallery(top, strip, strip_q, classes, title=f"What lies between "
            f"{classes[int(strip_q[0].argmax())]} and {classes[int(strip_q[-1].argmax())]}?")
    gallery(left, x, q, classes, 4, 7)
    axes = side.subplots()
    bits = entropy(q).cpu().numpy() / math.log(2)
    axes.hist(bits, bins=30, range=(0, max(math.log2(len(classes)), 1)), color=COLOURS[0])
    tidy(axes, "How mixed are they?", "label entropy, bits", "hybrids")
    return fig

def export(folder, x, q, classes):
    """PNG files in the folder of their likeliest class, and labels.csv with the percentages."""
    from PIL import Image
    table = csv.writer(text := io.StringIO(), lineterminator="\n")
    table.writerow(["file", *classes])
    for old in folder.glob("[0-9][0-9][0-9]-*/[0-9]*.png"):     # of an earlier export
        old.unlink()
    folders = [f"{k:03}-" + re.sub(r"[^\w-]", "_", c) for k, c in enumerate(classes)]
    for k, (image, row) in enumerate(zip(x.cpu(), q.cpu())):
        name = f"{folders[int(row.argmax())]}/{k:06}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(folder / name)
        table.writerow([name, *(f"{p:.5f}" for p in row.tolist())])
    return text.getvalue()

def command(args):
    import common
    from latent import Aggregate
    from vae import decode_all, encode_all, load_vae
    device, amp = common.start(args)
    (model, upstream), latent = load_vae(args, device), common.load(args, "latent", device)
    data = common.load_dataset(args, device, upstream)
    posterior = Aggregate(**latent["teaching"])
    images, y = data.images[upstream["rows"].to(device)], latent["labels"]
    mu, logvar = latent["mu"], latent["logvar"]
    generator = torch.Generator(device).manual_seed(args.seed)

    def make(points, pixels=0.0, cut=False):
        x = render(points, lambda z: decode_all(model, z, amp), mu, images, args.residual, pixels,
                   cut, generator)
        return x, label(args.label, points, y, posterior, generator)

    points = sample(args.strategy, args.count, mu, logvar, y, posterior, generator)
    args.cut = len(images[0]) == 3 if args.cut is None else args.cut
    x, q = make(points, args.pixels, args.cut)
    moved = (posterior(encode_all(model, x, amp)[0]) - posterior(points.z)).abs().sum(1) / 2
    metrics = {"entropy": entropy(q).mean().item(), "temperature": posterior.temperature,
               "moved": moved.mean().item(), "top": q.amax(1).mean().item(),
               "histogram": entropy(q).histc(20, 0, math.log(len(data.classes))).tolist()}
    i = torch.zeros(9, dtype=torch.long, device=device)     # a walk to a code of another class
    j = partners(y, i[:1], 0, generator).expand(9)
    t = torch.linspace(1, 0, 9, device=device)
    strip = Points(torch.lerp(mu[j], mu[i], t[:, None]), *[i, j, t] * (args.strategy != "prior"))
    strip_x, strip_q = make(strip)
    common.write(args.out / "hybrids.png",
                 draw(x.cpu(), q.cpu(), strip_x.cpu(), strip_q.cpu(), data.classes))
    common.save(args.out / "hybrids.pt", args, data, metrics, [
        args.out / "vae.pt", args.out / "latent.pt"], images=x.cpu(), q=q.cpu(), z=points.z.cpu())
    print(f"{len(x):,} hybrids ({args.strategy}, labelled by {args.label}): "
          f"{metrics['entropy'] / math.log(2):.2f} bits of label entropy on average;\n"
          f"encoded again, their percentages move by {metrics['moved']:.1%} on average")
    if args.export:
        common.write(args.export / "labels.csv", export(args.export, x, q, data.classes))
        print(args.export / "labels.csv")
    print(args.out / "hybrids.png", args.out / "hybrids.pt", sep="\n")

def main(argv=None) -> int:
    import common
    return common.guard(command, parse_args(argv))

if __name__ == "__main__":
    raise SystemExit(main())
