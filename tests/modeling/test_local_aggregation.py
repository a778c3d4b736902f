"""Local aggregation against a loop over METHOD section 3's sums, and every way to compute it against the plain one."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blpseg.modeling.local_aggregation import IMPLEMENTATIONS, local_aggregation
from blpseg.utils.errors import BLPSegError

# The package's door of the same name hides the module.
lam = importlib.import_module("blpseg.modeling.local_aggregation")

TOLERANCE = 1e-4  # of output and both gradients, relative to the greatest value


def loop(logits, features, sigma, radius=math.inf):
    """METHOD section 3, one sum at a time."""
    n, c, height, width = logits.shape
    out = torch.zeros_like(logits)
    positions = [(y, x) for y in range(height) for x in range(width)]
    for k in range(n):
        for yb, xb in positions:
            near = [(y, x) for y, x in positions if math.hypot(y - yb, x - xb) <= radius]
            scores = [float(features[k, :, y, x] @ features[k, :, yb, xb]) for y, x in near]
            top = max(scores)
            total = sum(math.exp(score - top) for score in scores)
            numerator, denominator = torch.zeros(c, dtype=logits.dtype), 0.0
            for (y, x), score in zip(near, scores, strict=True):
                weight = math.exp(score - top) / total * math.exp(-((y - yb) ** 2 + (x - xb) ** 2) / (2 * sigma**2))
                numerator += weight * logits[k, :, y, x]
                denominator += weight
            out[k, :, yb, xb] = numerator / (denominator + 1e-7)
    return out


def make_features(kind, channels=32, height=40, width=44, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    smooth = F.interpolate(normal(1, channels, 5, 5), size=(height, width), mode="bicubic")
    noise = normal(1, channels, height, width)
    if kind == "smooth":
        return smooth + 0.05 * noise
    if kind == "noise":
        return 0.4 * noise
    if kind == "isolated":  # no position resembles another: nearly all weight on the position itself
        return noise
    if kind == "constant":
        return torch.full((1, channels, height, width), 0.7)
    if kind == "opposite signs":
        return 1.5 * normal(1, channels, 1, 1) * torch.sign(normal(1, 1, height, width))
    if kind == "hundreds":
        return 20 * smooth
    far = torch.zeros(1, channels, height, width)
    far[:, 0] = 1
    far[:, 1] = 0.1 * noise[:, 0]
    # A is all but on one corner; the sum of A D elsewhere is about 6e-11 or 6e-8, to be held against the 1e-7.
    far[:, 0, -1, -1] = {"far position wins": 30, "far position ties": 23}[kind]
    return far


KINDS = [
    "smooth", "noise", "isolated", "constant", "opposite signs", "hundreds", "far position wins", "far position ties",
]  # fmt: skip
# In float32 the plain formula does not reach the tolerance either, or only just.
NEED_FLOAT64 = {"hundreds", "far position wins", "far position ties"}


def run(impl, logits, features, grad, dtype=torch.float32, sigma=6.0, **kwargs):
    logits, features = (x.detach().to(dtype).requires_grad_() for x in (logits, features))
    out = local_aggregation(logits, features, sigma, impl=impl, **kwargs)
    out.backward(grad.to(out))
    return [x.double() for x in (out.detach(), logits.grad, features.grad)]


def errors(got, expected):
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)]


def make_case(kind, classes=5, seed=0, **kwargs):
    features = make_features(kind, seed=seed, **kwargs)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (1, classes, *features.shape[-2:])
    return 10 * torch.randn(shape, generator=generator), features, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("impl", ["dense", "tiled", "auto"])
@pytest.mark.parametrize("kind", ["smooth", "noise", "far position wins"])
def test_equals_the_loop(impl, kind, monkeypatch):
    monkeypatch.setattr(lam, "BLOCK", 4)  # several blocks, ragged in both directions
    logits, features, _ = make_case(kind, channels=8, height=11, width=9)
    logits, features = (torch.cat([x, x.flip(2)]).double() for x in (logits, features))
    out = local_aggregation(logits, features, 2.5, impl=impl)
    torch.testing.assert_close(out, loop(logits, features, 2.5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["smooth", "noise", "hundreds", "far position wins"])
def test_window_equals_the_loop_within_the_radius(kind, monkeypatch):
    monkeypatch.setattr(lam, "BLOCK", 4)
    logits, features, _ = make_case(kind, channels=8, height=11, width=13)
    logits, features = logits.double(), features.double()
    out = local_aggregation(logits, features, 2.0, impl="window", window=1.5)
    torch.testing.assert_close(out, loop(logits, features, 2.0, radius=3.0), rtol=1e-9, atol=1e-9)


def test_window_is_finite_however_long_what_lies_beyond_it(monkeypatch):
    """A score beyond the window that outweighs all within by more than a float32 holds, and its gradient."""
    monkeypatch.setattr(lam, "BLOCK", 4)
    logits, features, grad = make_case("noise", channels=8, height=11, width=13)
    features[..., -1] *= 3000
    case = logits, features, grad
    got = run("window", *case, sigma=2.0, window=1.5)
    expected = run("window", *case, sigma=2.0, window=1.5, dtype=torch.float64)
    assert all(torch.isfinite(x).all() for x in got)
    # More than the radius of 3 from the last column.
    assert errors([got[0][..., :9]], [expected[0][..., :9]])[0] <= TOLERANCE
    assert errors([expected[0]], [loop(logits.double(), features.double(), 2.0, radius=3.0)])[0] <= 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_any_features(kind):
    case = make_case(kind)
    expected = run("dense", *case, dtype=torch.float64)
    assert max(errors(run("auto", *case), expected)) <= TOLERANCE
    # In float64 only the tiles left out of the gradient are left to differ.
    assert max(errors(run("tiled", *case, dtype=torch.float64), expected)) <= TOLERANCE / 5
    if kind not in NEED_FLOAT64:
        assert max(errors(run("tiled", *case), expected)) <= TOLERANCE


def test_far_position_that_wins_needs_the_1e_7():
    """The 1e-7 cannot be dropped: attention with a distance bias, which lacks it, gives something else entirely."""
    case = make_case("far position wins")
    expected = run("dense", *case, dtype=torch.float64)
    assert errors(run("auto", *case), expected)[0] <= TOLERANCE
    assert errors(run("sdpa", *case), expected)[0] > 0.5


@pytest.mark.parametrize("kind", ["smooth", "noise", "constant"])
def test_sdpa_equals_dense_where_near_positions_weigh(kind):
    case = make_case(kind)
    assert max(errors(run("sdpa", *case), run("dense", *case, dtype=torch.float64))) <= TOLERANCE


def test_wide_window_equals_dense():
    case = make_case("noise")
    expected = run("dense", *case, dtype=torch.float64)
    assert max(errors(run("window", *case, window=100.0), expected)) <= TOLERANCE


@pytest.mark.parametrize("impl,window", [("tiled", 4.0), ("window", 1.5), ("dense", 4.0)])
def test_gradients_are_those_of_finite_differences(impl, window, monkeypatch):
    monkeypatch.setattr(lam, "BLOCK", 4)
    monkeypatch.setattr(lam, "NEGLIGIBLE", 0.0)
    logits, features, _ = make_case("noise", classes=2, channels=3, height=6, width=9)
    arguments = [torch.cat([x, x.flip(3)]).double().requires_grad_() for x in (logits, features)]
    assert torch.autograd.gradcheck(
        lambda s, f: local_aggregation(s, f, 2.0, impl=impl, window=window), arguments, fast_mode=True
    )


@pytest.mark.parametrize("impl", ["tiled", "window"])
def test_images_of_a_batch_do_not_mix(impl):
    cases = [make_case(kind, height=20, width=35) for kind in ("smooth", "noise", "far position wins")]
    together = run(impl, *(torch.cat(x) for x in zip(*cases, strict=True)))
    apart = [torch.cat(x) for x in zip(*(run(impl, *case) for case in cases), strict=True)]
    for a, b in zip(together, apart, strict=True):
        for image, alone in zip(a, b, strict=True):
            assert errors([image], [alone])[0] <= TOLERANCE


def test_auto_looks_at_each_image():
    """Long features of one image do not hide that another's are of unequal length."""
    far, smooth = (make_case(kind, height=40, width=35) for kind in ("far position wins", "smooth"))
    long = smooth[0], 31 * F.normalize(smooth[1], dim=1), smooth[2]
    case = [torch.cat(x) for x in zip(far, long, strict=True)]
    got, expected = run("auto", *case), run("dense", *case, dtype=torch.float64)
    for a, b in zip(got, expected, strict=True):
        assert errors([a[0]], [b[0]])[0] <= TOLERANCE


