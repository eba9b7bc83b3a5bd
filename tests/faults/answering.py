"A tiny model and the command `predict` in this process, for the tests of answers."

import contextlib, os
from types import SimpleNamespace
import numpy as np, pandas as pd
from PIL import Image
from typer.testing import CliRunner
from toys import Table, toy_backbone


def picture(path, seed=0, size=36):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path, 'png')
    return path


def tiny_predictor(folder, tax, classes, **kw):
    "Trained on noise, for a tree and some of its leaves"
    from hiermetric.images.features import extract
    from hiermetric.running.predictor import Predictor
    from hiermetric.running.fitting import fit

    n, backbone = 8 * len(classes), toy_backbone()
    samples = pd.DataFrame(
        {
            'path': [str(picture(folder / f'{i}.png', i)) for i in range(n)],
            'class': list(classes) * 8,
            'split': (['train'] * len(classes) + ['val'] * len(classes)) * 4,
        }
    )
    table = Table(
        samples=samples,
        taxonomy=tax,
        targets=np.asarray(tax.index(samples['class'].tolist())),
        name='tiny',
        fill='white',
        fingerprint='tiny',
    )
    f = extract(table, backbone, cache=folder / 'features', progress=False, engine='eager')
    p = Predictor.from_model(fit(f, 'classifier', epochs=2, embed_dim=8, device='cpu').model, f, **kw)
    p._given, p.width = backbone, f.x.shape[1]
    return p


def predicts(monkeypatch, predictor):
    "The command, which finds this predictor whatever the name of the model"
    import hiermetric.running.calibrated as m
    import hiermetric.running.predictor as kept
    from hiermetric.running.cli import app

    monkeypatch.setattr(kept.Predictor, 'from_pretrained', lambda *_, **__: predictor)
    monkeypatch.setattr(m, 'choose_engine', lambda name='auto': 'eager')

    def predict(*args, at='.', rule='argmax'):
        with contextlib.chdir(at):
            r = CliRunner().invoke(
                app,
                ['predict', *map(os.fspath, args), '--model', 'x', '--rule', rule],
                prog_name='hiermetric',
                env={'COLUMNS': '200', 'NO_COLOR': '1', 'TERM': 'dumb'},
            )
        if r.exception and not isinstance(r.exception, SystemExit):
            raise r.exception
        return SimpleNamespace(code=r.exit_code, out=r.stdout, err=r.stderr)

    return predict
