"""Learn how images of one class move: random deformations, as strong as they may be.

Pairs of images of one class are brought into register; the Gaussian of their flows is a latent
space of movements, and held-out images say how far an image may move and remain what it is.

    python deform.py                                    # glyphs -> runs/glyphs/deform.pt
    python deform.py --dataset mnist --images 100          # learn from 100 images only
    python deform.py --dataset photos --image-size 48

Reads:  a data set.
Writes: deform.pt deform.json deform.png.
"""
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Letters: N images, B batch, C×H×W image, R directions.  x in [0,1]; flow (B,H,W,2) in
# pixels: the image at p + flow(p) is what is seen at p.
NODES = 5                               # a side of the grid that bends a flow
LEVELS = ((2, 1.25), (2, 0.75), (1, 0.8))       # of registration: side of a pixel, then a blur
MARGIN = 0.005                          # nats per image: a smaller gain is none


class Choice(NamedTuple):
    """What held-out images decide on: how strongly images move, and whether they mirror."""
    strength: float
    mirror: bool = False


STILL = Choice(0.0)
MIRRORED = Choice(0.0, mirror=True)
STRENGTHS = (STILL, Choice(0.25), Choice(0.5), Choice(0.75), Choice(1.0))


@dataclass(eq=False)
class Deformations:
    """Random flows s B w, w ~ N(0, I), learned from images: a latent space of movements.

    A flow is linear in 56 numbers: an affine map, and a smooth displacement on a grid. Those
    that bring images of one class into register have a Gaussian, with B its square root; its
    mean is left out, so that an image stays where it is on average (compare Hauberg et al.
    2016, Dreaming more data). The images also say how strong, s, and whether mirror images
    are of the same kind; see `fit`. As a transform, (x, q, generator) -> (x, q), it
    deforms each image of a batch in its own way, and leaves the probabilities.
    """
    directions: torch.Tensor            # B (56,R), the widest first
    height: int
    width: int
    strength: float = 1.0               # s in [0,1]
    mirror: bool = False
    losses: dict | None = None          # held-out NLL of each Choice, of fitted ones

    @classmethod
    def fit(cls, images, y, generator, most=1000):
        """From images (N,C,H,W) as `as_input` accepts and labels y (N,), at most so many.

        The strength is the one under which held-out images are predicted best, if the gain is
        above MARGIN; mirror images are allowed if their gain is above two standard errors,
        too. Without two images of one class nothing moves; images of label -1 have none.
        Raises ValueError where images and labels differ in number, or labels are no integers.
        """
        y = as_labels(y, len(images))
        order = torch.randperm(len(images), device=images.device, generator=generator)
        rows = order[y[order] >= 0][:most]
        x = small(as_input(images[rows]).mean(1, keepdim=True))     # where, not which colour
        _, y = y[rows].unique(return_inverse=True)      # 0..K-1, whatever they were
        i, j = same_class_pairs(y, generator)
        v = register(x[i], x[j])
        losses = held_out_losses(x, y, i, j, v, generator)
        means = {choice: loss.mean().item() for choice, loss in losses.items()}
        best = min(STRENGTHS, key=means.get)
        if means[STILL] - means[best] < MARGIN:
            best = STILL
        gain = losses[STILL] - losses[MIRRORED]
        error = gain.std(correction=0) / len(gain) ** 0.5
        mirror = gain.mean() > max(MARGIN, 2 * error)
        return cls(square_root(v), *images.shape[2:], best.strength, bool(mirror), means)

    @classmethod
    def restore(cls, saved: dict):
        """The deformations of a loaded deform.pt."""
        return cls(**saved["deformations"])

    def fields(self) -> dict:
        """As plain tensors and numbers: Deformations(**fields) does the same."""
        return dict(directions=self.directions.cpu(), height=self.height, width=self.width,
                    strength=self.strength, mirror=self.mirror)

    def words(self) -> str:
        """What it does, for people."""
        words = "no deformations"
        if self.strength > 0:
            words = f"deformations of strength {self.strength:g}"
        return f"{words}, mirrored or not" if self.mirror else words

    def flow(self, w):
        """w (B,R) -> flows (B,H,W,2)."""
        v = self.strength * w @ self.directions.T
        v = v.unflatten(1, (2, -1))     # to the right, and down
        return flow_of(v, self.height, self.width)

    def sample(self, count, generator):
        """Random flows (count,H,W,2)."""
        size = (count, self.directions.shape[1])
        return self.flow(torch.randn(size, device=self.directions.device, generator=generator))

    def __call__(self, x, q, generator, share=1.0):
        """x (B,C,H,W) in [0,1], q (B,K) -> a `share` of the images deformed, q as it is.

        In the workers of a DataLoader each draws numbers of its own.
        """
        if x.shape[2:] != (self.height, self.width):
            raise ValueError(f"images {tuple(x.shape)}; these deformations were learned from "
                             f"images of {self.height}x{self.width} pixels")
        reseed(generator)
        if self.mirror:
            chance = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator)
            x = torch.where(chance < 0.5, x.flip(3), x)
        if self.strength > 0:
            flow = self.sample(len(x), generator)
            if share < 1:
                chance = torch.rand(len(x), 1, 1, 1, device=x.device, generator=generator)
                flow = flow * (chance < share)
            x = warp(x, flow)
        return x, q

    def gently(self, x, q, generator):
        """As a call, but a part 1-s of the images is not deformed: for images whose label is
        certain, among which those should remain that are as they were taken.
        """
        return self(x, q, generator, self.strength)

    def morph(self, first, second):
        """Pairs of images (P,C,H,W) in register, as far as images of their kind move."""
        return Morph(first, second, self.strength)

    def distances(self, images, near):
        """Squared distances (N,k) from images (N,C,H,W), as `as_input` accepts, to those in
        the rows near (N,k), once each is as close to them as a deformation brings it.

        The tangent distance (Simard et al. 1993): a deformation w moves an image along its
        tangents, by `tangents`, and costs |w|^2, so that the likelier ones are free to act.
        """
        x = torch.cat([coarse(part) for part in images.split(1000)])
        pixels = x.flatten(1)
        # What no deformation explains, per pixel: half of what is between nearest images.
        some = torch.linspace(0, len(x) - 1, min(len(x), 1000), device=x.device).long()
        noise = (pixels[near[some, 0]] - pixels[some]).square().mean() / 2 + 1e-6
        parts = []
        for rows in torch.arange(len(x), device=x.device).split(250):
            difference = pixels[near[rows]] - pixels[rows, None]            # (B,k,P)
            tangent = tangents(x[rows], self.strength * self.directions)    # (B,P,R)
            along = difference @ tangent
            square = tangent.mT @ tangent
            square.diagonal(dim1=1, dim2=2).add_(noise)
            w = torch.linalg.solve(square, along.mT).mT                     # least squares
            explained = (along * w).sum(2)
            left = difference.square().sum(2) - explained
            parts.append(left.clamp(min=0))             # rounding may leave it below
        return torch.cat(parts)


