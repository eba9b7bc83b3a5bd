"Small image tables, files and messages, and a small backbone for the tests of images and features."

from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from hiermetric.core import HiermetricError
from hiermetric.trees.taxonomy import Taxonomy


class Table(SimpleNamespace):
    def __len__(self):
        return len(self.samples)


def touch(folder, *files):
    "Empty files"
    for o in files:
        (Path(folder) / o).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / o).touch()
    return Path(folder)


def message(f, *args, **kw):
    "What the error says"
    with pytest.raises(HiermetricError) as e:
        f(*args, **kw)
    return str(e.value)


def toy_table(folder, n=48, size=40, name='toy', fill='white'):
    "Pictures of noise in two classes; the same for the same arguments"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tax, rng = Taxonomy.from_paths({'cod': 'fish', 'eel': 'fish'}), np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (size, size + i % 7, 3), dtype=np.uint8)).save(folder / f'{i:04}.png')
    samples = pd.DataFrame(
        {
            'path': [str(folder / f'{i:04}.png') for i in range(n)],
            'class': ['cod', 'eel'] * (n // 2),
            'split': ['train', 'train', 'val', 'test'] * (n // 4),
        }
    )
    return Table(
        samples=samples,
        taxonomy=tax,
        targets=np.asarray(tax.index(samples['class'].tolist())),
        name=name,
        fill=fill,
        fingerprint=f'{name}{n}',
    )


def toy_backbone(size=32):
    from hiermetric.images.backbones import create_backbone

    return create_backbone('timm:resnet10t', pretrained=False, size=size, fit='pad', fill='white')
