"""Class percentages of any point of the latent space: "20% cat + 80% dog".

    python latent.py                                   # runs/glyphs/vae.pt -> runs/glyphs/latent.pt
    python latent.py -o runs/mnist --image seven.png   # the percentages of a picture
    python latent.py -o runs/mnist --point=-0.3,1.2,...      # of a latent point, D numbers

Reads:  vae.pt and its data set.
Writes: latent.pt latent.json latent.png.
"""
import math

import torch
import torch.nn.functional as F

# Letters: N codes, M points, D latent size, K classes.  mu, logvar (N,D); y (N,); q (M,K).
LOG_2PI = math.log(2 * math.pi)

class Posterior:
    """q(c|z) ~ pi_c (p(z|c) + b)^(1/T): Bayes' rule with a floor b and a temperature T.

    Far from every cluster p(z|c) sinks below b, and q becomes the class priors, not a false
    certainty. Subclasses give log p(z|c); all work is in log space.
    """
    def __init__(self, prior, log_floor=-math.inf, temperature=1.0):
        self.prior, self.log_floor, self.temperature = prior, log_floor, temperature

    def __call__(self, z, logvar=None):
        """q (M,K) of points z (M,D); of images, when their encoder's logvar (M,D) is given too."""
        return self.weigh(self.log_density(z, logvar))

    def weigh(self, log_density):
        """q (M,K) from log p(z|c) (M,K)."""
        return (self.prior.log() + self.floored(log_density) / self.temperature).softmax(1)

    def floored(self, log_density):
        """log(p(z|c) + b) (M,K)."""
        return torch.logaddexp(log_density, torch.full_like(log_density, self.log_floor))

    def set_floor(self, log_density, quantile=0.001):
        """b = a low quantile of the codes' own densities, one for all classes -> self."""
        marginal = (log_density + self.prior.log()).logsumexp(1)
        finite = marginal[marginal.isfinite()]
        self.log_floor = float(finite.quantile(quantile)) if len(finite) else -math.inf
        return self

