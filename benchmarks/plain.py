"""The plain way, for comparison: PyTorch's own pool, the whole batch at once, Algorithm 1 of AVDD as it is printed."""
import torch
from torch import nn

from avdd_nb.match.augment import apply, draw
from avdd_nb.match.losses import cgm, icm, mean_matching
from avdd_nb.nets.convnet import Halve, build
from avdd_nb.synset import decode


def plain(net):
    "The same ConvNet without what this library does to be fast on a CPU."
    net.at_a_time = 10**9
    for i, layer in enumerate(net.features):
        if isinstance(layer, Halve):
            net.features[i] = nn.AvgPool2d(2)
    return net


def algorithm_1(data, syn, steps, width=128, real_batch=128, lr=.2, lam=10.):
    "AVDD as printed: each step a new network, then class by class a real batch, three terms, one optimiser step."
    gen, rows = torch.Generator().manual_seed(0), len(syn) // syn.n_classes
    pixels = {m: x.requires_grad_(True) for m, x in syn.tensors.items()}
    optimiser = torch.optim.SGD(list(pixels.values()), lr=lr, momentum=.5)
    for _ in range(steps):
        nets = {m: plain(build('ConvNet', s, width)).requires_grad_(False) for m, s in data.modalities.items()}
        omega = draw(gen)
        for c, members in enumerate(data.class_indices):
            x = data.batch(members[torch.randperm(len(members), generator=gen)[:real_batch]])
            with torch.no_grad():
                real = {m: nets[m](apply(x[m], omega)).mean(0, keepdim=True) for m in nets}
            mine = {m: decode(v[c * rows:(c + 1) * rows], syn.factor, syn.order) for m, v in pixels.items()}
            fake = {m: nets[m](apply(mine[m], omega)).mean(0, keepdim=True) for m in nets}
            loss = mean_matching(real, fake) + lam * icm(real, fake) + lam * cgm(real, fake)
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
        yield loss.item()
