"The page about unseen species runs from end to end in its quick profile, on organisms drawn on the spot."
import shutil
from pathlib import Path
import nbformat
import execute_nbs

def test_quick_profile(tmp_path, monkeypatch):
    monkeypatch.setenv('HIERMETRIC_PROFILE', 'quick')
    copy = Path(shutil.copy(Path(__file__).resolve().parent.parent/'nbs'/'results'/'unseen.ipynb', tmp_path))
    execute_nbs.run(copy, ['data'], timeout=600)
    outputs = [o for c in nbformat.read(copy, 4).cells if c.cell_type == 'code' for o in c.outputs]
    text = '\n'.join(str(o.get('text', '')) + str(o.get('data', {}).get('text/plain', '')) for o in outputs)
    assert all(o in text for o in ('climb', 'blend', 'complement', 'told when to stop', 'synthetic-taxa', 'prototype', 'knn'))
    assert not [o for o in outputs if o.output_type == 'error']
