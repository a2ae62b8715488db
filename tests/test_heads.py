"The heads against naive second implementations, and the four backbones against torchvision and on every size."
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from avdd_nb.core import UserError, seeded
from avdd_nb.nets.convnet import ARCHS, build
from avdd_nb.nets.fusion import HEADS, JOINT

SHAPES = dict(audio=(1, 32, 32), image=(3, 32, 32), depth=(1, 16, 16))


def model(head, names=('audio', 'image'), **options):
    nets = {m: build('ConvNet', SHAPES[m], width=6, seed=m) for m in names}
    with seeded('test'): return HEADS[head](nets, 5, **options)


def batch(names=('audio', 'image'), n=4):
    gen = torch.Generator().manual_seed(0)
    return {m: torch.randn(n, *SHAPES[m], generator=gen) for m in names}


def linear(layer, f): return f @ layer.weight.T + layer.bias


def test_sum_and_concat_by_hand():
    x = batch()
    one, two = model('sum', init='default'), model('concat', init='default')
    a, v = one.nets[0](x['audio']), one.nets[1](x['image'])
    torch.testing.assert_close(one(x)[JOINT], linear(one.heads[0], a + v))
    W = two.heads[0].weight
    torch.testing.assert_close(two(x)[JOINT], a @ W[:, :a.shape[1]].T + v @ W[:, a.shape[1]:].T + two.heads[0].bias)


def test_attention_one_sample_one_cell_one_channel_at_a_time():
    x, net = batch(), model('attention', init='default')
    pa, pv, Wa, Wv, Ua, Uv, last = net.heads
    want = []
    for i in range(4):
        a = net.nets[0](x['audio'])[i].view(6, -1).mean(1)                        # channel by channel, cells inside
        v = [net.nets[1](x['image'])[i].view(6, -1)[:, p] for p in range(16)]
        score = torch.stack([linear(Wv, c).tanh()*linear(Wa, a).tanh() for c in v])
        mixed = torch.zeros(6)
        for ch in range(6):
            alpha = score[:, ch].exp()/score[:, ch].exp().sum()
            mixed[ch] = sum(alpha[p]*v[p][ch] for p in range(16))
        want.append(linear(last, linear(Ua, a).tanh() + linear(Uv, mixed).tanh()))
    found = net(x)
    torch.testing.assert_close(found[JOINT], torch.stack(want))
    torch.testing.assert_close(found['image'], linear(pv, net.nets[1](x['image'])))
    assert list(found) == [JOINT, 'audio', 'image']


def test_probes_read_and_do_not_shape():
    net, x = model('attention', init='default'), batch()
    logits = net(x)
    (logits['audio'].sum() + logits['image'].sum()).backward()
    assert all(p.grad is None for p in net.nets.parameters()) and net.heads[0].weight.grad is not None


@pytest.mark.parametrize('guide', ['audio', 'image', 'depth'])
def test_any_modality_may_guide_any_others(guide):
    names = ('audio', 'image', 'depth')
    net = model('attention', names, guide=guide)
    assert net.guide == guide and net(batch(names))[JOINT].shape == (4, 5)
    assert model('attention', names).guide == 'audio'


@pytest.mark.parametrize('head', HEADS)
def test_soft_labels_and_a_falling_loss(head):
    net, x, y = model(head, init='default'), batch(n=10), torch.arange(10) % 5
    torch.testing.assert_close(net.loss(net(x), y), net.loss(net(x), F.one_hot(y, 5).float()))
    optimiser, curve = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(25):
        loss = net.loss(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(loss.item())
    assert curve[-1] < .9*curve[0]


def test_heads_refuse_in_one_sentence():
    for head in ('sum', 'concat', 'attention'):
        with pytest.raises(UserError, match="no 'image'"): model(head)(batch(('audio',)))
    nets = {m: build('ConvNet', SHAPES['image'], width=w) for m, w in (('a', 4), ('b', 6))}
    with pytest.raises(UserError, match='cannot be added'): HEADS['sum'](nets, 3)
    with pytest.raises(UserError, match='cannot be compared'): HEADS['attention'](nets, 3)
    with pytest.raises(UserError, match="did you mean 'audio'"): model('attention', guide='adio')


SIZES = [(3, 32, 32), (3, 64, 64), (3, 224, 224), (1, 128, 56), (1, 64, 32), (1, 128, 551), (1, 28, 28)]


@pytest.mark.parametrize('shape', SIZES)
@pytest.mark.parametrize('arch', ARCHS)
def test_every_network_reads_every_size(arch, shape):
    net = build(arch, shape, width=8, seed=0, kind='image' if shape[0] == 3 else 'spectrogram')
    with torch.no_grad(): e = net.embed(torch.randn(1, *shape))
    assert e.shape == (1, net.dim) and net.dim % net.channels == 0 and e.isfinite().all()


def test_resnet18_is_torchvisions_with_another_stem_and_norm():
    from torchvision.models import resnet18
    norm = lambda n: torch.nn.GroupNorm(n, n)
    theirs, ours = resnet18(norm_layer=norm), build('ResNet18', (3, 32, 32), seed=0)
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = theirs.fc = torch.nn.Identity()
    values = list(ours.state_dict().values())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x))


def test_printed_sizes():
    "Weights counted by hand from the printed layers."
    conv = lambda i, o, k: i*o*k*k + o
    count = lambda arch, c=3: sum(p.numel() for p in build(arch, (c, 32, 32)).parameters())
    assert count('LeNet') == conv(3, 6, 5) + conv(6, 16, 5) + 401*120 + 121*84
    printed = [(3, 128, 5), (128, 192, 5), (192, 256, 3), (256, 192, 3), (192, 192, 3)]
    assert count('AlexNet') == sum(conv(*s) for s in printed) and build('AlexNet', (3, 32, 32)).dim == 3072
    vgg = [1, 64, 128, 256, 256, 512, 512, 512, 512]
    assert count('VGG11', 1) == sum(conv(i, o, 3) + 2*o for i, o in zip(vgg, vgg[1:]))


def test_parts_equal_the_whole():
    for arch in ARCHS:
        net = build(arch, (3, 32, 32), width=16, seed=0)
        x = torch.randn(5, 3, 32, 32)
        net.at_a_time = 100
        whole = net(x)
        net.at_a_time = 2
        torch.testing.assert_close(net(x), whole, rtol=1e-4, atol=1e-5)


def test_the_engine_imports_without_torchvision():
    code = ("import sys\n"
            "class Gone:\n"
            "    def find_spec(self, name, *a):\n"
            "        if name.split('.')[0] == 'torchvision': raise ModuleNotFoundError(name, name=name)\n"
            "sys.meta_path.insert(0, Gone())\n"
            "import avdd_nb.evaluate, avdd_nb.nets.backbones as b\n"
            "from avdd_nb.nets.convnet import build\n"
            "build('VGG11', (3, 32, 32), width=8)\n"
            "try: build('ResNet18', (3, 32, 32), width=8)\n"
            "except Exception as e: print(type(e).__name__)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout.strip() == 'UserError', out.stderr