class Aggregate(Posterior):
    """p(z|c) = mean over codes i of class c of N(z; mu_i, diag(sigma_i^2 + h_c^2)).

    The aggregate posterior of a class (Makhzani et al. 2015), widened by a bandwidth h_cd =
    a s_d n_c^(-1/(D+4)) (Scott 1992): the encoder's own width is overconfident on unseen codes.
    """
    def __init__(self, mu, variance, counts, prior, log_floor=-math.inf, temperature=1.0):
        super().__init__(prior, log_floor, temperature)
        self.mu, self.variance, self.counts = mu, variance, counts     # sorted by class

    @classmethod
    def fit(cls, mu, logvar, y, classes, bandwidth=1.0):
        """From codes mu, logvar (N,D) and labels y (N,) in 0..classes-1."""
        order = y.argsort(stable=True)
        mu, logvar, y = mu[order], logvar[order], y[order]
        counts, total = y.bincount(minlength=classes), (mu - mu.mean(0)).square().mean(0)
        within = (mu - class_means(mu, y, classes)[y]).square().sum(0)
        # One pseudo-observation of the total variance, for classes of one image each.
        s = ((within + total) / (len(y) - len(y.unique()) + 1)).sqrt()
        h = bandwidth * s * counts.clamp(min=1).to(mu)[:, None] ** (-1 / (mu.shape[1] + 4))
        posterior = cls(mu, logvar.exp() + h[y] ** 2, counts.tolist(), counts / len(y))
        return posterior.set_floor(posterior.leave_one_out()[0])

    def log_density(self, z, logvar=None, own=None):
        """log p(z|c) (M,K). `own` (M,): the code that each point is, left out of the mean."""
        step, columns, start = max(1, 2 ** 24 // len(self.mu)), [], 0
        if len(z) > step:                               # so many pairs of point and code at once
            return torch.cat([self.log_density(*(v if v is None else v[i:i + step]
                                                 for v in (z, logvar, own)))
                              for i in range(0, len(z), step)])
        for count in self.counts:
            mu, variance = self.mu[start:start + count], self.variance[start:start + count]
            terms = log_normal(z, mu, variance) if logvar is None else \
                log_normal_images(z, logvar.exp(), mu, variance)
            size = torch.full_like(z[:, 0], count)
            if own is not None:
                rows = ((own >= start) & (own < start + count)).nonzero()[:, 0]
                terms[rows, own[rows] - start] = -math.inf
                size[rows] -= 1
            columns.append(terms.logsumexp(1) - size.clamp(min=1).log())   # -inf without codes
            start += count
        return torch.stack(columns, 1)

    def leave_one_out(self, limit=2000):
        """log p(z_i|c) (M,K), labels (M,) of at most `limit` of the codes, each without itself."""
        own = subsample(len(self.mu), limit).to(self.mu.device)
        y = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        return self.log_density(self.mu[own], own=own), y.to(own.device)[own]

class Gaussian(Posterior):
    """p(z|c) = N(z; m_c, S_c), covariances shrunk towards the pooled one (Friedman 1989)."""
    def __init__(self, mean, covariance, prior, log_floor=-math.inf, temperature=1.0):
        super().__init__(prior, log_floor, temperature)
        self.mean, self.covariance = mean, covariance

    @classmethod
    def fit(cls, mu, logvar, y, classes, shrinkage=0.1, ridge=0.01):
        """From codes mu, logvar (N,D) and labels y (N,): moments of the aggregate posterior."""
        counts, mean = y.bincount(minlength=classes), class_means(mu, y, classes)
        centred, width, eye = mu - mean[y], logvar.exp(), torch.eye(mu.shape[1], device=mu.device)
        scatter = torch.stack([centred[y == c].T @ centred[y == c] + width[y == c].sum(0).diag()
                               for c in range(classes)])
        mixed = (1 - shrinkage) * scatter + shrinkage * scatter.sum(0)
        mixed /= ((1 - shrinkage) * counts + shrinkage * len(y)).clamp(min=1e-6)[:, None, None]
        trace = mixed.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        posterior = cls(mean, (1 - ridge) * mixed + (ridge * trace + 1e-6) * eye, counts / len(y))
        return posterior.set_floor(posterior.log_density(mu[subsample(len(mu), 2000)]))

    def log_density(self, z, logvar=None):
        """log p(z|c) (M,K); with logvar (M,D) integrated over each image's own width."""
        if logvar is None:
            normal = torch.distributions.MultivariateNormal(self.mean, self.covariance)
            return normal.log_prob(z[:, None])
        parts = []
        step = max(1, 2 ** 23 // self.covariance.numel())             # (step,K,D,D) at once
        for point, own in zip(z.split(step), logvar.exp().split(step)):
            normal = torch.distributions.MultivariateNormal(
                self.mean, self.covariance + own.diag_embed()[:, None])
            parts.append(normal.log_prob(point[:, None]))
        return torch.cat(parts)

def teach(mu, logvar, y, classes, bandwidth=1.0):
    """The posterior that labels hybrids (the best-calibrated one is too soft to teach).

    T = 1/s, s the leave-one-out accuracy above guessing, b the lowest hundredth.
    """
    posterior = Aggregate.fit(mu, logvar, y, classes, bandwidth)
    log_density, own = posterior.leave_one_out()
    right = posterior.set_floor(log_density, 0.01).weigh(log_density).argmax(1) == own
    accuracy, guess = right.float().mean().item(), posterior.prior.max().item()
    posterior.temperature = 1 / max((accuracy - guess) / max(1 - guess, 1e-6), 0.03)
    return posterior

def class_means(mu, y, classes):
    """(K,D); zeros for a class without codes."""
    one_hot = F.one_hot(y, classes).to(mu)
    return one_hot.T @ mu / one_hot.sum(0).clamp(min=1)[:, None]

def spread_labels(mu, y, classes, neighbours=10, alpha=0.99, rounds=100):
    """Labels (N,) of codes mu (N,D), from y (n,) of the first n; -1 where none arrives.

    Label spreading (Zhou et al. 2004): F <- alpha S F + (1-alpha) Y, S = D^-1/2 (V+V^T) D^-1/2,
    V_ij = exp(-(d_ij / d_i,10)^2) to the ten nearest. None arrives anywhere, if labels mislead:
    both halves of y, together, have to predict most of each other, where both hold the class.
    """
    parts = [torch.cdist(some, mu).topk(min(neighbours + 1, len(mu)), largest=False)
             for some in mu.split(max(1, 2 ** 24 // len(mu)))]   # the nearest is the code itself
    far, near = (torch.cat(part)[:, 1:].cpu() for part in zip(*parts))
    weight = (-(far / far[:, -1:].clamp(min=1e-12)).square()).exp()
    pairs = torch.stack([torch.arange(len(mu)).repeat_interleave(near.shape[1]), near.flatten()])
    w = torch.sparse_coo_tensor(pairs, weight.flatten(), [len(mu)] * 2, check_invariants=False)
    w = (w + w.T).coalesce()
    scale = (w @ torch.ones(len(mu), 1)).clamp(min=1e-12).rsqrt()

    def spread_from(rows):
        f = start = torch.zeros(len(mu), classes)
        start[rows, own[rows]] = 1 - alpha
        for _ in range(rounds):
            f = alpha * scale * (w @ (scale * f)) + start
        return f.argmax(1).where(f.amax(1) > 0, -1)
    own, order, right = y.cpu(), y.cpu().argsort(stable=True), []    # every other: half a class
    for one, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        right.append((spread_from(one)[other] == own[other])[torch.isin(own[other], own[one])])
    sure = torch.cat(right).float().mean() > 0.5 + 0.5 / classes
    return torch.cat([own, spread_from(order)[len(y):].where(sure, -1)]).to(y.device)

def log_normal(z, mu, variance):
    """log N(z_m; mu_i, diag(variance_i)) (M,N) by three matrix products."""
    centre = mu.mean(0) if len(mu) else 0               # smaller numbers cancel less
    z, mu, precision = z - centre, mu - centre, 1 / variance
    square = (z * z) @ precision.T - 2 * z @ (mu * precision).T + (mu * mu * precision).sum(1)
    return -0.5 * (square.clamp_(min=0) + variance.log().sum(1) + z.shape[1] * LOG_2PI)

def log_normal_images(z, own, mu, variance):
    """log N(z_m; mu_i, diag(variance_i + own_m)) (M,N): the integral over image m's own posterior.

    One dimension at a time keeps the memory at (M,N); eight variances share one logarithm.
    """
    total = torch.full((len(z), len(mu)), z.shape[1] * LOG_2PI, device=z.device)
    product = torch.ones_like(total)
    for d in range(z.shape[1]):
        spread = own[:, d, None] + variance[None, :, d]
        total.addcdiv_((z[:, d, None] - mu[None, :, d]).square_(), spread)
        product *= spread
        if d % 8 == 7 or d == z.shape[1] - 1:
            total += product.log_()
            product.fill_(1)
    return total.mul_(-0.5)

def best_temperature(posterior, log_density, y):
    """The T in [1/4, 64] with the smallest NLL on labels y, and that NLL; sets nothing."""
    def nll(t):
        log_q = (posterior.prior.log() + posterior.floored(log_density) / t).log_softmax(1)
        return F.nll_loss(log_q.clamp(min=-30), y).item()
    return min((nll(t), t) for t in torch.logspace(-2, 6, 65, base=2).tolist())[::-1]

def calibrate(fit, choices, mu, logvar, y, limit=500):
    """fit(choice), choice: of smallest NLL on held-out codes mu, logvar (V,D), y (V,), as is T."""
    few, tried = subsample(len(y), limit), []
    for choice in choices:
        posterior = fit(choice)
        found = posterior.log_density(mu[few], logvar[few])
        tried.append((best_temperature(posterior, found, y[few])[1], choice))
    posterior = fit(min(tried)[1])
    posterior.temperature, _ = best_temperature(posterior, posterior.log_density(mu, logvar), y)
    return posterior, min(tried)[1]

def subsample(n, most):
    """At most `most` of the rows 0..n-1, at random but always the same ones, in order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:most].sort()[0]

def scores(q, y, bins=15) -> dict:
    """Accuracy, balanced accuracy, NLL (nats), Brier score and ECE of q (N,K) for labels y (N,)."""
    right = (q.argmax(1) == y).float()
    recall = torch.stack([right[y == c].mean() for c in y.unique()])
    likely = q[torch.arange(len(y), device=q.device), y]
    brier = (q.square().sum(1) - 2 * likely + 1).mean()
    return {"accuracy": right.mean().item(), "balanced_accuracy": recall.mean().item(),
            "nll": -likely.clamp(min=1e-12).log().mean().item(), "brier": brier.item(),
            "ece": ece(q.amax(1), right, bins)}

def ece(confidence, right, bins=15) -> float:
    """Mean gap of confidence and accuracy (Guo et al. 2017), over bins of equal mass."""
    level, row = confidence.unique(return_inverse=True)     # ties share their mean gap: no order
    mean = torch.zeros_like(level).scatter_reduce(0, row, confidence - right, "mean",
                                                  include_self=False)
    gap = mean[row.sort()[0]]
    return sum(part.sum().abs().item() for part in gap.tensor_split(bins)) / len(gap)

def ece_interval(q, y, draws=200, seed=0):
    """95% bootstrap interval of the ECE."""
    confidence, right = q.amax(1).cpu(), (q.argmax(1) == y).float().cpu()
    picks = torch.randint(len(y), (draws, len(y)), generator=torch.Generator().manual_seed(seed))
    values = torch.tensor([ece(confidence[p], right[p]) for p in picks])
    return values.quantile(torch.tensor([0.025, 0.975])).tolist()

def reliability(q, y, low=0.05, high=0.95, bins=10, least=30):
    """A row a bin of the (image, class) pairs with low < q < high, if it has `least` pairs."""
    hit = F.one_hot(y, q.shape[1]).bool()
    inside = (q > low) & (q < high)
    stated, hit = q[inside], hit[inside].float()
    index = ((stated - low) / (high - low) * bins).long().clamp(0, bins - 1)
    return [{"stated": stated[index == b].mean().item(), "observed": hit[index == b].mean().item(),
             "pairs": int((index == b).sum())}
            for b in range(bins) if int((index == b).sum()) >= least]

def words(q, classes, most=2) -> str:
    """Probabilities (K,) in words: the likeliest classes, the likeliest last.

    >>> words([0.2, 0.8], ["cat", "dog"])
    '20% cat + 80% dog'
    """
    q = [float(p) for p in q]
    top = sorted(range(len(q)), key=q.__getitem__)[-most:]
    return " + ".join(f"{100 * q[c]:.0f}% {classes[c]}" for c in top if q[c] >= 0.005)

def ranking(q, classes) -> str:
    """All percentages, a line a class, the likeliest first."""
    return "\n".join(f"{100 * q[c]:5.1f}%  {classes[c]}" for c in q.argsort(descending=True))

# ---- command ---------------------------------------------------------------------------------
def parse_args(argv=None):
    import common
    parser = common.flags("latent.py", __doc__)
    add = parser.add_argument_group("percentages").add_argument
    add("--codes", type=common.number(int, 2), default=20_000, help="of the density, at most")
    add("--image", metavar="FILE", help="print the percentages of this picture")
    add("--point", metavar="=Z1,Z2,...", help="print the percentages of this point")
    return parser.parse_args(argv)

def draw_map(axes, mu, y, classes, posterior, generator):
    """Codes in two dimensions, an ellipse a class, random points X with their percentages."""
    from matplotlib.patches import Ellipse
    from vae import COLOURS, MARKERS, tidy
    mean, directions, taken = mu.mean(0), torch.eye(mu.shape[1], 2), []
    if mu.shape[1] > 2:                 # PCA of the class means; two means alone span only a line
        means = class_means(mu, y, len(classes))[y.unique()]
        spanned = torch.cat([means - mean, 1e-3 * (mu - mean)[:1000]])
        directions = torch.linalg.svd(spanned, full_matrices=False)[2][:2].T
    xy = (mu - mean) @ directions
    for c in y.unique().tolist():
        own, colour = xy[y == c], COLOURS[c % 10]
        axes.scatter(*own[:1500].T.numpy(), s=7, color=colour, alpha=0.35, linewidths=0,
                     marker=MARKERS[c % 10])
        taken.append(own.mean(0))
        if len(own) > 2:
            variance, turn = torch.linalg.eigh(own.T.double().cov())
            small, large = (3 * variance.clamp(min=0).sqrt()).tolist()      # 1.5 deviations each
            axes.add_patch(Ellipse(taken[-1].tolist(), large, small, fill=False, color=colour,
                                   angle=math.degrees(math.atan2(turn[1, 1], turn[0, 1]))))
        axes.annotate(classes[c], taken[-1].tolist(), ha="center", va="center", weight="bold",
                      bbox=dict(boxstyle="round,pad=0.25", fc="white", ec=colour), zorder=9)
    # Random points on lines between codes: the undecided ones, nine of them far apart.
    i, j = torch.randint(len(mu), (2, 1000), generator=generator)
    z = torch.lerp(mu[i], mu[j], torch.rand(1000, 1, generator=generator))
    z = z[posterior(z).amax(1).argsort()[:200]]
    flat = (z - mean) @ directions
    for _ in range(9):
        k = int(torch.cdist(flat, torch.stack(taken)).amin(1).argmax())
        taken.append(flat[k])
        axes.plot(*flat[k].tolist(), "x", color="black", ms=8, mew=2)
        axes.annotate(words(posterior(z[k:k + 1])[0], classes), flat[k].tolist(),
                      xytext=(0, -13), textcoords="offset points", ha="center", va="top", size=8,
                      bbox=dict(boxstyle="round,pad=0.2", fc="white", ec="none", alpha=0.8))
    tidy(axes, "Where do the classes live?", "first main direction", "second main direction")

def draw_reliability(axes, metrics):
    from vae import COLOURS, tidy
    axes.plot([0, 1], [0, 1], color="black", lw=0.8)
    axes.fill_between([0, 1], [-0.05, 0.95], [0.05, 1.05], color="black", alpha=0.07, lw=0)
    names = {"encoder's width": "-o", "aggregate": "--s", "gaussian": ":^"}
    for (name, style), colour in zip(names.items(), COLOURS):
        rows = metrics[name]["reliability"]
        axes.plot([row["stated"] for row in rows], [row["observed"] for row in rows], style, ms=5,
                  color=colour, label=name)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    tidy(axes, "Does 30% mean 30%?", "stated percentage", "observed frequency on test images")

def answer(args):
    import common
    from vae import encode_all, load_vae, read_like
    saved = common.load(args, "latent")
    dim, posterior = saved["mu"].shape[1], Aggregate(**saved["calibrated"]["aggregate"])
    if args.point:
        try:
            z = torch.tensor([float(text) for text in args.point.split(",")])
        except ValueError:
            z = torch.tensor(math.nan)
        common.need(z.shape == (dim,) and z.isfinite().all(),
                    f"--point takes {dim} finite numbers with commas between, not {args.point}")
        q = posterior(z[None])[0]
    else:
        image, how = read_like(args.image, saved["dataset"])
        print(how)
        q = posterior(*encode_all(load_vae(args)[0], image))[0]
    print(ranking(q, saved["dataset"]["classes"]))

def command(args):
    import common
    from vae import encode_all, figure, load_vae
    device, amp = common.start(args)
    if args.image or args.point:
        return answer(args)
    model, upstream = load_vae(args, device)
    data = common.load_dataset(args, device, upstream)
    rows, validation = upstream["rows"].to(device), common.split(data)[1]
    y, y_test, classes = data.labels[rows], data.test_labels, len(data.classes)
    held = validation[subsample(len(validation), 2000)].to(device)
    codes, held_codes, test_codes = (encode_all(model, x, amp) for x in (
        data.images[rows], data.images[held], data.test_images))
    part = [v[subsample(len(rows), args.codes).to(device)] for v in (*codes, y)]
    fits = {"aggregate": (lambda a: Aggregate.fit(*part, classes, a), (0.25, 0.5, 0.75, 1.0, 1.5)),
            "gaussian": (lambda a: Gaussian.fit(*part, classes, a), (0.0, 0.1, 0.5, 1.0))}

    def judged(q):
        return {**scores(q, y_test), "ece_interval": ece_interval(q, y_test),
                "reliability": reliability(q, y_test)}
    def stored(posterior):
        return {k: v.cpu() if torch.is_tensor(v) else v for k, v in vars(posterior).items()}
    calibrated, prior = {}, y.bincount(minlength=classes) / len(y)
    metrics = {"class priors": judged(prior.expand(len(y_test), classes)),
               "encoder's width": judged(Aggregate.fit(*part, classes, 0.0)(*test_codes))}
    for name, (fit, choices) in fits.items():
        posterior, choice = calibrate(fit, choices, *held_codes, data.labels[held])
        metrics[name] = {**judged(posterior(*test_codes)), "choice": choice,
                         "temperature": posterior.temperature}
        calibrated[name] = stored(posterior)
    fig, shown = figure(14, 6.6), Aggregate(**calibrated["aggregate"])
    left, right = fig.subplots(1, 2, width_ratios=[1.45, 1])
    mu, logvar = (v.cpu() for v in codes)
    draw_map(left, mu, y.cpu(), data.classes, shown, torch.Generator().manual_seed(args.seed))
    draw_reliability(right, metrics)
    common.write(args.out / "latent.png", fig)
    common.save(args.out / "latent.pt", args, data, metrics, [args.out / "vae.pt"], mu=mu,
                logvar=logvar, labels=y.cpu(), calibrated=calibrated,
                teaching=stored(teach(*part, classes)))
    print(f"{len(data.test_images):,} test images, percentages fitted on {len(held):,} others")
    print(f"{'':15}  accuracy    NLL  Brier    ECE  95% interval")
    for name, m in metrics.items():
        print(f"{name:15}{m['accuracy']:10.1%} {m['nll']:6.3f} {m['brier']:6.3f} {m['ece']:6.3f}  "
              "{:.3f} to {:.3f}".format(*m["ece_interval"]))
    print(args.out / "latent.png", args.out / "latent.pt", sep="\n")

def main(argv=None) -> int:
    import common
    return common.guard(command, parse_args(argv))

if __name__ == "__main__":
    raise SystemExit(main())
