"""Class percentages of any point of the latent space: "20% cat + 80% dog".

    python latent.py                              # runs/glyphs/vae.pt -> runs/glyphs/latent.pt
    python latent.py -o runs/mnist --image seven.png   # the percentages of a picture
    python latent.py -o runs/mnist --point=-0.3,1.2,...      # of a latent point, D numbers

Reads:  vae.pt and its data set.
Writes: latent.pt latent.json latent.png.
"""
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Letters: N codes, M points, D latent size, K classes.  mu, logvar (N,D); y (N,); q (M,K).
LOG_2PI = math.log(2 * math.pi)


class Posterior:
    """q(c|z) ~ pi_c (p(z|c) + b)^(1/T): Bayes' rule with a floor b and a temperature T.

    Far from every cluster p(z|c) sinks below b, and q becomes the class priors, not a false
    certainty. An image has a floor of its own: its density is an integral over its width, and
    each dimension that the VAE leaves unused makes that smaller than the density of a point.
    Subclasses give log p(z|c); all work is in log space.
    """

    def __init__(self, prior, log_floor=-math.inf, temperature=1.0, image_floor=None):
        self.prior = prior                              # (K,)
        self.log_floor = log_floor
        self.image_floor = log_floor if image_floor is None else image_floor
        self.temperature = temperature

    def __call__(self, z, logvar=None):
        """q (M,K) of points z (M,D); of images, if their encoder's logvar (M,D) is given."""
        if logvar is None:
            return self.weigh(self.log_density(z.float()), self.log_floor)
        log_density = self.log_density(z.float(), logvar.float())
        return self.weigh(log_density, self.image_floor)

    def weigh(self, log_density, floor):
        """q (M,K) from log p(z|c) (M,K) and log b."""
        evidence = floored(log_density, floor) / self.temperature
        return (self.prior.log() + evidence).softmax(1)

    def set_floors(self, of_points, of_images, quantile):
        """b = a low quantile of the codes' own densities, from log p(z_i|c) (M,K)."""
        self.log_floor = self.low_quantile(of_points, quantile)
        self.image_floor = self.low_quantile(of_images, quantile)

    def low_quantile(self, log_density, quantile):
        marginal = (log_density + self.prior.log()).logsumexp(1)
        finite = marginal[marginal.isfinite()]          # a code alone in its class has none
        return float(finite.quantile(quantile)) if len(finite) else -math.inf


def floored(log_density, floor):
    """log(p(z|c) + b) (M,K)."""
    return torch.logaddexp(log_density, torch.full_like(log_density, floor))