def test_gradient_of_the_logits_alone():
    logits, features, grad = make_case("noise")
    logits.requires_grad_()
    local_aggregation(logits, features, 6.0, impl="tiled").backward(grad)
    assert features.grad is None
    expected = run("dense", logits, features, grad, dtype=torch.float64)[1]
    assert errors([logits.grad.double()], [expected])[0] <= TOLERANCE


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_features_of_another_size_are_resized(impl):
    logits, features, _ = make_case("smooth")
    small = F.interpolate(features, scale_factor=0.5, mode="area")
    resized = F.interpolate(small, size=features.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        local_aggregation(logits, small, 6.0, impl=impl), local_aggregation(logits, resized, 6.0, impl=impl)
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_half_precision_is_raised_to_float32(impl):
    logits, features, _ = make_case("smooth")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = local_aggregation(logits, features, 6.0, impl=impl)
        from_half = local_aggregation(logits.bfloat16(), features.bfloat16(), 6.0, impl=impl)
    assert out.dtype == from_half.dtype == torch.float32
    torch.testing.assert_close(out, local_aggregation(logits, features, 6.0, impl=impl))


def test_memory_of_tiled_is_linear(monkeypatch):
    """No tensor saved for the gradient grows faster than the number of positions, and no scores are saved."""
    saved = {}
    for side in (32, 64):
        logits, features, _ = make_case("noise", height=side, width=side)
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            local_aggregation(logits.requires_grad_(), features.requires_grad_(), 6.0, impl="tiled")
        saved[side] = total
    assert saved[64] <= 4.2 * saved[32]


class Subnormal(TorchDispatchMode):
    """The share of subnormal numbers among those that matrix products take."""

    found, taken = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.found += sum(int(((x != 0) & (x.abs() < 2.0**-126)).sum()) for x in args)
            self.taken += sum(x.numel() for x in args)
        return func(*args, **(kwargs or {}))

    @classmethod
    def share(cls, impl, case):
        with cls() as seen:
            run(impl, *case)
        return seen.found / seen.taken


@pytest.mark.parametrize("impl", ["tiled", "window"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_matrices_take_no_subnormal_numbers(impl, kind):
    """CPUs of Intel multiply them ten times as slowly."""
    assert Subnormal.share(impl, make_case(kind)) < 1e-6


def test_the_formula_takes_subnormal_numbers():
    assert Subnormal.share("dense", make_case("smooth")) > 1e-5  # how many depends on the CPU's exp


def test_auto_traces_to_plain_operations_with_dynamic_size():
    def aggregate(s, f):
        return local_aggregation(s, f, 6.0)

    traced = torch.jit.trace(aggregate, make_case("smooth")[:2], check_trace=False)
    logits, features, _ = make_case("noise", height=21, width=30)
    torch.testing.assert_close(traced(logits, features), local_aggregation(logits, features, 6.0, impl="dense"))


def test_unknown_impl_names_the_choices():
    with pytest.raises(BLPSegError, match="'fast' is unknown; choose one of auto, dense, tiled"):
        local_aggregation(*make_case("noise")[:2], 6.0, impl="fast")


@pytest.mark.parametrize(
    "change", [{"sigma": 0.0}, {"sigma": -1.0}, {"window": 0.0}, {"features": torch.zeros(2, 4, 8, 8)}]
)
def test_bad_arguments(change):
    logits, features, _ = make_case("noise")
    arguments = {"features": features, "sigma": 6.0, **change}
    with pytest.raises(BLPSegError, match="got"):
        local_aggregation(logits, **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ["auto", "tiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_a_gpu(kind, impl):
    case = make_case(kind, height=64, width=70)
    expected = run("dense", *case, dtype=torch.float64)
    got = run(impl, *(x.cuda() for x in case))
    if impl == "auto" or kind not in NEED_FLOAT64:
        assert max(errors([x.cpu() for x in got], expected)) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_gpu_is_a_tenth_of_dense():
    extra = {}
    for impl in ("dense", "auto"):
        case = [x.cuda() for x in make_case("noise", height=96, width=96, channels=256)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(impl, *case)
        extra[impl] = torch.cuda.max_memory_allocated() - before
    assert extra["auto"] <= extra["dense"] / 10
