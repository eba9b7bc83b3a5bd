"""Images a second from file to feature, each way of running the network against the loop one writes first.

    HIERMETRIC_DATA=../shared/data python benchmarks/features.py [images] [rounds]

All ways take turns in every round, so that a busy moment of the machine hits them alike; medians and best rounds over
all rounds go to benchmarks/features.csv.
Decoding and resizing are included everywhere, files are in the page cache, torch has as many threads as there are
cores.
`compute` shows how much processor time an image costs: it hardly depends on who else uses the machine."""

import os, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from PIL import Image
from hiermetric.images.backbones import create_backbone
from hiermetric.images.pictures import read_image
from hiermetric.images.named import load_dataset
from hiermetric.images.engines import image_batches, ENGINES, torch_threads

n, rounds = (int(a) for a in (sys.argv[1:] + ["128", "5"][len(sys.argv) - 1 :])[:2])


def plain(backbone, paths, batch):
    "Read with PIL, make ready one by one, batches through the network as it comes"
    with torch.inference_mode():
        return torch.cat(
            [
                backbone.model(torch.stack([backbone.transform(Image.open(p)) for p in paths[i : i + batch]]))
                for i in range(0, len(paths), batch)
            ]
        ).numpy()


def engine(name, backbone, paths, batch):
    run = ENGINES[name](backbone)

    def way():
        with torch_threads(1 if name == 'openvino' else None):
            batches = image_batches(paths, backbone.transform, batch, os.cpu_count())
            return np.concatenate(list(run(b for b, _ in batches)))

    return way


def measure(dataset):
    table = load_dataset(dataset)
    paths = table.samples.path.iloc[:: max(1, len(table) // n)].tolist()[:n]
    b = create_backbone(fit='pad', fill=table.fill)
    with torch_threads(1):
        ready = {
            'read and decode': lambda: [read_image(p) for p in paths],
            'read, decode, resize': lambda: [b.transform.pixels(p) for p in paths],
        }
        for f in ready.values():
            f()
    ways = {
        'plain loop, batches of 32': lambda: plain(b, paths, 32),
        'plain loop, batches of 4': lambda: plain(b, paths, 4),
        'eager': engine('eager', b, paths, 8),
        'folded': engine('folded', b, paths, 8),
        'compiled': engine('compiled', b, paths, 8),
        'openvino': engine('openvino', b, paths, 8),
        **ready,
    }
    vectors = {k: f() for k, f in ways.items()}  # warm
    wall, cpu = {k: [] for k in ways}, {k: [] for k in ways}
    for _ in range(rounds):
        for k, f in ways.items():
            t, c = time.perf_counter(), time.process_time()
            f()
            wall[k].append(time.perf_counter() - t)
            cpu[k].append(time.process_time() - c)
    base = torch.tensor(vectors['plain loop, batches of 32'])
    rows = [
        {
            'dataset': dataset,
            'way': k,
            'images/s median': n / np.median(wall[k]),
            'images/s best': n / min(wall[k]),
            'times plain, median': np.median(wall['plain loop, batches of 32']) / np.median(wall[k]),
            'times plain, best': min(wall['plain loop, batches of 32']) / min(wall[k]),
            'compute ms an image': 1000 * np.median(cpu[k]) / n,
            'lowest cosine': torch.cosine_similarity(torch.tensor(vectors[k]), base).min().item()
            if k not in ready
            else None,
        }
        for k in ways
    ]
    return pd.DataFrame(rows)


if __name__ == '__main__':
    print(
        f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before, torch {torch.__version__}, {n} images, '
        f'{rounds} rounds',
        flush=True,
    )
    out = pd.concat([measure(o) for o in ('planktonset', 'tiny-imagenet', 'cifar-100')]).round(
        {
            'images/s median': 1,
            'images/s best': 1,
            'times plain, median': 2,
            'times plain, best': 2,
            'compute ms an image': 2,
            'lowest cosine': 6,
        }
    )
    print(out.to_string(index=False))
    print(f'load {os.getloadavg()[0]:.1f} after')
    out.to_csv(Path(__file__).with_suffix('.csv'), index=False)