class Aggregate(Posterior):
    """p(z|c) = mean over codes i of class c of N(z; mu_i, diag(sigma_i^2 + h_c^2)).

    The aggregate posterior of a class (Makhzani et al. 2015), widened by a bandwidth
    h_cd = a s_d n_c^(-1/(D+4)) (Scott 1992): the encoder's own width is overconfident on
    unseen codes.
    """

    def __init__(self, mu, variance, counts, prior, **floors):
        super().__init__(prior, **floors)
        self.mu = mu                                    # (N,D), sorted by class
        self.variance = variance                        # (N,D)
        self.counts = counts                            # K numbers of codes

    @classmethod
    def fit(cls, mu, logvar, y, classes, bandwidth=1.0, quantile=0.001):
        """From codes mu, logvar (N,D) and labels y (N,) in 0..classes-1."""
        order = y.argsort(stable=True)
        mu = mu[order].float()
        logvar = logvar[order].float()
        y = y[order].long()
        counts = y.bincount(minlength=classes)
        total = (mu - mu.mean(0)).square().mean(0)
        own_mean = class_means(mu, y, classes)[y]
        within = (mu - own_mean).square().sum(0)
        # One pseudo-observation of the total variance, for classes of one image each.
        freedom = len(y) - len(y.unique()) + 1
        s = ((within + total) / freedom).sqrt()
        n = counts.clamp(min=1).to(mu)[:, None]
        h = bandwidth * s * n ** (-1 / (mu.shape[1] + 4))       # (K,D)
        variance = logvar.exp() + h[y] ** 2
        posterior = cls(mu, variance, counts.tolist(), counts / len(y))
        of_points, _ = posterior.leave_one_out()
        of_images, _ = posterior.leave_one_out(logvar, 500)     # each costs D times as much
        posterior.set_floors(of_points, of_images, quantile)
        return posterior

    def log_density(self, z, logvar=None, without=None):
        """log p(z|c) (M,K). `without` (M,): the code that each point is, to be left out."""
        parts = []
        size = max(1, 2**24 // len(self.mu))            # 2^24 pairs of point and code at once
        for rows in torch.arange(len(z), device=z.device).split(size):
            own = None if logvar is None else logvar[rows].exp()
            left_out = None if without is None else without[rows]
            parts.append(self.class_columns(z[rows], own, left_out))
        return torch.cat(parts)

    def class_columns(self, z, own, left_out):
        """log p(z|c) (M,K) of a few points; `own` (M,D): their variances, if of images."""
        columns = []
        start = 0
        for count in self.counts:
            mu = self.mu[start:start + count]
            variance = self.variance[start:start + count]
            if own is None:
                terms = log_normal(z, mu, variance)     # (M,count)
            else:
                terms = log_normal_images(z, own, mu, variance)
            size = torch.full_like(z[:, 0], count)
            if left_out is not None:
                inside = (left_out >= start) & (left_out < start + count)
                rows = inside.nonzero()[:, 0]
                terms[rows, left_out[rows] - start] = -math.inf
                size[rows] -= 1
            columns.append(terms.logsumexp(1) - size.clamp(min=1).log())   # -inf without codes
            start += count
        return torch.stack(columns, 1)

    def leave_one_out(self, logvar=None, limit=2000):
        """log p(z_i|c) (M,K), labels (M,) of at most `limit` codes, each without itself.

        With logvar (N,D), sorted by class as the codes are, of the images and not of points.
        """
        rows = subsample(len(self.mu), limit)
        classes = torch.arange(len(self.counts))
        y = classes.repeat_interleave(torch.tensor(self.counts))
        y = y[rows].to(self.mu.device)
        rows = rows.to(self.mu.device)
        own = None if logvar is None else logvar[rows]
        return self.log_density(self.mu[rows], own, rows), y


class Gaussian(Posterior):
    """p(z|c) = N(z; m_c, S_c), covariances shrunk towards the pooled one (Friedman 1989)."""

    def __init__(self, mean, covariance, prior, **floors):
        super().__init__(prior, **floors)
        self.mean = mean                                # (K,D)
        self.covariance = covariance                    # (K,D,D)

    @classmethod
    def fit(cls, mu, logvar, y, classes, shrinkage=0.1, ridge=0.01, quantile=0.001):
        """From codes mu, logvar (N,D), labels y (N,): moments of the aggregate posterior."""
        mu = mu.float()
        logvar = logvar.float()
        y = y.long()
        counts = y.bincount(minlength=classes)
        mean = class_means(mu, y, classes)
        centred = mu - mean[y]
        width = logvar.exp()
        scatters = []
        for c in range(classes):
            between = centred[y == c].T @ centred[y == c]
            scatters.append(between + width[y == c].sum(0).diag())
        scatter = torch.stack(scatters)
        mixed = (1 - shrinkage) * scatter + shrinkage * scatter.sum(0)
        weight = (1 - shrinkage) * counts + shrinkage * len(y)
        mixed /= weight.clamp(min=1e-6)[:, None, None]
        # The ridge keeps the covariance of few codes, or of unused dimensions, invertible.
        spread = mixed.diagonal(dim1=1, dim2=2).mean(1)
        eye = torch.eye(mu.shape[1], device=mu.device)
        jitter = (ridge * spread + 1e-6)[:, None, None] * eye
        covariance = (1 - ridge) * mixed + jitter
        posterior = cls(mean, covariance, counts / len(y))
        rows = subsample(len(mu), 2000).to(mu.device)
        some = subsample(len(mu), 500).to(mu.device)
        of_images = posterior.log_density(mu[some], logvar[some])
        posterior.set_floors(posterior.log_density(mu[rows]), of_images, quantile)
        return posterior

    def log_density(self, z, logvar=None):
        """log p(z|c) (M,K); with logvar (M,D) integrated over each image's own width."""
        if logvar is None:
            normal = torch.distributions.MultivariateNormal(self.mean, self.covariance)
            return normal.log_prob(z[:, None])
        parts = []
        step = max(1, 2**23 // self.covariance.numel())         # (step,K,D,D) at once
        for point, own in zip(z.split(step), logvar.exp().split(step)):
            covariance = self.covariance + own.diag_embed()[:, None]
            normal = torch.distributions.MultivariateNormal(self.mean, covariance)
            parts.append(normal.log_prob(point[:, None]))
        return torch.cat(parts)


class Codes(NamedTuple):
    """What a latent space knows of its images: where each lies, its class, the percentages."""
    mu: torch.Tensor                    # (N,D)
    logvar: torch.Tensor                # (N,D)
    y: torch.Tensor                     # (N,)
    posterior: Posterior                # of points, as `teach` makes it

    @classmethod
    def restore(cls, saved: dict):
        """The codes of a loaded latent.pt."""
        posterior = Aggregate(**saved["teaching"])
        return cls(saved["mu"], saved["logvar"], saved["labels"], posterior)


def teach(mu, logvar, y, classes, bandwidth=1.0):
    """The posterior that labels hybrids (the best-calibrated one is too soft to teach).

    T = 1/s, s the leave-one-out accuracy above guessing, b the lowest hundredth.
    """
    posterior = Aggregate.fit(mu, logvar, y, classes, bandwidth, quantile=0.01)
    log_density, own = posterior.leave_one_out()
    right = posterior.weigh(log_density, posterior.log_floor).argmax(1) == own
    accuracy = right.float().mean().item()
    guess = posterior.prior.max().item()
    skill = (accuracy - guess) / max(1 - guess, 1e-6)
    posterior.temperature = 1 / max(skill, 0.03)        # T is at most 33: nearly the priors
    return posterior


def class_means(mu, y, classes):
    """(K,D); zeros for a class without codes."""
    one_hot = F.one_hot(y, classes).to(mu)
    counts = one_hot.sum(0).clamp(min=1)
    return one_hot.T @ mu / counts[:, None]


def log_normal(z, mu, variance):
    """log N(z_m; mu_i, diag(variance_i)) (M,N) by three matrix products."""
    if len(mu):                         # smaller numbers cancel less
        centre = mu.mean(0)
        z, mu = z - centre, mu - centre
    precision = 1 / variance
    # (z - mu)^2 / variance, multiplied out.
    square = (z * z) @ precision.T
    square -= 2 * z @ (mu * precision).T
    square += (mu * mu * precision).sum(1)
    square.clamp_(min=0)                # rounding may leave it below
    log_volume = variance.log().sum(1)
    return -0.5 * (square + log_volume + z.shape[1] * LOG_2PI)


def log_normal_images(z, own, mu, variance):
    """log N(z_m; mu_i, diag(variance_i + own_m)) (M,N): the integral over q(z|x_m).

    One dimension at a time keeps the memory at (M,N); eight variances share one logarithm.
    """
    total = torch.full((len(z), len(mu)), z.shape[1] * LOG_2PI, device=z.device)
    product = torch.ones_like(total)
    for d in range(z.shape[1]):
        spread = own[:, d, None] + variance[None, :, d]
        total.addcdiv_((z[:, d, None] - mu[None, :, d]).square_(), spread)
        product *= spread
        if d % 8 == 7 or d == z.shape[1] - 1:       # before the product leaves float32's range
            total += product.log_()
            product.fill_(1)
    return total.mul_(-0.5)


def best_temperature(posterior, mu, logvar, y):
    """The T in [1/4, 64] of the least NLL on codes mu, logvar of labels y, and that NLL."""
    evidence = floored(posterior.log_density(mu, logvar), posterior.image_floor)
    best = (math.inf, 1.0)
    for temperature in torch.logspace(-2, 6, 65, base=2).tolist():
        log_q = (posterior.prior.log() + evidence / temperature).log_softmax(1)
        nll = F.nll_loss(log_q.clamp(min=-30), y.long()).item()
        best = min(best, (nll, temperature))
    nll, temperature = best
    return temperature, nll


def calibrate(fit, choices, mu, logvar, y, limit=500):
    """The fit(choice) of least NLL on validation codes mu, logvar (V,D), y (V,); the choice.

    Its temperature is chosen by the same NLL.
    """
    some = subsample(len(y), limit)     # the choice is coarse: a few images settle it
    tried = []
    for choice in choices:
        posterior = fit(choice)
        _, nll = best_temperature(posterior, mu[some], logvar[some], y[some])
        tried.append((nll, choice))
    _, choice = min(tried)
    posterior = fit(choice)
    posterior.temperature, _ = best_temperature(posterior, mu, logvar, y)
    return posterior, choice


def subsample(n, most):
    """At most `most` of the rows 0..n-1, at random but always the same ones, in order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(n, generator=generator)[:most].sort()[0]


def neighbour_graph(mu, neighbours=10):
    """Sparse weights V + V^T (N,N) of codes mu (N,D) and their nearest ones.

    V_ij = exp(-(d_ij / d_ik)^2), d_ik the distance from i to its last neighbour.
    """
    n = len(mu)
    k = min(neighbours + 1, n)          # the nearest is the code itself
    distances = []
    nearest = []
    for some in mu.split(max(1, 2**24 // n)):
        found = torch.cdist(some, mu).topk(k, largest=False)
        distances.append(found.values[:, 1:].cpu())
        nearest.append(found.indices[:, 1:].cpu())
    distance = torch.cat(distances)
    nearest = torch.cat(nearest)
    scale = distance[:, -1:].clamp(min=1e-12)
    weight = (-(distance / scale).square()).exp()
    rows = torch.arange(n).repeat_interleave(k - 1)
    pairs = torch.stack([rows, nearest.flatten()])
    graph = torch.sparse_coo_tensor(pairs, weight.flatten(), (n, n), check_invariants=False)
    return (graph + graph.T).coalesce()


def spread(graph, rows, labels, classes, alpha=0.99, rounds=100):
    """Labels (N,) from those of a few rows, along a graph (N,N); -1 where none arrives.

    Label spreading (Zhou et al. 2004): F <- alpha S F + (1-alpha) Y, S = D^-1/2 W D^-1/2.
    """
    degree = graph @ torch.ones(len(graph), 1)
    scale = degree.clamp(min=1e-12).rsqrt()
    given = torch.zeros(len(graph), classes)
    given[rows, labels] = 1 - alpha
    belief = given
    for _ in range(rounds):
        belief = alpha * scale * (graph @ (scale * belief)) + given
    return belief.argmax(1).where(belief.amax(1) > 0, -1)


def labels_agree(graph, y, classes, alpha=0.99) -> bool:
    """Do the labels y (n,) of the first n codes predict each other along the graph?

    Both halves, together, have to be right about most of each other, chance discounted; only
    labels of a class that both halves hold can be right.
    """
    order = y.argsort(stable=True)
    halves = (order[::2], order[1::2])                  # every other one: half of each class
    right = []
    for known, asked in (halves, halves[::-1]):
        guess = spread(graph, known, y[known], classes, alpha)
        can_be_right = torch.isin(y[asked], y[known])
        right.append((guess[asked] == y[asked])[can_be_right])
    return bool(torch.cat(right).float().mean() > 0.5 + 0.5 / classes)


def spread_labels(mu, y, classes, neighbours=10, alpha=0.99):
    """Labels (N,) of codes mu (N,D), from y (n,) of the first n; -1 where none arrives.

    None arrives anywhere, if the labels do not predict each other: they would mislead.
    """
    graph = neighbour_graph(mu.float(), neighbours)
    given = y.cpu().long()
    rows = given.argsort(stable=True)
    found = spread(graph, rows, given[rows], classes, alpha)[len(y):]
    if not labels_agree(graph, given, classes, alpha):
        found = torch.full_like(found, -1)
    return torch.cat([given, found]).to(y.device)


def words(q, classes, most=2) -> str:
    """Probabilities (K,) in words: the likeliest classes, the likeliest last.

    >>> words([0.2, 0.8], ["cat", "dog"])
    '20% cat + 80% dog'
    """
    q = [float(p) for p in q]
    order = sorted(range(len(q)), key=q.__getitem__)
    shown = [c for c in order[-most:] if q[c] >= 0.005]         # below, it would read 0%
    return " + ".join(f"{100 * q[c]:.0f}% {classes[c]}" for c in shown)


# ---- command --------------------------------------------------------------------------------

def parse_args(argv=None):
    from common import flags, number
    parser = flags("latent.py", __doc__)
    add = parser.add_argument_group("percentages").add_argument
    add("--codes", type=number(int, 2), default=20_000,
        help="highest number of codes that the density is made of")
    add("--image", metavar="FILE", help="print the percentages of this picture, and stop")
    add("--point", metavar="=Z1,Z2,...", help="print the percentages of this point, and stop")
    args = parser.parse_args(argv)
    args.writes = not (args.image or args.point)
    return args


def plane_of(mu, y, classes):
    """The mean (D,) and two directions (D,2) that show the classes apart: PCA of means."""
    mean = mu.mean(0)
    if mu.shape[1] <= 2:
        return mean, torch.eye(mu.shape[1], 2)
    means = class_means(mu, y, classes)[y.unique()]
    # Two means alone span only a line: the codes themselves, much smaller, give the rest.
    spanned = torch.cat([means - mean, 1e-3 * (mu - mean)[:1000]])
    directions = torch.linalg.svd(spanned, full_matrices=False)[2][:2].T
    return mean, directions


def undecided_points(mu, posterior, generator, count=200):
    """Points (count,D) on lines between codes, the least certain of a thousand."""
    i, j = torch.randint(len(mu), (2, 1000), generator=generator)
    t = torch.rand(1000, 1, generator=generator)
    z = torch.lerp(mu[i], mu[j], t)
    certainty = posterior(z).amax(1)
    return z[certainty.argsort()[:count]]


def draw_map(axes, mu, y, classes, posterior, generator, crosses=7):
    """Codes in two dimensions, an ellipse a class, random points X with their percentages.

    To be drawn last of its figure: the labels are placed on the finished layout.
    """
    import common
    from matplotlib.transforms import Bbox
    common.tidy(axes, "Where do the classes live?", "first main direction",
                "second main direction")
    mean, directions = plane_of(mu, y, len(classes))
    xy = (mu - mean) @ directions
    centres = []
    for c in y.unique().tolist():
        centres.append(xy[y == c].mean(0))
        draw_class(axes, xy[y == c], c)

    z = undecided_points(mu, posterior, generator)
    flat = (z - mean) @ directions
    points = []
    texts = []
    for _ in range(crosses):            # each as far as can be from the centres and the others
        taken = torch.stack(centres + points)
        k = int(torch.cdist(flat, taken).amin(1).argmax())
        points.append(flat[k])
        q = posterior(z[k:k + 1])[0]
        texts.append(words(q, classes))
    points = torch.stack(points)
    axes.plot(points[:, 0], points[:, 1], "x", color="black", ms=9, mew=2.2)

    figure = axes.figure.figure         # the whole one, if the axes are part of a subfigure
    figure.draw_without_rendering()     # settles the layout, and so the pixels
    reach = 6 * figure.dpi / 72
    pixels = axes.transData.transform(points)
    boxes = [Bbox([pixel, pixel]).padded(reach) for pixel in pixels]
    for c, centre in zip(y.unique().tolist(), centres):
        colour = common.COLOURS[c % 10]
        write_near(axes, classes[c], centre.tolist(), boxes, (0, 9, 18, 27, 36),
                   edge=colour, size=11, weight="bold", zorder=9)
    for text, point in zip(texts, points.tolist()):
        write_near(axes, text, point, boxes, (15, 25, 38, 54), size=9.5, zorder=10)


def draw_class(axes, xy, c):
    """Points (N,2) of class c, and an ellipse of 1.5 standard deviations about their mean."""
    import common
    from matplotlib.patches import Ellipse
    colour = common.COLOURS[c % 10]
    some = xy[:1500]                    # more would hide each other
    axes.scatter(some[:, 0], some[:, 1], s=9, color=colour, alpha=0.35, linewidths=0,
                 marker=common.MARKERS[c % 10])
    if len(xy) < 3:
        return
    variance, turn = torch.linalg.eigh(xy.T.double().cov())
    height, width = (3 * variance.clamp(min=0).sqrt()).tolist()
    right, up = turn[:, 1].tolist()     # the direction of the largest variance
    angle = math.degrees(math.atan2(up, right))
    centre = xy.mean(0).tolist()
    ellipse = Ellipse(centre, width, height, angle=angle, fill=False, color=colour, lw=1.5)
    axes.add_patch(ellipse)


def write_near(axes, text, point, boxes, radii, edge="none", **look):
    """Write a text near a point, where it covers least of the boxes (pixels); add its own."""
    frame = dict(boxstyle="round,pad=0.2", fc="white", ec=edge, alpha=0.85)
    leader = dict(arrowstyle="-", lw=0.8, shrinkA=0, shrinkB=4)
    label = axes.annotate(text, point, (0, 0), textcoords="offset points", ha="center",
                          va="center", bbox=frame, arrowprops=leader, **look)
    label.set_in_layout(False)
    places = []
    for radius, turn in itertools.product(radii, range(16)):
        angle = math.pi * (turn / 8 - 0.5)              # below the point first
        # Texts are wider than high: an ellipse of places.
        place = (2.2 * radius * math.cos(angle), radius * math.sin(angle))
        label.set_position(place)
        box = label.get_window_extent().padded(4)
        cut_off = box.width * box.height - overlap(box, [axes.bbox])
        places.append((overlap(box, boxes) + 1000 * cut_off + radius, place))
    label.set_position(min(places)[1])
    boxes.append(label.get_window_extent().padded(4))


def overlap(box, others):
    """The area, in pixels, that a box shares with others."""
    from matplotlib.transforms import Bbox
    shared = [Bbox.intersection(box, other) for other in others]
    return sum(part.width * part.height for part in shared if part is not None)


def draw_reliability(axes, metrics):
    """Stated percentages against observed frequencies, one line a density."""
    import common
    axes.axline((0, 0), (1, 1), color="black", lw=0.8)
    for margin in (-0.05, 0.05):        # what is stated is right to within five points
        axes.axline((0, margin), (1, 1 + margin), color="black", lw=0.6, ls=":")
    styles = {"encoder's width": "-o", "aggregate": "--s", "gaussian": ":^"}
    for (name, style), colour in zip(styles.items(), common.COLOURS):
        rows = metrics[name]["reliability"]
        stated = [row["stated"] for row in rows]
        observed = [row["observed"] for row in rows]
        axes.plot(stated, observed, style, ms=5, color=colour, label=name)
    axes.legend(frameon=False, loc="upper left")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    common.tidy(axes, "Does 30% mean 30%?", "stated percentage",
                "observed frequency on test images")


def best_calibrated(saved) -> Aggregate:
    """The percentages of a loaded latent.pt."""
    return Aggregate(**saved["calibrated"]["aggregate"])


def answer(run, args):
    """Print the percentages of a picture or of a point."""
    import common
    from vae import VAE, encode_all
    saved = common.load(run, "latent", restore=best_calibrated)
    posterior = best_calibrated(saved)
    if args.point:
        q = posterior(parse_point(args.point, saved["mu"].shape[1])[None])
    else:
        image, report = common.read_like(args.image, saved["dataset"])
        print(report)
        upstream = common.load(run, "vae", restore=VAE.restore, like=saved)
        q = posterior(*encode_all(VAE.restore(upstream), image))
    print(common.ranking(q[0], saved["dataset"]["classes"]))


def parse_point(text: str, dim: int):
    """D numbers with commas between -> (D,)."""
    import common
    try:
        z = torch.tensor([float(word) for word in text.split(",")])
    except ValueError:
        z = torch.empty(0)
    common.require(z.shape == (dim,) and z.isfinite().all(),
                   f"--point takes {dim} finite numbers with commas between, not {text}")
    return z


def stored(posterior) -> dict:
    """A posterior as plain tensors and numbers: Aggregate(**stored(posterior)) equals it."""
    fields = {}
    for key, value in vars(posterior).items():
        fields[key] = value.cpu() if torch.is_tensor(value) else value
    return fields


def worth(q, y) -> dict:
    """What percentages q (N,K) of test images are worth."""
    import common
    return {**common.scores(q, y), "ece_interval": common.ece_interval(q, y),
            "reliability": common.reliability(q, y)}


def command(run, args):
    import common
    from vae import VAE, encode_all
    if args.image or args.point:
        return answer(run, args)
    upstream = common.load(run, "vae", run.device, VAE.restore)
    common.drop_checkpoint(run, "vae")
    model = VAE.restore(upstream, run.device)
    data = common.load_dataset(run, upstream)
    classes = len(data.classes)
    rows = upstream["rows"].to(run.device)
    y = data.labels[rows]
    mu, logvar = encode_all(model, data.images[rows], run.amp)
    _, validation = common.split(data)
    validation = validation[subsample(len(validation), 2000)].to(run.device)
    validation_codes = encode_all(model, data.images[validation], run.amp)
    test_codes = encode_all(model, data.test_images, run.amp)

    some = subsample(len(rows), args.codes).to(run.device)
    part = (mu[some], logvar[some], y[some])

    def aggregate(bandwidth):
        return Aggregate.fit(*part, classes, bandwidth)

    def gaussian(shrinkage):
        return Gaussian.fit(*part, classes, shrinkage)

    prior = y.bincount(minlength=classes) / len(y)
    metrics = {"class priors": worth(prior.expand(len(data.test_labels), classes),
                                      data.test_labels),
               "encoder's width": worth(aggregate(0.0)(*test_codes), data.test_labels)}
    calibrated = {}
    for name, fit, choices in (("aggregate", aggregate, (0.25, 0.5, 0.75, 1.0, 1.5)),
                               ("gaussian", gaussian, (0.0, 0.1, 0.5, 1.0))):
        posterior, choice = calibrate(fit, choices, *validation_codes, data.labels[validation])
        calibrated[name] = stored(posterior)
        metrics[name] = {**worth(posterior(*test_codes), data.test_labels), "choice": choice,
                         "temperature": posterior.temperature}

    fig = common.figure(11, 5.4)
    left, right = fig.subplots(1, 2, width_ratios=[1.45, 1])
    draw_reliability(right, metrics)
    shown = Aggregate(**calibrated["aggregate"])
    generator = torch.Generator().manual_seed(args.seed)
    draw_map(left, mu.cpu(), y.cpu(), common.legible(data.classes), shown, generator)
    common.write(run.out / "latent.png", fig)
    common.save(run.out / "latent.pt", run, data, metrics, [run.out / "vae.pt"], mu=mu.cpu(),
                logvar=logvar.cpu(), labels=y.cpu(), calibrated=calibrated,
                teaching=stored(teach(*part, classes)))
    print(f"{len(data.test_images):,} test images, percentages fitted on {len(validation):,} "
          "others")
    print(f"{'':15}  accuracy    NLL  Brier    ECE  95% interval")
    line = "{accuracy:10.1%} {nll:6.3f} {brier:6.3f} {ece:6.3f}  {low:.3f} to {high:.3f}"
    for name, scores in metrics.items():
        low, high = scores["ece_interval"]
        print(f"{name:15}" + line.format(low=low, high=high, **scores))
    print(run.out / "latent.png", run.out / "latent.pt", sep="\n")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
