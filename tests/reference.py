"""Slow, obvious twins of the fast code: explicit loops, one line per sentence of the definition."""

import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoreid.ops import PartAware

# ------------------------------------------------------------------------------------------ losses, metrics, loading


def batch_hard_triplet(features, labels, margin):
    """Hermans et al. 2017, Eq. 5, anchor by anchor over lists of numbers; None where no anchor has both sides."""
    terms = []
    for a in range(len(features)):
        others = [i for i in range(len(labels)) if i != a]
        positives = [math.dist(features[a], features[p]) for p in others if labels[p] == labels[a]]
        negatives = [math.dist(features[a], features[n]) for n in others if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        gap = max(positives) - min(negatives)
        terms.append(math.log(1 + math.exp(gap)) if margin == "soft" else max(0.0, margin + gap))
    return sum(terms) / len(terms) if terms else None


def batch_soft_triplet(features, labels, margin):
    """Robust-ReID, Eq. 4 and 5, anchor by anchor over lists of numbers; None where no anchor has both sides."""
    terms = []
    for a in range(len(features)):
        others = [i for i in range(len(labels)) if i != a]
        positives = [math.dist(features[a], features[p]) for p in others if labels[p] == labels[a]]
        negatives = [math.dist(features[a], features[n]) for n in others if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        d_p = sum(math.exp(d) * d for d in positives) / sum(math.exp(d) for d in positives)
        d_n = sum(math.exp(-d) * d for d in negatives) / sum(math.exp(-d) for d in negatives)
        terms.append(math.log(1 + math.exp(d_p - d_n)) if margin == "soft" else max(0.0, margin + d_p - d_n))
    return sum(terms) / len(terms) if terms else None


def center_loss(features, labels, centers):
    """SAFR, Eq. 2, and Wen et al. 2016, Eq. 4: (loss, each center's step direction), over lists of numbers."""
    loss = 0.0
    for x, y in zip(features, labels, strict=True):
        loss += 0.5 * sum((a - b) ** 2 for a, b in zip(x, centers[y], strict=True))
    deltas = []
    for j, c in enumerate(centers):
        mine = [x for x, y in zip(features, labels, strict=True) if y == j]
        deltas.append([sum(c[d] - x[d] for x in mine) / (1 + len(mine)) for d in range(len(c))])
    return loss, deltas


def smoothed_cross_entropy(logits, labels, smoothing, literal):
    """-sum_i q_i log p_i by the definition of q, Szegedy et al.'s or SAFR's printed one, over lists of numbers."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_sum = math.log(sum(math.exp(z) for z in row))
        for i, z in enumerate(row):
            is_it = 1 if i == label else 0
            if literal:
                q = is_it - smoothing * math.copysign(1, is_it - 0.5)
            else:
                q = (1 - smoothing) * is_it + smoothing / len(row)
            total -= q * (z - log_sum)
    return total / len(logits)


def batch_norm_statistics(batches):
    """What a batch norm with cumulative averaging knows after these inputs, B x C x H x W each: (means, variances),
    the plain mean over batches of each batch's mean and unbiased variance."""
    means, variances = [], []
    for channel in range(batches[0].shape[1]):
        values = [batch[:, channel].flatten().tolist() for batch in batches]
        means.append(sum(statistics.fmean(v) for v in values) / len(values))
        variances.append(sum(statistics.variance(v) for v in values) / len(values))
    return means, variances


def cyclic_rates(epochs, peak, cycle_epochs, decay, floor):
    """The rates of epochs 0, 1, ... one after the other: half a cosine wave down, then a lower one."""
    rates, top, step = [], peak, 0
    for _ in range(epochs):
        rates.append((top + floor) / 2 + (top - floor) / 2 * math.cos(math.pi * step / (cycle_epochs - 1)))
        step += 1
        if step == cycle_epochs:
            top, step = top * decay, 0
    return rates


def pk_faults(batches, labels, p, k):
    """Everything about these batches that a P x K sampler must not do."""
    faults = []
    for b, batch in enumerate(batches):
        images_of = {}
        for index in batch:
            images_of.setdefault(labels[index], []).append(index)
        if len(images_of) != p:
            faults.append(f"batch {b}: {len(images_of)} identities")
        for label, images in images_of.items():
            if len(images) != k:
                faults.append(f"batch {b}: identity {label} has {len(images)} images")
            there_are = sum(other == label for other in labels)
            if len(set(images)) != min(k, there_are):
                faults.append(f"batch {b}: identity {label} shows {len(set(images))} of {there_are} images")
    if len(batches) != max(1, -(-len(labels) // (p * k))):
        faults.append(f"{len(batches)} batches")
    return faults


# ------------------------------------------------------------------------------------------ cells, supernet, search
class LiteralPartAware(nn.Module):
    """Auto-ReID's part-aware module as its figure 2 draws it: the enhanced tensor is built pixel by pixel and
    concatenated with the input. Shares the parameters of a ``PartAware``."""

    def __init__(self, module: PartAware) -> None:
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        m = self.m
        if m.stripes.axis == "width":
            x = x.transpose(2, 3)
        height, width = x.shape[2:]
        parts = min(m.stripes.parts, height)
        stripe_of = [max(i for i in range(parts) if i * height // parts <= r) for r in range(height)]
        vectors = []
        for i in range(parts):
            rows = [r for r in range(height) if stripe_of[r] == i]
            mean = x[:, :, rows].mean(dim=(2, 3))
            vectors.append(m.body_norm[i](m.body[i](torch.relu(mean))))
        mixed = []
        keys, queries = [m.key(v) for v in vectors], [m.query(v) for v in vectors]
        for a in range(parts):
            scores = [(keys[a][:, None] @ queries[b][:, :, None])[:, 0, 0] for b in range(parts)]  # as products: counted
            attention = torch.softmax(torch.stack(scores, dim=1), dim=1)
            mixed.append((attention[:, None] @ torch.stack(vectors, dim=1))[:, 0])
        enhanced = torch.stack([mixed[stripe_of[r]] for r in range(height)], dim=2)
        enhanced = enhanced.unsqueeze(3).expand(-1, -1, -1, width)
        both = torch.relu(torch.cat([x, enhanced], dim=1))
        body = m.fuse_body.weight[:, :, None, None]
        if m.stride == 1:
            y = F.conv2d(both, torch.cat([m.fuse_input.weight, body], dim=1))
        else:
            half = body.shape[0] // 2
            first = torch.cat([m.fuse_input.first.weight, body[:half]], dim=1)
            second = torch.cat([m.fuse_input.second.weight, body[half:]], dim=1)
            padded = F.pad(both, (0, width % 2, 0, height % 2))
            y = torch.cat([F.conv2d(both, first, stride=2), F.conv2d(padded[:, :, 1:, 1:], second, stride=2)], dim=1)
        y = m.norm(y)
        return y.transpose(2, 3) if m.stripes.axis == "width" else y


def mixed_op(mixed, x: Tensor, weights) -> Tensor:
    """DARTS eq. 2 literally: every operation runs, none gives zeros of the right size, all are summed."""
    total = 0.0
    for weight, name in zip(weights, mixed.names, strict=True):
        if name == "none":
            s = mixed.stride
            y = torch.zeros_like(x[:, :, ::s, ::s])
        else:
            y = mixed.operations[name](x)
        total = total + weight * y
    return total


def supernet_forward(net, images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The supernet by the literal mixed edges: nodes summed one edge at a time, cells walked by hand."""
    s0 = s1 = net.stem(images)
    for cell in net.cells:
        states = [cell.preprocess0(s0), cell.preprocess1(s1)]
        k = 0
        for node in net.space.concat:
            total = 0.0
            for source in range(node):
                total = total + mixed_op(cell.edges[k], states[source], weights[cell.kind][k])
                k += 1
            states.append(total)
        s0, s1 = s1, torch.cat(states[2:], dim=1)
    return s1.mean(dim=(2, 3))


def gdas_hard_weights(net, tau: float, generator: torch.Generator) -> dict[str, Tensor]:
    """GDAS as published: the whole hard straight-through matrix, for a forward pass in which every operation runs.

    Its forward value equals the sampled pass; its gradient over alpha equals the "all" variant only where the
    operations that were not drawn are taken as one, so only the value is compared with it.
    """
    weights = {}
    for kind, alpha in net.alphas.items():
        exponential = torch.empty(alpha.shape, dtype=alpha.dtype).exponential_(generator=generator)
        logits = (torch.log_softmax(alpha, dim=1) - exponential.log()) / tau
        soft = torch.softmax(logits, dim=1)
        hard = torch.zeros_like(soft)
        for row, choice in enumerate(soft.argmax(dim=1)):
            hard[row, choice] = 1.0
        weights[kind] = hard - soft.detach() + soft
    return weights


def derive_cell(operations, nodes, rows) -> tuple:
    """DARTS' rule by trying every pair of edges and every operation."""
    graph, k = [], 0
    for node in range(2, 2 + nodes):
        table = rows[k : k + node]
        k += node

        def strength(source, table=table):
            return max(w for w, op in zip(table[source], operations, strict=True) if op != "none")

        pairs = [(a, b) for a in range(node) for b in range(node) if a != b]
        best = max(pairs, key=lambda p: (strength(p[0]), strength(p[1]), -p[0], -p[1]))
        chosen = []
        for source in best:
            for op, w in zip(operations, table[source], strict=True):
                if op != "none" and w == strength(source):
                    chosen.append((op, source))
                    break
        graph.append(tuple(chosen))
    return tuple(graph)


def numerical_arch_gradient(loss_after_step, alpha: Tensor, eps: float = 1e-5) -> Tensor:
    """Central differences of a function of alpha, one entry at a time."""
    gradient = torch.zeros_like(alpha)
    for i in range(alpha.numel()):
        with torch.no_grad():
            before = alpha.view(-1)[i].item()
            alpha.view(-1)[i] = before + eps
            plus = loss_after_step()
            alpha.view(-1)[i] = before - eps
            minus = loss_after_step()
            alpha.view(-1)[i] = before
        gradient.view(-1)[i] = (plus - minus) / (2 * eps)
    return gradient
