"Errors that help, seed streams that share nothing, configuration that is checked."
import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from avdd_nb.core import (
    UserError,
    cache_dir,
    check_value,
    choose,
    configure,
    data_root,
    hp,
    need,
    patch,
    rng,
    seed_of,
    seeded,
)

names = st.recursive(st.integers() | st.text(max_size=8) | st.booleans() | st.none(),
                     lambda s: st.lists(s, max_size=3), max_leaves=5)
parts = st.lists(names, min_size=1, max_size=4)


@dataclass
class Knobs:
    lr: float = hp(0.2, 0, 10)
    steps: int = hp(3, 1, 100)
    free: int = hp(0)
    floor: float = hp(1., 0)
    roof: float = hp(1., None, 2)
    fast: bool = hp(False)
    init: str = hp('random', choices=['random', 'herding'])


def field(name): return next(f for f in dataclasses.fields(Knobs) if f.name == name)


@given(parts, parts)
def test_seed_of_names_one_stream(a, b):
    assert seed_of(*a) == seed_of(*a) and 0 <= seed_of(*a) < 2**63
    assume(repr(a) != repr(b))
    assert seed_of(*a) != seed_of(*b)


def test_seed_of_tells_neighbours_apart():
    grid = {(s, e, i) for s in range(20) for e in range(20) for i in range(20)}
    assert len({seed_of('pool', *p) for p in grid}) == len(grid)          # base + i + e would give 58 seeds
    assert len({seed_of(*p) for p in [('a', 'b'), ('ab',), ('b', 'a'), (['a', 'b'],), ('a', ['b']), (1,), ('1',)]}) == 7


def test_seed_of_bits_are_even():
    bits = Counter(b for s in range(2000) for b in range(63) if seed_of('bits', s) >> b & 1)
    assert all(abs(bits[b] - 1000) < 5*math.sqrt(500) for b in range(63))


def test_streams_do_not_follow_each_other():
    x = torch.stack([torch.randn(4000, generator=rng('a', s)) for s in range(12)])
    r = torch.corrcoef(x) - torch.eye(12)
    assert r.abs().max() < 5/math.sqrt(4000)


@given(parts)
def test_seeded_is_a_stream_and_leaves_the_global_one(p):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(*p): inside = torch.rand(4)
    assert torch.equal(torch.rand(3), expected)
    with seeded(*p): assert torch.equal(torch.rand(4), inside)
    state = torch.get_rng_state()
    torch.rand(2, generator=rng(*p))
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_gives_the_generator_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded('x'): torch.rand(1), 1/0
    assert torch.equal(torch.get_rng_state(), state)


@given(st.integers(-10**18, 10**18))
def test_int_in_any_notation(n):
    for value in (n, str(n), f" {n} "): assert check_value(field('free'), value, 'Knobs') == n
    assert type(check_value(field('free'), str(n), 'Knobs')) is int


@given(st.floats(0, 10))
def test_float_in_any_notation(v):
    for value in (v, repr(v), f"{v!r} "): assert check_value(field('lr'), value, 'Knobs') == v
    assert check_value(field('lr'), 3, 'Knobs') == 3. and type(check_value(field('lr'), 3, 'Knobs')) is float


@given(st.floats(), st.sampled_from(['lr', 'steps']))
def test_numbers_outside_their_range_are_refused(v, name):
    low, high = (0, 10) if name == 'lr' else (1, 100)
    fits = low <= v <= high and (name == 'lr' or v == int(v))
    for value in (v, repr(v)):
        if fits: assert check_value(field(name), value, 'Knobs') == v
        else:
            with pytest.raises(UserError, match=f"Knobs.{name}"): check_value(field(name), value, 'Knobs')


@pytest.mark.parametrize('text, value', [('true', True), ('True', True), ('1', True), ('false', False),
                                         ('FALSE', False), ('0', False), (True, True), (False, False)])
def test_booleans(text, value): assert check_value(field('fast'), text, 'Knobs') is value


@pytest.mark.parametrize('name, value', [
    ('fast', 'yes'), ('fast', ''), ('fast', 2), ('fast', None), ('fast', 1.5), ('steps', '3.5'), ('steps', 'three'),
    ('steps', None), ('steps', [3]), ('steps', 'nan'), ('steps', 'inf'), ('steps', 0), ('steps', 101),
    ('steps', 2.5), ('lr', 'fast'), ('lr', 'nan'), ('lr', '-inf'), ('lr', math.nan), ('floor', 'nan'),
    ('roof', 'nan'), ('roof', 'inf'), ('lr', -1e-9), ('lr', {}), ('init', 3), ('init', 'hording'), ('init', None)])
def test_bad_values_name_the_field(name, value):
    with pytest.raises(UserError) as e: configure(Knobs, **{name: value})
    assert f"Knobs.{name}" in str(e.value) and '\n' not in str(e.value)


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Knobs)]) | st.text(max_size=6),
                       st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) |
                       st.lists(st.integers()), max_size=3))
def test_configure_gives_a_checked_object_or_one_sentence(values):
    try: k = configure(Knobs, **values)
    except UserError: return
    assert 0 <= k.lr <= 10 and 1 <= k.steps <= 100 and k.floor >= 0 and k.roof <= 2 and k.init in ('random', 'herding')
    assert [type(v) for v in dataclasses.astuple(k)] == [float, int, int, float, float, bool, str]


def test_misspelt_names_stop_with_the_nearest():
    with pytest.raises(UserError, match="'stpes'; did you mean 'steps'"): configure(Knobs, stpes=3)
    with pytest.raises(UserError, match="did you mean 'herding'.*random, herding"): configure(Knobs, init='hedring')
    assert choose('b', dict(a=1, b=2), 'thing') == 2 and choose('b', ['a', 'b'], 'thing') == 'b'
    with pytest.raises(UserError, match="no thing called 'zzzz'. Choices: a, b"): choose('zzzz', ['a', 'b'], 'thing')
    with pytest.raises(UserError, match="no thing called None"): choose(None, ['a', 'b'], 'thing')


@given(st.lists(st.text('abcdef', min_size=4, max_size=9), min_size=2, max_size=5, unique=True), st.data())
def test_one_dropped_letter_is_still_understood(options, data):
    name = data.draw(st.sampled_from(options))
    i = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:i] + name[i+1:]
    assume(wrong not in options)
    with pytest.raises(UserError, match="did you mean"): choose(wrong, options, 'thing')


def test_need():
    assert need('json').loads('1') == 1
    with pytest.raises(UserError, match=r"pip install 'avdd_nb\[video\]'"): need('no_such_package_at_all', 'video')
    with pytest.raises(UserError, match="pip install 'no_such_package_at_all'"): need('no_such_package_at_all.sub')


def test_need_does_not_hide_a_broken_package(tmp_path, monkeypatch):
    (tmp_path/'brittle_package.py').write_text('import missing_inner_package')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match='missing_inner'): need('brittle_package')


def test_patch_adds_methods_and_properties():
    class Thing: pass
    @patch
    def twice(self: Thing, x): return 2*x
    @patch(as_prop=True)
    def seven(self: Thing): return 7
    assert Thing().twice(4) == 8 and Thing().seven == 7 and 'Thing.twice' in Thing.twice.__qualname__


def test_folders_follow_argument_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('AVDD_DATA', str(tmp_path/'env'))
    assert data_root(tmp_path) == tmp_path and data_root() == tmp_path/'env'
    monkeypatch.delenv('AVDD_DATA')
    assert str(data_root()) == 'data'
    monkeypatch.setenv('AVDD_CACHE', str(tmp_path/'cache'))
    assert cache_dir() == tmp_path/'cache'
