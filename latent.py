"""Class percentages of any point of the latent space: "20% cat + 80% dog".

    python latent.py                              # runs/glyphs/vae.pt -> runs/glyphs/latent.pt
    python latent.py -o runs/mnist --image seven.png   # the percentages of a picture
    python latent.py -o runs/mnist --point=-0.3,1.2,0.8      # of a latent point, D numbers
    python latent.py --review                     # which labels to look at next: review.csv

Reads:  vae.pt and its data set; deform.pt, where labels are spread to images without one.
Writes: latent.pt latent.json latent.png, latent.csv; with --review review.csv review.png.
"""
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Letters: N codes, M points, D latent size, K classes.  mu, logvar (N,D); y (N,), -1 for none;
# q (M,K).
LOG_2PI = math.log(2 * math.pi)
SPREAD = 60_000                         # most images of a kind that labels are spread among
CODES = 20_000                          # most codes that a density is made of
NEIGHBOURS = 7                          # along whom labels are spread, among images
FEATURE_NEIGHBOURS = 15                 # and among features
AGAIN = 2                               # rounds more of it, among features
SOFT = 1.1                              # temperature from which pseudo-labels are soft
SKILL = 1 / 3                           # between guessing, 0, and knowing, 1
DOUBT = 20                              # to one: odds from which a label looks wrong
CANDIDATES = 50                         # nearest codes, among which images say who is near


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

    def stored(self) -> dict:
        """Plain tensors and numbers, from which `restored` makes the same posterior."""
        fields = {"kind": type(self).__name__}
        for key, value in vars(self).items():
            fields[key] = value.cpu() if torch.is_tensor(value) else value
        return fields

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
        size = max(1, 2**20 // len(self.mu))            # pairs of point and code at once
        return in_parts(self.class_columns, size, z, logvar, without)

    def class_columns(self, z, logvar, left_out):
        """`log_density` of a few points or images."""
        if logvar is None:
            terms = log_normal(z, self.mu, self.variance)       # (M,N)
        else:
            terms = log_normal_images(z, logvar.exp(), self.mu, self.variance)
        size = torch.tensor(self.counts, device=z.device)
        if left_out is not None:
            every = torch.arange(len(z), device=z.device)
            terms[every, left_out] = -math.inf
            size = size - F.one_hot(self.classes_of(left_out), len(size))       # (M,K)
        columns = [part.logsumexp(1) for part in terms.split(self.counts, 1)]
        return torch.stack(columns, 1) - size.clamp(min=1).log()        # -inf without codes

    def classes_of(self, rows):
        """The classes of the codes in these rows."""
        counts = torch.tensor(self.counts, device=rows.device)
        return torch.bucketize(rows, counts.cumsum(0), right=True)

    def leave_one_out(self, logvar=None, limit=2000):
        """log p(z_i|c) (M,K), labels (M,) of at most `limit` codes, each without itself.

        With logvar (N,D), sorted by class as the codes are, of the images and not of points.
        """
        rows = subsample(len(self.mu), limit).to(self.mu.device)
        if logvar is not None:
            logvar = logvar[rows]
        return self.log_density(self.mu[rows], logvar, rows), self.classes_of(rows)


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
        points = subsample(len(mu), 2000)
        images = subsample(len(mu), 500)
        of_images = posterior.log_density(mu[images], logvar[images])
        posterior.set_floors(posterior.log_density(mu[points]), of_images, quantile)
        return posterior

    def log_density(self, z, logvar=None):
        """log p(z|c) (M,K); with logvar (M,D) integrated over each image's own width."""
        if len(z) == 0:                 # there may be no validation images
            return z.new_zeros(0, len(self.prior))
        if logvar is None:
            return log_normal_full(z, self.mean, self.covariance)
        size = max(1, 2**23 // self.covariance.numel())         # (size,K,D,D) at once
        return in_parts(self.of_images, size, z, logvar)

    def of_images(self, z, logvar):
        """`log_density` of a few images."""
        width = logvar.exp().diag_embed()
        return log_normal_full(z, self.mean, self.covariance + width[:, None])


# The densities, what is tried of their bandwidth or shrinkage, and what is usual.
KINDS = {"aggregate": (Aggregate, (0.25, 0.5, 0.75, 1.0, 1.5), 1.0),
         "gaussian": (Gaussian, (0.0, 0.1, 0.5, 1.0), 0.1)}


def log_normal_full(z, mean, covariance):
    """log N(z_m; mean_c, covariance_c) (M,K), unchecked: that would take longest."""
    normal = torch.distributions.MultivariateNormal(mean, covariance, validate_args=False)
    return normal.log_prob(z[:, None])


def in_parts(function, size, *tensors):
    """A function of tensors (M,...), or None in their place, of `size` rows at a time."""
    parts = []
    for rows in torch.arange(len(tensors[0]), device=tensors[0].device).split(size):
        given = [None if tensor is None else tensor[rows] for tensor in tensors]
        parts.append(function(*given))
    return torch.cat(parts)


def restored(fields: dict) -> Posterior:
    """The posterior that was `stored`."""
    told = dict(fields)
    kinds = {kind.__name__: kind for kind, _, _ in KINDS.values()}
    return kinds[told.pop("kind")](**told)


class Codes(NamedTuple):
    """What a latent space knows of its images: where each lies, its class, the percentages."""
    rows: torch.Tensor                  # (N,) of the images in their data set
    mu: torch.Tensor                    # (N,D)
    logvar: torch.Tensor                # (N,D)
    y: torch.Tensor                     # (N,) labels, given or spread
    given: torch.Tensor                 # (N,) bool: which are given
    posterior: Posterior                # of points, as `fit_labeller` makes it

    @classmethod
    def restore(cls, saved: dict):
        """The codes of a loaded latent.pt."""
        posterior = restored(saved["labeller"])
        return cls(*(saved[key] for key in cls._fields[:-1]), posterior)

    def known(self):
        """Those that have a label, given or spread."""
        return self.some(self.y >= 0)

    def labelled(self):
        """What a density is fitted to: mu, logvar, y."""
        return self.mu, self.logvar, self.y

    def some(self, rows):
        """Those of an index or a mask."""
        return Codes(*(part[rows] for part in self[:-1]), self.posterior)


def embed(mu, logvar, rows, y, classes, places, images, moves=None) -> Codes:
    """Codes mu, logvar (N,D) of images (N,C,H,W), or of features, the `rows` (N,) of a set.

    Labels y (N,) are -1 for none: those of the others are spread to them, among images that
    are near in `places` (N,P), which are codes or features, and, to the strength of `moves`,
    a deform.Deformations, as images that move so. Among features that is done again where the
    classes lie further apart.
    """
    of_features = images.dim() == 2
    y = y.long()
    given = y >= 0
    labels = y.clone()
    if not given.all():
        # All have a place in the graph, unless there are very many.
        among = torch.cat([some_rows(given, SPREAD), some_rows(~given, SPREAD)])
        among = among.sort()[0]
        places = places[among]
        images = images[among]
        y = y[among]
        graph = graph_of(places, images, moves)
        found = spread_labels(graph, y, classes, balanced=of_features)
        for _ in range(AGAIN if of_features and (found > y).any() else 0):
            graph = graph_of(told_apart(places, found, y >= 0, classes), images, moves)
            found = spread_labels(graph, y, classes, balanced=True, agreed=True)
        labels[among] = found
    known = some_rows(labels >= 0, CODES)
    posterior = fit_labeller(mu[known], logvar[known], labels[known], classes, of_features)
    return Codes(rows, mu, logvar, labels, given, posterior)


def pseudo_labels(codes, soft=None):
    """Of the codes whose label was spread: which these are (N,), and q (M,K) of them.

    One class each or, of features and if `soft`, the mean of that and of the labeller's
    percentages; None: soft where its temperature is above SOFT. Hard labels that are often
    wrong make a classifier too sure; of images they are the better ones all the same.
    """
    guessed = (codes.y >= 0) & ~codes.given
    if soft is None:
        soft = codes.posterior.temperature > SOFT
    q = F.one_hot(codes.y[guessed], len(codes.posterior.prior)).float()
    if soft and isinstance(codes.posterior, Gaussian):
        q = (q + codes.posterior(codes.mu[guessed])) / 2
    return guessed, q


def fit_labeller(mu, logvar, y, classes, of_features=False):
    """The posterior that labels hybrids (the best-calibrated one is too soft for that).

    T = 1/s, s the leave-one-out accuracy above guessing, b the lowest hundredth. Among
    features a Gaussian a class knows more, and hardly depends on one code: none is left out.
    Raises ValueError for labels y (N,) that are not integers in 0..classes-1.
    """
    whole = y.shape == mu.shape[:1] and not y.is_floating_point()
    if not whole or y.min() < 0 or y.max() >= classes:
        raise ValueError(f"labels of shape {tuple(y.shape)}, {y.dtype}; wanted one integer a "
                         f"code, in 0..{classes - 1}")
    if of_features:
        posterior = Gaussian.fit(mu, logvar, y, classes, quantile=0.01)
        log_density = posterior.log_density(mu.float())
    else:
        posterior = Aggregate.fit(mu, logvar, y, classes, quantile=0.01)
        log_density, y = posterior.leave_one_out()
    q = posterior.weigh(log_density, posterior.log_floor)
    posterior.temperature = softness(q, y, posterior.prior)
    return posterior


def softness(q, y, prior) -> float:
    """T = 1/s of predictions q (N,K) of labels y (N,); s is 0 if guessed, 1 if known."""
    accuracy = (q.argmax(1) == y).float().mean().item()
    guess = prior.max().item()
    skill = (accuracy - guess) / max(1 - guess, 1e-6)
    return 1 / max(skill, 0.03)         # at most 33: nearly the priors


def class_means(mu, y, classes):
    """(K,D); zeros for a class without codes."""
    one_hot = F.one_hot(y, classes).to(mu)
    counts = one_hot.sum(0).clamp(min=1)
    return one_hot.T @ mu / counts[:, None]


def log_normal(z, mu, variance):
    """log N(z_m; mu_i, diag(variance_i)) (M,N) by three matrix products."""
    centre = mu.mean(0)                 # smaller numbers cancel less
    z = z - centre
    mu = mu - centre
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
    losses = {}
    for temperature in torch.logspace(-2, 6, 65, base=2).tolist():
        log_q = (posterior.prior.log() + evidence / temperature).log_softmax(1)
        losses[temperature] = F.nll_loss(log_q.clamp(min=-30), y.long()).item()
    best = min(losses, key=losses.get)
    return best, losses[best]


def calibrate(kind, choices, codes, held_out, classes, limit=500):
    """A density fitted to codes and calibrated on others -> the posterior, its choice, NLL.

    `kind` is Aggregate or Gaussian, codes and held_out are (mu, logvar, y). Of `choices`, that
    is bandwidths or shrinkages, the one of least NLL is taken, then the temperature likewise.
    """
    _, _, y = held_out
    some = subsample(len(y), limit).to(y.device)        # the choice is coarse: a few settle it
    few = [part[some] for part in held_out]
    losses = {}
    for choice in choices:
        posterior = kind.fit(*codes, classes, choice)
        _, losses[choice] = best_temperature(posterior, *few)
    choice = min(losses, key=losses.get)
    posterior = kind.fit(*codes, classes, choice)
    posterior.temperature, nll = best_temperature(posterior, *held_out)
    return posterior, choice, nll


def calibrate_left_out(kind, choice, codes, classes):
    """As `calibrate`, without other images: each code left out of its own prediction."""
    _, _, y = codes
    posterior = kind.fit(*codes, classes, choice)
    q = left_out(kind, choice, 1.0, *codes, classes)
    posterior.temperature = softness(q, y, posterior.prior)
    q = left_out(kind, choice, posterior.temperature, *codes, classes)
    nll = F.nll_loss(q.clamp(min=1e-12).log(), y.long())
    return posterior, choice, nll.item()


def left_out(kind, choice, temperature, mu, logvar, y, classes, folds=10, most=5000):
    """q (N,K) of images, each by the labels of others: codes mu, logvar (N,D), y (N,).

    The labelled ones in folds, each by a density of at most so many of the other folds; those
    without a label by one of all folds.
    """
    # By class: each fold has its share of every one.
    order = y.argsort(stable=True)
    order = order[y[order] >= 0]
    fold = torch.full_like(y, -1)
    fold[order] = torch.arange(len(order), device=y.device) % folds
    q = mu.new_zeros(len(y), classes)
    for k in fold.unique().tolist():
        others = some_rows((y >= 0) & (fold != k), most)
        posterior = kind.fit(mu[others], logvar[others], y[others], classes, choice)
        posterior.temperature = temperature
        asked = fold == k
        q[asked] = posterior(mu[asked], logvar[asked])
    return q


def some_rows(mask, most):
    """The rows of a mask (N,) where it is true, at most so many."""
    rows = mask.nonzero()[:, 0]
    return rows[subsample(len(rows), most).to(rows.device)]


def subsample(n, most):
    """At most `most` of the rows 0..n-1, at random but always the same ones, in order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(n, generator=generator)[:most].sort()[0]


# ---- labels for images without one ----------------------------------------------------------

def graph_of(places, images, moves):
    """The `neighbour_graph` of places (N,P) and of images there, as far as these move."""
    if images.dim() == 2:
        return neighbour_graph(*nearest(places, FEATURE_NEIGHBOURS))
    if moves is None or moves.strength == 0:
        return neighbour_graph(*nearest(places, NEIGHBOURS))
    near, square = nearest(places, CANDIDATES)
    moved = in_neighbours(moves.distances(images, near))
    square = torch.lerp(in_neighbours(square), moved, moves.strength)
    square, order = square.topk(min(NEIGHBOURS, near.shape[1]), largest=False)
    return neighbour_graph(near.gather(1, order), square)


def nearest(mu, count):
    """Of each code the `count` nearest others: their rows, squared distances (N,count)."""
    mu = mu.float()
    rows = []
    squares = []
    own = torch.arange(len(mu), device=mu.device)
    for some in own.split(max(1, 2**24 // len(mu))):    # pairs at once
        distance = torch.cdist(mu[some], mu)
        distance[own[:len(some)], some] = math.inf      # a code is not its own neighbour
        closest = distance.topk(min(count, len(mu) - 1), largest=False)
        rows.append(closest.indices)
        squares.append(closest.values.square())
    return torch.cat(rows), torch.cat(squares)


def in_neighbours(square, neighbours=NEIGHBOURS):
    """Squared distances (N,M), each row measured in the one to its last neighbour."""
    k = min(neighbours, square.shape[1])
    last = square.topk(k, largest=False).values[:, -1:]
    return square / last.clamp(min=1e-12)


def neighbour_graph(near, square):
    """Sparse weights V + V^T (N,N), on the CPU, of neighbours near (N,k) at squared distances.

    V_ij = exp(-d_ij / d_ik), k the last neighbour.
    """
    count = len(near)
    weight = (-in_neighbours(square, near.shape[1])).exp().cpu()
    rows = torch.arange(count).repeat_interleave(near.shape[1])
    pairs = torch.stack([rows, near.flatten().cpu()])
    graph = torch.sparse_coo_tensor(pairs, weight.flatten(), (count, count),
                                    check_invariants=False)
    return (graph + graph.T).coalesce()


def told_apart(places, labels, given, classes):
    """Places (N,P) and, beside them, the directions in which labels (N,) differ (N,P+C).

    Linear discriminants (Fisher 1936) of the labels, -1 for none; those `given` (N,) weigh a
    quarter in all, or more if there are more. The places go on to count, at twice a
    direction's weight within a class: along one direction alone no label would reach far.
    """
    guessed = (labels >= 0) & ~given
    mass = guessed + given * (guessed.sum() / given.sum() / 3).clamp(min=1)
    weight = F.one_hot(labels.clamp(min=0), classes) * mass[:, None]            # (N,K)
    count = weight.sum(0)
    mean = weight.T @ places / count.clamp(min=1e-6)[:, None]
    within = (places.T * mass) @ places - (mean.T * count) @ mean
    within /= count.sum()
    size = within.trace()
    within = torch.lerp(within, size * torch.eye(len(within)).to(within) / len(within), 0.1)
    variances, axes = torch.linalg.eigh(within)
    white = axes * variances.rsqrt()
    centres = mean[count > 0] @ white
    _, _, directions = torch.linalg.svd(centres - centres.mean(0), full_matrices=False)
    return torch.cat([2 * places / size.sqrt(), places @ white @ directions[:-1].T], 1)


def propagate(graph, given, alpha=0.99, rounds=100):
    """F <- alpha S F + (1-alpha) Y, S = D^-1/2 W D^-1/2, from Y `given` (N,M): F (N,M).

    Label spreading (Zhou et al. 2004). F is linear in Y, and S is symmetric.
    """
    degree = graph @ torch.ones(len(graph), 1)
    scale = degree.clamp(min=1e-12).rsqrt()
    given = (1 - alpha) * given
    belief = given
    for _ in range(rounds):
        belief = alpha * scale * (graph @ (scale * belief)) + given
    return belief


def spread(graph, rows, labels, classes, balanced=False):
    """Labels (N,) from those of a few rows, along a graph (N,N); -1 where none arrives.

    If `balanced`, each class has as much of F in all as it has of the labels (class mass
    normalisation, Zhu et al. 2003): else one where the graph is dense reaches further.
    """
    given = torch.zeros(len(graph), classes)
    given[rows, labels] = 1
    belief = propagate(graph, given)
    share = belief
    if balanced:
        share = belief / belief.sum(0).clamp(min=1e-30) * given.sum(0)
    return share.argmax(1).where(belief.amax(1) > 0, -1)


def labels_agree(graph, rows, y, classes) -> bool:
    """May the labels y (n,) of a few rows be spread along the graph?

    Two witnesses have to be more than SKILL of the way from guessing to knowing: how many
    labels the others predict, and of how many of the other rows the two halves of the labels
    say the same. The second has many rows to say so even where labels are few.
    """
    several = y.bincount(minlength=classes)[y] > 1      # a class of one label has no witness
    if not several.any():
        return False
    left_out = left_out_right(graph, rows, y, several, classes)
    agreed = halves_agree(graph, rows, y, several, classes)
    guess = 1 / classes
    return (min(left_out, agreed) - guess) / (1 - guess) > SKILL


def left_out_right(graph, rows, y, asked, classes, most=50) -> float:
    """The share of at most so many labels y (n,) of those `asked` that the others predict."""
    asked = some_rows(asked, most)
    columns = torch.arange(len(asked))
    start = F.one_hot(rows[asked], len(graph)).float().T        # (N,A), one column a label
    influence = propagate(graph, start)
    one_hot = F.one_hot(y, classes).float()
    every = torch.zeros(len(graph), classes)
    every[rows] = one_hot
    mass = propagate(graph, every).sum(0).repeat(len(asked), 1)         # (A,K)
    mass[columns, y[asked]] -= influence.sum(0)
    others = influence[rows]            # (n,A) of each label on the asked: S is symmetric
    others[asked, columns] = 0
    # As one label fewer has less to say, each class is measured by what it has in all.
    share = others.T @ one_hot / mass.clamp(min=1e-30)
    return (share.argmax(1) == y[asked]).float().mean().item()


def halves_agree(graph, rows, y, several, classes) -> float:
    """The share of rows without a label of which both halves of the labels say the same."""
    order = y.argsort(stable=True)
    alone = (~several).nonzero()[:, 0]                  # in both halves
    guesses = []
    for half in (order[::2], order[1::2]):              # half of each class
        half = torch.cat([half, alone])
        guesses.append(spread(graph, rows[half], y[half], classes, balanced=True))
    first, second = guesses
    asked = first >= 0                  # where no label arrives, none is said
    asked[rows] = False
    if not asked.any():
        return 1.0                      # there is nothing to be wrong about
    return (first == second)[asked].float().mean().item()


def spread_labels(graph, y, classes, balanced=False, agreed=False):
    """Labels (N,) of all nodes of a graph, from y (N,), -1 for none; -1 where none arrives.

    None arrives anywhere, if the labels do not predict each other: they would mislead. That
    is asked, unless they have `agreed`.
    """
    given = y.cpu()
    rows = (given >= 0).nonzero()[:, 0]
    if not agreed and not labels_agree(graph, rows, given[rows], classes):
        return y
    labels = spread(graph, rows, given[rows], classes, balanced=balanced)
    labels[rows] = given[rows]
    return labels.to(y.device)


# ---- which labels to look at ----------------------------------------------------------------

def suspects(q, y):
    """Which labels y (N,) look wrong by percentages q (N,K) that do not know them.

    -> rows, the likeliest to be wrong first, and the class that each should have. As in
    confident learning (Northcutt et al. 2021), each class is measured by what the images that
    are labelled so have of it on average: as many are wrong as have as much of another class,
    at odds of DOUBT. Which ones, these odds say, q(that class) to q(y), both so measured.
    """
    one_hot = F.one_hot(y, q.shape[1]).to(q)
    usual = (one_hot * q).sum(0) / one_hot.sum(0).clamp(min=1)
    measured = q / usual.clamp(min=1e-6)
    of_label = measured.gather(1, y[:, None])[:, 0]
    best, claim = measured.where(one_hot == 0, 0).max(1)
    odds = of_label.clamp(min=1e-30).log() - best.clamp(min=1e-30).log()
    order = odds.argsort(stable=True)
    doubted = (odds < -math.log(DOUBT)) & (best >= 1)
    rows = order[:int(doubted.sum())]
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


def words(q, classes) -> str:
    """Probabilities (K,) in words: the two likeliest classes, the likelier one last.

    >>> words([0.2, 0.8], ["cat", "dog"])
    '20% cat + 80% dog'
    """
    order = sorted(range(len(q)), key=q.__getitem__)
    shown = [c for c in order[-2:] if q[c] >= 0.005]         # below, it would read 0%
    parts = [f"{100 * q[c]:.0f}% {classes[c]}" for c in shown]
    if sum(q[c] for c in shown) < 0.95:
        parts.append("others")
    return " + ".join(parts)


# ---- command --------------------------------------------------------------------------------

REVIEWED = 100                          # most images of a kind in review.csv
WRONG = "label looks wrong"
TEACHING = "label would teach most"
COLUMNS = "image new_label why label likeliest sure fingerprint".split()


def parse_args(argv=None):
    from common import flags
    parser = flags("latent.py", __doc__)
    add = parser.add_argument_group("percentages").add_argument
    add("--review", action="store_true",
        help="write review.csv and review.png as well: which labels to look at next")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--image", metavar="FILE", help="print the percentages of this picture, and stop")
    add("--point", metavar="=Z1,Z2,...", type=numbers,
        help="print the percentages of this point, and stop")
    args = parser.parse_args(argv)
    args.writes = not (args.image or args.point)
    return args


def numbers(text):
    """A point as it is typed; argparse turns a ValueError into a line."""
    return [float(word) for word in text.split(",")]


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


def draw_map(axes, mu, y, classes, posterior, generator, given):
    """Codes in two dimensions, an ellipse a class, random points X with their percentages.

    Labels y (N,) are -1 where there is none. Those `given` (N,) are large where not all are.
    To be drawn last of its figure: the labels are placed on the finished layout.
    """
    import common
    common.tidy(axes, "Where do the classes live?", "first main direction",
                "second main direction")
    known = y >= 0
    mean, directions = plane_of(mu[known], y[known], len(classes))
    xy = (mu - mean) @ directions
    large = given & ~given.all()
    size = 4 if large.any() else 9      # of the others
    draw_points(axes, xy[~known], s=3, color="0.6")
    centres = {}
    for c in y[known].unique().tolist():
        here = y == c
        look = dict(color=common.COLOURS[c % 10], marker=common.MARKERS[c % 10])
        draw_points(axes, xy[here & ~large], s=size, **look)
        draw_points(axes, xy[here & large], s=30, alpha=1, ec="white", zorder=3, **look)
        axes.plot(*ellipse(xy[here]).T, color=look["color"], lw=1.5)
        centres[c] = xy[here].mean(0)

    z = points_between(mu[known], generator)
    q = posterior(z)
    flat = (z - mean) @ directions
    # Undecided, far from the centres and from each other.
    crosses = to_label(q, flat, torch.stack([*centres.values()]), 20)[:7]
    boxes = draw_crosses(axes, flat[crosses])
    for k in crosses.tolist():
        write_near(axes, words(q[k], classes), flat[k], boxes, size=9.5, zorder=10)
    reach = 100 if len(centres) <= 20 else 20           # else lines lead everywhere
    for c, centre in centres.items():
        write_near(axes, classes[c], centre, boxes, reach, size=11, weight="bold", zorder=9,
                   ec=common.COLOURS[c % 10])


def points_between(mu, generator, count=4000):
    """Random points (count,D) on lines between codes."""
    i, j = torch.randint(len(mu), (2, count), generator=generator)
    t = torch.rand(count, 1, generator=generator)
    return torch.lerp(mu[i], mu[j], t)


def draw_points(axes, xy, **look):
    """Points (N,2), not so many that they hide each other."""
    look = {"alpha": 0.35, "lw": 0.5, "ec": "none", **look}
    axes.scatter(*xy[:1500].T, **look)


def ellipse(xy):
    """Points (100,2) on the ellipse of 1.5 standard deviations about the mean of xy (N,2)."""
    turn = torch.linspace(0, 2 * math.pi, 100)
    circle = torch.stack([turn.cos(), turn.sin()])
    variance, directions = torch.linalg.eigh(xy.T.cov(correction=0))
    half_axes = 1.5 * variance.clamp(min=0).sqrt() * directions
    return xy.mean(0) + (half_axes @ circle).T


def draw_crosses(axes, points) -> list:
    """Draw an X at points (n,2) -> the box of each, in pixels, which no text should cover."""
    axes.plot(*points.T, "x", color="black", ms=9, mew=2.2)
    axes.figure.figure.draw_without_rendering()         # settles the layout, and so the pixels
    pixels = torch.from_numpy(axes.transData.transform(points))
    return [torch.cat([pixel - 11, pixel + 11]) for pixel in pixels]


def write_near(axes, text, point, boxes, reach=100, ec="none", **look):
    """Write a text near a point where it covers none of the boxes; add its own.

    A box is left, lower, right and upper in pixels. Where there is no room within `reach`, the
    text is left out.
    """
    frame = dict(boxstyle="round,pad=0.2", fc="white", ec=ec, alpha=0.85)
    leader = dict(arrowstyle="-", lw=0.8, shrinkA=0, shrinkB=4)
    label = axes.annotate(text, point.tolist(), (0, 0), textcoords="offset pixels",
                          ha="center", va="center", bbox=frame, arrowprops=leader,
                          in_layout=False, **look)
    here = label.get_window_extent().padded(4).extents.tolist()         # once: that is slow
    radius = torch.arange(0, reach, 10).repeat_interleave(16)
    angle = math.pi * (torch.arange(len(radius)) % 16 / 8 - 0.5)        # below the point first
    # Texts are wider than high: an ellipse of places.
    places = torch.stack([2.2 * radius * angle.cos(), radius * angle.sin()], 1)
    low, high = torch.tensor(here).view(2, 1, 2) + places       # (P,2) each
    frame = torch.tensor(axes.bbox.extents.tolist())
    inside = (low >= frame[:2]).all(1) & (high <= frame[2:]).all(1)
    others = torch.stack(boxes)
    beside = (low[:, None] > others[:, 2:]).any(2) | (high[:, None] < others[:, :2]).any(2)
    free = (inside & beside.all(1)).nonzero()[:, 0]
    if len(free) == 0:
        label.remove()
        return
    first = free[0]
    label.set_position(places[first].tolist())
    boxes.append(torch.cat([low[first], high[first]]))


def draw_reliability(axes, metrics):
    """Stated percentages against observed frequencies, one line a density."""
    import common
    axes.axline((0, 0), slope=1, color="black", lw=0.8)
    # What is stated is right to within five points.
    axes.fill_between([0, 1], [-0.05, 0.95], [0.05, 1.05], color="0.93")
    axes.set_prop_cycle(color=common.COLOURS)
    for name, style in zip(["encoder's width", *KINDS], ("-o", "--s", ":^", "-.D")):
        rows = metrics[name]["reliability"]
        stated = [row["stated"] for row in rows]
        observed = [row["observed"] for row in rows]
        axes.plot(stated, observed, style, ms=5, label=name)
    axes.legend(frameon=False, loc="upper left")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    common.tidy(axes, "Does 30% mean 30%?", "stated percentage",
                "observed frequency on test images")


def answer(run, args):
    """Print the percentages of a picture or of a point."""
    import common
    from vae import encode_all, restore
    saved = common.load(run, "latent")
    posterior = restored(saved["percentages"])
    if args.point:
        z = torch.tensor([args.point])
        dim = saved["mu"].shape[1]
        common.require(z.shape[1] == dim and z.isfinite().all(),
                       f"--point takes {dim} finite numbers with commas between")
        q = posterior(z)
    else:
        upstream = common.load(run, "vae")
        read = common.reader(run, saved, upstream.get("mean"), upstream.get("scale"))
        image, report = read(args.image)
        print(report)
        q = posterior(*encode_all(restore(upstream), image))
    print(common.ranking(q[0], saved["dataset"]["classes"]))


def percentage_table(data, parts):
    """A line an image: its labels, its likeliest class, how sure that is, all shares.

    `parts`: by name rows (N,), their labels y (N,), given or spread, and q (N,K). Each line is
    made as it is written: all of them may take much memory.
    """
    import common
    yield common.columns("image part label spread likeliest sure".split(), data.classes)
    names = [*data.classes, ""]         # the last one, -1, is none
    given = torch.cat([data.labels, data.test_labels])
    for part, (rows, y, q) in parts.items():
        tensors = (rows, given[rows], y, q.argmax(1), q)
        lists = [tensor.tolist() for tensor in tensors]
        for row, label, spread_label, best, shares in zip(*lists):
            line = [data.names[row], part, names[label], "", names[best]]
            if label < 0:
                line[1] = "unlabelled"
                line[3] = names[spread_label]
            yield line + [f"{share:.4f}" for share in (max(shares), *shares)]


def measure(q, y) -> dict:
    """What percentages q (N,K) of test images are worth."""
    import common
    return {**common.scores(q, y), "ece_interval": common.ece_interval(q, y),
            "reliability": common.reliability(q, y)}


def densities(codes, validation, test):
    """Both densities, calibrated on validation images, and what they say of test images.

    Those two are (mu, logvar, y) -> the name of the one with the lower held-out NLL, that one,
    and what all are worth. Without validation images each code is left out in turn.
    """
    mu, logvar, y = test
    known = codes.some(some_rows(codes.y >= 0, CODES)).labelled()
    some = subsample(len(validation[2]), 2000).to(y.device)
    held_out = [part[some] for part in validation]
    prior = codes.posterior.prior
    classes = len(prior)
    narrow = Aggregate.fit(*known, classes, bandwidth=0.0)
    metrics = {"class priors": measure(prior.expand(len(y), -1), y),
               "encoder's width": measure(narrow(mu, logvar), y)}
    posteriors = {}
    for name, (kind, choices, usual) in KINDS.items():
        if len(held_out[2]):
            posterior, choice, nll = calibrate(kind, choices, known, held_out, classes)
        else:
            posterior, choice, nll = calibrate_left_out(kind, usual, known, classes)
        posteriors[name] = posterior
        metrics[name] = {**measure(posterior(mu, logvar), y), "choice": choice,
                         "temperature": posterior.temperature, "held_out_nll": nll}
    speaking = min(KINDS, key=lambda name: metrics[name]["held_out_nll"])
    return speaking, posteriors[speaking], metrics


def findings(data, codes, q, labelled_q, seen) -> list:
    """What a person should look at, a dict of `COLUMNS` an image.

    q (N,K) are the percentages of all codes, `labelled_q` those of the ones with a given
    label, by the given labels of the others. Images whose names are in `seen` are left out.
    """
    import common
    given = codes.some(codes.given)
    others = codes.some(~codes.given)
    lines = []
    agree = labelled_q.argmax(1) == given.y
    if agree.float().mean() > 0.5:
        places, claims = suspects(labelled_q, given.y)
        lines = review_lines(WRONG, data, given, labelled_q, places, claims, seen)
    else:
        common.say("the percentages know too little to doubt a label")
    q = q[~codes.given]
    places = to_label(q, others.mu, given.mu, REVIEWED)
    claims = q[places].argmax(1)
    return lines + review_lines(TEACHING, data, others, q, places, claims, seen)


def review_lines(why, data, codes, q, places, claims, seen) -> list:
    """Lines for the first images at `places` of codes that are not `seen`.

    `claims`: the class that each is said to be, q (N,K) the percentages of the codes.
    """
    lines = []
    for k, claim in zip(places.tolist(), claims.tolist()):
        name = data.names[codes.rows[k]]
        label = data.classes[codes.y[k]] if codes.given[k] else ""
        if name not in seen and len(lines) < REVIEWED:
            cells = [name, "", why, label, data.classes[claim], f"{q[k, claim]:.4f}",
                     data.mark(codes.rows[k])]
            lines.append(dict(zip(COLUMNS, cells)))
    return lines


def draw_review(data, lines):
    """The first of each kind that has some, with what the percentages say."""
    import common
    legible = dict(zip(data.classes, common.legible(data.classes)))
    kinds = list(dict.fromkeys(line["why"] for line in lines))
    fig = common.figure(13, 0.5 + 2 * max(len(kinds), 1))
    if not lines:
        fig.suptitle("No label looks wrong, and every image has one")
    for k, why in enumerate(kinds):
        shown = [line for line in lines if line["why"] == why]
        for column, line in enumerate(shown[:10]):
            axes = fig.add_subplot(len(kinds), 10, 10 * k + column + 1)
            caption = f"{float(line['sure']):.0%} {legible[line['likeliest']]}"
            if line["label"]:
                caption = f"{legible[line['label']]}; rather\n{caption}"
            image = data.images[data.names.index(line["image"])]
            common.show_images(axes, image[None], 1, caption)
            if column == 0:
                title = f"{why.capitalize()}: {len(shown)} images"
                axes.text(0, 1.1, title, transform=axes.transAxes, in_layout=False,
                          fontsize=11, fontweight="bold")
    return fig


def review(run, data, codes, q, labelled_q):
    """Write review.csv, which the next review replaces, and review.png."""
    import common
    seen = set()
    if run.labels_from:
        lines = common.read_table(Path(run.labels_from), ["image", "new_label"])
        seen = {line["image"] for line in lines if line["new_label"]}
    lines = findings(data, codes, q, labelled_q, seen)
    path = run.out / "review.csv"
    common.write(run.out / "review.png", draw_review(data, lines))
    common.write(path, [COLUMNS, *(line.values() for line in lines)])
    for why in (WRONG, TEACHING):
        print(f"{why}: {sum(line['why'] == why for line in lines)}")
    mine = run.labels_from or run.out / "labels.csv"
    first = "deform" if data.features is None else "vae"        # features do not move
    print(f"copy lines of {path} to {mine}, write the classes, right or not, into the column "
          "new_label, and repeat all steps, as make does, from this one on:")
    print(common.command_for(run, first, labels_from=mine))
    print(run.out / "review.png")


def report(metrics, speaking):
    """What the percentages are worth, as a table; those that are used are marked."""
    print(f"{'* is used':17}  accuracy    NLL  Brier    ECE  95% interval")
    line = "{accuracy:10.1%} {nll:6.3f} {brier:6.3f} {ece:6.3f}  {low:.3f} to {high:.3f}"
    for name, scores in metrics.items():
        low, high = scores["ece_interval"]
        mark = "* " if name == speaking else "  "
        print(f"{mark}{name:15}" + line.format(low=low, high=high, **scores))


def draw(data, codes, posterior, metrics, generator):
    """The map of the codes, and what their percentages are worth."""
    import common
    fig = common.figure(11, 5.4)
    left, right = fig.subplots(1, 2, width_ratios=[1.45, 1])
    draw_reliability(right, metrics)
    classes = common.legible(data.classes)
    posterior = restored(posterior.stored())            # on the CPU
    draw_map(left, codes.mu.cpu(), codes.y.cpu(), classes, posterior, generator,
             codes.given.cpu())
    return fig


def codes_of(run, data, model, rows, images, sources):
    """The codes of the images, or features, of these rows; notes the files that it reads."""
    import common
    from deform import Deformations
    from vae import encode_all
    mu, logvar = encode_all(model, images, run.amp)
    y = data.labels[rows]
    without = int((y < 0).sum())
    places = mu
    moves = None
    if data.features is not None:
        places = model.project(images)
    elif without:
        moves = Deformations.restore(common.load(run, "deform", run.device))
        sources.append(run.out / "deform.pt")
    if without and not run.quiet:
        common.say(f"spreading labels among {len(rows):,} images")
    codes = embed(mu, logvar, rows, y, len(data.classes), places, images, moves)
    count = int((codes.y[y < 0] >= 0).sum())
    if count:
        print(f"labels are spread to {count:,} of {without:,} images without one")
    elif without:
        print("the labels do not predict each other: none is spread to the "
              f"{without:,} images without one, only labelled ones are used")
    return codes


def command(run, args):
    import common
    from vae import encode_all, restore
    if args.image or args.point:
        return answer(run, args)
    path = run.out / "review.csv"
    if args.review and path.exists():
        lines = common.read_table(path, ["image", "new_label"])
        common.require(not any(line["new_label"] for line in lines), f"{path} has new labels, "
                       f"and would be replaced; move it to {run.out / 'labels.csv'}")
    upstream = common.load(run, "vae", run.device)
    data = common.load_dataset(run)
    model = restore(upstream, run.device)
    rows = upstream["rows"]
    inputs = common.Inputs(data, rows)
    sources = [run.out / "vae.pt"]
    codes = codes_of(run, data, model, rows, inputs[rows], sources)
    validation = encode_all(model, inputs[data.validation], run.amp)
    validation_y = data.labels[data.validation]
    test = encode_all(model, inputs.test(), run.amp)
    if not run.quiet:
        common.say(f"calibrating the percentages of {len(data.classes):,} classes")
    speaking, posterior, metrics = densities(codes, (*validation, validation_y),
                                             (*test, data.test_labels))
    own = functools.partial(left_out, type(posterior), metrics[speaking]["choice"],
                            posterior.temperature, classes=len(data.classes))
    q = own(*codes.labelled())

    picture = draw(data, codes, posterior, metrics, torch.Generator().manual_seed(run.seed))
    common.write(run.out / "latent.png", picture)
    tests = torch.arange(len(data.images), len(data.names))
    common.write(run.out / "latent.csv", percentage_table(data, {
        "train": (rows, codes.y, q),
        "validation": (data.validation, validation_y, posterior(*validation)),
        "test": (tests, data.test_labels, posterior(*test))}))
    if args.review:
        labelled_q = q[codes.given]
        if not codes.given.all():       # a label that was spread would come back
            labelled_q = own(*codes.some(codes.given).labelled())
        review(run, data, codes, q, labelled_q)
    fields = {key: part.cpu() for key, part in zip(Codes._fields, codes[:-1])}
    common.save(run.out / "latent.pt", run, data, metrics, sources, **fields, q=q.cpu(),
                percentages=posterior.stored(), labeller=codes.posterior.stored())
    fitted = "validation images"
    if len(validation_y) == 0:
        fitted = "training images, each left out of its own prediction"
    print(f"{len(tests):,} test images; percentages calibrated on {fitted}")
    report(metrics, speaking)
    print(run.out / "latent.png", run.out / "latent.csv", run.out / "latent.pt", sep="\n")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
