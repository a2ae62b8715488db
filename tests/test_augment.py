"DSA against the public implementation (golden), plain loops, and the promises of Omega."
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avdd_nb.core import UserError
from avdd_nb.match import augment as A

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'dsa.npz', allow_pickle=False)
CASES = [f'c{i}_ch{c}' for i in range(3) for c in (1, 3)]
VALUES = dict(flip=['flipped'], scale=['sx_width', 'sy_height'], rotate=['theta_rad'], crop=['shift_h', 'shift_w'],
              cutout=['centre_h', 'centre_w'], brightness=['add'], saturation=['factor'], contrast=['factor'],
              color=['add', 'saturation', 'contrast'])
EXACT = {'flip', 'crop', 'cutout'}


def close(got, want, op, loud):
    if op in EXACT:
        np.testing.assert_array_equal(got, want)
    elif op in ('scale', 'rotate'):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 if loud else 1e-5)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('op', VALUES)
@pytest.mark.parametrize('j', range(2))
def test_golden_ops(case, op, j):
    x, key = torch.from_numpy(GOLDEN[f'{case}_x']), f'{case}_{op}_{j}'
    values, want = [GOLDEN[f'{key}_{v}'].item() for v in VALUES[op]], GOLDEN[f'{key}_y']
    loud = case.endswith('ch1')
    close(A.OPS[op][0](x, *values), want, op, loud)
    per_sample = [torch.tensor([v] * len(x)) for v in values]
    per_sample[0] = per_sample[0].bool() if op == 'flip' else per_sample[0]
    close(A.OPS[op][0](x, *per_sample), want, op, loud)
    omega = A.reference_omega(int(GOLDEN[f'{key}_seed']), *x.shape[-2:], strategy=op)
    if not loud:   # its values are computed in double, the reference's in single precision: one bit of 30 dB
        close(A.apply(x, omega), want, op, loud)
    got = A.OPS[op][1](omega.u, *x.shape[-2:])
    np.testing.assert_allclose(np.float64(got), values, atol=1e-6)


def test_golden_edges():
    x = torch.from_numpy(GOLDEN['edge_x'])
    for what, op in (('cutout_centres', A.cutout), ('crop_shifts', A.crop)):
        values = torch.from_numpy(GOLDEN[f'edge_{what}'])
        want = torch.from_numpy(GOLDEN[f'edge_{what.split("_")[0]}_y'])
        for v, y in zip(values, want):
            assert torch.equal(op(x, *v.tolist())[0], y)
        assert torch.equal(op(x.expand(5, -1, -1, -1), *values.T), want)


def test_golden_strategy_and_siamese():
    names = A.parse(A.DSA)
    picked = [names.index(A.reference_omega(int(s), 8, 6).op) for s in GOLDEN['strategy_seeds']]
    assert picked == GOLDEN['strategy_op_index'].tolist()
    for op, seed in zip(names, GOLDEN['siam_seeds']):
        omega = A.reference_omega(int(seed), 8, 6)
        assert omega.op == op
        for b in 'ab':
            close(A.apply(torch.from_numpy(GOLDEN[f'siam_x{b}']), omega), GOLDEN[f'siam_{op}_y{b}'], op, False)


@pytest.mark.parametrize('op', A.parse(A.DSA))
def test_golden_per_sample(op):
    x = torch.from_numpy(GOLDEN['persample_x'])
    values = [torch.from_numpy(GOLDEN[f'persample_{op}_{v}']) for v in VALUES[op]]
    values[0] = values[0].bool() if op == 'flip' else values[0]
    close(A.OPS[op][0](x, *values), GOLDEN[f'persample_{op}_y'], op, False)


@given(op=st.sampled_from(list(A.OPS)), n=st.integers(1, 4), c=st.sampled_from([1, 3]), h=st.integers(4, 20),
       w=st.integers(4, 20), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_per_sample_is_the_loop_over_samples(op, n, c, h, w, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=gen)
    omega = A.draw(gen, op, n=n)
    loop = torch.cat([A.apply(x[i:i + 1], A.Omega(op, tuple(u[i] for u in omega.u))) for i in range(n)])
    torch.testing.assert_close(A.apply(x, omega), loop, atol=1e-5, rtol=1e-5)


@given(h=st.integers(3, 300), w=st.integers(3, 300), u=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3))
@settings(max_examples=200, deadline=None)
def test_values_stay_in_the_stated_ranges(h, w, u):
    for size, shift in zip((h, w), A.crop_values(u, h, w)):
        assert shift == int(shift) and abs(shift) <= math.floor(.125 * size + .5)
    for size, centre in zip((h, w), A.cutout_values(u, h, w)):
        assert centre == int(centre) and 0 <= centre <= size - A.half(size) % 2
    assert all(1 / 1.2 - 1e-12 <= s <= 1.2 + 1e-12 for s in A.scale_values(u, h, w))


def test_whole_numbers_are_evenly_drawn():
    u = (torch.arange(1000) + .5) / 1000
    shifts, _ = A.crop_values([u, u, u], 32, 32)
    counts = torch.stack([(shifts == v).sum() for v in range(-4, 5)])
    assert counts.sum() == 1000 and counts.max() - counts.min() <= 1


def test_draw_moves_only_its_generator_and_always_as_far():
    state, ends = torch.random.get_rng_state(), set()
    for op in A.OPS:
        gen = torch.Generator().manual_seed(1)
        A.apply(torch.zeros(2, 3, 8, 8), A.draw(gen, op))
        ends.add(torch.rand((), generator=gen).item())
    A.reference_omega(5, 8, 8)
    assert torch.equal(state, torch.random.get_rng_state()) and len(ends) == 1
    ops = {A.draw(gen).op for _ in range(200)}
    assert ops == set(A.parse(A.DSA))


def test_omega_is_data():
    for n in (None, 3):
        omega = A.draw(torch.Generator().manual_seed(0), n=n)
        assert A.Omega(**json.loads(json.dumps(dataclasses.asdict(omega)))) == omega
        hash(omega)
        with pytest.raises(dataclasses.FrozenInstanceError):
            omega.op = 'flip'


@pytest.mark.parametrize('strategy', ['', 'none', None])
def test_no_strategy_is_the_identity(strategy):
    x = torch.randn(2, 3, 8, 8)
    assert A.apply(x, A.draw(torch.Generator(), strategy)) is x


def test_without_height_and_width_nothing_changes():
    x = torch.randn(4, 16)
    assert A.apply(x, A.Omega('flip')) is x


@pytest.mark.parametrize('n', [None, 2])
@pytest.mark.parametrize('op', A.OPS)
def test_gradients(op, n):
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    omega = A.draw(torch.Generator().manual_seed(1), op, n)
    assert torch.autograd.gradcheck(lambda x: A.apply(x, omega), x)


def test_refusals():
    with pytest.raises(UserError, match="'rotate'"):
        A.parse('color_rotat')
    with pytest.raises(UserError, match='n=3'):
        A.apply(torch.zeros(3, 1, 8, 8), A.draw(torch.Generator(), n=2))
