"Ten seconds of sound, end to end: the data, a distillation, its file, every judge, and back to a wave."
import pytest
import torch

from avdd_nb.core import UserError
from avdd_nb.data.audio import MelSpec, to_wave
from avdd_nb.data.catalog import load
from avdd_nb.evaluate import cross_architecture, evaluate, make_protocol
from avdd_nb.retrieval import retrieve
from avdd_nb.runs import evaluate_run, load_run, make_config, run

PROTOCOL = make_protocol('paper', width=4, epochs=2, epochs_whole=1)


@pytest.fixture(scope='module')
def splits(): return load('soundshapes', n_train=40, n_test=50, mel='avdd', seconds=10)


def test_ten_seconds_from_data_to_scores(splits, tmp_path):
    options = dict(width=4, real_batch=2, pool_size=2, factor=2, init='random')
    config = make_config('soundshapes', 'avdd', 1, 2, options=options, data=dict(mel='avdd', seconds='10'))
    steps = list(run(config, tmp_path/'long', splits=splits))
    assert len(steps) == 2 and steps[-1].loss > 0 and config.data['seconds'] == 10
    _, syn = load_run(tmp_path/'long')
    assert syn.tensors['audio'].shape == (10, 1, 128, 551) and syn.decode()[0]['audio'].shape == (40, 1, 128, 551)
    start = load_run(tmp_path/'long', 'initial')[1]
    assert not torch.equal(start.tensors['audio'], syn.tensors['audio'])
    rows = evaluate_run(tmp_path/'long', PROTOCOL, 1, splits=splits)
    assert {r['modality'] for r in rows} == {'AV', 'audio', 'image'}
    assert len(evaluate_run(tmp_path/'long', PROTOCOL, 1, splits=splits, judge='retrieval')) == 6


def test_other_networks_and_heads_read_ten_seconds(splits):
    few = splits.train.subset(range(10))
    rows = cross_architecture(few, splits.test, PROTOCOL, 1, archs=('LeNet', 'AlexNet'))
    assert {r['arch'] for r in rows} == {'LeNet', 'AlexNet', 'mean'}
    for head in ('sum', 'attention'):
        assert evaluate(few, splits.test, make_protocol(PROTOCOL, head=head), 1)[0]['fusion'] == 'joint'
    assert retrieve(few, splits.test, PROTOCOL, 1)


def test_a_long_picture_sounds_as_long(splits):
    spec = MelSpec(length=110_000)
    wave = to_wave(splits.train.tensors['audio'][:1].float(), spec)
    assert wave.shape[-1] == 110_000 and wave.abs().max() > 0


def test_one_second_is_as_it_was_and_odd_lengths_are_refused():
    one, same = (load('soundshapes', n_train=10, n_test=10, **o).train for o in ({}, dict(seconds=1)))
    assert one.hash == same.hash and one.modalities['audio'].shape == (1, 64, 32)
    assert load('soundshapes', n_train=10, n_test=10, seconds=2.5).train.modalities['audio'].shape == (1, 64, 79)
    with pytest.raises(UserError, match='0.5…60'): load('soundshapes', seconds=0)
