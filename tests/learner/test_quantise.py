"""FP8 rounding and scaling against a reference in plain Python, value by value. Not Transformer Engine's kernels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.learner.quantise import (
    E4M3,
    E5M2,
    HISTORY,
    DelayedScale,
    block_shape,
    power_of_two_scale,
    quantise,
    quantise_blocks,
    round_to,
    scale_of,
)


def values(fmt):
    """Every finite value of a format, decoded bit by bit from the definition: sign, exponent, mantissa."""
    exponent_bits, mantissa_bits = (4, 3) if fmt is E4M3 else (5, 2)
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for code in range(128):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        if fmt is E5M2 and exponent == 31:
            continue  # infinities and nan
        if fmt is E4M3 and code == 127:
            continue  # nan
        if exponent:
            found.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
        else:
            found.append(mantissa / 2**mantissa_bits * 2.0 ** (1 - bias))
    return found


TABLES = {fmt.name: values(fmt) for fmt in (E4M3, E5M2)}


def nearest(x, fmt):
    """The nearest value, ties to the even code, saturating."""
    table = TABLES[fmt.name]
    if math.isnan(x):
        return x
    size = min(abs(x), table[-1])
    best = min(range(len(table)), key=lambda i: (abs(table[i] - size), i % 2))
    return math.copysign(table[best], x)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=True)
FORMAT = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)


@FORMAT
@given(st.lists(numbers, min_size=1, max_size=20))
@settings(deadline=None, max_examples=60)
def test_rounding_is_to_the_nearest_value_ties_to_even(fmt, xs):
    got = round_to(torch.tensor(xs, dtype=torch.float32), fmt).tolist()
    assert got == [nearest(x, fmt) for x in torch.tensor(xs, dtype=torch.float32).tolist()]


@FORMAT
def test_every_value_every_midpoint_and_the_specials(fmt):
    """Values stay; midpoints go to the even code; too large and infinite saturate; zero keeps its sign; nan stays."""
    table = TABLES[fmt.name]
    middles = [(a + b) / 2 for a, b in zip(table, table[1:], strict=False)]
    xs = torch.tensor([*table, *middles])
    assert round_to(xs, fmt).tolist() == [nearest(x, fmt) for x in xs.tolist()]
    top = fmt.largest
    assert round_to(torch.tensor([math.inf, -math.inf, 2 * top, -2 * top]), fmt).tolist() == [top, -top, top, -top]
    zeros = round_to(torch.tensor([0.0, -0.0]), fmt)
    assert zeros.tolist() == [0, 0] and zeros.signbit().tolist() == [False, True]
    assert round_to(torch.tensor([math.nan]), fmt).isnan().all()


def test_scales_of_extreme_magnitudes():
    """0, inf and nan leave the tensor unscaled; a tiny magnitude's scale is the largest float32, not infinite."""
    assert scale_of(torch.tensor([0.0, math.inf, math.nan, 448.0, 1.0]), E4M3).tolist() == [1, 1, 1, 1, 448]
    assert scale_of(torch.tensor(1e-44), E4M3).item() == torch.finfo(torch.float32).max
    assert power_of_two_scale(torch.tensor([1.0, 448.0, 449.0, 0.0]), E4M3).tolist() == [256, 1, 0.5, 1]


def reference_block(matrix, fmt, block):
    """Loops over blocks and entries."""
    rows, columns = len(matrix), len(matrix[0])
    out = [[0.0] * columns for _ in range(rows)]
    for top in range(0, rows, block[0]):
        for left in range(0, columns, block[1]):
            cells = [
                (i, j)
                for i in range(top, min(top + block[0], rows))
                for j in range(left, min(left + block[1], columns))
            ]
            amax = max(abs(matrix[i][j]) for i, j in cells)
            exact = torch.tensor(fmt.largest).div(torch.tensor(amax)).item() if amax else 1.0
            scale = 2.0 ** math.floor(math.log2(exact))
            for i, j in cells:
                out[i][j] = nearest(matrix[i][j] * scale, fmt) / scale
    return out


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
@pytest.mark.parametrize("role", ["input", "weight", "gradient"])
@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_have_the_recipes_shapes_and_scales(recipe, role, dim):
    """Blocks lie along the summed dimension; magnitudes differ by 2**20 between blocks, so a wrong block shows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, 140, generator=generator)
    x *= 2.0 ** torch.randint(-10, 10, (130, 140), generator=generator)
    fmt = E5M2 if role == "gradient" and recipe == "blockwise" else E4M3
    side = {"mxfp8": 32, "blockwise": 128}[recipe]
    block = (side, side) if recipe == "blockwise" and role == "weight" else (1, side) if dim == 1 else (side, 1)
    assert block_shape(recipe, role, dim) == block
    assert quantise(x, recipe, role, dim).tolist() == reference_block(x.tolist(), fmt, block)


def test_one_bad_value_harms_its_own_block_only():
    x = torch.ones(2, 64)
    x[0, 0] = math.inf
    got = quantise_blocks(x, E4M3, (1, 32))
    assert got[0, 0] == 448 and (got.flatten()[1:] == 1).all()


def test_tensorwise_uses_the_whole_tensors_own_magnitude():
    x = torch.tensor([[3.0, -7.0], [0.01, 100.0]])
    scale = torch.tensor(448.0) / 100
    wanted = [[nearest(v, E4M3) / scale.item() for v in row] for row in (x * scale).tolist()]
    torch.testing.assert_close(quantise(x, "tensorwise", "input", 1), torch.tensor(wanted), rtol=1e-7, atol=0)


@given(st.lists(st.floats(0, 2.0**20, width=32), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_delayed_scales_follow_the_history_exactly(amaxes):
    """A list of everything seen, and the scale that each step may use: from the steps before it, and only those."""
    state, seen, scale = DelayedScale(E4M3), [], 1.0
    for amax in amaxes:
        assert state.scale == scale
        state.record(amax)
        seen.append(amax)
        peak = max(seen[-HISTORY:])
        if peak > 0:
            scale = min((torch.tensor(448.0) / torch.tensor(peak)).item(), torch.finfo(torch.float32).max)
    assert list(state.history) == seen and state.scale == scale


def test_delayed_scaling_forgets_and_survives_an_infinity():
    """After as many steps as the history holds, a spike is forgotten; a non-finite magnitude changes no scale."""
    state = DelayedScale(E5M2)
    state.record(57344.0 * 8)
    assert state.scale == 1 / 8
    state.record(math.inf)
    assert state.scale == 1 / 8
    for _ in range(HISTORY):
        state.record(57344.0)
    assert state.scale == 1 and len(state.history) == HISTORY