def reseed(generator):
    """The workers of a DataLoader have copies of a generator: each gets a seed of its own."""
    worker = torch.utils.data.get_worker_info()
    if worker and generator and generator.initial_seed() != worker.seed:
        generator.manual_seed(worker.seed)


def as_labels(y, count):
    """Labels as int64 (N,). Raises ValueError where they are no integers, one an image."""
    y = torch.as_tensor(y)
    if y.shape != (count,) or y.is_floating_point():
        raise ValueError(f"labels of shape {tuple(y.shape)}, {y.dtype}, for {count} images; "
                         "wanted one integer an image")
    return y.long()


def as_input(images):
    """uint8 or floats in [0,1] (B,C,H,W) -> float32 in [0,1], channels last.

    Raises ValueError for other ranges and shapes.
    """
    if images.dim() != 4:
        raise ValueError(f"images of shape {tuple(images.shape)}; wanted (B,C,H,W)")
    x = images.float()
    if images.dtype == torch.uint8:
        x = x / 255
    elif len(x):
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):                # NaN fails, too
            raise ValueError(f"images span {low:g} to {high:g}; wanted floats in [0, 1], "
                             "or uint8")
    return x.contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=16)        # of each size they are asked for again and again
def flow_functions(height, width, device=None):
    """What flows are sums of (28,H,W): x, y, 1, and a smooth bump for each node of a grid."""
    y, x = torch.meshgrid(places_along(height, device), places_along(width, device),
                          indexing="ij")
    affine = torch.stack([x, y, torch.ones_like(x)])
    nodes = torch.eye(NODES ** 2, device=device)        # one image a node, 1 there and 0 else
    nodes = nodes.view(-1, 1, NODES, NODES)
    bumps = F.interpolate(nodes, (height, width), mode="bicubic", align_corners=True)
    return torch.cat([affine, bumps[:, 0]])


