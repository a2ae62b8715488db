"Every registered method is asked the same seven questions."
import pytest
import torch

from avdd_nb import check
from avdd_nb.check import check_method
from avdd_nb.core import UserError, hp
from avdd_nb.data.paired import Modality
from avdd_nb.match.losses import mean_matching
from avdd_nb.methods import base
from avdd_nb.methods.base import Matching, make_method, methods
from avdd_nb.runs import make_config
from avdd_nb.synset import SyntheticSet, check_fits


@pytest.fixture(autouse=True, scope='module')
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('AVDD_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.mark.parametrize('name', methods())
def test_it_is_a_method(name, tmp_path):
    wrong = [f"{row['question']}: {row['note']}" for row in check_method(name, tmp_path) if not row['ok']]
    assert not wrong


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(base, 'METHODS', dict(base.METHODS))
    return base.METHODS


def failures(cls, questions, **changes):
    return {r['question']: r['note'] for r in check_method(cls.name, questions=questions, **changes) if not r['ok']}


def test_a_loss_that_rises_is_found(registry):
    class Up(Matching, name='up'):
        def loss(self, real, syn):
            # a gradient of the wrong sign
            m = mean_matching(real, syn)
            return {'base': 2*m.detach() - m}
    assert 'the loss went' in failures(Up, [check.lowers_its_loss])['lowers its loss']


def test_a_result_that_depends_on_the_past_is_found(registry):
    class Forgetful(Matching, name='forgetful'):
        calls = 0

        def loss(self, real, syn):
            type(self).calls += 1
            return {'base': mean_matching(real, syn)*(1 + .01*self.calls)}
    found = failures(Forgetful, [check.repeats, check.resumes])
    assert set(found) == {'repeats', 'resumes'}


def test_a_field_without_help_or_range_is_found(registry):
    from dataclasses import dataclass

    @dataclass
    class Mute(Matching, name='mute'):
        pace: float = hp(1., help="how fast")
    assert 'pace has no range' in failures(Mute, [check.explains_its_fields])['explains its fields']


def test_presets_are_spelt_out_in_the_run(monkeypatch):
    monkeypatch.setattr(methods()['dm'], 'presets', {'slow': dict(lr=.1, width=16, steps=7)})
    assert make_method('dm', preset='slow', width=8).lr == .1
    config = make_config('soundshapes', 'dm', options=dict(preset='slow', width='8'))
    assert config.options == dict(lr=.1, width=8)
    with pytest.raises(UserError, match="did you mean 'slow'"): make_method('dm', preset='slo')
    with pytest.raises(UserError, match="preset of avdd"): make_config('soundshapes', 'avdd', options=dict(preset='x'))


def test_a_set_that_does_not_fit_is_one_sentence():
    spec = Modality('image', 'image', (3, 4, 4))
    fits = SyntheticSet({'image': torch.zeros(4, 3, 4, 4)}, torch.tensor([0, 0, 1, 1]), {'image': spec}, ['a', 'b'])
    check_fits(fits)
    for change in (dict(tensors={'image': torch.zeros(4, 3, 4, 5)}), dict(tensors={'image': torch.zeros(3, 3, 4, 4)}),
                   dict(classes=['a', 'b', 'c'])):
        with pytest.raises(UserError) as e: check_fits(SyntheticSet(**(vars(fits) | change)))
        assert '\n' not in str(e.value)


def test_a_notebook_does_not_replace_a_method_of_the_package():
    "Running a chapter defines its class once more, in `__main__`; child processes know the package's only."
    from avdd_nb.methods.base import METHODS, Matching, methods
    known = methods()['avdd']
    again = type('AVDD', (Matching,), dict(__module__='__main__'))
    assert again.name == 'avdd' and METHODS['avdd'] is known
    for _ in range(2):
        mine = type('OnlyHere', (Matching,), dict(__module__='__main__'))
        assert METHODS.pop('onlyhere') is mine
