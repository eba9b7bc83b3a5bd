"Run notebooks in place keeping their outputs, skipping what `nbdev_test` skips (`#| eval: false`, tst_flags)."

import argparse
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from execnb.nbio import NbCell
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives
from nbdev.clean import clean_nb


class Client(NotebookClient):
    "Skips cells with `skip` flags or `#| eval: false`, keeping their stored outputs"

    skip = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == 'code':
            d = extract_directives(NbCell(cell_index, dict(cell)), remove=False)
            if d.get('eval:', [''])[0].lower() == 'false' or self.skip & d.keys() or 'nbdev_export(' in cell.source:
                return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def run(f, flags=(), timeout=None):
    cfg = get_config()
    nb = nbformat.read(f, as_version=4)
    skip = set(cfg.tst_flags.split()) - set(flags)
    c = Client(nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(f.parent)}})
    c.skip = skip
    c.execute()
    clean_nb(nb, clean_ids=cfg.clean_ids)
    f.write_text(nbformat.writes(nb) + '\n', encoding='utf-8')


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('nbs', nargs='*')
    p.add_argument('--flags', default='')
    a = p.parse_args()
    for f in [Path(o) for o in a.nbs] or nbglob(as_path=True).sorted():
        print(f)
        run(f.absolute(), a.flags.split())