def places_along(side, device):
    """The middles of the pixels of a side, which leads from -1 to 1."""
    pixel = torch.arange(side, device=device) + 0.5
    return pixel / side * 2 - 1


def flow_of(v, height, width):
    """Coefficients v (B,2,28), to the right and down, in half sides -> flow (B,H,W,2)."""
    functions = flow_functions(height, width, v.device).flatten(1)
    flow = (v @ functions).unflatten(2, (height, width))
    return flow.permute(0, 2, 3, 1) * half_sides(height, width, v.device)


def half_sides(height, width, device):
    return torch.tensor([width / 2, height / 2], device=device)


def warp(x, flow):
    """x (B,C,H,W) as seen through flow (B,H,W,2) in pixels, the border continued.

    The image at p + flow(p) is what is seen at p.
    """
    height, width = x.shape[2:]
    still = torch.eye(2, 3, device=x.device)[None]
    places = F.affine_grid(still, [1, 1, height, width], align_corners=False)
    places = places + flow / half_sides(height, width, x.device)
    return F.grid_sample(x, places, padding_mode="border", align_corners=False)


def coarse(images):
    """Images as `as_input` accepts -> grey ones (B,1,h,w), half the side, so smooth that small
    flows change them in proportion.
    """
    x = small(as_input(images).mean(1, keepdim=True))
    return F.avg_pool2d(blur(x, 1), 2)


def tangents(x, directions):
    """How images x (B,1,H,W) change along directions (56,R) of flows: (B,H W,R)."""
    height, width = x.shape[2:]
    framed = F.pad(x, (1, 1, 1, 1), mode="replicate")
    right = (framed[:, 0, 1:-1, 2:] - framed[:, 0, 1:-1, :-2]).flatten(1) / 2
    down = (framed[:, 0, 2:, 1:-1] - framed[:, 0, :-2, 1:-1]).flatten(1) / 2
    functions = flow_functions(height, width, x.device).flatten(1)          # (28,H W)
    moves = functions.T @ directions.unflatten(0, (2, -1))                  # (2,H W,R)
    across, along = moves * half_sides(height, width, x.device)[:, None, None]
    return right[:, :, None] * across + down[:, :, None] * along


def blur(x, sigma):
    """x (B,C,H,W) under a Gaussian of so many pixels, the border continued."""
    reach = math.ceil(2.5 * sigma)
    channels = x.shape[1]
    steps = torch.arange(-reach, reach + 1, device=x.device)
    bell = (-0.5 * (steps / sigma) ** 2).exp()
    row = (bell / bell.sum()).expand(channels, 1, 1, -1)
    x = F.pad(x, [reach] * 4, mode="replicate")
    # A Gaussian is separable: along the rows, then along the columns.
    x = F.conv2d(x, row, groups=channels)
    return F.conv2d(x, row.transpose(2, 3), groups=channels)


