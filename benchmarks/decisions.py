"""How long an answer takes on a large tree: every rule, one image at a time and sixteen together.

    python benchmarks/decisions.py [--nodes 1000 100000 1000000] [--repeats 9] [--out benchmarks/decisions.csv]

A random recursive tree, a softmax over its leaves in float32, one thread. Milliseconds an image, medians over the
repeats, wall clock and
processor time (which other programs on the machine disturb less); `check_ms` is the look through the probabilities
that every call begins
with and is part of all the others."""

import argparse, csv, os, statistics, time
from functools import partial
from pathlib import Path
import numpy as np, torch
from hiermetric.judging.rules import create_rule, list_rules
from hiermetric.trees.checks import check_node_probs
from hiermetric.trees.taxonomy import Taxonomy


def timed(f, repeats: int) -> tuple[float, float]:  # median milliseconds on the wall clock, of processor time
    "How long `f` takes"
    f()
    wall, cpu = [], []
    for _ in range(repeats):
        w, c = time.perf_counter(), time.process_time()
        f()
        wall.append(1e3 * (time.perf_counter() - w))
        cpu.append(1e3 * (time.process_time() - c))
    return statistics.median(wall), statistics.median(cpu)


def tree(n: int) -> Taxonomy:
    above = (np.random.default_rng(0).random(n) * np.arange(n)).astype(int)
    return Taxonomy.from_parents({f'taxon {i}': f'taxon {above[i]}' if i else None for i in range(n)})


def measure(n: int, repeats: int) -> list[dict]:
    "A row a rule"
    tax, rng, rows = tree(n), np.random.default_rng(1), []

    def images(b):
        z = torch.as_tensor(rng.normal(size=(b, tax.n_leaves)).astype(np.float32))
        t = rng.integers(tax.n_leaves, size=b)
        z[torch.arange(b), t] += (
            np.float32(np.log(tax.n_leaves)) + torch.randn(b) * 2
        )  # right, and by chance quite sure
        return tax.node_probs(z.softmax(1)), tax.leaves[t]

    val, t = images(max(24, min(200, 20_000_000 // n)))
    one, many = images(1)[0], images(16)[0]
    check = timed(lambda: check_node_probs(one, tax), repeats)
    kinds = {o: {} for o in list_rules().index} | {
        'guarantee at=clade': {'at': 'clade'},
        'guarantee at=rank': {'at': 'rank'},
    }
    for name, kw in kinds.items():
        start = time.perf_counter()
        rule = create_rule(name.split()[0], **kw).fit(val, t, tax)
        fit = time.perf_counter() - start
        (wall, cpu) = timed(partial(rule, one), repeats)
        (wall16, _) = timed(partial(rule, many), max(repeats // 3, 1))
        rows.append(
            dict(
                nodes=n,
                leaves=tax.n_leaves,
                height=tax.height,
                rule=name,
                one_ms=wall,
                one_cpu_ms=cpu,
                of_sixteen_ms=wall16 / 16,
                check_ms=check[0],
                fit_s=fit,
                fit_images=len(t),
            )
        )
    return [
        {k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()}
        | {'load_average': round(os.getloadavg()[0], 1)}
        for r in rows
    ]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--nodes', type=int, nargs='+', default=[1_000, 100_000, 1_000_000])
    p.add_argument('--repeats', type=int, default=9)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    a = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for n in a.nodes:
        for row in measure(n, a.repeats):
            rows.append(row)
            print(' '.join(f'{k}={v}' for k, v in row.items()), flush=True)
    with a.out.open('w', newline='') as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)


if __name__ == '__main__':
    main()
