"""Retrieval scores beside pytorch-metric-learning's AccuracyCalculator: seconds and memory for the same numbers.

    python benchmarks/retrieval.py [--sizes 3000 30000] [--dim 512] [--classes 300] [--threads 1] [--repeats 3] [--out
    benchmarks/retrieval.csv]

Random clusters on the sphere, each image against all others: precision@1, R-precision and MAP@R. Both must agree to
six digits, or the script
stops. `k` is what the calculator is told: 'max_bin_count' fetches as many neighbours as the largest class needs, which
is right; its default
fetches and keeps the whole ranking, n × n numbers, and runs only up to 10,000 images. Every run is a process of its
own, the ways take turns, and
the figures are medians over the repeats: processor seconds of the call alone (which other programs disturb less than
the wall clock beside them),
and the process's peak of memory above what it held before. `times_ours` is the ratio of the processor seconds."""

import argparse, csv, json, os, subprocess, sys, time
from pathlib import Path
import numpy as np


def peak(again: bool = False) -> int:  # MB; `again` begins anew from what is held now
    if again:
        Path('/proc/self/clear_refs').write_text('5')
    return (
        int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith('VmHWM')).split()[1])
        // 1024
    )


def data(n: int, dim: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    x = (0.3 * rng.normal(size=(classes, dim))[y] + rng.normal(size=(n, dim))).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), y


def one(way: str, n: int, dim: int, classes: int, threads: int) -> dict:
    "One way at one size, in this process"
    import faiss, torch

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    x, y = data(n, dim, classes)
    x = torch.from_numpy(x)
    if way == 'hiermetric':
        from hiermetric.similarity.scores import evaluate_retrieval
        from hiermetric.similarity.search import neighbours
        from hiermetric.trees.taxonomy import Taxonomy

        tax = Taxonomy.from_paths({f'c{i:04}': '' for i in range(classes)})
        y = tax.leaves[y].astype(np.int64)
        neighbours(x[:9], x[:9], 1)
        run = lambda: (
            evaluate_retrieval(x, y, tax=tax, graded=None, k=(1,))
            .loc['leaf', ['precision@1', 'r_precision', 'map@r']]
            .tolist()
        )
    else:
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

        names = 'precision_at_1', 'r_precision', 'mean_average_precision_at_r'
        y = torch.from_numpy(y)
        calc = AccuracyCalculator(
            include=names, device=torch.device('cpu'), k='max_bin_count' if way == 'max_bin_count' else None
        )
        calc.get_accuracy(x[:9], y[:9])
        run = lambda: list(map(calc.get_accuracy(x, y).__getitem__, names))
    before, wall, cpu = peak(again=True), time.perf_counter(), time.process_time()
    scores = run()
    return dict(
        seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        peak_mb=peak() - before,
        scores=scores,
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', type=int, nargs='+', default=[3000, 30000])
    p.add_argument('--dim', type=int, default=512)
    p.add_argument('--classes', type=int, default=300)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    p.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        return print(json.dumps(one(a.one[0], int(a.one[1]), a.dim, a.classes, a.threads)))
    rows = []
    for n in a.sizes:
        ways = ('hiermetric', 'max_bin_count', *(['default'] if n <= 10_000 else []))
        found = {way: [] for way in ways}
        for _ in range(a.repeats):
            for way in ways:
                found[way].append(
                    json.loads(
                        subprocess.run(
                            [
                                sys.executable,
                                __file__,
                                '--one',
                                way,
                                str(n),
                                '--dim',
                                str(a.dim),
                                '--classes',
                                str(a.classes),
                                '--threads',
                                str(a.threads),
                            ],
                            check=True,
                            stdout=subprocess.PIPE,
                            text=True,
                        ).stdout.splitlines()[-1]
                    )
                )
        ours = found['hiermetric']
        for way, runs in found.items():
            for o in runs:
                np.testing.assert_allclose(o['scores'], ours[0]['scores'], atol=1e-6)
            mid = {k: float(np.median([o[k] for o in runs])) for k in ('seconds', 'cpu_seconds', 'peak_mb')}
            rows.append(
                dict(
                    n=n,
                    dim=a.dim,
                    classes=a.classes,
                    threads=a.threads,
                    repeats=a.repeats,
                    way='hiermetric' if way == 'hiermetric' else f'AccuracyCalculator, k={way}',
                    seconds=round(mid['seconds'], 2),
                    cpu_seconds=round(mid['cpu_seconds'], 2),
                    peak_mb=round(mid['peak_mb']),
                    times_ours=round(mid['cpu_seconds'] / np.median([o['cpu_seconds'] for o in ours]), 2),
                    map_at_r=round(runs[0]['scores'][2], 6),
                    load_average=round(os.getloadavg()[0], 1),
                )
            )
            print(' '.join(f'{k}={v}' for k, v in rows[-1].items()), flush=True)
    with a.out.open('w', newline='') as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)


if __name__ == '__main__':
    main()
