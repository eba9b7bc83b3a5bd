"""README.md is `nbs/index.ipynb` read aloud: its Markdown cells and the outputs of its code cells.

    python tests/readme.py write          write README.md
    python tests/readme.py check          exit 1 where README.md differs
    python tests/readme.py test-command   print README's second command (what CI runs)

Needs nothing but Python, since CI calls it before anything is installed."""

import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT / 'nbs' / 'index.ipynb', ROOT / 'README.md'


def _text(o):
    return ''.join(o) if isinstance(o, list) else o


def _output(o):
    "Markdown of one output; pictures must be files, so that README holds no base64"
    if o['output_type'] == 'stream':
        return f"```\n{_text(o['text']).rstrip()}\n```"
    data = o.get('data', {})
    if 'text/markdown' in data:
        return _text(data['text/markdown'])
    if any(k.startswith('image/') for k in data):
        raise SystemExit('index.ipynb shows a picture from a code cell; save it under nbs/images and link it.')
    return f"```\n{_text(data['text/plain']).rstrip()}\n```" if 'text/plain' in data else ''


def _link(m):
    "A link relative to nbs/ becomes one relative to the repository"
    label, target = m[1], m[2]
    if re.match(r'[a-z]+:|#|/', target):
        return m[0]
    p = (INDEX.parent / target.partition('#')[0]).resolve().relative_to(ROOT)
    return f'{label}({p})'


def readme():
    out = []
    for c in json.loads(INDEX.read_text(encoding='utf-8'))['cells']:
        src = _text(c['source'])
        if c['cell_type'] == 'markdown':
            out.append(src)
        elif c['cell_type'] == 'code' and not re.search(r'^#\|\s*(hide|default_exp)', src, re.M):
            if not re.search(r'^#\|\s*echo:\s*false', src, re.M):
                out.append('```python\n' + re.sub(r'^#\|.*\n', '', src, flags=re.M) + '\n```')
            out += [t for o in c['outputs'] if (t := _output(o))]
    return (
        '<!-- Written from nbs/index.ipynb by tests/readme.py; edit the notebook. -->\n\n'
        + re.sub(r'(\[[^\]]*\])\(([^)\s]+)\)', _link, '\n\n'.join(o.strip() for o in out if o.strip()))
        + '\n'
    )


def test_command():
    "The second `sh` block of README.md"
    return re.findall(r'^```sh\n(.*?)\n```', README.read_text(encoding='utf-8'), re.M | re.S)[1]


if __name__ == '__main__':
    what = sys.argv[1] if len(sys.argv) > 1 else ''
    if what == 'write':
        README.write_text(readme(), encoding='utf-8')
    elif what == 'check':
        if README.read_text(encoding='utf-8') != readme():
            raise SystemExit("README.md differs from nbs/index.ipynb: run 'python tests/readme.py write'.")
    elif what == 'test-command':
        print(test_command())
    else:
        raise SystemExit(__doc__)
