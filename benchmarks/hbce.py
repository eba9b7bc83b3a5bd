"""What hierarchical binary cross-entropy costs: forward and backward at batch 256, against plain binary cross-entropy
on the same shape.

    python benchmarks/hbce.py [--nodes 300 2000 20000] [--threads 1 2] [--rounds 20] [--out benchmarks/hbce.csv]

Each size and number of threads runs in a process of its own. The losses take turns, round after round, so that a busy
moment hits all of them;
the table holds medians over the rounds, each round being the median of a few calls. `plain autograd` is the hinge
written with torch's own
operations; `loop over nodes` takes one column of the logits after the other, as the published code and the thesis do
(the hard penalty; up to
2,000 nodes, few repeats). The targets of plain binary cross-entropy, of plain autograd and of the loop are made
beforehand."""

import argparse, csv, json, os, statistics, subprocess, sys, time
from pathlib import Path


def tree(n: int):
    "A random tree whose height grows like the logarithm of its size"
    import numpy as np
    from hiermetric.trees.taxonomy import Taxonomy

    rng = np.random.default_rng(0)
    return Taxonomy.from_parents(
        {f'n{i}': f'n{rng.integers(max(0, i // 4), max(1, i // 2))}' if i else None for i in range(n)}
    )


def losses(n: int, batch: int) -> dict:
    "name → (loss of logits, how often to call it in a round, after how many rounds to stop)"
    import torch, torch.nn.functional as F
    from hiermetric.heads.hbce import HBCELoss

    tax, g = tree(n), torch.Generator().manual_seed(0)
    v = tax.tensor('leaves')[torch.randint(0, tax.n_leaves, (batch,), generator=g)]
    hot = tax.multi_hot(v)[:, 1:].float()
    up = tax.tensor('parents')[1:]

    def bce(z):
        return F.binary_cross_entropy_with_logits(z, hot)

    def plain(z):
        p = F.pad(z.sigmoid(), (1, 0), value=1.0)
        return bce(z) + (p[:, 1:] - p[:, up]).relu().mean()

    def loop(z):
        total = 0.0
        for c in range(1, len(tax)):
            child, u = z[:, c - 1].sigmoid(), int(tax.parents[c])
            total = total + F.binary_cross_entropy_with_logits(z[:, c - 1], hot[:, c - 1])
            if u > 0:
                total = (
                    total
                    + torch.where(
                        (z[:, u - 1].sigmoid() <= 0.5) & (child > 0.5), 0.5 * torch.ones_like(child), 0 * child
                    ).mean()
                )
        return total / (len(tax) - 1)

    out = {'bce': (bce, 10, 999)}
    for kind in ('hinge', 'product', 'log', 'hard'):
        out[kind] = (lambda z, o=HBCELoss(tax, kind): o(z, v)), 10, 999
    out['hinge, soft distance'] = (lambda z, o=HBCELoss(tax, distance='soft'): o(z, v)), 10, 999
    out['plain autograd'] = plain, 5, 5
    if n <= 2000:
        out['loop over nodes'] = loop, 1, 3
    return out


def measure(n: int, threads: int, batch: int, rounds: int) -> list[dict]:
    "Medians in milliseconds"
    import torch

    torch.set_num_threads(threads)
    what, took = losses(n, batch), {}
    z = torch.randn(batch, n - 1, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for r in range(rounds + 1):
        for name, (f, calls, last) in what.items():
            if r > last:
                continue
            each = []
            for _ in range(max(1, calls // (1 + 4 * (n > 5000)))):
                z.grad = None
                t = time.perf_counter()
                f(z).backward()
                each.append(time.perf_counter() - t)
            if r:
                took.setdefault(name, []).append(statistics.median(each))
    ms = {name: 1e3 * statistics.median(o) for name, o in took.items()}
    return [
        dict(
            nodes=n,
            batch=batch,
            threads=threads,
            loss=name,
            ms=round(o, 3),
            times_bce=round(o / ms['bce'], 2),
            loop_is_slower=round(ms['loop over nodes'] / o, 1) if 'loop over nodes' in ms else '',
            load_average=round(os.getloadavg()[0], 1),
        )
        for name, o in ms.items()
    ]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--nodes', type=int, nargs='+', default=[300, 2000, 20000])
    p.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    p.add_argument('--batch', type=int, default=256)
    p.add_argument('--rounds', type=int, default=20)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    p.add_argument('--part', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.part:
        return print(json.dumps(measure(a.nodes[0], a.threads[0], a.batch, a.rounds)))
    rows = []
    for threads in a.threads:
        for n in a.nodes:
            call = [
                sys.executable,
                __file__,
                '--part',
                '--nodes',
                str(n),
                '--threads',
                str(threads),
                '--batch',
                str(a.batch),
                '--rounds',
                str(a.rounds),
            ]
            rows += json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for r in rows[-8:]:
                if (r['nodes'], r['threads']) == (n, threads):
                    print(*r.values(), sep='\t', flush=True)
    with a.out.open('w', newline='') as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)


if __name__ == '__main__':
    main()
