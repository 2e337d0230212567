"""Class percentages of any point of the latent space: "20% cat + 80% dog".

    python latent.py                              # runs/glyphs/vae.pt -> runs/glyphs/latent.pt
    python latent.py -o runs/mnist --image seven.png   # the percentages of a picture
    python latent.py -o runs/mnist --point=-0.3,1.2,...      # of a latent point, D numbers
    python latent.py --review                     # which labels to look at next: review.csv

Reads:  vae.pt and its data set; with --review, the new labels in review.csv, which it keeps.
Writes: latent.pt latent.json latent.png, latent.csv; with --review review.csv review.png.
"""
import collections
import csv
import functools
import io
import itertools
import math
import os
from pathlib import Path
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
        size = max(1, 2**21 // len(self.mu))            # pairs of point and code at once
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
        """The codes of a loaded latent.pt that have a label, given or spread."""
        posterior = Aggregate(**saved["teaching"])
        known = saved["labels"] >= 0
        return cls(saved["mu"][known], saved["logvar"][known], saved["labels"][known],
                   posterior)


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


def nearest_codes(mu, count):
    """The nearest other codes of each of mu (N,D): their rows, squared distances (N,count)."""
    count = min(count, len(mu) - 1)
    rows = []
    squares = []
    for some in mu.split(max(1, 2**24 // len(mu))):
        found = torch.cdist(some, mu).topk(count + 1, largest=False)
        rows.append(found.indices[:, 1:])               # the nearest is the code itself
        squares.append(found.values[:, 1:].square())
    return torch.cat(rows), torch.cat(squares)


def neighbour_graph(mu, distances=None, share=0.0, neighbours=7):
    """Sparse weights V + V^T (N,N), on the CPU, of codes mu (N,D) and their nearest ones.

    V_ij = exp(-d_ij / d_ik), d the squared distance, k the last neighbour. A part `share` of
    d is that of the images behind the codes, `distances`: rows (N,M) -> (N,M); each kind is
    measured in that of the last neighbour.
    """
    near, square = nearest_codes(mu, 50 if share else neighbours)
    square = in_neighbours(square, neighbours)
    if share:
        moved = in_neighbours(distances(near), neighbours)
        square = share * moved + (1 - share) * square
        square, order = square.topk(min(neighbours, near.shape[1]), largest=False)
        near = near.gather(1, order)
    weight = (-in_neighbours(square, neighbours)).exp().cpu()
    rows = torch.arange(len(mu)).repeat_interleave(near.shape[1])
    pairs = torch.stack([rows, near.flatten().cpu()])
    graph = torch.sparse_coo_tensor(pairs, weight.flatten(), (len(mu), len(mu)),
                                    check_invariants=False)
    return (graph + graph.T).coalesce()


def in_neighbours(square, neighbours):
    """Squared distances (N,M), each row measured in the one to its k-th neighbour."""
    k = min(neighbours, square.shape[1])
    last = square.topk(k, largest=False).values[:, -1:]
    return square / last.clamp(min=1e-12)


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


def spread_labels(mu, y, classes, distances=None, share=0.0, neighbours=7, alpha=0.99):
    """Labels (N,) of codes mu (N,D), from y (n,) of the first n; -1 where none arrives.

    None arrives anywhere, if the labels do not predict each other: they would mislead.
    `distances` and `share` as of `neighbour_graph`.
    """
    graph = neighbour_graph(mu.float(), distances, share, neighbours)
    given = y.cpu().long()
    rows = given.argsort(stable=True)
    found = spread(graph, rows, given[rows], classes, alpha)[len(y):]
    if not labels_agree(graph, given, classes, alpha):
        found = torch.full_like(found, -1)
    return torch.cat([given, found]).to(y.device)


def suspects(q, y):
    """Which labels y (N,) look wrong by percentages q (N,K) that do not know them.

    -> rows, the likeliest to be wrong first, and the class that each should have. As in
    confident learning (Northcutt et al. 2021), each class is measured by what the images that
    are labelled so have of it on average; the order is that of q(y) to q(that other class).
    """
    own_share = F.one_hot(y, q.shape[1]).to(q)
    usual = (own_share * q).sum(0) / own_share.sum(0).clamp(min=1)
    measured = q / usual.clamp(min=1e-6)
    place = torch.arange(len(y), device=y.device)
    own = measured[place, y]
    others = measured.index_put((place, y), torch.zeros_like(own))
    best, claim = others.max(1)
    odds = own.clamp(min=1e-30).log() - best.clamp(min=1e-30).log()
    order = odds.argsort(stable=True)
    rows = order[odds[order] < 0]
    return rows, claim[rows]


def to_label(q, mu, known, count):
    """Rows of q (M,K), mu (M,D) whose label would teach most: undecided, unlike each other.

    Of the ten times `count` least certain ones each is the farthest (Gonzalez 1985) from the
    codes `known` (N,D) and from those that were taken before it.
    """
    undecided = q.amax(1).argsort(stable=True)[:10 * count]
    z = mu[undecided]
    distance = torch.cdist(z, known).amin(1)
    taken = []
    for _ in range(min(count, len(z))):
        k = int(distance.argmax())
        taken.append(k)
        distance = distance.minimum((z - z[k]).norm(dim=1))
        distance[k] = -1
    return undecided[torch.tensor(taken, dtype=torch.long, device=mu.device)]


def near_duplicates(mu, images, test_mu, test_images, most=0.05, neighbours=5):
    """Pairs of almost the same image: rows of images, rows of test images, their difference.

    The nearest codes of each test image are looked at; the difference is the mean squared one
    of pixels, in parts of the test image's variance. The smallest first, `most` at most.
    """
    k = min(neighbours, len(mu))
    parts = []
    for z in test_mu.split(max(1, 2**24 // len(mu))):
        parts.append(torch.cdist(z, mu).topk(k, largest=False).indices)
    nearest = torch.cat(parts)          # (T,k)
    difference = torch.full(nearest.shape, math.inf, device=mu.device)
    for rows in torch.arange(len(test_mu), device=mu.device).split(1000):
        x = test_images[rows].float().flatten(1)
        variance = x.var(1, unbiased=False).clamp(min=1)
        for j in range(k):
            other = images[nearest[rows, j]].float().flatten(1)
            difference[rows, j] = (x - other).square().mean(1) / variance
    least, j = difference.min(1)
    tests = (least <= most).nonzero()[:, 0]
    tests = tests[least[tests].argsort(stable=True)]
    return nearest[tests, j[tests]], tests, least[tests]


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
    add("--review", action="store_true",
        help="write review.csv and review.png as well: which labels to look at next")
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


def draw_map(axes, mu, y, classes, posterior, generator, crosses=7, given=None):
    """Codes in two dimensions, an ellipse a class, random points X with their percentages.

    Labels y (N,) are -1 where there is none. Those `given` (N,) are large where not all are.
    To be drawn last of its figure: the labels are placed on the finished layout.
    """
    import common
    from matplotlib.transforms import Bbox
    common.tidy(axes, "Where do the classes live?", "first main direction",
                "second main direction")
    unknown = mu[y < 0]
    mu = mu[y >= 0]
    given = None if given is None or given.all() else given[y >= 0]
    y = y[y >= 0]
    mean, directions = plane_of(mu, y, len(classes))
    xy = (mu - mean) @ directions
    without = (unknown[:1500] - mean) @ directions
    axes.scatter(without[:, 0], without[:, 1], s=3, color="0.6", alpha=0.35, linewidths=0)
    centres = []
    for c in y.unique().tolist():
        centres.append(xy[y == c].mean(0))
        draw_class(axes, xy[y == c], c, None if given is None else given[y == c])

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


def draw_class(axes, xy, c, given=None):
    """Points (N,2) of class c, and an ellipse of 1.5 standard deviations about their mean.

    With `given` (N,) those are large, the others small.
    """
    import common
    from matplotlib.patches import Ellipse
    colour = common.COLOURS[c % 10]
    look = dict(color=colour, marker=common.MARKERS[c % 10])
    large = xy[:0]
    small = xy[:1500]                   # more would hide each other
    size = 9
    if given is not None:
        large = xy[given][:1500]
        small = xy[~given][:1500]
        size = 4
    axes.scatter(small[:, 0], small[:, 1], s=size, alpha=0.35, linewidths=0, **look)
    axes.scatter(large[:, 0], large[:, 1], s=30, edgecolors="white", linewidths=0.5, zorder=3,
                 **look)
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


SPREAD = 60_000                         # most images that labels are spread to
REVIEWED = 100                          # most images of a kind in review.csv
WHY = ("label looks wrong", "label would teach most", "nearly a training image")
COLUMNS = ["image", "new_label", "why", "label", "likeliest", "sure", "like"]
BANDWIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5)        # of the density; one is chosen


class Part(NamedTuple):
    """Images of a data set as this script sees them."""
    name: str
    rows: torch.Tensor                  # (N,) as Dataset counts them
    given: torch.Tensor                 # (N,) labels, -1 where there is none
    y: torch.Tensor                     # (N,) these and, among training images, spread ones
    mu: torch.Tensor                    # (N,D)
    logvar: torch.Tensor                # (N,D)

    def take(self, some):
        """The images of some places."""
        return Part(self.name, *(column[some] for column in self[1:]))


def with_spread(part, data, deform):
    """Labels (N,) of a part: the given ones and, where these are -1, spread ones.

    To at most SPREAD of the images without a label, from at most so many with one. Says what
    became of it.
    """
    known = (part.given >= 0).nonzero()[:, 0]
    without = (part.given < 0).nonzero()[:, 0]
    if not len(without):
        return part.given
    known = known[subsample(len(known), SPREAD).to(known.device)]
    asked = without[subsample(len(without), SPREAD).to(known.device)]
    some = torch.cat([known, asked])
    distances = functools.partial(deform.distances, data.take(part.rows[some]))
    found = spread_labels(part.mu[some], part.given[known], len(data.classes), distances,
                          deform.strength)
    labels = part.given.clone()
    labels[asked] = found[len(known):]
    count = int((labels[asked] >= 0).sum())
    if count:
        print(f"labels are spread to {count:,} of {len(without):,} images without one")
    else:
        print("the labels do not predict each other: none is spread to the "
              f"{len(without):,} images without one, only labelled ones are used")
    return labels


def densities(known, prior, validation, test):
    """Both densities, calibrated, their q of the test images, what they are worth; by name.

    `known`, `validation` and `test` are parts, `prior` is (K,).
    """
    codes = (known.mu, known.logvar, known.y)
    classes = len(prior)

    def aggregate(bandwidth):
        return Aggregate.fit(*codes, classes, bandwidth)

    def gaussian(shrinkage):
        return Gaussian.fit(*codes, classes, shrinkage)

    narrow = aggregate(0.0)(test.mu, test.logvar)
    metrics = {"class priors": worth(prior.expand_as(narrow), test.y),
               "encoder's width": worth(narrow, test.y)}
    calibrated = {}
    shares = {}
    for name, fit, choices in (("aggregate", aggregate, BANDWIDTHS),
                               ("gaussian", gaussian, (0.0, 0.1, 0.5, 1.0))):
        posterior, choice = calibrate(fit, choices, validation.mu, validation.logvar,
                                      validation.y)
        calibrated[name] = posterior
        shares[name] = posterior(test.mu, test.logvar)
        metrics[name] = {**worth(shares[name], test.y), "choice": choice,
                         "temperature": posterior.temperature}
    return calibrated, shares, metrics


def without_own(posterior, part, some):
    """q (N,K) of the images of a part, those at the places `some` without their own code.

    The aggregate `posterior` is that of these places.
    """
    own = torch.full_like(part.rows, -1)
    own[some[part.y[some].argsort(stable=True)]] = torch.arange(len(some), device=own.device)
    log_density = posterior.log_density(part.mu, part.logvar, own)
    return posterior.weigh(log_density, posterior.image_floor)


def percentage_table(data, parts) -> str:
    """CSV of a line an image: its labels, its likeliest class, how sure that is, all shares.

    `parts`: a part and its q (N,K) each.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow("image part label spread likeliest sure".split() + data.classes)
    names = [*data.classes, ""]         # the last one, -1, is none
    for part, q in parts:
        sure, likeliest = q.max(1)
        columns = (part.rows, part.given, part.y, likeliest, sure, q)
        for row, label, y, best, most, shares in zip(*(column.tolist() for column in columns)):
            table.writerow([data.names[row], part.name if label >= 0 else "unlabelled",
                            names[label], names[y] if y != label else "", names[best],
                            f"{most:.4f}", *(f"{share:.4f}" for share in shares)])
    return text.getvalue()


def shares_by_others(part, some, validation, classes):
    """q (N,K) of the images of a part by the labels at the places `some`, never their own."""
    known = part.take(some)

    def aggregate(bandwidth):
        return Aggregate.fit(known.mu, known.logvar, known.y, classes, bandwidth)

    posterior, _ = calibrate(aggregate, BANDWIDTHS, validation.mu, validation.logvar,
                             validation.y)
    return without_own(posterior, part, some)


def findings(data, train, test, q, by_others, test_q, seen) -> list:
    """What a person should look at, a dict an image: `COLUMNS`, and the "rows" to be shown.

    Percentages: q (N,K) of training images, `by_others` of those with a label, `test_q`.
    Images whose names are in `seen` are left out.
    """
    unseen = torch.tensor([name not in seen for name in data.names]).to(train.rows.device)
    labelled = train.take((train.given >= 0).nonzero()[:, 0])
    found = []

    def add(why, part, shares, best, like=None):
        for k, row in enumerate(part.rows.tolist()):
            label = int(part.given[k])
            line = {"image": data.names[row], "why": why,
                    "label": data.classes[label] if label >= 0 else "",
                    "likeliest": data.classes[int(best[k])],
                    "sure": f"{float(shares[k, best[k]]):.4f}", "rows": [row]}
            if like is not None:
                line["like"] = data.names[like[k]]
                line["rows"] = [int(like[k]), row]
            found.append(line)

    places, classes = suspects(by_others, labelled.given)
    new = unseen[labelled.rows[places]].nonzero()[:REVIEWED, 0]
    places = places[new]
    add(WHY[0], labelled.take(places), by_others[places], classes[new])

    places = ((train.given < 0) & unseen[train.rows]).nonzero()[:, 0]
    places = places[to_label(q[places], train.mu[places], labelled.mu, REVIEWED)]
    add(WHY[1], train.take(places), q[places], q[places].argmax(1))

    alike, places, _ = near_duplicates(train.mu, data.take(train.rows), test.mu,
                                       data.test_images)
    new = unseen[test.rows[places]].nonzero()[:REVIEWED, 0]
    places = places[new]
    add(WHY[2], test.take(places), test_q[places], test_q[places].argmax(1),
        train.rows[alike[new]].tolist())
    return found


def new_labels(path) -> dict:
    """The lines of a table that a person has written a new label into, by image."""
    import common
    if path is None or not Path(path).exists():
        return {}
    lines = common.read_table(Path(path), ["image", "new_label"])
    return {line["image"]: line for line in lines if line["new_label"]}


def draw_review(data, found):
    """The first of each kind, with what the percentages say."""
    import common
    fig = common.figure(13, 6)
    classes = dict(zip(data.classes, common.legible(data.classes)))
    for why, part in zip(WHY, fig.subfigures(len(WHY), 1)):
        lines = [line for line in found if line["why"] == why]
        count = f"{len(lines)} images" if lines else "none"
        part.suptitle(f"{why.capitalize()}: {count}", x=0.01, ha="left", fontsize=11,
                      fontweight="bold")
        for axes, line in itertools.zip_longest(part.subplots(1, 10), lines[:10]):
            if line is None:
                axes.set_axis_off()
                continue
            caption = f"{float(line['sure']):.0%} {classes[line['likeliest']]}"
            if "like" in line:
                caption = "training, test"
            elif line["label"]:
                caption = f"{classes[line['label']]}; rather\n{caption}"
            rows = torch.tensor(line["rows"])
            common.show_images(axes, data.take(rows), len(rows), caption)
    return fig


def review(run, data, earlier, found):
    """Write review.csv and review.png; what a person has filled in, `earlier`, stays."""
    import common
    path = run.out / "review.csv"
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows([*earlier.values(), *found])
    common.write(run.out / "review.png", draw_review(data, found))
    before = new_labels(path)
    time = path.stat().st_mtime_ns if before else 0
    common.write(path, text.getvalue())
    if before and before.keys() == earlier.keys():
        os.utime(path, ns=(time, time))         # no new label in it: nothing for make to do
    counts = collections.Counter(line["why"] for line in found)
    print(*(f"{why}: {counts[why]}" for why in WHY), sep=", ")
    print(f"their classes, right or not, go into the column new_label of {path}; then:",
          common.make_all(run, path), sep="\n")
    print(run.out / "review.png")


def report(metrics):
    """What the percentages are worth, as a table."""
    print(f"{'':15}  accuracy    NLL  Brier    ECE  95% interval")
    line = "{accuracy:10.1%} {nll:6.3f} {brier:6.3f} {ece:6.3f}  {low:.3f} to {high:.3f}"
    for name, scores in metrics.items():
        low, high = scores["ece_interval"]
        print(f"{name:15}" + line.format(low=low, high=high, **scores))


def command(run, args):
    import common
    from vae import VAE, Deformations, encode_all
    if args.image or args.point:
        return answer(run, args)
    upstream = common.load(run, "vae", run.device, VAE.restore)
    common.drop_checkpoint(run, "vae")
    model = VAE.restore(upstream, run.device)
    data = common.load_dataset(run, upstream)
    classes = len(data.classes)

    def encoded(name, rows):
        rows = rows.to(run.device)
        y = data.labels_of(rows)
        return Part(name, rows, y, y, *encode_all(model, data.take(rows), run.amp))

    train = encoded("train", upstream["rows"])
    deform = Deformations.restore(upstream, run.device)
    train = train._replace(y=with_spread(train, data, deform))
    validation = encoded("validation", common.split(data)[1])
    fitting = subsample(len(validation.rows), 2000).to(run.device)
    every = len(data.names)
    test = encoded("test", torch.arange(every - len(data.test_images), every))
    some = (train.y >= 0).nonzero()[:, 0]
    prior = train.y[some].bincount(minlength=classes) / len(some)
    some = some[subsample(len(some), args.codes).to(run.device)]
    known = train.take(some)
    calibrated, shares, metrics = densities(known, prior, validation.take(fitting), test)
    posterior = calibrated["aggregate"]
    # An image costs D times what a point does, and there may be many: fewer codes will do.
    fewer = some[subsample(len(some), 5000).to(run.device)]
    part = train.take(fewer)
    coarse = Aggregate.fit(part.mu, part.logvar, part.y, classes,
                           metrics["aggregate"]["choice"])
    coarse.temperature = posterior.temperature
    q = without_own(coarse, train, fewer)

    calibrated = {name: stored(density) for name, density in calibrated.items()}
    fig = common.figure(11, 5.4)
    left, right = fig.subplots(1, 2, width_ratios=[1.45, 1])
    draw_reliability(right, metrics)
    generator = torch.Generator().manual_seed(args.seed)
    draw_map(left, train.mu.cpu(), train.y.cpu(), common.legible(data.classes),
             Aggregate(**calibrated["aggregate"]), generator, given=(train.given >= 0).cpu())
    common.write(run.out / "latent.png", fig)
    common.write(run.out / "latent.csv", percentage_table(
        data, [(train, q), (validation, posterior(validation.mu, validation.logvar)),
               (test, shares["aggregate"])]))
    if args.review:
        earlier = {**new_labels(run.labels_from), **new_labels(run.out / "review.csv")}
        # By given labels alone: one that was spread would come back from the neighbours.
        given = train.take((train.given >= 0).nonzero()[:, 0])
        by_others = q
        if len(given.rows) < len(train.rows):
            fewer = subsample(len(given.rows), 5000).to(run.device)
            by_others = shares_by_others(given, fewer, validation.take(fitting), classes)
        agree = by_others.argmax(1) == given.given
        print(f"percentages agree with {agree.float().mean():.0%} of the labels; review of "
              "the others, as far as these can be trusted:")
        found = findings(data, train, test, q, by_others, shares["aggregate"], earlier)
        review(run, data, earlier, found)
    common.save(run.out / "latent.pt", run, data, metrics, [run.out / "vae.pt"],
                mu=train.mu.cpu(), logvar=train.logvar.cpu(), labels=train.y.cpu(),
                given=(train.given >= 0).cpu(), q=q.cpu(), calibrated=calibrated,
                teaching=stored(teach(known.mu, known.logvar, known.y, classes)))
    print(f"{len(test.rows):,} test images, percentages fitted on {len(fitting):,} others")
    report(metrics)
    print(run.out / "latent.png", run.out / "latent.csv", run.out / "latent.pt", sep="\n")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
