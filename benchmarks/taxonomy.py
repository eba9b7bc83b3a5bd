"""How a taxonomy's cost grows with its size: build, save, load, lca, node_probs, memory.

    python benchmarks/taxonomy.py [--nodes 1000 10000 …] [--repeats 3] [--out benchmarks/taxonomy.csv]

Each size runs in processes of its own (one builds and saves, one loads and asks), `repeats` times; the table holds
medians. Seconds are
wall clock; `…_cpu` counts processor time instead, which other programs on the machine disturb less. Peaks are of the
whole process, the
Python strings of the input included."""

import argparse, csv, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path


def peak() -> int:  # MB
    "The most memory that this process has held"
    status = Path('/proc/self/status')
    if status.exists():
        return int(next(o for o in status.read_text().splitlines() if o.startswith('VmHWM')).split()[1]) // 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20


def timed(
    f, repeats: int = 1
) -> tuple[float, float]:  # median seconds on the wall clock, median seconds of processor time
    "How long `f` takes"
    wall, cpu = [], []
    for _ in range(repeats):
        w, c = time.perf_counter(), time.process_time()
        f()
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    return statistics.median(wall), statistics.median(cpu)


def build(n: int, path: Path) -> dict:
    "A random recursive tree, each node under a uniformly drawn earlier one, from a dictionary of strings"
    import numpy as np
    from hiermetric.trees.taxonomy import Taxonomy

    above = (np.random.default_rng(0).random(n) * np.arange(n)).astype(int)
    parents = {f'taxon {i}': f'taxon {above[i]}' if i else None for i in range(n)}
    got, given = {}, peak()
    wall, cpu = timed(lambda: got.update(tax=Taxonomy.from_parents(parents)))
    tax, most = got['tax'], peak()
    return dict(
        height=tax.height,
        leaves=tax.n_leaves,
        build_s=wall,
        build_cpu_s=cpu,
        input_mb=given,
        build_peak_mb=most,
        save_s=timed(lambda: tax.save(path))[0],
        file_mb=path.stat().st_size / 1e6,
    )


def ask(n: int, path: Path) -> dict:
    "Load that tree and ask it"
    import numpy as np
    from hiermetric.trees.taxonomy import Taxonomy

    got, rng = {}, np.random.default_rng(1)
    wall, cpu = timed(lambda: got.update(tax=Taxonomy.load(path)))
    tax, most = got['tax'], peak()
    u, v = rng.integers(0, n, (2, 4_000_000))
    one, eight = rng.random(tax.n_leaves, np.float32), rng.random((8, tax.n_leaves), np.float32)
    tax.lca(u[:10], v[:10])
    tax.node_probs(one)  # arrays that are made at the first question
    lca, lca_cpu = timed(lambda: tax.lca(u, v), 5)
    probs, probs_cpu = timed(lambda: tax.node_probs(one), 9)
    return dict(
        load_s=wall,
        load_cpu_s=cpu,
        load_peak_mb=most,
        lca_mpairs_s=4 / lca,
        lca_mpairs_cpu_s=4 / lca_cpu,
        node_probs_ms=1e3 * probs,
        node_probs_cpu_ms=1e3 * probs_cpu,
        node_probs_batch8_ms=1e3 * timed(lambda: tax.node_probs(eight), 3)[0],
    )


def measure(n: int, repeats: int) -> dict:
    "Medians over processes"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            row = {}
            for part in ('build', 'ask'):
                row |= json.loads(
                    subprocess.run(
                        [sys.executable, __file__, '--part', part, '--nodes', str(n), '--out', f'{folder}/tree'],
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                    ).stdout
                )
            rows.append(row)
    return dict(
        nodes=n,
        **{k: round(statistics.median(r[k] for r in rows), 4) for k in rows[0]},
        load_average=round(os.getloadavg()[0], 1),
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--nodes', type=int, nargs='+', default=[1_000, 10_000, 100_000, 1_000_000, 2_600_000])
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    p.add_argument('--part', choices=['build', 'ask'], help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.part:
        return print(json.dumps({'build': build, 'ask': ask}[a.part](a.nodes[0], a.out)))
    rows = []
    for n in a.nodes:
        rows.append(measure(n, a.repeats))
        print(' '.join(f'{k}={v:g}' for k, v in rows[-1].items()), flush=True)
    with a.out.open('w', newline='') as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)


if __name__ == '__main__':
    main()
