"The results page of dynamic confidence runs from end to end in its quick profile, on organisms drawn on the spot."
import shutil
from pathlib import Path
import nbformat
import execute_nbs

def test_quick_profile(tmp_path, monkeypatch):
    monkeypatch.setenv('HIERMETRIC_PROFILE', 'quick')
    page = Path(__file__).resolve().parent.parent/'nbs'/'results'/'confidence.ipynb'
    copy = Path(shutil.copy(page, tmp_path))
    execute_nbs.run(copy, ['data'], timeout=300)
    outputs = [o for c in nbformat.read(copy, 4).cells if c.cell_type == 'code' for o in c.outputs]
    text = '\n'.join(str(o.get('text', '')) + str(o.get('data', {}).get('text/plain', '')) for o in outputs)
    assert 'synthetic-taxa' in text and all(o in text for o in ('expected', 'worst branch', 'bits per mistake', 'recalibrated', 'estimated ratios', 'half resolution'))
    assert not [o for o in outputs if o.output_type == 'error']
