"""The papers' figures as a file: complete, readable, and set beside ours only where they mean the same."""
import pandas as pd
import pytest

from avdd_nb.core import UserError
from avdd_nb.papers import PAPERS, PROTOCOLS, beside, differs, paper_results, paper_rows, plain


def test_file_is_whole():
    frame = paper_results()
    key = [c for c in frame if c not in ('mean', 'std', 'note')]
    known = frame[frame['mean'].notna()]
    clash = known[known.duplicated(key, keep=False)]
    assert clash.empty, clash
    assert frame[frame['mean'].isna()].note.str.len().min() > 0         # no figure: says why
    assert set(frame.paper) == set(PAPERS) == set(PROTOCOLS)
    percent = known[known.metric.str.endswith('_pct')]
    assert percent['mean'].between(0, 100).all()


def test_the_callers_copy_is_its_own():
    frame = paper_results()
    frame.loc[0, 'mean'] = -1
    assert paper_results().loc[0, 'mean'] != -1


@pytest.mark.parametrize('where, hint', [(dict(table='99'), 'table'), (dict(dataset='AVF'), "'AVE'"),
                                         (dict(metod='DM'), "'method'"), (dict(method=['DM', 'AVD']), "'AVDD'")])
def test_misspelt(where, hint):
    with pytest.raises(UserError, match=hint): paper_rows('AVDD', **where)


def test_lists_and_numbers():
    rows = paper_rows('AVDD', 3, ipc=[1, 10], method=['DM', 'avdd'], dataset='ave')
    assert len(rows) == 4 and set(rows.ipc) == {'1', '10'}


def test_words_are_translated():
    ours = pd.DataFrame([dict(method='DM', ipc=1, modality=m, fusion=f, mean=50.) for m, f in
                         [('AV', 'mean'), ('audio', ''), ('image', ''), ('AV', 'product')]]
                        + [dict(method='whole data', ipc=0, modality='AV', fusion='mean', mean=50.)])
    found = beside(ours, paper_rows('AVDD', 1))
    assert found.paper.fillna(-1).tolist() == [36.54, 29.60, 26.40, -1, 68.24]
    assert found.difference[4] == pytest.approx(50 - 68.24)


def test_only_what_differs_is_said():
    theirs = dict(paper='AVDD', dataset='AVE', ipc='1')
    assert differs(dict(dataset='ave', steps=5000, width=128, epochs=30, runs=3), theirs) == ''
    assert differs(dict(dataset='x', steps=7), theirs) == 'x instead of AVE; 7 steps instead of 5000'
    assert differs(dict(steps=float('nan')), theirs) == ''
    assert differs(dict(steps=7, runs=1), theirs | dict(ipc='full')) == 'distillations: 1 instead of 3'


def test_names():
    assert plain('VGGS-10K') == plain('vggs10k') and plain('TESLA_WBCE') == 'teslawbce'


def test_no_figures_at_all():
    with pytest.raises(UserError): beside(pd.DataFrame([dict(method='DM', mean=1.)]), paper_results().iloc[:0])