@torch.enable_grad()
def register(target, moving, steps=60):
    """Coefficients v (B,2,28) of flows with warp(moving, flow_of(v, H, W)) close to target.

    target, moving (B,C,H,W), float. All pairs at once, from coarse to fine, by Adam on the
    mean square of the difference and what holds the flow back, `stiffness`.
    """
    target = small(target)
    moving = small(moving)
    v = torch.zeros(len(target), 2, 3 + NODES ** 2, device=target.device, requires_grad=True)
    optimiser = torch.optim.Adam([v], betas=(0.9, 0.99))
    step = 0
    for scale, sigma in LEVELS:
        source = blur(F.avg_pool2d(moving, scale), sigma)
        goal = blur(F.avg_pool2d(target, scale), sigma)
        for _ in range(steps // len(LEVELS)):
            optimiser.param_groups[0]["lr"] = 0.03 * min(1, 2 - 2 * step / steps)
            seen = warp(source, flow_of(v, *source.shape[2:]))
            error = (seen - goal).square().mean((1, 2, 3))
            optimiser.zero_grad()
            (error + stiffness(v)).sum().backward()     # the pairs have nothing in common
            optimiser.step()
            step += 1
    return v.detach()


def small(x):
    """x (B,C,H,W) with at most 32 pixels a side: flows are as smooth in fewer pixels."""
    factor = math.ceil(max(x.shape[2:]) / 32)
    return F.avg_pool2d(x, factor)


def stiffness(v):
    """What a flow costs (B,): the square of its affine map, the differences in its grid."""
    affine = v[:, :, :3].square().sum((1, 2))
    grid = v[:, :, 3:].unflatten(2, (NODES, NODES))
    across = grid.diff(dim=2).square().mean((1, 2, 3))
    along = grid.diff(dim=3).square().mean((1, 2, 3))
    return 0.02 * affine + 0.6 * (across + along)


class Morph:
    """Pairs of images in register, and where their parts are on the way between the two.

    `strength`: they come so far towards each other, 1 all the way; that of the deformations,
    so that nothing moves further than images of its kind do.
    """

    def __init__(self, first, second, strength=1.0, batch=1000):
        """first, second (P,C,H,W), float."""
        parts = []
        for a, b in zip(first.split(batch), second.split(batch)):
            target = a.mean(1, keepdim=True)            # where, not which colour
            moving = b.mean(1, keepdim=True)
            parts.append(register(target, moving))
        self.v = strength * torch.cat(parts)            # (P,2,28), of second towards first

    def __call__(self, first, second, rows, t):
        """Of some pairs (M,) what belongs to each image (M,C,H,W), moved to where both meet.

        t (M,) in [0,1]: at 1 first stays as it is and second lies on it, at 0 the reverse.
        """
        flow = flow_of(self.v[rows], *first.shape[2:])
        t = t[:, None, None, None]
        return warp(first, (t - 1) * flow), warp(second, t * flow)


def square_root(v):
    """B (56,56) of coefficients v (P,2,28): B w, w ~ N(0, I), has their second moments about
    the mean. Its columns are the principal directions, the widest first.
    """
    v = v.flatten(1)
    if len(v):
        v = v - v.mean(0)
    covariance = v.T @ v / max(len(v), 1)
    variances, axes = torch.linalg.eigh(covariance)
    return (axes * variances.clamp(min=0).sqrt()).flip(1)


def same_class_pairs(y, generator, each=10, most=3000):
    """Rows i, j of ordered pairs of one class, `most` or some more: up to `each` partners j
    per i, at random.
    """
    share = math.ceil(most / max(len(y), 1))
    each = min(each, share, len(y))
    alike = (y[:, None] == y).fill_diagonal_(False)
    numbers = torch.rand(alike.shape, device=y.device, generator=generator)
    # Random numbers lie in [0, 1): with 1 added, one's own class comes before the others.
    j = (numbers + alike).topk(each, dim=1).indices
    i = torch.arange(len(y), device=y.device)
    i = i[:, None].expand_as(j)
    kept = alike.gather(1, j)           # a small class has fewer
    return i[kept], j[kept]


def held_out_losses(x, y, i, j, v, generator, splits=10, most=150, copies=10) -> dict:
    """How well do deformed copies of half of the images predict the other half?

    x (N,1,H,W) in [0,1], y (N,), flows v of the pairs i, j. -> of each Choice the NLL in nats
    per image, a number for each of random halves. Of a half only flows of pairs inside it
    count, and `most` images.
    """
    x = blur(x, 1)                      # the neighbour a pixel further counts, too
    losses = {choice: [] for choice in (*STRENGTHS, MIRRORED)}
    for _ in range(splits):
        first = random_half(y, generator)
        for half in (first, ~first):
            inside = half[i] & half[j]
            if not inside.any():
                continue
            known = half.nonzero()[:most, 0].repeat(copies)
            asked = (~half).nonzero()[:most, 0]
            directions = square_root(v[inside])
            # The random numbers are the same for each choice: nothing else differs.
            state = generator.get_state()
            for choice in losses:
                generator.set_state(state)
                deform = Deformations(directions, *x.shape[2:], *choice)
                seen, _ = deform(x[known], None, generator)
                losses[choice].append(kernel_nll(seen, y[known], x[asked], y[asked]))
    # Where no half has a pair, every choice is as good.
    return {choice: torch.tensor(loss or [0.0]) for choice, loss in losses.items()}


def random_half(y, generator):
    """(N,) bool: half of each class, at random; of an odd one the smaller half."""
    order = torch.randperm(len(y), device=y.device, generator=generator)
    half = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for c in y.unique():
        rows = order[y[order] == c]
        half[rows[:len(rows) // 2]] = True
    return half


def kernel_nll(x, y, asked, asked_y, floor=0.02):
    """NLL of labels under a kernel classifier of images x (N,C,H,W), y (N,), in nats.

    Its bandwidth is the best of a few, up to one that knows nothing: else what blurs would
    seem to help where nothing can be known. A part `floor` is spread over the classes.
    """
    classes = int(max(y.max(), asked_y.max())) + 1
    square = torch.cdist(asked.flatten(1), x.flatten(1)).square()
    nearest = square.amin(1).median().clamp(min=1e-12)
    one_hot = F.one_hot(y, classes).float()
    losses = []
    for factor in (0.05, 0.1, 0.2, 0.4, 1, 100):
        weight = (-square / (2 * factor * nearest)).softmax(1)
        q = (1 - floor) * weight @ one_hot + floor / classes
        losses.append(F.nll_loss(q.log(), asked_y))
    return min(losses).item()


# ---- command --------------------------------------------------------------------------------

def parse_args(argv=None):
    from common import flags
    parser = flags("deform.py", __doc__)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N",
        help="numbers of images that compare.py will be asked for: refused at once, if there "
        "are not so many")
    return parser.parse_args(argv)


def draw(images, deform):
    """What held-out images said, and images deformed."""
    import common
    generator = torch.Generator(images.device).manual_seed(0)
    fig = common.figure(10, 4.2)
    said, moves = fig.subplots(1, 2, width_ratios=[1.1, 1])
    strengths = [choice.strength for choice in STRENGTHS]
    nll = [deform.losses[choice] for choice in STRENGTHS]
    common.tidy(said, "How strongly may they move?",
                "strength of the deformations", "held-out loss, nats per image")
    said.plot(strengths, nll, "-o", color=common.COLOURS[0], label="deformed")
    said.plot(0, deform.losses[MIRRORED], "s", color=common.COLOURS[2],
              label="mirrored or not")
    said.axvline(deform.strength, color="black", lw=0.8, label="what was chosen")
    said.legend(frameon=False)

    still = as_input(images[common.spaced(len(images), 8)])
    moved, _ = deform(still.repeat_interleave(7, 0), None, generator)
    rows = torch.cat([still[:, None], moved.unflatten(0, (8, 7))], 1)
    common.tidy(moves, "What do they become?")
    common.show_images(moves, rows.flatten(0, 1), 8,
                       f"a training image, then {deform.words()}")
    return fig


def command(run, args):
    import common
    common.require(run.backbone is None, "features do not move: with --backbone begin with "
                   "vae.py")
    data = common.load_dataset(run)
    if args.sizes:
        common.fit_sizes(args.sizes, True, len(data.labelled()))
    rows = common.training_rows(data, run)
    rows = rows[data.labels[rows] >= 0]
    images = data.images[rows]
    generator = torch.Generator(run.device).manual_seed(run.seed)
    deform = Deformations.fit(images, data.labels[rows], generator)

    losses = [{**choice._asdict(), "nll": loss} for choice, loss in deform.losses.items()]
    metrics = {"images": len(rows), "strength": deform.strength, "mirror": deform.mirror,
               "losses": losses}
    common.write(run.out / "deform.png", draw(images, deform))
    common.save(run.out / "deform.pt", run, data, metrics, deformations=deform.fields())
    print(f"what one of {len(rows):,} labelled images may become: {deform.words()}, as "
          "held-out images decided")
    print(run.out / "deform.png", run.out / "deform.pt", sep="\n")


def main(argv=None) -> int:
    import common
    return common.run_script(command, parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
