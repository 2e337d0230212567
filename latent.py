"""Class percentages of any point of the latent space: "20% cat + 80% dog".

    python latent.py                              # runs/glyphs/vae.pt -> runs/glyphs/latent.pt
    python latent.py -o runs/mnist --image seven.png   # the percentages of a picture
    python latent.py -o runs/mnist --point=-0.3,1.2,...      # of a latent point, D numbers
    python latent.py --review                     # which labels to look at next: review.csv

Reads:  vae.pt and its data set; with --review, the new labels in review.csv, which it keeps.
Writes: latent.pt latent.json latent.png, latent.csv; with --review review.csv review.png.
"""
import collections
import functools
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
        centre = class_means(mu, y, classes)[y]
        within = (mu - centre).square().sum(0)
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
            width = None if logvar is None else logvar[rows].exp()
            left_out = None if without is None else without[rows]
            parts.append(self.class_columns(z[rows], width, left_out))
        return torch.cat(parts)

    def class_columns(self, z, width, left_out):
        """log p(z|c) (M,K) of a few points; `width` (M,D): their variances, if of images."""
        columns = []
        start = 0
        for count in self.counts:
            mu = self.mu[start:start + count]
            variance = self.variance[start:start + count]
            if width is None:
                terms = log_normal(z, mu, variance)     # (M,count)
            else:
                terms = log_normal_images(z, width, mu, variance)
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
        if logvar is not None:
            logvar = logvar[rows]
        return self.log_density(self.mu[rows], logvar, rows), y


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
        mean_variance = mixed.diagonal(dim1=1, dim2=2).mean(1)
        eye = torch.eye(mu.shape[1], device=mu.device)
        jitter = (ridge * mean_variance + 1e-6)[:, None, None] * eye
        covariance = (1 - ridge) * mixed + jitter
        posterior = cls(mean, covariance, counts / len(y))
        some = subsample(len(mu), 2000)
        of_points = posterior.log_density(mu[some])
        some = subsample(len(mu), 500)
        of_images = posterior.log_density(mu[some], logvar[some])
        posterior.set_floors(of_points, of_images, quantile)
        return posterior

    def log_density(self, z, logvar=None):
        """log p(z|c) (M,K); with logvar (M,D) integrated over each image's own width."""
        if logvar is None:
            normal = torch.distributions.MultivariateNormal(self.mean, self.covariance)
            return normal.log_prob(z[:, None])
        parts = []
        step = max(1, 2**23 // self.covariance.numel())         # (step,K,D,D) at once
        for rows in torch.arange(len(z), device=z.device).split(step):
            width = logvar[rows].exp().diag_embed()
            covariance = self.covariance + width[:, None]
            normal = torch.distributions.MultivariateNormal(self.mean, covariance)
            parts.append(normal.log_prob(z[rows, None]))
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
        y = saved["labels"]
        known = y >= 0
        return cls(saved["mu"][known], saved["logvar"][known], y[known], posterior)


def teach(mu, logvar, y, classes, bandwidth=1.0):
    """The posterior that labels hybrids (the best-calibrated one is too soft to teach).

    T = 1/s, s the leave-one-out accuracy above guessing, b the lowest hundredth.
    """
    posterior = Aggregate.fit(mu, logvar, y, classes, bandwidth, quantile=0.01)
    log_density, labels = posterior.leave_one_out()
    q = posterior.weigh(log_density, posterior.log_floor)
    right = q.argmax(1) == labels
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


def log_normal_images(z, width, mu, variance):
    """log N(z_m; mu_i, diag(variance_i + width_m)) (M,N): the integral over q(z|x_m).

    One dimension at a time keeps the memory at (M,N); eight variances share one logarithm.
    """
    dim = z.shape[1]
    total = torch.full((len(z), len(mu)), dim * LOG_2PI, device=z.device)
    product = torch.ones_like(total)
    for d in range(dim):
        both = width[:, d, None] + variance[:, d]
        difference = z[:, d, None] - mu[:, d]
        total.addcdiv_(difference.square_(), both)
        product *= both
        if d % 8 == 7 or d == dim - 1:  # before the product leaves float32's range
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


def nearest(z, mu, count):
    """The nearest of codes mu (N,D) to points z (M,D): their rows, distances (M,count)."""
    rows = []
    distances = []
    for some in z.split(max(1, 2**24 // len(mu))):      # pairs at once
        closest = torch.cdist(some, mu).topk(min(count, len(mu)), largest=False)
        rows.append(closest.indices)
        distances.append(closest.values)
    return torch.cat(rows), torch.cat(distances)


def neighbour_graph(mu, distances=None, share=0.0, neighbours=7):
    """Sparse weights V + V^T (N,N), on the CPU, of codes mu (N,D) and their nearest ones.

    V_ij = exp(-d_ij / d_ik), d the squared distance, k the last neighbour. A part `share` of
    d is that of the images behind the codes, `distances`: rows (N,M) -> (N,M); each kind is
    measured in that of the last neighbour.
    """
    candidates = 50 if share else neighbours
    near, distance = nearest(mu, mu, 1 + candidates)
    near = near[:, 1:]                  # the nearest is the code itself
    square = in_neighbours(distance[:, 1:].square(), neighbours)
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
    share = torch.cat(right).float().mean()
    return bool(share > 0.5 + 0.5 / classes)


def spread_labels(mu, y, classes, distances=None, share=0.0, neighbours=7, alpha=0.99):
    """Labels (N,) of codes mu (N,D), from y (n,) of the first n; -1 where none arrives.

    None arrives anywhere, if the labels do not predict each other: they would mislead.
    `distances` and `share` as of `neighbour_graph`.
    """
    graph = neighbour_graph(mu.float(), distances, share, neighbours)
    given = y.cpu().long()
    others = spread(graph, torch.arange(len(y)), given, classes, alpha)[len(y):]
    if not labels_agree(graph, given, classes, alpha):
        others = torch.full_like(others, -1)
    return torch.cat([given, others]).to(y.device)


def suspects(q, y):
    """Which labels y (N,) look wrong by percentages q (N,K) that do not know them.

    -> rows, the likeliest to be wrong first, and the class that each should have. As in
    confident learning (Northcutt et al. 2021), each class is measured by what the images that
    are labelled so have of it on average; the order is that of q(y) to q(that other class).
    """
    one_hot = F.one_hot(y, q.shape[1]).to(q)
    usual = (one_hot * q).sum(0) / one_hot.sum(0).clamp(min=1)
    measured = q / usual.clamp(min=1e-6)
    of_label = measured.gather(1, y[:, None])[:, 0]
    best, claim = measured.where(one_hot == 0, 0).max(1)
    odds = of_label.clamp(min=1e-30).log() - best.clamp(min=1e-30).log()
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
    near, _ = nearest(test_mu, mu, neighbours)          # (T,k)
    difference = torch.full(near.shape, math.inf, device=mu.device)
    for rows in torch.arange(len(test_mu), device=mu.device).split(1000):
        x = test_images[rows].float().flatten(1)
        variance = x.var(1, unbiased=False).clamp(min=1)
        for j in range(near.shape[1]):
            other = images[near[rows, j]].float().flatten(1)
            difference[rows, j] = (x - other).square().mean(1) / variance
    least, j = difference.min(1)
    tests = (least <= most).nonzero()[:, 0]
    tests = tests[least[tests].argsort(stable=True)]
    return near[tests, j[tests]], tests, least[tests]


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


def far_apart(points, centres, count=7) -> list:
    """Rows of points (N,2), each as far as can be from the centres and those before it."""
    taken = list(centres)
    rows = []
    for _ in range(count):              # there are few: no need to remember distances
        distance = torch.cdist(points, torch.stack(taken)).amin(1)
        rows.append(int(distance.argmax()))
        taken.append(points[rows[-1]])
    return rows


def draw_map(axes, mu, y, classes, posterior, generator, given=None):
    """Codes in two dimensions, an ellipse a class, random points X with their percentages.

    Labels y (N,) are -1 where there is none. Those `given` (N,) are large where not all are.
    To be drawn last of its figure: the labels are placed on the finished layout.
    """
    import common
    common.tidy(axes, "Where do the classes live?", "first main direction",
                "second main direction")
    large = torch.zeros_like(y, dtype=torch.bool)
    size = 9                            # of the others
    if given is not None and not given.all():
        large = given
        size = 4
    unknown = mu[y < 0]
    mu = mu[y >= 0]
    large = large[y >= 0]
    y = y[y >= 0]
    mean, directions = plane_of(mu, y, len(classes))
    xy = (mu - mean) @ directions
    without = (unknown[:1500] - mean) @ directions
    draw_points(axes, without, s=3, color="0.6", alpha=0.35, linewidths=0)
    centres = {}
    for c in y.unique().tolist():
        centres[c] = xy[y == c].mean(0)
        draw_class(axes, xy[y == c], c, large[y == c], size)

    z = undecided_points(mu, posterior, generator)
    flat = (z - mean) @ directions
    crosses = far_apart(flat, centres.values())
    boxes = draw_crosses(axes, flat[crosses])
    for c, centre in centres.items():
        colour = common.COLOURS[c % 10]
        write_near(axes, classes[c], centre.tolist(), boxes, (0, 9, 18, 27, 36),
                   edge=colour, size=11, weight="bold", zorder=9)
    for k in crosses:
        text = words(posterior(z[[k]])[0], classes)
        write_near(axes, text, flat[k].tolist(), boxes, (15, 25, 38, 54), size=9.5, zorder=10)


def draw_points(axes, xy, **look):
    """Points (N,2), not so many that they hide each other."""
    axes.scatter(xy[:1500, 0], xy[:1500, 1], **look)


def draw_class(axes, xy, c, large, size):
    """Points (N,2) of class c, and an ellipse of 1.5 standard deviations about their mean.

    `large` (N,) says which are drawn large; the others have a `size`.
    """
    import common
    from matplotlib.patches import Ellipse
    colour = common.COLOURS[c % 10]
    look = dict(color=colour, marker=common.MARKERS[c % 10])
    draw_points(axes, xy[~large], s=size, alpha=0.35, linewidths=0, **look)
    draw_points(axes, xy[large], s=30, edgecolors="white", linewidths=0.5, zorder=3, **look)
    if len(xy) < 3:
        return
    variance, turn = torch.linalg.eigh(xy.T.double().cov())
    height, width = (3 * variance.clamp(min=0).sqrt()).tolist()
    right, up = turn[:, 1].tolist()     # the direction of the largest variance
    angle = math.degrees(math.atan2(up, right))
    centre = xy.mean(0).tolist()
    ellipse = Ellipse(centre, width, height, angle=angle, fill=False, color=colour, lw=1.5)
    axes.add_patch(ellipse)


def draw_crosses(axes, points) -> list:
    """Draw an X at points (n,2) -> a box of pixels about each, which no text should cover."""
    from matplotlib.transforms import Bbox
    axes.plot(points[:, 0], points[:, 1], "x", color="black", ms=9, mew=2.2)
    figure = axes.figure.figure         # the whole one, if the axes are part of a subfigure
    figure.draw_without_rendering()     # settles the layout, and so the pixels
    reach = 6 * figure.dpi / 72
    boxes = []
    for pixel in axes.transData.transform(points):
        boxes.append(Bbox([pixel, pixel]).padded(reach))
    return boxes


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
        cost = overlap(box, boxes) + 1000 * cut_off + radius
        places.append((cost, place))
    _, best = min(places)
    label.set_position(best)
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
WRONG = "label looks wrong"
TEACHING = "label would teach most"
COPY = "nearly a training image"
WHY = (WRONG, TEACHING, COPY)           # of a line in review.csv
COLUMNS = ["image", "new_label", "why", "label", "likeliest", "sure", "like"]
BANDWIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5)        # of the aggregate; one is chosen
SHRINKAGES = (0.0, 0.1, 0.5, 1.0)       # of the Gaussian; one is chosen


class Part(NamedTuple):
    """Images of a data set as this script sees them."""
    name: str
    rows: torch.Tensor                  # (N,) as Dataset counts them
    given: torch.Tensor                 # (N,) labels, -1 where there is none
    y: torch.Tensor                     # (N,) these and, among training images, spread ones
    mu: torch.Tensor                    # (N,D)
    logvar: torch.Tensor                # (N,D)
    q: torch.Tensor | None = None       # (N,K) percentages, once they are known

    def take(self, some):
        """The images of some places, in that order, or of a mask."""
        columns = []
        for column in self[1:]:
            columns.append(None if column is None else column[some])
        return Part(self.name, *columns)

    def codes(self):
        """What a posterior is fitted to, or calibrated on."""
        return self.mu, self.logvar, self.y


def with_spread(part, data, deform):
    """Labels (N,) of a part: the given ones and, where these are -1, spread ones.

    To at most SPREAD of the images without a label, from at most so many with one. Says what
    became of it.
    """
    known = (part.given >= 0).nonzero()[:, 0]
    without = (part.given < 0).nonzero()[:, 0]
    if not len(without):
        return part.given
    known = known[subsample(len(known), SPREAD)]
    asked = without[subsample(len(without), SPREAD)]
    some = torch.cat([known, asked])
    distances = functools.partial(deform.distances, data.take(part.rows[some]))
    spread_to = spread_labels(part.mu[some], part.given[known], len(data.classes), distances,
                              deform.strength)
    labels = part.given.clone()
    labels[asked] = spread_to[len(known):]
    count = int((labels[asked] >= 0).sum())
    if count:
        print(f"labels are spread to {count:,} of {len(without):,} images without one")
    else:
        print("the labels do not predict each other: none is spread to the "
              f"{len(without):,} images without one, only labelled ones are used")
    return labels


def calibrated_on(validation, kind, choices, known, classes):
    """A kind of posterior of a part, calibrated on another part; its choice."""
    def fit(choice):
        return kind.fit(*known.codes(), classes, choice)

    return calibrate(fit, choices, *validation.codes())


def densities(known, prior, validation, test):
    """Both densities, calibrated, their q of the test images, what they are worth; by name.

    `known`, `validation` and `test` are parts, `prior` is (K,).
    """
    classes = len(prior)
    narrow = Aggregate.fit(*known.codes(), classes, bandwidth=0.0)(test.mu, test.logvar)
    metrics = {"class priors": worth(prior.expand_as(narrow), test.y),
               "encoder's width": worth(narrow, test.y)}
    calibrated = {}
    shares = {}
    for name, kind, choices in (("aggregate", Aggregate, BANDWIDTHS),
                                ("gaussian", Gaussian, SHRINKAGES)):
        posterior, choice = calibrated_on(validation, kind, choices, known, classes)
        calibrated[name] = posterior
        shares[name] = posterior(test.mu, test.logvar)
        metrics[name] = {**worth(shares[name], test.y), "choice": choice,
                         "temperature": posterior.temperature}
    return calibrated, shares, metrics


def without_own(posterior, part, some):
    """q (N,K) of the images of a part, those at the places `some` without their own code.

    The aggregate `posterior` is that of these places.
    """
    code = torch.full_like(part.rows, -1)               # of each image, -1 for none
    by_class = part.y[some].argsort(stable=True)        # the order of an aggregate's codes
    code[some[by_class]] = torch.arange(len(some), device=code.device)
    log_density = posterior.log_density(part.mu, part.logvar, code)
    return posterior.weigh(log_density, posterior.image_floor)


def percentage_table(data, parts):
    """A line an image: its labels, its likeliest class, how sure that is, all shares.

    Each is made as it is written: all of them may take much memory.
    """
    yield "image part label spread likeliest sure".split() + data.classes
    names = [*data.classes, ""]         # the last one, -1, is none
    for part in parts:
        sure, likeliest = part.q.max(1)
        tensors = (part.rows, part.given, part.y, likeliest, sure, part.q)
        columns = [tensor.tolist() for tensor in tensors]
        for row, label, y, best, most, shares in zip(*columns):
            source = part.name if label >= 0 else "unlabelled"
            spread_label = names[y] if y != label else ""
            line = [data.names[row], source, names[label], spread_label, names[best]]
            for share in (most, *shares):
                line.append(f"{share:.4f}")
            yield line


def findings(data, train, labelled, test, seen) -> list:
    """What a person should look at, a dict of `COLUMNS` an image.

    `labelled` is the part of `train` with a given label, its percentages those by the others.
    Images whose names are in `seen` are left out.
    """
    places, claims = suspects(labelled.q, labelled.given)
    lines = review_lines(WRONG, data, labelled.take(places), claims, seen)

    asked = train.given < 0
    for k, row in enumerate(train.rows.tolist()):
        if data.names[row] in seen:
            asked[k] = False
    unlabelled = train.take(asked)
    places = to_label(unlabelled.q, unlabelled.mu, labelled.mu, REVIEWED)
    part = unlabelled.take(places)
    lines += review_lines(TEACHING, data, part, part.q.argmax(1), seen)

    originals, copies, _ = near_duplicates(train.mu, data.take(train.rows), test.mu,
                                           data.test_images)
    part = test.take(copies)
    like = train.rows[originals].tolist()
    lines += review_lines(COPY, data, part, part.q.argmax(1), seen, like)
    return lines


def review_lines(why, data, part, likeliest, seen, like=None) -> list:
    """Lines for the first images of a part that are not `seen`.

    `likeliest` (N,): the class that each is said to be; `like`: the row of a similar image.
    """
    lines = []
    for k, c in enumerate(likeliest.tolist()):
        name = data.names[part.rows[k]]
        if name in seen or len(lines) == REVIEWED:
            continue
        line = dict.fromkeys(COLUMNS, "")
        line["image"] = name
        line["why"] = why
        label = int(part.given[k])
        if label >= 0:
            line["label"] = data.classes[label]
        line["likeliest"] = data.classes[c]
        line["sure"] = f"{float(part.q[k, c]):.4f}"
        if like:
            line["like"] = data.names[like[k]]
        lines.append(line)
    return lines


def new_labels(path) -> dict:
    """The lines of a table that a person has written a new label into, by image."""
    import common
    if path is None or not Path(path).exists():
        return {}
    lines = common.read_table(Path(path), ["image", "new_label"])
    return {line["image"]: line for line in lines if line["new_label"]}


def draw_review(data, lines):
    """The first of each kind, with what the percentages say."""
    import common
    fig = common.figure(13, 6)
    legible = dict(zip(data.classes, common.legible(data.classes)))
    rows = {name: row for row, name in enumerate(data.names)}
    for why, strip in zip(WHY, fig.subfigures(len(WHY), 1)):
        shown = [line for line in lines if line["why"] == why]
        count = f"{len(shown)} images" if shown else "none"
        strip.suptitle(f"{why.capitalize()}: {count}", x=0.01, ha="left", fontsize=11,
                       fontweight="bold")
        for axes, line in itertools.zip_longest(strip.subplots(1, 10), shown[:10]):
            if line is None:
                axes.set_axis_off()
                continue
            pictures = [line["image"]]
            caption = f"{float(line['sure']):.0%} {legible[line['likeliest']]}"
            if line["like"]:
                pictures = [line["like"], line["image"]]
                caption = "training, test"
            elif line["label"]:
                caption = f"{legible[line['label']]}; rather\n{caption}"
            images = data.take(torch.tensor([rows[name] for name in pictures]))
            common.show_images(axes, images, len(images), caption)
    return fig


def by_given_labels(labelled, validation, classes):
    """q (N,K) of labelled images by the given labels of the others, and no spread ones."""
    some = subsample(len(labelled.rows), 5000).to(labelled.rows.device)
    posterior, _ = calibrated_on(validation, Aggregate, BANDWIDTHS, labelled.take(some),
                                 classes)
    return without_own(posterior, labelled, some)


def review(run, data, train, validation, test):
    """Write review.csv and review.png; what a person has filled in stays."""
    import common
    path = run.out / "review.csv"
    filled_in = new_labels(path)
    earlier = {**new_labels(run.labels_from), **filled_in}
    labelled = train.take(train.given >= 0)
    if len(labelled.rows) < len(train.rows):
        # A label that was spread would come back from the neighbours.
        q = by_given_labels(labelled, validation, len(data.classes))
        labelled = labelled._replace(q=q)
    agree = labelled.q.argmax(1) == labelled.given
    print(f"percentages agree with {agree.float().mean():.0%} of the labels; review of "
          "the others, as far as these can be trusted:")
    lines = findings(data, train, labelled, test, earlier)
    common.write(run.out / "review.png", draw_review(data, lines))
    table = [COLUMNS]
    for line in [*earlier.values(), *lines]:
        table.append([line.get(column) for column in COLUMNS])
    time = path.stat().st_mtime_ns if filled_in else 0
    common.write(path, table)
    if filled_in and filled_in.keys() == earlier.keys():
        os.utime(path, ns=(time, time))         # no new label in it: nothing for make to do
    counts = collections.Counter(line["why"] for line in lines)
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


def draw(data, train, posterior, metrics, generator):
    """The map of a part, and what its percentages are worth."""
    import common
    fig = common.figure(11, 5.4)
    left, right = fig.subplots(1, 2, width_ratios=[1.45, 1])
    draw_reliability(right, metrics)
    classes = common.legible(data.classes)
    given = (train.given >= 0).cpu()
    draw_map(left, train.mu.cpu(), train.y.cpu(), classes, Aggregate(**stored(posterior)),
             generator, given)
    return fig


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
    fitting = validation.take(subsample(len(validation.rows), 2000))
    every = len(data.names)
    test = encoded("test", torch.arange(every - len(data.test_images), every))

    some = (train.y >= 0).nonzero()[:, 0]
    prior = train.y[some].bincount(minlength=classes) / len(some)
    some = some[subsample(len(some), args.codes)]
    known = train.take(some)
    calibrated, shares, metrics = densities(known, prior, fitting, test)
    posterior = calibrated["aggregate"]
    validation = validation._replace(q=posterior(validation.mu, validation.logvar))
    test = test._replace(q=shares["aggregate"])
    # An image costs D times what a point does, and there may be many: fewer codes will do.
    fewer = some[subsample(len(some), 5000)]
    coarse = Aggregate.fit(*train.take(fewer).codes(), classes, metrics["aggregate"]["choice"])
    coarse.temperature = posterior.temperature
    train = train._replace(q=without_own(coarse, train, fewer))

    generator = torch.Generator().manual_seed(args.seed)
    picture = draw(data, train, posterior, metrics, generator)
    common.write(run.out / "latent.png", picture)
    common.write(run.out / "latent.csv", percentage_table(data, [train, validation, test]))
    if args.review:
        review(run, data, train, fitting, test)
    for name, density in calibrated.items():
        calibrated[name] = stored(density)
    teacher = teach(*known.codes(), classes)
    common.save(run.out / "latent.pt", run, data, metrics, [run.out / "vae.pt"],
                mu=train.mu.cpu(), logvar=train.logvar.cpu(), labels=train.y.cpu(),
                given=train.given.cpu() >= 0, q=train.q.cpu(), calibrated=calibrated,
                teaching=stored(teacher))
    print(f"{len(test.rows):,} test images, percentages fitted on {len(fitting.rows):,} "
          "others")
    report(metrics)
    print(run.out / "latent.png", run.out / "latent.csv", run.out / "latent.pt", sep="\n")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
